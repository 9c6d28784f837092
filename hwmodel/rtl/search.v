// One step of a binary search for the interval that a sum lies in. `levels` holds both levels this
// step may need, because their memory was read in the cycle before, when the last bit of `found`
// was being decided: memories have registered outputs and a step still takes one cycle.
module search #(
    parameter BITS = 16, parameter STEP = 1          // bits found so far, one leading zero more in `found`
) (
    input clk,
    input signed [BITS-1:0] value,
    input [STEP:0] found,
    input [2*BITS-1:0] levels,
    output reg signed [BITS-1:0] value_out,
    output reg [STEP+1:0] found_out
);
  wire signed [BITS-1:0] level = found[0] ? levels[2*BITS-1:BITS] : levels[BITS-1:0];
  always @(posedge clk) begin
    value_out <= value;
    found_out <= {found, value >= level};
  end
endmodule
