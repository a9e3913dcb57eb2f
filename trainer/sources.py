"""Where rows come from: files, hub data sets, mixtures of them, and the held-out split.

    train = hold_out(train_file..., dataset_name[dataset_train_split]...), each source by its weight
    eval  = eval_file..., dataset_name[dataset_test_split]..., or what was held out

Everything is decided by the config and its seed, so every rank reads the same rows in the same
order.
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
from typing import IO

import numpy as np
from accelerate import PartialState

from trainer.config import ROOT, InputError, RunConfig, find_file
from trainer.data import BadRow, BadRows, Columns, Row, check_record

csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document; the default is 128 KiB

HELD_OUT = "held-out data"  # what is said of the split `eval`

Records = Iterator[tuple[int, bytes | dict]]  # line or row number, and what is there


def read_splits(config: RunConfig) -> dict[str, tuple[list[Row], BadRows]]:
    """The checked rows of `train` and, where the config asks for held-out pairs, of `eval`.

    Raises:
        InputError: a file or data set that cannot be read, no usable row, bad rows under the policy
            `error`, or a weight or share that leaves nothing.
    """
    train, bad = _read_split(config, config.train_file, config.dataset_train_split, "training data")
    splits = {}
    if config.eval_file or config.dataset_test_split:
        files, split = config.eval_file, config.dataset_test_split
        held_out, eval_bad = _read_split(config, files, split, HELD_OUT)
        splits["eval"] = [row for rows in held_out for row in rows], eval_bad
    elif config.eval_split_ratio:
        train, held_out = hold_out(train, config.eval_split_ratio, config.seed)
        splits["eval"] = held_out, BadRows(config.on_bad_row, of=HELD_OUT)
    if config.train_weights:
        train = [
            weigh(rows, weight, seed=(config.seed, number))
            for number, (rows, weight) in enumerate(zip(train, config.train_weights, strict=True))
        ]
    return {"train": ([row for rows in train for row in rows], bad)} | splits


def _read_split(
    config: RunConfig, files: tuple[str, ...], split: str | None, of: str
) -> tuple[list[list[Row]], BadRows]:
    """The rows of every source of one split: files first, then data sets; `of` names them."""
    bad, columns = BadRows(config.on_bad_row, of=of), columns_of(config)
    sources = [read_rows(name, bad, columns) for name in files]
    for name in config.dataset_name if split else ():
        records = read_dataset(name, config.dataset_config, split, columns)
        sources.append(check_rows(f"{name}[{split}]:", records, bad, columns))
    bad.settle(sum(map(len, sources)))
    return sources, bad


def columns_of(config: RunConfig) -> Columns:
    """Where the config says that prompt, chosen and rejected are."""
    return Columns(
        config.prompt_column, config.chosen_column, config.rejected_column, config.implicit_prompt
    )


def read_rows(name: str, bad: BadRows, columns: Columns | None = None) -> list[Row]:
    """The usable rows of a file, of a folder's files, or of those that a glob matches."""
    return [
        row
        for file in find_files(name)
        for row in check_rows(f"{file}:", read_file(file, columns), bad, columns)
    ]


def check_rows(
    source: str, records: Records, bad: BadRows, columns: Columns | None = None
) -> list[Row]:
    """The usable rows of a source; `bad` receives the others, as `source` and their number."""
    rows = []
    for number, record in records:
        place = f"{source}{number}"
        try:
            rows.append(check_record(record, place, columns))
        except BadRow as problem:
            bad.add(place, problem)
    return rows


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


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


@contextlib.contextmanager
def _readable(path: Path, kind: str, *errors: type[Exception]) -> Iterator[None]:
    """Inside, what a damaged file raises becomes an `InputError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error, *errors) as error:
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
        for batch in file.iter_batches(1024, columns=_read(names, columns)):
            for record in batch.to_pylist():
                yield (number := number + 1), dict.fromkeys(names) | record


def _read(names: list[str], columns: Columns) -> list[str]:
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


def read_dataset(
    name: str, config: str | None, split: str, columns: Columns | None = None
) -> Records:
    """The rows of a hub data set, or of a local folder laid out like one, from row 0.

    Raises:
        InputError: no such data set, config or split, or no connection to fetch it.
    """
    import datasets

    try:
        with PartialState().main_process_first():  # the others find it in the cache
            data = datasets.load_dataset(name, config, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"dataset_name: cannot load {name!r} with dataset_config {config}, split {split!r}: "
            f"{error.__cause__ or error}"
        ) from None
    names = data.column_names
    data = data.select_columns(_read(names, columns or Columns()))
    return enumerate(dict.fromkeys(names) | record for record in data)


def hold_out(
    sources: list[list[Row]], ratio: float, seed: int
) -> tuple[list[list[Row]], list[Row]]:
    """Take a share of the prompts out of the training data, with every row that has them.

    Args:
        sources: the rows of every source.
        ratio: share of the distinct prompts, in (0, 1); at least one goes, and one stays.
        seed: which ones.

    Returns:
        The remaining rows of every source, and the held-out rows.

    Raises:
        InputError: fewer than two prompts.
    """
    prompts = list(dict.fromkeys(_prompt_key(row) for rows in sources for row in rows))
    if len(prompts) < 2:
        raise InputError(
            f"eval_split_ratio: expected at least 2 different prompts, got {len(prompts)}; "
            "give eval_file"
        )
    count = min(max(round(ratio * len(prompts)), 1), len(prompts) - 1)
    order = np.random.default_rng(seed).permutation(len(prompts))[:count]
    taken = {prompts[i] for i in order}
    kept: list[list[Row]] = []
    held_out: list[Row] = []
    for rows in sources:
        kept.append([row for row in rows if _prompt_key(row) not in taken])
        held_out += [row for row in rows if _prompt_key(row) in taken]
    return kept, held_out


def _prompt_key(row: Row) -> str:
    return row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt, sort_keys=True)


def weigh(rows: list[Row], weight: float, seed: object) -> list[Row]:
    """``round(weight * len(rows))`` rows: all ``floor(weight)`` times, a random rest once more.

    Raises:
        InputError: not a single row remains.
    """
    count = round(weight * len(rows))
    if count == 0:
        raise InputError(
            f"train_weights: {weight:g} of {len(rows)} rows leaves none; raise the weight, "
            "or leave the source out"
        )
    whole, rest = divmod(count, len(rows))
    extra = np.random.default_rng(seed).permutation(len(rows))[:rest]
    return rows * whole + [rows[i] for i in sorted(extra)]
