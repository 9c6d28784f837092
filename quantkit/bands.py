"""`Bands`: a weight matrix in two bands of columns, salient ones in 4 bits and the rest in 1 bit (PTQ1.61).

With S the salient columns, sigma = +-1 and q = 0..15 the codes,

    w_ji = scale_j (q_ji - zero_j)        i in S
    w_ji = c_i (a_j sigma_ji + b_j)       otherwise

which is what "PTQ1.61: Push the Real Limit of Extremely Low-Bit Post-Training Quantization Methods for Large Language
Models" (ACL 2025, arXiv 2502.13179) stores once its scales are folded: a = r1 s, b = r1 mu, c = r2. `scale`, a, b and
c are bfloat16: as many bits as the paper's float16, and rows of very different sizes do not overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BANDS = "int4+binary"
"""What a weight in bands is called where others have the name of a format."""


@dataclass(frozen=True)
class Bands:
    """A weight matrix of n rows and m columns, k of them salient.

    salient: bool (m,). codes: uint8 (n, k), 0 to 15. scale: float32 (n, 1), positive. zero: uint8 (n, 1), 0 to 15.
    signs: bool (n, m - k), True for +1. a, b: float32 (n, 1). c: float32 (m,), 1 and without effect where salient.
    The float32 tensors hold numbers of bfloat16. shape: the original tensor's.
    """

    salient: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor
    signs: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Bits stored."""
        return stored_bits(len(self.codes), len(self.salient), self.codes.shape[1])


def stored_bits(n: int, m: int, k: int) -> int:
    """Bits of n x m weights with k salient columns: codes, signs, mask, a, b, c, and 4-bit scales and zeros.

    >>> [round(stored_bits(n, n, int(0.2 * n) + 1) / n**2, 3) for n in (4096, 768, 64)]
    [1.617, 1.691, 2.688]
    """
    return n * (m + 3 * k) + m + 16 * (2 * n + m) + 20 * n


def half(x: Tensor) -> Tensor:
    """x rounded to bfloat16, as float32."""
    return x.to(torch.bfloat16).float()


def nearest4(w: Tensor, over: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit codes of w (n, k), uint8, and their scales, float32, and zeros, uint8, both (n, 1): asymmetric, by rows.

    The range of a row is that of `over` (n, any), w itself if not given, widened to hold 0, and -1 to 1 where it is
    empty. Scales are rounded to bfloat16 first.

    >>> q, scale, zero = nearest4(torch.tensor([[-0.5, 0.0, 1.0, 7.0]]))
    >>> q.tolist(), scale.tolist(), zero.tolist()
    ([[0, 1, 3, 15]], [[0.5]], [[1]])
    """
    over = w if over is None else over
    low = over.amin(dim=1, keepdim=True).clamp_max(0) if over.shape[1] else over.new_zeros(len(w), 1)
    high = over.amax(dim=1, keepdim=True).clamp_min(0) if over.shape[1] else over.new_zeros(len(w), 1)
    empty = low == high
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = half(high / 15 - low / 15).clamp_min(torch.finfo(torch.bfloat16).tiny)
    zero = torch.round(-low / scale).clamp(0, 15)
    codes = (torch.round(w / scale) + zero).clamp(0, 15)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def dense(q: Bands) -> Tensor:
    """The weight tensor in its original shape, float32."""
    w = q.scale.new_empty(len(q.signs), len(q.salient))
    w[:, q.salient] = q.scale * (q.codes.float() - q.zero.float())
    w[:, ~q.salient] = q.c[~q.salient] * (q.a * signed(q.signs) + q.b)
    return w.reshape(q.shape)


def signed(signs: Tensor) -> Tensor:
    """+1 where True and -1 elsewhere, float32."""
    return signs.float().mul_(2).sub_(1)


def product(q: Bands, x: Tensor) -> Tensor:
    """x (..., m) times the transposed matrix, (..., n), as a kernel would compute it: no weight is ever decoded.

    Salient columns come first, c is folded into x once, and what b and zero contribute needs one sum of x each.
    """
    high, low = x[..., q.salient], x[..., ~q.salient] * q.c[~q.salient]
    y = q.scale[:, 0] * (high @ q.codes.float().T - q.zero[:, 0].float() * high.sum(-1, keepdim=True))
    return y + q.a[:, 0] * (low @ signed(q.signs).T) + q.b[:, 0] * low.sum(-1, keepdim=True)


def to_arrays(q: Bands) -> dict[str, np.ndarray]:
    """What is stored, by name: codes, zeros, signs and mask without gaps, the rest as bit patterns of bfloat16.

    Together `bits` / 8 bytes, each array rounded up to whole bytes.
    """
    nibbles = {"codes": q.codes, "zero": q.zero}
    planes = {"signs": q.signs, "salient": q.salient}
    vectors = {"scale": q.scale, "a": q.a, "b": q.b, "c": q.c}
    return {
        **{name: _packed4(t.numpy().reshape(-1)) for name, t in nibbles.items()},
        **{name: np.packbits(t.numpy().reshape(-1)) for name, t in planes.items()},
        **{name: t.reshape(-1).to(torch.bfloat16).view(torch.int16).numpy() for name, t in vectors.items()},
    }


ARRAYS = ("codes", "zero", "signs", "salient", "scale", "a", "b", "c")


def from_arrays(arrays: dict[str, np.ndarray], shape: tuple[int, ...]) -> Bands:
    """Inverse of `to_arrays`; ValueError for arrays of another size or numbers that cannot be."""
    n = shape[0]
    m = int(np.prod(shape[1:], dtype=np.int64))
    salient = _plane(arrays["salient"], (m,), "salient")
    k = int(salient.sum())
    vectors = {name: _vector(arrays[name], size, name) for name, size in (("scale", n), ("a", n), ("b", n), ("c", m))}
    if not (vectors["scale"] > 0).all():
        raise ValueError("scale is not positive")
    return Bands(
        salient,
        _unpacked4(arrays["codes"], (n, k), "codes"),
        vectors["scale"].reshape(n, 1),
        _unpacked4(arrays["zero"], (n, 1), "zero"),
        _plane(arrays["signs"], (n, m - k), "signs"),
        vectors["a"].reshape(n, 1),
        vectors["b"].reshape(n, 1),
        vectors["c"],
        shape,
    )


def _packed4(codes: np.ndarray) -> np.ndarray:
    even = np.pad(codes, (0, len(codes) % 2))
    return even[0::2] << 4 | even[1::2]


def _unpacked4(packed: np.ndarray, shape: tuple[int, int], name: str) -> Tensor:
    count = shape[0] * shape[1]
    if packed.dtype != np.uint8 or packed.shape != (-(-count // 2),):
        raise ValueError(f"{name} is not {shape} codes of 4 bits")
    return torch.from_numpy(np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count].reshape(shape))


def _plane(packed: np.ndarray, shape: tuple[int, ...], name: str) -> Tensor:
    count = int(np.prod(shape))
    if packed.dtype != np.uint8 or packed.shape != (-(-count // 8),):
        raise ValueError(f"{name} is not {shape} bits")
    return torch.from_numpy(np.unpackbits(packed, count=count).reshape(shape).astype(bool))


def _vector(patterns: np.ndarray, size: int, name: str) -> Tensor:
    if patterns.dtype != np.int16 or patterns.shape != (size,):
        raise ValueError(f"{name} is not {size} numbers of bfloat16")
    values = torch.from_numpy(patterns).view(torch.bfloat16).float()
    if not values.isfinite().all():
        raise ValueError(f"{name} is not finite")
    return values
