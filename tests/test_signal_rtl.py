"""Networks of signals in Verilog: convolutions and pools of one axis are those of maps of width 1."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from test_hwmodel_onnx import silent
from tiny_designs import DEVICE, convolution, emitted, icarus, lint, prove, random_folds, verilator
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

from hwmodel import conv, simulate
from hwmodel.cli import read_specs
from hwmodel.cost import HwError
from hwmodel.estimate import estimate
from hwmodel.folding import layer_fold
from hwmodel.network import reference
from hwmodel.onnx_specs import read_onnx
from hwmodel.spec import Window
from quantkit.artifact import save_artifact
from quantkit.capture import captured
from quantkit.cli import app
from quantkit.export import export_onnx
from quantkit.joints import sites
from quantkit.model import Calib, Model
from quantkit.recipe import Recipe, make_plan, quantize
from quantkit.rtl_conv import designs_of, input_codes, outputs, seen
from quantkit.rtl_export import hardware_specs


class Network1d(nn.Module):
    """A network of signals; or, `flat`, of the same numbers as maps of width 1, layer by layer."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat

    def layer(self, inputs: int, rows: int, size: int, stride: int = 1, padding: int = 0, groups: int = 1) -> nn.Module:
        """A convolution."""
        if self.flat:
            return nn.Conv2d(inputs, rows, (size, 1), (stride, 1), (padding, 0), groups=groups)
        return nn.Conv1d(inputs, rows, size, stride, padding, groups=groups)

    def pool(self, x: torch.Tensor, kind: str, size: int, padding: int = 0) -> torch.Tensor:
        """A "max" or an "avg" over windows, every other one."""
        over = getattr(functional, f"{kind}_pool{1 + self.flat}d")
        return over(x, (size, 1), (2, 1), (padding, 0)) if self.flat else over(x, size, 2, padding)

    def pad(self, x: torch.Tensor, before: int, behind: int) -> torch.Tensor:
        """Zeros at the ends."""
        return functional.pad(x, (0, 0, before, behind) if self.flat else (before, behind))


class Chain(Network1d):
    """Strides, a depthwise layer, maxima, one padded, and a dense layer that reads all of it."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__(flat)
        self.first, self.second = self.layer(2, 6, 5, 2, 2), self.layer(6, 6, 3, padding=1, groups=6)
        self.third, self.head = self.layer(6, 8, 3), nn.Linear(8 * 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.first(x)), "max", 3, padding=1)
        x = torch.relu(self.second(x))
        return self.head(self.pool(torch.tanh(self.third(x)), "max", 2).flatten(1))


class Branched(Network1d):
    """A sum around two convolutions, an average over windows, uneven padding, and a mean over time."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__(flat)
        self.stem, self.left, self.right = (
            self.layer(2, 4, 3, padding=1),
            self.layer(4, 4, 5, padding=2),
            self.layer(4, 4, 1),
        )
        self.last, self.head = self.layer(4, 6, 3, 2), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = self.pool(torch.relu(x + self.right(torch.relu(self.left(x)))), "avg", 2)
        x = torch.relu(self.last(self.pad(x, 2, 0)))
        return self.head(x.mean((2, 3)) if self.flat else x.mean(-1))


KINDS = [Chain, Branched]


def quantized(kind: type[Network1d], weights: str = "int4", acts: str = "int5") -> tuple[Model, torch.Tensor]:
    """A network with its sums and averages of integers, and signals for it."""
    torch.manual_seed(3)
    signals = torch.randn(40, 2, 24)
    model = Model(kind().eval(), signals[:2], meta={"kind": "module", "factory": f"{__name__}:{kind.__name__}"})
    recipe = Recipe((("*", make_plan(weights, acts, "row")),), (("joints", {}),), 0)
    return quantize(model, recipe, Calib(signals)), signals


def as_maps(kind: type[Network1d], weights: str, acts: str) -> Model:
    """The same weights as layers of maps of width 1, quantized alike; torch's sums of floats differ in their last bits,
    so scales of inputs are those of the signals."""
    model, signals = quantized(kind, weights, acts)
    torch.manual_seed(3)
    torch.randn(40, 2, 24)
    one, other = kind().eval(), kind(flat=True).eval()
    own = one.state_dict()
    other.load_state_dict({k: own[k].reshape(v.shape) for k, v in other.state_dict().items()})
    recipe = Recipe((("*", make_plan(weights, acts, "row")),), (("joints", {}),), 0)
    maps = signals[..., None]
    twin = quantize(Model(other, maps[:2], meta={"kind": "module"}), recipe, Calib(maps))
    for theirs, ours in ((twin.qlayers(), model.qlayers()), (twin.points(), model.points())):
        for name, held in theirs.items():
            assert held.act is not None and abs(held.act.scale / ours[name].act.scale - 1) < 1e-5  # type: ignore[union-attr]
            held.set_act(ours[name].act)
    return twin


def facts(model: Model) -> tuple[list[object], list[object]]:
    """The integers of the one design, and its specs, without names."""
    ((design,), after) = designs_of(model)
    assert design.before == after == ()
    layers = [
        [layer.codes.tolist(), None if layer.thresholds is None else layer.thresholds.tolist()]
        for layer in design.network.products
    ]
    return layers, [dataclasses.replace(spec, name="", sources=()) for spec in design.network.specs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("weights", "acts"), [("int4", "int5"), ("ternary", "int8")])
def test_a_signal_is_a_map_of_width_1(kind: type[Network1d], weights: str, acts: str) -> None:
    """Codes, thresholds, windows and links are those of the same network written with layers of maps."""
    model, signals = quantized(kind, weights, acts)
    twin = as_maps(kind, weights, acts)
    assert model.module(signals).equal(twin.module(signals[..., None]))
    assert facts(model) == facts(twin)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("weights", "acts"), [("int4", "int5"), ("e2m1", "int4"), ("int8", "int8")])
def test_one_design_says_what_the_network_says(kind: type[Network1d], weights: str, acts: str) -> None:
    """From input codes to float outputs the integers of the one design are the simulator's, bit for bit."""
    model, signals = quantized(kind, weights, acts)
    ((design,), _), layers = designs_of(model), model.qlayers()
    first, last = design.parts[0], design.parts[-1]
    codes = input_codes(first, layers[first.name], seen(model, signals)[first.name][0])
    with torch.inference_mode():
        want = model.module(signals).numpy()
    assert np.array_equal(outputs(last, layers[last.name], reference(design.network, codes)), want)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_writes_one_design(kind: type[Network1d], tmp_path: Path) -> None:
    """The Verilog that `quantkit rtl` writes gives the numbers of onnxruntime on the exported file.

    It takes the cycles of its plan, which are those that `hwmodel estimate` reads from artifact, file and design.
    """
    model, signals = quantized(kind)
    save_artifact(model, tmp_path / "q")
    export_onnx(model, tmp_path / "x.onnx")
    command = ["rtl", str(tmp_path / "q"), "--factory", model.meta["factory"], "-o", str(tmp_path / "rtl"), "--json"]
    done = CliRunner().invoke(app, [*command, "--latency-us", "20"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    (design,), _ = designs_of(model)
    layers, first, last = model.qlayers(), design.parts[0], design.parts[-1]
    codes = input_codes(first, layers[first.name], seen(model, signals[:4])[first.name][0])
    with simulate.Simulation(tmp_path / "rtl", "iverilog") as rtl:
        found = rtl.run(codes)
    assert set(found.cycles.tolist()) == {told["cycles"]}
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {session.get_inputs()[0].name: signals[:4].numpy()})
    assert np.array_equal(outputs(last, layers[last.name], found.sums), want)
    for path in (tmp_path / "q", tmp_path / "x.onnx", tmp_path / "rtl"):
        assert estimate(read_specs(path), DEVICE, latency_us=20).cycles == told["cycles"]


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_read_from_a_file(kind: type[Network1d], tmp_path: Path) -> None:
    """A file that says nothing of its hardware tells the windows of its convolutions and maxima all the same."""
    model, _ = quantized(kind)
    export_onnx(model, tmp_path / "x.onnx")
    silent(tmp_path / "x.onnx")
    if kind is Branched:
        with pytest.raises(HwError, match="expected a chain"):
            read_onnx(tmp_path / "x.onnx")
        return
    want = hardware_specs(model)
    assert [spec.op for spec in want] == ["conv2d", "max", "conv2d", "conv2d", "max", "linear"]
    found = read_onnx(tmp_path / "x.onnx")
    keys = ("op", "out_features", "in_features", "positions", "groups", "weight", "act", "out", "acc_bits", "window")
    assert [[getattr(s, k) for k in keys] for s in found] == [[getattr(s, k) for k in keys] for s in want]


CASES = {
    "same": (Window(4, 11, 1, (3, 1), (1, 1), (1, 1, 0, 0)), 6, 1, (3, 2)),
    "stride": (Window(2, 17, 1, (5, 1), (3, 1), (2, 1, 0, 0)), 4, 1, (4, 1)),
    "stride beyond the kernel": (Window(3, 13, 1, (1, 1), (4, 1)), 4, 1, (2, 3)),
    "depthwise": (Window(6, 9, 1, (3, 1), (1, 1), (1, 1, 0, 0)), 6, 6, (3, 1)),
    "groups": (Window(4, 9, 1, (4, 1), (2, 1), (3, 0, 0, 0)), 6, 2, (1, 2)),
    "whole": (Window(3, 8, 1, (8, 1)), 5, 1, (5, 3)),
}


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("out", [None, "uint4"])
def test_every_window_is_exact_and_on_time(name: str, out: str | None, tmp_path: Path) -> None:
    """Strides, padding, groups and folds: results equal the reference and cycles the estimate."""
    window, rows, groups, fold = CASES[name]
    network = convolution(window, rows, groups=groups, out=out)
    prove(tmp_path / "x", emitted(network, [layer_fold(network.specs[0], *fold)], tmp_path / "x"))


@pytest.mark.sim
@verilator
def test_verilator_agrees_and_finds_nothing_to_say(tmp_path: Path) -> None:
    """The second simulator gives the same codes and cycles, and -Wall is quiet."""
    (design,), _ = designs_of(quantized(Branched)[0])
    plans = emitted(design.network, random_folds(design.network, 1), tmp_path / "x")
    prove(tmp_path / "x", plans, n=3, tool="verilator")
    lint(tmp_path / "x")


def test_a_signal_takes_no_more_memory_than_its_kernel() -> None:
    """The ring holds kernel and stride, however long the signal is."""
    rings = [
        conv.ring(spec, layer_fold(spec, 2, 2).stream)
        for length in (50, 5000)
        for spec in convolution(Window(2, length, 1, (5, 1), (2, 1)), 4).specs
    ]
    assert rings[0] == rings[1] and rings[0].depth == 5 + 2


def test_a_mean_over_features_is_no_mean_of_a_signal() -> None:
    """A normalization over the last axis of a sequence gets no operand of integers; a mean over time behind it does."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.line, self.head = nn.Linear(6, 6), nn.Conv1d(6, 4, 3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.mix(x)
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            return self.head(torch.relu(self.line(x.transpose(1, 2))).mean(2))

    found = captured(Model(Normed().eval(), torch.randn(2, 9, 6), meta={"kind": "module"}))
    assert [node.name for node in sites(found.module.graph)] == ["relu"]  # type: ignore[arg-type, union-attr]
