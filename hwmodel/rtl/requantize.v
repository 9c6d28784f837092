// Finished sum -> next layer's integer: bias, scale, shift with rounding half to even, clip.
// SCALE 0: fixed shift only; 1: run-time multiplier of K bits; 2: the constant CONST of K bits;
// 3: run-time left shift of K bits before the fixed one. ReLU is the clip at 0 of an unsigned output.
module requantize #(
    parameter ACC = 16, parameter BIAS = 1,
    parameter SCALE = 1, parameter K = 8, parameter CONST = 179,
    parameter SHIFT = 16, parameter OUT = 4, parameter OUT_SIGNED = 1
) (
    input clk,
    input signed [ACC-1:0] sum,
    input signed [ACC-1:0] bias,
    input [K-1:0] scale,
    output reg [OUT-1:0] out
);
  localparam REACH = (SCALE == 3) ? (1 << K) - 1 : (SCALE == 0) ? 0 : K;
  localparam T = ACC + REACH;
  localparam Q = T - SHIFT + 1;
  reg signed [ACC-1:0] biased;
  reg signed [T-1:0] t;
  wire signed [T-1:0] scaled;
  generate
    if (BIAS) always @(posedge clk) biased <= sum + bias;
    else always @(posedge clk) biased <= sum;
    if (SCALE == 0) assign scaled = biased;
    else if (SCALE == 1) begin : variable
      if ((K / 2 + 1) * (ACC + 2) <= (ACC + 1) / 2 * (K + 2))
        multiply #(.X_BITS(ACC), .X_SIGNED(1), .Y_BITS(K), .Y_SIGNED(0), .STYLE(1)) mul (biased, scale, scaled);
      else
        multiply #(.X_BITS(K), .X_SIGNED(0), .Y_BITS(ACC), .Y_SIGNED(1), .STYLE(1)) mul (scale, biased, scaled);
    end else if (SCALE == 2)
      multiply_const #(.X_BITS(ACC), .K(K), .FACTOR(CONST)) mul (biased, scaled);
    else assign scaled = {{REACH{biased[ACC-1]}}, biased} << scale;
  endgenerate

  wire signed [Q-1:0] floor = t >>> SHIFT;
  wire half = t[SHIFT-1];
  wire sticky = (SHIFT > 1) ? |(t << (T - SHIFT + 1)) : 1'b0;
  reg signed [Q-1:0] q;
  localparam signed [Q-1:0] HIGH = OUT_SIGNED ? (1 << (OUT-1)) - 1 : (1 << OUT) - 1;
  localparam signed [Q-1:0] LOW = OUT_SIGNED ? -(1 << (OUT-1)) : 0;
  localparam TOP = OUT_SIGNED ? OUT - 1 : OUT;       // bits from here up must all equal the sign
  wire fits = (q[Q-1:TOP] == {(Q-TOP){q[Q-1]}}) && (OUT_SIGNED || !q[Q-1]);
  always @(posedge clk) begin
    t <= scaled;
    q <= floor + (half & (sticky | floor[0]));
    out <= fits ? q[OUT-1:0] : q[Q-1] ? LOW[OUT-1:0] : HIGH[OUT-1:0];
  end
endmodule
