"""Adapters (LoRA) on a base whose weights do not change, quantised or not, and several models over one base in memory.

An adapter is published with what it stands on: the base's reference or Hub id, revision and sha256 are in `stage.json`, and the
folder is a peft repository that plain `peft` loads. A stage that starts from an adapter either trains it further on the same
base, or, without `use_peft`, trains the two merged. So all adapters of a run can stand on one base, and PPO can hold policy,
reference, critic and reward as one copy of its weights with an adapter each: `twin`. peft takes seconds to import and is imported
only where an adapter is made or loaded.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.bases import AdapterError, Base, Start, quantization
from rlhf.engine import gathered

_log = logging.getLogger(__name__)
TRAINED = "adapters.safetensors"  # of a training checkpoint: the weights that are trained
HEADS = {"score", "lm_head", "embed_out"}
OF_NEW_ADAPTERS = {  # options that say how one is made, by peft's names
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def settle_quantized(model: nn.Module) -> None:
    """Puts quantised layers into the state of their first forward, so that twins share it and all forwards are alike.

    Under autocast they answer in 16 bits, as linear layers do: activations, keys and values are half as large.
    """
    if not getattr(model, "is_quantized", False):
        return
    import bitsandbytes as bnb

    for module in model.modules():
        if (
            isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
            and _autocast not in module._forward_pre_hooks.values()
        ):
            module.register_forward_pre_hook(_autocast)
        if isinstance(module, bnb.nn.Linear4bit):
            # Packs the weights for inference at the first forward without gradient: other sums in rollout than in update.
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, bnb.nn.Linear8bitLt) and getattr(module.weight, "CB", None) is not None:
            module.init_8bit_state()


def _autocast(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What autocast makes of a linear layer's input. bitsandbytes' layers do not ask it, and answer in their input's dtype."""
    kind = inputs[0].device.type
    if torch.is_autocast_enabled(kind) and inputs[0].dtype == torch.float32:
        return (inputs[0].to(torch.get_autocast_dtype(kind)), *inputs[1:])
    return inputs


# ------------------------------------------------------------------------------------------------------- on the model


def attach(
    model: Any,
    start: Start,
    args: Any,
    *,
    task: str,
    also: Sequence[str] = (),
    trainable: bool = True,
    merge: bool = True,
) -> Any:
    """The model with the adapter of `start` and as `args` ask: trained further, new, merged, or none.

    args: None to use the model as it was published, by `merge` with its adapter merged (kept apart all the same where the merged
    weights would be another model). task: CAUSAL_LM or SEQ_CLS. also: modules that are trained whole beside the adapter. What is
    trained is `requires_grad`; the result of training is a PeftModel.
    """
    settle_quantized(model)
    if args is not None and start.adapter and dict(start.quantization or {}) != quantization(args):
        _log.warning(
            "the adapter in %s was trained on %s quantised as %s and is used on it quantised as %s: not quite the same model",
            *(start.adapter, start.base.name, dict(start.quantization or {}) or "none", quantization(args) or "none"),
        )
    if args is None or not args.use_peft:
        if start.adapter is None:
            return model
        found = _continue(model, start, task, also, trainable=False)
        why = why_apart(found)
        if args is None and (why or not merge):
            return found
        if why:
            raise AdapterError(
                f"the adapter in {start.adapter} cannot be merged to be trained: {why}; set use_peft: true"
            )
        with gathered(found.parameters(), modify=True):
            return found.merge_and_unload().requires_grad_(True)
    if start.adapter is not None:
        found = _continue(model, start, task, also, trainable=trainable)
        if trainable:
            _tell_unused(found, args, start)
    elif trainable:
        found = _new(model, args, task, also)
    else:
        return model.requires_grad_(False)  # the base with its adapter off
    found.started_from, found.quantized_to = start.base.pinned(), quantization(args)  # for `records`
    if trainable:
        _train_in_float32(found)
    if trainable and args.gradient_checkpointing:
        model.enable_input_require_grads()  # the embeddings are frozen, and a checkpointed layer needs an input with a gradient
    return found


def why_apart(model: Any) -> str:
    """Why an adapter's weights cannot be added to its base's without making another model; "" where they can."""
    base = plain(model)
    if getattr(base, "is_quantized", False):
        return "its base is quantised"
    heads = (base.get_input_embeddings(), base.get_output_embeddings())
    tied = None not in heads and getattr(base.config, "tie_word_embeddings", False)
    if tied and any(hasattr(head, "get_delta_weight") for head in heads):
        return "it is on an embedding that is tied to the other one, which would change too"
    return ""


def _tell_unused(model: Any, args: Any, start: Start) -> None:
    """Says which options for a new adapter are not used, because the one that is trained further is another."""
    config = model.peft_config["default"]
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    unused = []
    for name, theirs in OF_NEW_ADAPTERS.items():
        wanted, has = getattr(args, name), getattr(config, theirs)
        if name == "lora_modules_to_save":
            # Head and norm are there by themselves, and a scalar model has no unembedding.
            gone = HEADS - {"score"} if config.task_type == "SEQ_CLS" else set()
            differs = not set(wanted or ()) - gone <= set(has or ())
        elif wanted == ["all-linear"]:
            differs = bool(set(linear_modules(model)) - {"base_layer", "default", "original_module"})
        else:
            differs = wanted != defaults[name] and _unordered(wanted) != _unordered(has)
        if differs:
            unused.append(name)
    if unused:
        _log.warning(
            "the adapter in %s is trained further as it was made, without %s", start.adapter, ", ".join(unused)
        )


def _new(model: Any, args: Any, task: str, also: Sequence[str]) -> Any:
    from peft import LoraConfig, TaskType

    check_modules(model, args)
    targets: Any = args.lora_target_modules
    config = LoraConfig(
        task_type=TaskType(task),
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        target_parameters=args.lora_target_parameters,
        modules_to_save=list(dict.fromkeys([*also, *(args.lora_modules_to_save or [])])) or None,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
    )
    try:
        return _inject(model, config)
    except ValueError as error:
        told = " ".join(str(error).split())[:300]
        raise AdapterError(f"no such adapter can be put on {type(model).__name__}: {told}") from None


def _inject(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, which peft sets right
        return get_peft_model(model, config)


def _continue(model: Any, start: Start, task: str, also: Sequence[str], trainable: bool) -> Any:
    """The adapter of `start` on its base; with a scalar head of its own where an SFT adapter becomes a reward model."""
    from peft import PeftConfig, TaskType, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    assert start.adapter is not None
    try:
        config = PeftConfig.from_pretrained(str(start.adapter))
        weights = load_peft_weights(str(start.adapter), device="cpu")
    except Exception as error:  # whatever safetensors and json raise at a broken file
        raise AdapterError(
            f"cannot load the adapter in {start.adapter}: {' '.join(str(error).split())[:200]}"
        ) from None
    saved = list(dict.fromkeys([*also, *(config.modules_to_save or [])])) or None
    if task == "SEQ_CLS" and saved:  # the unembedding that an SFT adapter brings goes, as a base's does
        gone = [name for name in saved if name in HEADS - {"score"}]
        saved = [name for name in saved if name not in gone]
        weights = {name: w for name, w in weights.items() if not any(f".{head}." in name for head in gone)}
    config.task_type, config.modules_to_save, config.inference_mode = TaskType(task), saved, False
    try:
        found = _inject(model, config)
        for module in found.modules() if trainable else ():
            if trained(module) is not module:  # before its weights come, which a 16-bit copy would round
                trained(module).float()
        own = get_peft_model_state_dict(found, save_embedding_layers=False)
        # Head and norm that the adapter does not bring are the model's own.
        new = {name: w for name, w in own.items() if any(f".{module}." in name for module in also)}
        set_peft_model_state_dict(found, new | weights)
    except (ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(
            f"the adapter in {start.adapter} does not fit {start.base.name}: {' '.join(str(error).split())[:200]}"
        ) from None
    wrong = sorted((own.keys() - new.keys()) ^ (weights.keys() - new.keys()))
    if wrong:
        raise AdapterError(
            f"the adapter in {start.adapter} does not fit {start.base.name}: {wrong[0]} is in one of them only"
        )
    return found if trainable else found.requires_grad_(False)


def _train_in_float32(model: nn.Module) -> None:
    """Modules trained whole keep float32 weights on a 16-bit base, as peft does for adapters: small steps would be lost in 16."""
    dtype = plain(model).dtype
    for name, module in model.named_modules():
        copied = trained(module)
        if copied is module or dtype == torch.float32:
            continue
        copied.float()
        copied.register_forward_pre_hook(_in_own_dtype)
        if not name.endswith("score"):  # whose output is the value itself
            copied.register_forward_hook(lambda module, inputs, output: output.to(dtype))


def _in_own_dtype(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What goes into a module that is trained whole, in its own dtype: float32, or what DeepSpeed has made of it meanwhile."""
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def linear_modules(model: nn.Module) -> list[str]:
    """Last names of the linear maps that an adapter can go on, heads left out."""
    names = [name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    return sorted(set(names) - HEADS)


def other_parameters(model: nn.Module) -> list[str]:
    """Names of matrices, or stacks of them, that are no linear module's and no embedding's: those of experts."""
    known = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, Conv1D, nn.Embedding))}
    return [name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in known]


def check_modules(model: Any, args: Any) -> None:
    """Raises AdapterError where an adapter is asked for on modules that the model does not have."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS

    linear = linear_modules(model)
    names = dict(model.named_modules())
    hint = f"its linear modules are {', '.join(linear)}; or write all-linear"
    by_default = args.lora_target_modules is None and not args.lora_target_parameters
    if by_default and model.config.model_type not in DEFAULT_TARGETS:
        raise AdapterError(f"lora_target_modules: there is no default for {model.config.model_type} models; {hint}")
    for wanted in args.lora_target_modules or ():
        found = [m for name, m in names.items() if name == wanted or name.endswith(f".{wanted}")]
        if wanted != "all-linear" and not any(isinstance(m, (nn.Linear, Conv1D)) for m in found):
            raise AdapterError(f"lora_target_modules: {type(model).__name__} has no linear module {wanted!r}; {hint}")
        if wanted in HEADS:
            raise AdapterError(f"lora_target_modules: {wanted} is the head and takes no adapter here; {hint}")
    others = other_parameters(model)
    for wanted in args.lora_target_parameters or ():
        if not any(name == wanted or name.endswith(f".{wanted}") for name in others):
            there = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in others})) or "none"
            raise AdapterError(
                f"lora_target_parameters: {type(model).__name__} has no weight {wanted!r} outside linear modules; it has "
                f"{there}; modules go to lora_target_modules"
            )
    for wanted in args.lora_modules_to_save or ():
        found = [m for name, m in names.items() if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            raise AdapterError(f"lora_modules_to_save: {type(model).__name__} has no module {wanted!r}")
        if any(not p.is_floating_point() or hasattr(p, "quant_state") for m in found for p in m.parameters()):
            raise AdapterError(
                f"lora_modules_to_save: {wanted} is quantised, and weights of so few bits cannot be trained; leave it out"
            )
        tied = model.get_output_embeddings() is not None and getattr(model.config, "tie_word_embeddings", False)
        heads = (model.get_input_embeddings(), model.get_output_embeddings())
        if tied and any(m in heads for name, m in names.items() if name.endswith(wanted)):
            raise AdapterError(
                f"lora_modules_to_save: {wanted} is tied to the other embedding and cannot be trained alone"
            )


def adapted(model: Any) -> bool:
    """Whether it is a PeftModel, which there is none of before peft is imported."""
    return "peft" in sys.modules and isinstance(model, sys.modules["peft"].PeftModel)


def plain(model: Any) -> Any:
    """The transformers model, adapter layers and all, below peft's wrapper."""
    return model.get_base_model() if adapted(model) else model


def trained(module: Any) -> Any:
    """The copy of a module that is trained whole beside an adapter; the module itself where there is none."""
    copies = getattr(module, "modules_to_save", None)
    return copies["default"] if isinstance(copies, nn.ModuleDict) and "default" in copies else module


def effective_weight(layer: Any) -> Tensor:
    """The weight [out, in] of a linear layer as it acts: unpacked where it is quantised, with its adapter's share."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight: Tensor = base.weight.detach()
    packed = getattr(base.weight, "quant_state", None)
    if packed is not None:
        import bitsandbytes as bnb

        weight = bnb.functional.dequantize_4bit(weight, packed)
    elif getattr(getattr(base, "state", None), "CB", None) is not None:  # rows of 8 bits, each with its largest number
        weight = base.state.CB * (base.state.SCB / 127)[:, None]
    weight = weight.float()
    if not hasattr(layer, "get_delta_weight"):
        return weight
    weight = weight + layer.get_delta_weight("default").detach().float()
    magnitude = getattr(layer, "lora_magnitude_vector", {})
    if "default" in magnitude:  # DoRA: rows of this length (Liu et al. 2024, eq. 5)
        weight = weight * (magnitude["default"].weight.detach().float() / weight.norm(dim=1))[:, None]
    return weight


@contextlib.contextmanager
def precision_kept(model: nn.Module) -> Iterator[None]:
    """What is trained keeps its dtype and values: SFTTrainer rounds adapters on a quantised base to bfloat16, where updates of
    InstructGPT's learning rates are lost."""
    kept = [(p, p.detach().clone()) for p in trained_parameters(model)] if adapted(model) else []
    yield
    for p, value in kept:
        p.data = value


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------------------- sharing


def twin(model: Any, skeleton: Any = None) -> Any:
    """A model of its own structure over the same weights: an adapter on the one does not show on the other.

    skeleton: a model of another head, on the meta device, that gets the twin of the backbone. None where it has another backbone.
    """
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        state = getattr(module, "state", None)  # of 8-bit layers
        memo |= {id(t): t for t in vars(state).values() if isinstance(t, Tensor)} if hasattr(state, "CB") else {}
        quantized = getattr(module, "quant_state", None)  # of 4-bit layers
        memo |= {id(quantized): quantized} if quantized is not None else {}
    if skeleton is None:
        return copy.deepcopy(model, memo)
    prefix = skeleton.base_model_prefix
    backbone = getattr(model, prefix, None)
    if type(backbone) is not type(getattr(skeleton, prefix, None)):
        return None
    setattr(skeleton, prefix, copy.deepcopy(backbone, memo))
    for name in ("is_quantized", "quantization_method", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, name):
            setattr(skeleton, name, getattr(model, name))
    return skeleton


def weight_bytes(models: Iterable[nn.Module]) -> int:
    """Bytes of all weights and buffers of the models together, those in several of them once."""
    sizes: dict[tuple[Any, int], int] = {}
    for model in models:
        for tensor in _tensors(model):
            storage = tensor.untyped_storage()
            sizes[(tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(sizes.values())


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from (getattr(p, "ds_tensor", p) for p in model.parameters())  # under ZeRO 3 this process's piece
    yield from model.buffers()
    for module in model.modules():
        state = getattr(module, "state", None)
        for holder in (state, getattr(getattr(module, "weight", None), "quant_state", None)):
            if hasattr(holder, "CB") or hasattr(holder, "absmax"):
                yield from (t for t in vars(holder).values() if isinstance(t, Tensor))


# -------------------------------------------------------------------------------------------------------- saved and back


def save(model: Any, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """The folder that plain transformers or, of an adapter, plain peft loads; no card, which is written for the version."""
    if not adapted(model):
        model.save_pretrained(folder, state_dict=weights)
        return
    config, base = model.peft_config["default"], getattr(model, "started_from", None)
    if base is not None:
        config.base_model_name_or_path, config.revision = base.path, base.revision
    more: dict[str, Any] = {} if weights is None else {"state_dict": weights}
    # An added PAD has a row of its own in the embeddings, which every load makes anew: no word of the text reads it.
    model.save_pretrained(str(folder), save_embedding_layers=False, **more)
    (folder / "README.md").unlink(missing_ok=True)


def restore(model: Any, folder: Path) -> None:
    """Puts the adapter that `save` wrote back into the model."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


def records(**parts: Any) -> dict[str, dict[str, Any]]:
    """What a version records of the bases of its adapters, by folder; `here` is the version itself."""
    found = {}
    for name, model in parts.items():
        base = getattr(model, "started_from", None)
        if adapted(model) and base is not None:
            found["." if name == "here" else name] = {
                "kind": "artifact" if base.artifact else "model",
                "ref": base.artifact or base.path,
                "revision": base.revision,
                "sha256": base.sha256,
                "quantization": dict(model.quantized_to),
                "reward_bias": float(getattr(model.config, "reward_bias", 0.0)),
            }
    return found


def describe(model: Any) -> str:
    """An adapter in a line."""
    config = model.peft_config["default"]
    size, everything = model.get_nb_trainable_parameters()
    targets = sorted({name.rpartition(".")[2] for name in (config.target_modules or ())})
    targets += sorted(config.target_parameters or ())
    return (
        f"LoRA of rank {config.r} on {', '.join(targets)} of {model.started_from.name}: "
        f"{size:,} of {everything:,} weights are trained"
    )


def keep_only_trained(accelerator: Any, model: nn.Module) -> None:
    """Training checkpoints then hold what is trained, not the base; a resume over another base or adapter is refused.

    DeepSpeed and FSDP write and read the weights themselves, all of them: with them only the bases are compared.
    """
    started = {name: getattr(part, "started_from", None) for name, part in model.named_children()}
    bases = {name: base.sha256 for name, base in started.items() if isinstance(base, Base)}
    if not bases:
        return
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        parameters = {}

    def write(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            kept = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
            save_file(kept, Path(folder) / TRAINED, metadata={"bases": json.dumps(bases)})

    def read(models: list[Any], folder: str) -> None:
        models.clear()
        try:
            with safe_open(Path(folder) / TRAINED, "pt") as file:
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                before = json.loads((file.metadata() or {}).get("bases", "{}"))
        except (OSError, ValueError, SafetensorError) as error:
            raise AdapterError(f"{folder} holds no trained adapters ({error}); start anew") from None
        different = [name for name, p in parameters.items() if name not in saved or saved[name].shape != p.shape]
        if before != bases or different or saved.keys() - parameters.keys():
            what = "other base weights" if before != bases else "other adapters"
            raise AdapterError(
                f"{folder} was trained with {what}; set sft, reward model and adapters back, or start anew"
            )
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(saved[name])

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(read)


def check_resume(model: Any, checkpoint: Path | None) -> None:
    """Refuses to go on from a Trainer's checkpoint of another adapter."""
    if checkpoint is None or not adapted(model):
        return
    from peft import PeftConfig

    before, now = PeftConfig.from_pretrained(str(checkpoint)).to_dict(), model.peft_config["default"].to_dict()
    names = (
        "r",
        "lora_alpha",
        "target_modules",
        "target_parameters",
        "modules_to_save",
        "use_rslora",
        "use_dora",
        "base_model_name_or_path",
    )
    changed = [name for name in names if _unordered(before.get(name)) != _unordered(now.get(name))]
    if changed:
        told = ", ".join(f"{name} ({before.get(name)!r} -> {now.get(name)!r})" for name in changed)
        raise AdapterError(f"cannot resume from {checkpoint} with another adapter: {told}; set it back, or start anew")


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, set, tuple)) else value
