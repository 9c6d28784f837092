"""The `quantkit` command: arguments in, calls of the library, tables or JSON out. No logic lives here."""

from __future__ import annotations

import gc
import os
import sys

# Each group adds its commands to `app`; `quantkit --help` lists them in this order.
# isort: off
from quantkit.cli.options import app
from quantkit.cli import look as look, make as make, rtl as rtl, choose as choose, search as search, report as report
# isort: on

# Rollouts multiply small matrices: numpy's BLAS threads cost more than they bring (torch keeps its own).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> None:
    """Console entry point. What the argument parser refuses is one line, as every other mistake."""
    gc.set_threshold(50_000, 20, 100)  # imports and tracing make millions of objects that stay; looking through them
    # as often as by default takes a tenth of a short command
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "quantkit"
        if message := " ".join(usage().split()):  # empty after help that was asked for by saying nothing
            print(f"error: {message} (see {command} --help)", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.exit(code or 0)
