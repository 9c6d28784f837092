"""Rows: one JSON line per evaluated design, appended durably.

A row is a plain dictionary; `rows.jsonl` is the only state of a sweep. A line is written with
one `write` to a file opened for appending and synced to disk, so an interruption costs at most
the line being written, and a reader drops a last line that is incomplete.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

from quantkit.errors import InputError

Row = dict[str, Any]


def append_row(path: Path, row: Row) -> None:
    """Append one row and sync it to disk; a broken last line of an earlier crash is ended first."""
    line = json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = "\n" + line
        os.write(handle, line.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read_rows(path: Path) -> list[Row]:
    """All whole rows, in order; [] if there is no file. A line cut off by a crash is skipped."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(row, dict) or "id" not in row:
            raise InputError(f"{path}: line {number} is not a row of a sweep")
        rows.append(row)
    return rows


def versions() -> dict[str, str]:
    """Versions of what can change a number."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("quantkit", "torch", "numpy", "gymnasium", "mujoco", "box2d", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
