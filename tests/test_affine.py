"""Arithmetic behind the sums equals the thresholds at every sum, and its hardware equals both."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from hwmodel import affine, emit
from hwmodel.accumulator import exact_bits
from hwmodel.convert import converters
from hwmodel.devices import find_device
from hwmodel.folding import layer_fold
from hwmodel.formats import levels, parse, unit
from hwmodel.mac import pipeline_stages
from hwmodel.network import Layer, Network, legal_codes, read_network, sample_codes
from hwmodel.reference import to_units
from hwmodel.simulate import check
from hwmodel.spec import CURVED, LayerSpec, PerRow, PerTensor

icarus = pytest.mark.skipif(not shutil.which("iverilog"), reason="iverilog is not installed (apt-get install iverilog)")
CURVES = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "hardtanh": lambda x: np.clip(x, -1, 1),
    "tanh": np.tanh,
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
}


def float_layer(
    out: str, activation: str, *, kind: str, columns: int = 9, rows: int = 8, last: bool = False, seed: int = 3
) -> Layer:
    """A layer whose thresholds come from a float32 pipeline: gain, bias, activation, division, rounding."""
    rng = np.random.default_rng(seed)
    weight, act, fmt = parse("int4"), parse("int5"), parse(out)
    codes = rng.choice(legal_codes(weight), size=(rows, columns))
    gain = rng.uniform(0.5, 2.0, rows) * 0.013
    if kind in ("plain", "shift"):
        gain = 2.0 ** np.round(np.log2(gain))
    if kind in ("plain", "constant"):
        gain[:] = gain[0]
    bias = np.round(rng.normal(0, 0.4, rows), 2)
    spec = LayerSpec(
        "fc", "linear", rows, columns, weight=weight, act=act, out=fmt, activation=activation,  # type: ignore[arg-type]
        granularity=PerTensor() if kind in ("plain", "constant") else PerRow(), scale_pow2=kind in ("plain", "shift"),
        acc_bits=int(exact_bits(to_units(codes, weight), act).max()),
    )  # fmt: skip
    bare = Layer(dataclasses.replace(spec, out=None), codes, None)
    low, high = (bound.astype(np.int64) for bound in bare.sum_range)
    grid = np.array(levels(fmt), np.float32)
    top = 2.0 if activation in ("none", "relu", "elu") else 1.0
    scale = np.float32(2.0 ** np.round(np.log2(top / grid[-1])) if kind in ("plain", "shift") else top / grid[-1])
    table = np.empty((rows, len(grid) - 1), dtype=object)
    middle = (grid[1:].astype(np.float64) + grid[:-1]) / 2
    for r in range(rows):
        sums = np.arange(low[r], high[r] + 1)
        y = sums.astype(np.float32) * np.float32(gain[r]) + np.float32(bias[r])
        x = (CURVES[activation](y).astype(np.float32) / scale).astype(np.float64)
        up = np.array([parse_nearest(float(m), fmt) for m in middle]) == grid[1:]
        ranks = np.searchsorted(np.where(up, np.nextafter(middle, -np.inf), middle), x, side="left")
        ranks = np.maximum.accumulate(ranks)
        table[r] = [int(low[r]) + int(np.searchsorted(ranks, k + 1)) for k in range(len(grid) - 1)]
    line = np.stack([gain, bias, np.full(rows, float(scale) * unit(fmt))], axis=1)
    return Layer(spec, codes, table, line if activation in CURVED else None)


def parse_nearest(value: float, fmt: object) -> float:
    """The level nearest to a value, ties to even."""
    from hwmodel.formats import nearest

    return nearest(value, fmt)  # type: ignore[arg-type]


CASES = [
    (out, activation, kind)
    for out in ("int4", "uint4", "int8", "e2m1", "e3m2", "e2m1ieee")
    for activation in CURVES
    for kind in ("plain", "constant", "shift", "runtime")
    if not (out == "uint4" and activation in ("none", "hardtanh", "tanh", "elu"))
]


@pytest.mark.parametrize(("out", "activation", "kind"), CASES)
def test_arithmetic_equals_the_thresholds_at_every_sum(out: str, activation: str, kind: str) -> None:
    """For any format, activation and kind of scale: factor, offset, rounding and patches give each sum its code."""
    layer = float_layer(out, activation, kind=kind)
    found = affine.solve(layer)
    assert found is not None
    assert layer.thresholds is not None
    low, high = layer.sum_range
    for row in range(len(low)):
        sums = np.arange(int(low[row]), int(high[row]) + 1)
        want = np.searchsorted(layer.thresholds[row].astype(np.int64), sums, side="right")
        assert (affine.ranks(found, layer, row, sums) == want).all()
    if activation in ("none", "relu", "hardtanh"):
        assert affine.facts_of(found).kind in (kind, "plain")


def test_noise_is_patched_and_steps_are_not_arithmetic() -> None:
    """A threshold moved by one sum costs one patch; thresholds without any law have no arithmetic."""
    layer = float_layer("int8", "none", kind="plain")
    before = affine.solve(layer)
    assert before is not None and layer.thresholds is not None
    moved = layer.thresholds.copy()
    inside = next(k for k in range(90, 200) if int(layer.sum_range[0][2]) < moved[2, k] < moved[2, k + 1])
    moved[2, inside] += 1
    after = affine.solve(dataclasses.replace(layer, thresholds=moved))
    assert after is not None
    assert sum(map(len, before.patches)) == 0 < sum(map(len, after.patches)) <= 4
    low, high = (int(bound[0]) for bound in layer.sum_range)
    wild = np.sort(np.random.default_rng(1).integers(low, high, moved.shape), axis=1).astype(object)
    assert affine.solve(dataclasses.replace(layer, thresholds=wild)) is None


HARDWARE = [
    ("int4", "none", "plain"),
    ("uint4", "relu", "constant"),
    ("int8", "hardtanh", "shift"),
    ("int8", "none", "runtime"),
    ("int8", "tanh", "runtime"),
    ("e2m1", "tanh", "constant"),
    ("e3m2", "none", "runtime"),
    ("e2m1", "relu", "shift"),
    ("e2m1ieee", "hardtanh", "constant"),
]


@pytest.mark.sim
@icarus
@pytest.mark.parametrize(("out", "activation", "kind"), HARDWARE)
@pytest.mark.parametrize(("pe", "units"), [(2, 1), (8, 8)])
def test_emitted_arithmetic_is_exact_and_on_time(
    out: str, activation: str, kind: str, pe: int, units: int, tmp_path: Path
) -> None:
    """Sums behind an arithmetic converter equal the reference, in the cycles that its stages say."""
    first = float_layer(out, activation, kind=kind, seed=8)
    codes = np.random.default_rng(2).choice(legal_codes(parse("int4")), size=(3, 8))
    width = int(exact_bits(to_units(codes, parse("int4")), parse(out)).max())
    last = Layer(
        LayerSpec("end", "linear", 3, 8, weight=parse("int4"), act=parse(out), acc_bits=width), codes, None
    )  # fmt: skip
    network = affine.solved(Network((first, last)))
    spec = network.specs[0]
    unit = next(c for c in converters(spec, spec.acc_bits or 0, units) if c.method != "thresholds")
    plan = layer_fold(spec, pe, 3)
    assert spec.weight is not None and spec.act is not None
    cycles = (8 // pe) * 3 + 1 + pipeline_stages(spec.weight, spec.act, 3) + unit.stages + pe // units - 1
    plans = (
        dataclasses.replace(plan, units=units, converter=unit.method, cycles=cycles),
        layer_fold(network.specs[1], 3, 4),
    )
    emit.write(network, plans, tmp_path, find_device("xc7a35t"))
    found = check(tmp_path, sample_codes(read_network(tmp_path), 60, seed=5), "iverilog")
    assert found.mismatch is None
    assert found.cycles_min == found.cycles_max == sum(p.cycles for p in plans)
