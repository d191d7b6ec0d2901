# Everything runs in .venv, which the first target that needs it makes from constraints.txt.
#   make demo             the whole pipeline on a laptop
#   make sft RUN=hh CONFIG=configs/sft/hh.yaml ARGS="--learning_rate 1e-5"
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?=
CONFIG ?=
ARGS   ?=
THREADS ?= $(shell nproc 2>/dev/null || echo 2)
# Without a GPU: one process with all cores. With GPUs accelerate takes them all; give other launches here.
ACCELERATE_ARGS ?= --num_cpu_threads_per_process $(THREADS) $(if $(shell command -v nvidia-smi),,--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no)

export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

# Without CONFIG and ARGS, and with no RUN or the demo's, a stage is launched without arguments: the demo's recipe.
OTHER_RUN = $(if $(CONFIG)$(ARGS),$(RUN),$(filter-out demo,$(RUN)))
STAGE_ARGS = $(if $(CONFIG),--config $(CONFIG),) $(if $(OTHER_RUN),--run_name $(OTHER_RUN),) $(ARGS)
LAUNCH = $(BIN)/accelerate launch --quiet $(ACCELERATE_ARGS)

.PHONY: setup demo test test-gpu lint pretrain sft rm ppo eval report doctor bench clean

setup: $(VENV)/.made

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all]'
	@touch $@

demo: setup
	OMP_NUM_THREADS=$(THREADS) PYTHONPATH=data $(BIN)/python -m demo_world.demo $(ARGS)

# Files of tests in up to four processes; each test has one thread, or starts processes of its own.
test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

# What needs a CUDA device; the other tests do not see one.
test-gpu: setup
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pretrain: setup
	$(LAUNCH) scripts/pretrain.py $(STAGE_ARGS)

sft: setup
	$(LAUNCH) scripts/sft.py $(STAGE_ARGS)

rm: setup
	$(LAUNCH) scripts/reward.py $(STAGE_ARGS)

ppo: setup
	$(LAUNCH) scripts/ppo.py $(STAGE_ARGS)

# RUN is the demo's where none is given.
eval: setup
	$(BIN)/rlhf eval $(or $(RUN),demo)/rm $(ARGS)

report: setup
	$(BIN)/rlhf report $(or $(RUN),demo) $(ARGS)

doctor: setup
	$(BIN)/rlhf doctor $(ARGS)

# What needs no GPU, no data from outside and no second environment; each prints its table. They take turns, since they are timed.
bench: setup
	$(BIN)/python benchmarks/zero.py
	$(BIN)/python benchmarks/memory_modes.py
	$(BIN)/python benchmarks/data.py --prompts 20000
	$(BIN)/python benchmarks/parity_trl.py --compare
	$(BIN)/python benchmarks/muon.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
