"""Verilog of converters, from sums to codes: thresholds in the order of their search, or integer arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hwmodel.accumulator import signed_bits
from hwmodel.affine import Affine, code_of, solve
from hwmodel.cost import HwError
from hwmodel.emit_rom import Rom
from hwmodel.folding import Fold
from hwmodel.formats import BINARY, TERNARY, Block, Float, Format, Int, Levels, bits, levels, min_value, unit
from hwmodel.network import Layer


def converter_lines(index: int | str, layer: Layer, plan: Fold, row: int) -> tuple[int, list[str], list[Rom]]:
    """What turns `values` into `results`: stages, Verilog, memories. row: bits of a row's number."""
    return (_thresholds if plan.converter == "thresholds" else _arithmetic)(index, layer, plan, row)


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
