"""Versions on the Hugging Face Hub: `push` uploads one, `pull` brings one back into a registry.

    push(registry.get("demo/ppo"), "user/name")              # private, tagged rlhf-v1
    pull("user/name", Registry("runs"), revision="rlhf-v1")  # the same bytes, checked against stage.json

A version goes up as it lies on the disk, manifest and card included, in one commit; its tag is set last, once the Hub's own
listing agrees with the manifest. So a tag stands for a whole version, and a push that was interrupted is resumed by the same
command: the Hub keeps blobs that arrived, and what is there already is neither sent nor committed again.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout
from huggingface_hub import get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rlhf import card
from rlhf.hub_api import OWN, TOKENS, HubError, Remote, Repository, one_line
from rlhf.manifest import MANIFEST, HashMismatch, RegistryError, TornArtifact, is_weights
from rlhf.registry import Artifact, Registry, identity

__all__ = ["HubError", "Pushed", "check_ready", "check_repo_id", "command", "plan", "pull", "push", "tag_of"]

_TOKEN = re.compile(card.TOKEN.encode())


@dataclass(frozen=True)
class Pushed:
    """Where a version is on the Hub. `changed` is False when it was there already."""

    url: str
    tag: str
    commit: str
    private: bool
    changed: bool


def tag_of(artifact: Artifact) -> str:
    """The Hub tag of a version."""
    return f"rlhf-v{artifact.version}"


def plan(artifact: Artifact, repo_id: str) -> dict[str, int]:
    """Name → size of what a push would upload; asks no one. Raises HubError where that is known to be refused."""
    check_repo_id(repo_id)
    refuse_local_bases(artifact)
    names = sorted([*artifact.manifest["files"], MANIFEST])
    for name in names:
        if not (artifact.path / name).is_file():  # a card: all else was checked when the version was looked up
            raise HubError(
                f"{artifact.path / name} is no file, though {MANIFEST} lists it: restore it, or write a new card"
            )
    return {name: (artifact.path / name).stat().st_size for name in names}


def push(artifact: Artifact, repo_id: str, *, private: bool = True, force: bool = False) -> Pushed:
    """Upload a version to the model repository `repo_id`, made where there is none; its tag carries the version.

    private: of a new repository; an existing one keeps what it is, and a public one is refused unless this is False.
    force:   replace the files of a repository that holds something else, and a tag that stands for another version; the
             history on the Hub keeps what was there.
    Raises HubError: one line with what to do. The version here is never touched.
    """
    plan(artifact, repo_id)
    again = command(artifact, repo_id, private=private, force=force)
    hub = Repository(repo_id, f"nothing is lost: `{again}` goes on where this stopped")
    check_token()
    refuse_tokens(artifact, str(hub.token))
    if hub.call(hub.look) is None:
        hub.call(lambda: hub.api.create_repo(repo_id, private=private, exist_ok=True))
    remote = hub.call(hub.look)
    if remote is None:
        raise HubError(f"{repo_id} was made and is not found; look at {hub.url} and push again")
    if private and not remote.private:
        raise HubError(f"{repo_id} is public: push with --public if that is meant, or to a private repository")
    tag, other = tag_of(artifact), _what_else(artifact, remote)
    if tag in hub.call(hub.tags) and other is None:
        tagged = hub.call(lambda: hub.look(tag))
        there = None if tagged is None else tagged.manifest
        same = there is not None and identity(there) == identity(artifact.manifest)
        if tagged is not None and same and there == remote.manifest:
            return Pushed(hub.url, tag, tagged.commit, remote.private, changed=False)
        if not force and not same:
            other = f"has a tag {tag}, of another version {artifact.version} than {artifact.ref}"
    if other is not None and not force:
        raise HubError(f"{repo_id} {other}: choose another name, or replace it with --force")
    commit = hub.call(lambda: hub.commit(artifact, replace=other is not None))
    hub.call(lambda: hub.check(artifact, commit))
    hub.call(lambda: hub.set_tag(tag, commit))
    return Pushed(hub.url, tag, commit, remote.private, changed=True)


def command(artifact: Artifact, repo_id: str, *, private: bool = True, force: bool = False) -> str:
    """The command that pushes a version, as it has to be typed in this folder."""
    where = artifact.ref if artifact.root == Path("runs").absolute() else shlex.quote(str(artifact.path))
    return f"rlhf push {where} {repo_id}" + ("" if private else " --public") + (" --force" if force else "")


def pull(repo_id: str, registry: Registry, *, revision: str | None = None, run_name: str | None = None) -> Artifact:
    """Bring a version from the Hub into `registry` and check it; returns the one that is here already if it is, mended.

    It keeps its run (unless `run_name` is given), its number where that is free, and its manifest. Files that arrived before
    an interruption are not fetched again.
    """
    check_repo_id(repo_id)
    hub = Repository(repo_id, "the registry is as it was: pull again")
    remote = hub.call(lambda: hub.look(revision))
    if remote is None:
        raise HubError(hub.not_found())
    where = f"{repo_id} at {revision or remote.commit[:12]}"
    if remote.manifest is None:
        raise HubError(f"{where} has no {MANIFEST}, so it was not pushed by rlhf; load it by its id with transformers")
    names = [*remote.manifest["files"], MANIFEST]
    for name in names:
        if name not in remote.files or ".." in PurePosixPath(name).parts:
            raise HubError(f"{where} lacks {name}, which its {MANIFEST} lists; pull another revision, or push it again")
    twin = registry.twin(remote.manifest, run_name)
    if twin is not None:
        try:
            return registry.get(twin.ref)
        except (HashMismatch, TornArtifact):
            names = list(registry.damaged(twin))
    with _download_folder(registry, f"{repo_id.replace('/', '--')}-{remote.commit[:12]}") as folder:
        for name in names:
            hub.call(lambda name=name: hub.fetch(name, remote.commit, folder))  # type: ignore[misc]
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        try:
            if twin is None:
                return registry.adopt(folder, run=run_name, origin=f"{repo_id}@{revision or remote.commit[:12]}")
            for name in names:
                registry.restore(twin, name, folder / name)
            return registry.get(twin.ref)
        except RegistryError as error:
            shutil.rmtree(folder, ignore_errors=True)  # or the next pull would find the same wrong files
            raise HubError(f"{where}: {error}") from None


def check_ready(repo_id: str) -> None:
    """Raises HubError where a push could not even begin, as far as that is known without asking the Hub."""
    check_repo_id(repo_id)
    if is_offline_mode():
        raise HubError(
            "HF_HUB_OFFLINE is set, so that nothing can be pushed at the end: unset it, or leave push_to_hub out and "
            "`rlhf push` later"
        )
    check_token()


def check_token() -> None:
    """Raises HubError where nobody is logged in."""
    if get_token() is None:
        raise HubError(
            f"no Hub token to push with: run `hf auth login`, or set HF_TOKEN to one that may write ({TOKENS})"
        )


def check_repo_id(repo_id: str) -> None:
    """Raises HubError unless it reads user/name, in the letters that the Hub takes."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{one_line(error)} Write user/name.") from None
    if repo_id.count("/") != 1:
        raise HubError(f"{repo_id!r} is no model repository: write user/name, with your user or organisation in front")


def refuse_tokens(artifact: Artifact, token: str) -> None:
    """Raises HubError where a file holds this token, or what reads like any Hub token: an upload would give it away."""
    for name in [*artifact.manifest["files"], MANIFEST]:
        if is_weights(name):
            continue
        content = (artifact.path / name).read_bytes()
        if token.encode() in content or _TOKEN.search(content):
            raise HubError(
                f"{artifact.path / name} holds a Hub token, and a push would publish it: revoke the token ({TOKENS}), "
                "take it out of the config, and publish the version anew"
            )


def refuse_local_bases(artifact: Artifact) -> None:
    """Raises HubError for an adapter on weights that are on this machine alone: nobody could load it from the Hub."""
    for base in artifact.adapters.values():
        if base["kind"] == "artifact" or Path(base["ref"]).exists():
            raise HubError(
                f"{artifact.ref} is an adapter on {base['ref']}, which is on this machine only: publish whole weights with "
                f"`rlhf registry merge {artifact.ref}`, and push that version"
            )


def _what_else(artifact: Artifact, remote: Remote) -> str | None:
    """What a repository holds that is no version of this run and stage, in words; None where there is nothing else."""
    if remote.manifest is None:
        others = remote.files - OWN
        return f"exists and was not made by rlhf ({len(others)} files)" if others else None
    theirs, ours = f"{remote.manifest['run']}/{remote.manifest['stage']}", f"{artifact.run}/{artifact.stage}"
    return f"holds {theirs}, not {ours}" if theirs != ours else None


@contextlib.contextmanager
def _download_folder(registry: Registry, name: str) -> Iterator[Path]:
    """A hidden folder in the registry's root, that stays after a failure for the next pull to resume; one pull at a time."""
    folder = registry.root / f".pull-{name}"
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            try:
                yield folder
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                if not folder.exists():
                    lock.unlink(missing_ok=True)
    except Timeout:
        raise HubError(f"another process is pulling into {folder}; wait for it") from None
    except OSError as error:
        raise HubError(
            f"cannot write to {folder}: {error.strerror or error}; free space, or choose another root"
        ) from None
