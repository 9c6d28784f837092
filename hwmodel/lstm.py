"""A step of an LSTM cell in integers, exact, and the price of its gates; `emit_lstm` writes their Verilog.

    i, f, o = sigmoid(W x + U h + b), each its own, g = tanh(W_g x + U_g h + b_g), c' = f c + i g, h' = o tanh(c')

Behind the products stands `rtl/lstm_gates.v`: tables of `hwmodel.gates`, h of B bits in steps of 2^-S, B - 1 <= S <= G,
and c of C bits in steps of 2^-M, 0 <= M <= G. tanh sees c' before it is rounded to these bits, as quantkit's cell does.
`step` is the truth that the Verilog equals bit for bit.
"""

from __future__ import annotations

import numpy as np

from hwmodel.cell import Cell, frame_cost, product_luts, sums_of, waiting
from hwmodel.convert import round_clip
from hwmodel.cost import Cost
from hwmodel.fabric import adder, ram_luts
from hwmodel.gates import INDEX, N_RANGE, S_RANGE, G, sigmoid, stored, tanh
from hwmodel.layer import address_bits
from hwmodel.memory import rom
from hwmodel.spec import LayerSpec, Recurrence, Rescale

GATES = 15
"""Cycles from the sums of a unit to its new h (`rtl/lstm_gates.v`)."""


def step(cell: Cell, x: np.ndarray, states: np.ndarray) -> np.ndarray:
    """The next h and c, integers (n, 2 hidden), from integers of input (n, inputs) and of h and c (n, 2 hidden)."""
    assert cell.memory is not None
    hidden, kept = cell.hidden, cell.memory_fraction
    h, c = states[:, :hidden], states[:, hidden:]
    t_x, t_h = sums_of(cell, x, h)
    t = (t_x + t_h + cell.offsets).reshape(len(x), 4, hidden)
    i, f, o = (sigmoid(t[:, gate], cell.fraction) for gate in (0, 1, 3))
    g = tanh(t[:, 2], cell.fraction)
    made = ((f * c) << (G - kept)) + i * g
    new_h = stored(o * tanh(made, 2 * G), 2 * G - cell.state_fraction, cell.state.bits)
    return np.concatenate([new_h, stored(made, 2 * G - kept, cell.memory.bits)], axis=1)


def blend_bits(found: Recurrence) -> int:
    """Two's complement bits of every f c + i g, in steps of 2^-2G."""
    assert found.memory is not None
    return max(found.memory.bits + 2 * G - found.memory_fraction, 2 * G + 1) + 1


def gates_cost(spec: LayerSpec) -> Cost:
    """All of an LSTM but its two products and the buffer of its input: sums kept, gates, tables, h and c."""
    found = spec.recurrence
    assert found is not None and found.memory is not None
    t, b, c, hidden, wide = found.bits, found.state.bits, found.memory.bits, spec.out_features, blend_bits(found)
    cost = frame_cost(spec) + Cost(luts=adder(t, t, False)) * -4  # every offset is beside the input
    for width, shift, out in ((t, found.fraction + S_RANGE + 1 - INDEX, INDEX),) * 3 + (
        (t, found.fraction + N_RANGE + 1 - INDEX, INDEX),
        (wide, 2 * G + N_RANGE + 1 - INDEX, INDEX),
        (wide, 2 * G - found.memory_fraction, c),
        (2 * G + 1, 2 * G - found.state_fraction, b),
    ):
        cost += round_clip(Rescale("plain", 0, 0, width, shift, 0), out)
    luts = product_luts(c, G) + 2 * product_luts(G + 1, G) + 4 * adder(t, t, False)
    luts += adder(wide, wide - (G - found.memory_fraction), False)
    luts += ram_luts(c, hidden)
    ffs = 4 * t + c + G + 2 * (2 * G + 1) + wide + c + 2 * address_bits(hidden)
    cost += Cost(luts=luts, ffs=ffs) + waiting(G, 5)
    return cost + rom(G, 1 << INDEX).cost * 3 + rom(G + 1, 1 << INDEX).cost * 2
