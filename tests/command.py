"""Runs the command line, and looks at what it leaves."""

import re
import signal
from types import SimpleNamespace

from typer.testing import CliRunner

from hf_fff.cli.app import app


def run(*args):
    """What a command prints, without the colours that some variables force."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    printed = {name: getattr(result, name) for name in ("stdout", "stderr", "output")}
    plain = {name: re.sub(r"\x1b\[[0-9;]*m", "", text) for name, text in printed.items()}
    return SimpleNamespace(exit_code=result.exit_code, **plain)


def listing(folder):
    """Files and what is in them, folders too: an empty one that stays behind is a leftover as well."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def unwrapped(output):
    """Without the box that wraps messages."""
    return " ".join(" ".join(line.strip("│╭╮╰╯─ ") for line in output.splitlines()).split())


def deliver(number):
    """What Python does in its main thread when a signal comes, without the signal: a real one was seen to end pytest with a segmentation
    fault at its delivery, once OpenVINO had computed in that process (with AMX). Real ones are for processes of their own."""
    signal.getsignal(number)(number, None)
