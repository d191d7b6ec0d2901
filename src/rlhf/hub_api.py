"""Single steps on one model repository of the Hub, by huggingface_hub, with retries and with errors of one line.

Passing failures (429, 5xx, no answer) are retried after WAITS; huggingface_hub retries uploads of its own besides. Everything
else is a HubError, which never holds the token or a signed address.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from rlhf import RLHFError, __version__
from rlhf.manifest import MANIFEST, RegistryError
from rlhf.registry import ROOM, Artifact, read_manifest

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try, unless the Hub's Retry-After asks for more
LONGEST_WAIT = 300.0
OWN = {".gitattributes"}  # what the Hub itself puts into a new repository
TOKENS = "https://huggingface.co/settings/tokens"
# httpx.HTTPError or, since huggingface_hub 2, httpx2.HTTPError: the base of every failure to get an answer
_TRANSPORT: Any = HfHubHTTPError.__mro__[1]
_log = logging.getLogger(__name__)
T = TypeVar("T")


class HubError(RLHFError):
    """The Hub cannot do what was asked, or must not."""


@dataclass(frozen=True)
class Remote:
    """A repository at one commit; `manifest` is None where there is no readable stage.json."""

    commit: str
    private: bool
    files: set[str]
    manifest: dict[str, Any] | None


class Repository:
    """One model repository: single steps by the Hub's API, and `call`, which retries one and words its errors."""

    def __init__(self, repo_id: str, again: str):
        self.repo_id, self.again = repo_id, again
        self.token = get_token()
        self.api = HfApi(token=self.token, library_name="rlhf", library_version=__version__)
        self.host = public(self.api.endpoint)
        _check_address(self.api.endpoint)
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise HubError(
                f"the Hub token has letters that no token has: run `hf auth login`, or set HF_TOKEN anew ({TOKENS})"
            )
        self.url = f"{self.host}/{repo_id}"

    def call(self, step: Callable[[], T]) -> T:
        """The result of a step that may be repeated, tried again after each of WAITS while its failure may pass."""
        for wait in (*WAITS, None):
            try:
                with _quiet():
                    return step()
            except (OSError, RuntimeError, ValueError, _TRANSPORT) as error:
                cause = _cause(error)
                if wait is None or not _may_pass(cause):
                    # without the chain: it holds addresses that are signed
                    raise HubError(self.explain(cause)) from None
                wait = min(max(wait, _retry_after(cause)), LONGEST_WAIT)
                _log.warning("%s; trying again in %g s", self.reason(cause), wait)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def look(self, revision: str | None = None) -> Remote | None:
        """The repository as it is, None where there is none (or none that the token may see)."""
        try:
            info = self.api.model_info(self.repo_id, revision=revision)
        except RevisionNotFoundError:
            tags = ", ".join(self.tags()) or "none"
            raise HubError(f"{self.repo_id} has no revision {revision!r}; its tags: {tags}") from None
        except RepositoryNotFoundError as error:
            if self.token is not None and error.response.status_code == 401:
                raise  # the token itself is refused
            return None
        files = {sibling.rfilename for sibling in info.siblings or []}
        commit = str(info.sha)
        manifest = self.manifest(commit) if MANIFEST in files else None
        return Remote(commit, bool(info.private), files, manifest)

    def manifest(self, commit: str) -> dict[str, Any] | None:
        with tempfile.TemporaryDirectory() as folder:
            self.fetch(MANIFEST, commit, Path(folder))
            with contextlib.suppress(RegistryError):
                return read_manifest(Path(folder))
        return None

    def fetch(self, name: str, commit: str, folder: Path) -> None:
        try:
            self.api.hf_hub_download(self.repo_id, name, revision=commit, local_dir=folder)
        except OSError as error:
            cause = _cause(error)
            if (
                not isinstance(cause, OSError)
                or cause.errno is None
                or _is_silence(cause)
                or _status(cause) is not None
            ):
                raise
            raise HubError(
                f"cannot write {folder / name}: {cause.strerror}; {ROOM}, and run the same command again"
            ) from None

    def tags(self) -> list[str]:
        return [ref.name for ref in self.api.list_repo_refs(self.repo_id).tags]

    def commit(self, artifact: Artifact, replace: bool) -> str:
        """One commit after which the repository holds the version, and no file of the one before; returns its id.

        A repeated call finds what is there and commits the rest, or nothing.
        """
        remote = self.look()
        ours = {*artifact.manifest["files"], MANIFEST}
        before: set[str] = set()
        if remote is not None:
            before = remote.files - OWN if replace else remote.files & set((remote.manifest or {}).get("files", ()))
        adds = [CommitOperationAdd(name, artifact.path / name) for name in sorted(ours)]
        deletes = [CommitOperationDelete(name) for name in sorted(before - ours)]
        info = self.api.create_commit(
            self.repo_id, [*adds, *deletes], commit_message=f"{artifact.ref} by rlhf {__version__}"
        )
        return str(info.oid)

    def check(self, artifact: Artifact, commit: str) -> None:
        """Raises HubError unless the Hub lists every file of the version, with its size and, where it tells it, its sha256."""
        tree = {entry.path: entry for entry in self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)}
        for name, recorded in artifact.manifest["files"].items():
            entry: Any = tree.get(name)
            size = (artifact.path / name).stat().st_size  # a card may have been edited since
            lfs = getattr(entry, "lfs", None)
            if entry is None or entry.size != size or (lfs is not None and lfs.sha256 != recorded["sha256"]):
                state = "is not in" if entry is None else "differs in"
                raise HubError(f"{name} {state} {self.repo_id} after the upload (a .gitignore there?); {self.again}")

    def set_tag(self, tag: str, commit: str) -> None:
        if tag in self.tags():
            self.api.delete_tag(self.repo_id, tag=tag)
        self.api.create_tag(self.repo_id, tag=tag, revision=commit)

    # --- errors

    def reason(self, error: BaseException) -> str:
        """What happened, in some words, without the token."""
        status = _status(error)
        if status is not None:
            told = getattr(error, "server_message", None)
            text = f"the Hub answers {status}" + (f" ({told})" if told else "")
        elif _is_silence(error):
            text = f"cannot reach {self.host} ({one_line(error) or type(error).__name__})"
        else:
            text = one_line(error)
        text = public(" ".join(text.split()))[:300]
        return text.replace(self.token, "<token>") if self.token else text

    def explain(self, error: BaseException) -> str:
        """One line: what, and what to do."""
        if isinstance(error, OfflineModeIsEnabled):
            return f"HF_HUB_OFFLINE is set, so the Hub is not asked: unset it; {self.again}"
        status = _status(error)
        if status == 401 and self.token is not None:
            return f"the Hub refuses the token (401): run `hf auth login`, or set HF_TOKEN to a valid one ({TOKENS})"
        if status in (401, 404):
            return self.not_found()
        if status == 403:
            return f"the token{self.owner()} may not write to {self.repo_id} (403): use one that may ({TOKENS}); {self.again}"
        if _is_about_card(error):
            return f"{self.reason(error)}: mend the header of that card, and push again"
        if _is_silence(error):
            return f"{self.reason(error)}: look at the network and at HF_ENDPOINT; {self.again}"
        return f"{self.reason(error)}; {self.again}"

    def not_found(self) -> str:
        access = "is your token one that may read it?" if self.token else "a private one needs a token: `hf auth login`"
        return f"there is no model {self.repo_id} on {self.host}, or it is not for you to see: check the name; {access}"

    def owner(self) -> str:
        """Whose token it is and what it may do, for people who have several; nothing where the Hub does not say."""
        with contextlib.suppress(Exception), _quiet():
            who = self.api.whoami()
            return f" of {who['name']} (role: {who['auth']['accessToken']['role']})"
        return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The Hub library's bars only at a terminal, and none of its warnings: they are ours to word, and hold signed addresses."""
    verbosity, hide = hub_logging.get_verbosity(), not sys.stderr.isatty() and not are_progress_bars_disabled()
    hub_logging.set_verbosity_error()
    if hide:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
            yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if hide:
            enable_progress_bars()


def _cause(error: BaseException) -> BaseException:
    """The failure below what the Hub library wraps around it: an answer of the server, or none."""
    link: BaseException | None = error
    while link is not None:
        known = isinstance(link, OfflineModeIsEnabled) or _is_about_card(link) or _is_silence(link)
        if known or _status(link) is not None:
            return link
        link = link.__cause__ or link.__context__
    return error


def _is_about_card(error: BaseException) -> bool:
    return isinstance(error, ValueError) and "metadata in README.md" in str(error)


def _check_address(endpoint: str) -> None:
    """Raises HubError for what can be no address, which would otherwise look like a Hub that does not answer."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(endpoint)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return
    raise HubError(f"HF_ENDPOINT is {public(endpoint)!r}, which is no address: write https://HOST, or leave it out")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_silence(error: BaseException) -> bool:
    silent = isinstance(error, (_TRANSPORT, ConnectionError, TimeoutError))
    return silent and _status(error) is None and not isinstance(error, OfflineModeIsEnabled)


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return _is_silence(error) or isinstance(error, json.JSONDecodeError)  # a proxy's page instead of an answer


def _retry_after(error: BaseException) -> float:
    headers = getattr(getattr(error, "response", None), "headers", {})
    with contextlib.suppress(ValueError):  # it may be a date
        return float(headers.get("Retry-After", 0))
    return 0.0


def one_line(error: BaseException) -> str:
    """Its text on one line, addresses without their queries, which may be signatures."""
    return public(re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", " ".join(str(error).split())))


def public(text: str) -> str:
    """A text whose addresses have no user and password, as HF_ENDPOINT may have them."""
    return re.sub(r"(\w://)[^\s/'\"]*@", r"\1", text)
