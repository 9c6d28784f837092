"""Verilog of a whole quantized network: layers folded PE x SIMD, one after the other, one inference at a time.

A layer (`emit_layer`, `emit_cell`) is operands (`rtl/operands.v`), a sequencer, a weight memory, PE
multiply-accumulates in LUTs or packed into DSPs, and converters: thresholds or arithmetic, as the estimate chose, or
the gates of a recurrent cell. The top gives the layers a valid/ready stream, `policy_axis` two AXI4-Streams. `plan`
prices what is written and predicts its cycles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel.cell import Cell
from hwmodel.devices import Device
from hwmodel.emit_cell import cell_text
from hwmodel.emit_files import build_text, whole_bytes, write_files, write_vectors
from hwmodel.emit_layer import layer_text
from hwmodel.emit_rom import mem_files, with_roms
from hwmodel.estimate import of_plans
from hwmodel.fabric import pricing
from hwmodel.folding import Fold
from hwmodel.formats import bits
from hwmodel.gates import INDEX
from hwmodel.layer import address_bits
from hwmodel.network import Network, reference, sample_codes
from hwmodel.plan import total, total_cycles

VECTORS = 64
EPISODE = 16
"""Vectors that a recurrent network takes before its states are cleared."""


def top_text(network: Network, plans: Sequence[Fold]) -> str:
    """The module `policy`: SIMD codes per input beat, all sums in one output beat."""
    first, last = plans[0], plans[-1]
    in_bits = first.simd * bits(network.layers[0].formats[1])
    acc = network.layers[-1].acc_bits
    out_bits = acc * last.spec.out_features
    beats = first.column_folds
    count = address_bits(beats)
    recurrent = network.recurrent
    lines = [
        f"// {len(plans)} layers, {total_cycles(plans)} cycles from the last input beat accepted to out_valid.",
        f"// in: {beats} beat(s) of {first.simd} codes, first code in the low bits.",
        f"// out: {last.spec.out_features} sums of {acc} bits, two's complement, first one in the low bits.",
        "// in_ready falls after the last beat and rises when the sums are taken.",
        *["// A reset clears the states; so does in_first, before the step of the vector it comes with."] * recurrent,
        "module policy (",
        "    input clk,",
        "    input rst,                                       // synchronous, at least one cycle",
        "    input in_valid,",
        "    output in_ready,",
        f"    input [{in_bits - 1}:0] in_codes,",
        *["    input in_first,                                  // with any beat of the first vector of an episode"]
        * recurrent,
        "    output reg out_valid,",
        "    input out_ready,",
        f"    output reg [{out_bits - 1}:0] out_sums",
        ");",
        "  reg open;",
        "  assign in_ready = open;",
        "  wire accept = in_valid & open;",
    ]
    if beats == 1:
        lines += ["  wire start0 = accept;"]
    else:
        lines += [
            f"  reg [{count - 1}:0] beat;",
            f"  wire start0 = accept & (beat == {count}'d{beats - 1});",
            f"  always @(posedge clk) if (rst | start0) beat <= {count}'d0;",
            "    else if (accept) beat <= beat + 1'b1;",
        ]
    if recurrent and beats == 1:
        lines += ["  wire clear = start0 & in_first;"]
    elif recurrent:
        lines += [
            "  reg opening;",
            "  wire clear = start0 & (opening | in_first);",
            "  always @(posedge clk) opening <= ~(rst | start0) & (opening | (accept & in_first));",
        ]
    for i, (layer, plan) in enumerate(zip(network.layers, plans, strict=True)):
        act = bits(layer.formats[1])
        per_write = plan.simd if i == 0 else plans[i - 1].units
        width = acc if layer.spec.out is None else bits(layer.spec.out)
        col = address_bits(plan.column_folds)
        write, codes = ("accept", "in_codes") if i == 0 else (f"write{i - 1}", f"results{i - 1}")
        start = "start0" if i == 0 else f"finished{i - 1}"
        clear = "clear, " if isinstance(layer, Cell) else ""
        lines += [
            f"  wire busy{i}, write{i}, finished{i};",
            f"  wire [{col - 1}:0] col{i};",
            f"  wire [{plan.simd * act - 1}:0] acts{i};",
            f"  wire [{plan.units * width - 1}:0] results{i};",
            f"  operands #(.BITS({act}), .SIMD({plan.simd}), .FOLDS({plan.column_folds}), .WRITE({per_write}), "
            f".COL_BITS({col}))",
            f"    inputs{i} (clk, rst, {write}, {codes}, busy{i}, col{i}, acts{i});",
            f"  layer{i} part{i} (clk, rst, {clear}{start}, busy{i}, col{i}, acts{i}, "
            f"write{i}, results{i}, finished{i});",
        ]
    n, per = len(plans) - 1, last.units * acc
    shifted = f"results{n}" if per == out_bits else f"{{results{n}, out_sums[{out_bits - 1}:{per}]}}"
    lines += [
        "  always @(posedge clk) begin",
        f"    if (write{n}) out_sums <= {shifted};",
        "    if (rst) out_valid <= 1'b0;",
        f"    else out_valid <= finished{n} | (out_valid & ~out_ready);",
        "    if (rst) open <= 1'b1;",
        "    else if (start0) open <= 1'b0;",
        "    else if (out_valid & out_ready) open <= 1'b1;",
        "  end",
        "endmodule",
        "",
    ]
    return "\n".join(lines)


def stream_text(network: Network, plans: Sequence[Fold]) -> str:
    """The module `policy_axis`: `policy` between two AXI4-Streams, codes and sums in fields of whole bytes."""
    first, last = plans[0], plans[-1]
    width, acc = bits(network.layers[0].formats[1]), network.layers[-1].acc_bits
    code, word = whole_bytes(width), whole_bytes(acc)
    beats, outputs = first.column_folds, last.spec.out_features
    at, beat = address_bits(outputs), address_bits(beats)
    codes = ", ".join(f"s_axis_tdata[{i * code} +: {width}]" for i in reversed(range(first.simd)))
    unused = "  wire unused = &{1'b0, s_axis_tdata};\n" if code > width else ""
    told, opening, port = "", "", ""
    if network.recurrent:
        told = "// tuser, with any beat: the first packet of an episode; states are cleared before it.\n"
        opening, port = "\n    input s_axis_tuser,", " s_axis_tuser,"
    return f"""\
{told}// In: packets of {beats} beat(s) of {first.simd} codes, in the low {width} of {code} bits, first lowest.
// `misaligned` stays set from the first packet whose tlast is elsewhere until the reset.
// Out: packets of {outputs} beat(s), one sum each, {acc} bits sign-extended to {word}; tlast with the last.
module policy_axis (
    input aclk,
    input aresetn,                                   // synchronous, active low
    input s_axis_tvalid,
    output s_axis_tready,
    input [{first.simd * code - 1}:0] s_axis_tdata,
    input s_axis_tlast,{opening}
    output m_axis_tvalid,
    input m_axis_tready,
    output [{word - 1}:0] m_axis_tdata,
    output m_axis_tlast,
    output reg misaligned
);
  wire [{first.simd * width - 1}:0] codes = {{{codes}}};
  wire [{outputs * acc - 1}:0] sums;
  reg [{at - 1}:0] at;
  reg [{beat - 1}:0] beat;
  wire [{acc - 1}:0] sum = sums[at*{acc} +: {acc}];
  wire [{word + acc - 1}:0] extended = {{{{{word}{{sum[{acc - 1}]}}}}, sum}};
  wire accept = s_axis_tvalid & s_axis_tready;
  wire closing = beat == {beat}'d{beats - 1};
  assign m_axis_tlast = at == {at}'d{outputs - 1};
  assign m_axis_tdata = extended[{word - 1}:0];
  policy core (aclk, ~aresetn, s_axis_tvalid, s_axis_tready, codes,{port}
               m_axis_tvalid, m_axis_tready & m_axis_tlast, sums);
  always @(posedge aclk) begin
    if (~aresetn) at <= {at}'d0;
    else if (m_axis_tvalid & m_axis_tready) at <= m_axis_tlast ? {at}'d0 : at + 1'b1;
    if (~aresetn) beat <= {beat}'d0;
    else if (accept) beat <= closing ? {beat}'d0 : beat + 1'b1;
    misaligned <= aresetn & (misaligned | (accept & (s_axis_tlast != closing)));
  end
  wire unused_top = &{{1'b0, extended[{word + acc - 1}:{word}]}};
{unused}endmodule
"""


def testbench_text(network: Network, plans: Sequence[Fold]) -> str:
    """Reads one vector of hexadecimal codes per line, writes the sums and the cycles they took."""
    first = plans[0]
    width, acc = bits(network.layers[0].formats[1]), network.layers[-1].acc_bits
    outputs = plans[-1].spec.out_features
    told = register = port = read = ""
    if network.recurrent:
        told, register, port = (
            "// Each behind 1 or 0: whether it is the first of an episode.\n",
            ", in_first = 0",
            " in_first,",
        )
        read = """
      got = $fscanf(32'h8000_0000, "%h", flag);
      in_first = flag[0];"""
    flag = "\n  reg [3:0] flag;" * network.recurrent
    return f"""// In: {first.spec.in_features} hexadecimal codes per vector on standard input. Out: sums and cycles.
{told}// Cycles are counted from the last input beat accepted to out_valid.
`timescale 1ns/1ps
module testbench;
  reg clk = 0, rst = 1, in_valid = 0, out_ready = 0{register};
  wire in_ready, out_valid;
  reg [{first.simd * width - 1}:0] in_codes = 0;
  wire [{outputs * acc - 1}:0] out_sums;
  policy dut (clk, rst, in_valid, in_ready, in_codes,{port} out_valid, out_ready, out_sums);
  always #5 clk = ~clk;

  reg [{first.spec.in_features * width - 1}:0] vector = 0;
  reg [{width - 1}:0] code;{flag}
  reg signed [{acc - 1}:0] sum;
  integer i, got, cycles;
  initial begin
    repeat (4) @(negedge clk);
    rst = 0;
    got = 1;
    while (got == 1) begin{read}
      for (i = 0; i < {first.spec.in_features} && got == 1; i = i + 1) begin
        got = $fscanf(32'h8000_0000, "%h", code);
        vector[i*{width} +: {width}] = code;
      end
      if (got == 1) begin
        for (i = 0; i < {first.column_folds}; i = i + 1) begin
          in_codes = vector[i*{first.simd * width} +: {first.simd * width}];
          in_valid = 1;
          while (!in_ready) @(negedge clk);
          @(negedge clk);
        end
        in_valid = 0;
        cycles = 1;
        while (!out_valid && cycles < {10 * total_cycles(plans) + 1000}) begin
          @(negedge clk);
          cycles = cycles + 1;
        end
        for (i = 0; i < {outputs}; i = i + 1) begin
          sum = out_sums[i*{acc} +: {acc}];
          $write("%0d ", sum);
        end
        $write("%0d\\n", cycles);
        $fflush;
        out_ready = 1;
        @(negedge clk);
        out_ready = 0;
      end
    end
    $finish;
  end
endmodule
"""


LIBRARY = (
    "operands", "sequencer", "delay", "drain", "search", "interval_code",
    "affine", "multiply_const", "round_clip", "jam", "to_float", "patch", "mac",
    "popcount",
    "mac_packed",
    "packed_product",
    "product",
    "operand",
    "multiply",
    "tree",
    "accumulate",
)  # fmt: skip


@cache
def library(cells: frozenset[str] = frozenset()) -> dict[str, str]:
    """The templates that designs instantiate, by file name; cells: the kinds of recurrent cells among their layers."""
    source, names = resources.files("hwmodel").joinpath("rtl"), [*LIBRARY, *(f"{kind}_gates" for kind in sorted(cells))]
    return {f"{name}.v": source.joinpath(f"{name}.v").read_text() for name in names}


def design_files(network: Network, plans: Sequence[Fold]) -> dict[str, str]:
    """All of `policy` by file name: `network.v`, memories, and the templates."""
    texts, files = [top_text(network, plans)], dict(library(network.cells))
    beside_dsps = total(plans).dsps > 0
    for index, (layer, plan) in enumerate(zip(network.layers, plans, strict=True)):
        if isinstance(layer, Cell):
            text, roms = cell_text(index, layer, plan, beside_dsps=beside_dsps)
        else:
            text, roms = layer_text(index, layer, plan, beside_dsps=beside_dsps)
        texts.append(with_roms(text, roms))
        files |= mem_files(roms)
    return files | {"network.v": "\n".join(texts)}


def write(
    network: Network, plans: Sequence[Fold], folder: Path, device: Device, *, clock_mhz: float = 100.0
) -> dict[str, Any]:
    """Everything about the design, into an existing folder: Verilog, memories, testbench, scripts, README, its plan.

    Returns the plan: `summary`.
    """
    with pricing(device.family):
        facts = summary(plans, device, clock_mhz)
        codes = sample_codes(network, VECTORS)
        first = np.arange(VECTORS) % EPISODE == 0
        texts = {
            **design_files(network, plans),
            "policy_axis.v": stream_text(network, plans),
            "testbench.v": testbench_text(network, plans),
            "README.md": readme(network, plans, device, facts),
        }
        rows = np.column_stack([first, codes]) if network.recurrent else codes
        write_files(network, plans, folder, device, clock_mhz, texts, library(network.cells), facts)
        write_vectors(folder, rows, reference(network, codes, first))
        return facts


def summary(plans: Sequence[Fold], device: Device, clock_mhz: float) -> dict[str, Any]:
    """The plan in JSON: what `estimate.of_plans` says of it, input beats, and how many converters a layer has."""
    found = of_plans(plans, device, clock_mhz=clock_mhz).to_json()
    layers = [layer | {"converters": p.units} for layer, p in zip(found["layers"], plans, strict=True)]
    return found | {"input_beats": plans[0].column_folds, "layers": layers}


def _size(plan: Fold) -> str:
    """Rows x columns; of a recurrent cell units and inputs."""
    rows, columns = plan.spec.out_features, plan.spec.in_features
    return f"{rows} x {columns}" if plan.parts is None else f"{plan.spec.op.upper()} of {rows}, {columns} inputs"


def _simd(plan: Fold) -> str:
    """Columns at once; of a recurrent cell those of the input and of the state."""
    return str(plan.simd) if plan.parts is None else f"{plan.simd}, state {plan.parts[1].simd}"


EPISODES = f"""\
- The network keeps a state from vector to vector. `rst` clears it, and so does `in_first` (AXI: `tuser`), high with \
any beat of a vector: that vector is the first of an episode.
- Inside a GRU or an LSTM something is: it counts in fixed point, its sigmoid and tanh are tables of {1 << INDEX} \
entries and its state has steps of a power of two. There the Verilog equals `step` of `hwmodel.gru` or `hwmodel.lstm` \
bit for bit, and the float simulation nearly; the truth of the whole is `hwmodel.network.reference`.
"""


def readme(network: Network, plans: Sequence[Fold], device: Device, facts: Mapping[str, Any]) -> str:
    """What is in the folder, the contract with the host, and how to simulate and synthesize; `facts` by `summary`."""
    first, last = network.layers[0], network.layers[-1]
    rows = "\n".join(
        f"| {e['name']} | {_size(p)} | {p.spec.weight} x {p.spec.act} | {e['pe']} | {_simd(p)} | {e['converters']} | "
        f"{e['cycles']} | {e['luts']} | {e['bram18']} |"
        for e, p in zip(facts["layers"], plans, strict=True)
    )
    episodes = ""
    if network.recurrent:
        episodes = EPISODES
    return f"""# A quantized policy in Verilog

`policy` in `network.v`: {facts["cycles"]} cycles from the last input beat to the sums, {facts["latency_us"]:g} us at \
{facts["clock_mhz"]:g} MHz; about {facts["luts"]} LUTs, {facts["bram18"]} BRAM18 on {device.name} (estimated).

| layer | size | weight x input | PE | SIMD | converters | cycles | LUTs | BRAM18 |
|---|---|---|---|---|---|---|---|---|
{rows}

## Contract
- In: {facts["input_beats"]} beat(s) of {plans[0].simd} codes of `{first.spec.act}` \
({bits(first.formats[1])} bits each, first in the low bits), valid/ready. The host normalizes the observation, \
divides by the input's scale and rounds half to even; `network.json` holds these numbers under `host`.
- Out: one beat with {last.spec.out_features} sums of {last.acc_bits} bits. The host computes, in float32, \
`sum * step`, then `* gain`, then `+ bias` (`host.gain`, `host.bias`), and the action from that.
- Between layers nothing is approximated: sums become codes by thresholds, the smallest sums at which the float \
simulation yields the next code, or by integer arithmetic that gives every sum the same code, so codes equal the \
Python simulator's bit for bit.
{episodes}- `policy_axis.v` wraps it in two AXI4-Streams (tvalid, tready, tdata, tlast), codes and sums in whole bytes.
- One inference at a time: `in_ready` falls with the last beat and rises when the sums are taken.

## Check and build
    hwmodel simulate .                          # Verilator, or Icarus: every vector against the integer reference
    hwmodel simulate . --env ENVIRONMENT        # whole episodes against the Python policy, by quantkit
{build_text(device)}"""
