"""Long commands that share nothing with other tests: they start as soon as pytest knows its tests,
two at a time and with the lowest priority, and the tests that need them wait for them.

A test module says so with a function ``commands(item)``: what its test `item` will ask `result`
for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

AT_ONCE = 2


class Command(NamedTuple):
    """What to run in the repository's root; `TRITON_INTERPRET` is not passed on."""

    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


_pool = ThreadPoolExecutor(AT_ONCE)
_found: dict[Command, Future[subprocess.CompletedProcess]] = {}
_running: set[subprocess.Popen] = set()
_folder = tempfile.TemporaryDirectory(prefix="rpo_kernels-tests-")


def triton_cache() -> tuple[str, str]:
    """For `Command.environment`: the compiled kernels of this session, and of no other."""
    return "TRITON_CACHE_DIR", str(Path(_folder.name, "triton"))


def start(commands: Iterable[Command]) -> None:
    """Queue the commands that are not yet."""
    for command in commands:
        if command not in _found:
            _found[command] = _pool.submit(_run, command)


def result(command: Command) -> subprocess.CompletedProcess:
    """What came of a command."""
    start([command])
    return _found[command].result()


def stop() -> None:
    """At the session's end: end what still runs."""
    _pool.shutdown(wait=False, cancel_futures=True)
    for process in list(_running):
        os.killpg(process.pid, signal.SIGKILL)
    _pool.shutdown()
    _folder.cleanup()


def _run(command: Command) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        ["nice", "-n", "19", *command.words],
        cwd=ROOT,
        env=environment | dict(command.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # `stop` reaches its children
    )
    _running.add(process)
    try:
        out, err = process.communicate()
    finally:
        _running.discard(process)
    return subprocess.CompletedProcess(command.words, process.returncode, out, err)
