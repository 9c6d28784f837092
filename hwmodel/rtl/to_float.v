// Fixed point -> minifloat code: x counts half-steps, i.e. G bits below the smallest subnormal.
// Magnitude; position of the leading one; shift; round half to even, whose carry runs into the
// exponent field by itself; saturate.
/* verilator lint_off WIDTH */   // two's complement is extended and cut by Verilog's own rules
/* verilator lint_off UNUSED */  // ports and wires serve the general case
module to_float #(
    parameter X = 14, parameter EXP = 2, parameter MAN = 1, parameter G = 2
) (
    input clk,
    input signed [X-1:0] x,
    output reg [EXP+MAN:0] code
);
  localparam TOP = (1 << EXP) - 1;                   // largest exponent field
  localparam KEEP = MAN + 1 + G;                     // bits after the shift
  reg [X-1:0] mag, mag2;
  reg neg, neg2, neg3, over, over3;
  reg [EXP-1:0] field, field2;
  reg [KEEP-1:0] norm;
  reg sticky;
  integer i;
  always @* begin
    field = 0;
    for (i = 1; i <= TOP; i = i + 1) if (|(mag >> (MAN + G + i - 1))) field = i;
  end
  wire [EXP-1:0] shift = (field2 == 0) ? 0 : field2 - 1;
  wire [X-1:0] moved = mag2 >> shift;
  wire [X-1:0] lost = mag2 & ~({X{1'b1}} << shift);
  reg [EXP-1:0] field3;
  wire up = norm[G-1] & (sticky | (|norm[G-1:0] & (|(norm << (KEEP - G + 1)))) | norm[G]);
  wire [EXP+MAN:0] packed_code;
  generate
    if (MAN == 0) assign packed_code = {1'b0, field3} + up;
    else assign packed_code = {1'b0, field3, norm[G+MAN-1:G]} + up;
  endgenerate
  always @(posedge clk) begin
    mag <= x[X-1] ? -x : x;
    neg <= x[X-1];
    mag2 <= mag;
    neg2 <= neg;
    field2 <= field;
    over <= |(mag >> (MAN + G + TOP));
    norm <= moved;
    sticky <= |lost;
    field3 <= field2;
    neg3 <= neg2;
    over3 <= over;
    code <= {neg3, (over3 | packed_code[EXP+MAN]) ? {(EXP+MAN){1'b1}} : packed_code[EXP+MAN-1:0]};
  end
endmodule
/* verilator lint_on WIDTH */
/* verilator lint_on UNUSED */
