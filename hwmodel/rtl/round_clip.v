// Fixed point -> integer in two stages: x / 2^SHIFT rounded half to even, then kept in LOW .. HIGH.
module round_clip #(
    parameter T = 24, parameter SHIFT = 12,          // 1 <= SHIFT <= T - 2
    parameter OUT = 8, parameter LOW = -128, parameter HIGH = 127
) (
    input clk,
    input [T-1:0] x,
    output reg [OUT-1:0] out
);
  localparam Q = T - SHIFT + 1;
  localparam WIDE = (Q > OUT + 1) ? Q : OUT + 2;
  localparam TOP = $clog2(HIGH + 1);
  localparam signed [31:0] LEAST = LOW;
  localparam signed [31:0] MOST = HIGH;
  wire [Q-1:0] floor = {x[T-1], x[T-1:SHIFT]};
  wire sticky;
  generate
    if (SHIFT > 1) begin : low_bits
      assign sticky = |x[SHIFT-2:0];
    end else begin : no_low_bits
      assign sticky = 1'b0;
    end
  endgenerate
  wire [WIDE+Q-1:0] long = {{WIDE{floor[Q-1]}}, floor} + {{(WIDE+Q-1){1'b0}}, x[SHIFT-1] & (sticky | floor[0])};
  wire unused = &{1'b0, long[WIDE+Q-1:WIDE]};
  reg signed [WIDE-1:0] q;
  wire signed [WIDE-1:0] rounded = $signed(long[WIDE-1:0]);
  wire over, under;
  generate
    if (HIGH == (1 << TOP) - 1) begin : round_top
      assign over = ~q[WIDE-1] & (|q[WIDE-2:TOP]);
    end else begin : any_top
      assign over = q > $signed(MOST[WIDE-1:0]);
    end
    if (LOW == 0) begin : no_negative
      assign under = q[WIDE-1];
    end else begin : any_bottom
      assign under = q < $signed(LEAST[WIDE-1:0]);
    end
  endgenerate
  always @(posedge clk) begin
    q <= rounded;
    out <= under ? LEAST[OUT-1:0] : over ? MOST[OUT-1:0] : q[OUT-1:0];
  end
endmodule
