// x * FACTOR for a positive constant: one add or subtract per digit of its canonical signed form,
// at most every second bit. Written as a chain that hands its low bits on, so that no flow
// merges the adds back into one multiplication.
/* verilator lint_off WIDTH */   // two's complement is extended and cut by Verilog's own rules
/* verilator lint_off UNUSED */  // ports and wires serve the general case
module multiply_const #(
    parameter X_BITS = 16, parameter K = 8, parameter FACTOR = 179
) (
    input  [X_BITS-1:0] x,
    output [X_BITS+K-1:0] p
);
  localparam [K+2:0] HALF = FACTOR >> 1;
  localparam [K+2:0] THRICE = FACTOR + HALF;
  localparam [K+2:0] DIFFER = HALF ^ THRICE;
  localparam [K+2:0] PLUS = THRICE & DIFFER;
  localparam [K+2:0] MINUS = HALF & DIFFER;
  localparam N = X_BITS + 2;
  wire [N-1:0] wide = {{2{x[X_BITS-1]}}, x};
  wire [K+N:0] all;
  genvar i;
  generate
    for (i = 0; i <= K; i = i + 1) begin : digit
      wire [N-1:0] prior;
      wire [N-1:0] after;
      if (i == 0) assign prior = {N{1'b0}};
      else assign prior = {digit[i-1].after[N-1], digit[i-1].after[N-1:1]};
      if (PLUS[i]) assign after = prior + wide;
      else if (MINUS[i]) assign after = prior - wide;
      else assign after = prior;
      if (i == K) assign all[i +: N] = after;
      else assign all[i] = after[0];
    end
  endgenerate
  assign p = all[X_BITS+K-1:0];
endmodule
/* verilator lint_on WIDTH */
/* verilator lint_on UNUSED */
