// Sums whose code is listed: N entries {code, sum}, read one cycle ahead, replace what comes out of the
// arithmetic STAGES cycles later.
module patch #(
    parameter ACC = 16, parameter OUT = 8, parameter N = 1, parameter STAGES = 4
) (
    input clk,
    input [ACC-1:0] sum,
    input [N*(ACC+OUT)-1:0] entries,
    input [OUT-1:0] code,
    output [OUT-1:0] out
);
  wire [N-1:0] hits;
  wire [OUT-1:0] listed;
  genvar i;
  generate
    for (i = 0; i < N; i = i + 1) begin : entry
      assign hits[i] = sum == entries[i*(ACC+OUT) +: ACC];
      wire [OUT-1:0] own = entries[i*(ACC+OUT)+ACC +: OUT] & {OUT{hits[i]}};
      wire [OUT-1:0] all;
      if (i == 0) begin : first
        assign all = own;
      end else begin : next
        assign all = own | entry[i-1].all;
      end
    end
  endgenerate
  assign listed = entry[N-1].all;
  wire hit;
  wire [OUT-1:0] other;
  delay #(.N(STAGES), .BITS(OUT + 1)) wait_for_code (clk, 1'b0, {|hits, listed}, {hit, other});
  assign out = hit ? other : code;
endmodule
