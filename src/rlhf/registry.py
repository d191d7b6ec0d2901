"""Publish and require stage artifacts: the only hand-over between stages.

    with Registry("runs").draft("demo", "sft") as draft:
        model.save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        sft = draft.publish(parents=[base], config=config, metrics={"loss": 1.2})

A version is a folder `<root>/<run>/<stage>/v<N>/` with a `stage.json`, and it never changes. It is staged in a hidden
folder on the same disk, every file is flushed to the disk, `stage.json` is written last, and one rename makes all of
it visible: a reader sees a whole version or none, and a publisher that is killed leaves at most a hidden `.draft-*`
folder. What comes later lies beside the versions: `evals/v<N>/` and `tags.json`.

Only local file systems give these promises: network file systems may have neither atomic renames nor working locks.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf.manifest import (
    MANIFEST,
    HashMismatch,
    MissingStage,
    RegistryError,
    TokenizerMismatch,
    TornArtifact,
    check_manifest,
    file_sha256,
    fsync,
    hash_and_flush,
    list_files,
    plain,
    provenance,
    sha256_of_weights,
    tokenizer_sha256,
    weight_files,
    weights_sha256,
    write_json,
)

__all__ = [
    "STAGES",
    "Artifact",
    "Draft",
    "HashMismatch",
    "Lineage",
    "MissingStage",
    "Registry",
    "RegistryError",
    "TokenizerMismatch",
    "TornArtifact",
    "tokenizer_sha256",
]

STAGES = ("base", "sft", "rm", "ppo")
COMMANDS = {
    "base": "accelerate launch scripts/pretrain.py --run_name {run}",
    "sft": "make sft RUN={run}",
    "rm": "make rm RUN={run}",
    "ppo": "make ppo RUN={run}",
}
STALE_AFTER = 24 * 3600.0  # seconds after which the draft of a process that is gone is removed
INPUTS = "inputs.json"  # what an unfinished run is trained from, in its work folder (`training.pin_inputs`)
ROOM = "free space there, or see who may write"
LOCK_TIMEOUT = 300.0  # seconds; a lock is held for one small write and one rename

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"v([1-9][0-9]{0,17})")
_REF = re.compile(
    rf"(?P<run>{_NAME.pattern})/(?P<stage>{'|'.join(STAGES)})(?:/v(?P<version>[1-9][0-9]{{0,17}})|@(?P<tag>.+))?"
)
OnError = Callable[[RegistryError], None]
_log = logging.getLogger(__name__)


def _warn(error: RegistryError) -> None:
    _log.warning("skipped: %s", error)


def _refuse(error: RegistryError) -> None:
    raise error


def _ignore(error: RegistryError) -> None:
    """For a search: what cannot be read is not what is searched for."""


@dataclass(frozen=True)
class Artifact:
    """One published version. Two artifacts are equal when they are the same folder."""

    root: Path
    run: str
    stage: str
    version: int
    manifest: dict[str, Any] = field(repr=False, compare=False)

    @property
    def path(self) -> Path:
        return self.root / self.run / self.stage / f"v{self.version}"

    @property
    def ref(self) -> str:
        return f"{self.run}/{self.stage}/v{self.version}"

    @property
    def parents(self) -> tuple[dict[str, str], ...]:
        """`{"ref", "sha256"}` of each: the hash of its weights. Across registries the ref is a path from this root."""
        return tuple(self.manifest["parents"])

    @property
    def weights_sha256(self) -> str:
        return weights_sha256(self.manifest["files"])

    @property
    def adapters(self) -> dict[str, dict[str, Any]]:
        """Of each adapter, by its folder in the version, what it stands on; empty for whole weights."""
        return dict(self.manifest.get("adapters") or {})


@dataclass(frozen=True)
class Lineage:
    """A node of the family tree. `kind`: "artifact", "model" (a Hub id or a path outside), or "missing"."""

    ref: str
    kind: str
    artifact: Artifact | None = None
    parents: tuple[Lineage, ...] = ()


class Registry:
    """The versions under one root folder. Nothing is created before the first draft."""

    def __init__(self, root: str | Path = "runs"):
        self.root = _absolute(root)

    # --- publishing

    def draft(self, run: str, stage: str) -> Draft:
        """A new hidden folder to save into; leaving the `with` block without `publish` removes it."""
        folder = self._stage_dir(run, stage)
        path = folder / f".draft-{uuid.uuid4().hex[:8]}-{os.getpid()}-{_host()}"
        try:
            path.mkdir(parents=True)
            for stale in _stale_drafts(folder):
                shutil.rmtree(stale, ignore_errors=True)
        except OSError as error:
            raise RegistryError(f"cannot write to {folder}: {error.strerror or error}; choose another root") from error
        return Draft(self, run, stage, path)

    def adopt(self, folder: str | Path, *, run: str | None = None, origin: str = "elsewhere") -> Artifact:
        """Make a version that another registry published one of this one: `folder`, on the same disk, is renamed into place.

        It keeps its manifest and, where that is free, its number; else it gets the next one. `run` gives it to another run.
        A version that is here already is returned, and the folder stays. A parent is known by its weights: where this
        registry does not hold them, its ref becomes `origin:ref`, so that no other version here is taken for it.
        Raises TornArtifact, HashMismatch or TokenizerMismatch where the folder is not what its manifest says; only cards
        (*.md) may differ, since people edit them: what they hold now is recorded.
        """
        folder = Path(folder)
        recorded = read_manifest(folder)
        manifest = {**recorded, "run": recorded["run"] if run is None else run}
        stage_dir = self._stage_dir(manifest["run"], manifest["stage"])
        manifest["files"] = _check_copy(folder, recorded)
        manifest["parents"] = [self._localised(parent, origin) for parent in recorded["parents"]]
        if "adapters" in recorded:
            manifest["adapters"] = {
                part: self._localised(base, origin) if base["kind"] == "artifact" else base
                for part, base in recorded["adapters"].items()
            }
        try:
            stage_dir.mkdir(parents=True, exist_ok=True)
            with _locked(stage_dir):
                twin = self.twin(recorded, manifest["run"])
                if twin is not None:
                    return twin
                if manifest["version"] in _taken(stage_dir):
                    manifest["version"] = _next_version(stage_dir)
                if manifest != recorded:
                    write_json(folder / MANIFEST, manifest)
                fsync(folder)
                os.rename(folder, stage_dir / f"v{manifest['version']}")
                fsync(stage_dir)
        except OSError as error:
            raise RegistryError(f"cannot move {folder} into {stage_dir}: {error.strerror or error}") from error
        return Artifact(self.root, manifest["run"], manifest["stage"], manifest["version"], manifest)

    # --- finding

    def twin(self, manifest: Mapping[str, Any], run: str | None = None) -> Artifact | None:
        """The version of this registry that a manifest from elsewhere describes, whatever its number is here."""
        for artifact in self.scan(manifest["run"] if run is None else run, manifest["stage"], on_error=_ignore):
            if identity(artifact.manifest) == identity(manifest):
                return artifact
        return None

    def require(self, stage: str, run: str, *, verify: bool = True) -> Artifact:
        """The newest version of a stage, or an error that names the command that makes one."""
        folder = self._stage_dir(run, stage)
        versions = _versions(folder)
        if not versions:
            state = "is empty" if os.path.isdir(folder) else "does not exist"
            command = COMMANDS[stage].format(run=run)
            raise MissingStage(f"no {stage} in run {run!r}: {folder} {state}; train one: {command}")
        artifact = self._read(run, stage, versions[-1])
        if verify:
            self._check(artifact)
        return artifact

    def get(self, ref: str | Path, *, verify: bool = True, stage: str | None = None) -> Artifact:
        """`run/stage` (the newest), `run/stage/vN`, `run/stage@tag`, or the path of a version folder anywhere."""
        artifact = self._find(str(ref))
        if stage is not None and artifact.stage != stage:
            raise RegistryError(f"{ref} is of stage {artifact.stage}, and stage {stage} is needed here")
        if verify:
            self._check(artifact)
        return artifact

    def own(self, artifact: Artifact) -> Artifact:
        """The artifact. Raises RegistryError where it lies in another registry, so that nothing is written there in passing."""
        if artifact.root != self.root:
            raise RegistryError(f"{artifact.path} is in another registry; name it with --root {artifact.root}")
        return artifact

    def base_of(self, recorded: Mapping[str, Any]) -> Artifact:
        """The version that an adapter stands on, checked: an entry of `Artifact.adapters` of kind "artifact".

        Raises MissingStage where it is not here.
        """
        artifact = self._recorded(recorded)
        self._check(artifact)
        return artifact

    def list(self, run: str | None = None, stage: str | None = None) -> list[Artifact]:
        """All versions with a readable manifest, by run, stage, version; an unreadable one gives a warning line."""
        return list(self.scan(run, stage))

    def scan(self, run: str | None = None, stage: str | None = None, on_error: OnError = _warn) -> Iterator[Artifact]:
        """What `list` lists, one by one; each manifest that is missing or cannot be read is given to `on_error`."""
        for folder in self._stage_dirs(run, stage):
            for version in _numbers(folder):
                path = folder / f"v{version}"
                try:
                    yield self._read(folder.parent.name, folder.name, version)
                except MissingStage:
                    if os.path.lexists(path):  # else it was removed since the folder was listed
                        on_error(TornArtifact(f"{path} holds no {MANIFEST}: restore it or remove the folder"))
                except RegistryError as error:
                    on_error(error)

    def lineage(self, artifact_or_ref: Artifact | str | Path) -> Lineage:
        """The artifact with its parents, and theirs, down to the base model."""
        return self._lineage(self._resolve(artifact_or_ref), frozenset())

    # --- checking

    def verify(self, artifact_or_ref: Artifact | str | Path) -> None:
        """Every file's hash, no file more or less, the parents' weights and the tokenizer; raises naming what is wrong.

        A parent that is not at hand (pulled without it) is not an error: `lineage` shows it as missing. The base of an adapter
        has to be there, be it a version or a folder; one on the Hub is checked when it is loaded.
        """
        artifact = self._resolve(artifact_or_ref)
        recorded, found = set(artifact.manifest["files"]), set(list_files(artifact.path))
        for name in sorted(found - recorded):
            raise TornArtifact(f"{artifact.path / name} is not in {MANIFEST}: versions never change; move it elsewhere")
        self._check(artifact, sorted(recorded))
        for recorded_parent, parent in _parents(artifact):
            if parent is not None and parent.weights_sha256 != recorded_parent["sha256"]:
                raise HashMismatch(f"{artifact.ref} was trained from other weights than {parent.path} holds now")
        for recorded_base in artifact.adapters.values():
            if recorded_base["kind"] != "artifact":
                _check_folder(artifact, recorded_base)
                continue
            try:
                base = Registry(artifact.root).base_of(recorded_base)
            except MissingStage as error:
                raise TornArtifact(
                    f"{artifact.ref} is an adapter on {recorded_base['ref']}, which is not here ({error}); restore that version"
                ) from error
            if base.weights_sha256 != recorded_base["sha256"]:
                raise HashMismatch(f"{artifact.ref} is an adapter on other weights than {base.path} holds now")

    def _check(self, artifact: Artifact, names: Sequence[str] | None = None) -> None:
        """Files as recorded (all but the card, which people edit, unless named) and one tokenizer down the line."""
        files = artifact.manifest["files"]
        found = set(list_files(artifact.path))
        for name in names if names is not None else sorted(name for name in files if not name.endswith(".md")):
            path = artifact.path / name
            if name not in found:
                raise TornArtifact(f"{path} is missing, though {MANIFEST} lists it; {_mend(artifact)}")
            try:
                same = _is_as_recorded(path, files[name])
            except OSError as error:
                raise TornArtifact(f"cannot read {path}: {error.strerror}; {_mend(artifact)}") from error
            if not same:
                raise HashMismatch(f"{path} has changed since it was published (sha256 differs); {_mend(artifact)}")
        if tokenizer_sha256(artifact.path) != artifact.manifest["tokenizer_sha256"]:
            raise TokenizerMismatch(f"the tokenizer in {artifact.path} is not the published one; {_mend(artifact)}")
        parents = [parent for _, parent in _parents(artifact) if parent is not None]
        _check_tokenizer(artifact.ref, artifact.manifest["tokenizer_sha256"], parents)

    def damaged(self, artifact: Artifact) -> Sequence[str]:
        """Files of a version that are missing or not as published; cards may be edited."""
        names = []
        for name, recorded in artifact.manifest["files"].items():
            same = name.endswith(".md")
            with suppress(OSError):
                same = same or _is_as_recorded(artifact.path / name, recorded)
            names += [] if same else [name]
        return names

    def restore(self, artifact: Artifact, name: str, copy: Path) -> None:
        """Put a file of a version back: `copy`, on the same disk, is renamed into its place if it is the published one."""
        path = artifact.path / name
        try:
            if not _is_as_recorded(copy, artifact.manifest["files"][name]):
                raise HashMismatch(
                    f"{name} is not that of {artifact.ref} (sha256 differs from its {MANIFEST}); fetch the copy again"
                )
            fsync(copy)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(copy, path)
            fsync(path.parent)
        except OSError as error:
            raise RegistryError(
                f"cannot restore {path}: {error.strerror or error}; remove {artifact.path} and pull again"
            ) from error

    # --- what lies beside the versions

    def work_dir(self, run: str, stage: str) -> Path:
        """Where a stage keeps its training checkpoints (not created)."""
        return self._stage_dir(run, stage) / "work"

    def evals_dir(self, artifact: Artifact) -> Path:
        """Where evaluations of a version go, since the version itself never changes (not created)."""
        return artifact.path.parent / "evals" / artifact.path.name

    def tags(self, run: str, stage: str) -> dict[str, int]:
        """Tag name → version."""
        path = self._stage_dir(run, stage) / "tags.json"
        try:
            tags = json.loads(path.read_text(encoding="utf-8"))
            return {str(name): int(version) for name, version in tags.items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise RegistryError(f"{path} cannot be read ({error}); mend or remove it") from error

    def tag(self, artifact: Artifact, name: str) -> None:
        """Give a version a name; a name that another version had moves to this one."""
        _check_name(name, "tag")
        if _VERSION.fullmatch(name):
            raise RegistryError(f"{name!r} is no tag: it reads like a version")
        self._change_tags(artifact.run, artifact.stage, {name: artifact.version})

    def untag(self, run: str, stage: str, name: str) -> None:
        if name not in self.tags(run, stage):
            raise MissingStage(f"{run}/{stage} has no tag {name!r}")
        self._change_tags(run, stage, {name: None})

    def _change_tags(self, run: str, stage: str, changes: Mapping[str, int | None]) -> None:
        folder = self._stage_dir(run, stage)
        with _locked(folder):
            tags = {**self.tags(run, stage), **changes}
            draft = folder / f".tags-{uuid.uuid4().hex[:8]}"
            try:
                write_json(draft, {name: version for name, version in tags.items() if version is not None})
                os.replace(draft, folder / "tags.json")
                fsync(folder)
            except OSError as error:
                raise RegistryError(
                    f"cannot write {folder / 'tags.json'}: {error.strerror or error}; {ROOM}"
                ) from error
            finally:
                with suppress(OSError):
                    draft.unlink(missing_ok=True)

    # --- cleaning up

    def prunable(self, keep: int = 3) -> Sequence[Artifact]:
        """Versions that may go: not tagged, not of the newest `keep` of a stage, and nothing that stays was trained from them.

        A run that is not through, and may be resumed, stays. What a version was trained from are its parents,
        theirs, and the bases of adapters: a parent may be missing between.
        """
        if keep < 1:
            raise RegistryError(f"keep must be at least 1, not {keep}: the newest version always stays")
        versions = {artifact.ref: artifact for artifact in self.scan(on_error=_refuse)}
        kept: set[str] = set()
        for folder in {artifact.path.parent for artifact in versions.values()}:
            run, stage = folder.parent.name, folder.name
            numbers = {*_versions(folder)[-keep:], *self.tags(run, stage).values()}
            kept |= {f"{run}/{stage}/v{number}" for number in numbers}
        for ref, sha256 in self._unfinished():
            if ref in versions and versions[ref].weights_sha256.startswith(sha256):
                kept.add(ref)
        queue = list(kept)
        while queue:
            artifact = versions.get(queue.pop())
            needed = set() if artifact is None else {self._ref_here(entry) for entry in _origins(artifact)}
            queue += needed - kept
            kept |= needed
        return [artifact for ref, artifact in versions.items() if ref not in kept]

    def _unfinished(self) -> Iterator[tuple[str, str]]:
        """(ref, beginning of the weights' hash) of the versions that runs which are not through are trained from."""
        for folder in self._stage_dirs(None, None):
            for name in _children(folder / "work"):
                path = folder / "work" / name / INPUTS
                try:
                    told = [str(value).split() for value in json.loads(path.read_text(encoding="utf-8")).values()]
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except (OSError, ValueError, AttributeError, RecursionError) as error:
                    raise RegistryError(f"cannot read {path} ({error}); mend it or remove {path.parent}") from error
                # A version and its hash are neighbours, also where it is the base of an adapter that is no version.
                for words in told:
                    yield from pairwise(words)

    def _ref_here(self, entry: Mapping[str, Any]) -> str:
        """What a parent or base is called here, which its record need not know if it was pulled before that."""
        if ":" in entry["ref"]:
            with suppress(RegistryError):
                return self._recorded(entry).ref
        return str(entry["ref"])

    def stale_drafts(self) -> Sequence[Path]:
        """Drafts older than a day whose process is gone."""
        return [path for folder in self._stage_dirs(None, None) for path in _stale_drafts(folder)]

    def remove(self, artifact: Artifact) -> None:
        """Take a version away, at once, by a rename. What was written beside it (evaluations) stays."""
        folder = artifact.path.parent
        grave = folder / f".draft-{uuid.uuid4().hex[:8]}-{os.getpid()}-{_host()}"
        with _locked(folder):
            try:
                os.rename(artifact.path, grave)
            except OSError as error:
                raise RegistryError(f"cannot remove {artifact.path}: {error.strerror or error}; {ROOM}") from error
        shutil.rmtree(grave, ignore_errors=True)

    # --- the file system

    def _localised(self, parent: dict[str, str], origin: str) -> dict[str, str]:
        """A parent of a version from elsewhere, by the name that its weights have here."""
        refs = [a.ref for a in self.scan(on_error=_ignore) if a.weights_sha256 == parent["sha256"]]
        if parent["ref"] in refs:
            return parent
        foreign = parent["ref"] if ":" in parent["ref"] else f"{origin}:{parent['ref']}"
        return {**parent, "ref": refs[-1] if refs else foreign}

    def _stage_dir(self, run: str, stage: str) -> Path:
        _check_name(run, "run")
        if stage not in STAGES:
            raise RegistryError(f"{stage!r} is no stage: choose one of {', '.join(STAGES)}")
        return self.root / run / stage

    def _stage_dirs(self, run: str | None, stage: str | None) -> Iterator[Path]:
        runs = [run] if run is not None else [name for name in _children(self.root) if _NAME.fullmatch(name)]
        for name in runs:
            for one in STAGES if stage is None else (stage,):
                yield self._stage_dir(name, one)

    def _read(self, run: str, stage: str, version: int) -> Artifact:
        folder = self._stage_dir(run, stage) / f"v{version}"
        try:
            manifest = read_manifest(folder)
        except MissingStage:
            present = ", ".join(f"v{n}" for n in _versions(folder.parent)) or "none"
            raise MissingStage(f"no {run}/{stage}/v{version} in {self.root}; versions there: {present}") from None
        if (manifest["run"], manifest["stage"], manifest["version"]) != (run, stage, version):
            told = f"{manifest['run']}/{manifest['stage']}/v{manifest['version']}"
            raise TornArtifact(f"{folder} calls itself {told} in {MANIFEST}; move it back to where it was published")
        return Artifact(self.root, run, stage, version, manifest)

    def _find(self, ref: str) -> Artifact:
        path = _absolute(ref)
        match = _REF.fullmatch(ref)
        if match and (os.path.isdir(self._stage_dir(match["run"], match["stage"])) or not _is_version(path)):
            return self._named(match)
        if _is_version(path):
            root = path.parents[2]
            inside = _REF.fullmatch(path.relative_to(root).as_posix())
            if inside and inside["version"]:
                return Registry(root)._named(inside)
            raise RegistryError(f"{path} is not at <root>/<run>/<stage>/v<N>, where a published version lies")
        hint = "write run/stage, run/stage/vN, run/stage@tag, or the path of a version folder"
        raise RegistryError(f"{ref!r} is no artifact in {self.root}: {hint} (stages: {', '.join(STAGES)})")

    def _named(self, match: re.Match[str]) -> Artifact:
        run, stage = match["run"], match["stage"]
        if match["tag"]:
            tags = self.tags(run, stage)
            if match["tag"] not in tags:
                raise MissingStage(f"{run}/{stage} has no tag {match['tag']!r}, only: {', '.join(tags) or 'none'}")
            return self._read(run, stage, tags[match["tag"]])
        if match["version"]:
            return self._read(run, stage, int(match["version"]))
        return self.require(stage, run, verify=False)

    def _recorded(self, entry: Mapping[str, Any]) -> Artifact:
        """A parent or base as a manifest of this registry records it; MissingStage where it is not here."""
        foreign, path = ":" in entry["ref"], self.root / entry["ref"]
        match = None if foreign else _REF.fullmatch(entry["ref"])  # USER/rm@TAG:… reads like a tag of a run
        if match:
            return self._named(match)
        if _is_version(path):
            return self._find(str(path))
        if foreign:  # from elsewhere (`adopt`), and here by now: it is known by its weights
            told = _REF.fullmatch(entry["ref"].rpartition(":")[2])
            for artifact in self.scan(stage=told["stage"] if told else None, on_error=_ignore):
                if artifact.weights_sha256 == entry["sha256"]:
                    return artifact
        raise MissingStage(f"no version {entry['ref']} beside {self.root}")

    def _resolve(self, artifact_or_ref: Artifact | str | Path) -> Artifact:
        return artifact_or_ref if isinstance(artifact_or_ref, Artifact) else self._find(str(artifact_or_ref))

    def _lineage(self, artifact: Artifact, seen: frozenset[Artifact]) -> Lineage:
        nodes = []
        for recorded, parent in _parents(artifact):
            if parent is None or parent in seen or parent.weights_sha256 != recorded["sha256"]:
                nodes.append(Lineage(recorded["ref"], "missing"))
            else:
                nodes.append(self._lineage(parent, seen | {artifact}))
        model, revision = artifact.manifest.get("base_model"), artifact.manifest.get("base_revision")
        if not nodes and model:
            nodes.append(Lineage(f"{model}@{revision}" if revision else model, "model"))
        return Lineage(artifact.ref, "artifact", artifact, tuple(nodes))


class Draft:
    """A folder that becomes a version. Made by `Registry.draft`."""

    def __init__(self, registry: Registry, run: str, stage: str, path: Path):
        self.path = path
        self.run, self.stage = run, stage
        self._registry = registry
        self._published = False

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._published:
            shutil.rmtree(self.path, ignore_errors=True)

    def publish(
        self,
        *,
        parents: Sequence[Artifact] = (),
        base_model: str | None = None,
        base_revision: str | None = None,
        config: dict | None = None,
        data: Sequence[dict] = (),
        metrics: dict | None = None,
        device: str | None = None,
        extra: dict | None = None,
        adapters: Mapping[str, dict] | None = None,
    ) -> Artifact:
        """Make the folder the next version, all at once. `base_model` and revision come from the parents when None.

        adapters: what each adapter in it stands on, by its folder ("." for the version's own): kind ("artifact", and then ref is
        an Artifact, or "model"), ref, revision, sha256 of the base's weights.
        """
        if self._published:
            raise RegistryError(f"the draft {self.path.name} of {self.run}/{self.stage} is published already")
        if base_model is None:
            model, revision = next(_base_models(parents), (None, None))
            base_model, base_revision = model, base_revision or revision
        for base in (adapters or {}).values():
            if isinstance(base["ref"], Artifact) and not _holds_manifest(base["ref"].path):
                raise MissingStage(
                    f"the new {self.stage} is an adapter on {base['ref'].ref}, and {base['ref'].path} has gone: restore it"
                )
        tokenizer = tokenizer_sha256(self.path)
        _check_tokenizer(f"the new {self.stage}", tokenizer, parents)
        manifest: dict[str, Any] = {
            "stage": self.stage,
            "run": self.run,
            "version": None,  # known under the lock
            "created": None,
            "parents": [{"ref": _ref_from(self._registry.root, a), "sha256": a.weights_sha256} for a in parents],
            "base_model": base_model,
            "base_revision": base_revision,
            "tokenizer_sha256": tokenizer,
            "metrics": plain(metrics or {}, "metrics"),
            "data": plain(list(data), "data"),
            "config": plain(config or {}, "config"),
            "extra": plain(extra or {}, "extra"),
            "device": device,
            **provenance(),
        }
        if adapters:
            named = {p: {**b, "ref": self._name(b["ref"])} for p, b in adapters.items()}
            manifest["adapters"] = plain(named, "adapters")
        try:
            manifest["files"] = hash_and_flush(self.path)
            return self._rename(manifest)
        except OSError as error:
            raise RegistryError(f"cannot publish to {self.path.parent}: {error.strerror or error}") from error

    def _name(self, base: Artifact | str) -> str:
        return _ref_from(self._registry.root, base) if isinstance(base, Artifact) else base

    def _rename(self, manifest: dict[str, Any]) -> Artifact:
        folder = self.path.parent
        with _locked(folder):
            version = _next_version(folder)
            manifest["version"] = version
            manifest["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            write_json(self.path / MANIFEST, manifest)
            fsync(self.path)
            os.rename(self.path, folder / f"v{version}")
            self._published = True
            fsync(folder)
        return Artifact(self._registry.root, self.run, self.stage, version, manifest)


def _check_tokenizer(who: str, tokenizer: str | None, parents: Sequence[Artifact]) -> None:
    for parent in parents:
        theirs = parent.manifest["tokenizer_sha256"]
        if theirs is not None and theirs != tokenizer:
            state = "has another tokenizer than" if tokenizer else "has no tokenizer, unlike"
            raise TokenizerMismatch(
                f"{who} {state} its parent {parent.ref} (a {parent.stage}); only PAD may be added: "
                f"train with the tokenizer in {parent.path}"
            )


def _base_models(parents: Sequence[Artifact]) -> Iterator[tuple[str, str | None]]:
    for parent in parents:
        if parent.manifest.get("base_model"):
            yield parent.manifest["base_model"], parent.manifest.get("base_revision")


# --- versions from elsewhere


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a folder, wherever that lies; MissingStage where there is none."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        check_manifest(manifest)
        return manifest
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise MissingStage(f"{folder} holds no {MANIFEST}: it is no published version") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TornArtifact(f"cannot read {folder / MANIFEST} ({error}); restore it or remove the folder") from error


def _check_copy(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that a copy of a version holds, flushed to the disk; raises where they are not those of its manifest."""
    recorded, names = manifest["files"], set(list_files(folder))
    who = f"{manifest['run']}/{manifest['stage']}/v{manifest['version']}"
    if not (isinstance(manifest["version"], int) and manifest["version"] > 0):
        raise TornArtifact(f"{folder / MANIFEST} has the version {manifest['version']!r}; it is no published version")
    for name in sorted(names ^ set(recorded)):
        state = "is missing from" if name in recorded else "is not of"
        raise TornArtifact(f"{name} {state} {who} as its {MANIFEST} lists it; fetch the copy again")
    found = hash_and_flush(folder)
    for name in found:
        if found[name] != recorded[name] and not name.endswith(".md"):
            raise HashMismatch(
                f"{name} is not that of {who} (sha256 differs from its {MANIFEST}); fetch the copy again"
            )
    if tokenizer_sha256(folder) != manifest["tokenizer_sha256"]:
        raise TokenizerMismatch(f"the tokenizer is not that of {who}; fetch the copy again")
    return found


def _check_folder(artifact: Artifact, base: Mapping[str, Any]) -> None:
    """Raises where an adapter's base was a folder, and is gone or holds other weights now."""
    folder = Path(base["ref"])
    if not folder.is_absolute():
        return  # a Hub id
    try:
        found = sha256_of_weights(weight_files(folder))
    except OSError as error:
        raise TornArtifact(
            f"{artifact.ref} is an adapter on {folder}, which is not there ({error.strerror or error}); restore that folder"
        ) from error
    if found != base["sha256"]:
        raise HashMismatch(f"{artifact.ref} is an adapter on other weights than {folder} holds now")


def identity(manifest: Mapping[str, Any]) -> Any:
    """What makes two manifests those of one version, under whatever name and number, and with whatever card."""
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if not name.endswith(".md")}
    return manifest["stage"], manifest["created"], files


# --- references


def _parents(artifact: Artifact) -> list[tuple[dict[str, str], Artifact | None]]:
    """Each recorded parent with its artifact, None where it is not at hand."""
    found = []
    for recorded in artifact.parents:
        registry, parent = Registry(artifact.root), None
        with suppress(RegistryError):
            parent = registry._recorded(recorded)
        found.append((recorded, parent))
    return found


def _origins(artifact: Artifact) -> list[Mapping[str, Any]]:
    return [*artifact.parents, *artifact.adapters.values()]


def _ref_from(root: Path, artifact: Artifact) -> str:
    """How a manifest under `root` names an artifact: its reference, or in another registry its path from `root`."""
    return artifact.ref if artifact.root == root else Path(os.path.relpath(artifact.path, root)).as_posix()


def _mend(artifact: Artifact) -> str:
    return f"restore {artifact.ref} from a copy, or train it again: {COMMANDS[artifact.stage].format(run=artifact.run)}"


def _check_name(name: str, what: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RegistryError(f"{name!r} is no {what} name: use letters, digits, '.', '_', '-', and no '.' in front")


# --- files


def _absolute(path: str | Path) -> Path:
    try:
        return Path(os.path.abspath(Path(path).expanduser()))
    except RuntimeError as error:
        raise RegistryError(f"{path}: nobody of that name has a home here; write the path out") from error


def _is_as_recorded(path: Path, recorded: Mapping[str, Any]) -> bool:
    return path.stat().st_size == recorded["size"] and file_sha256(path) == recorded["sha256"]


def _is_version(path: Path) -> bool:
    try:
        return stat.S_ISREG((path / MANIFEST).stat().st_mode) and len(path.parents) > 2
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise RegistryError(
            f"cannot read {path}: {error.strerror}; give another path, or see who may read it"
        ) from error


def _children(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RegistryError(f"cannot read {folder}: {error.strerror or error}") from error


def _numbers(folder: Path) -> list[int]:
    return sorted(int(match[1]) for match in map(_VERSION.fullmatch, _children(folder)) if match)


def _versions(folder: Path) -> list[int]:
    """Published versions in a stage folder: a version without a manifest does not exist."""
    return [number for number in _numbers(folder) if _holds_manifest(folder / f"v{number}")]


def _holds_manifest(folder: Path) -> bool:
    try:
        return stat.S_ISREG((folder / MANIFEST).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # who reads it is told why that cannot be


def _taken(folder: Path) -> set[int]:
    """Numbers ever seen: torn versions count, and versions of which only evaluations are left."""
    return {*_numbers(folder), *_numbers(folder / "evals")}


def _next_version(folder: Path) -> int:
    return max([0, *_taken(folder)]) + 1


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock", timeout=LOCK_TIMEOUT)
    try:
        lock.acquire()
    except Timeout as error:
        raise RegistryError(f"{folder}/.lock is held for {LOCK_TIMEOUT:.0f} s; which process hangs?") from error
    except OSError as error:
        raise RegistryError(f"cannot write to {folder}: {error.strerror or error}; {ROOM}") from error
    try:
        yield
    finally:
        lock.release()


# --- drafts


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())


def _stale_drafts(folder: Path) -> list[Path]:
    """Drafts that nobody has touched for a day and whose process, where it can be asked, is gone."""
    stale = []
    for name in _children(folder):
        parts = name.split("-", 3)
        if parts[0] != ".draft" or len(parts) != 4:
            continue
        with suppress(OSError):
            old = time.time() - _newest_mtime(folder / name) > STALE_AFTER
            if old and not (parts[3] == _host() and _is_alive(parts[2])):
                stale.append(folder / name)
    return stale


def _newest_mtime(folder: Path) -> float:
    return max(os.stat(where).st_mtime for where in [folder, *folder.rglob("*")])


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except OSError:
        return True  # it exists and belongs to somebody else
    return True
