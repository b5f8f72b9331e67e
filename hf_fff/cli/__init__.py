"""``hf-fff``: the command line. Commands import what they need when they run."""

import signal
import sys
from typing import Any


def main() -> Any:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    from .app import app

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished output is cleaned up
    return app()
