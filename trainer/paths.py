"""Files and folders that a user names."""

from __future__ import annotations

import tempfile
from pathlib import Path

from trainer.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def open_folder(output_dir: str) -> Path:
    """The output folder, created if need be.

    Raises:
        InputError: it cannot be made or written, or is a file.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"output_dir: cannot make or write to the folder {folder}: {error.strerror}; "
            "choose another one"
        ) from None
    return folder


def find_file(path: str) -> Path:
    """`path` in the working directory, else in the repository: recipes work from anywhere."""
    candidates = [Path(path), ROOT / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    tried = " and ".join(dict.fromkeys(str(c.resolve()) for c in candidates))
    raise InputError(f"{path}: no such file (looked for {tried})")
