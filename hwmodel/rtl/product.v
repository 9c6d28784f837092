// Registered product of a weight and an activation, any pair of kinds, as v + c:
// v is the fixed-point product (one's complement if negated), c the 1 that negation still owes.
// Without a shifter one register stage; with one, a stage between multiplier and shifter.
/* verilator lint_off WIDTH */   // two's complement is extended and cut by Verilog's own rules
/* verilator lint_off UNUSED */  // ports and wires serve the general case
module product #(
    parameter W_KIND = 0, parameter W_BITS = 4, parameter W_EXP = 0, parameter W_SIG = 4,
    parameter A_KIND = 0, parameter A_BITS = 4, parameter A_EXP = 0, parameter A_SIG = 4,
    parameter SHIFT = 0,                             // bits of the summed shift, 0 if none
    parameter P = 8,                                 // bits of the product
    parameter STYLE = 0                              // 0 plain, 1 Booth on a, 2 Booth on w
) (
    input clk,
    input [W_BITS-1:0] w,
    input [A_BITS-1:0] a,
    output reg [P-1:0] v,
    output reg c
);
  localparam S = SHIFT ? SHIFT : 1;
  localparam W_SIGNED = W_KIND == 0;
  localparam A_SIGNED = A_KIND == 0;
  wire [W_SIG-1:0] w_sig;
  wire [A_SIG-1:0] a_sig;
  wire [S-1:0] w_shift, a_shift;
  wire w_neg, a_neg;
  operand #(.KIND(W_KIND), .BITS(W_BITS), .EXP(W_EXP), .SIG(W_SIG), .SHIFT(S)) ow (w, w_sig, w_shift, w_neg);
  operand #(.KIND(A_KIND), .BITS(A_BITS), .EXP(A_EXP), .SIG(A_SIG), .SHIFT(S)) oa (a, a_sig, a_shift, a_neg);

  localparam M = W_SIG + A_SIG;
  wire [M-1:0] m;
  generate
    if (STYLE == 2)
      multiply #(.X_BITS(A_SIG), .X_SIGNED(A_SIGNED), .Y_BITS(W_SIG), .Y_SIGNED(W_SIGNED), .STYLE(1)) mul (a_sig, w_sig, m);
    else
      multiply #(.X_BITS(W_SIG), .X_SIGNED(W_SIGNED), .Y_BITS(A_SIG), .Y_SIGNED(A_SIGNED), .STYLE(STYLE)) mul (w_sig, a_sig, m);

    wire m_top = (W_SIGNED || A_SIGNED) ? m[M-1] : 1'b0;
    if (SHIFT == 0) begin : direct
      wire [M+P-1:0] wide = {{P{m_top}}, m};
      always @(posedge clk) begin
        v <= wide[P-1:0] ^ {P{w_neg ^ a_neg}};
        c <= w_neg ^ a_neg;
      end
    end else begin : shifted
      reg [M-1:0] m1;
      reg [S-1:0] shift1;
      reg neg1;
      wire top1 = (W_SIGNED || A_SIGNED) ? m1[M-1] : 1'b0;
      wire [M+P-1:0] wide = {{P{top1}}, m1};
      always @(posedge clk) begin
        m1 <= m;
        shift1 <= w_shift + a_shift;
        neg1 <= w_neg ^ a_neg;
        v <= (wide[P-1:0] << shift1) ^ {P{neg1}};
        c <= neg1;
      end
    end
  endgenerate
endmodule
/* verilator lint_on WIDTH */
/* verilator lint_on UNUSED */
