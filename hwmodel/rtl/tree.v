// Registered binary adder tree over N values v + c. Each adder takes one owed 1 as its carry-in
// and passes the other on, so N lanes need no adder beyond the N - 1 of the tree and the accumulator.
// OWED 0: no lane ever owes (integers), and the carry-ins disappear.
/* verilator lint_off WIDTH */   // two's complement is extended and cut by Verilog's own rules
/* verilator lint_off UNUSED */  // ports and wires serve the general case
module tree #(
    parameter N = 4, parameter P = 8, parameter MAX = 32, parameter OWED = 1,
    parameter LEVELS = $clog2(N),
    parameter OUT = (P + LEVELS < MAX) ? P + LEVELS : MAX
) (
    input clk,
    input [N*P-1:0] v,
    input [N-1:0] c,
    output [OUT-1:0] sum,
    output owed
);
  genvar l, i;
  generate
    for (l = 0; l <= LEVELS; l = l + 1) begin : level
      localparam COUNT = (N + (1 << l) - 1) >> l;
      localparam BITS = (P + l < MAX) ? P + l : MAX;
      wire [COUNT*BITS-1:0] value;
      wire [COUNT-1:0] carry;
      if (l == 0) begin : leaves
        for (i = 0; i < N; i = i + 1) begin : leaf
          assign value[i*BITS +: BITS] = $signed(v[i*P +: P]);
        end
        assign carry = c;
      end else begin : nodes
        localparam BELOW = (N + (1 << (l-1)) - 1) >> (l-1);
        localparam NARROW = (P + l - 1 < MAX) ? P + l - 1 : MAX;
        for (i = 0; i < COUNT; i = i + 1) begin : node
          reg signed [BITS-1:0] total;
          reg left;
          wire signed [NARROW-1:0] x = level[l-1].value[2*i*NARROW +: NARROW];
          if (2*i + 1 < BELOW) begin : pair
            wire signed [NARROW-1:0] y = level[l-1].value[(2*i+1)*NARROW +: NARROW];
            if (OWED) begin : carried
              wire signed [BITS:0] x1 = $signed({x, 1'b1});
              wire signed [BITS:0] y1 = $signed({y, level[l-1].carry[2*i]});
              wire signed [BITS:0] s = x1 + y1;
              always @(posedge clk) begin
                total <= s[BITS:1];
                left <= level[l-1].carry[2*i+1];
              end
            end else begin : plain
              always @(posedge clk) begin
                total <= x + y;
                left <= 1'b0;
              end
            end
          end else begin : single
            always @(posedge clk) begin
              total <= x;
              left <= level[l-1].carry[2*i];
            end
          end
          assign value[i*BITS +: BITS] = total;
          assign carry[i] = left;
        end
      end
    end
  endgenerate
  assign sum = level[LEVELS].value;
  assign owed = level[LEVELS].carry;
endmodule
/* verilator lint_on WIDTH */
/* verilator lint_on UNUSED */
