"""How torch computes while a model is quantized: on how many threads, and in which precision products are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Arithmetic of torch on one thread, and the number of before afterwards.

    How a product or sum is split among threads decides the order of additions and so the last bits, and a weight in
    the middle of two codes is decided by these. `recipe.quantize` runs under it: codes and scales are the same bytes
    whatever `torch.set_num_threads` says. Cores are for other designs meanwhile.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def has_half() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AVX512-BF16, AMX)."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


@contextlib.contextmanager
def half_products(wanted: bool = True) -> Iterator[None]:
    """Products of float32 matrices with operands rounded to bfloat16 and sums in float32, where `has_half`.

    A product of two bfloat16 numbers is exact in float32, so operands that are such numbers lose nothing but the order
    of the sum. Products below some 16^3 multiplications stay in float32.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if wanted else before
    try:
        yield
    finally:
        matmul.fp32_precision = before
