"""`QTensor`: codes, scales and a format; how scales are fitted and codes are packed.

Conventions: `codes` are the bit patterns of `hwmodel.formats`, `values` their numbers on the
format's own grid, and `scale` multiplies values. Zero points do not exist here: every
quantizer is symmetric or unsigned, which is what FPGA arithmetic wants (FINN, hls4ml).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hwmodel import formats
from hwmodel.formats import Format, Int, Levels
from hwmodel.spec import Granularity, PerGroup, PerRow, PerTensor
from quantkit.errors import InputError
from quantkit.rounding import pow2_at_least, round_to

ScaleRule = Literal["absmax", "percentile", "mse", "importance"]


@dataclass(frozen=True)
class QTensor:
    """A quantized weight matrix of shape (rows, columns).

    codes: integer bit patterns (uint8, or int32 for 16-bit formats). scale: float32, (1, 1) per
    tensor, (rows, 1) per row, (rows, columns / size) per group. shape: the original tensor's shape.
    """

    codes: Tensor
    scale: Tensor
    fmt: Format
    granularity: Granularity
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Bits stored: codes and float32 scales."""
        return self.codes.numel() * formats.bits(self.fmt) + self.scale.numel() * 32


@cache
def _value_table(fmt: Format) -> Tensor:
    return torch.tensor([formats.decode(c, fmt) for c in range(2 ** formats.bits(fmt))], dtype=torch.float32)


@cache
def _code_table(fmt: Format) -> tuple[Tensor, Tensor]:
    values = formats.levels(fmt)
    codes = [formats.encode(v, fmt) for v in values]
    return torch.tensor(values, dtype=torch.float32), torch.tensor(codes, dtype=torch.int64)


@cache
def _code_by_unit(fmt: Format) -> Tensor:
    """The code of u units at index u + int_max."""
    grid, codes = _code_table(fmt)
    top = formats.int_max(fmt)
    table = torch.zeros(2 * top + 1, dtype=torch.uint8)
    table[(grid / formats.unit(fmt)).long() + top] = codes.to(torch.uint8)
    return table


def encode(values: Tensor, fmt: Format) -> Tensor:
    """Bit patterns of grid values; the inverse of `decode`. Values must lie on the grid."""
    if isinstance(fmt, Int):
        return (values.to(torch.int32) & (2**fmt.bits - 1)).to(torch.uint8 if fmt.bits <= 8 else torch.int32)
    top = formats.int_max(fmt)
    if top <= 2**14:
        return _code_by_unit(fmt)[(values / formats.unit(fmt)).to(torch.int32) + top]
    grid, codes = _code_table(fmt)
    return codes[torch.searchsorted(grid, values.contiguous()).clamp_(max=len(grid) - 1)].to(torch.uint8)


def decode(codes: Tensor, fmt: Format) -> Tensor:
    """Grid values (float32) of bit patterns."""
    return _value_table(fmt)[codes.long()]


def expand_scale(scale: Tensor, columns: int) -> Tensor:
    """Scales as a tensor that broadcasts against (rows, columns)."""
    return scale if scale.shape[1] == 1 else scale.repeat_interleave(columns // scale.shape[1], dim=1)


def quantize(weight: Tensor, scale: Tensor, fmt: Format, granularity: Granularity) -> QTensor:
    """Round a weight tensor (out, ...) to nearest at the given scales."""
    matrix = weight.detach().flatten(1).float()
    values = round_to(matrix / expand_scale(scale, matrix.shape[1]), fmt)
    return from_values(values, scale, fmt, granularity, tuple(weight.shape))


def from_values(
    values: Tensor, scale: Tensor, fmt: Format, granularity: Granularity, shape: tuple[int, ...]
) -> QTensor:
    """A QTensor of grid values (rows, columns)."""
    return QTensor(encode(values, fmt), scale.float(), fmt, granularity, shape)


def values_of(q: QTensor) -> Tensor:
    """Grid values, float32, shape (rows, columns)."""
    return decode(q.codes, q.fmt)


def dequantize(q: QTensor) -> Tensor:
    """The weight tensor in its original shape, float32."""
    return (values_of(q) * expand_scale(q.scale, q.codes.shape[1])).reshape(q.shape)


def units_of(q: QTensor) -> np.ndarray:
    """Weights as integers in units of the format's smallest step (rows, columns): int64, or Python ints where wider."""
    units = values_of(q).double().numpy() / formats.unit(q.fmt)
    if formats.int_max(q.fmt) < 2**63:
        return np.rint(units).astype(np.int64)
    return np.vectorize(int, otypes=[object])(units)


def grouped(matrix: Tensor, granularity: Granularity) -> Tensor:
    """A (rows, columns) matrix as (scale rows, scale columns, elements that share the scale)."""
    rows, columns = matrix.shape
    match granularity:
        case PerTensor():
            return matrix.reshape(1, 1, rows * columns)
        case PerRow():
            return matrix.reshape(rows, 1, columns)
        case PerGroup(size):
            if columns % size:
                raise InputError(
                    f"a weight of {rows} x {columns} cannot be split into groups of {size} inputs: "
                    f"{columns} is not a multiple of {size}; use row granularity or another group size"
                )
            return matrix.reshape(rows, columns // size, size)


def fit_scale(
    weight: Tensor,
    fmt: Format,
    granularity: Granularity,
    rule: ScaleRule = "mse",
    *,
    percentile: float = 99.9,
    importance: Tensor | None = None,
    pow2: bool = False,
) -> Tensor:
    """Scales for a weight tensor (out, ...), float32, shaped as `QTensor.scale`.

    absmax: the largest magnitude lands on the largest value. percentile: that quantile of the
    magnitudes instead. mse: the threshold of least squared error, searched from absmax down to
    absmax / 20 on a grid and then around its best point. importance: the same with every column's
    error weighted by `importance` (columns,), the mean square of its input. `pow2` restricts
    scales to powers of two. Groups that are all zero get scale 1.
    """
    if rule not in get_args(ScaleRule):
        raise InputError(f"unknown scale rule {rule!r}; accepted: {', '.join(get_args(ScaleRule))}")
    if rule == "importance" and importance is None:
        raise InputError("scale rule 'importance' needs the mean square of every input")
    matrix = weight.detach().flatten(1).float()
    elements = grouped(matrix, granularity)
    column_weight = None
    if rule == "importance":
        column_weight = grouped(importance.float().expand_as(matrix), granularity)  # type: ignore[union-attr]
    return fit_groups(elements, fmt, rule, percentile=percentile, column_weight=column_weight, pow2=pow2)


def fit_groups(
    elements: Tensor,
    fmt: Format,
    rule: ScaleRule,
    *,
    percentile: float = 99.9,
    column_weight: Tensor | None = None,
    pow2: bool = False,
) -> Tensor:
    """`fit_scale` for elements already grouped, (rows, groups, size) -> scales (rows, groups)."""
    magnitude = elements.abs()
    absmax = magnitude.amax(dim=-1)
    empty = absmax == 0
    top = 1.0 if isinstance(fmt, Levels) else formats.max_value(fmt)
    if isinstance(fmt, Int) and top == 0:  # signed 1-bit: {-1, 0}
        top = 1.0
    if isinstance(fmt, Levels) and fmt.name == "binary" and rule in ("mse", "importance"):
        weight = torch.ones_like(elements) if column_weight is None else column_weight
        best = (magnitude * weight).sum(-1) / weight.sum(-1).clamp_min(1e-30)  # the exact minimum: E|w|
    elif rule == "absmax":
        best = absmax / top
    elif rule == "percentile":
        best = _quantile(magnitude, percentile / 100) / top
    else:
        best = _search(elements, absmax / top, fmt, column_weight)
    best = torch.where(empty, torch.ones_like(best), torch.where(best > 0, best, absmax / top))
    best = best.clamp_min(torch.finfo(torch.float32).tiny)
    if not pow2:
        return best
    up = pow2_at_least(best)
    if rule == "absmax":
        return torch.where(empty, torch.ones_like(up), up)
    down = up / 2
    better = _error(elements, down, fmt, column_weight) < _error(elements, up, fmt, column_weight)
    return torch.where(empty, torch.ones_like(up), torch.where(better, down, up))


def _quantile(magnitude: Tensor, q: float) -> Tensor:
    rank = max(1, round(q * magnitude.shape[-1]))
    return magnitude.kthvalue(rank, dim=-1).values


def _error(elements: Tensor, scale: Tensor, fmt: Format, weight: Tensor | None) -> Tensor:
    s = scale.unsqueeze(-1)
    error = round_to(elements / s, fmt).mul_(s).sub_(elements).square_()
    return (error if weight is None else error.mul_(weight)).sum(-1)


def _search(elements: Tensor, start: Tensor, fmt: Format, weight: Tensor | None) -> Tensor:
    start = torch.where(start > 0, start, torch.ones_like(start))
    best, best_error = start.clone(), _error(elements, start, fmt, weight)

    def consider(candidate: Tensor) -> None:
        nonlocal best, best_error
        error = _error(elements, candidate, fmt, weight)
        better = error < best_error
        best, best_error = torch.where(better, candidate, best), torch.where(better, error, best_error)

    coarse = 24
    for i in range(1, coarse):
        consider(start * (1 - 0.95 * i / coarse))
    step = 0.95 / coarse
    center = best.clone()
    for offset in (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75):
        consider((center + start * (offset * step)).clamp_min(0.02 * start))
    if isinstance(fmt, Int) and fmt.signed and not fmt.narrow:
        consider(elements.amin(dim=-1).neg().clamp_min(1e-30) / 2 ** (fmt.bits - 1))  # the extra negative code
    return best


def pack(codes: Tensor, bits: int) -> np.ndarray:
    """Codes packed without gaps, most significant bit first, uint8 of ceil(n * bits / 8) bytes."""
    flat = codes.flatten().to(torch.int64).numpy()
    planes = (flat[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(planes.astype(np.uint8).reshape(-1))


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack`."""
    count = int(np.prod(shape))
    planes = np.unpackbits(packed, count=count * bits).reshape(count, bits).astype(np.int64)
    codes = torch.from_numpy((planes << np.arange(bits - 1, -1, -1)).sum(axis=1)).reshape(shape)
    return codes.to(torch.uint8 if bits <= 8 else torch.int32)
