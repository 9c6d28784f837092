"""A recurrent cell in integers: the record of its weights, factors and formats, and the price of what all cells have.

What a step computes is `hwmodel.gru` and `hwmodel.lstm`; `emit_cell` writes the Verilog. The products of input and of
state are two layers as `emit_layer` writes them, the gates of one hidden unit at a time; sums times factors, plus
offsets, count 2^-fraction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hwmodel import fabric
from hwmodel.accumulator import exact_bits, signed_bits, unit_range
from hwmodel.coeffs import coefficients
from hwmodel.convert import affine
from hwmodel.cost import Cost, HwError
from hwmodel.formats import Format, Int, bits, parse
from hwmodel.gates import INDEX, S_RANGE, G
from hwmodel.layer import address_bits, constants
from hwmodel.mac import booth_rows
from hwmodel.memory import rom
from hwmodel.reference import to_units
from hwmodel.spec import CELL_GATES, LayerSpec, Recurrence, Rescale

NOUNS = {"gru": "a GRU", "lstm": "an LSTM"}
MEMORY_BITS = 16
"""Most bits of an LSTM's c."""


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """A layer of a `Network` that keeps a state from one inference to the next.

    x_codes (gates hidden, inputs), h_codes (gates hidden, hidden): weights as bit patterns, gates in the order r, z, n
    of a GRU and i, f, g, o of an LSTM. x_factors, h_factors: int64 (gates hidden,), what a unit of a sum counts in
    steps of 2^-fraction. offsets: int64 (4 hidden,), of a GRU's r, z, n beside the input and n beside the state, of an
    LSTM's gates. act: format of the input; state: of h, signed, in steps of 2^-state_fraction.
    out: format of the next layer's input, and table (1 or hidden, 2^B): its code of every bit pattern of h, for
    all units or each; both None where h itself leaves.
    memory: format of an LSTM's c, signed, in steps of 2^-memory_fraction; None of a GRU.
    """

    kind: Literal["gru", "lstm"]
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
    memory: Int | None = None
    memory_fraction: int = 0

    def __post_init__(self) -> None:
        hidden, rows = self.h_codes.shape[1], CELL_GATES[self.kind] * self.h_codes.shape[1]
        name, noun = f"layer {self.name!r}", NOUNS[self.kind]
        if self.h_codes.shape[0] != rows or self.x_codes.shape[0] != rows:
            found = f"{len(self.x_codes)}, {len(self.h_codes)}"
            raise HwError(f"{name}: {noun} of {hidden} units has {rows} rows, not {found}")
        for side, fmt in (("input", self.act), ("state", self.state)):
            if not isinstance(fmt, Int):
                raise HwError(f"{name}: {noun}'s {side} is an integer in hardware (int2..int8), not {fmt}")
        if not self.state.signed or not 2 <= self.state.bits <= G:
            raise HwError(f"{name}: {noun}'s state is int2..int{G}, not {self.state}")
        if not self.state.bits - 1 <= self.state_fraction <= G:
            raise HwError(f"{name}: steps of a state of {self.state} are 2^-{self.state.bits - 1} .. 2^-{G}")
        if (self.memory is None) != (self.kind == "gru"):
            raise HwError(f"{name}: a format of c goes with an LSTM")
        if self.memory is not None:
            if not isinstance(self.memory, Int) or not self.memory.signed or not 2 <= self.memory.bits <= MEMORY_BITS:
                raise HwError(f"{name}: an LSTM's c is int2..int{MEMORY_BITS} in hardware, not {self.memory}")
            if not 0 <= self.memory_fraction <= G:
                raise HwError(f"{name}: steps of an LSTM's c are 2^0 .. 2^-{G}, not 2^-{self.memory_fraction}")
        shapes = [self.x_factors.shape, self.h_factors.shape, self.offsets.shape]
        if shapes != [(rows,), (rows,), (4 * hidden,)]:
            raise HwError(f"{name}: {noun} of {hidden} units has {rows} factors twice and {4 * hidden} offsets")
        if min(int(self.x_factors.min()), int(self.h_factors.min())) < 0:
            raise HwError(f"{name}: {noun}'s factors are not negative")
        if not INDEX <= self.fraction or self.t_bits + G > 62:
            raise HwError(
                f"{name}: {noun}'s gates count 2^-{INDEX} or finer, in at most {62 - G} bits, not 2^-{self.fraction}"
            )
        if (self.out is None) != (self.table is None):
            raise HwError(f"{name}: a table of codes goes with an output format")
        if self.table is not None and self.table.shape not in ((1, 2**self.state.bits), (hidden, 2**self.state.bits)):
            raise HwError(f"{name}: a table of shape {self.table.shape}, not (1 or {hidden}, {2**self.state.bits})")

    @property
    def hidden(self) -> int:
        """Units: numbers in h."""
        return int(self.h_codes.shape[1])

    @property
    def gates(self) -> int:
        """Rows of each product for one unit."""
        return CELL_GATES[self.kind]

    @property
    def numbers(self) -> int:
        """Numbers that are kept: those of h, and behind them those of an LSTM's c."""
        return self.hidden if self.memory is None else 2 * self.hidden

    @property
    def formats(self) -> tuple[Format, Format]:
        """Formats of weights and input."""
        return self.weight, self.act

    @property
    def acc_bits(self) -> int:
        """Bits of a number that leaves where no table follows: of h."""
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
        offsets = 2 if self.kind == "gru" else 1  # n has one beside either sum
        most = int((x + h).max() + np.abs(self.offsets).max() * offsets)
        return max(signed_bits(-most, most), self.fraction + S_RANGE + 2)

    @property
    def coded(self) -> bool:
        """Whether the codes that leave are other bit patterns than the state's."""
        return self.table is not None and not (
            bits(self.out) == self.state.bits  # type: ignore[arg-type]
            and bool((self.table == np.arange(self.table.shape[1])).all())
        )

    @property
    def word_bits(self) -> int:
        """Bits of each of `words`."""
        return 2 * self.gates * self.factor_bits + 4 * self.t_bits

    @property
    def columns(self) -> int:
        """Bits of `words` that are neither the same in all units nor equal to another bit in all of them."""
        words = self.words()
        found = {tuple(word >> i & 1 for word in words) for i in range(self.word_bits)}
        return sum(0 < sum(column) < len(column) for column in found)

    def words(self) -> tuple[int, ...]:
        """Factors and offsets of each unit as one number, as `rtl/gru_gates.v` and `rtl/lstm_gates.v` read them."""
        t, k, n = self.t_bits, self.factor_bits, self.hidden
        made = []
        for unit in range(n):
            fields = [(int(f[unit + g * n]), k) for f in (self.x_factors, self.h_factors) for g in range(self.gates)]
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
            self.state, h, self.factor_bits, self.t_bits, self.fraction, self.state_fraction, self.columns, self.coded,
            self.memory, self.memory_fraction,
        )  # fmt: skip
        inputs = int(self.x_codes.shape[1])
        return LayerSpec(
            self.name, self.kind, self.hidden, inputs, weight=self.weight, act=self.act, out=self.out, acc_bits=x,
            recurrence=kept,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values; `from_json` is its inverse."""
        record: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for key in ("weight", "act", "state", "out", "memory"):
            record[key] = None if record[key] is None else str(record[key])
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in record.items()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Cell:
        """Inverse of `to_json`."""
        values = dict(record)
        for key in ("weight", "act", "state", "out", "memory"):
            values[key] = None if values.get(key) is None else parse(values[key])
        for key in ("x_codes", "h_codes", "x_factors", "h_factors", "offsets", "table"):
            values[key] = None if values[key] is None else np.array(values[key], np.int64)
        return cls(**values)


def _reach(codes: np.ndarray, weight: Format, act: Int) -> np.ndarray:
    """The largest magnitude of each row's sum, whatever the input: int64 (rows,)."""
    units = to_units(codes, weight)
    ends = [units * end for end in unit_range(act)]
    return np.maximum(np.maximum(*ends).sum(axis=1), -np.minimum(*ends).sum(axis=1))


def sums_of(cell: Cell, x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums times factors, of input and of state, in steps of 2^-fraction: int64 (n, gates hidden) each."""
    x_sums = x.astype(np.int64) @ to_units(cell.x_codes, cell.weight).T
    h_sums = h.astype(np.int64) @ to_units(cell.h_codes, cell.weight).T
    return x_sums * cell.x_factors, h_sums * cell.h_factors


def codes_of(cell: Cell, states: np.ndarray) -> np.ndarray:
    """What leaves for states (n, numbers): codes of `out`, or h itself where there is none; int64 (n, hidden)."""
    h = states[:, : cell.hidden]
    if cell.table is None:
        return h
    return cell.table[np.arange(cell.hidden) if len(cell.table) > 1 else 0, h & ((1 << cell.state.bits) - 1)]


def product_luts(x_bits: int, y_bits: int) -> float:
    """LUTs of `rtl/multiply.v` for a signed x and an unsigned y; on ECP5 at the rate of a converter's Booth rows."""
    rows = booth_rows(x_bits, True, y_bits, False)
    return rows if fabric.family() == "xc7" else float(coefficients()["convert"]["runtime"]["rows"]) * rows


def waiting(width: int, cycles: int) -> Cost:
    """What `rtl/delay.v` takes beside its last register: shift registers in LUTs, or flip-flops."""
    return Cost(luts=width) if fabric.shift_registers() else Cost(ffs=(cycles - 1) * width)


def frame_cost(spec: LayerSpec) -> Cost:
    """Of a cell, what is neither its products nor its gates: sums kept and scaled, constants, next state, codes."""
    found, gates = spec.recurrence, CELL_GATES[spec.op]
    assert found is not None and spec.acc_bits is not None
    t, k, b, hidden, x_bits = found.bits, found.factor_bits, found.state.bits, spec.out_features, gates * spec.acc_bits
    cost = Cost()
    for width in (spec.acc_bits, found.acc_bits):
        cost += affine(Rescale("runtime", k, 0, t, 0, 0), width) * gates + Cost(ffs=gates * width)
    cost += constants(2 * gates * k + 4 * t, hidden, found.columns)
    if found.coded:
        assert spec.out is not None
        cost += rom(bits(spec.out), 1 << b).cost
    cost += Cost(luts=fabric.ram_luts(x_bits, hidden) + 8, ffs=x_bits + 2 * address_bits(hidden) + 4)
    return cost + Cost(ffs=2 * b * hidden)
