"""The console: progress bars and messages; only the main process speaks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from accelerate import PartialState
from accelerate.utils import get_int_from_env
from tqdm import tqdm


def progress(items: Sequence, description: str, done: int = 0, lines: bool = False) -> tqdm:
    """A progress bar over `items`, `done` of which are, with elapsed and remaining time.

    Where the output is no terminal it is written twice a minute, or with `lines` not at all, as the
    caller says a line at a time then.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        items,
        initial=done,
        desc=f"{description:<10}",
        disable=not PartialState().is_main_process or (lines and not terminal),
        mininterval=0.1 if terminal else 30.0,
        dynamic_ncols=True,
    )


def is_first_process() -> bool:
    """Whether this is the main process, as its launcher says, before accelerate has started."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return get_int_from_env(names, 0) == 0


def say(text: str) -> None:
    """Print on the main process."""
    if is_first_process():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
