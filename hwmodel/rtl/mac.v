// LANES products, an adder tree and one accumulator: the processing element whose cost is mac_cost.
module mac #(
    parameter W_KIND = 0, parameter W_BITS = 4, parameter W_EXP = 0, parameter W_SIG = 4,
    parameter A_KIND = 0, parameter A_BITS = 4, parameter A_EXP = 0, parameter A_SIG = 4,
    parameter SHIFT = 0, parameter P = 8, parameter STYLE = 0,
    parameter OWED = 0, parameter LANES = 1, parameter ACC = 16
) (
    input clk,
    input last,
    input [LANES*W_BITS-1:0] w,
    input [LANES*A_BITS-1:0] a,
    output [ACC-1:0] out
);
  localparam LEVELS = $clog2(LANES);
  localparam SUM = (P + LEVELS < ACC) ? P + LEVELS : ACC;
  wire [LANES*P-1:0] v;
  wire [LANES-1:0] c;
  wire [SUM-1:0] sum;
  wire owed;
  genvar i;
  generate
    for (i = 0; i < LANES; i = i + 1) begin : lane
      product #(.W_KIND(W_KIND), .W_BITS(W_BITS), .W_EXP(W_EXP), .W_SIG(W_SIG),
                .A_KIND(A_KIND), .A_BITS(A_BITS), .A_EXP(A_EXP), .A_SIG(A_SIG),
                .SHIFT(SHIFT), .P(P), .STYLE(STYLE))
        prod (clk, w[i*W_BITS +: W_BITS], a[i*A_BITS +: A_BITS], v[i*P +: P], c[i]);
    end
  endgenerate
  tree #(.N(LANES), .P(P), .MAX(ACC), .OWED(OWED)) adders (clk, v, c, sum, owed);
  accumulate #(.ACC(ACC), .IN(SUM), .OWED(OWED)) adder (clk, last, sum, owed, out);
endmodule
