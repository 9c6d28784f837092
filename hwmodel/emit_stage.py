"""Verilog of one stage of a network of windows, from beats of input codes to beats of results.

A stage is a window (`rtl/window.v`), the layer that a chain of linear layers has, too (`emit_layer`), or `rtl/pool.v`,
and a queue of its results (`rtl/fifo.v`); of a sum or a mean `rtl/add.v` or `rtl/mean.v`, converters and that queue.
"""

from __future__ import annotations

from dataclasses import replace

from hwmodel import pool
from hwmodel.conv import ring
from hwmodel.emit_converter import converter_lines
from hwmodel.emit_layer import layer_ports, result_bits
from hwmodel.emit_rom import Rom
from hwmodel.folding import Fold
from hwmodel.formats import bits
from hwmodel.joint import lanes_of, operands, widened
from hwmodel.layer import address_bits
from hwmodel.network import Layer


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
    inner = layer.acc_bits if average else bits(act)
    facts = {"PE": pe, "BITS": bits(act), "OUT": inner, "KIND": pool.kind(act), "SUM": int(average)}
    facts |= {"TAPS": spec.in_features, "WORDS": plan.stream.words}
    lines: list[str] = ["  assign results = values;", "  assign write = fire;"]
    roms: list[Rom] = []
    if average:
        stages, head, lines, roms = _converters(index, layer, plan)
        lines = [*head, *lines]
        lines.append(f"  delay #(.N({stages}), .BITS(1)) through (clk, rst, fire, write);")
    text = [
        f"// {spec.name}: {spec.op} of {spec.in_features}, {pe} channels at once, {plan.cycles} cycles",
        *layer_ports(index, pe * bits(act), pe * result_bits(layer)),
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
    stages, rows, lines, roms = _converters(index, layer, plan)
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
        *rows,
        f"  credit #(.DEPTH({plan.depth})) rooms (clk, rst, book, take, room);",
        f"  delay #(.N({stages + 1}), .BITS(1)) through (clk, rst, book, write);",
        *lines,
        f"  fifo #(.BITS({leaving}), .DEPTH({plan.depth})) "
        "leaving (clk, rst, write, results, out_valid, take, out_results);",
        "endmodule",
        "",
    ]
    return "\n".join(text), roms


def _converters(index: int, layer: Layer, plan: Fold) -> tuple[int, list[str], list[str], list[Rom]]:
    """`converter_lines` of channels that share one row; the second, wires of its number where one is read."""
    stages, lines, roms = converter_lines(
        index, widened(layer, plan.pe), replace(plan, spec=lanes_of(layer.spec, plan.pe)), 1
    )
    read = any(" row" in line or " next" in line for line in lines)
    return stages, ["  wire [0:0] row = 1'b0, next = 1'b0;"] * read, lines, roms
