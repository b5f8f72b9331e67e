"""``hf-fff``: the command line. Commands import what they need when they run."""

import signal
import sys
import warnings
from typing import Any

from .._early import leave_quietly, raise_again


def main() -> Any:
    """Entry point; what its exit codes mean is told in ``common``."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished output is cleaned up
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # where in the code helps nobody here
    leave_quietly()
    from .app import app

    raise_again()
    return app(prog_name="hf-fff")
