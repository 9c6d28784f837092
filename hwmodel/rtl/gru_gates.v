// What follows the products of a GRU, one hidden unit per `fire`: h' = n + z (h - n) in fixed point.
// Gates r, z, n lie in this order, lowest first. A sum times its factor plus its offset counts 2^-F; the tables of
// sigmoid and tanh are read one cycle after their index and count 2^-G; states count 2^-S.
/* verilator lint_off WIDTH */   // two's complement is extended and cut by Verilog's own rules
/* verilator lint_off UNUSED */  // ports and wires serve the general case
module gru_gates #(
    parameter ACC_X = 16, parameter ACC_H = 16,      // bits of the sums of input and state
    parameter K = 12, parameter T = 30, parameter F = 14,
    parameter INDEX = 10, parameter S_RANGE = 3, parameter N_RANGE = 2,  // tables of +-2^RANGE
    parameter G = 10, parameter B = 8, parameter S = 7
) (
    input clk,
    input rst,
    input fire,                                      // sums and constants come in the next cycle
    input [3*ACC_X-1:0] x_sums,
    input [3*ACC_H-1:0] h_sums,
    input [6*K+4*T-1:0] constants,                   // factors of input, of state; offsets of r, z, n input, n state
    output [2*INDEX-1:0] s_index,
    input [2*G-1:0] s_value,
    output [INDEX-1:0] n_index,
    input signed [G:0] n_value,
    output take,                                     // the old state is read now
    input signed [B-1:0] old,
    output write,
    output signed [B-1:0] state
);
  wire [6*T-1:0] t;
  reg [4*T-1:0] offsets;
  always @(posedge clk) offsets <= constants[6*K +: 4*T];
  genvar g;
  generate
    for (g = 0; g < 3; g = g + 1) begin : gate
      wire [T-1:0] x_offset = offsets[g*T +: T];
      wire [T-1:0] h_offset = (g == 2) ? offsets[3*T +: T] : {T{1'b0}};
      affine #(.ACC(ACC_X), .SCALE(1), .K(K), .T(T))
        of_x (clk, x_sums[g*ACC_X +: ACC_X], constants[g*K +: K], x_offset, t[g*T +: T]);
      affine #(.ACC(ACC_H), .SCALE(1), .K(K), .T(T))
        of_h (clk, h_sums[g*ACC_H +: ACC_H], constants[(3+g)*K +: K], h_offset, t[(3+g)*T +: T]);
    end
  endgenerate

  reg signed [T-1:0] r_t, z_t;
  always @(posedge clk) begin
    r_t <= t[0 +: T] + t[3*T +: T];
    z_t <= t[T +: T] + t[4*T +: T];
  end
  localparam S_SHIFT = F + S_RANGE + 1 - INDEX;
  localparam N_SHIFT = F + N_RANGE + 1 - INDEX;
  round_clip #(.T(T), .SHIFT(S_SHIFT), .OUT(INDEX), .LOW(-(1 << (INDEX - 1))), .HIGH((1 << (INDEX - 1)) - 1))
    r_round (clk, r_t, s_index[0 +: INDEX]);
  round_clip #(.T(T), .SHIFT(S_SHIFT), .OUT(INDEX), .LOW(-(1 << (INDEX - 1))), .HIGH((1 << (INDEX - 1)) - 1))
    z_round (clk, z_t, s_index[INDEX +: INDEX]);

  wire signed [T-1:0] n_x, n_h;
  delay #(.N(4), .BITS(T)) n_h_later (clk, 1'b0, t[5*T +: T], n_h);
  delay #(.N(5), .BITS(T)) n_x_later (clk, 1'b0, t[2*T +: T], n_x);
  wire [T+G-1:0] reset_product;
  multiply #(.X_BITS(T), .X_SIGNED(1), .Y_BITS(G), .Y_SIGNED(0), .STYLE(1))
    reset (n_h, s_value[0 +: G], reset_product);
  reg signed [T-1:0] reset_part, n_t;
  always @(posedge clk) begin
    reset_part <= reset_product[G +: T];
    n_t <= n_x + reset_part;
  end
  round_clip #(.T(T), .SHIFT(N_SHIFT), .OUT(INDEX), .LOW(-(1 << (INDEX - 1))), .HIGH((1 << (INDEX - 1)) - 1))
    n_round (clk, n_t, n_index);

  wire [G-1:0] z;
  delay #(.N(6), .BITS(G)) z_later (clk, 1'b0, s_value[G +: G], z);
  reg signed [G+1:0] difference;
  reg signed [G:0] n1, n2;
  reg signed [2*G+1:0] part;
  reg signed [2*G+2:0] blend;
  wire [2*G+1:0] product;
  multiply #(.X_BITS(G+2), .X_SIGNED(1), .Y_BITS(G), .Y_SIGNED(0), .STYLE(1)) update (difference, z, product);
  always @(posedge clk) begin
    difference <= (old <<< (G - S)) - n_value;
    n1 <= n_value;
    n2 <= n1;
    part <= product;
    blend <= (n2 <<< G) + part;
  end
  round_clip #(.T(2*G+3), .SHIFT(2*G-S), .OUT(B), .LOW(-(1 << (B - 1))), .HIGH((1 << (B - 1)) - 1))
    h_round (clk, blend, state);
  delay #(.N(12), .BITS(1)) to_old (clk, rst, fire, take);
  delay #(.N(17), .BITS(1)) to_end (clk, rst, fire, write);
endmodule
/* verilator lint_on WIDTH */
/* verilator lint_on UNUSED */
