"""Brevitas' own quantizers round as ours do: integers, minifloats, ternary and binary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strategies import boundary_numbers, random_numbers

from hwmodel import formats
from hwmodel.formats import BINARY, TERNARY, Int, levels, minifloats
from quantkit.rounding import round_to

brevitas = pytest.importorskip("brevitas")

from brevitas.core.bit_width import BitWidthConst  # noqa: E402  (after the check that it is installed)
from brevitas.core.function_wrapper import Identity, RoundSte, TensorClamp  # noqa: E402
from brevitas.core.function_wrapper.clamp import FloatClamp  # noqa: E402
from brevitas.core.quant import BinaryQuant, IntQuant, TernaryQuant  # noqa: E402
from brevitas.core.quant.float import FloatQuant  # noqa: E402
from brevitas.core.scaling import ConstScaling  # noqa: E402
from brevitas.core.utils import StatelessBuffer  # noqa: E402
from brevitas.function.ops import compute_max_mantissa  # noqa: E402

SCALE = 0.173


class MaxMantissa(torch.nn.Module):
    """Brevitas' largest significand as the module that FloatQuant wants."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return compute_max_mantissa(x)


def numbers(fmt: formats.Format, scale: float) -> torch.Tensor:
    """Values, boundaries and random numbers, times the scale; finite."""
    x = np.concatenate([levels(fmt), boundary_numbers(fmt, 400), random_numbers(fmt, 4000, seed=8)])
    return torch.from_numpy((x[np.abs(x) < 1e20] * scale).astype(np.float32))


def ours(x: torch.Tensor, fmt: formats.Format, scale: float) -> torch.Tensor:
    """Divided by the scale, rounded and multiplied again."""
    return round_to(x / scale, fmt) * scale


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("fmt", [f for bits in range(3, 9) for f in minifloats(bits)], ids=str)
def test_minifloats(fmt, scale):
    """Every finite minifloat, M = 0 and its ties included, equals Brevitas' FloatQuant."""
    quantizer = FloatQuant(
        signed=True,
        exponent_bit_width_impl=BitWidthConst(fmt.exp),
        mantissa_bit_width_impl=BitWidthConst(fmt.man),
        exponent_bias_impl=StatelessBuffer(torch.tensor(float(formats.bias(fmt)))),
        float_clamp_impl=FloatClamp(tensor_clamp_impl=TensorClamp(), signed=True, saturating=True),
        input_view_impl=Identity(),
        compute_max_mantissa=MaxMantissa(),
        scaling_impl=ConstScaling(scale),
        float_to_int_impl=RoundSte(),
    )
    x = numbers(fmt, scale)
    assert torch.equal(ours(x, fmt, scale), quantizer(x)[0])


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers(bits, signed, narrow, scale):
    """Signed and unsigned, full and narrow integers equal Brevitas' IntQuant."""
    fmt = Int(bits, signed, narrow)
    quantizer = IntQuant(narrow_range=narrow, signed=signed, input_view_impl=Identity())
    x = numbers(fmt, scale)
    theirs = quantizer(torch.tensor(scale), torch.tensor(0.0), torch.tensor(float(bits)), x)
    assert torch.equal(ours(x, fmt, scale), theirs)


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_ternary(scale):
    """Ternary equals Brevitas' TernaryQuant with the threshold at half the scale."""
    x = numbers(TERNARY, scale)
    assert torch.equal(ours(x, TERNARY, scale), TernaryQuant(ConstScaling(scale), 0.5)(x)[0])


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_binary(scale):
    """Binary equals Brevitas' BinaryQuant, zero included."""
    x = numbers(BINARY, scale)
    assert torch.equal(ours(x, BINARY, scale), BinaryQuant(ConstScaling(scale))(x)[0])
