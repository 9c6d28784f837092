// The sums of COUNT positions of a map, for every channel: WORDS words of PE codes a position, exact in ACC bits.
// `closing`: the beat belongs to the last position; its sums are on `sums` one cycle after it was accepted.
module mean #(
    parameter PE = 2, parameter ACC = 14, parameter BITS = 8, parameter SIGNED = 0,
    parameter WORDS = 8, parameter COUNT = 64
) (
    input clk,
    input rst,
    input accept,
    input [PE*BITS-1:0] codes,
    output closing,
    output reg [PE*ACC-1:0] sums
);
  localparam CB = (COUNT > 1) ? $clog2(COUNT) : 1;
  localparam [31:0] LAST = COUNT - 1;
  reg [CB-1:0] position;
  wire word_end;
  wire opening = position == {CB{1'b0}};
  assign closing = position == LAST[CB-1:0];
  always @(posedge clk)
    if (rst) position <= {CB{1'b0}};
    else if (accept & word_end) position <= closing ? {CB{1'b0}} : position + 1'b1;

  wire [PE*ACC-1:0] kept, more;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : lane
      wire [ACC+BITS-1:0] x = {{ACC{(SIGNED != 0) & codes[p*BITS + BITS-1]}}, codes[p*BITS +: BITS]};
      wire unused = &{1'b0, x[ACC+BITS-1:ACC]};
      assign more[p*ACC +: ACC] = (opening ? {ACC{1'b0}} : kept[p*ACC +: ACC]) + x[ACC-1:0];
    end
    if (WORDS == 1) begin : single
      assign word_end = 1'b1;
      assign kept = sums;
    end else begin : several
      localparam WB = $clog2(WORDS);
      localparam [31:0] END = WORDS - 1;
      reg [WB-1:0] word;
      (* ram_style = "distributed" *) reg [PE*ACC-1:0] cells [0:WORDS-1];
      assign word_end = word == END[WB-1:0];
      assign kept = cells[word];
      always @(posedge clk) begin
        if (accept) cells[word] <= more;
        if (rst) word <= {WB{1'b0}};
        else if (accept) word <= word_end ? {WB{1'b0}} : word + 1'b1;
      end
    end
  endgenerate
  always @(posedge clk) if (accept) sums <= more;
endmodule
