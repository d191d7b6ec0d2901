"""Stages one after the other in the processes of one launch: `accelerate launch … tests/launched.py STAGE CONFIG …`.

Each goes through `run_stage`, as in its script; the start of the processes, which takes longer than a tiny stage, is shared.
With KILL=STAGE in the environment process 1 is killed after step 7 of that stage.
"""

import gc
import os
import signal
import sys

from rlhf.cli import run_stage


def kill_process_1_after_step_7() -> None:
    from rlhf import training

    def kill(self, args, state, control, **kwargs):
        if state.global_step == 7 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    training.MarkComplete.on_step_begin = kill  # of the step after it


def drive_fsdp_on_cpus() -> None:
    """PyTorch shards modules over CPU processes, too; accelerate only drives it where it thinks of GPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    import rlhf.cli

    started = PartialState.__init__

    def start(self, *args, **kwargs):
        started(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start
    rlhf.cli.check_launch = lambda: None  # which refuses it


def main() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("ACCELERATE_USE_CPU") == "true":
        drive_fsdp_on_cpus()
    words = sys.argv[1:]
    stages = list(zip(words[::2], words[1::2]))
    for i, (stage, config) in enumerate(stages):
        if stage == os.environ.get("KILL"):
            kill_process_1_after_step_7()
        run_stage(stage, ["--config", config], last=i + 1 == len(stages))
        gc.collect()  # transformers knows of a launch under ZeRO 3 by an object of the stage before


if __name__ == "__main__":
    main()
