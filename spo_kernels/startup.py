"""The first import of all, so that a signal during the slow ones ends `spo-train` with a sentence, not a traceback.

Does nothing in any other program. spo_kernels/train/signals.py takes over once a run starts.
"""

import os
import signal
import sys
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"\nspo-train: {signal.Signals(number).name}: stopped before the first step\n".encode())
    os._exit(128 + number)


_program = (sys.argv or [""])[0]
# "-m" while Python looks for the module of `python -m`.
if os.path.basename(_program) == "spo-train" or (_program == "-m" and "spo_kernels.train" in sys.orig_argv):
    for _name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, _name), _leave)
