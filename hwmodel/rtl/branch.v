// One stream to N readers, each at its own pace: a beat goes once all have taken it.
// No `out_valid` waits for another reader's `out_ready`, so readers may wait for each other behind their queues.
module branch #(
    parameter N = 2
) (
    input clk,
    input rst,
    input in_valid,
    output in_ready,
    output [N-1:0] out_valid,
    input [N-1:0] out_ready
);
  reg [N-1:0] done;
  assign out_valid = {N{in_valid}} & ~done;
  assign in_ready = &(done | out_ready);
  always @(posedge clk)
    done <= (rst | (in_valid & in_ready)) ? {N{1'b0}} : done | (out_valid & out_ready);
endmodule
