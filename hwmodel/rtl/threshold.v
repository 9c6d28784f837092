// Finished sum -> index of the interval it falls into, by binary search: one comparison per output
// bit and stage. The levels come from memories addressed by row and by the bits found so far, and
// can hold bias, scale and any monotone activation exactly.
module threshold #(
    parameter ACC = 16, parameter OUT = 4
) (
    input clk,
    input signed [ACC-1:0] sum,
    input [OUT*ACC-1:0] levels,
    output [OUT-1:0] index
);
  genvar b;
  generate
    for (b = 0; b < OUT; b = b + 1) begin : stage
      reg signed [ACC-1:0] value;
      reg [b:0] found;
      wire signed [ACC-1:0] level = levels[b*ACC +: ACC];
      if (b == 0) begin : first
        always @(posedge clk) begin
          value <= sum;
          found <= sum >= level;
        end
      end else begin : next
        always @(posedge clk) begin
          value <= stage[b-1].value;
          found <= {stage[b-1].found, stage[b-1].value >= level};
        end
      end
    end
  endgenerate
  assign index = stage[OUT-1].found;
endmodule
