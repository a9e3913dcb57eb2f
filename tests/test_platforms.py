"""macOS and Windows, as far as Linux can tell: every module imports without what they lack."""

import subprocess
import sys

import pytest

from tests.support import ROOT

# The standard library's modules that are said to be for Unix only.
UNIX = (
    "curses",
    "fcntl",
    "grp",
    "posix",
    "pty",
    "pwd",
    "readline",
    "resource",
    "syslog",
    "termios",
    "tty",
)
PROGRAM = """
import builtins, importlib, os, pkgutil, runpy, sys, types

platform, missing = sys.argv[1], sys.argv[2].split(",")
whole_import = builtins.__import__

def import_as_there(name, globals=None, *rest, **options):
    asking = (globals or {}).get("__name__", "").partition(".")[0]
    if asking in ("rpo_kernels", "trainer") and name.partition(".")[0] in missing:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return whole_import(name, globals, *rest, **options)

builtins.__import__ = import_as_there
import rpo_kernels, trainer, trainer.loop
for package in (rpo_kernels, trainer):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)

import psutil
seen = types.SimpleNamespace(peak_wset=3 * 2**30)  # bytes, where there is no `resource`
psutil.Process = lambda: types.SimpleNamespace(memory_info=lambda: seen)
sys.platform = platform
for name in ("sched_getaffinity", "getloadavg", "sysconf"):
    delattr(os, name)
peak = trainer.loop.peak_memory()
assert peak == 3 if "resource" in missing else peak > 0, peak
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # as under `accelerate launch`
sys.argv = ["run.py", "--help"]
runpy.run_path("trainer/run.py", run_name="__main__")
"""


@pytest.mark.parametrize(("platform", "missing"), [("win32", UNIX), ("darwin", ())])
def test_every_module_imports_where(platform, missing):
    """`python trainer/run.py --help` ends well there, too, and peak memory is a number."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, platform, ",".join(missing)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0 and "--model_name_or_path" in done.stdout, done.stderr[-2000:]
