"""Convolutions in Verilog: exact against a slow convolution, on time to the cycle, whatever the fold."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_emit import random_thresholds

from hwmodel import emit_conv, simulate
from hwmodel.accumulator import exact_bits
from hwmodel.affine import solved
from hwmodel.devices import find_device
from hwmodel.folding import Fold, folds, layer_fold
from hwmodel.formats import parse
from hwmodel.network import Layer, Network, legal_codes, sample_codes
from hwmodel.plan import total_cycles
from hwmodel.reference import to_units
from hwmodel.spec import LayerSpec, Window

DEVICE = find_device("xc7a35t")
icarus = pytest.mark.skipif(not shutil.which("iverilog"), reason="iverilog is not installed (apt-get install iverilog)")


def convolution(
    window: Window, rows: int, *, groups: int = 1, weights: str = "int4", acts: str = "int4", out: str | None = None
) -> Network:
    """A layer with random codes and, before an output format, random ascending thresholds."""
    rng = np.random.default_rng(5)
    weight, act = parse(weights), parse(acts)
    columns = window.channels // groups * window.kernel[0] * window.kernel[1]
    codes = rng.choice(legal_codes(weight), size=(rows, columns))
    width = int(exact_bits(to_units(codes, weight), act).max())
    positions = window.out_height * window.out_width
    spec = LayerSpec(
        "conv", "conv2d", rows, columns, positions, weight, act, acc_bits=width, groups=groups, window=window
    )
    bare = Layer(spec, codes, None)
    if out is None:
        return Network((bare,))
    to = parse(out)
    table = random_thresholds(bare, to, rng, 0.5)
    return solved(Network((Layer(dataclasses.replace(spec, out=to), codes, table),)))


def emitted(network: Network, fold: tuple[int, int], folder: Path) -> Fold:
    """Write the layer at PE x SIMD."""
    plan = layer_fold(network.specs[0], *fold)
    folder.mkdir()
    emit_conv.write(network, [plan], folder, DEVICE)
    return plan


def prove(folder: Path, network: Network, plan: Fold, n: int = 6, tool: str = "iverilog") -> None:
    """The simulation equals the reference on every map and takes the planned cycles."""
    found = simulate.check(folder, sample_codes(network, n, seed=5), tool)
    assert found.mismatch is None
    assert (found.cycles_min, found.cycles_max) == (plan.cycles, plan.cycles)


CASES = {
    "same": (Window(4, 6, 5, (3, 3), (1, 1), (1, 1, 1, 1)), 6, 1, (3, 2)),
    "serial": (Window(3, 5, 4, (3, 2), (1, 1), (1, 1, 0, 1)), 2, 1, (1, 1)),
    "parallel": (Window(4, 6, 5, (3, 3), (1, 1), (1, 1, 1, 1)), 6, 1, (6, 4)),
    "stride": (Window(4, 9, 8, (3, 3), (2, 2), (0, 1, 0, 1)), 4, 1, (4, 4)),
    "stride beyond the kernel": (Window(2, 9, 9, (1, 1), (2, 3)), 4, 1, (2, 1)),
    "pointwise": (Window(6, 4, 5), 8, 1, (8, 6)),
    "depthwise": (Window(6, 6, 5, (3, 3), (1, 1), (1, 1, 1, 1)), 6, 6, (3, 1)),
    "depthwise at once": (Window(6, 6, 5, (3, 3), (2, 1), (1, 1, 1, 1)), 6, 6, (6, 1)),
    "two rows a channel": (Window(3, 5, 5, (3, 3), (1, 1), (1, 1, 1, 1)), 6, 3, (2, 1)),
    "groups": (Window(8, 5, 5, (3, 3), (1, 1), (1, 1, 1, 1)), 6, 2, (3, 2)),
    "tall first": (Window(1, 14, 6, (10, 4), (2, 2), (4, 5, 1, 1)), 8, 1, (8, 1)),
    "kernel above the map": (Window(2, 3, 3, (5, 5), (1, 1), (2, 2, 2, 2)), 4, 1, (2, 2)),
    "dense": (Window(24), 6, 1, (3, 8)),
    "flattened map": (Window(4, 3, 3, (3, 3)), 5, 1, (5, 2)),
}


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("out", [None, "uint4"])
def test_every_window_is_exact_and_on_time(name: str, out: str | None, tmp_path: Path) -> None:
    """Strides, padding, groups and folds: results equal the reference and cycles the estimate."""
    window, rows, groups, fold = CASES[name]
    network = convolution(window, rows, groups=groups, out=out)
    prove(tmp_path / "x", network, emitted(network, fold, tmp_path / "x"))


def chain(layers: list[tuple[Window, int, int]], seed: int = 3) -> Network:
    """Layers in a row, uint4 between them."""
    made = []
    for i, (window, rows, groups) in enumerate(layers):
        out = "uint4" if i + 1 < len(layers) else None
        made.append(convolution(window, rows, groups=groups, acts="uint4" if i else "int4", out=out).layers[0])
    return solved(Network(tuple(made)))


CHAINS = {
    "two": [
        (Window(3, 7, 6, (3, 3), (1, 1), (1, 1, 1, 1)), 4, 1),
        (Window(4, 7, 6, (3, 3), (2, 2), (0, 1, 1, 1)), 6, 1),
    ],
    "separable": [
        (Window(1, 12, 6, (5, 4), (2, 2), (2, 2, 1, 1)), 6, 1),
        (Window(6, 6, 3, (3, 3), (1, 1), (1, 1, 1, 1)), 6, 6),
        (Window(6, 6, 3), 8, 1),
        (Window(8, 6, 3, (3, 3), (1, 1), (1, 1, 1, 1)), 8, 8),
        (Window(8, 6, 3, (6, 3)), 4, 1),
        (Window(4), 3, 1),
    ],
}  # fmt: skip


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("seed", range(3))
def test_chains_overlap_to_the_cycle(name: str, seed: int, tmp_path: Path) -> None:
    """Layers that stream into each other, at random folds: exact, and as many cycles as predicted."""
    network = chain(CHAINS[name])
    rng = np.random.default_rng(seed)
    plans = [folds(spec)[rng.integers(len(folds(spec)))] for spec in network.specs]
    folder = tmp_path / "x"
    folder.mkdir()
    emit_conv.write(network, plans, folder, DEVICE)
    found = simulate.check(folder, sample_codes(network, 4, seed=5), "iverilog")
    assert found.mismatch is None
    assert (found.cycles_min, found.cycles_max) == (total_cycles(plans), total_cycles(plans))
