"""Imported before all else: while the command ``hf-fff`` imports, which takes seconds, Ctrl-C ends it as it does other commands.

By Python's own handler there would be a traceback out of whatever is being imported. Nothing is begun yet that wants cleaning up.
"""

import os
import signal
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any


def leave_quietly() -> None:
    """Until ``raise_again``, an interrupt ends the program at once with 130; one that is ignored or handled otherwise stays so."""
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _leave)


def raise_again() -> None:
    """An interrupt is a ``KeyboardInterrupt`` again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> None:
    os._exit(130)


def _is_command() -> bool:
    """Whether the program is ``hf-fff`` or ``python -m hf_fff``; a program that imports the package keeps its interrupts."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if program == "-m":  # as it is until the module has been found
        return any(pair in (("-m", "hf_fff"), ("-m", "hf_fff.cli")) for pair in pairwise(sys.orig_argv))
    return Path(program).stem == "hf-fff"


if _is_command():
    leave_quietly()
