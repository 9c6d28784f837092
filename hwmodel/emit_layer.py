"""Verilog of one layer and the contents of its memories: weights, and thresholds in the order of their search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from hwmodel.accumulator import signed_bits
from hwmodel.cost import HwError
from hwmodel.formats import BINARY, TERNARY, Block, Float, Format, Int, Levels, bits, levels, min_value
from hwmodel.mac import pipeline_stages
from hwmodel.memory import rom
from hwmodel.network import Layer
from hwmodel.plan import Plan
from hwmodel.yosys import mac_unit


@dataclass(frozen=True, slots=True)
class Rom:
    """Constants: `words` of `width` bits, read with one cycle of delay."""

    name: str
    width: int
    words: tuple[int, ...]


def weight_rom(index: int, layer: Layer, plan: Plan) -> Rom:
    """Word `row_fold * column_folds + column_fold`: PE x SIMD codes, SIMD fastest, first code lowest."""
    width = bits(layer.formats[0])
    block = layer.codes.reshape(plan.row_folds, plan.pe, plan.column_folds, plan.simd)
    words = block.transpose(0, 2, 1, 3).reshape(plan.row_folds * plan.column_folds, -1)
    return Rom(f"layer{index}_weights", width * plan.pe * plan.simd, tuple(_packed(word, width) for word in words))


def _packed(codes: Iterable[int], width: int) -> int:
    return sum((int(code) & ((1 << width) - 1)) << (i * width) for i, code in enumerate(codes))


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """Thresholds as the hardware searches them.

    bits: of values and levels. table: (rows, 2^B - 1) Python ints, ascending. kind: how an interval's number
    becomes a code (`rtl/interval_code.v`).
    """

    bits: int
    table: np.ndarray
    kind: int


def search_of(layer: Layer) -> Search:
    """Thresholds padded to 2^B - 1 per row, so that interval numbers and codes are laid out alike.

    Below the format's lowest level stand thresholds that every sum passes, above the highest ones
    that no sum reaches. Binary x binary counts agreements, so its levels are moved there.
    """
    fmt = layer.spec.out
    assert fmt is not None and layer.thresholds is not None
    low, high = (int(min(layer.sum_range[0])), int(max(layer.sum_range[1])))
    moved = layer.thresholds.astype(object)
    if layer.formats == (BINARY, BINARY):
        columns = layer.spec.in_features
        moved = (moved + columns + 1) // 2
        low, high = 0, columns
    moved = np.minimum(np.maximum(moved, low), high + 1)
    width = bits(fmt)
    below, kind = _layout(fmt)
    above = 2**width - 1 - below - moved.shape[1]
    rows = len(moved)
    table = np.concatenate(
        [np.full((rows, below), low, object), moved, np.full((rows, above), high + 1, object)], axis=1
    )
    need = max(signed_bits(int(table.min()), int(table.max())), layer.acc_bits)
    return Search(need, table, kind)


def _layout(fmt: Format) -> tuple[int, int]:
    """Number of unused intervals below the lowest level, and the kind of code."""
    width = bits(fmt)
    match fmt:
        case Int():
            return (int(min_value(fmt)) + 2 ** (width - 1), 0) if fmt.signed else (0, 1)
        case Float():
            return 2 ** (width - 1) - (len(levels(fmt)) - 1) // 2, 2
        case Levels():
            return (1, 0) if fmt == TERNARY else (0, 1)
        case Block():
            raise HwError(f"no hardware here scales blocks at run time, as {fmt} needs; accepted: {fmt.elem}")


def threshold_roms(index: int, search: Search, plan: Plan, unit: int) -> list[Rom]:
    """One memory per step of the search. Step 0: one level per row; later ones: two per word, the lower first."""
    rows = search.table[unit :: plan.units]
    steps = (search.table.shape[1] + 1).bit_length() - 1
    mask = (1 << search.bits) - 1
    roms = []
    for step in range(steps):
        gap = 1 << (steps - 1 - step)
        columns = [(2 * prefix + 1) * gap - 1 for prefix in range(1 << step)]
        if step == 0:
            words = [int(row[columns[0]]) & mask for row in rows]
        else:
            words = [
                (int(row[columns[i]]) & mask) | ((int(row[columns[i + 1]]) & mask) << search.bits)
                for row in rows
                for i in range(0, len(columns), 2)
            ]
        roms.append(Rom(f"layer{index}_unit{unit}_step{step}", search.bits * (1 if step == 0 else 2), tuple(words)))
    return roms


def rom_text(memory: Rom) -> str:
    """A module with the memory's contents from NAME.mem, or its one word as a constant."""
    depth, width = len(memory.words), memory.width
    address = max(1, (depth - 1).bit_length())
    # Constants in LUTs: seen apart from the logic around them, Yosys finds the one LUT per 64 bits that they are.
    apart = "`ifdef YOSYS\n(* keep_hierarchy *)\n`endif\n" if rom(width, depth).kind == "lutram" else ""
    head = f"{apart}module {memory.name} (\n    input clk,\n    input [{address - 1}:0] address,\n"
    if depth == 1:
        return (
            f"{head}    output [{width - 1}:0] q\n);\n  assign q = {width}'h{memory.words[0]:x};\n"
            "  wire unused = &{1'b0, clk, address};\nendmodule\n"
        )
    style = '(* rom_style = "block" *)'
    if rom(width, depth).kind != "bram":  # Yosys maps no constant memory to LUTRAM, but to plain LUTs
        style = '`ifdef YOSYS\n  (* rom_style = "logic" *)\n`else\n  (* rom_style = "distributed" *)\n`endif\n '
    return (
        f"{head}    output reg [{width - 1}:0] q\n);\n"
        f"  {style} reg [{width - 1}:0] words [0:{depth - 1}];\n"
        f'  initial $readmemh("{memory.name}.mem", words);\n'
        "  always @(posedge clk) q <= words[address];\nendmodule\n"
    )


def mem_text(memory: Rom) -> str:
    """The words in hexadecimal, one a line."""
    digits = -(-memory.width // 4)
    return "".join(f"{word:0{digits}x}\n" for word in memory.words)


# ---------------------------------------------------------------------------------------------------
# Modules


def address_bits(n: int) -> int:
    """Bits that count to n - 1, at least one."""
    return max(1, (n - 1).bit_length())


def layer_text(index: int, layer: Layer, plan: Plan) -> tuple[str, list[Rom]]:
    """The module `layerN` and the memories it instantiates."""
    weight, act = layer.formats
    acc, wb, ab, share = layer.acc_bits, bits(weight), bits(act), plan.share
    words, slot, row = (
        plan.row_folds * plan.column_folds,
        address_bits(share),
        address_bits(plan.spec.out_features // plan.units),
    )
    col, address = address_bits(plan.column_folds), address_bits(words)
    unit = mac_unit(weight, act, acc, plan.simd)
    weights = weight_rom(index, layer, plan)
    roms = [weights]
    binary = weight == act == BINARY
    last = layer.thresholds is None
    out_bits = acc if last else bits(layer.spec.out)  # type: ignore[arg-type]
    parameters = ", ".join(f".{key}({value})" for key, value in unit.params)
    lines = [
        f"// {layer.spec.name}: {plan.spec.out_features} x {plan.spec.in_features} {weight}, input {act}, "
        f"PE {plan.pe}, SIMD {plan.simd}, {plan.units} converter(s), {plan.cycles} cycles",
        f"module layer{index} (",
        "    input clk,",
        "    input rst,",
        "    input start,",
        "    output busy,",
        f"    output [{col - 1}:0] col,",
        f"    input [{plan.simd * ab - 1}:0] acts,",
        "    output write,",
        f"    output [{plan.units * out_bits - 1}:0] results,",
        "    output finished",
        ");",
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
        "  genvar p;",
        "  generate",
        f"    for (p = 0; p < {plan.pe}; p = p + 1) begin : element",
        f"      {unit.module} #({parameters})",
        f"        mac (clk, last_sum | empty, weights[p*{plan.simd * wb} +: {plan.simd * wb}], acts, "
        f"sums[p*{acc} +: {acc}]);",
        "    end",
        "  endgenerate",
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
        search = search_of(layer)
        steps, level = out_bits, search.bits
        lines += [
            f"  delay #(.N({steps}), .BITS(2)) through (clk, rst, {{fire, fire & closing}}, {{write, finished}});"
        ]
        rows = plan.spec.out_features // plan.units
        if rows == 1:
            unused += ["row", "next"]
        for step in range(1, steps - 1):
            source = "row" if step == 1 else f"row{step - 1}"
            if rows > 1:
                lines += [f"  wire [{row - 1}:0] row{step};"]
                lines += [f"  delay #(.N(1), .BITS({row})) keep{step} (clk, 1'b0, {source}, row{step});"]
        if rows > 1 and steps == 1:
            unused += ["row"]
        for u in range(plan.units):
            found = threshold_roms(index, search, plan, u)
            roms += found
            lines += _search_lines(u, found, rows, acc, level, steps, search.kind, out_bits)
    if unused:
        lines.append(f"  wire unused = &{{1'b0, {', '.join(unused)}}};")
    return "\n".join([*lines, "endmodule", ""]), roms


def _search_lines(
    u: int, memories: list[Rom], rows: int, acc: int, level: int, steps: int, kind: int, out_bits: int
) -> Iterator[str]:
    """The search of one converter: memory `step` is read in the cycle before it is compared with."""
    value = f"values[{u * acc} +: {acc}]"
    if level > acc:
        value = f"{{{{{level - acc}{{values[{u * acc + acc - 1}]}}}}, {value}}}"
    yield f"  wire signed [{level - 1}:0] u{u}_value0 = {value};"
    yield f"  wire [0:0] u{u}_found0 = 1'b0;"
    for step, memory in enumerate(memories):
        parts = []
        if rows > 1:
            parts.append("next" if step == 0 else "row" if step == 1 else f"row{step - 1}")
        if step > 1:
            parts.append(f"u{u}_found{step - 1}[{step - 2}:0]")
        address = f"{{{', '.join(parts)}}}" if parts else "1'b0"
        wide = f"u{u}_level{step}" if step else f"{{{{{level}{{1'b0}}}}, u{u}_level{step}}}"
        yield f"  wire [{memory.width - 1}:0] u{u}_level{step};"
        yield f"  {memory.name} u{u}_memory{step} (clk, {address}, u{u}_level{step});"
        yield f"  wire signed [{level - 1}:0] u{u}_value{step + 1};"
        yield f"  wire [{step + 1}:0] u{u}_found{step + 1};"
        yield f"  search #(.BITS({level}), .STEP({step})) u{u}_step{step}"
        yield f"    (clk, u{u}_value{step}, u{u}_found{step}, {wide}, u{u}_value{step + 1}, u{u}_found{step + 1});"
    yield (
        f"  interval_code #(.KIND({kind}), .BITS({out_bits})) u{u}_code "
        f"(u{u}_found{steps}[{steps - 1}:0], results[{u * out_bits} +: {out_bits}]);"
    )
    yield f"  wire u{u}_unused = &{{1'b0, u{u}_value{steps}, u{u}_found{steps}[{steps}]}};"
