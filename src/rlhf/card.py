"""Model cards: what a version is, where it comes from, how good it is and how to load it, from what its manifest records.

A card claims nothing that is not in the manifest, or in those of its ancestors: a licence, a use or a limit that nobody
recorded is said to be unrecorded. The header is the Hub's metadata, built by huggingface_hub's own classes.

What a stage may record in `extra`, besides its own: `samples` [{prompt, completion, ...}], `license` (a Hub identifier),
`intended_use`, `limits`; in an entry of `data`: `license`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from rlhf.manifest import plain, provenance
from rlhf.registry import Artifact, Lineage, Registry

TITLES = {
    "base": "Pretrained language model",
    "sft": "Supervised fine-tuning (InstructGPT step 1)",
    "rm": "Reward model (InstructGPT step 2)",
    "ppo": "PPO policy (InstructGPT step 3)",
}
SUMMARIES = {
    "base": "A causal language model, trained from scratch on raw text.",
    "sft": "A causal language model, fine-tuned on demonstrations: prompts with the answers to give.",
    "rm": "A reward model, trained on rankings of several completions of one prompt: it gives a text one number.",
    "ppo": "A policy, optimised by PPO against a reward model, with a penalty on its divergence from the SFT model.",
}
USES = {
    "base": "To continue text, and to be fine-tuned. It was not trained to follow instructions.",
    "sft": "To answer prompts like those of its demonstrations, and to start a reward model or PPO from.",
    "rm": "To compare answers to one prompt. It was trained on differences: numbers of different prompts were not compared.",
    "ppo": "To answer prompts like those it was trained on. It maximises the reward model named above, mistakes included.",
}
# what goes into the Hub's model-index: metric id, and what people call it
EVALUATIONS = {
    "eval_loss": ("loss", "Held-out loss"),
    "perplexity": ("perplexity", "Held-out perplexity"),
    "accuracy": ("accuracy", "Pair accuracy"),
    "win_rate": ("win_rate", "Win rate"),
    "score_difference": ("reward_difference", "Reward over the SFT model's"),
    "kl": ("kl", "KL from the SFT model, nats an answer"),
}
# identifiers that the Hub's metadata takes as they are; any other licence goes there by its name
LICENSES = re.compile(
    r"apache-2\.0|mit|bsd-[23]-clause|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[34]\.0|[al]?gpl-[23]\.0|llama2|llama3(\.[123])?|"
    r"gemma|openrail|bigscience-openrail-m|odc-by|unlicense|other|unknown"
)
IMAGES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp")
MOST_SAMPLES, LONGEST_SAMPLE = 4, 2000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")
TOKEN = r"hf_(?:oauth_[A-Za-z0-9._-]{30,}|[A-Za-z0-9]{30,})"  # of a user, and of a login through the browser
_SECRET = re.compile(TOKEN)


@dataclass(frozen=True)
class Facts:
    """What a card is made from: the manifest's fields, before there is a manifest."""

    folder: Path
    run: str
    stage: str
    parents: Sequence[Artifact]
    base_model: str | None
    config: Mapping[str, Any]
    data: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, Any]
    extra: Mapping[str, Any]
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()

    @property
    def lineages(self) -> list[Lineage]:
        return [Registry(parent.root).lineage(parent) for parent in self.parents]

    @property
    def origin(self) -> str | None:
        """The checkpoint below all of it."""
        recorded = [self.base_model, *(parent.manifest.get("base_model") for parent in self.parents)]
        return next((name for name in recorded if name), None)


def write(
    folder: Path,
    run: str,
    stage: str,
    *,
    parents: Sequence[Artifact],
    base_model: str | None,
    config: Mapping[str, Any],
    data: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes README.md, the Hub's model card, into a version folder."""
    facts = Facts(
        *(Path(folder), run, stage, parents, base_model),
        config=plain(config, "config"),
        data=plain(list(data), "data"),
        metrics=plain(metrics, "metrics"),
        extra=plain(extra or {}, "extra"),
        adapters=adapters or {},
    )
    (facts.folder / "README.md").write_text(render(facts), encoding="utf-8")


def render(facts: Facts) -> str:
    """The card's text."""
    sections = [
        f"---\n{metadata(facts).to_yaml()}\n---",
        f"# {TITLES[facts.stage]}: {facts.run}\n\n{SUMMARIES[facts.stage]}",
        _section("How to load it", _loading(facts)),
        _section("Where it comes from", _lineage(facts)),
        _section("Data", _data(facts)),
        _section("Metrics", _metrics(facts)),
        _section("Figures", _figures(facts.folder)),
        _section("Samples", _samples(facts)),
        _section("Intended use and limits", _limits(facts)),
        _section("Hyperparameters", _hyperparameters(facts)),
        _section("Made with", _made_with()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# --- metadata


def metadata(facts: Facts) -> Any:
    """The header as huggingface_hub's ModelCardData: only ids that are on the Hub, only a licence that was recorded."""
    from huggingface_hub import ModelCardData

    origin = facts.origin if _is_hub_model(facts.origin) else None
    results = evaluations(facts)
    license = facts.extra.get("license")
    known = license is None or bool(LICENSES.fullmatch(license))
    return ModelCardData(
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-classification" if facts.stage == "rm" else "text-generation",
        base_model=origin,
        base_model_relation=origin and ("adapter" if facts.is_adapter else "finetune"),
        datasets=list(dict.fromkeys(_hub_data_sets(facts))) or None,
        license=license if known else "other",
        license_name=None if known else re.sub(r"[^a-z0-9.-]+", "-", str(license).lower()),
        tags=["rlhf", facts.stage, *(["reward-model"] if facts.stage == "rm" else [])],
        model_name=f"{facts.run}/{facts.stage}" if results else None,
        eval_results=results or None,
    )


def evaluations(facts: Facts) -> list[Any]:
    """Held-out metrics as huggingface_hub's EvalResults. They were measured on the data set that the stage names first."""
    from huggingface_hub import EvalResult

    if not facts.data:
        return []
    name = str(facts.data[0].get("name"))
    shared: dict[str, Any] = {
        "task_type": "text-classification" if facts.stage == "rm" else "text-generation",
        "dataset_type": name if _is_hub_data_set(name) else re.sub(r"[^\w.-]+", "-", name),
        "dataset_name": f"{name}, held out",
        "dataset_config": facts.config.get("dataset_config"),
        "dataset_split": facts.config.get("dataset_test_split"),
    }
    results = []
    for key, value in _measured(facts.metrics).items():
        where, _, name = key.rpartition(".")
        metric, title = EVALUATIONS[name]
        low_high = interval(facts.metrics, key)
        title += (f", {where}" if where else "") + (f" (95 % CI {low_high})" if low_high else "")
        results.append(EvalResult(metric_type=metric, metric_value=value, metric_name=title, **shared))
    return results


def _measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are EVALUATIONS, by their dotted names."""
    values = dict(flat(metrics))
    found = {}
    for key, value in values.items():
        where, dot, name = key.rpartition(".")
        default = name == "accuracy" and values.get(f"{where}{dot}pairs") == 0  # 0.5 over no pair was not measured
        if name in EVALUATIONS and isinstance(value, (int, float)) and not isinstance(value, bool) and not default:
            found[key] = value
    return found


def _is_hub_model(name: str | None) -> bool:
    """Whether a base model is a Hub id: as transformers has it, where there is no such folder."""
    return name is not None and bool(_HUB_ID.fullmatch(name) or re.fullmatch(r"[\w.-]+", name)) and not _exists(name)


def _is_hub_data_set(name: str) -> bool:
    """Whether a data set's name is a Hub id: user/name, where there is no such file or folder (as `rlhf.data.load` has it)."""
    file = name.endswith((".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz"))
    return bool(_HUB_ID.fullmatch(name)) and not file and not _exists(name)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def _hub_data_sets(facts: Facts) -> Iterator[str]:
    """Data sets of this stage and of its ancestors, as far as those are at hand."""
    entries = [*facts.data, *(entry for artifact in _ancestors(facts.lineages) for entry in artifact.manifest["data"])]
    for entry in entries:
        if _is_hub_data_set(str(entry.get("name"))):
            yield str(entry["name"])


def _ancestors(lineages: Sequence[Lineage]) -> Iterator[Artifact]:
    for node in lineages:
        if node.artifact is not None:
            yield node.artifact
        yield from _ancestors(node.parents)


# --- sections


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _loading(facts: Facts) -> str:
    """By plain transformers, or an adapter by plain peft, which reads the base from `adapter_config.json`: a Hub id or a folder.

    transformers loads adapters too, but not DoRA's magnitudes, and without the rows that the tokenizer added.
    """
    hub_id, reward = facts.config.get("hub_model_id"), facts.stage == "rm"
    name = hub_id or "user/name"
    task = "ForSequenceClassification" if reward else "ForCausalLM"
    if facts.is_adapter:
        labels = ", num_labels=1" if reward else ""
        lines = [
            f"from peft import AutoPeftModel{task}",
            "from transformers import AutoTokenizer",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'model = AutoPeftModel{task}.from_pretrained("{name}"{labels})',
        ]
        if reward:  # the config is the base's
            lines.append("model.config.pad_token_id = tokenizer.pad_token_id")
    else:
        lines = [
            f"from transformers import AutoModel{task}, AutoTokenizer",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'model = AutoModel{task}.from_pretrained("{name}")',
        ]
    parts = ["With `peft` installed:"] if facts.is_adapter else []
    parts.append(_fence("\n".join(lines), "python"))
    if reward:
        call = "model(**tokenizer(prompt + answer + tokenizer.eos_token, return_tensors='pt')).logits[0, 0]"
        parts.append(
            f"The reward of an answer that has ended:\n\n{_fence(f'reward = {call}{_plus_bias(facts)}', 'python')}"
        )
    parts += _stands_on(facts)
    told = "" if hub_id else "`user/name` is this repository's id, or a local folder. "
    parts.append(f"{told}The tag `rlhf-vN` is version N; `stage.json` holds its full record.")
    return "\n\n".join(parts)


def _plus_bias(facts: Facts) -> str:
    """What is added to a reward model's output so that demonstrations score 0, where its weights do not hold it."""
    if facts.is_adapter:
        bias = float(facts.adapters.get(".", {}).get("reward_bias") or 0.0)
        return f" + {bias!r}" if bias else ""
    return " + model.config.reward_bias" if facts.metrics.get("bias_kept_in") == "config.reward_bias" else ""


def _stands_on(facts: Facts) -> Iterator[str]:
    """What an adapter's base is, and how to come by it."""
    base: Mapping[str, Any] = facts.adapters.get(".", {}) if facts.is_adapter else {}
    ref = base.get("ref")
    if ref is not None:
        name = ref.ref if isinstance(ref, Artifact) else _shown(str(ref))
        at = f" at revision `{base['revision']}`" if base.get("revision") else ""
        yield f"A LoRA adapter on `{name}`{at}, whose weights have sha256 `{base['sha256']}`."
    if isinstance(ref, Artifact):
        yield (
            "That base is a version of the same registry, and `adapter_config.json` holds its folder there: load it and give it "
            "to `PeftModel.from_pretrained`, or merge the two with `rlhf registry merge`."
        )
    if base.get("quantization"):
        bits = "4" if base["quantization"].get("load_in_4bit") else "8"
        yield f"It was trained on that base quantised to {bits} bits (bitsandbytes); load the base so."


def _lineage(facts: Facts) -> str:
    lines = [line for node in facts.lineages for line in _tree(node, 0)]
    if facts.base_model and not facts.parents:
        lines.append(f"- `{_shown(facts.base_model)}` (a checkpoint from outside)")
    return "\n".join(lines)


def _tree(node: Lineage, depth: int) -> Iterator[str]:
    indent = "  " * depth
    if node.artifact is not None:
        yield f"{indent}- `{node.ref}`, weights sha256 `{node.artifact.weights_sha256}`"
    else:
        yield f"{indent}- `{_shown(node.ref)}` ({'not at hand' if node.kind == 'missing' else 'a checkpoint from outside'})"
    for parent in node.parents:
        yield from _tree(parent, depth + 1)


def _data(facts: Facts) -> str:
    rows = [
        (entry.get("name"), entry.get("kind"), entry.get("records"), _code(entry.get("sha256")), entry.get("license"))
        for entry in facts.data
    ]
    return _table(("data set", "kind", "records", "sha256 of the records", "licence"), rows, empty="not recorded")


def _metrics(facts: Facts) -> str:
    return _table(("metric", "value", "95 % interval"), metric_rows(facts.metrics))


def metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """(name, value, 95 % interval) of each metric, nested ones by their dotted names."""
    return [(name, value, interval(metrics, name)) for name, value in flat(metrics) if not name.endswith("_ci95")]


def interval(metrics: Mapping[str, Any], name: str) -> str:
    """The 95 % interval that stands beside a metric, as text; empty where there is none."""
    low_high = dict(flat(metrics)).get(f"{name}_ci95")
    return " – ".join(map(number, low_high)) if isinstance(low_high, (list, tuple)) else ""


def _figures(folder: Path) -> str:
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGES]
    return "\n\n".join(f"![{name}]({quote(name)})" for name in names)


def _samples(facts: Facts) -> str:
    parts = []
    for sample in list(facts.extra.get("samples") or [])[-MOST_SAMPLES:]:
        texts = (str(sample.get(key, ""))[:LONGEST_SAMPLE] for key in ("prompt", "completion"))
        rest = [f"{key}: {number(value)}" for key, value in sample.items() if isinstance(value, (int, float))]
        parts.append("\n\n".join([*map(_fence, texts), *filter(None, [", ".join(rest)])]))
    told = "Held-out answers, as the model scores them" if facts.stage == "rm" else "Prompt and completion, as sampled"
    return f"{told}.\n\n" + "\n\n---\n\n".join(parts) if parts else ""


def _limits(facts: Facts) -> str:
    lines = [str(facts.extra.get("intended_use") or USES[facts.stage])]
    if facts.extra.get("limits"):
        lines.append(str(facts.extra["limits"]))
    if facts.stage == "rm" and "bias" in facts.metrics:
        lines.append("Its zero is the average of the demonstrations that it was centred on.")
    length = facts.config.get("max_length")
    if length:
        lines.append(f"It was trained on texts of at most {length} tokens.")
    if not _measured(facts.metrics):
        lines.append("No held-out evaluation is recorded.")
    lines.append("Nothing is recorded of its quality, safety or truthfulness beyond the metrics above.")
    if not facts.extra.get("license"):
        lines.append("No licence is recorded for it; that of its base model and of its data may bind it.")
    return "\n".join(f"- {line}" for line in lines)


def _hyperparameters(facts: Facts) -> str:
    chosen = hyperparameters(facts.config)
    return _fence(chosen, "yaml") if chosen else ""


def hyperparameters(config: Mapping[str, Any]) -> str:
    """What was chosen, as YAML that anyone may read."""
    chosen = {key: public(value, key) for key, value in config.items() if value not in (None, [], {})}
    return yaml.safe_dump(chosen, allow_unicode=True).rstrip() if chosen else ""


def _made_with() -> str:
    made = provenance()
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    commit = f" Source commit `{made['git_commit']}`{' with changes' if made['git_dirty'] else ''}."
    return f"{packages}; Python {made['python']}.{commit if made['git_commit'] else ''}"


# --- text


def public(value: Any, key: str = "") -> Any:
    """A value of the config as anyone may read it: no token, no folders of one person's machine."""
    if isinstance(value, Mapping):
        return {name: public(item, name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item) for item in value]
    if isinstance(value, str) and (key.endswith("token") or _SECRET.search(value)):
        return "<hidden>"
    return _shown(value) if isinstance(value, str) else value


def _shown(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], empty: str = "") -> str:
    if not rows:
        return ""
    cells = [[number(empty if cell in (None, "") else cell) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", r"\|").split()) for c in line) + " |" for line in lines)


def _code(text: Any) -> str:
    return f"`{text}`" if text else ""


def _fence(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks in the text, so that no sample can leave it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
