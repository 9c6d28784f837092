"""Rows of a benchmark: a table on the terminal, and a CSV in reports/ whose first line is the command that made it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from quantkit.console import print_table

REPORTS = Path(__file__).parent.parent / "reports"


def publish(
    name: str, rows: Sequence[Mapping[str, Any]], *, packages: Sequence[str] = ("torch",), title: str = ""
) -> Path:
    """Print the rows and write reports/NAME.csv; numbers as given, four significant digits on the terminal."""
    REPORTS.mkdir(exist_ok=True)
    path = REPORTS / f"{name}.csv"
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_portable, sys.argv[1:])])
    versions = " ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    stamp = f"# {command}\n# python {platform.python_version()} {versions}, {platform.machine()}\n"
    path.write_text(stamp + pd.DataFrame(list(rows)).to_csv(index=False))
    columns = {key: "left" if isinstance(rows[0][key], str) else "right" for key in rows[0]}
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    print_table(title or name, columns, cells)
    print(f"wrote {path.relative_to(REPORTS.parent)}")
    return path


def _portable(argument: str) -> str:
    """A path of this machine as one from the project's folder, or as FOLDER where it lies elsewhere."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    near = REPORTS.resolve().parent.parent
    return os.path.relpath(path, near / "project") if path.is_relative_to(near) else "FOLDER"
