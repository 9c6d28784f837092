"""Convolutions in Verilog: exact against a slow convolution, on time to the cycle, whatever the fold."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import small_policies
import tiny_models
import torch
from tiny_designs import (
    DEVICE,
    chain,
    convolution,
    emitted,
    icarus,
    lint,
    needs_yosys,
    prove,
    prove_price,
    prove_with_pauses,
    random_folds,
    streamed,
    verilator,
)  # fmt: skip
from torch import nn
from typer.testing import CliRunner

from hwmodel import conv, emit_conv, simulate
from hwmodel.cli import app as hwmodel_app
from hwmodel.cost import HwError
from hwmodel.folding import folds, layer_fold
from hwmodel.formats import decode, unit
from hwmodel.network import Network, read_network, reference, sample_codes
from hwmodel.plan import plan_streams, total, total_cycles
from hwmodel.spec import Window
from quantkit.artifact import save_artifact
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.recipe import Recipe, make_plan, quantize
from quantkit.rtl_conv import designs_of, input_codes, outputs, parts_of, seen
from quantkit.rtl_episodes import Pilot
from quantkit.specs import layer_specs


def slow_sums(network: Network, codes: np.ndarray) -> np.ndarray:
    """The sums of a layer by the definition of a convolution, one product at a time; in units of both formats."""
    spec, layer = network.specs[0], network.layers[0]
    window = spec.window
    assert window is not None and spec.weight is not None and spec.act is not None
    (kh, kw), (sh, sw), (top, _, left, _) = window.kernel, window.stride, window.padding
    shared = window.channels // spec.groups
    found = []
    for stream in codes:
        x = {}
        for at, code in enumerate(stream):
            position, channel = divmod(at, window.channels)
            x[channel, *divmod(position, window.width)] = round(decode(int(code), spec.act) / unit(spec.act))
        sums = []
        for oy in range(window.out_height):
            for ox in range(window.out_width):
                for row in range(spec.out_features):
                    first = row // (spec.out_features // spec.groups) * shared
                    total = 0
                    for column in range(spec.in_features):
                        channel, place = divmod(column, kh * kw)
                        ky, kx = divmod(place, kw)
                        value = x.get((first + channel, oy * sh - top + ky, ox * sw - left + kx), 0)
                        code = int(layer.codes[row, column])
                        total += value * round(decode(code, spec.weight) / unit(spec.weight))
                    sums.append(total)
        found.append(sums)
    return np.array(found)


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


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_definition(name: str) -> None:
    """The numpy reference equals five nested loops over the products, whatever stride, padding and groups."""
    window, rows, groups, _ = CASES[name]
    for weights, acts in (("int4", "int4"), ("e2m1", "uint3")):
        network = convolution(window, rows, groups=groups, weights=weights, acts=acts)
        codes = sample_codes(network, 4, seed=2)[2:]
        assert np.array_equal(reference(network, codes), slow_sums(network, codes))


@pytest.mark.parametrize("name", ["same", "stride", "depthwise", "groups", "tall first"])
def test_the_reference_is_onnxruntime(name: str) -> None:
    """ConvInteger of onnxruntime gives the same sums."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    window, rows, groups, _ = CASES[name]
    network = convolution(window, rows, groups=groups, weights="int8", acts="uint8")
    top, bottom, left, right = window.padding
    helper, types = onnx.helper, onnx.TensorProto
    weights = network.layers[0].units.astype(np.int8).reshape(rows, -1, *window.kernel)
    node = helper.make_node(
        "ConvInteger", ["x", "w"], ["y"], group=groups, strides=window.stride, pads=(top, left, bottom, right)
    )
    made = helper.make_model(
        helper.make_graph(
            [node], "g",
            [helper.make_tensor_value_info("x", types.UINT8, ("n", window.channels, window.height, window.width))],
            [helper.make_tensor_value_info("y", types.INT32, None)],
            [onnx.numpy_helper.from_array(weights, "w")],
        ),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    codes = sample_codes(network, 6, seed=2)
    x = codes.reshape(-1, window.height, window.width, window.channels).transpose(0, 3, 1, 2).astype(np.uint8)
    session = runtime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    assert np.array_equal(reference(network, codes), y.transpose(0, 2, 3, 1).reshape(len(codes), -1))


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
@icarus
@pytest.mark.parametrize(
    ("weights", "acts", "out"),
    [("e2m1", "e3m2", "e2m1"), ("ternary", "ternary", "int3"), ("int8", "uint8", "int8"), ("e4m3", "int5", None)],
)
def test_every_kind_of_format_is_exact(weights: str, acts: str, out: str | None, tmp_path: Path) -> None:
    """Minifloats, ternary and integers, padded."""
    window, rows, groups, fold = CASES["same"]
    network = convolution(window, rows, groups=groups, weights=weights, acts=acts, out=out)
    prove(tmp_path / "x", emitted(network, [layer_fold(network.specs[0], *fold)], tmp_path / "x"), n=4)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", ["same", "groups", "depthwise"])
def test_products_in_dsps_are_exact(name: str, tmp_path: Path) -> None:
    """Rows that share DSPs read the window, too; a depthwise layer keeps its products in LUTs."""
    window, rows, groups, fold = CASES[name]
    network = convolution(window, rows, groups=groups, out="uint4")
    plan = layer_fold(network.specs[0], *fold, port=25)
    assert (plan.pack is None) == (name == "depthwise")
    prove(tmp_path / "x", emitted(network, [plan], tmp_path / "x"))


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
    "lines that nothing reads": [
        (Window(2, 8, 7, (2, 2), (1, 1)), 3, 1),
        (Window(3, 7, 6, (1, 1), (3, 2)), 4, 1),
        (Window(4, 3, 3, (2, 2), (2, 2)), 2, 1),
    ],
}


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("seed", range(2))
def test_chains_overlap_to_the_cycle(name: str, seed: int, tmp_path: Path) -> None:
    """Layers that stream into each other, at random folds: exact, and as many cycles as predicted."""
    network = chain(CHAINS[name])
    prove(tmp_path / "x", emitted(network, random_folds(network, seed), tmp_path / "x"))


@pytest.mark.sim
@icarus
def test_pauses_change_nothing(tmp_path: Path) -> None:
    """Input that pauses and results that wait leave every result right."""
    network = chain(CHAINS["separable"])
    prove_with_pauses(tmp_path / "x", emitted(network, random_folds(network, 3), tmp_path / "x"))


@pytest.mark.sim
@icarus
def test_the_ring_never_reads_what_it_writes(tmp_path: Path) -> None:
    """Unknown values where a word is read while it is written reach no sum, so block RAMs may give anything there."""
    read = "else out <= cells[get];"
    for name, (window, rows, groups, fold) in CASES.items():
        network = convolution(window, rows, groups=groups)
        plans = emitted(network, [layer_fold(network.specs[0], *fold)], tmp_path / name)
        file = tmp_path / name / "rtl" / "window.v"
        text = file.read_text()
        assert text.count(read) == 2
        file.write_text(text.replace(read, f"else if (accept & (put == get)) out <= {{BITS{{1'bx}}}}; {read}"))
        prove(tmp_path / name, plans, n=4)
    file = tmp_path / "same" / "rtl" / "window.v"
    file.write_text(text.replace(read, f"else if (accept) out <= {{BITS{{1'bx}}}}; {read}"))
    with pytest.raises(simulate.SimulationError, match="undefined"):
        simulate.check(tmp_path / "same", sample_codes(read_network(tmp_path / "same"), 4), "iverilog")


@pytest.mark.sim
@icarus
def test_sabotage_a_changed_weight_is_found(tmp_path: Path) -> None:
    """One bit of one weight, and the simulation differs from the reference."""
    network, folder = chain(CHAINS["two"]), tmp_path / "x"
    emitted(network, [layer_fold(spec, 2, 1) for spec in network.specs], folder)
    path = folder / "layer1_weights.mem"
    words = path.read_text().split()
    words[4] = f"{int(words[4], 16) ^ 4:0{len(words[4])}x}"
    path.write_text("\n".join(words) + "\n")
    found = simulate.check(folder, sample_codes(network, 8, seed=5), "iverilog")
    assert found.mismatch is not None and "out_sums" in found.mismatch


@pytest.mark.sim
@verilator
@pytest.mark.parametrize("name", CHAINS)
def test_verilator_finds_nothing_to_say(name: str, tmp_path: Path) -> None:
    """-Wall is quiet about whole designs, wrapper included."""
    network = chain(CHAINS[name])
    for seed in range(2):
        emitted(network, random_folds(network, seed), tmp_path / str(seed))
        lint(tmp_path / str(seed))


@pytest.mark.sim
@icarus
def test_the_stream_wrapper_loses_nothing(tmp_path: Path) -> None:
    """AXI4-Streams with pauses on both sides: every sum in order, sign-extended, tlast behind each map."""
    network, folder = chain(CHAINS["two"]), tmp_path / "x"
    plans = emitted(network, [layer_fold(spec, 2, 1) for spec in network.specs], folder)
    codes = sample_codes(network, 5, seed=4)
    results, lasts, wrong = streamed(network, plans, folder, codes)
    assert np.array_equal(results, reference(network, codes))
    per = emit_conv.beats_out(plans[-1])
    assert lasts == [int(i % per == per - 1) for i in range(per * len(codes))]
    assert not any(wrong)


@pytest.mark.sim
@needs_yosys
@pytest.mark.parametrize("family", ["xc7", "ecp5"])
def test_the_estimate_is_near_yosys(family: str, tmp_path: Path) -> None:
    """A small layer within a quarter of Yosys' LUTs and flip-flops, block RAMs equal."""
    window, rows, groups, fold = CASES["same"]
    network = convolution(window, rows, groups=groups, out="uint4")
    prove_price(network, lambda spec: layer_fold(spec, *fold), family, tmp_path)


def test_stalls_are_waits_for_input() -> None:
    """A layer faster than its input takes the input's time; a slow one waits for nothing."""
    window = Window(4, 9, 8, (3, 3), (1, 1), (1, 1, 1, 1))
    fast = conv.schedule(window, words=4, lines=4, period=1, share=1)
    beats, positions = 9 * 8 * 4, 9 * 8
    assert fast.input_beats == beats
    assert fast.lead == (8 + 2) * 4  # the first line, and two positions of the second
    assert fast.lead + fast.stalls + positions - 1 == beats + 2 + 8 - 1  # behind the last beat: 2 positions, and a line
    assert conv.schedule(window, words=1, lines=4, period=9, share=1).stalls == 0


def test_targets_are_met() -> None:
    """Within the latency, within the LUTs; else the nearest design is named."""
    network = chain(CHAINS["separable"])
    slow = plan_streams([network.specs], DEVICE, latency_us=40)
    quick = plan_streams([network.specs], DEVICE, latency_us=10)
    assert total_cycles(quick[0]) <= 1000 < total_cycles(slow[0]) <= 4000
    assert total(slow[0]).luts < total(quick[0]).luts
    within = plan_streams([network.specs], DEVICE, luts=int(total(quick[0]).luts))
    assert total_cycles(within[0]) <= total_cycles(quick[0])
    with pytest.raises(HwError, match=r"cannot be met: the nearest is .* us .*, bound by layer 'conv' with \d+ cycles"):
        plan_streams([network.specs], DEVICE, latency_us=0.1)
    with pytest.raises(
        HwError, match=r"100 LUTs cannot be met: the nearest is .* \d+ LUTs\), bound by layer 'conv' with"
    ):
        plan_streams([network.specs], DEVICE, luts=100)


def test_the_nearest_design_of_a_small_part_is_named() -> None:
    """What a part lacks, and the fastest design that it holds, or that it holds none; the design named fits."""
    network = chain(CHAINS["separable"])
    need = int(total(plan_streams([network.specs], DEVICE, latency_us=10)[0]).luts)
    small = dataclasses.replace(DEVICE, luts=need - 1)
    with pytest.raises(HwError, match=rf"needs {need} luts, but .* has {need - 1}; .*; the nearest that fits") as error:
        plan_streams([network.specs], small, latency_us=10)
    assert error.match(r"bound by layer 'conv' with \d+ cycles at PE = \d+, SIMD = \d+$")
    (cycles,) = [int(n) for n in re.findall(r"takes \S+ us \((\d+) cycles", str(error.value))]
    again = plan_streams([network.specs], small, latency_us=cycles / 100)
    assert total_cycles(again[0]) == cycles and total(again[0]).luts < need
    with pytest.raises(HwError, match=r"none fits: the smallest needs \d+ luts, bound by layer 'conv' with \d+ LUTs"):
        plan_streams([network.specs], dataclasses.replace(DEVICE, luts=200), latency_us=10)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Window(2, 4, 4, (3, 3), (1, 1), (3, 0, 0, 0)), "positions that see no input"),
        (Window(2, 2, 4, (3, 3)), "does not fit a map of 2 x 4"),
        (Window(2, 4, 4, (3, 3), (1, 1), (0, 0, -1, 0)), "1 at least and padding 0"),
    ],
)
def test_impossible_windows_are_refused(window: Window, message: str) -> None:
    """One line that names the layer and what is wrong."""
    with pytest.raises(HwError, match=f"layer 'conv'.*{message}"):
        convolution(window, 2)
    with pytest.raises(HwError, match="a zero, which binary has not"):
        convolution(Window(2, 4, 4, (3, 3), (1, 1), (1, 1, 1, 1)), 2, acts="binary")


# ---------------------------------------------------------------------------------------------------
# From quantized networks


class Residual(nn.Module):
    """A convolution, a branch around two, a mean and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.right = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(nn.functional.pad(x, (0, 1, 0, 1))))
        x = torch.relu(x + self.right(torch.relu(self.left(x))))
        return self.head(x.mean((2, 3)))


def residual(weights: str = "int4", acts: str = "int6") -> tuple[Model, torch.Tensor]:
    """The network above, quantized, and inputs for it."""
    torch.manual_seed(3)
    images = torch.randn(40, 2, 6, 5)
    model = Model(Residual().eval(), images[:1], meta={"kind": "module"})
    return quantize(model, Recipe((("*", make_plan(weights, acts, "row")),), (), 0), Calib(images)), images


def tiny_cnn(weights: str, acts: str) -> tuple[Model, torch.Tensor]:
    """The tests' network with a depthwise and a grouped convolution."""
    model, calib = tiny_models.cnn()
    return quantize(model, Recipe((("*", make_plan(weights, acts, "row")),), (), 0), calib), calib.inputs


def image_policy(weights: str, acts: str) -> tuple[Model, torch.Tensor]:
    """Two convolutions, two linear layers, a tanh."""
    model = small_policies.conv(groups=2)
    calib = small_policies.calib(model)
    plan = (("*", make_plan(weights, acts, "row")),)
    return quantize(model, Recipe(plan, (), 0), calib), calib.inputs.float()


@pytest.mark.parametrize("made", [residual, tiny_cnn, image_policy])
@pytest.mark.parametrize(("weights", "acts"), [("int4", "int6"), ("e2m1", "e3m2"), ("int8", "int8")])
def test_every_layer_is_the_simulators(made: object, weights: str, acts: str) -> None:
    """Codes and float outputs behind the integers are those that the quantized network has inside, bit for bit."""
    model, images = made(weights, acts)  # type: ignore[operator]
    floats, layers = seen(model, images[:6]), model.qlayers()
    parts = {part.name: part for part in parts_of(model)}
    assert set(parts) == set(layers)
    for name, part in parts.items():
        results = reference(part.network, input_codes(part, layers[name], floats[name][0]))
        if part.to is None:
            assert np.array_equal(outputs(part, layers[name], results), floats[name][1].numpy())
        else:
            assert np.array_equal(results, input_codes(parts[part.to], layers[part.to], floats[part.to][0]))


def test_a_policy_is_one_design() -> None:
    """Convolutions, flattening and linear layers without a branch: from pixels to the outputs of the policy."""
    model, images = image_policy("int4", "int5")
    (design,), after = designs_of(model)
    assert [part.name for part in design.parts] == ["net.conv1", "net.conv2", "net.fc", "net.head"]
    assert design.before == after == ()
    floats, layers = seen(model, images[:8]), model.qlayers()
    first, last = design.parts[0], design.parts[-1]
    sums = reference(design.network, input_codes(first, layers[first.name], floats[first.name][0]))
    with torch.inference_mode():
        want = model.module(images[:8]).numpy()
    assert np.array_equal(outputs(last, layers[last.name], sums), want)


@pytest.mark.parametrize("made", [tiny_cnn, image_policy])
def test_the_price_of_an_artifact_has_the_lines_of_its_design(made: object) -> None:
    """What `hwmodel estimate` reads of a network prices each layer's window, ring and folds as its Verilog has them.

    Other than what is emitted, it does not know the exact arithmetic behind the sums.
    """
    model, _ = made("int4", "int5")  # type: ignore[operator]
    specs = [spec for design in designs_of(model)[0] for spec in design.network.specs]
    for told, emitted_spec in zip(layer_specs(model), specs, strict=True):
        assert told.window is not None and emitted_spec.window is not None
        known = dataclasses.replace(told, rescale=emitted_spec.rescale, activation=emitted_spec.activation)
        assert [(f.pe, f.simd) for f in folds(told)] == [(f.pe, f.simd) for f in folds(emitted_spec)]
        for mine, its in zip(folds(known), folds(emitted_spec), strict=True):
            assert conv.ring(told, mine.stream) == conv.ring(emitted_spec, its.stream)
            if told.out == emitted_spec.out:
                one, other = conv.window_cost(told, mine.stream), conv.window_cost(emitted_spec, its.stream)
                assert one.luts == pytest.approx(other.luts, rel=0.05)
                assert mine.cost.bram18 == its.cost.bram18


def test_branches_part_designs_and_are_named() -> None:
    """What the host computes between designs is said; padding is part of the window."""
    model, _ = residual()
    designs, after = designs_of(model)
    assert [[part.name for part in design.parts] for design in designs] == [["first"], ["left", "right"], ["head"]]
    assert [design.before for design in designs] == [(), ("ReLU",), ("ReLU", "add", "ReLU", "mean")]
    assert after == ()
    assert designs[0].network.specs[0].window == Window(2, 6, 5, (3, 3), (1, 1), (1, 2, 1, 2))


@pytest.mark.sim
@icarus
def test_the_command_writes_what_it_says(tmp_path: Path) -> None:
    """`quantkit rtl` of a policy with convolutions is one design whose simulation takes the cycles of its plan."""
    model, _ = image_policy("int4", "int5")
    save_artifact(model, tmp_path / "q")
    command = ["rtl", str(tmp_path / "q"), "-o", str(tmp_path / "rtl"), "--latency-us", "12", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    assert facts["cycles"] <= 1200 and facts["designs"][0]["folder"] == "."
    network = read_network(tmp_path / "rtl")
    found = simulate.check(tmp_path / "rtl", sample_codes(network, 3), "iverilog")
    assert found.mismatch is None
    assert found.cycles_min == found.cycles_max == facts["cycles"]


@pytest.mark.sim
@icarus
def test_a_policy_acts_from_its_verilog(tmp_path: Path) -> None:
    """From pixels to actions through the simulated Verilog, sums, outputs and actions checked on the way."""
    model, images = image_policy("int3", "uint4")
    save_artifact(model, tmp_path / "q")
    done = CliRunner().invoke(app, ["rtl", str(tmp_path / "q"), "-o", str(tmp_path / "rtl"), "--luts", "3000"])
    assert done.exit_code == 0, done.output
    with Pilot(model, tmp_path / "rtl", "iverilog") as pilot:
        actions = pilot.act(images[:3].numpy())
    assert np.array_equal(actions, model.module.predict(images[:3].numpy())[0])  # type: ignore[operator]
    with pytest.raises(InputError, match="not written from this policy"):
        Pilot(image_policy("int3", "int4")[0], tmp_path / "rtl", "iverilog")


@pytest.mark.sim
@icarus
def test_the_command_names_what_it_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with a branch becomes several folders; the terminal and the README say what the host computes."""
    monkeypatch.setattr("quantkit.artifact.load_artifact", lambda *_, **__: residual()[0])
    done = CliRunner().invoke(app, ["rtl", str(tmp_path), "-o", str(tmp_path / "rtl")])
    assert done.exit_code == 0, done.output
    assert "3 designs" in done.output and "before head: ReLU, add, ReLU, mean" in done.output
    assert "quantize with --step joints" in done.output
    index = json.loads((tmp_path / "rtl" / "network.json").read_text())
    assert [entry["folder"] for entry in index["parts"]] == ["first", "left", "head"]
    assert (tmp_path / "rtl" / "left" / "policy_axis.v").is_file()
    assert "ReLU, add, ReLU, mean" in (tmp_path / "rtl" / "README.md").read_text()
    shown = CliRunner().invoke(hwmodel_app, ["simulate", str(tmp_path / "rtl"), "--tool", "iverilog", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    assert {name: one["cycles_max"] for name, one in found.items()} == {
        entry["folder"]: entry["cycles"] for entry in index["parts"]
    }
    with pytest.raises(HwError, match="several designs; give one of its folders: first, left, head"):
        read_network(tmp_path / "rtl")


def test_layers_without_hardware_are_named() -> None:
    """A layer in float, and one with gaps in its kernel."""
    model, _ = residual()
    model.qlayers()["left"].set_act(None)
    with pytest.raises(InputError, match="layer left is in float"):
        parts_of(model)
    gaps = small_policies.conv(dilation=2)
    plan = (("*", make_plan("int4", "int4", "row")),)
    with pytest.raises(InputError, match=r"layer net.conv2 has dilation \(2, 2\)"):
        parts_of(quantize(gaps, Recipe(plan, (), 0), small_policies.calib(gaps)))
