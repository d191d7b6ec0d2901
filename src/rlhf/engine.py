"""One engine for policy and critic, whatever drives it: a process alone, data parallelism, DeepSpeed's ZeRO, or FSDP 2.

An Accelerator drives one DeepSpeed engine: a second prepared model would never step, in silence. So policy and critic are one
module with two parameter groups, entered through the engine's forward. What a loop of our own does between its forwards
(accumulation, clipping, dropped steps, whole weights for a rollout, an average of the weights) is here, once for each kind.
"""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf import RLHFError
from rlhf.muon import Muon, hidden_matrices, piece_of, spread


class EngineError(RLHFError):
    """The launch asks for something that cannot be driven."""


class Engine:
    """Whole gradients on every process: a process alone, or DistributedDataParallel."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.accelerator = accelerator
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        spread(self.optimizer)

    def backward(self, work: Sequence[Callable[[], Tensor]]) -> None:
        """Accumulates the gradients of all parts; processes exchange them once, in the last one.

        The last part must use every parameter: gradients are reduced in it.
        """
        for i, part in enumerate(work):
            last = i == len(work) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            if last:
                self.accelerator.backward(part())
            else:
                with self.accelerator.no_sync(self.model):
                    self.accelerator.backward(part())

    def clip(self, parts: dict[str, nn.Module], limit: float) -> dict[str, float]:
        """Clips the gradient of each part to the norm `limit`; the norms before. The optimiser's groups name their `part`."""
        return {
            name: float(self.accelerator.clip_grad_norm_(part.parameters(), limit) or 0.0)
            for name, part in parts.items()
        }

    def step(self, drop: bool = False) -> None:
        """The optimiser's step, or none, and no gradients afterwards."""
        if not drop:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision in which the engine's forward runs, for forwards outside of it."""
        return self.accelerator.autocast()

    def freeze(self, models: Iterable[Any]) -> None:
        """Makes models that never learn ready for `whole`."""

    def whole(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """`model` with all of its weights on this process, for forwards outside of the engine's; entered by all processes."""
        return contextlib.nullcontext()

    @property
    def sharded(self) -> bool:
        """Whether `local` gives each process a piece of its own."""
        return False


class ZeroEngine(Engine):
    """DeepSpeed's ZeRO 1, 2 or 3: optimiser states, gradients, weights spread over the processes.

    Clipping is ours, by parameter group: DeepSpeed's own takes policy and critic as one, and would let the scale of the one
    decide the step of the other.
    """

    def __init__(
        self, accelerator: Accelerator, model: Any, optimizer: torch.optim.Optimizer, micro_batch: int, gather: bool
    ):
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        check_deepspeed(config, type(optimizer))
        config["train_micro_batch_size_per_gpu"] = micro_batch
        config["gradient_accumulation_steps"] = 1  # the parts of a step are counted here: `backward`
        config["gradient_clipping"] = 0.0
        self.config = config
        self.stage = int(config["zero_optimization"]["stage"])
        self.gather = gather or self.stage < 3
        # A parameter without a gradient in one part of a step would keep the one of the step before, or lose its own.
        model.every_part_uses_all = True
        gather_by_layer(model, self.stage)
        super().__init__(accelerator, model, optimizer)
        self.zero = self.model.optimizer  # DeepSpeed's: the gradients are its own
        self.part_of = [group["part"] for group in self.optimizer.param_groups]

    def backward(self, work: Sequence[Callable[[], Tensor]]) -> None:
        for i, part in enumerate(work):
            self.model.set_gradient_accumulation_boundary(i == len(work) - 1)
            self.model.backward(part())

    def clip(self, parts: dict[str, nn.Module], limit: float) -> dict[str, float]:
        norms = self._norms()
        for group, gradients in self._gradients():
            scale = limit / (norms[self.part_of[group]] + 1e-6)
            if scale < 1:  # not where a norm is not finite: such a step is dropped
                for gradient in gradients:
                    gradient.mul_(scale)
        return {name: norms[name] for name in parts}

    def _norms(self) -> dict[str, float]:
        """The norm of each part's gradient over all processes, nan where DeepSpeed finds none."""
        zero = self.zero
        if self.stage == 3:
            found = list(enumerate(zero._get_norm_groups()))
            groups = [zero.sub_group_to_group_id[i] for i, _ in found]
        else:
            groups = list(range(len(zero.bit16_groups)))
            found = [
                (i, zero.complete_grad_norm_calculation_for_cpu_offload(zero.params_in_partition[i]))
                if zero.cpu_offload
                else (i, zero.get_grad_norm_direct(zero.averaged_gradients[i], zero.params_in_partition[i]))
                for i in groups
            ]
        squares = dict.fromkeys(self.part_of, 0.0)
        for group, (_, norm) in zip(groups, found):
            squares[self.part_of[group]] += float(norm) ** 2 if float(norm) >= 0 else float("nan")
        return {part: square**0.5 for part, square in squares.items()}

    def _gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """This process's pieces of the gradient, by parameter group."""
        zero = self.zero
        if self.stage == 3:
            for i in range(len(zero.fp16_groups)):
                whole = [zero.fp32_partitioned_groups_flat[i].grad] if zero.offload_optimizer else None
                yield zero.sub_group_to_group_id[i], whole or zero.averaged_gradients[i]
        else:
            for i in range(len(zero.bit16_groups)):
                whole = [zero.single_partition_of_fp32_groups[i].grad] if zero.cpu_offload else None
                yield i, whole or [g for g in zero.averaged_gradients[i] if g is not None]

    def step(self, drop: bool = False) -> None:
        """DeepSpeed skips a step whose norm is invalid, and cleans up after it: to drop one, it is told so."""
        if drop:
            invalid = torch.tensor(-1.0, device=self.accelerator.device)
            name, answer = ("_get_norm_groups", [invalid]) if self.stage == 3 else ("scaled_global_norm", invalid)
            setattr(self.zero, name, lambda *args, **kwargs: answer)
        try:
            self.model.step()
        finally:
            if drop:
                delattr(self.zero, name)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # the weights themselves are bfloat16 where that is asked for

    def freeze(self, models: Iterable[Any]) -> None:
        """The dtype of the policy, so that the reference starts equal to it; under ZeRO 3 spread over the processes."""
        dtype = next(self.model.module.parameters()).dtype
        for model in models:
            # Below transformers' own, which refuses quantised models: their other weights go the policy's way all the same.
            nn.Module.to(model, dtype)
            if self.stage == 3 and not any(hasattr(p, "ds_id") for p in model.parameters()):
                import deepspeed

                deepspeed.zero.Init(module=model, config_dict_or_path=self.config)

    def whole(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        if model is None:
            return contextlib.nullcontext()
        return whole(self.model, model) if self.gather else layer_by_layer(self.model, model)

    @property
    def sharded(self) -> bool:
        return self.stage == 3


class FsdpEngine(Engine):
    """PyTorch's FSDP 2: weights, gradients and optimiser states spread over the processes.

    A layer is whole for its own forward and backward, and gradients are spread after each part of a step.
    """

    def __init__(self, accelerator: Accelerator, model: Any, optimizer: torch.optim.Optimizer):
        plugin = accelerator.state.fsdp_plugin
        refuse_optimizers_of_others(type(optimizer))
        keep_results_precise(plugin)
        self.dtype = getattr(plugin.mixed_precision_policy, "param_dtype", None)
        # What accelerate asks a transformers model for.
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        model._no_split_modules = sorted({type(layer).__name__ for layer in layers})
        super().__init__(accelerator, model, optimizer)
        self.mesh = next(model.parameters()).device_mesh

    def backward(self, work: Sequence[Callable[[], Tensor]]) -> None:
        for part in work:
            self.accelerator.backward(part())

    def clip(self, parts: dict[str, nn.Module], limit: float) -> dict[str, float]:
        norms = {}
        for name, part in parts.items():
            norm = nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None])
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            nn.utils.clip_grads_with_norm_(part.parameters(), limit, norm)
            norms[name] = float(norm)
        return norms

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # the weights themselves are bfloat16 in a forward

    def freeze(self, models: Iterable[Any]) -> None:
        """The dtype of the policy's forward, so that the reference starts equal to it; spread over the processes."""
        for model in models:
            nn.Module.to(model, self.dtype)
            spread: dict[Tensor, nn.Parameter] = {}  # a tied weight stays one
            for module, name, p in _places(model):
                if p not in spread:
                    spread[p] = nn.Parameter(piece_of(p.detach(), self.mesh), requires_grad=False)
                module._parameters[name] = spread[p]

    def whole(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if model is None else whole(self.model, model, self.dtype)

    @property
    def sharded(self) -> bool:
        return True


def prepare(
    accelerator: Accelerator, model: Any, optimizer: torch.optim.Optimizer, micro_batch: int, gather: bool = True
) -> Engine:
    """The engine that this launch asks for; micro_batch: items of one forward on one process, for DeepSpeed's records.

    gather: whether ZeRO 3 has room for a whole model on each process in `Engine.whole`; else a layer is whole at a time.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return ZeroEngine(accelerator, model, optimizer, micro_batch, gather)
    if accelerator.distributed_type == DistributedType.FSDP:
        if not gather:
            raise EngineError(
                "ds3_gather_for_generation: under FSDP a model is gathered whole for a rollout; launch with "
                "--config_file configs/accelerate/zero3.yaml, or set it to true"
            )
        return FsdpEngine(accelerator, model, optimizer)
    return Engine(accelerator, model, optimizer)


def check_deepspeed(config: dict[str, Any], optimizer: type[torch.optim.Optimizer]) -> None:
    """Refuses what DeepSpeed would do with the optimiser, or with weights at the end, in place of what was asked for.

    With an offloaded optimiser accelerate puts DeepSpeed's CPU Adam in the place of whatever was asked for, in silence. ZeRO
    steps flat pieces of the weights: an optimiser that looks at whole matrices sees other ones.
    """
    zero = config["zero_optimization"]
    if int(zero["stage"]) == 0:
        raise EngineError(
            "DeepSpeed without ZeRO (stage 0) is not driven here; launch with configs/accelerate/ddp.yaml"
        )
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise EngineError(
                f"the DeepSpeed file has a section {section!r}, which would take the place of the stage's own; take it out"
            )
    zero["stage3_gather_16bit_weights_on_model_save"] = True  # or nothing could be published
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    adam = issubclass(optimizer, torch.optim.Adam) and not issubclass(optimizer, Muon)  # AdamW is one
    if device != "none" and not adam:
        raise EngineError(
            f"optim: an offloaded optimiser is DeepSpeed's CPU Adam, and {optimizer.__name__} was asked for; set it to "
            "adamw_torch, or launch without offload"
        )
    if not (issubclass(optimizer, Muon) or optimizer.__module__.startswith(("torch.optim", "bitsandbytes"))):
        raise EngineError(
            f"optim: ZeRO steps flat pieces of the weights, and {optimizer.__name__} may need whole matrices; set it to "
            "adamw_torch, or launch with configs/accelerate/ddp.yaml"
        )


def check_precision(config: dict[str, Any], bf16: bool) -> None:
    """Refuses a DeepSpeed file that decides the precision otherwise than the stage. transformers' Trainer does so itself."""
    decided = {name: config.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")}
    if decided["bf16"] not in ("auto", bf16) or decided["fp16"] not in ("auto", False):
        told = ", ".join(f"{name} enabled: {value}" for name, value in decided.items())
        raise EngineError(f"bf16 is {bf16}, and the DeepSpeed file decides otherwise ({told}); write auto there")


def refuse_optimizers_of_others(optimizer: type[torch.optim.Optimizer]) -> None:
    """FSDP's parameters are DTensors, which kernels of other libraries do not know."""
    if not optimizer.__module__.startswith("torch.") and not issubclass(optimizer, Muon):
        raise EngineError(
            f"optim: FSDP spreads weights as PyTorch's own optimisers know them, and {optimizer.__name__} was asked for; set it "
            "to adamw_torch or muon, or launch with ZeRO (configs/accelerate)"
        )


def keep_results_precise(plugin: Any) -> None:
    """Under bf16 accelerate has FSDP round what a model returns to bfloat16, and add gradients in it; here weights alone are."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, output_dtype=None
        )


def gather_by_layer(model: nn.Module, stage: int) -> None:
    """Has ZeRO 3 gather a transformer layer at once, as FSDP does, and not each of its modules by itself.

    Not where weights are frozen (adapters): DeepSpeed would release such a layer before its gradient is computed.
    """
    if stage == 3 and all(p.requires_grad for p in model.parameters()):
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [GradientCheckpointingLayer], raise_if_not_found=False)


def prepare_trainer(trainer: Any, optim: str) -> None:
    """Before transformers' Trainer makes an engine of its model and optimiser: the same refusals, whole layers, and Muon."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    try:
        cls, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args)
    except (ValueError, ImportError) as error:
        raise EngineError(f"optim: {' '.join(str(error).split())}") from error
    if trainer.accelerator.distributed_type == DistributedType.FSDP:
        refuse_optimizers_of_others(cls)
        keep_results_precise(trainer.accelerator.state.fsdp_plugin)
    if optim == "muon":
        cls, kwargs = Muon, {**kwargs, "matrices": hidden_matrices(trainer.model)}
        trainer.optimizer_cls_and_kwargs = (cls, kwargs)
        trainer.add_callback(SpreadMuon(trainer))
    if plugin is not None:
        check_deepspeed(plugin.deepspeed_config, cls)
        gather_by_layer(trainer.model, plugin.zero_stage)


class SpreadMuon(TrainerCallback):
    """`muon.spread`, once a Trainer has made its engine."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        spread(self.trainer.optimizer)


# ------------------------------------------------------------------------------------------------- weights that are spread


@contextlib.contextmanager
def gathered(parameters: Iterable[Any], modify: bool = False) -> Iterator[None]:
    """Parameters that ZeRO 3 spreads over the processes, whole for the block; others as they are. Entered by all processes.

    modify: what the first process writes into them in the block is kept.
    """
    spread = [p for p in parameters if hasattr(p, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread, modifier_rank=0 if modify else None):
        yield


def is_whole(parameter: Any) -> bool:
    """Whether all of it is on this process now, and not only the piece that ZeRO 3 or FSDP left here."""
    if hasattr(parameter, "ds_id"):
        return bool(parameter.ds_status.name == "AVAILABLE")
    return not hasattr(parameter, "full_tensor")


@contextlib.contextmanager
def weights_of(model: nn.Module, modify: bool = False, dtype: torch.dtype | None = None) -> Iterator[None]:
    """`gathered` for all weights of a model, whether ZeRO 3 or FSDP spreads them; under FSDP in `dtype`, where one is given.

    Under FSDP whole tensors take the place of the pieces, for forwards without gradient.
    """
    wholes: dict[Any, nn.Parameter] = {}
    pieces: list[tuple[nn.Module, str, Any]] = [p for p in _places(model) if hasattr(p[2], "full_tensor")]
    hooks = _set_aside(model.modules() if pieces else (), "_load_state_dict_post_hooks")  # which look for pieces
    with torch.no_grad(), gathered(model.parameters(), modify), hooks:
        for module, name, piece in pieces:
            if piece not in wholes:
                wholes[piece] = nn.Parameter(piece.full_tensor().to(dtype or piece.dtype), requires_grad=False)
            module._parameters[name] = wholes[piece]
        try:
            yield
        finally:
            for module, name, piece in pieces:
                module._parameters[name] = piece
        if modify:
            for piece, new in wholes.items():
                torch.distributed.broadcast(new.detach(), 0)
                put([piece], local([piece_of(new.detach(), piece.device_mesh)]))


def _places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Where the parameters of a model are; a tied one is in several places."""
    return [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None]


@contextlib.contextmanager
def whole(engine: Any, model: Any, dtype: torch.dtype | None = None) -> Iterator[None]:
    """`model` with all of its weights for the block, gathered once, for forwards outside of the engine's; see `weights_of`."""
    settle(engine)
    with weights_of(model, dtype=dtype), without_hooks(engine):
        yield


@contextlib.contextmanager
def without_hooks(engine: Any) -> Iterator[None]:
    """The engine's module without the hooks of ZeRO 3 or FSDP, which would gather and release weights at each layer."""
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    if offload is not None:
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
    try:
        with _set_aside(_fsdp_modules(engine), "_forward_pre_hooks", "_forward_hooks"):
            yield
    finally:
        if offload is not None:
            offload._register_deepspeed_module(offload.module)


def _fsdp_modules(model: Any) -> list[Any]:
    """The modules that FSDP gathers one at a time; none under another strategy."""
    if "torch.distributed.fsdp" not in sys.modules or not isinstance(model, nn.Module):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def _set_aside(modules: Iterable[nn.Module], *kinds: str) -> Iterator[None]:
    """Modules without their hooks of some kinds, for the time of the block."""
    kept = [(module, kind, getattr(module, kind)) for module in modules for kind in kinds]
    for module, kind, _ in kept:
        setattr(module, kind, OrderedDict())
    try:
        yield
    finally:
        for module, kind, hooks in kept:
            setattr(module, kind, hooks)


@contextlib.contextmanager
def layer_by_layer(engine: Any, model: Any) -> Iterator[None]:
    """`whole` where a model does not fit: a transformer layer is whole for its own forward, all else for the block.

    Forwards without gradient, each through all layers in their order. Processes pass a layer together, so one whose forwards are
    over goes through the layers with the others until theirs are, too.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {p for layer in layers for p in layer.parameters()}
    settle(engine)
    with gathered(p for p in model.parameters() if p not in inner), without_hooks(engine):
        passing = Passing(layers, engine.device)
        try:
            yield
        except RLHFError:
            passing.go_on()
            raise
        else:  # after any other error this process ends, and the launcher ends the others
            passing.go_on()
        finally:
            passing.end()


class Passing:
    """Hooks that make each of `layers` whole for its forward, in step with the other processes."""

    def __init__(self, layers: Sequence[nn.Module], device: Any):
        self.layers, self.device = layers, device
        self.whole = contextlib.ExitStack()
        self.hooks: list[Any] = []
        for layer in layers:
            self.hooks.append(layer.register_forward_pre_hook(self._before))
            self.hooks.append(layer.register_forward_hook(self._after, always_call=True))

    def _before(self, layer: nn.Module, args: Any) -> None:
        if layer is self.layers[0]:
            self._anyone(True)
        self.whole.enter_context(gathered(layer.parameters()))

    def _after(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.whole.close()

    def _anyone(self, here: bool) -> bool:
        """Whether any process begins a forward."""
        count = torch.tensor(float(here), device=self.device)
        torch.distributed.all_reduce(count)
        return bool(count > 0)

    def go_on(self) -> None:
        """Passes the layers while another process has forwards left."""
        while self.layers and self._anyone(False):
            for layer in self.layers:
                with gathered(layer.parameters()):
                    pass

    def end(self) -> None:
        for hook in self.hooks:
            hook.remove()


def settle(engine: Any) -> None:
    """Ends what ZeRO 3 has fetched ahead for a forward that does not follow, or FSDP kept whole after the last one.

    Then weights can be gathered and written.
    """
    for module in _fsdp_modules(engine):
        module.reshard()
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    if offload is not None:
        offload.partition_all_parameters()


def state_dict(accelerator: Accelerator, model: Any) -> Any:
    """The module's weights, gathered from all processes where they are spread; then only the first process gets them.

    Tied weights stay one tensor under two names, so that save_pretrained writes them once; accelerate would clone them.
    """
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if deepspeed and accelerator.state.deepspeed_plugin.zero_stage < 3:
        return accelerator.unwrap_model(model).state_dict()
    if accelerator.distributed_type == DistributedType.FSDP:
        return _whole_state(model, keep=accelerator.is_main_process)
    return accelerator.get_state_dict(model)


@torch.no_grad()
def _whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state dict of a module that FSDP spreads, in the machine's memory where it is kept."""
    settle(model)
    found: dict[str, Tensor] = {}
    wholes: dict[Any, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor not in wholes:
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
            wholes[tensor] = whole.cpu() if keep else whole.new_empty(0)
        found[name] = wholes[tensor]
    return found if keep else {}


@torch.no_grad()
def local(parameters: Iterable[Any]) -> list[Tensor]:
    """What this process holds of each parameter: its piece under ZeRO 3 and FSDP, else the whole."""
    return [
        p.ds_tensor.data if hasattr(p, "ds_id") else p.to_local() if hasattr(p, "to_local") else p.data
        for p in parameters
    ]


@torch.no_grad()
def put(parameters: Sequence[Any], values: Iterable[Tensor]) -> None:
    """Writes into `local`; the optimiser's float32 copies, where there are any, stay as they are."""
    for tensor, value in zip(local(parameters), values):
        tensor.copy_(value)
    # ZeRO 3 keeps small parameters whole besides: those copies are out of date now.
    stale = [p for p in parameters if hasattr(p, "ds_id") and p.numel()]
    if stale:
        stale[0].partition(param_list=stale, has_been_updated=False)


# ----------------------------------------------------------------------------------------------------------- all processes


def together(work: Callable[[], Any]) -> Any:
    """What `work` returns; an RLHFError that it raises on one process is raised on all, which would wait for that one else."""
    result, failure = None, None
    try:
        result = work()
    except RLHFError as error:
        failure = error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        told = gather_object([str(failure) if failure else ""])
        failed = [f"stopped because of process {rank}: {text}" for rank, text in enumerate(told) if text]
        if failed and failure is None:
            raise EngineError(failed[0])
    if failure is not None:
        raise failure
    return result
