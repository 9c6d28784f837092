"""A step of a GRU cell in integers, exact, and the price of its gates; `emit_gru` writes their Verilog.

    r = sigmoid(W_r x + U_r h + b_r), z likewise, n = tanh(W_n x + b_n + r (U_n h + c_n)), h' = n + z (h - n)

Behind the products stands `rtl/gru_gates.v`: tables of `hwmodel.gates`, and a state of B bits in steps of 2^-S,
B - 1 <= S <= G. `step` is the truth that the Verilog equals bit for bit; against real arithmetic the tables are off by
at most `gates.table_error`.
"""

from __future__ import annotations

import numpy as np

from hwmodel.cell import Cell, frame_cost, product_luts, sums_of, waiting
from hwmodel.convert import round_clip
from hwmodel.cost import Cost
from hwmodel.fabric import adder
from hwmodel.gates import INDEX, N_RANGE, S_RANGE, G, sigmoid, stored, tanh
from hwmodel.memory import rom
from hwmodel.spec import LayerSpec, Rescale

GATES = 17
"""Cycles from the sums of a unit to its new state (`rtl/gru_gates.v`)."""


def step(cell: Cell, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The next state's integers (n, hidden) from integers of input (n, inputs) and state (n, hidden): int64."""
    hidden, kept = cell.hidden, cell.state_fraction
    t_x, t_h = sums_of(cell, x, h)
    t_x += cell.offsets[: 3 * hidden]
    t_h[:, 2 * hidden :] += cell.offsets[3 * hidden :]
    r, z = (sigmoid(t_x[:, s] + t_h[:, s], cell.fraction) for s in (slice(hidden), slice(hidden, 2 * hidden)))
    n = tanh(t_x[:, 2 * hidden :] + ((t_h[:, 2 * hidden :] * r) >> G), cell.fraction)
    return stored((n << G) + z * ((h << (G - kept)) - n), 2 * G - kept, cell.state.bits)


def gates_cost(spec: LayerSpec) -> Cost:
    """All of a GRU but its two products and the buffer of its input: sums kept, gates, tables, states."""
    found = spec.recurrence
    assert found is not None
    t, b, hidden = found.bits, found.state.bits, spec.out_features
    cost = frame_cost(spec) + Cost(luts=adder(t, t, False)) * -2  # r and z have their offset beside the input
    for width, shift, out in ((t, found.fraction + S_RANGE + 1 - INDEX, INDEX),) * 2 + (
        (t, found.fraction + N_RANGE + 1 - INDEX, INDEX),
        (2 * G + 3, 2 * G - found.state_fraction, b),
    ):
        cost += round_clip(Rescale("plain", 0, 0, width, shift, 0), out)
    luts = product_luts(t, G) + product_luts(G + 2, G) + 3 * adder(t, t, False)
    luts += adder(G + 2, G + 2, False) + adder(2 * G + 3, 2 * G + 2, False)
    luts += b * hidden  # the old state, loaded or shifted
    cost += Cost(luts=luts, ffs=4 * t + 4 * t + b * hidden + 8 * G) + waiting(t, 4) + waiting(t, 5) + waiting(G, 6)
    return cost + rom(G, 1 << INDEX).cost * 2 + rom(G + 1, 1 << INDEX).cost
