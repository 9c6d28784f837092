// First in, first out: DEPTH words of BITS bits, the oldest on `out` one cycle after it was written.
// Never written when full: whoever writes has reserved the room.
module fifo #(
    parameter BITS = 8, parameter DEPTH = 6
) (
    input clk,
    input rst,
    input write,
    input [BITS-1:0] in,
    output valid,
    input take,
    output [BITS-1:0] out
);
  localparam AB = (DEPTH > 1) ? $clog2(DEPTH) : 1;
  localparam [31:0] END = DEPTH - 1;
  (* ram_style = "distributed" *) reg [BITS-1:0] cells [0:DEPTH-1];
  reg [AB-1:0] head, tail;
  reg [AB:0] held;
  assign valid = |held;
  assign out = cells[tail];
  always @(posedge clk) begin
    if (write) cells[head] <= in;
    if (rst) head <= {AB{1'b0}};
    else if (write) head <= (head == END[AB-1:0]) ? {AB{1'b0}} : head + 1'b1;
    if (rst) tail <= {AB{1'b0}};
    else if (take) tail <= (tail == END[AB-1:0]) ? {AB{1'b0}} : tail + 1'b1;
    if (rst) held <= {(AB+1){1'b0}};
    else held <= held + {{AB{1'b0}}, write} - {{AB{1'b0}}, take};
  end
endmodule
