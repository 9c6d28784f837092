// The greatest code, or the sum of the codes, of each of PE channels of a window: TAPS words of PE codes a result,
// WORDS results a position, back to back as `rtl/window.v` gives them from two cycles after `start`.
// KIND says which code is greater, as in `interval_code`: 0 two's complement, 1 unsigned, 2 sign and magnitude.
// SUM: OUT bits hold every sum of the integers (KIND 0 and 1). `write` comes with a result, one cycle behind its last
// word.
module pool #(
    parameter PE = 2, parameter BITS = 8, parameter OUT = 8, parameter KIND = 1, parameter SUM = 0,
    parameter TAPS = 4, parameter WORDS = 2
) (
    input clk,
    input rst,
    input start,
    input [PE*BITS-1:0] codes,
    output reg write,
    output reg [PE*OUT-1:0] results
);
  localparam B = (TAPS > 1) ? $clog2(TAPS) : 1;
  localparam W = (WORDS > 1) ? $clog2(WORDS) : 1;
  localparam [31:0] END = TAPS - 1, LAST = WORDS - 1;
  reg busy, running;                                 // a word is on its way; on `codes`
  reg [B-1:0] tap;                                   // of the word on `codes`
  reg [W-1:0] word;
  wire tap_end = tap == END[B-1:0];
  wire ends = running & tap_end & (word == LAST[W-1:0]);
  wire opening = tap == {B{1'b0}};
  always @(posedge clk) begin
    busy <= start & ~rst;
    running <= ~rst & (busy | (running & ~ends));
    write <= ~rst & running & tap_end;
    if (~running | tap_end) tap <= {B{1'b0}};
    else tap <= tap + 1'b1;
    if (~running | ends) word <= {W{1'b0}};
    else if (tap_end) word <= word + 1'b1;
  end

  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : lane
      wire [BITS-1:0] x = codes[p*BITS +: BITS];
      if (SUM) begin : sums
        wire [OUT+BITS-1:0] wide = {{OUT{(KIND == 0) & x[BITS-1]}}, x};
        wire unused = &{1'b0, wide[OUT+BITS-1:OUT]};
        always @(posedge clk)
          results[p*OUT +: OUT] <= (opening ? {OUT{1'b0}} : results[p*OUT +: OUT]) + wide[OUT-1:0];
      end else begin : most
        wire [BITS-1:0] held = results[p*OUT +: OUT];
        wire [BITS-1:0] turn = (KIND == 1) ? {BITS{1'b0}} : {BITS{1'b1}} << (BITS - 1);
        wire [BITS-1:0] a = x ^ ((KIND == 2 && x[BITS-1]) ? {BITS{1'b1}} : turn);
        wire [BITS-1:0] b = held ^ ((KIND == 2 && held[BITS-1]) ? {BITS{1'b1}} : turn);
        always @(posedge clk) if (opening | (a > b)) results[p*OUT +: OUT] <= x;
      end
    end
  endgenerate
endmodule
