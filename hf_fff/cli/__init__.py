"""``hf-fff``: the command line. Commands import what they need when they run."""

import logging
import signal
import sys
import warnings
from typing import Any

from .._early import leave_quietly, raise_again

# Where torchao and bitsandbytes are installed, transformers and PEFT import them, and they tell what of them is of no use on this machine.
_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")


def main() -> Any:
    """Entry point; what its exit codes mean is told in ``common``."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished output is cleaned up
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # where in the code helps nobody here
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    leave_quietly()
    from .app import app

    raise_again()
    return app(prog_name="hf-fff")
