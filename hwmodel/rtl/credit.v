// Room for DEPTH results that are on their way or wait: `book` takes one, `free` gives one back.
module credit #(
    parameter DEPTH = 9
) (
    input clk,
    input rst,
    input book,
    input free,
    output room
);
  localparam B = $clog2(DEPTH + 1);
  localparam [31:0] ALL = DEPTH;
  reg [B-1:0] held;
  wire [B:0] more = {1'b0, held} + {{B{1'b0}}, book} - {{B{1'b0}}, free};
  wire unused = &{1'b0, more[B]};
  assign room = held != ALL[B-1:0];
  always @(posedge clk) held <= rst ? {B{1'b0}} : more[B-1:0];
endmodule
