// x * y, combinational; each operand signed or unsigned.
// STYLE 0: the `*` operator, left to the synthesizer.
// STYLE 1: radix-4 Booth rows on carry chains. One row is one two-operand add whose sum LUT
//          sees the running sum, three recoding bits and two bits of x: six inputs, one LUT6.
/* verilator lint_off WIDTH */   // two's complement is extended and cut by Verilog's own rules
/* verilator lint_off UNUSED */  // ports and wires serve the general case
module multiply #(
    parameter X_BITS = 4, parameter X_SIGNED = 1,
    parameter Y_BITS = 4, parameter Y_SIGNED = 1,
    parameter STYLE = 0
) (
    input  [X_BITS-1:0] x,
    input  [Y_BITS-1:0] y,
    output [X_BITS+Y_BITS-1:0] p
);
  generate
    if (STYLE == 0) begin : plain
      if (X_SIGNED && Y_SIGNED) assign p = $signed(x) * $signed(y);
      else if (X_SIGNED) assign p = $signed(x) * $signed({1'b0, y});
      else if (Y_SIGNED) assign p = $signed({1'b0, x}) * $signed(y);
      else assign p = x * y;
    end else begin : booth
      localparam ROWS = Y_SIGNED ? (Y_BITS + 1) / 2 : Y_BITS / 2 + 1;
      localparam N = X_BITS + 2;                     // bits of a row: |digit * x| <= 2 |x|
      wire xtop = X_SIGNED ? x[X_BITS-1] : 1'b0;
      wire ytop = Y_SIGNED ? y[Y_BITS-1] : 1'b0;
      wire [2*ROWS:0] recode = {{(2*ROWS-Y_BITS){ytop}}, y, 1'b0};
      wire [N-1:0] once  = {xtop, xtop, x};
      wire [N-1:0] twice = {xtop, x, 1'b0};
      wire [2*ROWS+N-1:0] all;
      genvar r;
      for (r = 0; r < ROWS; r = r + 1) begin : row
        wire [2:0] d = recode[2*r+2 : 2*r];
        wire one = d[1] ^ d[0];
        wire two = (d == 3'b100) | (d == 3'b011);
        wire [N-1:0] pp = (({N{one}} & once) | ({N{two}} & twice)) ^ {N{d[2]}};
        wire [N-1:0] prior;
        wire [N:0] sum = {prior, 1'b1} + {pp, d[2]};  // the last bit only makes the carry-in
        if (r == 0) assign prior = {N{1'b0}};
        else assign prior = {{2{row[r-1].sum[N]}}, row[r-1].sum[N:3]};
        if (r == ROWS - 1) assign all[2*r +: N+2] = {2'b0, sum[N:1]};
        else assign all[2*r +: 2] = sum[2:1];
      end
      assign p = all[X_BITS+Y_BITS-1:0];
    end
  endgenerate
endmodule
/* verilator lint_on WIDTH */
/* verilator lint_on UNUSED */
