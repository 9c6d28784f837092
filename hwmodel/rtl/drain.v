// Finished sums, SHARE at a time for each converter, handed on one per cycle: `slot` chooses the
// element, `row` counts what this converter has taken (COUNT in all), `next` is its value in the coming
// cycle, for memories that are read one cycle ahead.
module drain #(
    parameter SHARE = 1, parameter COUNT = 8,
    parameter SLOT_BITS = 1, parameter ROW_BITS = 3  // at least 1 each
) (
    input clk,
    input rst,
    input done,
    output fire,
    output closing,
    output [SLOT_BITS-1:0] slot,
    output reg [ROW_BITS-1:0] row,
    output [ROW_BITS-1:0] next
);
  localparam [31:0] ROW_END = COUNT - 1;
  assign closing = row == ROW_END[ROW_BITS-1:0];
  assign next = ~fire ? row : closing ? {ROW_BITS{1'b0}} : row + 1'b1;
  always @(posedge clk) row <= rst ? {ROW_BITS{1'b0}} : next;
  generate
    if (SHARE == 1) begin : alone
      assign fire = done;
      assign slot = {SLOT_BITS{1'b0}};
    end else begin : shared
      localparam [31:0] SLOT_END = SHARE - 1;
      reg [SLOT_BITS-1:0] at;
      assign fire = done | (|at);
      assign slot = at;
      always @(posedge clk) begin
        if (rst | ~fire | (at == SLOT_END[SLOT_BITS-1:0])) at <= {SLOT_BITS{1'b0}};
        else at <= at + 1'b1;
      end
    end
  endgenerate
endmodule
