// N results at once in, one per cycle out: how several elements share one converter.
module serialize #(
    parameter N = 4, parameter BITS = 16
) (
    input clk,
    input load,
    input [N*BITS-1:0] values,
    output [BITS-1:0] value
);
  reg [N*BITS-1:0] held;
  always @(posedge clk) held <= load ? values : held >> BITS;
  assign value = held[BITS-1:0];
endmodule
