"""Who works on what: locks that processes of one study hold, and that the system takes from those that die.

A claim is an advisory lock on one byte of `study.lock`; which byte tells what is claimed. The kernel drops it when its
process ends in any way, `kill -9` included, so nothing goes stale and nothing needs a heartbeat. Over NFS version 4
the same holds between machines, after the server's lease time. Claims keep processes apart, not threads of one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: every claim is granted
    fcntl = None  # type: ignore[assignment]

_WAIT_S = 0.05


class Claims:
    """The claims of one process on a study directory; a context that gives all of them up at its end."""

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder / "study.lock", os.O_RDWR | os.O_CREAT, 0o644)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def take(self, name: str) -> bool:
        """Whether `name` is now claimed by this process: false while another one holds it."""
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(name))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def wait(self, name: str) -> None:
        """Claim `name` as soon as nobody else holds it."""
        while not self.take(name):
            time.sleep(_WAIT_S)

    def give(self, name: str) -> None:
        """Give a claim up."""
        if fcntl is not None:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, _byte(name))


def _byte(name: str) -> int:
    """Byte 0 for the empty name, the study itself; for a design's id of 12 hex digits its number + 1.

    >>> _byte(""), _byte("00000000000a")
    (0, 11)
    """
    return int(name, 16) + 1 if name else 0
