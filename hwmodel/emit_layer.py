"""Verilog of one layer and the contents of its memories: weights, and thresholds in the order of their search."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from hwmodel.accumulator import signed_bits
from hwmodel.affine import Affine, code_of, solve
from hwmodel.conv import depthwise
from hwmodel.cost import HwError
from hwmodel.fabric import family
from hwmodel.folding import Fold
from hwmodel.formats import BINARY, TERNARY, Block, Float, Format, Int, Levels, bits, levels, min_value, unit
from hwmodel.layer import address_bits
from hwmodel.mac import pipeline_stages
from hwmodel.memory import rom
from hwmodel.network import Layer
from hwmodel.packing import Packing, fields
from hwmodel.unroll import sum_lines
from hwmodel.yosys import Unit, mac_unit
from hwmodel.yosys import unit as unit_of


@dataclass(frozen=True, slots=True)
class Rom:
    """Constants: `words` of `width` bits, read with one cycle of delay."""

    name: str
    width: int
    words: tuple[int, ...]


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
    return _search(fmt, moved, layer.acc_bits, low, high + 1)


def _search(fmt: Format, moved: np.ndarray, least_bits: int, low: int, high: int) -> Search:
    """The levels (rows, n - 1) padded with `low`, which every value passes, and `high`, which none reaches."""
    width = bits(fmt)
    below, kind = _layout(fmt)
    above = 2**width - 1 - below - moved.shape[1]
    rows = len(moved)
    table = np.concatenate([np.full((rows, below), low, object), moved, np.full((rows, above), high, object)], axis=1)
    need = max(signed_bits(int(table.min()), int(table.max())), least_bits)
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


def threshold_roms(name: str, search: Search, rows: np.ndarray) -> list[Rom]:
    """One memory per step of the search. Step 0: one level per row; later ones: two per word, the lower first."""
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
        roms.append(Rom(f"{name}_step{step}", search.bits * (1 if step == 0 else 2), tuple(words)))
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
    out_bits = acc if last else bits(layer.spec.out)  # type: ignore[arg-type]
    lines = [
        f"// {layer.spec.name}: {plan.spec.out_features} x {plan.spec.in_features} {weight}, input {act}, "
        f"PE {plan.pe}, SIMD {plan.simd}, {plan.units} converter(s), {plan.cycles} cycles",
        f"module layer{index} (",
        "    input clk,",
        "    input rst,",
        "    input start,",
        "    output busy,",
        f"    output [{col - 1}:0] col,",
        f"    input [{plan.lanes * ab - 1}:0] acts,",
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


def converter_lines(index: int | str, layer: Layer, plan: Fold, row: int) -> tuple[int, list[str], list[Rom]]:
    """What turns `values` into `results`: stages, Verilog, memories. row: bits of a row's number."""
    return (_thresholds if plan.converter == "thresholds" else _arithmetic)(index, layer, plan, row)


def _unrolled(index: int | str, layer: Layer, plan: Fold) -> tuple[str, list[Rom]]:
    """`layer_text` of a layer with its weights in the logic: `start` one cycle before `acts`."""
    rows, acc = plan.spec.out_features, layer.acc_bits
    stages, sums = sum_lines(layer)
    act, out = bits(layer.formats[1]), acc if layer.spec.out is None else bits(layer.spec.out)
    head = [
        f"// {layer.spec.name}: {rows} x {plan.spec.in_features} {plan.spec.weight} in the logic, "
        f"input {plan.spec.act}, {plan.cycles} cycles",
        "/* verilator lint_off WIDTH */   // two's complement is extended and cut by Verilog's own rules",
        "/* verilator lint_off UNUSED */  // not every bit of every sum is read",
        f"module layer{index} (",
        "    input clk,",
        "    input rst,",
        "    input start,",
        "    output busy,",
        "    output [0:0] col,",
        f"    input [{plan.spec.in_features * act - 1}:0] acts,",
        "    output write,",
        f"    output [{rows * out - 1}:0] results,",
        "    output finished",
        ");",
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


def _thresholds(index: int | str, layer: Layer, plan: Fold, row: int) -> tuple[int, list[str], list[Rom]]:
    """Converters that search levels of each row's own: stages, Verilog, memories. row: bits of a row's number."""
    search = search_of(layer)
    rows, steps = plan.spec.out_features // plan.units, bits(layer.spec.out)  # type: ignore[arg-type]
    lines, roms = [], []
    for step in range(1, steps - 1):
        source = "row" if step == 1 else f"row{step - 1}"
        if rows > 1:
            lines += [f"  wire [{row - 1}:0] row{step};"]
            lines += [f"  delay #(.N(1), .BITS({row})) keep{step} (clk, 1'b0, {source}, row{step});"]
    for u in range(plan.units):
        found = threshold_roms(f"layer{index}_unit{u}", search, search.table[u :: plan.units])
        roms += found
        sign = f"values[{(u + 1) * layer.acc_bits - 1}]"
        value = f"values[{u * layer.acc_bits} +: {layer.acc_bits}]"
        lines += _search_lines(u, found, rows, value, sign, search.bits - layer.acc_bits, search)
        lines += _coded_lines(u, search, steps, f"results[{u * steps} +: {steps}]")
    return steps, lines, roms


SCALES = {"constant": 0, "runtime": 1, "shift": 2}


def _arithmetic(index: int | str, layer: Layer, plan: Fold, row: int) -> tuple[int, list[str], list[Rom]]:
    """Converters that multiply and add, then round or search levels shared by all rows: as `_thresholds`."""
    found, out = solve(layer), layer.spec.out
    assert found is not None and out is not None
    acc, width, k, n = layer.acc_bits, found.bits, found.factor_bits, bits(out)
    base = 0
    factors = found.factors
    if found.kind == "shift":
        base = int(factors.min()).bit_length() - 1
        factors = np.array([int(f).bit_length() - 1 - base for f in factors])
    rows = plan.spec.out_features // plan.units
    early, late = ("next", "row") if rows > 1 else ("1'b0", "1'b0")
    lines: list[str] = []
    roms: list[Rom] = []
    grid = [round(v / unit(out)) for v in levels(out)]
    search = None
    if found.bounds is not None:
        low, high = layer.sum_range
        ends = [*(low * found.factors + found.offsets), *(high * found.factors + found.offsets)]
        search = _search(out, found.bounds[None, :].astype(object), found.bits, int(min(ends)), int(max(ends)) + 1)
    stages = 2 + n if search is not None else 7 if isinstance(out, Float) else 4
    for u in range(plan.units):
        name, mine = f"layer{index}_unit{u}", slice(u, None, plan.units)
        value = f"values[{u * acc} +: {acc}]"
        offsets = Rom(f"{name}_offset", width, tuple(int(b) & ((1 << width) - 1) for b in found.offsets[mine]))
        roms.append(offsets)
        lines += [
            f"  wire [{width - 1}:0] u{u}_offset, u{u}_t;",
            f"  {offsets.name} u{u}_offsets (clk, {late}, u{u}_offset);",
            f"  wire [{k - 1}:0] u{u}_factor;",
        ]
        scale_kind, one = found.kind, int(found.factors[0])
        if plan.unrolled and found.kind == "runtime":  # one row each: its factor is a constant
            scale_kind, one = "constant", int(found.factors[u])
        if scale_kind == "constant":
            lines += [f"  assign u{u}_factor = {k}'d0;"]
        else:
            scale = Rom(f"{name}_factor", k, tuple(int(m) for m in factors[mine]))
            roms.append(scale)
            lines += [f"  {scale.name} u{u}_factors (clk, {early}, u{u}_factor);"]
        lines += [
            f"  affine #(.ACC({acc}), .SCALE({SCALES[scale_kind]}), .K({k}), .FACTOR({one}), .BASE({base}), "
            f".T({width}))",
            f"    u{u}_affine (clk, {value}, u{u}_factor, u{u}_offset, u{u}_t);",
        ]
        slots = found.patch_slots
        code = f"results[{u * n} +: {n}]"
        if slots:
            lines += [f"  wire [{n - 1}:0] u{u}_result;"]
            result = f"u{u}_result"
        else:
            result = code
        if search is not None:
            memories = threshold_roms(name, search, search.table)
            roms += memories
            lines += _search_lines(u, memories, 1, f"u{u}_t", f"u{u}_t[{width - 1}]", search.bits - width, search)
            lines += _coded_lines(u, search, n, result)
        elif isinstance(out, Float):
            least, most = 4 * grid[found.low], 4 * grid[found.high]
            x = max(signed_bits(least, most), out.exp + out.man + 3)
            lines += [
                f"  wire [{x - 1}:0] u{u}_quarters;",
                f"  jam #(.T({width}), .SHIFT({found.shift}), .X({x}), .LOW({least}), .HIGH({most})) "
                f"u{u}_jam (clk, u{u}_t, u{u}_quarters);",
                f"  to_float #(.X({x}), .EXP({out.exp}), .MAN({out.man})) u{u}_float (clk, u{u}_quarters, {result});",
            ]
        else:
            lines += [
                f"  round_clip #(.T({width}), .SHIFT({found.shift}), .OUT({n}), .LOW({grid[found.low]}), "
                f".HIGH({grid[found.high]})) u{u}_round (clk, u{u}_t, {result});",
            ]
        if slots:
            entries = Rom(
                f"{name}_patch",
                slots * (acc + n),
                tuple(_patch_word(layer, found, r, slots) for r in range(u, len(factors), plan.units)),
            )
            roms.append(entries)
            lines += [
                f"  wire [{entries.width - 1}:0] u{u}_entries;",
                f"  {entries.name} u{u}_patches (clk, {early}, u{u}_entries);",
                f"  patch #(.ACC({acc}), .OUT({n}), .N({slots}), .STAGES({stages}))",
                f"    u{u}_patch (clk, {value}, u{u}_entries, {result}, {code});",
            ]
    return stages, lines, roms


def _patch_word(layer: Layer, found: Affine, row: int, slots: int) -> int:
    """The row's entries {code, sum}; unused slots repeat one, or state the lowest sum's own code."""
    assert layer.thresholds is not None
    listed = list(found.patches[row])
    if not listed:
        low = int(layer.sum_range[0][row])
        listed = [(low, int(np.searchsorted(layer.thresholds[row].astype(np.int64), low, side="right")))]
    listed += [listed[0]] * (slots - len(listed))
    acc, mask = layer.acc_bits, (1 << layer.acc_bits) - 1
    width = acc + bits(layer.spec.out)  # type: ignore[arg-type]
    return sum(((code_of(layer, rank) << acc) | (s & mask)) << (i * width) for i, (s, rank) in enumerate(listed))


def _addresses(line: str) -> list[str]:
    """Words of a line of Verilog."""
    return re.findall(r"[A-Za-z_0-9]+", line)


def _search_lines(
    u: int, memories: list[Rom], rows: int, source: str, sign: str, extend: int, search: Search
) -> Iterator[str]:
    """The search of one converter: memory `step` is read in the cycle before it is compared with.

    source, extended by `extend` copies of `sign`, is the value searched for.
    """
    level = search.bits
    value = f"{{{{{extend}{{{sign}}}}}, {source}}}" if extend else source
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


def _coded_lines(u: int, search: Search, steps: int, target: str) -> Iterator[str]:
    """The number of the interval found, as a code on `target`."""
    yield (
        f"  interval_code #(.KIND({search.kind}), .BITS({steps})) u{u}_code "
        f"(u{u}_found{steps}[{steps - 1}:0], {target});"
    )
    yield f"  wire u{u}_unused = &{{1'b0, u{u}_value{steps}, u{u}_found{steps}[{steps}]}};"
