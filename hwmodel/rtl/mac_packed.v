// L dot products of LANES weights each with the same inputs: one DSP per column, and for each row its own
// tree and accumulator, as in mac.v. w: for each column the L fields of its packed weights.
module mac_packed #(
    parameter L = 2, parameter S = 15, parameter TOP = 16384, parameter W = 9, parameter A = 8,
    parameter A_SIGNED = 1, parameter P = 16, parameter PORT = 25, parameter LANES = 4, parameter ACC = 24
) (
    input clk,
    input last,
    input [LANES*L*W-1:0] w,
    input [LANES*A-1:0] a,
    output [L*ACC-1:0] out
);
  localparam LEVELS = $clog2(LANES);
  localparam Q = (P < ACC) ? P : ACC;
  localparam SUM = (Q + LEVELS < ACC) ? Q + LEVELS : ACC;
  localparam OWED = L > 1;
  wire [LANES*L*P-1:0] v;
  wire [LANES*L-1:0] c;
  genvar i, r;
  generate
    for (i = 0; i < LANES; i = i + 1) begin : column
      packed_product #(.L(L), .S(S), .TOP(TOP), .W(W), .A(A), .A_SIGNED(A_SIGNED), .P(P), .PORT(PORT))
        prod (clk, w[i*L*W +: L*W], a[i*A +: A], v[i*L*P +: L*P], c[i*L +: L]);
    end
    for (r = 0; r < L; r = r + 1) begin : row
      wire [LANES*Q-1:0] mine;
      wire [LANES-1:0] ones;
      wire [SUM-1:0] sum;
      wire owed;
      for (i = 0; i < LANES; i = i + 1) begin : pick
        assign mine[i*Q +: Q] = v[(i*L + r)*P +: Q];
        assign ones[i] = c[i*L + r];
      end
      tree #(.N(LANES), .P(Q), .MAX(ACC), .OWED(OWED)) adders (clk, mine, ones, sum, owed);
      accumulate #(.ACC(ACC), .IN(SUM), .OWED(OWED)) adder (clk, last, sum, owed, out[r*ACC +: ACC]);
    end
  endgenerate
  wire unused = &{1'b0, v};
endmodule
