// The codes that the output positions of a convolution read, from a map that streams in line by line.
// In: beats of BITS bits, WORDS of them per input position. They go to a ring of LINES lines. Out: `start` when a
// position can be computed, and from the cycle after next, one word a cycle: for each group (GROUPS, one word of STEP
// further each), REPEATS times, the TAPS words of every kernel element, rows first; FILL outside the map.
// A position starts when its last line is there far enough and `reserved` results behind it have room, and right behind
// the one before it or PAUSE cycles later: until then its sums wait for their turns at the converters.
// A line is overwritten once a position started that does not read it. The next map waits for the end of this one and
// of its beats, read or not.
module window #(
    parameter BITS = 8, parameter WORDS = 2, parameter TAPS = 2, parameter GROUPS = 1, parameter REPEATS = 2,
    parameter WIDTH = 5, parameter HEIGHT = 6, parameter KW = 3, parameter KH = 3,
    parameter SW = 1, parameter SH = 1, parameter LEFT = 1, parameter TOP = 1,
    parameter OUT_W = 5, parameter OUT_H = 6, parameter LINES = 4,
    parameter BEATS = 1, parameter DEPTH = 4, parameter PAUSE = 2, parameter PADDED = 1, parameter BLOCK = 0,
    parameter [BITS-1:0] FILL = 0
) (
    input clk,
    input rst,
    input in_valid,
    output in_ready,
    input [BITS-1:0] in_word,
    input taken,                                     // one result has left
    output start,
    output reg [BITS-1:0] out
);
  localparam LINE = WIDTH * WORDS;
  localparam CELLS = LINES * LINE;
  localparam AB = (CELLS > 1) ? $clog2(CELLS) : 1;
  localparam CB = (LINE > 1) ? $clog2(LINE) : 1;
  localparam NEED = (OUT_W * SW + KW) * WORDS;       // beyond what the last position of a row needs
  localparam NB = $clog2(NEED + 2 * LINE + 1);
  localparam ROWS = OUT_H * SH + KH + LINES + HEIGHT + 1;
  localparam RB = $clog2(ROWS);
  localparam PB = (OUT_W > 1) ? $clog2(OUT_W) : 1;
  localparam QB = (OUT_H > 1) ? $clog2(OUT_H) : 1;
  localparam HB = $clog2(DEPTH + BEATS + 1);
  localparam [31:0] LAST_CELL = CELLS - 1, LAST_BEAT = LINE - 1, ALL = HEIGHT;
  localparam [31:0] NEED0 = (KW - LEFT) * WORDS, NEED1 = SW * WORDS;
  localparam [31:0] ROW0 = KH - TOP - 1, ROW1 = SH, SPARE = LINES - KH + 1;
  localparam [31:0] AT0 = (1 << AB) - ((LEFT * WORDS) % (1 << AB)), AT1 = (SW * WORDS) % (1 << AB);
  localparam [31:0] LINE0 = ((LINES - TOP % LINES) % LINES) * LINE;
  localparam [31:0] MOVE = (SH % LINES) * LINE, WRAP = (LINES - SH % LINES) * LINE;   // a row of positions further
  localparam [31:0] DOWN = (1 % LINES) * LINE, UP = (LINES - 1) * LINE;               // a line further
  localparam [31:0] RIGHT = (WORDS - TAPS + 1) % (1 << AB), GROUP = TAPS % (1 << AB);
  localparam [31:0] END_P = OUT_W - 1, END_Q = OUT_H - 1;
  localparam [31:0] BOOKED = BEATS, ROOM = DEPTH - BEATS, ONE = 1;

  // lines in
  reg [AB-1:0] put;
  reg [CB-1:0] beat;
  reg [RB-1:0] lines, limit;                         // lines that are there; that may be
  wire full = lines == ALL[RB-1:0];
  wire line_end = beat == LAST_BEAT[CB-1:0];
  wire accept = in_valid & in_ready;
  wire finish, ending, leave, paused;
  reg running, closing;                              // closing: the map's last position has started
  assign in_ready = ~full & ((LINES >= HEIGHT) | (lines < limit) | (closing & ~running));
  always @(posedge clk) begin
    if (rst | leave) begin
      put <= {AB{1'b0}};
      beat <= {CB{1'b0}};
      lines <= {RB{1'b0}};
    end else if (accept) begin
      put <= (put == LAST_CELL[AB-1:0]) ? {AB{1'b0}} : put + 1'b1;
      beat <= line_end ? {CB{1'b0}} : beat + 1'b1;
      if (line_end) lines <= lines + 1'b1;
    end
  end

  // the position to start next
  reg [PB-1:0] column;
  reg [QB-1:0] row;
  reg [NB-1:0] need;                                 // beats of its last line
  reg [RB-1:0] last;                                 // its last line
  reg [AB-1:0] at_next, top_next;
  wire [AB-1:0] line_down, top_down;
  reg [HB-1:0] reserved;
  wire [NB-1:0] here = {{(NB-CB){1'b0}}, beat};
  wire there = full | (lines > last) | ((lines == last) & (here >= need));
  wire room = reserved <= ROOM[HB-1:0];
  wire row_end = column == END_P[PB-1:0];
  wire map_end = row_end & (row == END_Q[QB-1:0]);
  assign start = (~running | finish) & ~closing & there & room & ~paused & ~rst;
  assign ending = start & map_end;
  assign leave = closing & full & (finish | ~running);
  wire restart = rst | ending;
  always @(posedge clk) begin
    if (rst) reserved <= {HB{1'b0}};
    else reserved <= reserved + (start ? BOOKED[HB-1:0] : {HB{1'b0}}) - {{(HB-1){1'b0}}, taken};
    running <= ~rst & (start | (running & ~finish));
    closing <= ~rst & (ending | (closing & ~leave));
    if (rst | leave) limit <= ROW0[RB-1:0] + SPARE[RB-1:0];
    else if (start) limit <= last + SPARE[RB-1:0];
    if (restart | (start & row_end)) begin
      column <= {PB{1'b0}};
      need <= NEED0[NB-1:0];
      at_next <= AT0[AB-1:0];
    end else if (start) begin
      column <= column + 1'b1;
      need <= need + NEED1[NB-1:0];
      at_next <= at_next + AT1[AB-1:0];
    end
    if (restart) begin
      row <= {QB{1'b0}};
      last <= ROW0[RB-1:0];
      top_next <= LINE0[AB-1:0];
    end else if (start & row_end) begin
      row <= row + 1'b1;
      last <= last + ROW1[RB-1:0];
      top_next <= top_down;
    end
  end

  generate
    if (PAUSE == 0) begin : eager
      assign paused = 1'b0;
    end else begin : resting
      localparam B = $clog2(PAUSE + 1);
      localparam [31:0] ALL_OF_IT = PAUSE;
      reg [B-1:0] left;
      assign paused = |left;
      always @(posedge clk) begin
        if (rst) left <= {B{1'b0}};
        else if (finish & ~start) left <= ALL_OF_IT[B-1:0];
        else if (paused) left <= left - 1'b1;
      end
    end
  endgenerate

  // the words of the running position
  wire word_end, tap_end, kernel_end, repeat_end, group_end;
  wire moves = running & ~start;
  steps #(.N(TAPS)) words (clk, start, moves, word_end);
  steps #(.N(KW)) taps (clk, start, moves & word_end, tap_end);
  steps #(.N(KH)) kernels (clk, start, moves & word_end & tap_end, kernel_end);
  steps #(.N(REPEATS)) repeats (clk, start, moves & word_end & tap_end & kernel_end, repeat_end);
  steps #(.N(GROUPS)) groups (clk, start, moves & word_end & tap_end & kernel_end & repeat_end, group_end);
  wire across = word_end & tap_end, done = across & kernel_end;
  assign finish = running & done & repeat_end & group_end;
  reg [AB-1:0] at, at_first, line, line_first;
  wire [AB-1:0] at_group = (done & repeat_end) ? at_first + GROUP[AB-1:0] : at_first;
  generate
    if (LINES == 1) begin : single
      assign line_down = line;
    end else begin : ring
      assign line_down = (line >= UP[AB-1:0]) ? line - UP[AB-1:0] : line + DOWN[AB-1:0];
    end
    if (MOVE == 0) begin : turned
      assign top_down = top_next;
    end else begin : turning
      assign top_down = (top_next >= WRAP[AB-1:0]) ? top_next - WRAP[AB-1:0] : top_next + MOVE[AB-1:0];
    end
  endgenerate
  always @(posedge clk) begin
    if (start) begin
      at <= at_next;
      at_first <= at_next;
      line <= top_next;
      line_first <= top_next;
    end else begin
      if (across) line <= kernel_end ? line_first : line_down;
      at <= across ? at_group : at + (word_end ? RIGHT[AB-1:0] : ONE[AB-1:0]);
      if (done) at_first <= at_group;
    end
  end

  // where that is: left of the map and above it numbers wrap to large ones
  wire mapped;
  generate
    if (PADDED == 0) begin : always_on
      assign mapped = 1'b1;
    end else begin : placed
      localparam XB = $clog2(OUT_W * SW + WIDTH + KW + LEFT + 1);
      localparam YB = $clog2(OUT_H * SH + HEIGHT + KH + TOP + 1);
      localparam [31:0] X0 = (1 << XB) - LEFT, X1 = SW, Y0 = (1 << YB) - TOP, Y1 = SH;
      localparam [31:0] WIDE = WIDTH, HIGH = HEIGHT;
      reg [XB-1:0] x, x_first, x_next;
      reg [YB-1:0] y, y_first, y_next;
      assign mapped = (x < WIDE[XB-1:0]) & (y < HIGH[YB-1:0]);
      always @(posedge clk) begin
        if (restart | (start & row_end)) x_next <= X0[XB-1:0];
        else if (start) x_next <= x_next + X1[XB-1:0];
        if (restart) y_next <= Y0[YB-1:0];
        else if (start & row_end) y_next <= y_next + Y1[YB-1:0];
        if (start) begin
          x <= x_next;
          x_first <= x_next;
          y <= y_next;
          y_first <= y_next;
        end else begin
          if (word_end) x <= tap_end ? x_first : x + 1'b1;
          if (across) y <= kernel_end ? y_first : y + 1'b1;
        end
      end
    end
  endgenerate

  // the ring; no word that a position needs is written while it is read
  wire [AB-1:0] get = line + at;
  generate
    if (BLOCK) begin : block
      (* ram_style = "block", no_rw_check *) reg [BITS-1:0] cells [0:CELLS-1];
      always @(posedge clk) begin
        if (accept) cells[put] <= in_word;
        if (~mapped) out <= FILL;
        else out <= cells[get];
      end
    end else begin : distributed
      (* ram_style = "distributed" *) reg [BITS-1:0] cells [0:CELLS-1];
      always @(posedge clk) begin
        if (accept) cells[put] <= in_word;
        if (~mapped) out <= FILL;
        else out <= cells[get];
      end
    end
  endgenerate
endmodule
