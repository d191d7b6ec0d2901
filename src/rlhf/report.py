"""`rlhf report RUN`: one HTML page of a run, that needs nothing beside it.

It shows what the registry holds and nothing else: the versions and their lineage, and of the newest version of each stage the
metrics with their intervals, the training curves, alarms, figures and later evaluations, samples, data and settings.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import html
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf import card, curves
from rlhf.data_page import PAGE
from rlhf.registry import STAGES, Artifact, MissingStage, Registry, RegistryError
from rlhf.registry_cli import row, tree

MOST_ROWS = 60  # of an evaluation's table
STYLE = """<style>
main { display: block; } section { margin-bottom: 1.2em; }
pre.plain { font: 13px/1.4 ui-monospace, monospace; max-height: none; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; margin: .4em .4em 0 0; }
.figures img { width: calc(50% - .6em); }
details { margin-top: .8em; } summary { cursor: pointer; } h3 { font-size: 1em; margin: 1em 0 .3em; }
table { width: auto; } code { font-size: .85em; }
</style>
"""


def run(args: argparse.Namespace) -> None:
    registry = Registry(args.root)
    if not registry.list(args.name):
        runs = ", ".join(dict.fromkeys(artifact.run for artifact in registry.list())) or "none"
        raise MissingStage(f"no versions in run {args.name!r} in {registry.root}; runs there: {runs}")
    path = Path(args.out) if args.out else registry.root / args.name / "report.html"
    _write(path, page(registry, args.name))
    print(path)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise RegistryError(f"cannot write {path}: {error.strerror or error}; give another --out") from None


def page(registry: Registry, name: str) -> str:
    """The page of the run `name`."""
    artifacts = registry.list(name)
    newest = {artifact.stage: artifact for artifact in artifacts}  # listed by version: the last of a stage stays
    sections = [_overview(registry, artifacts, [newest[stage] for stage in STAGES if stage in newest])]
    sections += [_stage(registry, newest[stage]) for stage in STAGES if stage in newest]
    return PAGE.format(title=html.escape(f"Run {name}"), sections=STYLE + "\n".join(sections))


def _overview(registry: Registry, artifacts: Sequence[Artifact], newest: Sequence[Artifact]) -> str:
    rows = [row(registry, artifact) for artifact in artifacts]
    lineage = "\n".join(tree(registry.lineage(newest[-1])))
    return _section(
        "Versions and lineage",
        _table(("version", "created (UTC)", "trained from", "headline", "size"), rows),
        f"<h3>What {html.escape(newest[-1].ref)} was trained from</h3>{_plain(lineage)}",
    )


def _stage(registry: Registry, artifact: Artifact) -> str:
    manifest, evals = artifact.manifest, registry.evals_dir(artifact)
    history = _history(artifact.path / "metrics.jsonl")
    data = [
        (entry.get("name"), entry.get("kind"), entry.get("records"), entry.get("license", ""))
        for entry in manifest["data"]
    ]
    made = f"{manifest['created'][:16].replace('T', ' ')} UTC, {manifest.get('device') or 'device not recorded'}"
    return _section(
        f"{artifact.ref}: {card.TITLES[artifact.stage]}",
        f"<p>{html.escape(card.SUMMARIES[artifact.stage])} <small>{html.escape(made)}</small></p>",
        f"<small>weights sha256 <code>{artifact.weights_sha256}</code></small>",
        _titled("Metrics", _table(("metric", "value", "95 % interval"), card.metric_rows(manifest["metrics"]))),
        _titled("Training", _curves(history)),
        _titled("Alarms", _table(("rollout", "alarm"), list(_alarms(history)))),
        _titled("Figures", _pictures(_figures(artifact.path, evals))),
        "".join(_evaluation(path) for path in sorted(evals.glob("*.json"))),
        _titled(
            "Samples", "".join(map(_sample, list(manifest.get("extra", {}).get("samples") or [])[-card.MOST_SAMPLES :]))
        ),
        _titled(
            "Data",
            _table(("data set", "kind", "records", "licence"), [tuple(map(card.public, entry)) for entry in data]),
        ),
        _folded("Settings", _plain(card.hyperparameters(manifest["config"]))),
    )


def _history(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise RegistryError(
            f"cannot read {path} ({error}); `rlhf registry verify` says what else has changed"
        ) from None


def _alarms(history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, str]]:
    for line in history:
        for text in line.get("alarms", {}).values():
            yield line.get("rollout"), text


def _figures(version: Path, evals: Path) -> list[Path]:
    """Later evaluations draw what the version holds again, over what may be other data: they are shown in its place."""
    later = _images(evals)
    names = {path.name for path in later}
    kept = [
        path for path in _images(version) if path.name not in names and path != version / "figures" / "training.png"
    ]
    return [*kept, *later]


def _images(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() == ".png"]


def _evaluation(path: Path) -> str:
    """The figures of an evaluation that lies beside the version."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return _folded(f"Evaluation {path.stem}", f"<p>cannot be read: {html.escape(str(error))}</p>")
    if not isinstance(found, dict):
        return ""
    rows = [
        entry
        for entry in card.metric_rows(found)
        if isinstance(entry[1], (str, int, float)) and len(str(entry[1])) < 120
    ]
    return _folded(f"Evaluation {path.stem}", _table(("figure", "value", "95 % interval"), rows[:MOST_ROWS]))


# --- HTML


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    stream = io.BytesIO()
    return _image(stream.getvalue(), "training curves") if curves.draw(history, stream) else ""


def _pictures(paths: Sequence[Path]) -> str:
    shown = "".join(_image(path.read_bytes(), path.stem) for path in paths)
    return f'<div class="figures">{shown}</div>' if shown else ""


def _image(data: bytes, name: str) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _sample(sample: Mapping[str, Any]) -> str:
    rest = ", ".join(f"{key} {card.number(value)}" for key, value in sample.items() if isinstance(value, (int, float)))
    texts = "".join(
        f"<small>{key}</small><pre>{html.escape(str(sample.get(key, ''))[: card.LONGEST_SAMPLE].strip())}</pre>"
        for key in ("prompt", "completion")
    )
    return f"<article>{texts}<small>{html.escape(rest)}</small></article>"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{''.join(part + chr(10) for part in parts if part)}</section>"


def _titled(title: str, body: str) -> str:
    return f"<h3>{html.escape(title)}</h3>{body}" if body else ""


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>" if body else ""


def _plain(text: str) -> str:
    return f'<pre class="plain">{html.escape(text)}</pre>' if text else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    numeric = [all(isinstance(entry[i], (int, float)) for entry in rows) for i in range(len(header))]
    kinds = [' class="number"' if number else "" for number in numeric]
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, header))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{html.escape(_shown(cell))}</td>" for k, cell in zip(kinds, entry)) + "</tr>\n"
        for entry in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _shown(value: Any) -> str:
    return "" if value is None else card.number(value)
