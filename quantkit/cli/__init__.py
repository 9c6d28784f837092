"""The `quantkit` command: arguments in, calls of the library, tables or JSON out. No logic lives here."""

from __future__ import annotations

import gc
import os

from hwmodel.console import run

# Each group adds its commands to `app`; `quantkit --help` lists them in this order.
# isort: off
from quantkit.cli.options import app
from quantkit.cli import look as look, make as make, rtl as rtl, choose as choose, search as search, report as report
# isort: on

# Rollouts multiply small matrices: numpy's BLAS threads cost more than they bring (torch keeps its own).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> None:
    """Console entry point."""
    gc.set_threshold(50_000, 20, 100)  # imports and tracing make millions of objects that stay; looking through them
    # as often as by default takes a tenth of a short command
    run(app, "quantkit")
