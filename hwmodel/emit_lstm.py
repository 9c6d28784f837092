"""Verilog of an LSTM's gates inside of `emit_cell`'s frame: the tables and `rtl/lstm_gates.v`, which keeps c."""

from __future__ import annotations

from hwmodel.cell import Cell
from hwmodel.gates import INDEX, N_RANGE, S_RANGE, G
from hwmodel.layer import address_bits


def gates_text(name: str, cell: Cell, x_bits: int, h_bits: int) -> str:
    """What reads sums and constants of a unit and drives `wrote` and `made`; x_bits, h_bits: of the sums."""
    assert cell.memory is not None
    sigmoids = "\n".join(
        f"  {name}_sigmoid of_{gate} (clk, s_index[{n * INDEX} +: {INDEX}], s_value[{n * G} +: {G}]);"
        for n, gate in enumerate("ifo")
    )
    return f"""  wire [{3 * INDEX - 1}:0] s_index;
  wire [{2 * INDEX - 1}:0] n_index;
  wire [{3 * G - 1}:0] s_value;
  wire [{2 * G + 1}:0] n_value;
  reg fresh;                                         // c counts as zero until the step ends
  always @(posedge clk) fresh <= rst | clear | (fresh & ~ended);
{sigmoids}
  {name}_tanh of_g (clk, n_index[0 +: {INDEX}], n_value[0 +: {G + 1}]);
  {name}_tanh of_c (clk, n_index[{INDEX} +: {INDEX}], n_value[{G + 1} +: {G + 1}]);
  lstm_gates #(.ACC_X({x_bits}), .ACC_H({h_bits}), .K({cell.factor_bits}), .T({cell.t_bits}), .F({cell.fraction}),
               .INDEX({INDEX}), .S_RANGE({S_RANGE}), .N_RANGE({N_RANGE}), .G({G}), .B({cell.state.bits}),
               .S({cell.state_fraction}), .C({cell.memory.bits}), .M({cell.memory_fraction}),
               .HIDDEN({cell.hidden}), .AT({address_bits(cell.hidden)}))
    gates (clk, rst, start, fresh, h_write, x_sums, h_sums, constants, s_index, s_value, n_index, n_value,
           wrote, made);
"""
