"""Where records come from: a file, a folder, a saved data set, the Hub, standard input, or records at hand."""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from rlhf.data import files
from rlhf.data.records import DataError
from rlhf.hub_api import public

Name = str | os.PathLike[str] | Iterable[Mapping[str, Any]]

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
STANDARD_INPUT = "-"


def name_of(name: Name) -> str:
    """What messages and manifests call a source."""
    if isinstance(name, (str, os.PathLike)):
        return "standard input" if name == STANDARD_INPUT else os.fspath(name)
    return "records"


def sources(
    name: Name,
    *,
    data_dir: str | None = None,
    config_name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    stream: bool = False,
) -> Iterator[Iterator[files.Item]]:
    """One iterator of (place, raw record) for each file, or one for a data set, standard input, or records at hand.

    stream: a Hub data set is read as it comes, and not kept on the disk. Files are always read as they come.
    """
    if not isinstance(name, (str, os.PathLike)):
        yield _table_items("records", name)
        return
    name = os.fspath(name)
    if name == STANDARD_INPUT:
        yield files.read_json("standard input", sys.stdin.buffer)
        return
    path = Path(name)
    if data_dir and path.is_dir():
        path = path / data_dir
        if not _exists(path):
            raise DataError(f"{path}: the folder does not exist; data_dir is a folder inside {name}")
    if not _exists(path):
        yield _from_network(name, _table_items(name, _from_hub(name, data_dir, config_name, split, revision, stream)))
        return
    if config_name is not None or revision is not None:
        raise DataError(f"{path} is local, and config_name and revision are for Hub data sets; leave them out")
    if not re.fullmatch(r"\w+", split):
        raise DataError(
            f"split is {split!r}, and local data have plain splits like 'train'; slices are for Hub data sets"
        )
    if path.is_dir() and any((path / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json")):
        yield _table_items(str(path), _from_disk(path, split))
    elif path.is_dir():
        yield from (files.read(file) for file in files.files_in(path, split))
    else:
        yield files.read(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _table_items(name: str, records: Iterable[Any]) -> Iterator[files.Item]:
    return ((f"{name}, record {position}", files.as_object(record)) for position, record in enumerate(records, start=1))


def _from_network(name: str, items: Iterator[files.Item]) -> Iterator[files.Item]:
    """A stream whose connection may break."""
    try:
        yield from items
    except Exception as error:  # as many exception types as causes
        raise DataError(
            f"{name!r}: reading broke off ({type(error).__name__}: {public(str(error))}); try again"
        ) from error


def _from_disk(path: Path, split: str) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds for one fact: the folder is not whole
        raise DataError(f"{path}: cannot be loaded as a saved data set ({error}); save it again") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{path}: has no split {split!r}; it has: {', '.join(saved)}")
        return saved[split]
    return saved


def _from_hub(
    name: str, data_dir: str | None, config_name: str | None, split: str, revision: str | None, stream: bool
) -> Any:
    if not HUB_ID.fullmatch(name) or files.suffix_of(Path(name)) in files.SUFFIXES:
        raise DataError(f"{name!r}: the file does not exist; check the path (from {Path.cwd()})")
    try:
        options = {"streaming": True} if stream else {}
        return datasets.load_dataset(name, config_name, data_dir=data_dir, split=split, revision=revision, **options)
    except Exception as error:  # no network, no such set, gated, no such split: as many exception types as causes
        raise DataError(
            f"{name!r}: no such local file or folder, and the Hub gave {type(error).__name__}: {public(str(error))}; "
            "check the name, the network, and the access to the data set"
        ) from error
