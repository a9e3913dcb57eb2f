"""What signals do to a command before its libraries are imported, which takes seconds."""

import ctypes
import os
import signal
import sys


def end_at_once() -> None:
    """Let Ctrl-C kill without a traceback, except while `StopSignal` waits for a checkpoint.

    SIGTERM ends `accelerate launch` alone; on Linux the kernel then sends it to this process, too.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
