// The sequencer of a folded layer: columns innermost, then rows, then output positions; the
// weight address counts through both, and `last` closes a dot product.
module control #(
    parameter COLS = 8, parameter ROWS = 8, parameter POSITIONS = 1
) (
    input clk,
    input start,
    output reg busy,
    output reg last,
    output reg [$clog2(COLS)+1:0] col,
    output reg [$clog2(COLS*ROWS)+1:0] address
);
  reg [$clog2(ROWS)+1:0] row;
  reg [$clog2(POSITIONS)+1:0] position;
  wire col_end = col == COLS - 1;
  wire row_end = row == ROWS - 1;
  wire end_all = col_end & row_end & (position == POSITIONS - 1);
  always @(posedge clk) begin
    last <= busy & col_end;
    if (!busy) begin
      busy <= start;
      col <= 0;
      row <= 0;
      position <= 0;
      address <= 0;
    end else begin
      col <= col_end ? 0 : col + 1;
      address <= (col_end & row_end) ? 0 : address + 1;
      if (col_end) row <= row_end ? 0 : row + 1;
      if (col_end & row_end) position <= position + 1;
      busy <= !end_all;
    end
  end
endmodule
