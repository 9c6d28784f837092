// acc <= last ? 0 : acc + sum + owed, and out holds each finished total while the next one runs.
// The clear is the flip-flops' own synchronous reset: one LUT per bit and no idle cycle.
/* verilator lint_off WIDTH */   // two's complement is extended and cut by Verilog's own rules
/* verilator lint_off UNUSED */  // ports and wires serve the general case
module accumulate #(
    parameter ACC = 16, parameter IN = 8, parameter OWED = 1
) (
    input clk,
    input last,
    input [IN-1:0] sum,
    input owed,
    output reg [ACC-1:0] out
);
  reg [ACC-1:0] acc;
  wire [ACC-1:0] wide = $signed(sum);
  wire [ACC-1:0] total;
  generate
    if (OWED) begin : carried
      wire [ACC:0] twice = {acc, owed} + {wide, 1'b1};
      assign total = twice[ACC:1];
    end else begin : plain
      assign total = acc + wide;
    end
  endgenerate
  always @(posedge clk) begin
    acc <= last ? {ACC{1'b0}} : total;
    if (last) out <= total;
  end
endmodule
/* verilator lint_on WIDTH */
/* verilator lint_on UNUSED */
