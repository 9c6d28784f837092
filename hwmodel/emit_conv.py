"""Verilog of a network of windows: convolutions and dense layers, sums and means of maps, each a stream of positions.

Stages (`emit_stage`) read each other as `flow` says. Maps stream line by line, column by column, the channels of a
position in consecutive beats. The top `policy` has one valid/ready stream in and one out, `policy_axis` two
AXI4-Streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from hwmodel import emit
from hwmodel.conv import depthwise
from hwmodel.devices import Device
from hwmodel.emit_files import build_text, whole_bytes, write_files, write_vectors
from hwmodel.emit_layer import layer_text, result_bits
from hwmodel.emit_rom import mem_files, with_roms
from hwmodel.emit_stage import joint_text, pool_text, stage_text
from hwmodel.estimate import of_plans
from hwmodel.fabric import pricing
from hwmodel.flow import flow, queue_depths
from hwmodel.folding import Fold
from hwmodel.formats import bits
from hwmodel.joint import queue
from hwmodel.layer import address_bits
from hwmodel.network import Network, reference, sample_codes
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
    code, word = whole_bytes(width), whole_bytes(leaving)
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
        texts = {
            **design_files(network, plans),
            "policy_axis.v": stream_text(network, plans),
            "testbench.v": testbench_text(network, plans),
            "README.md": readme(network, plans, device, facts),
        }
        write_files(network, plans, folder, device, clock_mhz, texts, library(), facts)
        write_vectors(folder, codes, reference(network, codes))
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
{build_text(device)}"""


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
