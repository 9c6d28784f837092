// One coded number as significand, left shift and sign: value = (neg ? -1 : 1) * sig << shift,
// in units of the format's smallest step. Wires and, for minifloats, one small adder.
// KIND 0 signed integer, 1 unsigned integer, 2 minifloat, 3 ternary, 4 binary.
/* verilator lint_off WIDTH */   // two's complement is extended and cut by Verilog's own rules
/* verilator lint_off UNUSED */  // ports and wires serve the general case
module operand #(
    parameter KIND = 0, parameter BITS = 4, parameter EXP = 0,
    parameter SIG = 4,                               // bits of sig
    parameter SHIFT = 1                              // bits of shift
) (
    input  [BITS-1:0] code,
    output [SIG-1:0] sig,
    output [SHIFT-1:0] shift,
    output neg
);
  generate
    if (KIND == 2) begin : minifloat
      localparam MAN = BITS - 1 - EXP;
      wire [EXP-1:0] field = code[BITS-2 -: EXP];
      wire normal = |field;                          // zero field: subnormal, no hidden bit
      if (MAN == 0) assign sig = normal;
      else assign sig = {normal, code[SIG-2:0]};
      assign shift = field - normal;
      assign neg = code[BITS-1];
    end else begin : whole
      assign shift = 0;
      assign sig = (KIND == 3) ? code[0] : (KIND == 4) ? 1'b1 : code;
      assign neg = (KIND == 3) ? code[BITS-1] : (KIND == 4) ? ~code[0] : 1'b0;
    end
  endgenerate
endmodule
/* verilator lint_on WIDTH */
/* verilator lint_on UNUSED */
