// Counts `move`s from 0 to N - 1 and around; `start` begins anew. `last`: it stands at N - 1.
module steps #(
    parameter N = 3
) (
    input clk,
    input start,
    input move,
    output last
);
  generate
    if (N == 1) begin : one
      assign last = 1'b1;
      wire unused = &{1'b0, clk, start, move};
    end else begin : many
      localparam B = $clog2(N);
      localparam [31:0] END = N - 1;
      reg [B-1:0] at;
      assign last = at == END[B-1:0];
      always @(posedge clk) if (start | move) at <= (start | last) ? {B{1'b0}} : at + 1'b1;
    end
  endgenerate
endmodule
