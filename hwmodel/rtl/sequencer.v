// The sequencer of a layer in a latency-bound design: columns innermost, then rows. `start` in one
// cycle makes the first address appear in the next; `last` closes a dot product and comes with the
// memory's output, one cycle after its address.
module sequencer #(
    parameter COLS = 8, parameter ROWS = 8,
    parameter COL_BITS = 3, parameter ADDRESS_BITS = 6  // at least 1 each
) (
    input clk,
    input rst,
    input start,
    output reg busy,
    output reg last,
    output reg clear,                                // one cycle before the first memory output: empty the sums
    output reg [COL_BITS-1:0] col,
    output reg [ADDRESS_BITS-1:0] address
);
  localparam [31:0] COL_END = COLS - 1;
  localparam [31:0] END = COLS * ROWS - 1;
  wire col_end = col == COL_END[COL_BITS-1:0];
  wire finish = address == END[ADDRESS_BITS-1:0];
  always @(posedge clk) begin
    clear <= start & ~rst;
    last <= busy & col_end & ~rst;
    if (rst) busy <= 1'b0;
    else busy <= start | (busy & ~finish);
    if (start | ~busy) begin
      col <= {COL_BITS{1'b0}};
      address <= {ADDRESS_BITS{1'b0}};
    end else begin
      col <= col_end ? {COL_BITS{1'b0}} : col + 1'b1;
      address <= address + 1'b1;
    end
  end
endmodule
