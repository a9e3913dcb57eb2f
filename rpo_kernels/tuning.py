"""Which tiles run: those that `python -m rpo_kernels.doctor --save` found on this device, else the
defaults of `backends/tiles.py` and `backends/torch_backend.py`.

A file a device, ``DEVICE.json``, in the folder ``$RPO_KERNELS_CACHE``, or else in ``rpo_kernels``
of ``$XDG_CACHE_HOME`` (``~/.cache``). It is read once a process and says so in the log
("rpo_kernels", level INFO): the same file, the same choice, the same bits. A file that is damaged
or was measured with other versions is ignored, with a warning that names it. To go back to the
defaults, delete it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from rpo_kernels.backends import tiles

FOLDER = "RPO_KERNELS_CACHE"
FORMAT = 1
REMEDY = "run `python -m rpo_kernels.doctor --save` again, or delete it"
log = logging.getLogger("rpo_kernels")


class Kernels(NamedTuple):
    """What the Triton backend runs with on one GPU and dtype."""

    tile: tiles.Tile
    """Of both matmul kernels, `lse_partials` and `exp_fused`."""
    exp_path: str
    """Who multiplies in `exp_panel`: a key of `EXP_PATHS`."""
    kept_rows: tiles.Tile
    kept_weight: tiles.Tile
    span: int
    """Row blocks of one pass of `kept_weight`, 1 to 16."""
    hopper: str = "triton"
    """"gluon": the kernels of `gluon_hopper` in place of the two matmul kernels."""


class Blocks(NamedTuple):
    """What the torch backend runs with on one CPU and dtype."""

    elements: int
    """Of a tile of logits."""
    rows: int
    """Of a tile of logits, at most."""


EXP_PATHS = ("fused", "panel")
HOPPER = ("triton", "gluon")
Choice = TypeVar("Choice", Kernels, Blocks)
_trial: Kernels | Blocks | None = None


@contextlib.contextmanager
def trying(choice: Kernels | Blocks) -> Iterator[None]:
    """Everything in this process runs with `choice` meanwhile, whatever a file or
    ``RPO_KERNELS_HOPPER`` says.
    """
    global _trial
    before, _trial = _trial, choice
    blocks.cache_clear()
    try:
        yield
    finally:
        _trial = before
        blocks.cache_clear()


def is_trial() -> bool:
    """Whether `trying` is under way."""
    return _trial is not None


def default_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The entry of `backends/tiles.py`."""
    key = tiles.of_device(device)[0], tiles.dtype_class(dtype.itemsize)
    config = tiles.CONFIGS[key]
    return Kernels(config.tile, config.exp_path, *tiles.KEPT[key], tiles.SPAN, config.hopper)


def kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """What the Triton backend runs with for tensors of `dtype` on `device`."""
    found = _trial if isinstance(_trial, Kernels) else None
    if found is None and device.type == "cuda":  # on a CPU Triton interprets, for tests
        found = saved(file_of(device), device_name(device), dtype, Kernels)
    return found or default_kernels(device, dtype)


@functools.cache  # asked for every tile
def blocks(device: torch.device, dtype: torch.dtype, threads: int, default: Blocks) -> Blocks:
    """What the torch backend runs with on a CPU, in `threads` threads, for tensors of `dtype`."""
    if isinstance(_trial, Blocks):
        return _trial
    return saved(file_of(device), device_name(device), dtype, Blocks) or default


@functools.cache
def cpu_name() -> str:
    """As the operating system calls the processor."""
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


_gpu_name = functools.cache(torch.cuda.get_device_name)


def device_name(device: torch.device) -> str:
    """Of a GPU, or of a CPU with the number of threads in use: best tiles depend on both."""
    if device.type == "cpu":
        return f"{cpu_name()} {torch.get_num_threads()} threads"
    return _gpu_name(device)


def file_of(device: torch.device) -> Path:
    """Where the choices for `device` are kept, whether there are any or not."""
    name = device_name(device)
    return _file(name, *(os.environ.get(x) for x in (FOLDER, "XDG_CACHE_HOME", "HOME")))


@functools.cache  # asked before every launch
def _file(name: str, given: str | None, cache: str | None, home: str | None) -> Path:
    if given:
        folder = Path(given)
    else:
        folder = Path(cache or Path(home or Path.home()) / ".cache") / "rpo_kernels"
    return folder / (re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") + ".json")


def versions(kind: type[Kernels] | type[Blocks]) -> dict[str, str]:
    """What a measurement holds for: of this package and torch, and of Triton where it compiles."""
    import rpo_kernels  # which imports the backends, and they this

    found = {"rpo_kernels": rpo_kernels.__version__, "torch": torch.__version__}
    if kind is Kernels:
        import triton  # not the distribution's: ROCm's has another name

        found["triton"] = triton.__version__
    return found


@functools.cache
def saved(path: Path, name: str, dtype: torch.dtype, kind: type[Choice]) -> Choice | None:
    """The choice for `dtype` in a file for the device `name`; None where there is none."""
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        log.warning("%s: ignored, cannot be read: %s", path, error)
        return None
    try:
        document = json.loads(text)
        check(document, name, kind)
        entry = document["choices"].get(_word(dtype))
        found = None if entry is None else parse(entry, kind)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else f"not a tuning file: {error!r}"
        log.warning("%s: ignored, %s; %s", path, reason, REMEDY)
        return None
    if found is not None:
        log.info("%s: tiles for %s on %s: %s", path, _word(dtype), name, found)
    return found


def check(document: dict, name: str, kind: type[Kernels] | type[Blocks]) -> None:
    """Return if a file's contents were measured on this device with these versions.

    Raises:
        ValueError: they were not; the message says what differs.
    """
    wanted = {"format": FORMAT, "device": name, **versions(kind)}
    own = {"format": document["format"], "device": document["device"], **document["versions"]}
    for what, value in wanted.items():
        if own.get(what) != value:
            raise ValueError(f"expected {what} {value}, got {own.get(what)}")


def parse(entry: dict, kind: type[Choice]) -> Choice:
    """A choice from what JSON made of it.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    fields = {field: entry[field] for field in kind._fields}
    if extra := entry.keys() - fields.keys():
        raise ValueError(f"expected {', '.join(kind._fields)}, got {', '.join(sorted(extra))}")
    if kind is Blocks:
        for field, value in fields.items():
            _expect(_is_count(value, 2**30), field, "a number from 1 to 2^30", value)
        return kind(**fields)
    for field in ("tile", "kept_rows", "kept_weight"):
        fields[field] = _tile(field, fields[field])
    for field, options in (("exp_path", EXP_PATHS), ("hopper", HOPPER)):
        _expect(fields[field] in options, field, f"one of {', '.join(options)}", fields[field])
    _expect(_is_count(fields["span"], 16), "span", "a number from 1 to 16", fields["span"])
    return kind(**fields)


def _expect(holds: bool, field: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{field}: expected {expected}, got {got!r}")


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _tile(field: str, values: object) -> tiles.Tile:
    count = len(tiles.Tile._fields)
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{field}: expected {count} values, got {values!r}")
    tile = tiles.Tile(*values)
    powers = (*tile[:3], tile.num_warps)
    even = all(_is_count(x, 256) and x & (x - 1) == 0 for x in powers)
    counts = _is_count(tile.num_stages, 16) and _is_count(tile.per_sm, 32)
    _expect(even and counts and type(tile.tma) is bool, field, "a tile", values)
    return tile


def save(device: torch.device, dtype: torch.dtype, choice: Kernels | Blocks, how: dict) -> Path:
    """Keep `choice` for `device` and `dtype`, and `how` it was found (for people; a JSON object).

    Choices for other dtypes stay, if they were measured with the same versions. The file is
    replaced as a whole: whoever reads it meanwhile gets the old one or the new one.

    Raises:
        OSError: the folder cannot be written.
    """
    path, name, kind = file_of(device), device_name(device), type(choice)
    document: dict = {"format": FORMAT, "device": name, "versions": versions(kind)}
    document |= {"choices": {}, "measured": {}}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        before = json.loads(path.read_text())
        check(before, name, kind)
        document |= {key: dict(before[key]) for key in ("choices", "measured")}
    document["choices"][_word(dtype)] = choice._asdict()
    document["measured"][_word(dtype)] = how
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)
    forget()
    return path


def forget() -> None:
    """Read the files again, when they are next asked for."""
    saved.cache_clear()
    blocks.cache_clear()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
