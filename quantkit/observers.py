"""What calibration collects: the inputs of layers, streamed batch by batch.

An observer is a function of (layer, input) called for every batch while the model runs as it
is now; it keeps its own sums. Nothing is kept that the observer does not keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.arithmetic import half_products
from quantkit.model import Calib, Model
from quantkit.qlayers import Point, QLayer

Observer = Callable[[Any, Tensor], None]


def collect(model: Model, calib: Calib, observers: Mapping[str, Observer]) -> None:
    """Run the model over the calibration inputs; `observers[name]` sees every input of the layer or point `name`.

    Embeddings are not observed: their inputs are indices.
    """
    places = {name: part for name, part in model.quantizers().items() if not looks_up(part)}
    handles = [places[n].register_forward_pre_hook(_hook(see)) for n, see in observers.items() if n in places]
    try:
        with torch.no_grad():
            for batch in calib.batches():
                model.module(batch)
    finally:
        for handle in handles:
            handle.remove()


def looks_up(part: nn.Module) -> bool:
    """Whether it is an embedding."""
    return isinstance(part, QLayer) and part.op == "embedding"


def _hook(see: Observer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(layer, args[0])  # type: ignore[arg-type]

    return hook


def channel_range(layer: QLayer | Point, x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every channel of an input, (channels,) each."""
    channel = 1 if isinstance(layer, QLayer) and layer.spatial else x.dim() - 1
    last = x.movedim(channel, -1)
    if not last.is_contiguous():
        others = [axis for axis in range(x.dim()) if axis != channel]
        return (x.amin(dim=others), x.amax(dim=others)) if others else (x, x)
    rows = last.reshape(-1, last.shape[-1])
    while len(rows) % 2 == 0 and rows.shape[1] < 1024:  # in longer rows torch is ten times faster
        rows = rows.reshape(len(rows) // 2, -1)
    low, high = (bound.reshape(-1, last.shape[-1]) for bound in (rows.amin(dim=0), rows.amax(dim=0)))
    return low.amin(dim=0), high.amax(dim=0)


class Sample:
    """A sample of at most `limit` input values and the range of all, for fitting an activation scale.

    Which values are kept is decided by their number in the order in which they come (`thinned`): neither by chance nor
    by how they are cut into batches. top: largest magnitude per channel, (channels,), None before the first batch.
    broken: (index in the batch, value) of the first input that is not finite, or None.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.level, self.count = limit, 0, 0
        self.at, self.kept = torch.empty(0, dtype=torch.int64), torch.empty(0)
        self.low, self.high = float("inf"), float("-inf")
        self.top: Tensor | None = None
        self.broken: tuple[tuple[int, ...], float] | None = None

    def __call__(self, layer: QLayer | Point, x: Tensor) -> None:
        act, layer.act = layer.act, None
        x = layer.input_values(x)
        layer.act = act
        low, high = channel_range(layer, x)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            if self.broken is None:
                index = tuple((~torch.isfinite(x)).nonzero()[0].tolist())
                self.broken = index, float(x[index])
            return
        top = torch.maximum(high, -low)
        self.top = top if self.top is None or self.top.shape != top.shape else torch.maximum(self.top, top)
        self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        end = self.count + x.numel()
        while end >> self.level >= self.limit:
            at = self.at >> self.level
            stays = at & 1 == _side(at >> 1)
            self.at, self.kept, self.level = self.at[stays], self.kept[stays], self.level + 1
        at = thinned(self.count, end, self.level)
        self.at, self.kept = torch.cat([self.at, at]), torch.cat([self.kept, x.take(at - self.count)])
        self.count = end

    def values(self) -> Tensor:
        """The sample, with the extremes included."""
        return torch.cat([self.kept, torch.tensor([self.low, self.high])])


def thinned(first: int, end: int, level: int) -> Tensor:
    """The numbers from `first` to before `end` that stay when one of every 2^level neighbours does, (n,) int64.

    What stays at one level stays at those below, too. Which of two neighbours goes has no period, so that no width of
    an image and no number of features lets the same places be kept again and again.

    >>> [thinned(0, 16, level).tolist() for level in (1, 2)]
    [[0, 3, 4, 6, 9, 11, 12, 14], [0, 6, 9, 12]]
    """
    at = torch.arange(first >> level, ((end - 1) >> level) + 1)
    for _ in range(level):
        at = 2 * at + _side(at)
    return at[(at >= first) & (at < end)]


def _side(pair: Tensor) -> Tensor:
    """Which of two neighbours stays: 0 or 1."""
    return pair * 0x9E3779B1 >> 16 & 1


def spread(count: int, limit: int) -> Tensor | None:
    """At most `limit` numbers below `count`, evenly and ascending; None for all of them.

    Golden-section steps: no two are near each other, and no step fits the width of an image.
    """
    if count <= limit:
        return None
    steps = torch.arange(limit, dtype=torch.float64).mul_(0.6180339887498949).frac_()
    return (steps * count).long().sort().values


PANEL = 128
"""Rows of a matrix of second moments that are computed together, up to their diagonal."""


class Gram:
    """Sum of x x^T over a layer's input columns, float32 (groups, columns, columns), and the count.

    What stands above the diagonal is summed nowhere but copied from below: half the work of a product where there are
    many columns. half: of x rounded to bfloat16.
    """

    def __init__(self, half: bool = False) -> None:
        self.half = half
        self.lower: Tensor | None = None
        self.count = 0

    def __call__(self, layer: QLayer, x: Tensor) -> None:
        self.add(layer.columns(x))

    def add(self, rows: Tensor) -> None:
        """Rows as `rows` gives them, (groups, n, columns)."""
        rows = rows.float()
        if self.lower is None:
            self.lower = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
        with half_products(self.half):
            for start, end in _panels(rows.shape[2], 2 * PANEL if self.half else PANEL):
                if self.half and len(rows) == 1:  # several times faster in bfloat16 than a batch of one
                    self.lower[0, start:end, :end].addmm_(rows[0, :, start:end].T, rows[0, :, :end])
                else:
                    self.lower[:, start:end, :end].baddbmm_(rows[:, :, start:end].mT, rows[:, :, :end])
        self.count += rows.shape[1]

    @property
    def total(self) -> Tensor | None:
        """The whole sum, or None before the first rows; the caller may change it when all have been added."""
        if self.lower is not None:
            for start, end in _panels(self.lower.shape[2]):
                self.lower[:, start:end, end:] = self.lower[:, end:, start:end].mT
        return self.lower


def _panels(columns: int, width: int = PANEL) -> list[tuple[int, int]]:
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


class AbsMax:
    """Largest magnitude per input channel, (channels,)."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, layer: QLayer, x: Tensor) -> None:
        if layer.in_scale is not None:
            x = x * layer.per_channel(layer.in_scale)
        low, high = channel_range(layer, x)
        top = torch.maximum(high, -low)
        self.value = top if self.value is None else torch.maximum(self.value, top)
