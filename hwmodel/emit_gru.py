"""Verilog of a GRU's gates inside of `emit_cell`'s frame: the tables, `rtl/gru_gates.v` and the old state."""

from __future__ import annotations

from hwmodel.cell import Cell
from hwmodel.gates import INDEX, N_RANGE, S_RANGE, G


def gates_text(name: str, cell: Cell, x_bits: int, h_bits: int) -> str:
    """What reads sums and constants of a unit and drives `wrote` and `made`; x_bits, h_bits: of the sums."""
    hidden, b, t, k = cell.hidden, cell.state.bits, cell.t_bits, cell.factor_bits
    shifted = f"{hidden * b}'d0" if hidden == 1 else f"old >> {b}"
    return f"""  wire [{2 * INDEX - 1}:0] s_index;
  wire [{INDEX - 1}:0] n_index;
  wire [{2 * G - 1}:0] s_value;
  wire [{G}:0] n_value;
  wire take;
  reg [{hidden * b - 1}:0] old;
  {name}_sigmoid of_r (clk, s_index[0 +: {INDEX}], s_value[0 +: {G}]);
  {name}_sigmoid of_z (clk, s_index[{INDEX} +: {INDEX}], s_value[{G} +: {G}]);
  {name}_tanh of_n (clk, n_index, n_value);
  gru_gates #(.ACC_X({x_bits}), .ACC_H({h_bits}), .K({k}), .T({t}), .F({cell.fraction}), .INDEX({INDEX}),
              .S_RANGE({S_RANGE}), .N_RANGE({N_RANGE}), .G({G}), .B({b}), .S({cell.state_fraction}))
    gates (clk, rst, h_write, x_sums, h_sums, constants, s_index, s_value, n_index, n_value,
           take, old[{b - 1}:0], wrote, made);
  always @(posedge clk)
    if (start) old <= clear ? {hidden * b}'d0 : state;
    else if (take) old <= {shifted};
"""
