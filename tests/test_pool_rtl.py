"""Maxima and averages over windows in Verilog: exact, on time, alone and between convolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from test_conv_rtl import CHAINS, residual
from test_conv_rtl import image_policy as conv_policy
from test_joint_rtl import NETWORKS as BRANCHES
from test_joint_rtl import SAME, add, mean
from tiny_designs import (
    DEVICE,
    bench,
    chain,
    emitted,
    icarus,
    lint,
    made,
    needs_yosys,
    product,
    prove,
    prove_price,
    prove_with_pauses,
    random_folds,
    verilator,
)  # fmt: skip
from torch import nn
from torch.nn import functional

from hwmodel import emit_conv, emit_stage, joint, pool, simulate
from hwmodel.affine import solved
from hwmodel.cli import read_specs
from hwmodel.cost import HwError
from hwmodel.estimate import estimate
from hwmodel.flow import interval
from hwmodel.folding import pool_fold
from hwmodel.formats import bits, decode, encode, parse
from hwmodel.network import Layer, Network, greatest, reference, sample_codes
from hwmodel.plan import plan_network, plan_streams, total, total_cycles
from hwmodel.spec import LayerSpec, PerTensor, Window
from quantkit.artifact import save_artifact
from quantkit.export import export_onnx
from quantkit.model import Calib, Model
from quantkit.recipe import Recipe, make_plan, quantize, uniform
from quantkit.rtl_conv import designs_of, has_convolutions, input_codes, outputs, seen
from quantkit.rtl_designs import write_designs
from quantkit.rtl_export import hardware_specs, network_of
from quantkit.targets import Target

WINDOWS = {
    "halves": Window(6, 6, 8, (2, 2), (2, 2)),
    "overlaps": Window(4, 7, 6, (3, 3), (2, 2), (1, 1, 1, 1)),
    "a row": Window(3, 1, 12, (1, 3), (1, 2)),
    "left over": Window(2, 7, 7, (2, 3), (3, 3)),
    "one channel": Window(1, 5, 5, (3, 2), (1, 1), (1, 1, 0, 1)),
    "beyond the map": Window(2, 5, 5, (2, 2), (2, 2), (0, 1, 0, 1)),
}


def maximum(name: str, window: Window, act: str, sources: tuple[str, ...] = ()) -> Layer:
    """The greatest code of every channel in each window."""
    channels, fmt, taps = window.channels, parse(act), window.kernel[0] * window.kernel[1]
    positions = window.out_height * window.out_width
    spec = LayerSpec(
        name, "max", channels, taps, positions, joint.ONES, fmt, fmt, PerTensor(), acc_bits=32, groups=channels,
        window=window, sources=sources,
    )  # fmt: skip
    return Layer(spec, np.ones((channels, taps), np.int64), None)


def average(name: str, window: Window, act: str, out: str, seed: int = 5) -> Layer:
    """The mean of every channel in each window, with random thresholds behind it."""
    taps, one = window.kernel[0] * window.kernel[1], dataclasses.replace(window, channels=1)
    spec = LayerSpec(
        name, "average", 1, taps, window.out_height * window.out_width, joint.ONES, parse(act), parse(out), PerTensor(),
        window=one,
    )  # fmt: skip
    return made(spec, np.ones((1, taps), np.int64), window.channels, seed)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("act", ["uint4", "int4", "e2m1", "e3m0", "ternary", "binary"])
def test_the_reference_is_torchs_max_pool(name: str, act: str) -> None:
    """Greatest codes are the codes of the greatest numbers, padding left out as torch does."""
    window, fmt = WINDOWS[name], parse(act)
    network = Network((maximum("pool", window, act),))
    codes = sample_codes(network, 6, seed=3)
    values = torch.tensor([[decode(int(c), fmt) for c in row] for row in codes])
    maps = values.reshape(-1, window.height, window.width, window.channels).permute(0, 3, 1, 2)
    top, bottom, left, right = window.padding
    padded = torch.nn.functional.pad(maps, (left, right, top, bottom), value=-torch.inf)
    want = torch.nn.functional.max_pool2d(padded, window.kernel, window.stride).permute(0, 2, 3, 1)
    got = [[decode(int(c), fmt) for c in row] for row in greatest(network.specs[0], codes)]
    assert np.array_equal(np.array(got), want.reshape(len(codes), -1).numpy())


@pytest.mark.parametrize("act", ["uint4", "int4"])
def test_the_reference_is_torchs_average_pool(act: str) -> None:
    """Sums of codes are those of torch's averages, zeros outside the map counted."""
    window, fmt = WINDOWS["overlaps"], parse(act)
    layer = average("pool", window, act, "uint5")
    codes = sample_codes(Network((layer,)), 6, seed=3)
    maps = torch.tensor([[decode(int(c), fmt) for c in row] for row in codes])
    maps = maps.reshape(-1, window.height, window.width, window.channels).permute(0, 3, 1, 2)
    sums = 9 * torch.nn.functional.avg_pool2d(maps, 3, 2, padding=1).permute(0, 2, 3, 1).reshape(len(codes), -1)
    assert layer.thresholds is not None
    want = [[encode(float(np.searchsorted(layer.thresholds[0], round(s), side="right")), parse("uint5")) for s in row]
            for row in sums.tolist()]  # fmt: skip
    assert np.array_equal(reference(Network((layer,)), codes), want)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("act", ["uint4", "int3", "e2m1"])
def test_every_maximum_is_exact_and_on_time(name: str, act: str, tmp_path: Path) -> None:
    """Strides, padding and channels at once: codes equal the reference and cycles the plan."""
    network = Network((maximum("pool", WINDOWS[name], act),))
    plans = random_folds(network, bits(parse(act)))
    prove(tmp_path / "x", emitted(network, plans, tmp_path / "x"), n=6)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize(("act", "out"), [("uint4", "uint3"), ("int3", "e2m1")])
def test_every_average_is_exact_and_on_time(name: str, act: str, out: str, tmp_path: Path) -> None:
    """Sums, converted: codes equal the reference and cycles the plan."""
    network = solved(Network((average("pool", WINDOWS[name], act, out),)))
    prove(tmp_path / "x", emitted(network, random_folds(network, 1), tmp_path / "x"), n=6)


def lenet() -> Network:
    """Convolutions, each with a maximum behind it, and a dense layer that reads the map."""
    return solved(Network((
        product("conv1", Window(1, 9, 8, *SAME), 4, "int4", "uint4"),
        maximum("pool1", Window(4, 9, 8, (2, 2), (2, 2)), "uint4"),
        product("conv2", Window(4, 4, 4, *SAME), 6, "uint4", "int3"),
        maximum("pool2", Window(6, 4, 4, (3, 3), (2, 2), (1, 1, 1, 1)), "int3"),
        product("head", Window(6, 2, 2, (2, 2)), 3, "int3", None),
    )))  # fmt: skip


def parted() -> Network:
    """A maximum beside a convolution with a stride of two, their sum, an average, and a mean."""
    halving = ((3, 3), (2, 2), (1, 1, 1, 1))
    return solved(Network((
        product("stem", Window(2, 8, 7, *SAME), 4, "int4", "uint4"),
        product("down", Window(4, 8, 7, *halving), 4, "uint4", "int5"),
        maximum("pool", Window(4, 8, 7, *halving), "uint4", ("stem",)),
        add("sum", (4, 4, 4), ("int5", "uint4"), (1, 2), "uint5", ("down", "pool")),
        average("average", Window(4, 4, 4, (2, 2), (1, 1)), "uint5", "uint4"),
        mean("mean", (4, 3, 3), "uint4", "int6"),
        product("head", Window(4), 3, "int6", None),
    )))  # fmt: skip


NETWORKS = {"lenet": lenet, "parted": parted}


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_designs_are_exact_and_on_time(name: str, seed: int, tmp_path: Path) -> None:
    """At random folds every result is the reference's, and the cycles are those of the plan."""
    network = NETWORKS[name]()
    prove(tmp_path / "x", emitted(network, random_folds(network, seed), tmp_path / "x"), n=4)


FOLLOWING = """`timescale 1ns/1ps
module testbench;
  reg clk = 0, rst = 1, in_valid = 0;
  wire in_ready, out_valid;
  reg [{wide}-1:0] in_codes = 0;
  wire [{out}-1:0] out_results;
  policy dut (clk, rst, in_valid, in_ready, in_codes, out_valid, 1'b1, out_results);
  always #5 clk = ~clk;
  reg [{wide}-1:0] words [0:{beats}-1];
  integer sent = 0, got = 0, at = 0;
  initial begin
    $readmemh("words.txt", words);
    repeat (4) @(negedge clk);
    rst = 0;
    while (got < {each} * {maps} && at < 100000) begin
      in_valid = sent < {beats};
      if (in_valid) in_codes = words[sent];
      #1;
      if (out_valid) got = got + 1;
      if (out_valid && got % {each} == 0) $display("%0d", at);
      if (in_valid && in_ready) sent = sent + 1;
      at = at + 1;
      @(negedge clk);
    end
    $finish;
  end
endmodule
"""


@pytest.mark.sim
@icarus
@pytest.mark.parametrize(
    "name", [*NETWORKS, pytest.param("residual", marks=pytest.mark.slow), "around", "lines that nothing reads"]
)
def test_maps_that_follow_each_other_take_the_interval(name: str, tmp_path: Path) -> None:
    """Map behind map without a pause: every result but the first comes the planned interval behind the one before."""
    network = (NETWORKS | BRANCHES)[name]() if name in NETWORKS | BRANCHES else chain(CHAINS[name])
    folder, maps = tmp_path / "x", 4
    plans = emitted(network, random_folds(network, 1), folder)
    wide, lanes = bits(network.products[0].formats[1]), plans[0].lanes
    words = sample_codes(network, maps, seed=2).reshape(-1, lanes)
    lines = [f"{sum(int(code) << (k * wide) for k, code in enumerate(word)):x}" for word in words]
    (folder / "words.txt").write_text("\n".join(lines) + "\n")
    out = plans[-1].units * emit_stage.result_bits(network.products[-1])
    each = emit_conv.beats_out(plans[-1])
    numbers = {"wide": wide * lanes, "out": out, "beats": len(words), "each": each, "maps": maps}
    ends = [int(at) for (at,) in bench(folder, FOLLOWING, numbers)]
    assert np.diff(ends).tolist() == [interval(tuple(plans))] * (maps - 1)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", NETWORKS)
def test_pauses_change_nothing(name: str, tmp_path: Path) -> None:
    """Input that pauses and results that wait leave every result right."""
    network = NETWORKS[name]()
    prove_with_pauses(tmp_path / "x", emitted(network, random_folds(network, 4), tmp_path / "x"))


@pytest.mark.sim
@verilator
@pytest.mark.parametrize("name", NETWORKS)
def test_verilator_finds_nothing_to_say(name: str, tmp_path: Path) -> None:
    """-Wall is quiet about whole designs, wrapper included."""
    network = NETWORKS[name]()
    emitted(network, random_folds(network, 1), tmp_path / "x")
    lint(tmp_path / "x")


@pytest.mark.sim
@needs_yosys
@pytest.mark.parametrize("family", ["xc7", "ecp5"])
def test_the_estimate_is_near_yosys(family: str, tmp_path: Path) -> None:
    """A maximum within a quarter of Yosys' LUTs and flip-flops, block RAMs equal."""
    network = Network((maximum("pool", Window(8, 12, 12, (2, 2), (2, 2)), "uint8"),))
    prove_price(network, lambda spec: pool_fold(spec, 4), family, tmp_path)


def test_sabotage_padding_with_zeros_is_found() -> None:
    """Where all codes around are negative, a zero outside the map would be the greatest."""
    window = WINDOWS["overlaps"]
    spec = maximum("pool", window, "int4").spec
    codes = np.full((1, 4 * 7 * 6), encode(-3.0, parse("int4")))
    assert set(greatest(spec, codes).ravel()) == {encode(-3.0, parse("int4"))}
    assert pool.least(parse("int4")) == encode(-8.0, parse("int4"))


def test_what_is_no_pool_is_refused() -> None:
    """One line that names the layer and what is wrong."""
    layer = maximum("pool", WINDOWS["halves"], "uint4")
    with pytest.raises(HwError, match="layer 'pool': op max gives codes that it read, uint4, without thresholds"):
        Layer(dataclasses.replace(layer.spec, out=parse("uint3")), layer.codes, None)
    with pytest.raises(HwError, match="op average in hardware reads integers, not e2m1"):
        pool_fold(dataclasses.replace(average("pool", WINDOWS["halves"], "uint4", "uint4").spec, act=parse("e2m1")), 1)


# ---------------------------------------------------------------------------------------------------
# From quantized networks


class LeNet(nn.Module):
    """Two convolutions, each with a maximum behind its activation, or before it, and two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 5, padding=2), nn.Conv2d(4, 6, 3)
        self.pool = nn.MaxPool2d(2)
        self.dense, self.head = nn.Linear(6 * 2, 10), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.first(x)))
        x = torch.relu(self.pool(self.second(x)))
        return self.head(torch.tanh(self.dense(torch.flatten(x, 1))))


class Signed(nn.Module):
    """A padded maximum of values of both signs, with a convolution behind that pads zeros; ceil mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 2, padding=1), nn.Linear(6 * 4 * 3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(self.first(x), 3, 2, 1)
        x = functional.max_pool2d(torch.tanh(self.second(x)), 2, 2, ceil_mode=True)
        return self.head(x.flatten(1))


class Averages(nn.Module):
    """A stem with a maximum that two branches read, their sum, and averages over windows, padded and not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 6, 1),
        )
        self.halves, self.short = nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1)
        self.head = nn.Linear(6 * 3 * 2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(torch.relu(self.stem(x)), 2, 1)
        x = torch.relu(x + self.left(x))
        return self.head(self.halves(self.right(self.short(x))).flatten(1))


def quantized(kind: type[nn.Module], weights: str = "int4", acts: str = "int5") -> tuple[Model, torch.Tensor]:
    """A network with its sums and averages of integers, and inputs for it."""
    torch.manual_seed(3)
    module, images = kind().eval(), torch.randn(40, 1, 14, 10)
    model = Model(module, images[:1], meta={"kind": "module"})
    return quantize(
        model, Recipe((("*", make_plan(weights, acts, "row")),), (("joints", {}),), 0), Calib(images)
    ), images


@pytest.mark.parametrize("kind", [LeNet, Signed, Averages])
@pytest.mark.parametrize(
    ("weights", "acts"), [("int4", "int5"), ("e2m1", "int4"), ("ternary", "e2m2"), ("int8", "int8")]
)
def test_one_design_says_what_the_network_says(kind: type[nn.Module], weights: str, acts: str) -> None:
    """From input codes to float outputs the integers of the one design are the simulator's, bit for bit."""
    if kind is Averages and acts == "e2m2":
        pytest.skip("averages are of integers")
    model, images = quantized(kind, weights, acts)
    ((design,), after), layers = designs_of(model), model.qlayers()
    assert design.before == after == ()
    assert [s.name for s in design.network.specs if not s.joint and not s.pool] == list(layers)
    first, last = design.parts[0], design.parts[-1]
    codes = input_codes(first, layers[first.name], seen(model, images)[first.name][0])
    with torch.inference_mode():
        want = model.module(images).numpy()
    assert np.array_equal(outputs(last, layers[last.name], reference(design.network, codes)), want)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("kind", [LeNet, Averages])
def test_the_emitted_network_is_exact_and_on_time(kind: type[nn.Module], tmp_path: Path) -> None:
    """The Verilog of the one design says what the simulator says, in the cycles of its plan."""
    model, images = quantized(kind)
    (design,), _ = designs_of(model)
    (plans,) = plan_streams([design.network.specs], DEVICE, latency_us=80)
    (tmp_path / "x").mkdir()
    emit_conv.write(design.network, plans, tmp_path / "x", DEVICE)
    layers, first, last = model.qlayers(), design.parts[0], design.parts[-1]
    codes = input_codes(first, layers[first.name], seen(model, images[:3])[first.name][0])
    with simulate.Simulation(tmp_path / "x", "iverilog") as rtl:
        found = rtl.run(codes)
    assert set(found.cycles.tolist()) == {total_cycles(plans)}
    with torch.inference_mode():
        assert np.array_equal(outputs(last, layers[last.name], found.sums), model.module(images[:3]).numpy())


def image_policy() -> Model:
    """Two convolutions, two linear layers, a tanh."""
    return conv_policy("int4", "int5")[0]


def several() -> Model:
    """A network in three designs: its sum and its mean are of float numbers."""
    return residual()[0]


def perceptron() -> Model:
    """A policy of linear layers, which do not overlap."""
    model, calib = tiny_models.policy()
    return quantize(model, uniform("int4", "int4"), calib)


@pytest.mark.parametrize(
    "make", [lambda: quantized(LeNet)[0], lambda: quantized(Averages)[0], image_policy, several, perceptron]
)
def test_artifact_file_and_design_say_the_same(make: Callable[[], Model], tmp_path: Path) -> None:
    """Cycles and LUTs that `hwmodel estimate` reads from the artifact, the ONNX file and the Verilog are the plan's.

    So are those that a study prices a design at, given the same specs.
    """
    model = make()
    model.meta["factory"] = "anywhere:anything"
    save_artifact(model, tmp_path / "q")
    export_onnx(model, tmp_path / "x.onnx")
    paths = [tmp_path / "q", tmp_path / "x.onnx"]
    if has_convolutions(model):
        facts = write_designs(model, new(tmp_path / "rtl"), DEVICE)
        want = facts["cycles"], facts["luts"], facts["interval"]
        paths.append(tmp_path / "rtl")
    else:
        network, _ = network_of(model)
        plans = plan_network(network, DEVICE)
        want = total_cycles(plans), total(plans).luts, None
    for path in paths:
        found = estimate(read_specs(path), DEVICE)
        assert (found.cycles, found.luts, found.interval) == want, path
    guess = Target(DEVICE).price(hardware_specs(model), interval=False)
    assert (guess.cycles, guess.luts, guess.interval) == (*want[:2], None)


def new(path: Path) -> Path:
    """A new directory."""
    path.mkdir()
    return path
