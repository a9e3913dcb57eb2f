"""Write `trainer/FIELDS.md`, the reference of a run's fields: `python -m trainer.config`."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

from trainer.config import options
from trainer.config.fields import GROUPS, RunConfig

FILE = Path(__file__).resolve().parent.parent / "FIELDS.md"


def reference() -> str:
    """Every field with what it takes, its default and its sentence, as Markdown."""
    docs, kinds = options.field_docs(RunConfig), typing.get_type_hints(RunConfig)
    lines = [
        "# Fields of a run",
        "",
        "Written by `python -m trainer.config` from [`config/fields.py`](config/fields.py). In a "
        "recipe a line `field: value`, on the command line `--field value`.",
    ]
    for field in dataclasses.fields(RunConfig):
        if field.name in GROUPS:
            title = GROUPS[field.name]
            lines += ["", f"## {title[0].upper()}{title[1:]}", "", "| field | takes | default | |"]
            lines += ["|---|---|---|---|"]
        takes = options.takes(kinds[field.name])
        default = f"`{options.default(field)}`" if options.default(field) else "none: give it"
        lines += [f"| `{field.name}` | {takes} | {default} | {docs[field.name]} |"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
