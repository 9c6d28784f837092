"""Verilog of one layer and the order of the weights in its memory."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from hwmodel.conv import depthwise
from hwmodel.emit_converter import converter_lines
from hwmodel.emit_rom import Rom
from hwmodel.fabric import family
from hwmodel.folding import Fold
from hwmodel.formats import BINARY, Format, Int, bits
from hwmodel.layer import address_bits
from hwmodel.mac import pipeline_stages
from hwmodel.network import Layer
from hwmodel.packing import Packing, fields
from hwmodel.unroll import sum_lines
from hwmodel.yosys import Unit, mac_unit
from hwmodel.yosys import unit as unit_of


def weight_rom(index: int | str, layer: Layer, plan: Fold) -> Rom:
    """Word `row_fold * column_folds + column_fold`: PE x SIMD codes, SIMD fastest, first code lowest.

    In DSPs: for each group of packed rows and each column the fields of its packed weights (`hwmodel.packing`).
    """
    width = bits(layer.formats[0])
    if plan.pack is not None:
        pack = plan.pack
        shape = (plan.row_folds, plan.pe // pack.lanes, pack.lanes, plan.column_folds, plan.simd)
        units = (
            in_window_order(layer, layer.units)
            .reshape(shape)
            .transpose(0, 3, 1, 4, 2)
            .reshape(plan.row_folds * plan.column_folds, -1, pack.lanes)
        )
        stored = [[field for values in word for field in fields(values, pack)] for word in units]
        packed = tuple(_packed(word, pack.field) for word in stored)
        return Rom(f"layer{index}_weights", pack.field * plan.pe * plan.simd, packed)
    block = in_window_order(layer, layer.codes).reshape(plan.row_folds, plan.pe, plan.column_folds, plan.simd)
    words = block.transpose(0, 2, 1, 3).reshape(plan.row_folds * plan.column_folds, -1)
    return Rom(f"layer{index}_weights", width * plan.pe * plan.simd, tuple(_packed(word, width) for word in words))


def in_window_order(layer: Layer, matrix: np.ndarray) -> np.ndarray:
    """Columns as the layer reads them: of a window the channels fastest, of any other layer as they are."""
    window = layer.spec.window
    if window is None:
        return matrix
    rows = matrix.reshape(len(matrix), -1, *window.kernel)
    return rows.transpose(0, 2, 3, 1).reshape(matrix.shape)


def _packed(codes: Iterable[int], width: int) -> int:
    return sum((int(code) & ((1 << width) - 1)) << (i * width) for i, code in enumerate(codes))


def result_bits(layer: Layer) -> int:
    """Bits of one result: a sum, or a code."""
    return layer.acc_bits if layer.spec.out is None else bits(layer.spec.out)


def layer_ports(index: int | str, acts: int, results: int, col: int = 1) -> list[str]:
    """The head of the module `layerN`, whose inputs, results and column number have so many bits."""
    return [
        f"module layer{index} (",
        "    input clk,",
        "    input rst,",
        "    input start,",
        "    output busy,",
        f"    output [{col - 1}:0] col,",
        f"    input [{acts - 1}:0] acts,",
        "    output write,",
        f"    output [{results - 1}:0] results,",
        "    output finished",
        ");",
    ]


def layer_text(index: int | str, layer: Layer, plan: Fold, *, beside_dsps: bool = False) -> tuple[str, list[Rom]]:
    """The module `layerN` and the memories it instantiates.

    beside_dsps: other layers use DSPs, so products of this one must be written such that no flow puts them there.
    """
    if plan.unrolled:
        return _unrolled(index, layer, plan)
    weight, act = layer.formats
    acc, ab, share = layer.acc_bits, bits(act), plan.share
    words, slot, row = (
        plan.row_folds * plan.column_folds,
        address_bits(share),
        address_bits(plan.spec.out_features // plan.units),
    )
    col, address = address_bits(plan.column_folds), address_bits(words)
    weights = weight_rom(index, layer, plan)
    roms = [weights]
    binary = weight == act == BINARY
    last = layer.thresholds is None
    out_bits = result_bits(layer)
    lines = [
        f"// {layer.spec.name}: {plan.spec.out_features} x {plan.spec.in_features} {weight}, input {act}, "
        f"PE {plan.pe}, SIMD {plan.simd}, {plan.units} converter(s), {plan.cycles} cycles",
        *layer_ports(index, plan.lanes * ab, plan.units * out_bits, col),
        f"  wire [{address - 1}:0] address;",
        "  wire last, clear, last_sum, empty, done, fire, closing;",
        f"  wire [{weights.width - 1}:0] weights;",
        f"  wire [{plan.pe * acc - 1}:0] sums;",
        f"  wire [{slot - 1}:0] slot;",
        f"  wire [{row - 1}:0] row, next;",
        f"  sequencer #(.COLS({plan.column_folds}), .ROWS({plan.row_folds}), .COL_BITS({col}), "
        f".ADDRESS_BITS({address}))",
        "    steps (clk, rst, start, busy, last, clear, col, address);",
        f"  {weights.name} memory (clk, address, weights);",
        f"  delay #(.N({pipeline_stages(weight, act, plan.simd) - 1}), .BITS(2)) "
        "to_sum (clk, rst, {last, clear}, {last_sum, empty});",
        "  delay #(.N(1), .BITS(1)) to_end (clk, rst, last_sum, done);",
        *_elements(plan, weight, act, acc, beside_dsps),
        f"  drain #(.SHARE({share}), .COUNT({plan.spec.out_features // plan.units}), .SLOT_BITS({slot}), "
        f".ROW_BITS({row}))",
        "    turns (clk, rst, done, fire, closing, slot, row, next);",
        f"  wire [{plan.units * acc - 1}:0] values = "
        + ("sums;" if share == 1 else f"sums[slot*{plan.units * acc} +: {plan.units * acc}];"),
    ]
    unused = [] if share > 1 else ["slot"]
    if last:
        if binary:  # agreements -> sum of +-1 products
            lines += [
                f"  wire signed [{acc - 1}:0] terms = {acc}'sd{plan.spec.in_features};",
                *(
                    f"  assign results[{u * acc} +: {acc}] = {{values[{u * acc} +: {acc - 1}], 1'b0}} - terms;"
                    for u in range(plan.units)
                ),
            ]
        else:
            lines.append("  assign results = values;")
        lines += ["  assign write = fire;", "  assign finished = fire & closing;"]
        unused += ["row", "next"]
    else:
        rows = plan.spec.out_features // plan.units
        stages, wires, found = converter_lines(index, layer, plan, row)
        roms += found
        lines += [
            f"  delay #(.N({stages}), .BITS(2)) through (clk, rst, {{fire, fire & closing}}, {{write, finished}});",
            *wires,
        ]
        if rows == 1:
            unused += ["row", "next"]
        elif not any("row" in _addresses(wire) for wire in wires):
            unused += ["row"]
    if unused:
        lines.append(f"  wire unused = &{{1'b0, {', '.join(unused)}}};")
    return "\n".join([*lines, "endmodule", ""]), roms


def _unrolled(index: int | str, layer: Layer, plan: Fold) -> tuple[str, list[Rom]]:
    """`layer_text` of a layer with its weights in the logic: `start` one cycle before `acts`."""
    rows = plan.spec.out_features
    stages, sums = sum_lines(layer)
    act, out = bits(layer.formats[1]), result_bits(layer)
    head = [
        f"// {layer.spec.name}: {rows} x {plan.spec.in_features} {plan.spec.weight} in the logic, "
        f"input {plan.spec.act}, {plan.cycles} cycles",
        "/* verilator lint_off WIDTH */   // two's complement is extended and cut by Verilog's own rules",
        "/* verilator lint_off UNUSED */  // not every bit of every sum is read",
        *layer_ports(index, plan.spec.in_features * act, rows * out),
        "  assign busy = 1'b0;",
        "  assign col = 1'b0;",
        "  wire fire;",
        f"  delay #(.N({stages + 1}), .BITS(1)) to_sum (clk, rst, start, fire);",
    ]
    tail = ["endmodule", "/* verilator lint_on WIDTH */", "/* verilator lint_on UNUSED */", ""]
    if layer.thresholds is None:
        ends = ["  assign results = values;", "  assign write = fire;", "  assign finished = fire;"]
        return "\n".join([*head, *sums, *ends, *tail]), []
    after, lines, roms = converter_lines(index, layer, plan, 1)
    ends = [
        f"  delay #(.N({after}), .BITS(1)) through (clk, rst, fire, write);",
        "  assign finished = write;",
        "  wire [0:0] row = 1'b0, next = 1'b0;",
        *lines,
    ]
    return "\n".join([*head, *sums, *ends, *tail]), roms


def _elements(plan: Fold, weight: Format, act: Format, acc: int, beside_dsps: bool) -> list[str]:
    """The multiply-accumulates of all rows at once."""
    lanes, wide, many, pack = 1, bits(weight), plan.pe, plan.pack
    if pack is None:
        unit = mac_unit(weight, act, acc, plan.simd)
        parameters = dict(unit.params)
        least = 9 if family() == "xc7" else 4  # bits of the smallest multiplication that Yosys puts there
        if beside_dsps and parameters.get("STYLE") == 0 and parameters["W_SIG"] + parameters["A_SIG"] >= least:
            parameters["STYLE"] = 1
        module = unit.module
    else:
        lanes, wide, many, module = pack.lanes, pack.field, plan.pe // pack.lanes, "mac_packed"
        parameters = dict(packed_unit(pack, act, plan.port, plan.simd, acc).params)
    text = ", ".join(f".{key}({value})" for key, value in parameters.items())
    step = plan.simd * lanes * wide
    acts = f"acts[p*{bits(act)} +: {bits(act)}]" if depthwise(plan.spec) else "acts"
    return [
        "  genvar p;",
        "  generate",
        f"    for (p = 0; p < {many}; p = p + 1) begin : element",
        f"      {module} #({text})",
        f"        mac (clk, last_sum | empty, weights[p*{step} +: {step}], {acts}, "
        f"sums[p*{lanes * acc} +: {lanes * acc}]);",
        "    end",
        "  endgenerate",
    ]


def packed_unit(pack: Packing, act: Format, port: int, lanes: int, acc_bits: int) -> Unit:
    """The `rtl/mac_packed.v` of rows that share DSPs."""
    assert isinstance(act, Int)
    return unit_of(
        "mac_packed", L=pack.lanes, S=pack.spacing, TOP=pack.top, W=pack.field, A=bits(act), A_SIGNED=int(act.signed),
        P=pack.product, PORT=port, LANES=lanes, ACC=acc_bits,
    )  # fmt: skip


def _addresses(line: str) -> list[str]:
    """Words of a line of Verilog."""
    return re.findall(r"[A-Za-z_0-9]+", line)
