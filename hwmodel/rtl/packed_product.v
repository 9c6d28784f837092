// L products of weights and one shared input from a single DSP multiplication: fields of S bits, each less one
// where the fields below it are negative; c is that one, for the adder tree to pay back.
// w holds the fields of the packed weights, W bits each; PORT bits of the DSP take them all.
module packed_product #(
    parameter L = 2, parameter S = 15, parameter TOP = 16384,  // TOP: the largest product
    parameter W = 9, parameter A = 8, parameter A_SIGNED = 1,
    parameter P = 16, parameter PORT = 25
) (
    input clk,
    input [L*W-1:0] w,
    input [A-1:0] a,
    output [L*P-1:0] v,
    output [L-1:0] c
);
  localparam [63:0] LIMIT = TOP;
  wire [PORT+L*S-1:0] joined;
  wire signed [PORT-1:0] wide = joined[PORT-1:0];
  wire signed [17:0] narrow;
  (* use_dsp = "yes" *) reg signed [PORT+17:0] m;
  wire [L*S+PORT+17:0] all = {{L*S{m[PORT+17]}}, m};
  wire unused = &{1'b0, joined[PORT+L*S-1:PORT], all[L*S+PORT+17:L*S]};
  genvar i;
  generate
    if (A_SIGNED) begin : signed_input
      assign narrow = {{(18-A){a[A-1]}}, a};
    end else begin : unsigned_input
      assign narrow = {{(18-A){1'b0}}, a};
    end
    assign joined[PORT+L*S-1:L*S] = {PORT{lane[L-1].extended[S+W-1]}};
    for (i = 0; i < L; i = i + 1) begin : lane
      wire [S+W-1:0] extended = {{S{w[(i+1)*W-1]}}, w[i*W +: W]};
      assign joined[i*S +: S] = extended[S-1:0];
      wire [S-1:0] field = all[i*S +: S];
      wire negative;
      if (LIMIT < (64'd1 << (S - 1))) begin : by_sign
        assign negative = field[S-1];
      end else begin : by_size
        assign negative = field > LIMIT[S-1:0];
      end
      wire [S+P-1:0] value = {{P{negative}}, field};
      assign v[i*P +: P] = value[P-1:0];
      if (i == 0) begin : lowest
        assign c[i] = 1'b0;
      end else begin : above
        assign c[i] = lane[i-1].negative;
      end
      wire unused_bits = &{1'b0, extended[S+W-1:S], value[S+P-1:P], negative};
    end
  endgenerate
  always @(posedge clk) m <= wide * narrow;
endmodule
