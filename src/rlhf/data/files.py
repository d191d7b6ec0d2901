"""Files: from a path to raw records, each with the place it came from.

An item is `(place, record)`; where a single record could not be read, the record is a `Problem`. What spoils the rest of
a file (a torn archive, a broken quote) raises `DataError`.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rlhf.data.records import DataError, Problem

Item = tuple[str, Any]
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "eval", "test")
BOM = b"\xef\xbb\xbf"
LARGEST_CSV_FIELD = 2**30  # characters; the csv module stops at 131,072 unless told, which a long document passes


def suffix_of(path: Path) -> str:
    """The suffix that decides how a file is read: `.jsonl` for both `a.jsonl` and `a.jsonl.gz`."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def read(path: Path) -> Iterator[Item]:
    """All records of one file."""
    suffix = suffix_of(path)
    if suffix not in READERS:
        raise DataError(f"{path}: unknown file type; the name has to end in {', '.join(SUFFIXES)}, or these with .gz")
    with _readable(path):
        yield from READERS[suffix](path)


def files_in(folder: Path, split: str) -> list[Path]:
    """The data files of a folder in sorted order; of `split` alone where files are named for splits (train-0.jsonl)."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None
    files = [path for path in files if suffix_of(path) in SUFFIXES]
    if not files:
        raise DataError(f"{folder}: holds no {', '.join(SUFFIXES)} file; give the folder that holds the files")
    splits = {path: _split_named(path) for path in files}
    if not any(splits.values()):
        return files
    chosen = [path for path in files if splits[path] == split]
    if not chosen:
        there = ", ".join(sorted({name for name in splits.values() if name}))
        raise DataError(f"{folder}: has no files of the split {split!r}; its files are named for: {there}")
    return chosen


def _split_named(path: Path) -> str | None:
    match = re.match(rf"({'|'.join(SPLIT_NAMES)})(?=[-_.])", path.name)
    return match[1] if match else None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is cut or damaged ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, cut at newline characters alone: JSON strings may hold U+2028 and its like."""
    for number, line in enumerate(stream, start=1):
        yield number, line.removeprefix(BOM) if number == 1 else line


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Problem(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Problem(f"malformed JSON at character {error.pos + 1} ({error.msg}); mend or remove it") from None
    except RecursionError:
        raise Problem("JSON nested too deeply; mend or remove it") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise Problem(f"malformed JSON ({error}); mend or remove it") from None


def as_object(value: Any) -> Any:
    if isinstance(value, dict):
        return value
    if isinstance(value, Mapping):
        return dict(value)
    return Problem("a record must be an object with named fields; mend or remove it")


def _read_json(path: Path) -> Iterator[Item]:
    with _opened(path) as stream:
        yield from read_json(str(path), stream)


def read_json(path: str, stream: IO[bytes]) -> Iterator[Item]:
    """One record a line, or one array (or one object) over the whole file; the first character decides."""
    lines = _lines(stream)
    for number, line in lines:
        if not line.strip():
            continue
        if line.lstrip()[:1] == b"[":
            yield from _whole(path, number, line + stream.read())
            return
        item = _line(path, number, line)
        if isinstance(item[1], Problem) and line.lstrip()[:1] == b"{":
            rest = stream.read()
            spread = _spread_object(line + rest)
            if spread is not None:
                yield f"{path}:{number}", spread
                return
            lines = enumerate(io.BytesIO(rest), start=number + 1)
        yield item
        break
    yield from (_line(path, number, line) for number, line in lines if line.strip())


def _line(path: str, number: int, line: bytes) -> Item:
    try:
        return f"{path}:{number}", as_object(_parsed(_text(line)))
    except Problem as problem:
        return f"{path}:{number}", problem


def _whole(path: str, number: int, data: bytes) -> Iterator[Item]:
    try:
        values = _parsed(_text(data))
    except Problem as problem:
        raise DataError(f"{_place(path, number, data, problem)}: {problem}") from None
    for position, value in enumerate(values, start=1):
        yield f"{path}, record {position}", as_object(value)


def _place(path: Path | str, number: int, data: bytes, problem: Problem) -> str:
    """The line of the byte or character at fault, where the problem names one."""
    found = re.match(r"(byte|malformed JSON at character) (\d+)", str(problem))
    if not found:
        return str(path)
    before = int(found[2]) - 1
    head = data[:before] if found[1] == "byte" else data.decode("utf-8")[:before].encode("utf-8")
    return f"{path}:{number + head.count(bytes([10]))}"


def _spread_object(data: bytes) -> dict | None:
    """One object written over several lines, or None."""
    try:
        value = _parsed(_text(data))
    except Problem:
        return None
    return value if isinstance(value, dict) else None


def _read_table(path: Path) -> Iterator[Item]:
    """csv and tsv with a header line. A first line that holds a number is no header: columns become column_1, column_2 …"""
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_CSV_FIELD))
    with _opened(path) as stream:
        rows = csv.reader(_decoded(path, stream), delimiter=delimiter, strict=True)
        names: list[str] = []
        try:
            for row in rows:
                if not row:
                    continue
                if not names:
                    is_header = not any(cell.strip().isdigit() for cell in row)
                    names = row if is_header else [f"column_{position}" for position in range(1, len(row) + 1)]
                    if is_header:
                        _check_header(f"{path}:{rows.line_num}", names)
                        continue
                yield f"{path}:{rows.line_num}", _row(names, row)
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num}: malformed table ({error}); mend the quotes there") from None


def _decoded(path: Path, stream: IO[bytes]) -> Iterator[str]:
    for number, line in _lines(stream):
        try:
            yield _text(line)
        except Problem as problem:
            raise DataError(f"{path}:{number}: {problem}") from None


def _check_header(place: str, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{place}: the header names the column {twice[:40]!r} twice; give each column its own name")


def _row(names: list[str], row: list[str]) -> Any:
    if len(row) != len(names):
        return Problem(f"the row has {len(row)} cells, and the header {len(names)}; mend the row")
    return dict(zip(names, row))


def _read_parquet(path: Path) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    with _opened(path) as stream:
        source = io.BytesIO(stream.read()) if path.name.lower().endswith(".gz") else stream
        try:
            position = 0
            for batch in parquet.ParquetFile(source).iter_batches():
                for record in batch.to_pylist():
                    position += 1
                    yield f"{path}, record {position}", record
        except (pa.ArrowException, UnicodeDecodeError, ValueError) as error:
            raise DataError(f"{path}: not a readable parquet file ({error}); fetch or write it again") from None


def _read_txt(path: Path) -> Iterator[Item]:
    """One record: the whole file, with newlines as Python's text mode has them."""
    with _opened(path) as stream:
        data = stream.read().removeprefix(BOM)
    try:
        text = _text(data)
    except Problem as problem:
        raise DataError(f"{_place(path, 1, data, problem)}: {problem}") from None
    yield str(path), {"text": text.replace("\r\n", "\n").replace("\r", "\n")}


READERS = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
