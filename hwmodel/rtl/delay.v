// BITS wires, N cycles later; all zero after a reset.
module delay #(
    parameter N = 3, parameter BITS = 1
) (
    input clk,
    input rst,
    input [BITS-1:0] in,
    output [BITS-1:0] out
);
  reg [N*BITS-1:0] held;
  wire [(N+1)*BITS-1:0] moved = {held, in};
  always @(posedge clk) held <= rst ? {N*BITS{1'b0}} : moved[N*BITS-1:0];
  assign out = moved[(N+1)*BITS-1 -: BITS];
endmodule
