// What follows the products of an LSTM, one hidden unit per `fire`: c' = f c + i g, h' = o tanh(c') in fixed point.
// Gates i, f, g, o lie in this order, lowest first. A sum times its factor plus its offset counts 2^-F; the tables of
// sigmoid and tanh are read one cycle after their index and count 2^-G; h counts 2^-S and c, which stays here, 2^-M.
/* verilator lint_off WIDTH */   // two's complement is extended and cut by Verilog's own rules
/* verilator lint_off UNUSED */  // ports and wires serve the general case
module lstm_gates #(
    parameter ACC_X = 16, parameter ACC_H = 16,      // bits of the sums of input and state
    parameter K = 12, parameter T = 30, parameter F = 14,
    parameter INDEX = 10, parameter S_RANGE = 3, parameter N_RANGE = 2,  // tables of +-2^RANGE
    parameter G = 10, parameter B = 8, parameter S = 7, parameter C = 8, parameter M = 5,
    parameter HIDDEN = 4, parameter AT = 2           // units, bits that count them
) (
    input clk,
    input rst,
    input start,                                     // the first unit comes next
    input fresh,                                     // c counts as zero in this step
    input fire,                                      // sums and constants come in the next cycle
    input [4*ACC_X-1:0] x_sums,
    input [4*ACC_H-1:0] h_sums,
    input [8*K+4*T-1:0] constants,                   // factors of input, of state; offsets
    output [3*INDEX-1:0] s_index,                    // of i, f, o
    input [3*G-1:0] s_value,
    output [2*INDEX-1:0] n_index,                    // of g, c'
    input [2*G+1:0] n_value,
    output write,
    output signed [B-1:0] state
);
  wire [8*T-1:0] t;
  reg [4*T-1:0] offsets, gate_t;
  always @(posedge clk) offsets <= constants[8*K +: 4*T];
  genvar g;
  generate
    for (g = 0; g < 4; g = g + 1) begin : gate
      affine #(.ACC(ACC_X), .SCALE(1), .K(K), .T(T))
        of_x (clk, x_sums[g*ACC_X +: ACC_X], constants[g*K +: K], offsets[g*T +: T], t[g*T +: T]);
      affine #(.ACC(ACC_H), .SCALE(1), .K(K), .T(T))
        of_h (clk, h_sums[g*ACC_H +: ACC_H], constants[(4+g)*K +: K], {T{1'b0}}, t[(4+g)*T +: T]);
      always @(posedge clk) gate_t[g*T +: T] <= t[g*T +: T] + t[(4+g)*T +: T];
      localparam SHIFT = F + ((g == 2) ? N_RANGE : S_RANGE) + 1 - INDEX;
      wire [INDEX-1:0] index;
      round_clip #(.T(T), .SHIFT(SHIFT), .OUT(INDEX), .LOW(-(1 << (INDEX - 1))), .HIGH((1 << (INDEX - 1)) - 1))
        round (clk, gate_t[g*T +: T], index);
      if (g == 2) begin : to_tanh
        assign n_index[0 +: INDEX] = index;
      end else begin : to_sigmoid
        assign s_index[(g == 3 ? 2 : g)*INDEX +: INDEX] = index;
      end
    end
  endgenerate

  localparam W = C + 2*G - M;                        // bits of f c
  localparam D = ((W > 2*G + 1) ? W : 2*G + 1) + 1;
  reg [C-1:0] cells [0:HIDDEN-1];
  reg [AT-1:0] read_at, write_at;
  reg signed [C-1:0] old;
  wire signed [C-1:0] made;
  wire take, made_now;
  delay #(.N(6), .BITS(1)) to_old (clk, rst, fire, take);
  delay #(.N(11), .BITS(1)) to_made (clk, rst, fire, made_now);
  always @(posedge clk) begin
    read_at <= (rst | start) ? {AT{1'b0}} : take ? read_at + 1'b1 : read_at;
    write_at <= (rst | start) ? {AT{1'b0}} : made_now ? write_at + 1'b1 : write_at;
    old <= fresh ? {C{1'b0}} : cells[read_at];
    if (made_now) cells[write_at] <= made;
  end

  wire [G+C-1:0] kept_product;
  wire [2*G:0] new_product;
  multiply #(.X_BITS(C), .X_SIGNED(1), .Y_BITS(G), .Y_SIGNED(0), .STYLE(1)) keep (old, s_value[G +: G], kept_product);
  multiply #(.X_BITS(G+1), .X_SIGNED(1), .Y_BITS(G), .Y_SIGNED(0), .STYLE(1))
    add (n_value[0 +: G+1], s_value[0 +: G], new_product);
  reg signed [G+C-1:0] kept_part;
  reg signed [2*G:0] new_part;
  reg signed [D-1:0] blend;
  wire signed [D-1:0] kept_wide = kept_part;
  always @(posedge clk) begin
    kept_part <= kept_product;
    new_part <= new_product;
    blend <= (kept_wide <<< (G - M)) + new_part;
  end
  round_clip #(.T(D), .SHIFT(2*G-M), .OUT(C), .LOW(-(1 << (C - 1))), .HIGH((1 << (C - 1)) - 1))
    c_round (clk, blend, made);
  round_clip #(.T(D), .SHIFT(2*G+N_RANGE+1-INDEX), .OUT(INDEX),
               .LOW(-(1 << (INDEX - 1))), .HIGH((1 << (INDEX - 1)) - 1))
    n_round (clk, blend, n_index[INDEX +: INDEX]);

  wire [G-1:0] o;
  delay #(.N(5), .BITS(G)) o_later (clk, 1'b0, s_value[2*G +: G], o);
  wire [2*G:0] product;
  reg [2*G:0] part;
  multiply #(.X_BITS(G+1), .X_SIGNED(1), .Y_BITS(G), .Y_SIGNED(0), .STYLE(1))
    leave (n_value[G+1 +: G+1], o, product);
  always @(posedge clk) part <= product;
  round_clip #(.T(2*G+1), .SHIFT(2*G-S), .OUT(B), .LOW(-(1 << (B - 1))), .HIGH((1 << (B - 1)) - 1))
    h_round (clk, part, state);
  delay #(.N(15), .BITS(1)) to_end (clk, rst, fire, write);
endmodule
/* verilator lint_on WIDTH */
/* verilator lint_on UNUSED */
