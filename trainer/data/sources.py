"""Where rows come from: files, hub data sets, mixtures of them, and the held-out split.

    train = hold_out(train_file..., dataset_name[dataset_train_split]...), each source by its weight
    eval  = eval_file..., dataset_name[dataset_test_split]..., or what was held out

Everything is decided by the config and its seed, so every rank reads the same rows in the same
order.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from accelerate import PartialState

from trainer.config.fields import RunConfig
from trainer.console import say
from trainer.data.columns import Columns, holds
from trainer.data.files import Records, columns_to_read, find_files, read_file
from trainer.data.rows import BadRow, BadRows, Row, check_record, parse_record
from trainer.errors import InputError
from trainer.paths import find_file

HELD_OUT = "held-out data"  # what is said of the split `eval`


def read_splits(config: RunConfig) -> dict[str, tuple[list[Row], BadRows]]:
    """The checked rows of `train` and, where the config asks for held-out pairs, of `eval`.

    Raises:
        InputError: a file or data set that cannot be read, no usable row, bad rows under the policy
            `error`, or a weight or share that leaves nothing.
    """
    for warning in repeated_files(config.train_file, config.eval_file):
        say(warning)
    train, bad = _read_split(config, config.train_file, config.dataset_train_split, "training data")
    splits: dict[str, tuple[list[Row], BadRows]] = {}
    if config.eval_file or config.dataset_test_split:
        files, split = config.eval_file, config.dataset_test_split
        sources, eval_bad = _read_split(config, files, split, HELD_OUT)
        splits["eval"] = [row for rows in sources for row in rows], eval_bad
    elif config.eval_split_ratio:
        train, held_out = hold_out(train, config.eval_split_ratio, config.seed)
        splits["eval"] = held_out, BadRows(config.on_bad_row, of=HELD_OUT)
    if config.train_weights:
        train = [
            weigh(rows, weight, seed=(config.seed, number))
            for number, (rows, weight) in enumerate(zip(train, config.train_weights, strict=True))
        ]
    return {"train": ([row for rows in train for row in rows], bad)} | splits


def repeated_files(train: tuple[str, ...], evaluated: tuple[str, ...]) -> list[str]:
    """What looks like a mistake in files, folders and globs that overlap, as warnings."""
    read, held_out = (
        Counter(Path(find_file(file)).resolve() for name in names for file in find_files(name))
        for names in (train, evaluated)
    )
    twice = [f"{file} is read {n} times" for file, n in (read + held_out).items() if n > 1]
    both = [f"{file} is trained on, and held-out data, too" for file in read if file in held_out]
    return [f"warning: {what}" for what in (both or twice)]


def _read_split(
    config: RunConfig, files: tuple[str, ...], split: str | None, of: str
) -> tuple[list[list[Row]], BadRows]:
    """The rows of every source of one split: files first, then data sets; `of` names them."""
    bad, columns = BadRows(config.on_bad_row, of=of), columns_of(config)
    sources = [read_rows(name, bad, columns) for name in files]
    if split:
        for name in config.dataset_name:
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
    absent: set[str] = set()
    if columns is not None and len(columns.prompt) > 1:
        absent = set(columns.prompt)
    for number, record in records:
        place = f"{source}{number}"
        try:
            record = parse_record(record)
            absent = {name for name in absent if not holds(record, name)}
            rows.append(check_record(record, place, columns))
        except BadRow as problem:
            bad.add(place, problem)
    bad.absent = absent if bad.absent is None else bad.absent & absent
    return rows


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
    data = data.select_columns(columns_to_read(names, columns or Columns()))
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


def weigh(rows: list[Row], weight: float, seed: int | tuple[int, int]) -> list[Row]:
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
