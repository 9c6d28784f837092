// Number of an interval -> code of the level it stands for. The levels are laid out around the middle:
// KIND 0 two's complement (signed integers, ternary), 1 the number itself (unsigned, binary), 2 sign and
// magnitude (minifloats, whose codes ascend with the magnitude).
module interval_code #(
    parameter KIND = 0, parameter BITS = 4
) (
    input [BITS-1:0] index,
    output [BITS-1:0] code
);
  generate
    if (KIND == 1) begin : plain
      assign code = index;
    end else if (KIND == 0) begin : twos
      if (BITS == 1) assign code = ~index;
      else assign code = {~index[BITS-1], index[BITS-2:0]};
    end else begin : magnitude
      assign code = {~index[BITS-1], index[BITS-1] ? index[BITS-2:0] : -index[BITS-2:0]};
    end
  endgenerate
endmodule
