// The input vector of a layer: WRITE codes in per write, in order; SIMD codes out, one cycle after `col`.
// All at once: a shift register. Else, where writes fill words evenly: SIMD / WRITE small memories side
// by side. Else a shift register that turns by SIMD codes while the layer reads.
module operands #(
    parameter BITS = 4, parameter SIMD = 4, parameter FOLDS = 2, parameter WRITE = 1,
    parameter COL_BITS = 1
) (
    input clk,
    input rst,
    input write,
    input [WRITE*BITS-1:0] codes,
    input read,
    input [COL_BITS-1:0] col,
    output [SIMD*BITS-1:0] out
);
  localparam N = SIMD * FOLDS;
  generate
    if (FOLDS == 1 && WRITE == N) begin : direct
      reg [N*BITS-1:0] held;
      always @(posedge clk) if (write) held <= codes;
      assign out = held;
      wire unused = &{1'b0, rst, read, col};
    end else if (FOLDS == 1) begin : whole
      reg [N*BITS-1:0] held;
      always @(posedge clk) if (write) held <= {codes, held[N*BITS-1:WRITE*BITS]};
      assign out = held;
      wire unused = &{1'b0, rst, read, col};
    end else if (WRITE <= SIMD && SIMD % WRITE == 0) begin : words
      localparam PARTS = SIMD / WRITE;
      localparam [31:0] END = FOLDS - 1;
      localparam [PARTS:0] FIRST = 1;
      reg [COL_BITS-1:0] at;
      reg [PARTS-1:0] part;                          // one-hot: the memory to write next
      wire [PARTS-1:0] turned;
      if (PARTS == 1) assign turned = part;
      else assign turned = {part[PARTS-2:0], part[PARTS-1]};
      always @(posedge clk) begin
        if (rst) begin
          at <= {COL_BITS{1'b0}};
          part <= FIRST[PARTS-1:0];
        end else if (write) begin
          part <= turned;
          if (part[PARTS-1]) at <= (at == END[COL_BITS-1:0]) ? {COL_BITS{1'b0}} : at + 1'b1;
        end
      end
      wire unused = &{1'b0, read};
      genvar p;
      for (p = 0; p < PARTS; p = p + 1) begin : memory
        reg [WRITE*BITS-1:0] cells [0:FOLDS-1];
        reg [WRITE*BITS-1:0] q;
        always @(posedge clk) begin
          if (write & part[p]) cells[at] <= codes;
          q <= cells[col];
        end
        assign out[p*WRITE*BITS +: WRITE*BITS] = q;
      end
    end else begin : turning
      reg [N*BITS-1:0] held;
      reg [SIMD*BITS-1:0] q;
      wire [N*BITS-1:0] filled;
      if (WRITE == N) assign filled = codes;
      else assign filled = {codes, held[N*BITS-1:WRITE*BITS]};
      always @(posedge clk) begin
        if (write) held <= filled;
        else if (read) held <= {held[SIMD*BITS-1:0], held[N*BITS-1:SIMD*BITS]};
        q <= held[SIMD*BITS-1:0];
      end
      assign out = q;
      wire unused = &{1'b0, rst, col};
    end
  endgenerate
endmodule
