"""The command `rpo`: everything one does with a preference model, in the order one does it.

rpo train ...       fine-tune a model on preference pairs; --help lists every field
rpo chat MODEL      talk to a trained model, or to several side by side
rpo evaluate ...    rewards and KL on held-out pairs, answers, judgments, win rates
rpo merge FOLDER    an adapter and its base as one model
rpo plan ...        will it fit in memory, and what does it cost
rpo doctor ...      are the kernels right and fast on this machine

`rpo COMMAND --help` lists a command's options. On several GPUs:
accelerate launch --no_python rpo train ...
"""

from __future__ import annotations

import importlib
import sys

from trainer import signals
from trainer.config.values import not_among

# Modules with a `main(argv)`, imported when they are asked for.
COMMANDS = {
    "train": "trainer.run",
    "chat": "trainer.chat",
    "evaluate": "trainer.evaluate",
    "merge": "trainer.merge",
    "plan": "rpo_kernels.plan",
    "doctor": "rpo_kernels.doctor.cli",
}


def main(argv: list[str] | None = None) -> None:
    """Read the command's name and hand it the rest of the command line."""
    signals.end_at_once()
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    if name not in COMMANDS:
        sys.exit(f"error: command: {not_among(name, COMMANDS)}")
    try:
        module = importlib.import_module(COMMANDS[name])
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("trainer", "rpo_kernels"):
            raise
        sys.exit(f"error: {name} needs {error.name}; run: pip install 'rpo-kernels[train]'")
    code = module.main(words, prog=f"rpo {name}")
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
