"""The console that commands print to."""

from __future__ import annotations

import sys

from rich.console import Console

FILE_WIDTH = 110


def make_console() -> Console:
    """As wide as the terminal, and wide enough for the tables when the output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
