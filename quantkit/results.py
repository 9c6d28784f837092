"""Rows: one JSON line per evaluated design, appended durably.

A row is a plain dictionary; `rows.jsonl` is the only state of a study. Each line ends with a checksum of its own
text, is written under a lock on the file and is synced before `append_row` returns. So what an interruption leaves is
whole lines and at most one torn tail, which readers drop and the next append cuts off. A line in the middle whose
checksum does not fit is dropped as well: its design counts as missing. Lines without a checksum, of older studies, are
read as they are.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from quantkit.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes apart there
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]

_CHECKED = re.compile(rb'^(.*),"crc32":"([^"]{8})"\}$', re.DOTALL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def append_row(path: Path, row: Row) -> None:
    """Append one row and sync it to disk; a torn tail of an earlier crash is cut off first.

    Several processes may append at once. InputError where the disk is full: the file is then as it was before.
    """
    body = json.dumps(row, separators=(",", ":"), allow_nan=False).encode()[:-1]
    line = body + b',"crc32":"%08x"}\n' % zlib.crc32(body)
    with _locked(path) as handle:
        size = _mended(handle)
        try:
            _write(handle, line)
            os.fsync(handle)
        except OSError as error:
            os.ftruncate(handle, size)
            if error.errno not in _FULL:
                raise
            raise InputError(
                f"{path}: no room for another row ({error.strerror}); all rows before it are kept: "
                "make room and run the same command again"
            ) from None


def read_rows(path: Path) -> list[Row]:
    """All whole rows, in order; [] if there is no file. A line that a crash cut off or changed is left out."""
    return RowReader(path).fresh(tail=True)


class RowReader:
    """Reads a growing file of rows: each `fresh` gives the rows that came since the last."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.lines = path, 0, 0

    def fresh(self, *, tail: bool = False) -> list[Row]:
        """Whole rows behind those read before; `tail`: a last one that lacks only its line end, too."""
        try:
            with self.path.open("rb") as handle:
                handle.seek(self.offset)
                text = handle.read()
        except FileNotFoundError:
            return []
        *lines, rest = text.split(b"\n")
        self.offset += len(text) - len(rest)
        found = [self._parsed(line) for line in ([*lines, rest] if tail else lines)]
        return [row for row in found if row is not None]

    def _parsed(self, line: bytes) -> Row | None:
        self.lines += 1
        row = _row_of(line)
        if row is not None and (not isinstance(row, dict) or "id" not in row):
            raise InputError(f"{self.path}: line {self.lines} is not a row of a sweep")
        return row


def _row_of(line: bytes) -> Any:
    """The JSON value of a line without its checksum; None for one that is empty, torn or changed."""
    if checked := _CHECKED.match(line):
        body, checksum = checked.groups()
        if checksum != b"%08x" % zlib.crc32(body):
            return None
        line = body + b"}"
    try:
        return json.loads(line)
    except ValueError:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, opened for appending, while nobody else writes to it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _mended(handle: int) -> int:
    """Cut off a torn tail, or end a whole line that lacks its end; the size of the file then."""
    size = os.fstat(handle).st_size
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        return size
    tail, start = b"", size
    while start > 0 and b"\n" not in tail:
        start = max(0, start - 65536)
        tail = os.pread(handle, size - start, start)
    start += tail.rfind(b"\n") + 1
    if _row_of(tail[tail.rfind(b"\n") + 1 :]) is None:
        os.ftruncate(handle, start)
        return start
    _write(handle, b"\n")
    return size + 1


def _write(handle: int, data: bytes) -> None:
    """All of it: one call may write less than it was given, as on a disk that fills up."""
    while data:
        data = data[os.write(handle, data) :]


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
