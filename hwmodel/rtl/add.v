// PE sums of two integers, a * 2^A_SHIFT + b * 2^B_SHIFT, exact in ACC bits, one cycle later.
module add #(
    parameter PE = 2, parameter ACC = 11,
    parameter A_BITS = 8, parameter A_SIGNED = 0, parameter A_SHIFT = 0,
    parameter B_BITS = 8, parameter B_SIGNED = 1, parameter B_SHIFT = 1
) (
    input clk,
    input [PE*A_BITS-1:0] a,
    input [PE*B_BITS-1:0] b,
    output reg [PE*ACC-1:0] sums
);
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : lane
      wire [ACC+A_BITS-1:0] x = {{ACC{(A_SIGNED != 0) & a[p*A_BITS + A_BITS-1]}}, a[p*A_BITS +: A_BITS]};
      wire [ACC+B_BITS-1:0] y = {{ACC{(B_SIGNED != 0) & b[p*B_BITS + B_BITS-1]}}, b[p*B_BITS +: B_BITS]};
      wire unused = &{1'b0, x[ACC+A_BITS-1:ACC], y[ACC+B_BITS-1:ACC]};
      always @(posedge clk) sums[p*ACC +: ACC] <= (x[ACC-1:0] << A_SHIFT) + (y[ACC-1:0] << B_SHIFT);
    end
  endgenerate
endmodule
