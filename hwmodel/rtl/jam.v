// Fixed point for to_float: quarter steps, the last bit also set where a bit below was lost, so that
// rounding to any coarser step comes out as from the whole number; kept in LOW .. HIGH quarter steps.
module jam #(
    parameter T = 24, parameter SHIFT = 12,          // x counts steps / 2^SHIFT, 2 <= SHIFT <= T - 2
    parameter X = 8, parameter LOW = -96, parameter HIGH = 96
) (
    input clk,
    input [T-1:0] x,
    output reg [X-1:0] out
);
  localparam Q = T - SHIFT + 2;
  localparam WIDE = (Q > X) ? Q : X + 1;
  localparam signed [63:0] LEAST = LOW;
  localparam signed [63:0] MOST = HIGH;
  wire lost;
  generate
    if (SHIFT > 2) begin : low_bits
      assign lost = |x[SHIFT-3:0];
    end else begin : no_low_bits
      assign lost = 1'b0;
    end
  endgenerate
  wire [WIDE+Q-1:0] wide = {{WIDE{x[T-1]}}, x[T-1:SHIFT-1], x[SHIFT-2] | lost};
  wire signed [WIDE-1:0] quarters = $signed(wide[WIDE-1:0]);
  wire under = quarters < $signed(LEAST[WIDE-1:0]);
  wire over = quarters > $signed(MOST[WIDE-1:0]);
  wire unused = &{1'b0, wide[WIDE+Q-1:WIDE]};
  always @(posedge clk) out <= under ? LEAST[X-1:0] : over ? MOST[X-1:0] : quarters[X-1:0];
endmodule
