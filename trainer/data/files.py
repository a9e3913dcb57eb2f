"""Records of data files: which files a name means, and what is in them.

JSON lines, a JSON array, CSV, Parquet; all but the last may be gzipped. A record comes with the
place at which a user finds it again.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from trainer.data.columns import Columns
from trainer.errors import InputError
from trainer.paths import ROOT, find_file

csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document; the default is 128 KiB

Records = Iterator[tuple[int, bytes | dict]]  # line or row number, and what is there


def find_files(name: str) -> list[str]:
    """The files that a name means: itself, those of a folder, or those that a glob matches.

    Paths are looked for in the working directory, then in the repository.

    Raises:
        InputError: there is none.
    """
    places = [Path(name), ROOT / name]
    if any(place.is_file() for place in places):
        return [name]
    for folder in filter(Path.is_dir, places):
        inside = _matches(f"{glob.escape(str(folder))}/**/*")
        found = [path for path in inside if _kind(Path(path)) in READERS]
        if not found:
            raise InputError(f"{name}: no {KINDS} in this folder")
        return found
    for place in places if glob.has_magic(name) else ():
        if found := _matches(str(place)):
            return found
    return [str(find_file(name))]  # which says where it was looked for


def _matches(pattern: str) -> list[str]:
    """The files, none of them hidden, that a glob matches, in order."""
    return sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())


def read_file(name: str, columns: Columns | None = None) -> Records:
    """The records of a file: JSONL, a JSON array, CSV or Parquet; all but the last may be gzipped.

    A record is known by its line or, in Parquet, by its number, from 1.

    Raises:
        InputError: a missing or unreadable file, or an unknown file type.
    """
    path = find_file(name)
    if _kind(path) not in READERS:
        raise InputError(
            f"{name}: expected a {KINDS} (all but the last may end in .gz), got "
            f"{''.join(path.suffixes[-2:]) or 'no suffix'}"
        )
    return READERS[_kind(path)](path, columns or Columns())


def _kind(path: Path) -> str:
    """A file's last suffix, or the one before .gz."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return "" if kind == ".parquet" and path.suffix == ".gz" else kind


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


@contextlib.contextmanager
def _readable(path: Path, kind: str, *errors: type[Exception]) -> Iterator[None]:
    """Inside, what a damaged file raises becomes an `InputError`."""
    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, *errors)
    try:
        yield
    except damage as error:
        raise InputError(f"{path}: not a readable {kind} file: {error}") from None


def _jsonl(path: Path, columns: Columns) -> Records:
    with _readable(path, "JSONL"), _open(path) as lines:
        records = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        for count, (number, line) in enumerate(records):
            line = line.removeprefix(codecs.BOM_UTF8) if count == 0 else line
            if count == 0 and line.lstrip().startswith(b"["):
                raise InputError(
                    f"{path}: expected one JSON object a line, got an array; name the file .json, "
                    "or write its elements one a line, as jq -c '.[]' does"
                )
            yield number, line


def _json(path: Path, columns: Columns) -> Records:
    """The elements of an array, each with the line on which it begins; or JSON lines."""
    with _readable(path, "JSON", UnicodeDecodeError), _open(path) as file:
        text = file.read().decode("utf-8-sig")
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        if _is_one_object(text):
            raise InputError(
                f"{path}: expected an array, or one object a line, got one object over several "
                "lines; write its array alone"
            )
        yield from _jsonl(path, columns)
        return
    decoder, line, counted, place = json.JSONDecoder(), 1, 0, _next(text, start + 1)
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            _, end = decoder.raw_decode(text, place)
            yield line, text[place:end].encode()
            place = _next(text, end)
            if text[place : place + 1] == ",":
                place = _next(text, place + 1)
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if text[place + 1 :].strip():
        line += text.count("\n", counted, _next(text, place + 1))
        raise InputError(f"{path}:{line}: not valid JSON: text follows the array")


def _is_one_object(text: str) -> bool:
    """Whether a text is a single JSON object of several lines."""
    try:
        return len(text.split("\n", 2)) > 2 and isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _next(text: str, place: int) -> int:
    """The place of the next character that is no white space."""
    found = re.compile(r"\S").search(text, place)
    return found.start() if found else len(text)


def _parquet(path: Path, columns: Columns) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with _readable(path, "Parquet", pa.ArrowException):
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        for batch in file.iter_batches(1024, columns=columns_to_read(names, columns)):
            for record in batch.to_pylist():
                yield (number := number + 1), dict.fromkeys(names) | record


def columns_to_read(names: list[str], columns: Columns) -> list[str]:
    """Which columns to read: those that are used, or any, so that rows are seen to lack them."""
    return [name for name in names if columns.read(name)] or names[:1]


def _csv(path: Path, columns: Columns) -> Records:
    """Strings only; a record is known by the line on which it begins."""
    with (
        _readable(path, "CSV", csv.Error, UnicodeDecodeError),
        _open(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines,
    ):
        reader = csv.DictReader(lines)
        begin = 1 + bool(reader.fieldnames) * reader.line_num
        for record in reader:
            yield begin, record
            begin = reader.line_num + 1


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
KINDS = ".jsonl, .json, .csv or .parquet file"
