"""Sums and means of maps in Verilog, and streams that part and meet: exact, on time, never at a standstill."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_designs import (
    emitted,
    icarus,
    lint,
    made,
    product,
    prove,
    prove_with_pauses,
    random_folds,
    streamed,
    verilator,
)  # fmt: skip

from hwmodel import joint
from hwmodel.affine import solved
from hwmodel.cost import HwError
from hwmodel.flow import ENDLESS, WIRES, flow, run
from hwmodel.folding import Fold, joint_fold, layer_fold
from hwmodel.formats import decode, levels, parse, unit
from hwmodel.network import Layer, Network, reference, sample_codes, trace
from hwmodel.spec import LayerSpec, PerTensor, Window


def add(
    name: str, shape: tuple[int, int, int], acts: tuple[str, str], factors: tuple[int, int], out: str,
    sources: tuple[str, str], seed: int = 5,
) -> Layer:  # fmt: skip
    """The sum of two maps of `shape`, channels first, each times its factor."""
    first, second = map(parse, acts)
    channels, height, width = shape
    spec = LayerSpec(
        name, "add", 1, 2, height * width, joint.FACTORS, first, parse(out), PerTensor(),
        window=Window(1, height, width), second=second, sources=sources,
    )  # fmt: skip
    return made(spec, np.array([factors]), channels, seed)


def mean(name: str, shape: tuple[int, int, int], act: str, out: str, seed: int = 5) -> Layer:
    """The mean of every channel of the map before it."""
    channels, *size = shape
    height, width = size
    window = Window(1, height, width, (height, width))
    spec = LayerSpec(
        name, "mean", 1, height * width, 1, joint.ONES, parse(act), parse(out), PerTensor(), window=window
    )  # fmt: skip
    return made(spec, np.ones((1, height * width), np.int64), channels, seed)


SAME = ((3, 3), (1, 1), (1, 1, 1, 1))


def residual() -> Network:
    """ResNet-8's shape, small: a branch around two convolutions, a halving one with its own, a mean, a dense layer."""
    halving = ((3, 3), (2, 2), (1, 1, 1, 1))
    return solved(Network((
        product("conv0", Window(2, 6, 7, *SAME), 4, "uint4", "uint5"),
        product("conv1", Window(4, 6, 7, *SAME), 4, "uint5", "uint4"),
        product("conv2", Window(4, 6, 7, *SAME), 4, "uint4", "int5"),
        add("sum1", (4, 6, 7), ("uint5", "int5"), (1, 2), "uint5", ("conv0", "conv2")),
        product("conv3", Window(4, 6, 7, *halving), 6, "uint5", "uint4"),
        product("conv4", Window(6, 3, 4, *SAME), 6, "uint4", "int6"),
        product("short", Window(4, 6, 7, (1, 1), (2, 2)), 6, "uint5", "int5", ("sum1",)),
        add("sum2", (6, 3, 4), ("int5", "int6"), (4, 1), "uint4", ("short", "conv4")),
        mean("mean", (6, 3, 4), "uint4", "int6"),
        product("head", Window(6), 3, "int6", None),
    )))  # fmt: skip


def parted() -> Network:
    """The network's input goes to two layers, one of which two sums read; codes of a minifloat leave."""
    return solved(Network((
        product("left", Window(2, 5, 4, *SAME), 4, "int4", "int4"),
        product("right", Window(2, 5, 4), 4, "int4", "uint3", ("",)),
        add("first", (4, 5, 4), ("int4", "uint3"), (1, 1), "int4", ("left", "right")),
        add("second", (4, 5, 4), ("uint3", "int4"), (8, 1), "e2m2", ("right", "first")),
    )))  # fmt: skip


def around() -> Network:
    """A map beside itself under a kernel of five: the branch needs most of the map before its first result."""
    return solved(Network((
        product("stem", Window(1, 7, 5, (1, 1)), 3, "uint4", "uint4"),
        product("wide", Window(3, 7, 5, (5, 5), (1, 1), (2, 2, 2, 2)), 3, "uint4", "uint4"),
        add("sum", (3, 7, 5), ("uint4", "uint4"), (1, 1), "uint4", ("wide", "stem")),
        product("end", Window(3, 7, 5, (7, 5)), 2, "uint4", None),
    )))  # fmt: skip


NETWORKS = {"residual": residual, "parted": parted, "around": around}


def slow(network: Network, codes: np.ndarray) -> list[list[int]]:
    """The sums of every add and mean of one inference by their definitions, from the codes that they read."""
    given = [codes, *trace(network, codes)]
    found = []
    for layer, sources in zip(network.products, network.links, strict=True):
        spec = layer.spec
        if not spec.joint:
            continue
        reads = [
            [round(decode(int(c), fmt) / unit(fmt)) for c in given[source + 1][0]]
            for source, fmt in zip(sources, (spec.act, spec.second), strict=False)
            if fmt is not None
        ]
        channels = spec.out_features
        if spec.op == "add":
            a, b = map(int, layer.codes[0])
            found.append([a * x + b * y for x, y in zip(*reads, strict=True)])
        else:
            found.append([sum(reads[0][c::channels]) for c in range(channels)])
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_the_reference_adds_what_its_sources_give(name: str) -> None:
    """Codes of every sum and mean are the ranks of slow sums among the thresholds; JSON keeps all of it."""
    network = NETWORKS[name]()
    assert Network.from_json(network.to_json()).to_json() == network.to_json()
    codes = sample_codes(network, 5, seed=2)[4:]
    results = [r[0] for r, layer in zip(trace(network, codes), network.products, strict=True) if layer.spec.joint]
    layers = [layer for layer in network.products if layer.spec.joint]
    for sums, result, layer in zip(slow(network, codes), results, layers, strict=True):
        assert layer.thresholds is not None and layer.spec.out is not None
        above = [sum(s >= t for t in layer.thresholds[0]) for s in sums]
        assert [decode(int(c), layer.spec.out) for c in result] == [levels(layer.spec.out)[rank] for rank in above]


@pytest.mark.sim
@icarus
@pytest.mark.parametrize(
    ("name", "seed"), [("residual", 0), ("residual", 1), ("parted", 0), ("parted", 3), ("around", 0)]
)
def test_designs_are_exact_and_on_time(name: str, seed: int, tmp_path: Path) -> None:
    """At random folds every result is the reference's, and the cycles are those of the plan."""
    network = NETWORKS[name]()
    prove(tmp_path / "x", emitted(network, random_folds(network, seed), tmp_path / "x"), n=4)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", ["parted", "around"])
def test_pauses_change_nothing(name: str, tmp_path: Path) -> None:
    """Input that pauses and results that wait leave every result right."""
    network = NETWORKS[name]()
    prove_with_pauses(tmp_path / "x", emitted(network, random_folds(network, 2), tmp_path / "x"))


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", ["residual", "around"])
def test_maps_follow_each_other_at_once(name: str, tmp_path: Path) -> None:
    """One map behind the other without a gap, with pauses on both sides: all sums in order, tlast behind each map."""
    network, folder = NETWORKS[name](), tmp_path / "x"
    plans = emitted(network, [joint_fold(s, 1) if s.joint else layer_fold(s, 1, 1) for s in network.specs], folder)
    codes = sample_codes(network, 3, seed=4)
    assert plans[0].lanes == plans[-1].units == 1
    results, lasts, _ = streamed(network, plans, folder, codes)
    assert np.array_equal(results, reference(network, codes))
    assert lasts == ([0] * (network.outputs - 1) + [1]) * len(codes)


def fast(network: Network) -> list[Fold]:
    """A fold of each layer that never makes its input wait long."""
    return [joint_fold(s, 1) if s.joint else layer_fold(s, s.out_features, 1) for s in network.specs]


@pytest.mark.parametrize("seed", range(4))
def test_queues_hold_what_they_must_and_no_more(seed: int) -> None:
    """With the planned depths nothing waits for room; with a word less a beat is refused."""
    network = NETWORKS[("residual", "parted", "around")[seed % 3]]()
    plans = tuple(fast(network) if seed == 2 else random_folds(network, seed))
    planned = flow(plans)
    adds = {i: depths for i, depths in enumerate(planned.depths) if depths}
    assert run(plans, adds) == planned  # type: ignore[arg-type]
    endless = {i: tuple(ENDLESS if n else WIRES for n in depths) for i, depths in adds.items()}
    assert run(plans, endless) == planned  # type: ignore[arg-type]
    for i, depths in adds.items():
        for slot, words in enumerate(depths):
            if words > 1:
                less = tuple(n - (k == slot) for k, n in enumerate(depths))
                try:
                    found = run(plans, adds | {i: less})  # type: ignore[dict-item]
                except HwError:
                    continue
                assert found.cycles >= planned.cycles and found.depths[i] == less


def test_a_queue_too_short_comes_to_a_standstill() -> None:
    """A kernel of five needs 2 lines and 3 positions of the map beside it; with fewer words nothing ever leaves."""
    network = around()
    plans = tuple(fast(network))
    needs = (2 * 5 + 3 - 1) * 3  # beats before the first sum: of each position 3, and of the last one all but its first
    (index,) = (i for i, spec in enumerate(network.specs) if spec.op == "add")
    assert flow(plans).depths[index][1] >= needs
    shortest = next(n for n in range(1, 99) if _moves(plans, index, n))
    assert needs - 4 <= shortest <= needs
    with pytest.raises(HwError, match="a queue is too short"):
        run(plans, {index: (WIRES, shortest - 1)})


def _moves(plans: tuple[Fold, ...], index: int, words: int) -> bool:
    try:
        run(plans, {index: (WIRES, words)})
    except HwError:
        return False
    return True


@pytest.mark.sim
@verilator
@pytest.mark.parametrize("name", NETWORKS)
def test_verilator_finds_nothing_to_say(name: str, tmp_path: Path) -> None:
    """-Wall is quiet about whole designs, wrapper included."""
    network = NETWORKS[name]()
    emitted(network, random_folds(network, 1), tmp_path / "x")
    lint(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ("conv0",)}, "layer 'sum1' reads 1 layers; an add reads two"),
        ({"sources": ("conv0", "later")}, "layer 'sum1' reads 'later', which is no layer before it"),
        ({"sources": ("conv2", "conv2")}, "layer 'sum1' reads uint5, but gets int5"),
        ({"second": None}, "a second input goes with op add"),
    ],
)
def test_networks_that_do_not_meet_are_refused(change: dict[str, object], message: str) -> None:
    """One line that names the layer and what is wrong."""
    network = residual()
    layers = list(network.products)
    with pytest.raises(HwError, match=message):
        layers[3] = dataclasses.replace(layers[3], spec=dataclasses.replace(layers[3].spec, **change))
        Network(tuple(layers))


def test_results_that_nobody_reads_are_refused() -> None:
    """A layer beside the others whose results go nowhere."""
    network = residual()
    spare = product("spare", Window(6), 3, "int6", "int4", ("mean",))
    with pytest.raises(HwError, match="layer 'spare' is read by none"):
        head = dataclasses.replace(network.products[-1].spec, sources=("mean",))
        last = Layer(head, network.products[-1].codes, None)
        Network((*network.products[:-1], spare, last))


def test_operands_are_integers() -> None:
    """Minifloats are added by no adder here."""
    with pytest.raises(HwError, match="op add in hardware reads integers, not e2m2"):
        joint_fold(dataclasses.replace(parted().specs[2], act=parse("e2m2")), 1)
