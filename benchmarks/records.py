"""Recorded results: read, and compared."""

from __future__ import annotations

import json
from pathlib import Path

CASES = ("gpu", "table", "scaling", "tolerance", "end_to_end", "trl_integration")


def load(folder: Path, smoke: bool = False) -> dict[tuple[str, str], dict]:
    """The newest results of every (case, device)."""
    newest: dict[tuple[str, str], dict] = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if found.get("schema") != 1 or found["case"] not in CASES:
            continue
        if found.get("smoke", False) != smoke:
            continue
        key = (found["case"], found["device"]["name"])
        if key not in newest or found["date"] >= newest[key]["date"]:
            newest[key] = found | {"file": path.name}
    return dict(sorted(newest.items(), key=lambda item: (CASES.index(item[0][0]), item[0][1])))


def median(run: dict, name: str) -> float | None:
    """Median seconds of an implementation, None if it was not timed."""
    return run["results"].get(name, {}).get("seconds", {}).get("median")


def ratio(a: float | None, b: float | None) -> float | None:
    """``a / b``, None where one of them was not measured."""
    return a / b if a is not None and b else None


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits without an exponent; a dash for nothing."""
    if value is None:
        return "–"
    if value and abs(value) < 10 ** -(digits + 1):
        return f"{value:.1e}"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else text
