"""Where rows come from: files, hub data sets, mixtures of them, and the held-out split.

    train = hold_out(train_file..., dataset_name[dataset_train_split]...), each source by its weight
    eval  = eval_file..., dataset_name[dataset_test_split]..., or what was held out

Everything is decided by the config and its seed, so every rank reads the same rows in the same
order.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from accelerate import PartialState

from trainer.config import InputError, RunConfig, find_file
from trainer.data import FIELDS, BadRow, BadRows, Row, check_record

csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document; the default is 128 KiB

HELD_OUT = "held-out data"  # what is said of the split `eval`

Records = Iterator[tuple[int, bytes | dict]]  # line or row number, and what is there


def read_splits(config: RunConfig) -> dict[str, tuple[list[Row], BadRows]]:
    """The checked rows of `train` and, where the config asks for held-out pairs, of `eval`.

    Raises:
        InputError: a file or data set that cannot be read, no usable row, bad rows under the policy
            `error`, or a weight or share that leaves nothing.
    """
    train, bad = _read(config, config.train_file, config.dataset_train_split, "training data")
    splits = {}
    if config.eval_file or config.dataset_test_split:
        files, split = config.eval_file, config.dataset_test_split
        held_out, eval_bad = _read(config, files, split, HELD_OUT)
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


def _read(
    config: RunConfig, files: tuple[str, ...], split: str | None, of: str
) -> tuple[list[list[Row]], BadRows]:
    """The rows of every source of one split: files first, then data sets; `of` names them."""
    bad = BadRows(config.on_bad_row, of=of)
    sources = [check_rows(f"{name}:", read_file(name), bad) for name in files]
    for name in config.dataset_name if split else ():
        records = read_dataset(name, config.dataset_config, split)
        sources.append(check_rows(f"{name}[{split}]:", records, bad))
    bad.settle(sum(map(len, sources)))
    return sources, bad


def check_rows(source: str, records: Records, bad: BadRows) -> list[Row]:
    """The usable rows of a source; `bad` receives the others, as `source` and their number."""
    rows = []
    for number, record in records:
        place = f"{source}{number}"
        try:
            rows.append(check_record(record, place))
        except BadRow as problem:
            bad.add(place, problem)
    return rows


def read_file(name: str) -> Records:
    """The records of a .jsonl (or .json, one object a line), .parquet or .csv file, from line 1.

    Raises:
        InputError: a missing or unreadable file, or an unknown file type.
    """
    path = find_file(name)
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".parquet": _parquet, ".csv": _csv}
    if path.suffix not in readers:
        raise InputError(
            f"{name}: expected a .jsonl, .parquet or .csv file, got {path.suffix or 'no suffix'}"
        )
    return readers[path.suffix](path)


def _jsonl(path: Path) -> Records:
    with path.open("rb") as lines:
        records = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        for count, (number, line) in enumerate(records):
            if count == 0 and line.lstrip().startswith(b"["):
                raise InputError(
                    f"{path}: expected one JSON object a line, got an array; write its elements "
                    "one a line, as jq -c '.[]' does"
                )
            yield number, line


def _parquet(path: Path) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name in FIELDS]
        for batch in file.iter_batches(1024, columns=columns):
            for record in batch.to_pylist():
                yield (number := number + 1), record
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from None


def _csv(path: Path) -> Records:
    """Strings only; a record is known by the line on which it begins."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            begin = 1 + bool(reader.fieldnames) * reader.line_num
            for record in reader:
                yield begin, record
                begin = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable CSV file: {error}") from None


def read_dataset(name: str, config: str | None, split: str) -> Records:
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
    data = data.select_columns([column for column in data.column_names if column in FIELDS])
    return enumerate(data)


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
