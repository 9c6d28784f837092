"""A GRU cell in integers: its exact reference, its Verilog and its price.

    r = sigmoid(W_r x + U_r h + b_r), z likewise, n = tanh(W_n x + b_n + r (U_n h + c_n)), h' = n + z (h - n)

The products are two layers as `emit_layer` writes them, three rows (the gates of one hidden unit) at a time; the rest
is `rtl/gru_gates.v`: sums times factors in steps of 2^-fraction, tables of 2^INDEX entries in steps of 2^-G for
sigmoid on [-8, 8) and tanh on [-4, 4), and a state of B bits in steps of 2^-(B-1). `step` is the truth that the Verilog
equals bit for bit; against real arithmetic the tables are off by at most `table_error`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np

from hwmodel import emit_layer
from hwmodel.accumulator import exact_bits, signed_bits
from hwmodel.convert import affine, round_clip
from hwmodel.cost import Cost, HwError
from hwmodel.emit import library
from hwmodel.emit_layer import Rom, mem_text, rom_text
from hwmodel.fabric import adder
from hwmodel.folding import Fold, layer_fold
from hwmodel.formats import Format, Int, bits
from hwmodel.layer import address_bits, choice, operands
from hwmodel.mac import booth_rows
from hwmodel.memory import rom
from hwmodel.network import Layer
from hwmodel.reference import to_units
from hwmodel.simulate import SimulationError, Tool, compile_design, find_tool
from hwmodel.spec import LayerSpec, Rescale

INDEX, G = 10, 10
"""Bits of a table's index, fraction bits of its values."""
S_RANGE, N_RANGE = 3, 2
"""Tables reach from -2^RANGE to 2^RANGE: of sigmoid, of tanh."""
GATES = 17
"""Cycles from the sums of a unit to its new state (`rtl/gru_gates.v`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Gru:
    """x_codes (3 hidden, inputs), h_codes (3 hidden, hidden): weights as bit patterns, gates in the order r, z, n.

    x_factors, h_factors: int64 (3 hidden,), what a unit of a sum counts in steps of 2^-fraction. offsets: int64
    (4 hidden,), of r, z, n beside the input and n beside the state. act: format of the input; state: of h, signed.
    """

    weight: Format
    act: Int
    state: Int
    x_codes: np.ndarray
    h_codes: np.ndarray
    x_factors: np.ndarray
    h_factors: np.ndarray
    offsets: np.ndarray
    fraction: int

    def __post_init__(self) -> None:
        hidden = self.h_codes.shape[1]
        if self.h_codes.shape[0] != 3 * hidden or self.x_codes.shape[0] != 3 * hidden:
            raise HwError(
                f"a GRU of {hidden} units has {3 * hidden} rows, not {len(self.x_codes)}, {len(self.h_codes)}"
            )
        for name, fmt in (("input", self.act), ("state", self.state)):
            if not isinstance(fmt, Int):
                raise HwError(f"a GRU's {name} is an integer in hardware (int2..int8), not {fmt}")
        if not self.state.signed or not 2 <= self.state.bits <= G:
            raise HwError(f"a GRU's state is int2..int{G}, not {self.state}")
        if min(int(self.x_factors.min()), int(self.h_factors.min())) < 0:
            raise HwError("a GRU's factors are not negative")
        if not INDEX <= self.fraction or self.t_bits + G > 62:
            raise HwError(f"a GRU's gates count 2^-{INDEX} or finer, in at most {62 - G} bits, not 2^-{self.fraction}")

    @property
    def hidden(self) -> int:
        """Numbers in the state."""
        return int(self.h_codes.shape[1])

    @property
    def factor_bits(self) -> int:
        """Bits of every factor."""
        return max(1, int(max(self.x_factors.max(), self.h_factors.max())).bit_length())

    @property
    def t_bits(self) -> int:
        """Two's complement bits that hold every gate's input."""
        x, h = (
            np.abs(np.stack(layer.sum_range).astype(np.int64)).max(axis=0) * factors
            for layer, factors in zip(self.layers, (self.x_factors, self.h_factors), strict=True)
        )
        most = int((x + h).max() + np.abs(self.offsets).max() * 2)
        return max(signed_bits(-most, most), self.fraction + S_RANGE + 2)

    @property
    def layers(self) -> tuple[Layer, Layer]:
        """The products with the input and with the state, three rows a unit."""
        order = np.arange(3 * self.hidden).reshape(3, self.hidden).T.ravel()
        found = []
        for name, codes, act in (("input", self.x_codes, self.act), ("state", self.h_codes, self.state)):
            width = int(exact_bits(to_units(codes, self.weight), act).max())
            rows, columns = codes.shape
            spec = LayerSpec(f"gru.{name}", "linear", rows, columns, weight=self.weight, act=act, acc_bits=width)
            found.append(Layer(spec, codes[order], None))
        return found[0], found[1]


def step(cell: Gru, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The next state's integers (n, hidden) from integers of input (n, inputs) and state (n, hidden): int64."""
    hidden = cell.hidden
    x_sums = x.astype(np.int64) @ to_units(cell.x_codes, cell.weight).T
    h_sums = h.astype(np.int64) @ to_units(cell.h_codes, cell.weight).T
    o = cell.offsets
    t_x = x_sums * cell.x_factors + o[: 3 * hidden]
    t_h = h_sums * cell.h_factors
    t_h[:, 2 * hidden :] += o[3 * hidden :]
    r, z = (
        _looked_up(t_x[:, s] + t_h[:, s], cell.fraction, S_RANGE, _sigmoid())
        for s in (slice(hidden), slice(hidden, 2 * hidden))
    )
    n = _looked_up(t_x[:, 2 * hidden :] + ((t_h[:, 2 * hidden :] * r) >> G), cell.fraction, N_RANGE, _tanh())
    b = cell.state.bits
    blend = (n << G) + z * ((h << (G - b + 1)) - n)
    return np.clip(_halved(blend, 2 * G - b + 1), -(1 << (b - 1)), (1 << (b - 1)) - 1)


def _looked_up(t: np.ndarray, fraction: int, reach: int, table: np.ndarray) -> np.ndarray:
    half = 1 << (INDEX - 1)
    return table[np.clip(_halved(t, fraction + reach + 1 - INDEX), -half, half - 1) + half]


def _halved(t: np.ndarray, shift: int) -> np.ndarray:
    """t / 2^shift, rounded half to even."""
    floor, rest, half = t >> shift, t & ((1 << shift) - 1), 1 << (shift - 1)
    return floor + ((rest > half) | ((rest == half) & (floor & 1 == 1)))


def _table(function: Callable[[np.ndarray], np.ndarray], reach: int, low: int, high: int) -> np.ndarray:
    at = np.arange(-(1 << (INDEX - 1)), 1 << (INDEX - 1)) * 2.0 ** (reach + 1 - INDEX)
    return np.clip(np.rint(function(at) * (1 << G)), low, high).astype(np.int64)


def _sigmoid() -> np.ndarray:
    """Entries from -2^S_RANGE up, in steps of 2^-G: int64 (2^INDEX,)."""
    return _table(lambda x: 1 / (1 + np.exp(-x)), S_RANGE, 0, (1 << G) - 1)


def _tanh() -> np.ndarray:
    return _table(np.tanh, N_RANGE, -(1 << G), (1 << G) - 1)


def table_error() -> tuple[float, float]:
    """Largest error of sigmoid and of tanh at any input, rounding of the index and ends of the tables included.

    >>> [round(e, 4) for e in table_error()]
    [0.0024, 0.0042]
    """
    t = np.arange(-20 << 14, (20 << 14) + 1, 3, dtype=np.int64)
    x = t / (1 << 14)
    s = np.abs(_looked_up(t, 14, S_RANGE, _sigmoid()) / (1 << G) - 1 / (1 + np.exp(-x)))
    n = np.abs(_looked_up(t, 14, N_RANGE, _tanh()) / (1 << G) - np.tanh(x))
    return float(s.max()), float(n.max())


# ---------------------------------------------------------------------------------------------------
# Hardware


def plan(cell: Gru, simd: tuple[int, int]) -> tuple[Fold, Fold]:
    """The two products at three rows, and `simd` columns of input and of state, at once."""
    found = []
    for layer, columns in zip(cell.layers, simd, strict=True):
        fold = layer_fold(layer.spec, 3, columns)
        found.append(replace(fold, units=3, cycles=fold.cycles - fold.share + 1))
    return found[0], found[1]


def cycles(plans: tuple[Fold, Fold]) -> int:
    """From the last input beat accepted to out_valid: input product, state product, gates of the last unit."""
    return sum(p.cycles - 1 for p in plans) + GATES + 1


def cost(cell: Gru, plans: tuple[Fold, Fold]) -> Cost:
    """Of the whole cell: products, gates, tables in block RAM, states."""
    t, k, b, hidden, fraction = cell.t_bits, cell.factor_bits, cell.state.bits, cell.hidden, cell.fraction
    found = sum((p.cost for p in plans), Cost())
    found += operands(bits(cell.state), plans[1].simd, plans[1].column_folds, 1) * -1  # the state is its own buffer
    found += Cost(luts=choice(plans[1].column_folds) * plans[1].simd * b, ffs=plans[1].simd * b)
    for p in plans:
        found += affine(Rescale("runtime", k, 0, t, 0, 0), p.acc_bits) * 3 + Cost(ffs=3 * p.acc_bits)
    for width, shift, out in ((t, fraction + S_RANGE + 1 - INDEX, INDEX),) * 2 + (
        (t, fraction + N_RANGE + 1 - INDEX, INDEX),
        (2 * G + 3, 2 * G - b + 1, b),
    ):
        found += round_clip(Rescale("plain", 0, 0, width, shift, 0), out)
    luts = booth_rows(t, True, G, False) + booth_rows(G + 2, True, G, False) + 3 * adder(t, t, False)
    luts += adder(G + 2, G + 2, False) + adder(2 * G + 3, 2 * G + 2, False)
    luts += 2 * t + G + 2 * b * hidden  # delays in shift registers; the states' choices between old and new
    found += Cost(luts=luts, ffs=4 * t + 4 * t + 3 * b * hidden + 8 * G)
    found += rom(6 * k + 4 * t, hidden).cost + rom(G, 1 << INDEX).cost * 2 + rom(G + 1, 1 << INDEX).cost
    x_bits = 3 * plans[0].acc_bits
    return found + Cost(luts=4 * -(-x_bits // 6) + 8, ffs=x_bits + 2 * address_bits(hidden) + 4)


def network_text(cell: Gru, plans: tuple[Fold, Fold]) -> tuple[str, list[Rom]]:
    """The module `gru` with everything that is not in `rtl/`, and its memories."""
    hidden, b, a, t, k = cell.hidden, cell.state.bits, bits(cell.act), cell.t_bits, cell.factor_bits
    x, h = plans
    unit, x_col, h_col = address_bits(hidden), address_bits(x.column_folds), address_bits(h.column_folds)
    beats = x.column_folds
    texts, roms = [], []
    for i, (layer, fold) in enumerate(zip(cell.layers, plans, strict=True)):
        text, found = emit_layer.layer_text(i, layer, fold)
        texts.append(text)
        roms += found
    word = 6 * k + 4 * t
    constants = Rom("gru_constants", word, tuple(_word(cell, j) for j in range(hidden)))
    half = 1 << (INDEX - 1)
    by_code = [(c + half if c < half else c - half) for c in range(2 * half)]  # two's complement index
    tables = [
        Rom(name, width, tuple(int(table[i]) & ((1 << width) - 1) for i in by_code))
        for name, width, table in (("gru_sigmoid", G, _sigmoid()), ("gru_tanh", G + 1, _tanh()))
    ]
    roms += [constants, *tables]
    top = f"""// GRU of {hidden} units: {cycles(plans)} cycles from the last input beat accepted to out_valid.
// A reset clears the state.
// In: {beats} beat(s) of {x.simd} codes of {a} bits; out: the state, {hidden} codes of {b} bits, first in the low bits.
module gru (
    input clk,
    input rst,                                       // synchronous, at least one cycle
    input in_valid,
    output in_ready,
    input [{x.simd * a - 1}:0] in_codes,
    output reg out_valid,
    input out_ready,
    output [{hidden * b - 1}:0] out_state
);
  reg open;
  assign in_ready = open;
  wire accept = in_valid & open;
  reg [{x_col - 1}:0] beat;
  wire start = accept & (beat == {x_col}'d{beats - 1});
  always @(posedge clk) if (rst | start) beat <= {x_col}'d0;
    else if (accept) beat <= beat + 1'b1;

  wire x_busy, x_write, x_done, h_busy, h_write, h_done;
  wire [{x_col - 1}:0] x_col;
  wire [{h_col - 1}:0] h_col;
  wire [{x.simd * a - 1}:0] x_acts;
  reg [{h.simd * b - 1}:0] h_acts;
  wire [{3 * x.acc_bits - 1}:0] x_results;
  wire [{3 * h.acc_bits - 1}:0] h_results;
  operands #(.BITS({a}), .SIMD({x.simd}), .FOLDS({beats}), .WRITE({x.simd}), .COL_BITS({x_col}))
    inputs (clk, rst, accept, in_codes, x_busy, x_col, x_acts);
  layer0 of_input (clk, rst, start, x_busy, x_col, x_acts, x_write, x_results, x_done);
  layer1 of_state (clk, rst, x_done, h_busy, h_col, h_acts, h_write, h_results, h_done);

  reg [{hidden * b - 1}:0] state, old, next;
  always @(posedge clk) h_acts <= state[h_col*{h.simd * b} +: {h.simd * b}];

  reg [{unit - 1}:0] x_at, h_at;
  reg [{3 * x.acc_bits - 1}:0] kept [0:{hidden - 1}];
  reg [{3 * x.acc_bits - 1}:0] x_sums;
  reg [{3 * h.acc_bits - 1}:0] h_sums;
  always @(posedge clk) begin
    x_at <= (rst | start) ? {unit}'d0 : x_write ? x_at + 1'b1 : x_at;
    h_at <= (rst | start) ? {unit}'d0 : h_write ? h_at + 1'b1 : h_at;
    if (x_write) kept[x_at] <= x_results;
    x_sums <= kept[h_at];
    h_sums <= h_results;
  end

  wire [{word - 1}:0] constants;
  wire [{2 * INDEX - 1}:0] s_index;
  wire [{INDEX - 1}:0] n_index;
  wire [{2 * G - 1}:0] s_value;
  wire [{G}:0] n_value;
  wire take, write;
  wire [{b - 1}:0] made;
  gru_constants of_units (clk, h_at, constants);
  gru_sigmoid of_r (clk, s_index[0 +: {INDEX}], s_value[0 +: {G}]);
  gru_sigmoid of_z (clk, s_index[{INDEX} +: {INDEX}], s_value[{G} +: {G}]);
  gru_tanh of_n (clk, n_index, n_value);
  gru_gates #(.ACC_X({x.acc_bits}), .ACC_H({h.acc_bits}), .K({k}), .T({t}), .F({cell.fraction}), .INDEX({INDEX}),
              .S_RANGE({S_RANGE}), .N_RANGE({N_RANGE}), .G({G}), .B({b}))
    gates (clk, rst, h_write, x_sums, h_sums, constants, s_index, s_value, n_index, n_value,
           take, old[{b - 1}:0], write, made);

  wire ended;
  delay #(.N({GATES}), .BITS(1)) to_end (clk, rst, h_done, ended);
  always @(posedge clk) begin
    if (start) old <= state;
    else if (take) old <= old >> {b};
    if (write) next <= {{made, next[{hidden * b - 1}:{b}]}};
    if (rst) state <= {hidden * b}'d0;
    else if (ended) state <= {{made, next[{hidden * b - 1}:{b}]}};
    out_valid <= ~rst & (ended | (out_valid & ~out_ready));
    if (rst) open <= 1'b1;
    else if (start) open <= 1'b0;
    else if (out_valid & out_ready) open <= 1'b1;
  end
  assign out_state = state;
  wire unused = &{{1'b0, h_busy, next[{b - 1}:0]}};
endmodule
"""
    return "\n".join([top, *texts, *map(rom_text, roms)]), roms


def _word(cell: Gru, unit: int) -> int:
    """The constants of one unit, as `rtl/gru_gates.v` reads them."""
    t, k, rows = cell.t_bits, cell.factor_bits, [unit + g * cell.hidden for g in range(4)]
    fields = [(int(f[r]), k) for f in (cell.x_factors, cell.h_factors) for r in rows[:3]]
    fields += [(int(cell.offsets[r]) & ((1 << t) - 1), t) for r in rows]
    word, at = 0, 0
    for value, width in fields:
        word, at = word | value << at, at + width
    return word


def testbench_text(cell: Gru, plans: tuple[Fold, Fold]) -> str:
    """Reads hexadecimal input codes, one step after the other; writes the state after each and its cycles."""
    a, b, inputs = bits(cell.act), cell.state.bits, plans[0].spec.in_features
    wide = plans[0].simd * a
    return f"""`timescale 1ns/1ps
module testbench;
  reg clk = 0, rst = 1, in_valid = 0, out_ready = 0;
  wire in_ready, out_valid;
  reg [{wide - 1}:0] in_codes = 0;
  wire [{cell.hidden * b - 1}:0] out_state;
  gru dut (clk, rst, in_valid, in_ready, in_codes, out_valid, out_ready, out_state);
  always #5 clk = ~clk;
  reg [{inputs * a - 1}:0] vector = 0;
  reg [{a - 1}:0] code;
  reg signed [{b - 1}:0] one;
  integer i, got, taken;
  initial begin
    repeat (4) @(negedge clk);
    rst = 0;
    got = 1;
    while (got == 1) begin
      for (i = 0; i < {inputs} && got == 1; i = i + 1) begin
        got = $fscanf(32'h8000_0000, "%h", code);
        vector[i*{a} +: {a}] = code;
      end
      if (got == 1) begin
        for (i = 0; i < {plans[0].column_folds}; i = i + 1) begin
          in_codes = vector[i*{wide} +: {wide}];
          in_valid = 1;
          while (!in_ready) @(negedge clk);
          @(negedge clk);
        end
        in_valid = 0;
        taken = 1;
        while (!out_valid && taken < {10 * cycles(plans)}) begin
          @(negedge clk);
          taken = taken + 1;
        end
        for (i = 0; i < {cell.hidden}; i = i + 1) begin
          one = out_state[i*{b} +: {b}];
          $write("%0d ", one);
        end
        $write("%0d\\n", taken);
        out_ready = 1;
        @(negedge clk);
        out_ready = 0;
      end
    end
    $finish;
  end
endmodule
"""


def design_files(cell: Gru, plans: tuple[Fold, Fold]) -> dict[str, str]:
    """Verilog and memories of the module `gru` by file name."""
    text, roms = network_text(cell, plans)
    gates = resources.files("hwmodel").joinpath("rtl", "gru_gates.v").read_text()
    files = library() | {"gru_gates.v": gates, "network.v": text}
    return files | {f"{m.name}.mem": mem_text(m) for m in roms if len(m.words) > 1}


def write(cell: Gru, plans: tuple[Fold, Fold], folder: Path) -> None:
    """The design and its testbench into an existing folder."""
    (folder / "rtl").mkdir()
    for name, text in design_files(cell, plans).items():
        apart = name.endswith(".v") and name != "network.v"
        (folder / ("rtl" if apart else ".") / name).write_text(text)
    (folder / "testbench.v").write_text(testbench_text(cell, plans))


def simulate(folder: Path, x: np.ndarray, hidden: int, tool: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """States (steps, hidden) and cycles (steps,) of input codes (steps, inputs) from state 0, by the Verilog."""
    found: Tool = find_tool(tool)
    command = compile_design(folder, found)
    lines = "".join(" ".join(f"{c:x}" for c in row) + "\n" for row in x.tolist())
    done = subprocess.run(command, cwd=folder, input=lines, capture_output=True, text=True, check=False)
    table = [line.split() for line in done.stdout.splitlines() if line[:1] in "-0123456789x" and line]
    if len(table) < len(x) or any("x" in word for row in table for word in row):
        raise SimulationError(f"{found} gives no state for step {len(table)}: {done.stdout[-300:]}")
    numbers = np.array([[int(word) for word in row] for row in table[: len(x)]], np.int64)
    return numbers[:, :hidden], numbers[:, hidden]


def run(cell: Gru, x: np.ndarray) -> np.ndarray:
    """`step` over time from state 0: integers (steps, hidden) of input integers (steps, inputs)."""
    h, found = np.zeros((1, cell.hidden), np.int64), []
    for row in x:
        h = step(cell, row[None], h)
        found.append(h[0])
    return np.array(found)
