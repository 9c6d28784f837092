// t = sum * factor + offset in two stages: the offset is read one cycle after the factor.
// SCALE 0: the constant FACTOR; 1: a factor of K bits; 2: sum << (BASE + factor). t is exact in T bits.
module affine #(
    parameter ACC = 16, parameter SCALE = 1, parameter K = 8, parameter FACTOR = 179, parameter BASE = 0,
    parameter T = 24
) (
    input clk,
    input signed [ACC-1:0] sum,
    input [K-1:0] factor,
    input [T-1:0] offset,
    output reg [T-1:0] t
);
  localparam REACH = (SCALE == 2) ? BASE + (1 << K) - 1 : K;
  localparam P = ACC + REACH;
  wire [P-1:0] scaled;
  wire [P+T-1:0] wide = {{T{scaled[P-1]}}, scaled};
  reg [T-1:0] product;
  generate
    if (SCALE == 0 && (FACTOR & (FACTOR - 1)) == 0) begin : power
      assign scaled = {{K{sum[ACC-1]}}, sum} * FACTOR[P-1:0];
    end else if (SCALE == 0) begin : constant
      multiply_const #(.X_BITS(ACC), .K(K), .FACTOR(FACTOR)) mul (sum, scaled);
    end else if (SCALE == 2) begin : shift
      wire [P-1:0] moved = {{REACH{sum[ACC-1]}}, sum} << factor;
      assign scaled = moved << BASE;
    end else if ((K / 2 + 1) * (ACC + 2) <= (ACC + 1) / 2 * (K + 2)) begin : factor_rows
      multiply #(.X_BITS(ACC), .X_SIGNED(1), .Y_BITS(K), .Y_SIGNED(0), .STYLE(1)) mul (sum, factor, scaled);
    end else begin : sum_rows
      multiply #(.X_BITS(K), .X_SIGNED(0), .Y_BITS(ACC), .Y_SIGNED(1), .STYLE(1)) mul (factor, sum, scaled);
    end
    if (SCALE == 0) begin : no_factor
      wire unused = &{1'b0, factor};
    end
  endgenerate
  wire unused = &{1'b0, wide[P+T-1:T]};
  always @(posedge clk) begin
    product <= wide[T-1:0];
    t <= product + offset;
  end
endmodule
