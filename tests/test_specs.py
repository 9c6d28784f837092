"""Laws of the specifications given to the cost model, by brute force on the codes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_policies import calib, cartpole, conv, mlp
from torch import nn

from hwmodel import formats
from hwmodel.accumulator import signed_bits, type_bound
from hwmodel.formats import levels, unit
from hwmodel.spec import LayerSpec
from quantkit.model import Model
from quantkit.qlayers import QLayer
from quantkit.recipe import Recipe, make_plan, quantize, uniform
from quantkit.rounding import is_pow2
from quantkit.specs import bits_per_weight, layer_specs, sqnr_db

PAIRS = [
    ("int4", "int4"),
    ("int3", "uint5"),
    ("e2m1", "e3m2"),
    ("int8n", "e2m1"),
    ("ternary", "int8"),
    ("binary", "binary"),
]


def quantized(model: Model, weight: str, act: str, granularity: str = "row", **steps: Any) -> Model:
    """The model with one plan everywhere."""
    return quantize(model, uniform(weight, act, granularity, **steps), calib(model))


def worst_sums(layer: QLayer) -> tuple[int, int]:
    """Extremes of all partial sums in units: each term takes its worst input, in any order, some left out."""
    assert layer.q is not None and layer.act is not None
    grid = np.array([formats.decode(c, layer.q.fmt) for c in range(2 ** formats.bits(layer.q.fmt))])
    weights = np.rint(grid[layer.q.codes.long().numpy()] / unit(layer.q.fmt)).astype(object)
    inputs = [round(v / unit(layer.act.fmt)) for v in levels(layer.act.fmt)]
    low = high = 0
    for row in weights:
        terms = [[int(w) * x for x in inputs] for w in row]
        low = min(low, sum(min(0, *t) for t in terms))
        high = max(high, sum(max(0, *t) for t in terms))
    return low, high


@pytest.mark.parametrize(("weight", "act"), PAIRS)
@pytest.mark.parametrize("granularity", ["tensor", "row", "group2"])
def test_accumulators_hold_the_worst_case_and_no_more(weight: str, act: str, granularity: str) -> None:
    """acc_bits is the smallest two's complement width that holds every partial sum of the actual codes."""
    model = quantized(mlp((6, 12, 8, 3)), weight, act, granularity)
    for spec, layer in zip(layer_specs(model), model.qlayers().values(), strict=True):
        low, high = worst_sums(layer)
        assert spec.acc_bits == signed_bits(low, high)
        assert -(2 ** (spec.acc_bits - 1)) <= low and high < 2 ** (spec.acc_bits - 1)
        assert spec.weight is not None and spec.act is not None
        assert spec.acc_bits <= type_bound(spec.weight, spec.act, spec.in_features)


@pytest.mark.parametrize("groups", [1, 2])
def test_accumulators_of_convolutions_hold_what_happens(groups: int) -> None:
    """The largest sums found on random images, borders included, fit; so do those of a search for the worst."""
    model = quantized(conv(groups=groups), "int4", "int5")
    specs = {spec.name: spec for spec in layer_specs(model)}
    sums: dict[str, float] = {}
    for name, layer in model.qlayers().items():
        low, high = worst_sums(layer)
        assert specs[name].acc_bits == signed_bits(low, high)
        layer.register_forward_pre_hook(lambda m, a, n=name: sums.__setitem__(n, largest(m, a[0])))
    model.module(calib(model, 16, seed=5).inputs)
    for name, largest_sum in sums.items():
        assert largest_sum < 2 ** ((specs[name].acc_bits or 0) - 1), name


def largest(layer: QLayer, x: torch.Tensor) -> float:
    """The largest magnitude of the layer's bare sums, in units."""
    return float(layer.product(layer.input_values(x).double(), layer.kernel().weight.double()).abs().max())


def test_positions_are_output_positions() -> None:
    """A convolution has height x width of its output, a linear layer 1, wherever it stands."""
    model = conv()
    expected, seen = {}, {}
    for name, layer in model.layers().items():
        layer.register_forward_hook(lambda m, a, y, n=name: seen.__setitem__(n, math.prod(y.shape[2:])))
    model.module(model.example)
    expected = {spec.name: spec.positions for spec in layer_specs(model)}
    assert expected == seen == {"net.conv1": 25, "net.conv2": 12, "net.fc": 1, "net.head": 1}
    assert all(not hook for hook in (m._forward_pre_hooks for m in model.module.modules()))


def test_multiplications_are_counted_exactly() -> None:
    """macs of a spec is the number of products that the layer makes, groups included."""
    for groups in (1, 2):
        model = conv(groups=groups)
        for spec, layer in zip(layer_specs(model), model.layers().values(), strict=True):
            assert spec.macs == layer.weight.numel() * spec.positions
            assert spec.groups == getattr(layer, "groups", 1)


@pytest.mark.parametrize(("weight", "act"), PAIRS)
def test_zeros_are_counted_on_the_codes(weight: str, act: str) -> None:
    """zeros is the fraction of weights whose value is zero after quantization."""
    model = quantized(mlp((6, 12, 3)), weight, act)
    for spec, layer in zip(layer_specs(model), model.qlayers().values(), strict=True):
        assert spec.zeros == pytest.approx(float((layer.effective_weight() == 0).double().mean()), abs=1e-12)


def test_each_layer_hands_the_next_its_input_format() -> None:
    """out is the act of the following layer, None behind the last; activations follow their layer."""
    model = quantized(mlp((6, 12, 8, 3), act=nn.Tanh), "int4", "e3m2")
    specs = layer_specs(model)
    assert [s.out for s in specs] == [*(s.act for s in specs[1:]), None]
    assert [s.activation for s in specs] == ["tanh", "tanh", "none"]
    assert [s.activation for s in layer_specs(conv())] == ["relu", "relu", "tanh", "none"]


def test_power_of_two_scales_are_noticed() -> None:
    """scale_pow2 holds only if all factors of the requantization are powers of two."""
    steps = (("act_scales", {"pow2": True}), ("rtn", {"pow2": True}))
    model = quantized(mlp((6, 12, 3)), "int4", "int4", steps=steps)
    assert [s.scale_pow2 for s in layer_specs(model)] == [True, False]  # nothing follows the last
    assert all(is_pow2(float(s)) for layer in model.qlayers().values() for s in layer.q.scale.flatten())  # type: ignore[union-attr]
    mixed = quantized(mlp((6, 12, 3)), "int4", "int4", steps=(("act_scales", {"pow2": True}), ("rtn", {})))
    assert not any(s.scale_pow2 for s in layer_specs(mixed))


def test_float_layers_have_specs_too() -> None:
    """A network that is not quantized has formats None and 32 bits per weight."""
    model = cartpole()
    for spec in layer_specs(model):
        assert (spec.weight, spec.act, spec.out, spec.acc_bits) == (None, None, None, None)
    assert bits_per_weight(model) == 32


@pytest.mark.parametrize("granularity", ["tensor", "row", "group4"])
def test_bits_per_weight_counts_codes_and_scales(granularity: str) -> None:
    """Against the count by hand; a layer that stays float counts 32."""
    model = mlp((8, 16, 3))
    recipe = Recipe((("*", make_plan("int3", "int8", granularity)), ("last", make_plan("float", "int8"))))
    done = quantize(model, recipe, calib(model))
    scales = {"tensor": 1, "row": 16, "group4": 32}[granularity]
    assert bits_per_weight(done) == (8 * 16 * 3 + 32 * scales + 32 * 48) / (8 * 16 + 48)


@pytest.mark.parametrize("make", [lambda: mlp((6, 12, 3)), conv, lambda: conv(groups=2)])
def test_specs_survive_json(make: Any) -> None:
    """from_json inverts to_json."""
    model = quantized(make(), "e2m1", "int4", "tensor")
    for spec in layer_specs(model):
        assert LayerSpec.from_json(spec.to_json()) == spec


def test_sqnr_is_the_ratio_of_powers() -> None:
    """About 6 dB per bit, infinite where exact, None where float."""
    model = mlp((64, 64, 3))
    by_bits = [sqnr_db(quantized(model, f"int{b}", "float").qlayers()["net.fc1"]) or 0.0 for b in (4, 5, 6, 7)]
    steps = np.diff(by_bits)
    assert (steps > 4.5).all() and (steps < 7.5).all()
    with torch.no_grad():
        model.layers()["net.fc1"].weight.fill_(0.5)
    assert sqnr_db(quantized(model, "binary", "float").qlayers()["net.fc1"]) == math.inf
    assert sqnr_db(quantized(model, "float", "int4").qlayers()["net.fc1"]) is None


def test_sabotage_an_accumulator_one_bit_short_is_caught() -> None:
    """Some layer's worst case needs its last bit."""
    model = quantized(mlp((6, 12, 8, 3)), "int4", "int4")
    short = [
        max(-low, high + 1) > 2 ** (spec.acc_bits - 2)
        for spec, layer in zip(layer_specs(model), model.qlayers().values(), strict=True)
        for low, high in [worst_sums(layer)]
        if spec.acc_bits
    ]
    assert all(short)
