"""A GRU cell in integers: its exact reference and its price; `emit_gru` writes its Verilog.

    r = sigmoid(W_r x + U_r h + b_r), z likewise, n = tanh(W_n x + b_n + r (U_n h + c_n)), h' = n + z (h - n)

The products are two layers as `emit_layer` writes them, three rows (the gates of one hidden unit) at a time; the rest
is `rtl/gru_gates.v`: sums times factors in steps of 2^-fraction, tables of 2^INDEX entries in steps of 2^-G for
sigmoid on [-8, 8) and tanh on [-4, 4), and a state of B bits in steps of 2^-S, B - 1 <= S <= G. `step` is the truth
that the Verilog equals bit for bit; against real arithmetic the tables are off by at most `table_error`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from hwmodel.accumulator import exact_bits, signed_bits, unit_range
from hwmodel.convert import affine, round_clip
from hwmodel.cost import Cost, HwError
from hwmodel.fabric import adder
from hwmodel.formats import Format, Int, bits, parse
from hwmodel.layer import address_bits, constants
from hwmodel.mac import booth_rows
from hwmodel.memory import rom
from hwmodel.reference import to_units
from hwmodel.spec import LayerSpec, Recurrence, Rescale

INDEX, G = 10, 10
"""Bits of a table's index, fraction bits of its values."""
S_RANGE, N_RANGE = 3, 2
"""Tables reach from -2^RANGE to 2^RANGE: of sigmoid, of tanh."""
GATES = 17
"""Cycles from the sums of a unit to its new state (`rtl/gru_gates.v`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Gru:
    """A layer of a `Network` that keeps a state from one inference to the next.

    x_codes (3 hidden, inputs), h_codes (3 hidden, hidden): weights as bit patterns, gates in the order r, z, n.
    x_factors, h_factors: int64 (3 hidden,), what a unit of a sum counts in steps of 2^-fraction. offsets: int64
    (4 hidden,), of r, z, n beside the input and n beside the state. act: format of the input; state: of h, signed, in
    steps of 2^-state_fraction.
    out: format of the next layer's input, and table (1 or hidden, 2^B): its code of every bit pattern of a state, for
    all units or each; both None where the state itself leaves.
    """

    name: str
    weight: Format
    act: Int
    state: Int
    x_codes: np.ndarray
    h_codes: np.ndarray
    x_factors: np.ndarray
    h_factors: np.ndarray
    offsets: np.ndarray
    fraction: int
    state_fraction: int
    out: Format | None = None
    table: np.ndarray | None = None

    def __post_init__(self) -> None:
        hidden = self.h_codes.shape[1]
        name = f"layer {self.name!r}"
        if self.h_codes.shape[0] != 3 * hidden or self.x_codes.shape[0] != 3 * hidden:
            found = f"{len(self.x_codes)}, {len(self.h_codes)}"
            raise HwError(f"{name}: a GRU of {hidden} units has {3 * hidden} rows, not {found}")
        for side, fmt in (("input", self.act), ("state", self.state)):
            if not isinstance(fmt, Int):
                raise HwError(f"{name}: a GRU's {side} is an integer in hardware (int2..int8), not {fmt}")
        if not self.state.signed or not 2 <= self.state.bits <= G:
            raise HwError(f"{name}: a GRU's state is int2..int{G}, not {self.state}")
        if not self.state.bits - 1 <= self.state_fraction <= G:
            raise HwError(f"{name}: steps of a state of {self.state} are 2^-{self.state.bits - 1} .. 2^-{G}")
        shapes = [self.x_factors.shape, self.h_factors.shape, self.offsets.shape]
        if shapes != [(3 * hidden,), (3 * hidden,), (4 * hidden,)]:
            raise HwError(f"{name}: a GRU of {hidden} units has {3 * hidden} factors twice and {4 * hidden} offsets")
        if min(int(self.x_factors.min()), int(self.h_factors.min())) < 0:
            raise HwError(f"{name}: a GRU's factors are not negative")
        if not INDEX <= self.fraction or self.t_bits + G > 62:
            raise HwError(
                f"{name}: a GRU's gates count 2^-{INDEX} or finer, in at most {62 - G} bits, not 2^-{self.fraction}"
            )
        if (self.out is None) != (self.table is None):
            raise HwError(f"{name}: a table of codes goes with an output format")
        if self.table is not None and self.table.shape not in ((1, 2**self.state.bits), (hidden, 2**self.state.bits)):
            raise HwError(f"{name}: a table of shape {self.table.shape}, not (1 or {hidden}, {2**self.state.bits})")

    @property
    def hidden(self) -> int:
        """Numbers in the state."""
        return int(self.h_codes.shape[1])

    @property
    def formats(self) -> tuple[Format, Format]:
        """Formats of weights and input."""
        return self.weight, self.act

    @property
    def acc_bits(self) -> int:
        """Bits of a number that leaves where no table follows: of the state."""
        return self.state.bits

    @property
    def factor_bits(self) -> int:
        """Bits of every factor."""
        return max(1, int(max(self.x_factors.max(), self.h_factors.max())).bit_length())

    @property
    def t_bits(self) -> int:
        """Two's complement bits that hold every gate's input."""
        x = _reach(self.x_codes, self.weight, self.act) * self.x_factors
        h = _reach(self.h_codes, self.weight, self.state) * self.h_factors
        most = int((x + h).max() + np.abs(self.offsets).max() * 2)
        return max(signed_bits(-most, most), self.fraction + S_RANGE + 2)

    @property
    def coded(self) -> bool:
        """Whether the codes that leave are other bit patterns than the state's."""
        return self.table is not None and not (
            bits(self.out) == self.state.bits  # type: ignore[arg-type]
            and bool((self.table == np.arange(self.table.shape[1])).all())
        )

    @property
    def columns(self) -> int:
        """Bits of `words` that are neither the same in all units nor equal to another bit in all of them."""
        width, words = 6 * self.factor_bits + 4 * self.t_bits, self.words()
        found = {tuple(word >> i & 1 for word in words) for i in range(width)}
        return sum(0 < sum(column) < len(column) for column in found)

    def words(self) -> tuple[int, ...]:
        """Factors and offsets of each unit as one number, as `rtl/gru_gates.v` reads them."""
        t, k, n = self.t_bits, self.factor_bits, self.hidden
        made = []
        for unit in range(n):
            fields = [(int(f[unit + g * n]), k) for f in (self.x_factors, self.h_factors) for g in range(3)]
            fields += [(int(self.offsets[unit + g * n]) & ((1 << t) - 1), t) for g in range(4)]
            word = at = 0
            for value, width in fields:
                word, at = word | value << at, at + width
            made.append(word)
        return tuple(made)

    @property
    def spec(self) -> LayerSpec:
        """What the cost model reads."""
        x, h = (
            int(exact_bits(to_units(codes, self.weight), fmt).max())
            for codes, fmt in ((self.x_codes, self.act), (self.h_codes, self.state))
        )
        kept = Recurrence(
            self.state, h, self.factor_bits, self.t_bits, self.fraction, self.state_fraction, self.columns, self.coded
        )
        inputs = int(self.x_codes.shape[1])
        return LayerSpec(
            self.name, "gru", self.hidden, inputs, weight=self.weight, act=self.act, out=self.out, acc_bits=x,
            recurrence=kept,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values; `from_json` is its inverse."""
        record: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for key in ("weight", "act", "state", "out"):
            record[key] = None if record[key] is None else str(record[key])
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in record.items()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Gru:
        """Inverse of `to_json`."""
        values = dict(record)
        for key in ("weight", "act", "state", "out"):
            values[key] = None if values[key] is None else parse(values[key])
        for key in ("x_codes", "h_codes", "x_factors", "h_factors", "offsets", "table"):
            values[key] = None if values[key] is None else np.array(values[key], np.int64)
        return cls(**values)


def _reach(codes: np.ndarray, weight: Format, act: Int) -> np.ndarray:
    """The largest magnitude of each row's sum, whatever the input: int64 (rows,)."""
    units = to_units(codes, weight)
    ends = [units * end for end in unit_range(act)]
    return np.maximum(np.maximum(*ends).sum(axis=1), -np.minimum(*ends).sum(axis=1))


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
        _looked_up(t_x[:, s] + t_h[:, s], cell.fraction, S_RANGE, sigmoid_table())
        for s in (slice(hidden), slice(hidden, 2 * hidden))
    )
    n = _looked_up(t_x[:, 2 * hidden :] + ((t_h[:, 2 * hidden :] * r) >> G), cell.fraction, N_RANGE, tanh_table())
    b, kept = cell.state.bits, cell.state_fraction
    blend = (n << G) + z * ((h << (G - kept)) - n)
    return np.clip(_halved(blend, 2 * G - kept), -(1 << (b - 1)), (1 << (b - 1)) - 1)


def _looked_up(t: np.ndarray, fraction: int, reach: int, table: np.ndarray) -> np.ndarray:
    half = 1 << (INDEX - 1)
    return table[np.clip(_halved(t, fraction + reach + 1 - INDEX), -half, half - 1) + half]


def _halved(t: np.ndarray, shift: int) -> np.ndarray:
    """t / 2^shift, rounded half to even."""
    floor, rest, half = t >> shift, t & ((1 << shift) - 1), 1 << (shift - 1)
    return floor + ((rest > half) | ((rest == half) & (floor & 1 == 1)))


def _table(function: Callable[[np.ndarray], np.ndarray], reach: int, low: int, high: int) -> np.ndarray:
    at = np.arange(-(1 << (INDEX - 1)), 1 << (INDEX - 1)) * 2.0 ** (reach + 1 - INDEX)
    found = np.clip(np.rint(function(at) * (1 << G)), low, high).astype(np.int64)
    found.flags.writeable = False
    return found


@cache
def sigmoid_table() -> np.ndarray:
    """Entries from -2^S_RANGE up, in steps of 2^-G: int64 (2^INDEX,)."""
    return _table(lambda x: 1 / (1 + np.exp(-x)), S_RANGE, 0, (1 << G) - 1)


@cache
def tanh_table() -> np.ndarray:
    """Entries from -2^N_RANGE up, in steps of 2^-G: int64 (2^INDEX,)."""
    return _table(np.tanh, N_RANGE, -(1 << G), (1 << G) - 1)


def table_error() -> tuple[float, float]:
    """Largest error of sigmoid and of tanh at any input, rounding of the index and ends of the tables included.

    >>> [round(e, 4) for e in table_error()]
    [0.0024, 0.0042]
    """
    t = np.arange(-20 << 14, (20 << 14) + 1, 3, dtype=np.int64)
    x = t / (1 << 14)
    s = np.abs(_looked_up(t, 14, S_RANGE, sigmoid_table()) / (1 << G) - 1 / (1 + np.exp(-x)))
    n = np.abs(_looked_up(t, 14, N_RANGE, tanh_table()) / (1 << G) - np.tanh(x))
    return float(s.max()), float(n.max())


def codes_of(cell: Gru, states: np.ndarray) -> np.ndarray:
    """What leaves for states (n, hidden): codes of `out`, or the states themselves where there is none; int64."""
    if cell.table is None:
        return states
    patterns = states & ((1 << cell.state.bits) - 1)
    return cell.table[np.arange(cell.hidden) if len(cell.table) > 1 else 0, patterns]


def gates_cost(spec: LayerSpec) -> Cost:
    """All of a GRU but its two products and the buffer of its input: sums kept, gates, tables, states."""
    found = spec.recurrence
    assert found is not None and spec.acc_bits is not None
    t, k, b, hidden, x_bits = found.bits, found.factor_bits, found.state.bits, spec.out_features, 3 * spec.acc_bits
    cost = Cost()
    for width in (spec.acc_bits, found.acc_bits):
        cost += affine(Rescale("runtime", k, 0, t, 0, 0), width) * 3 + Cost(ffs=3 * width)
    cost += Cost(luts=adder(t, t, False)) * -2  # r and z have their offset beside the input
    for width, shift, out in ((t, found.fraction + S_RANGE + 1 - INDEX, INDEX),) * 2 + (
        (t, found.fraction + N_RANGE + 1 - INDEX, INDEX),
        (2 * G + 3, 2 * G - found.state_fraction, b),
    ):
        cost += round_clip(Rescale("plain", 0, 0, width, shift, 0), out)
    luts = booth_rows(t, True, G, False) + booth_rows(G + 2, True, G, False) + 3 * adder(t, t, False)
    luts += adder(G + 2, G + 2, False) + adder(2 * G + 3, 2 * G + 2, False)
    luts += 2 * t + G + b * hidden  # delays in shift registers; the old state, loaded or shifted
    cost += Cost(luts=luts, ffs=4 * t + 4 * t + 3 * b * hidden + 8 * G)
    cost += constants(6 * k + 4 * t, hidden, found.columns) + rom(G, 1 << INDEX).cost * 2 + rom(G + 1, 1 << INDEX).cost
    if found.coded:
        assert spec.out is not None
        cost += rom(bits(spec.out), 1 << b).cost
    return cost + Cost(luts=4 * -(-x_bits // 6) + 8, ffs=x_bits + 2 * address_bits(hidden) + 4)
