// First in, first out: DEPTH words of BITS bits and one more on `out`, the oldest two cycles after it was written.
// `in_ready` and `out_valid` are registers' alone. BLOCK: in block RAM, else in LUTs.
module queue #(
    parameter BITS = 8, parameter DEPTH = 6, parameter BLOCK = 0
) (
    input clk,
    input rst,
    input in_valid,
    output in_ready,
    input [BITS-1:0] in,
    output reg out_valid,
    input out_ready,
    output reg [BITS-1:0] out
);
  localparam AB = (DEPTH > 1) ? $clog2(DEPTH) : 1;
  localparam HB = $clog2(DEPTH + 1);
  localparam [31:0] END = DEPTH - 1, ALL = DEPTH;
  reg [AB-1:0] head, tail;
  reg [HB-1:0] held;
  wire write = in_valid & in_ready;
  wire read = (|held) & (~out_valid | out_ready);
  assign in_ready = held != ALL[HB-1:0];
  wire [HB:0] more = {1'b0, held} + {{HB{1'b0}}, write} - {{HB{1'b0}}, read};
  wire unused = &{1'b0, more[HB]};
  always @(posedge clk) begin
    if (rst) head <= {AB{1'b0}};
    else if (write) head <= (head == END[AB-1:0]) ? {AB{1'b0}} : head + 1'b1;
    if (rst) tail <= {AB{1'b0}};
    else if (read) tail <= (tail == END[AB-1:0]) ? {AB{1'b0}} : tail + 1'b1;
    held <= rst ? {HB{1'b0}} : more[HB-1:0];
    out_valid <= ~rst & (read | (out_valid & ~out_ready));
  end
  generate
    if (BLOCK) begin : block
      (* ram_style = "block" *) reg [BITS-1:0] cells [0:DEPTH-1];
      always @(posedge clk) begin
        if (write) cells[head] <= in;
        if (read) out <= cells[tail];
      end
    end else begin : distributed
      (* ram_style = "distributed" *) reg [BITS-1:0] cells [0:DEPTH-1];
      always @(posedge clk) begin
        if (write) cells[head] <= in;
        if (read) out <= cells[tail];
      end
    end
  endgenerate
endmodule
