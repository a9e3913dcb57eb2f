"""One batch's walk through the code, counted: `python -m tests.trainer.walk`.

A training step on the tiny model runs under `sys.setprofile`. Every Python call into a file of ours
is noted; a *move* is a call, or the return from one, to another file of ours than the one before.
Prints the files in the order in which the step enters them, how many of their functions it calls,
and the moves. What torch and transformers do in between is not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.trainer.tiny import as_split, shifted_reference, tiny_config, tiny_policy, tiny_split
from trainer.data.steps import plan_pass
from trainer.loop import Training, take_step
from trainer.optimizer import make_optimizer, make_schedule

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / name) for name in ("trainer", "rpo_kernels"))


class Walk:
    """Calls into files of ours, in order."""

    def __init__(self) -> None:
        self.functions: dict[str, set[str]] = {}
        """By file, in the order in which they are entered: the functions that ran."""
        self.moves = 0
        self._stack: list[str] = []

    def note(self, frame, event: str, _argument: object) -> None:
        """What `sys.setprofile` calls."""
        code = frame.f_code
        if not code.co_filename.startswith(OURS) or code.co_name.startswith("<"):
            return  # a comprehension is part of the function that it stands in
        if event == "call":
            self._enter(code.co_filename, code.co_qualname)
        elif event == "return" and self._stack:
            here = self._stack.pop()
            self.moves += bool(self._stack) and self._stack[-1] != here

    def _enter(self, file: str, function: str) -> None:
        name = str(Path(file).relative_to(ROOT))
        self.moves += bool(self._stack) and self._stack[-1] != name
        self._stack.append(name)
        self.functions.setdefault(name, set()).add(function)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, calls are noted."""
        sys.setprofile(self.note)
        try:
            yield
        finally:
            sys.setprofile(None)


def walk() -> Walk:
    """The walk of the third step of a run; the first ones also import and tune."""
    torch.manual_seed(0)
    config = tiny_config(learning_rate=1e-3, per_device_train_batch_size=4)
    policy, accelerator = tiny_policy()
    split = as_split(tiny_split(4).pairs, shifted_reference(4))
    optimizer = make_optimizer(policy, config)
    schedule = make_schedule(optimizer, config, 10)
    training = Training(policy, optimizer, schedule, log=None)
    step = plan_pass([0, 1, 2, 3], 4, 1, 1)[0]
    found = Walk()
    for number in range(3):
        if number == 2:
            with found.watching():
                take_step(training, split, step, config, accelerator)
        else:
            take_step(training, split, step, config, accelerator)
    return found


def main() -> None:
    """Print the walk."""
    found = walk()
    for file, functions in found.functions.items():
        print(f"{file:<45}{len(functions):>4}  {', '.join(sorted(functions))}")
    count = sum(map(len, found.functions.values()))
    print(f"{len(found.functions)} files, {count} functions, {found.moves} moves")


if __name__ == "__main__":
    main()
