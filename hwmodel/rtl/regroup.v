// IN codes a beat to OUT codes a beat, in order and without delay: collected, split, or split and then collected.
module regroup #(
    parameter BITS = 4, parameter IN = 4, parameter OUT = 6, parameter PART = 2  // their greatest common divisor
) (
    input clk,
    input rst,
    input in_valid,
    output in_ready,
    input [IN*BITS-1:0] in,
    output out_valid,
    input out_ready,
    output [OUT*BITS-1:0] out
);
  localparam SPLIT = IN / PART, COLLECT = OUT / PART;
  localparam WIDE = PART * BITS;
  wire part_valid, part_ready;
  wire [WIDE-1:0] part;
  wire unused = &{1'b0, clk, rst};
  generate
    if (SPLIT == 1) begin : whole
      assign part = in;
      assign part_valid = in_valid;
      assign in_ready = part_ready;
    end else begin : splitting
      localparam B = $clog2(SPLIT);
      localparam [31:0] END = SPLIT - 1;
      reg [B-1:0] at;
      wire last = at == END[B-1:0];
      assign part = in[at*WIDE +: WIDE];
      assign part_valid = in_valid;
      assign in_ready = part_ready & last;
      always @(posedge clk) begin
        if (rst) at <= {B{1'b0}};
        else if (part_valid & part_ready) at <= last ? {B{1'b0}} : at + 1'b1;
      end
    end
    if (COLLECT == 1) begin : single
      assign out = part;
      assign out_valid = part_valid;
      assign part_ready = out_ready;
    end else begin : collecting
      localparam B = $clog2(COLLECT);
      localparam [31:0] END = COLLECT - 1;
      reg [B-1:0] at;
      reg [(COLLECT-1)*WIDE-1:0] held;
      wire last = at == END[B-1:0];
      wire [COLLECT*WIDE-1:0] filled = {part, held};
      assign out = filled;
      assign out_valid = part_valid & last;
      assign part_ready = out_ready | ~last;
      always @(posedge clk) begin
        if (part_valid & ~last) held <= filled[COLLECT*WIDE-1:WIDE];
        if (rst) at <= {B{1'b0}};
        else if (part_valid & part_ready) at <= last ? {B{1'b0}} : at + 1'b1;
      end
    end
  endgenerate
endmodule
