"""Tensors that wait in a file: what is large and not looked at for a while need not be in memory."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor


class Spool:
    """A nameless temporary file of tensors, in whose gaps later ones of the same size go.

    It lies in the folder of `tempfile.gettempdir()` (TMPDIR) and is gone with this object, whatever happens.
    """

    def __init__(self) -> None:
        self.file: IO[bytes] | None = None
        self.end = 0
        self.gaps: dict[int, list[int]] = {}

    def put(self, x: Tensor) -> Filed | Tensor:
        """The tensor written down; the tensor itself where the disk is full."""
        flat = _in_memory_order(x)
        size = flat.numel() * flat.element_size()
        gaps = self.gaps.setdefault(size, [])
        place = gaps[-1] if gaps else self.end
        try:
            if self.file is None:
                self.file = tempfile.TemporaryFile(buffering=0)
            self.file.seek(place)
            left = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
            while left:
                left = left[self.file.write(left) :]
        except OSError:
            return x
        if gaps:
            gaps.pop()
        self.end = max(self.end, place + size)
        return Filed(self, place, x.dtype, x.shape, x.stride() if flat.data_ptr() == x.data_ptr() else None)

    def __del__(self) -> None:
        if self.file is not None:
            self.file.close()


@dataclass(frozen=True, eq=False)
class Filed:
    """A tensor of a `Spool`, whose place is another's when this object is gone.

    stride: as it lay in memory, so that sums run in the same order; None for contiguous.
    """

    spool: Spool
    place: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...] | None

    def tensor(self) -> Tensor:
        """What was put there."""
        flat = torch.empty(self.shape.numel(), dtype=self.dtype)
        left = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        assert self.spool.file is not None
        self.spool.file.seek(self.place)
        while left:
            read = self.spool.file.readinto(left)  # type: ignore[attr-defined]
            if not read:
                raise OSError("a temporary file of activations is shorter than what was written to it")
            left = left[read:]
        return flat.reshape(self.shape) if self.stride is None else flat.as_strided(self.shape, self.stride)

    def __del__(self) -> None:
        self.spool.gaps[self.shape.numel() * self.dtype.itemsize].append(self.place)


def give_back() -> None:
    """Return what is freed to the system where the C library holds on to it, as glibc does to pieces below 32 MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _in_memory_order(x: Tensor) -> Tensor:
    """All numbers in one dimension, without a copy where they lie so in memory."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    ordered = x.permute(order)
    return (ordered if ordered.is_contiguous() else x).contiguous().flatten()
