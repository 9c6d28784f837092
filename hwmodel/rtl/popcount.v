// Dot product of N binary pairs as the number of agreements: three pairs fill two LUT6, a count 0..3.
// The +-1 sum is 2 * out - terms; the correction is a constant of the layer.
/* verilator lint_off WIDTH */   // two's complement is extended and cut by Verilog's own rules
/* verilator lint_off UNUSED */  // ports and wires serve the general case
module popcount #(
    parameter N = 16, parameter ACC = 12
) (
    input clk,
    input last,
    input [N-1:0] w,
    input [N-1:0] a,
    output [ACC-1:0] out
);
  localparam GROUPS = (N + 2) / 3;
  localparam LEVELS = $clog2(GROUPS);
  localparam SUM = (3 + LEVELS < ACC) ? 3 + LEVELS : ACC;
  wire [3*GROUPS-1:0] same = ~(w ^ a) & {N{1'b1}};
  wire [3*GROUPS-1:0] counts;
  wire [SUM-1:0] sum;
  wire owed;
  genvar g;
  generate
    for (g = 0; g < GROUPS; g = g + 1) begin : group
      reg [1:0] count;
      always @(posedge clk) count <= {1'b0, same[3*g]} + {1'b0, same[3*g+1]} + {1'b0, same[3*g+2]};
      assign counts[3*g +: 3] = {1'b0, count};
    end
  endgenerate
  tree #(.N(GROUPS), .P(3), .MAX(ACC), .OWED(0)) adders (clk, counts, {GROUPS{1'b0}}, sum, owed);
  accumulate #(.ACC(ACC), .IN(SUM), .OWED(0)) adder (clk, last, sum, 1'b0, out);
endmodule
/* verilator lint_on WIDTH */
/* verilator lint_on UNUSED */
