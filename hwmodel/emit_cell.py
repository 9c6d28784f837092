"""Verilog of a recurrent cell (`hwmodel.cell`): a layer between layers, with the ports of one and `clear`."""

from __future__ import annotations

import numpy as np

from hwmodel import emit_gru, emit_layer, emit_lstm, gru, lstm
from hwmodel.cell import Cell
from hwmodel.emit_rom import Rom
from hwmodel.folding import Fold, lead
from hwmodel.formats import bits
from hwmodel.gates import INDEX, G, sigmoid_table, tanh_table
from hwmodel.layer import address_bits
from hwmodel.network import Layer


def products(cell: Cell, plan: Fold) -> tuple[Layer, Layer]:
    """The products with the input and with the state, the gates of a unit at a time."""
    assert plan.parts is not None
    order = np.arange(cell.gates * cell.hidden).reshape(cell.gates, cell.hidden).T.ravel()
    x, h = (part.spec for part in plan.parts)
    return Layer(x, cell.x_codes[order], None), Layer(h, cell.h_codes[order], None)


def cell_text(index: int, cell: Cell, plan: Fold, *, beside_dsps: bool = False) -> tuple[str, list[Rom]]:
    """The module `layerN` with its two products, and the memories of all; as `emit_layer.layer_text`.

    `clear`, at its `start` or earlier but after the step before, puts the state to zero.
    """
    assert plan.parts is not None
    hidden, b, a, gates = cell.hidden, cell.state.bits, bits(cell.act), cell.gates
    x, h = plan.parts
    unit, x_col, h_col = address_bits(hidden), address_bits(x.column_folds), address_bits(h.column_folds)
    name, kind = f"layer{index}", lstm if cell.kind == "lstm" else gru
    texts, roms = [], []
    for side, layer, fold in zip("xh", products(cell, plan), plan.parts, strict=True):
        text, found = emit_layer.layer_text(f"{index}{side}", layer, fold, beside_dsps=beside_dsps)
        texts.append(text)
        roms += found
    roms.append(Rom(f"{name}_constants", cell.word_bits, cell.words()))
    half = 1 << (INDEX - 1)
    by_code = [(c + half if c < half else c - half) for c in range(2 * half)]  # two's complement index
    for what, width, values in (("sigmoid", G, sigmoid_table()), ("tanh", G + 1, tanh_table())):
        roms.append(Rom(f"{name}_{what}", width, tuple(int(values[i]) & ((1 << width) - 1) for i in by_code)))
    out = b if cell.out is None else bits(cell.out)
    leaving = [
        "  assign results = made;",
        "  assign write = wrote;",
        "  assign finished = ended;",
    ]
    if cell.coded:
        assert cell.table is not None
        roms.append(Rom(f"{name}_codes", out, tuple(cell.table.ravel().tolist())))
        leaving = [f"  {name}_codes of_next (clk, made, results);"]
        if len(cell.table) > 1:
            leaving = [
                f"  reg [{unit - 1}:0] made_at;",
                f"  always @(posedge clk) made_at <= (rst | start) ? {unit}'d0 : wrote ? made_at + 1'b1 : made_at;",
                f"  {name}_codes of_next (clk, {{made_at, made}}, results);",
            ]
        leaving.append("  delay #(.N(1), .BITS(2)) coded (clk, rst, {wrote, ended}, {write, finished});")
    made = "made" if hidden == 1 else f"{{made, next[{hidden * b - 1}:{b}]}}"
    states = f"state {cell.state}" if cell.memory is None else f"h {cell.state}, c {cell.memory}"
    instance = (emit_lstm if cell.kind == "lstm" else emit_gru).gates_text(name, cell, x.acc_bits, h.acc_bits)
    top = f"""// {cell.name}: {cell.kind.upper()} of {hidden} units, weights {cell.weight}, input {cell.act}, {states};
// SIMD {x.simd} of the input, {h.simd} of the state; {plan.cycles} cycles
module {name} (
    input clk,
    input rst,
    input clear,                                     // the state is zero before this step
    input start,
    output busy,
    output [{x_col - 1}:0] col,
    input [{x.simd * a - 1}:0] acts,
    output write,
    output [{out - 1}:0] results,
    output finished
);
  wire x_write, x_done, enough, h_busy, h_write, h_done;
  wire [{h_col - 1}:0] h_col;
  reg [{h.simd * b - 1}:0] h_acts;
  wire [{gates * x.acc_bits - 1}:0] x_results;
  wire [{gates * h.acc_bits - 1}:0] h_results;
  {name}x of_input (clk, rst, start, busy, col, acts, x_write, x_results, x_done);
  {name}h of_state (clk, rst, enough, h_busy, h_col, h_acts, h_write, h_results, h_done);

  reg [{hidden * b - 1}:0] state, next;
  always @(posedge clk) h_acts <= state[h_col*{h.simd * b} +: {h.simd * b}];

  reg [{unit - 1}:0] x_at, h_at;
  assign enough = x_write & (x_at == {unit}'d{hidden - 1 - lead(x, h)});  // the state's sums come after the input's
  reg [{gates * x.acc_bits - 1}:0] kept [0:{hidden - 1}];
  reg [{gates * x.acc_bits - 1}:0] x_sums;
  reg [{gates * h.acc_bits - 1}:0] h_sums;
  always @(posedge clk) begin
    x_at <= (rst | start) ? {unit}'d0 : x_write ? x_at + 1'b1 : x_at;
    h_at <= (rst | start) ? {unit}'d0 : h_write ? h_at + 1'b1 : h_at;
    if (x_write) kept[x_at] <= x_results;
    x_sums <= kept[h_at];
    h_sums <= h_results;
  end

  wire [{cell.word_bits - 1}:0] constants;
  wire wrote, ended;
  wire [{b - 1}:0] made;
  {name}_constants of_units (clk, h_at, constants);
  delay #(.N({kind.GATES}), .BITS(1)) to_end (clk, rst, h_done, ended);
{instance}
  always @(posedge clk) begin
    if (wrote) next <= {made};
    if (rst | clear) state <= {hidden * b}'d0;
    else if (ended) state <= {made};
  end
{chr(10).join(leaving)}
  wire unused = &{{1'b0, x_done, h_busy, next[{b - 1}:0]}};
endmodule
"""
    return "\n".join([top, *texts]), roms
