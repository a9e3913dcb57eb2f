"""Stopping a run from outside: SIGTERM and Ctrl-C wait for the step, then for a checkpoint."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator


class Stopped(Exception):
    """A signal ended training early; `checkpoint` holds all that was done."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped; all is saved in {checkpoint}")
        self.number, self.checkpoint = number, checkpoint


class StopSignal:
    """Inside, SIGTERM and the first Ctrl-C are only noted; the second Ctrl-C kills.

    SIGTERM may come more than once: from a scheduler, a launcher, and when the launcher dies.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.number = accelerator, 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: object) -> None:
        self.number = self.number or number
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def received(self) -> int:
        """The signal's number on every rank as soon as any rank got one, else 0."""
        numbers = torch.tensor([self.number], device=self.accelerator.device)
        return int(self.accelerator.gather(numbers).max())
