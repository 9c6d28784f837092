"""`QTensor`: codes, scales and a format; how scales are fitted and codes are packed.

Conventions: `codes` are the bit patterns of `hwmodel.formats`, `values` their numbers on the
format's own grid, and `scale` multiplies values. Zero points do not exist here: every
quantizer is symmetric or unsigned, which is what FPGA arithmetic wants (FINN, hls4ml).

Scales of groups may have a format of their own (`PerGroup.scale`): together with the weight's that
is a block format, MX or NVFP4 for instance. `QTensor.scale` then holds numbers of that format,
times `base` if it is a minifloat; rounding a scale to its format is done here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hwmodel import formats
from hwmodel.formats import Block, Float, Format, Int, Levels, ScaleFormat
from hwmodel.spec import Granularity, PerGroup, PerRow, PerTensor
from quantkit.bands import Bands, dense
from quantkit.errors import InputError
from quantkit.rounding import pow2_at_least, round_to

ScaleRule = Literal["absmax", "percentile", "mse", "importance", "floor", "ceil", "even"]
BlockRule = Literal["floor", "ceil", "even", "absmax", "mse"]


@dataclass(frozen=True)
class QTensor:
    """A quantized weight matrix of shape (rows, columns).

    codes: integer bit patterns (uint8, or int32 for 16-bit formats). scale: float32, (1, 1) per
    tensor, (rows, 1) per row, (rows, columns / size) per group, rounded up: where the size does not divide the columns
    the last group of a row is shorter, as if zeros filled it. shape: the original tensor's shape.
    base: what the values of minifloat scales are multiplied by (a float32 number), else None.
    """

    codes: Tensor
    scale: Tensor
    fmt: Format
    granularity: Granularity
    shape: tuple[int, ...]
    base: float | None = None

    @property
    def bits(self) -> int:
        """Bits stored: codes, scales (float32 unless they have a format) and base."""
        fmt = scale_format(self.granularity)
        per_scale = 32 if fmt is None else formats.scale_bits(fmt)
        stored = self.codes.numel() * formats.bits(self.fmt) + self.scale.numel() * per_scale
        return stored if self.base is None else stored + 32


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
    if isinstance(fmt, Int) and codes.dtype == torch.uint8:  # a sixth of the time of the table
        sign = 2 ** (fmt.bits - 1) if fmt.signed else 0
        return (codes ^ sign).float().sub_(sign)
    return _value_table(fmt).index_select(0, codes.flatten().int()).reshape(codes.shape)


def expand_scale(scale: Tensor, columns: int, granularity: Granularity) -> Tensor:
    """Scales as a tensor that broadcasts against (rows, columns)."""
    if scale.shape[1] == 1:
        return scale
    assert isinstance(granularity, PerGroup)
    return scale.repeat_interleave(granularity.size, dim=1)[:, :columns]


def scale_shape(rows: int, columns: int, granularity: Granularity) -> tuple[int, int]:
    """The shape of `QTensor.scale`.

    >>> scale_shape(4, 17, PerGroup(16)), scale_shape(4, 17, PerGroup(32))
    ((4, 2), (4, 1))
    """
    match granularity:
        case PerTensor():
            return 1, 1
        case PerRow():
            return rows, 1
        case PerGroup(size):
            return rows, -(-columns // size)


def quantize(
    weight: Tensor, scale: Tensor, fmt: Format, granularity: Granularity, base: float | None = None
) -> QTensor:
    """Round a weight tensor (out, ...) to nearest at the given scales; base: `base_of` this weight if not given."""
    matrix = weight.detach().flatten(1).float()
    base = base_of(weight, fmt, granularity) if base is None else base
    scale = round_scale(scale.float(), scale_format(granularity), base)
    values = round_to(matrix / expand_scale(scale, matrix.shape[1], granularity), fmt)
    return from_values(values, scale, fmt, granularity, tuple(weight.shape), base)


def from_values(
    values: Tensor,
    scale: Tensor,
    fmt: Format,
    granularity: Granularity,
    shape: tuple[int, ...],
    base: float | None = None,
) -> QTensor:
    """A QTensor of grid values (rows, columns); scales that have a format are rounded to it, in units of `base`."""
    scale = round_scale(scale.float(), scale_format(granularity), base)
    return QTensor(encode(values, fmt), scale, fmt, within(granularity, values.shape[1]), shape, base)


def within(granularity: Granularity, columns: int) -> Granularity:
    """The granularity that a weight of so many columns has: a group is no longer than a row.

    >>> str(within(PerGroup(32), 8)), str(within(PerGroup(32, "e8m0"), 8))
    ('row', 'group8:e8m0')
    """
    match granularity:
        case PerGroup(size, scale) if columns < size:
            return PerRow() if scale is None else PerGroup(columns, scale)
    return granularity


def scale_format(granularity: Granularity) -> ScaleFormat | None:
    """The format of the scales, None for float32."""
    return granularity.scale if isinstance(granularity, PerGroup) else None


def base_of(weight: Tensor, fmt: Format, granularity: Granularity) -> float | None:
    """`base_for` the scales of a weight."""
    return base_for(weight.detach(), fmt, scale_format(granularity))


def base_for(x: Tensor, fmt: Format, scale: ScaleFormat | None) -> float | None:
    """What minifloat scales of x are multiplied by: with it the largest magnitude of x gets the largest scale.

    A float32 number, the second level of NVFP4's scales; None for other scales, 1 if x is all zero.
    """
    if not isinstance(scale, Float):
        return None
    absmax = x.abs().amax().float()
    base = absmax / (largest(fmt) * formats.max_value(scale))
    return float(base.clamp_min(2.0**-100)) if absmax > 0 else 1.0


def largest(fmt: Format) -> float:
    """The largest value, 1 where none is positive, as of one signed bit."""
    return formats.max_value(fmt) or 1.0  # signed 1-bit: {-1, 0}


def round_scale(scale: Tensor, fmt: ScaleFormat | None, base: float | None = None) -> Tensor:
    """Positive scales rounded to their format: to the nearest power of two, or to minifloats times `base`.

    Those that would become zero become the smallest there is. None leaves them alone.

    >>> round_scale(torch.tensor([0.7, 0.8, 3.0]), "e8m0").tolist()
    [0.5, 1.0, 4.0]
    """
    if fmt is None:
        return scale
    if fmt == "e8m0":
        mantissa, exponent = torch.frexp(scale)
        return _exp2(exponent - (mantissa < math.sqrt(0.5)).int())
    assert base is not None, "minifloat scales need a base"
    return round_to(scale / base, fmt).clamp_min_(formats.unit(fmt)).mul_(base)


def _exp2(exponent: Tensor) -> Tensor:
    """Powers of two as float32, the exponents clamped to those of e8m0."""
    e = exponent.clamp(-127, 127).int()
    bits = torch.where(e == -127, 0x400000, (e + 127) << 23)
    return bits.int().view(torch.float32)


def scale_codes(scale: Tensor, fmt: ScaleFormat, base: float | None = None) -> Tensor:
    """Bit patterns, uint8, of scales that `round_scale` made; `scales_of` is the inverse."""
    if fmt == "e8m0":
        return (torch.frexp(scale).exponent + 126).to(torch.uint8)
    assert base is not None, "minifloat scales need a base"
    return encode(round_to(scale / base, fmt), fmt)


def scales_of(codes: Tensor, fmt: ScaleFormat, base: float | None = None) -> Tensor:
    """Scales, float32, of their bit patterns."""
    if fmt == "e8m0":
        return _exp2(codes.int() - 127)
    assert base is not None, "minifloat scales need a base"
    return decode(codes, fmt).mul_(base)


def values_of(q: QTensor) -> Tensor:
    """Grid values, float32, shape (rows, columns)."""
    return decode(q.codes, q.fmt)


def dequantize(q: QTensor | Bands) -> Tensor:
    """The weight tensor in its original shape, float32."""
    if isinstance(q, Bands):
        return dense(q)
    return (values_of(q) * expand_scale(q.scale, q.codes.shape[1], q.granularity)).reshape(q.shape)


def units_of(q: QTensor) -> np.ndarray:
    """Weights as integers in units of the format's smallest step (rows, columns): int64, or Python ints where wider."""
    units = values_of(q).double().numpy() / formats.unit(q.fmt)
    if formats.int_max(q.fmt) < 2**63:
        return np.rint(units).astype(np.int64)
    return np.vectorize(int, otypes=[object])(units)


def grouped(matrix: Tensor, granularity: Granularity) -> list[Tensor]:
    """A (rows, columns) matrix as (scale rows, scale columns, elements that share the scale).

    Behind that, where groups do not divide a row, its last ones, which are shorter: (rows, 1, elements).
    """
    rows, columns = matrix.shape
    match within(granularity, columns):
        case PerTensor():
            return [matrix.reshape(1, 1, rows * columns)]
        case PerRow():
            return [matrix.reshape(rows, 1, columns)]
        case PerGroup(size):
            whole, rest = matrix.split((columns - columns % size, columns % size), dim=1)
            return [part.unflatten(1, (-1, n)) for part, n in ((whole, size), (rest, columns % size)) if n]


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
    """Scales for a weight tensor (out, ...), float32, shaped as `QTensor.scale`, in their format if they have one.

    absmax: the largest magnitude lands on the largest value. percentile: that quantile of the
    magnitudes instead. mse: the threshold of least squared error, searched from absmax down to
    absmax / 20 on a grid and then around its best point. importance: the same with every column's
    error weighted by `importance` (columns,), the mean square of its input. `pow2` restricts
    scales to powers of two. floor, ceil, even: powers of two by `shared_exponent`. Groups that are
    all zero get scale 1 (times base).
    """
    if rule not in get_args(ScaleRule):
        raise InputError(f"unknown scale rule {rule!r}; accepted: {', '.join(get_args(ScaleRule))}")
    if rule == "importance" and importance is None:
        raise InputError("scale rule 'importance' needs the mean square of every input")
    matrix = weight.detach().flatten(1).float()
    parts = grouped(matrix, granularity)
    shares: Sequence[Tensor | None] = [None] * len(parts)
    if rule == "importance":
        shares = grouped(importance.float().expand_as(matrix), granularity)  # type: ignore[union-attr]
    options: dict[str, Any] = {"percentile": percentile, "pow2": pow2}
    options |= {"scale": scale_format(granularity), "base": base_of(weight, fmt, granularity)}
    fitted = [fit_groups(x, fmt, rule, column_weight=w, **options) for x, w in zip(parts, shares, strict=True)]
    return torch.cat(fitted, dim=1)


def fit_groups(
    elements: Tensor,
    fmt: Format,
    rule: ScaleRule,
    *,
    percentile: float = 99.9,
    column_weight: Tensor | None = None,
    pow2: bool = False,
    scale: ScaleFormat | None = None,
    base: float | None = None,
) -> Tensor:
    """`fit_scale` for elements already grouped, (rows, groups, size) -> scales (rows, groups) of format `scale`."""
    shared = rule in ("floor", "ceil", "even")
    if shared and isinstance(scale, Float):
        raise InputError(f"scale rule {rule!r} gives powers of two, which scales in {scale} cannot be")
    if pow2 and isinstance(scale, Float):
        raise InputError(f"pow2 and scales in {scale} exclude each other; accepted with pow2: e8m0 or no format")
    magnitude = elements.abs()
    absmax = magnitude.amax(dim=-1)
    if shared or (scale == "e8m0" and rule != "percentile"):
        return _shared(elements, absmax, fmt, rule, column_weight)
    empty = absmax == 0
    top = largest(fmt)
    if scale is not None and rule in ("mse", "importance"):
        best = _search(elements, absmax / top, fmt, column_weight, lambda s: round_scale(s, scale, base))
    elif isinstance(fmt, Levels) and fmt.name == "binary" and rule in ("mse", "importance"):
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
    if isinstance(scale, Float):
        assert base is not None
        return round_scale(torch.where(empty, torch.full_like(best, base), best), scale, base)
    if not pow2 and scale is None:
        return best
    up = pow2_at_least(best).clamp_max_(2.0**127)
    if rule == "absmax":
        return torch.where(empty, torch.ones_like(up), up)
    down = up / 2
    better = _error(elements, down, fmt, column_weight) < _error(elements, up, fmt, column_weight)
    return torch.where(empty, torch.ones_like(up), torch.where(better, down, up))


def shared_exponent(absmax: Tensor, fmt: Format, rule: Literal["floor", "ceil", "even"]) -> Tensor:
    """The exponent e of a block's scale 2^e, before it is clamped to -127..127; absmax: float32, positive.

    With emax the exponent of the format's largest value and M its significand bits behind the point
    (for integers, those at the largest value):
    floor: floor(log2 absmax) - emax, as OCP Microscaling Formats 1.0, section 6.3; saturates what
    exceeds the largest value. ceil: the smallest e at which nothing saturates (torchao's RCEIL).
    even: as floor, of absmax rounded to M bits (torchao's EVEN). Integers count as in the standard
    but in units of their last bit: mxint8 has emax = 6.

    >>> x, f = torch.tensor([6.0, 6.5, 7.5]), Float(2, 1)
    >>> [shared_exponent(x, f, rule).tolist() for rule in ("floor", "ceil", "even")]
    [[0, 0, 0], [0, 1, 1], [0, 0, 1]]
    """
    top = largest(fmt)
    emax = math.frexp(top)[1] - 1
    mantissa, exponent = torch.frexp(absmax)  # absmax = mantissa 2^exponent, 1/2 <= mantissa < 1
    if rule == "floor":
        up = torch.zeros_like(exponent)
    elif rule == "ceil":
        up = (mantissa > math.ldexp(top, -emax - 1)).int()
    else:
        man = fmt.man if isinstance(fmt, Float) else emax
        up = (mantissa >= 1 - 2.0 ** -(man + 2)).int()
    return exponent - 1 - emax + up


def _shared(elements: Tensor, absmax: Tensor, fmt: Format, rule: str, weight: Tensor | None = None) -> Tensor:
    """Scales in e8m0 by `shared_exponent`; mse, importance: the best of that of "ceil" and the five below."""
    finite = absmax.clamp_max(2.0**127)  # beyond, the largest value times the scale could overflow
    if rule in ("floor", "even"):
        best = _exp2(shared_exponent(finite, fmt, rule))  # type: ignore[arg-type]
    else:
        exponent = shared_exponent(finite, fmt, "ceil")
        best = _exp2(exponent)
    if rule in ("mse", "importance"):
        least = _error(elements, best, fmt, weight)
        for down in range(1, 6):
            candidate = _exp2(exponent - down)
            error = _error(elements, candidate, fmt, weight)
            better = error < least
            best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return torch.where(absmax > 0, best, torch.ones_like(best))


def block_scale(elements: Tensor, fmt: Block, rule: BlockRule, base: float | None = None) -> Tensor:
    """Scales (...) of blocks (..., size) as found at run time, float32; see `shared_exponent`.

    absmax: ceil for e8m0; for a minifloat absmax / largest value rounded to nearest, NVFP4's. mse:
    the shared exponent of least squared error, e8m0 only. An all-zero block has scale 1 (times base).
    """
    if fmt.scale == "e8m0":
        return _shared(elements, elements.abs().amax(dim=-1), fmt.elem, rule)
    if rule != "absmax":
        raise InputError(f"block rule {rule!r} is for shared exponents (e8m0); accepted for {fmt}: absmax")
    return fit_groups(elements, fmt.elem, "absmax", scale=fmt.scale, base=base)


def _quantile(magnitude: Tensor, q: float) -> Tensor:
    rank = max(1, round(q * magnitude.shape[-1]))
    return magnitude.kthvalue(rank, dim=-1).values


def _error(elements: Tensor, scale: Tensor, fmt: Format, weight: Tensor | None) -> Tensor:
    s = scale.unsqueeze(-1)
    error = round_to(elements / s, fmt, inplace=True).mul_(s).sub_(elements).square_()
    return (error if weight is None else error.mul_(weight)).sum(-1)


def _search(
    elements: Tensor,
    start: Tensor,
    fmt: Format,
    weight: Tensor | None,
    rounded: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> Tensor:
    """The scale of least error that `rounded` makes of the candidates; a few rows at a time stay in the cache."""
    few = max(1, 2**16 // elements[0].numel()) if elements.numel() else 1
    parts = zip(elements.split(few), start.split(few), *([] if weight is None else [weight.split(few)]), strict=True)
    return torch.cat([_searched(x, s, fmt, w[0] if w else None, rounded) for x, s, *w in parts])


def _searched(
    elements: Tensor, start: Tensor, fmt: Format, weight: Tensor | None, rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    start = torch.where(start > 0, start, torch.ones_like(start))
    best = rounded(start.clone())
    best_error = _error(elements, best, fmt, weight)

    def consider(candidate: Tensor) -> None:
        nonlocal best, best_error
        candidate = rounded(candidate)
        error = _error(elements, candidate, fmt, weight)
        better = error < best_error
        best, best_error = torch.where(better, candidate, best), torch.where(better, error, best_error)

    coarse = 24
    peak, reach = elements.abs().amax(dim=-1), max(formats.max_value(fmt), -formats.min_value(fmt))
    for i in range(1, coarse):
        candidate = start * (1 - 0.95 * i / coarse)
        beyond = (peak - reach * rounded(candidate)).clamp_min(0).square()
        if weight is None and bool((beyond >= 1.001 * best_error).all()):
            break  # the largest alone is off by more, and by still more with all scales to come
        consider(candidate)
    step = 0.95 / coarse
    center = best.clone()
    for offset in (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75):
        consider((center + start * (offset * step)).clamp_min(0.02 * start))
    if isinstance(fmt, Int) and fmt.signed and not fmt.narrow:
        consider(elements.amin(dim=-1).neg().clamp_min(1e-30) / 2 ** (fmt.bits - 1))  # the extra negative code
    return best


_PIECE = 2**16
"""Codes packed at once: a multiple of 8, so that pieces end on whole bytes."""


def pack(codes: Tensor, bits: int) -> np.ndarray:
    """Codes packed without gaps, most significant bit first, uint8 of ceil(n * bits / 8) bytes."""
    flat, shifts = codes.flatten().numpy(), np.arange(bits - 1, -1, -1)
    if 8 % bits == 0:  # whole codes to a byte
        padded = np.pad(flat.astype(np.uint8, copy=False), (0, -len(flat) % (8 // bits)))
        whole = np.zeros(len(padded) * bits // 8, np.uint8)
        for i in range(8 // bits):
            whole |= padded[i :: 8 // bits] << (8 - bits * (i + 1))
        return whole
    pieces = [flat[i : i + _PIECE].astype(np.int64) for i in range(0, len(flat), _PIECE)]
    packed = [np.packbits(((piece[:, None] >> shifts) & 1).astype(np.uint8).reshape(-1)) for piece in pieces]
    return np.concatenate([np.empty(0, np.uint8), *packed])


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack`."""
    count, weights = int(np.prod(shape)), 1 << np.arange(bits - 1, -1, -1)
    codes = np.empty(count, np.uint8 if bits <= 8 else np.int32)
    for i in range(0, count, _PIECE):
        some = codes[i : i + _PIECE]
        planes = np.unpackbits(packed[i * bits // 8 :], count=len(some) * bits)
        some[:] = planes.reshape(len(some), bits) @ weights
    return torch.from_numpy(codes).reshape(shape)
