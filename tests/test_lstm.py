"""An LSTM in Verilog equals its integers, in the cycles predicted, and its integers follow the real cell."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_designs import icarus, lint, verilator
from torch import nn

from hwmodel import emit, gates, lstm
from hwmodel.cell import Cell, codes_of
from hwmodel.cost import HwError
from hwmodel.devices import find_device
from hwmodel.emit_files import LINT
from hwmodel.emit_rom import with_roms
from hwmodel.folding import Fold, cell_fold
from hwmodel.formats import parse
from hwmodel.network import Network, legal_codes, reference, sample_codes
from hwmodel.packing import divisors
from hwmodel.plan import total_cycles
from hwmodel.reference import to_units
from hwmodel.simulate import Simulation
from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.recipe import quantize, uniform
from quantkit.recurrent import LSTMCell
from quantkit.rtl_export import cell_of

DEVICE = find_device("xc7a35t")


def cell(
    inputs: int,
    hidden: int,
    weight: str,
    act: str,
    state: str,
    c: str = "int8",
    seed: int = 1,
    steps: int = 0,
    m: int = 5,
) -> Cell:
    """Random codes; factors and offsets that reach the curved parts of the tables and beyond; steps: S - (B - 1)."""
    rng = np.random.default_rng(seed)
    fmt, kept = parse(weight), parse(state)
    x, h = (rng.choice(legal_codes(fmt), (4 * hidden, n)) for n in (inputs, hidden))
    factors = [rng.integers(0, 60, 4 * hidden) for _ in range(2)]
    offsets = rng.integers(-20000, 20000, 4 * hidden)
    return Cell("lstm", "l", fmt, parse(act), kept, x, h, *factors, offsets, 14, kept.bits - 1 + steps,  # type: ignore[arg-type, union-attr]
                memory=parse(c), memory_fraction=m)  # type: ignore[arg-type]  # fmt: skip


def written(one: Cell, simd: tuple[int, int], folder: Path) -> tuple[Network, Fold]:
    """The network of the cell alone, and its fold; its Verilog in `folder`."""
    network, plan = Network((one,)), cell_fold(one.spec, *simd)
    emit.write(network, (plan,), folder, DEVICE)
    return network, plan


def check(one: Cell, simd: tuple[int, int], folder: Path, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """States of 27 steps in episodes of 9, proved to be the reference's on time, and what they were in one episode."""
    network, plan = written(one, simd, folder)
    codes = sample_codes(network, 27, seed=seed)
    first = np.arange(27) % 9 == 0
    with Simulation(folder, "iverilog") as rtl:
        answer = rtl.run(codes, first)
    want = reference(network, codes, first)
    assert np.array_equal(answer.sums, want)
    assert set(answer.cycles.tolist()) == {plan.cycles} == {total_cycles((plan,))}
    return want, reference(network, codes)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize(
    ("inputs", "hidden", "formats", "simd", "steps", "m"),
    [
        (4, 3, ("int4", "uint5", "int6", "int5"), (2, 1), 0, 2),
        (8, 4, ("int8", "int8", "int8", "int8"), (8, 4), 1, 5),
        (6, 5, ("ternary", "int4", "int8", "int16"), (3, 5), 0, 0),
        (3, 2, ("e2m1", "int6", "int7", "int4"), (1, 2), 1, 3),
        (3, 1, ("int4", "int4", "int8", "int2"), (3, 1), 0, 10),
    ],
)
def test_states_are_the_integers_on_time(
    inputs: int,
    hidden: int,
    formats: tuple[str, str, str, str],
    simd: tuple[int, int],
    steps: int,
    m: int,
    tmp_path: Path,
) -> None:
    """Over episodes of 9 steps every state of the Verilog is the reference's, in the cycles predicted."""
    want, endless = check(cell(inputs, hidden, *formats, steps=steps, m=m), simd, tmp_path)
    assert len(np.unique(want)) > 3 and (endless != want).any()  # clearing the states does something


@pytest.mark.sim
@pytest.mark.slow
@icarus
@pytest.mark.parametrize("seed", range(8))
def test_random_cells_are_their_integers(seed: int, tmp_path: Path) -> None:
    """Sizes, formats, fractions and folds drawn at random."""
    rng = np.random.default_rng(seed)
    inputs, hidden = int(rng.integers(1, 13)), int(rng.integers(1, 9))
    formats = [
        str(rng.choice(choices))
        for choices in (
            ("int2", "int3", "int5", "int8", "e2m1", "e3m2", "ternary"),
            ("int3", "int6", "uint4", "uint8"),
            ("int3", "int5", "int8"),
            ("int3", "int6", "int8", "int16"),
        )
    ]
    steps, m = int(rng.integers(0, 11 - parse(formats[2]).bits)), int(rng.integers(0, 11))  # type: ignore[union-attr]
    simd = int(rng.choice(divisors(inputs))), int(rng.choice(divisors(hidden)))
    check(cell(inputs, hidden, *formats, seed=seed, steps=steps, m=m), simd, tmp_path, seed=seed)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("broken", ["factor", "offset", "memory"])
def test_sabotage_is_seen(broken: str, tmp_path: Path) -> None:
    """One factor, one offset, or the steps of c are others than the reference's: states differ."""
    one = cell(4, 3, "int4", "int4", "int8", m=4)
    offsets = one.offsets.copy()
    offsets[7] += 3000
    factors = one.h_factors.copy()
    factors[4] += 30
    other = {
        "factor": replace(one, h_factors=factors),
        "offset": replace(one, offsets=offsets),
        "memory": replace(one, memory_fraction=6),
    }[broken]
    network, _ = written(other, (1, 1), tmp_path)
    codes = sample_codes(network, 25)
    with Simulation(tmp_path, "iverilog") as rtl:
        answer = rtl.run(codes)
    assert not np.array_equal(answer.sums, reference(Network((one,)), codes))


@pytest.mark.sim
@verilator
def test_verilator_finds_nothing_to_say(tmp_path: Path) -> None:
    """All warnings on, none appears, with a table of codes for each unit and with one unit."""
    for hidden in (3, 1):
        one = cell(4, hidden, "int4", "int4", "int6")
        table = np.random.default_rng(3).integers(0, 32, (hidden, 64))
        coded = replace(one, out=parse("uint5"), table=table)
        text, roms = emit.cell_text(0, coded, cell_fold(coded.spec, 2, 1))
        folder = tmp_path / str(hidden)
        folder.mkdir()
        (folder / "layer.v").write_text(with_roms(text, roms))
        (folder / "lint.vlt").write_text(LINT.replace("network.v", "layer.v"))
        for name, template in emit.library(frozenset({"lstm"})).items():
            (folder / name).write_text(template)
        lint(folder, "layer0")


def scalar_step(one: Cell, x: list[int], h: list[int], c: list[int]) -> list[int]:
    """The next h and c by Python's integers and `math`, one unit after the other: the slow truth."""

    def even(value: int, shift: int) -> int:
        low, rest = divmod(value, 1 << shift)
        return low + (2 * rest > 1 << shift or (2 * rest == 1 << shift and low % 2 == 1))

    def clipped(value: int, bits: int) -> int:
        return min(max(value, -(1 << (bits - 1))), (1 << (bits - 1)) - 1)

    def looked_up(t: int, fraction: int, reach: int, function, low: int) -> int:
        index = clipped(even(t, fraction + reach + 1 - 10), 10)
        return min(max(round(function(index * 2.0 ** (reach - 9)) * 1024), low), 1023)

    w, u = to_units(one.x_codes, one.weight).tolist(), to_units(one.h_codes, one.weight).tolist()
    n, new_h, new_c = one.hidden, [], []
    for j in range(n):
        t = []
        for row in range(j, 4 * n, n):
            from_x = sum(a * b for a, b in zip(w[row], x, strict=True)) * int(one.x_factors[row])
            from_h = sum(a * b for a, b in zip(u[row], h, strict=True)) * int(one.h_factors[row])
            t.append(from_x + from_h + int(one.offsets[row]))
        i, f, o = (looked_up(t[k], one.fraction, 3, lambda v: 1 / (1 + math.exp(-v)), 0) for k in (0, 1, 3))
        g = looked_up(t[2], one.fraction, 2, math.tanh, -1024)
        blend = f * c[j] * 2 ** (10 - one.memory_fraction) + i * g
        assert one.memory is not None
        new_c.append(clipped(even(blend, 20 - one.memory_fraction), one.memory.bits))
        new_h.append(
            clipped(even(o * looked_up(blend, 20, 2, math.tanh, -1024), 20 - one.state_fraction), one.state.bits)
        )
    return new_h + new_c


@pytest.mark.parametrize(("steps", "m"), [(0, 0), (2, 6)])
def test_a_step_is_the_scalar_one(steps: int, m: int) -> None:
    """numpy's step equals Python's integers, number by number."""
    one = cell(5, 4, "int5", "int6", "int7", steps=steps, m=m)
    rng = np.random.default_rng(5)
    x, h, c = rng.integers(-32, 32, (60, 5)), rng.integers(-64, 64, (60, 4)), rng.integers(-128, 128, (60, 4))
    want = [scalar_step(one, *(v.tolist() for v in row)) for row in zip(x, h, c, strict=True)]
    found = lstm.step(one, x, np.concatenate([h, c], axis=1))
    assert found.tolist() == want
    assert np.array_equal(codes_of(one, found), found[:, :4])


def test_integers_follow_the_real_cell() -> None:
    """A step is within the tables' error and half a unit of h and c of the formula in float64."""
    one = cell(6, 4, "int4", "int5", "int8", "int16", m=7)
    rng = np.random.default_rng(4)
    x, h, c = rng.integers(-16, 16, (200, 6)), rng.integers(-128, 128, (200, 4)), rng.integers(-900, 900, (200, 4))
    scale = 2.0**-one.fraction
    t = (x @ to_units(one.x_codes, one.weight).T) * one.x_factors * scale + one.offsets * scale
    t += (h @ to_units(one.h_codes, one.weight).T) * one.h_factors * scale
    i, f, o = (1 / (1 + np.exp(-t[:, 4 * k : 4 * k + 4])) for k in (0, 1, 3))
    real = f * c / 128 + i * np.tanh(t[:, 8:12])
    sigmoid, tanh = gates.table_error()
    bound = sigmoid * (900 / 128 + 1) + tanh
    found = lstm.step(one, x, np.concatenate([h, c], axis=1))
    assert np.abs(found[:, 4:] / 128 - real).max() < bound + 0.5 / 128
    assert (
        np.abs(found[:, :4] / 128 - np.clip(o * np.tanh(real), -1, 127 / 128)).max()
        < bound + sigmoid + tanh + 0.5 / 128
    )


def quantized_cell(weights: str = "int8", acts: str = "int8") -> tuple[Model, LSTMCell]:
    """An LSTM over sequences, quantized, and its cell."""
    torch.manual_seed(3)
    model = captured(Model(nn.LSTM(6, 5, batch_first=True).eval(), torch.zeros(1, 3, 6), None, {}))
    done = quantize(model, uniform(weights, acts), Calib(2 * torch.randn(20, 12, 6)))
    found = next(part for part in done.module.modules() if isinstance(part, LSTMCell))
    return done, found


def test_a_quantized_cell_becomes_integers() -> None:
    """Outputs of the integers stay near those of quantkit's simulation over whole sequences."""
    model, one = quantized_cell()
    integers, entered = cell_of(one)
    x = 2 * torch.randn(1, 30, 6)
    with torch.no_grad():
        want = model.module(x)[0][0].numpy()
    states, found = np.zeros((1, 10), np.int64), []
    for row in entered(x[0].numpy()):
        states = lstm.step(integers, row[None], states)
        found.append(states[0, :5] * 2.0**-integers.state_fraction)
    assert np.abs(np.array(found) - want).max() < 0.05 and np.abs(want).max() > 0.3


def test_what_has_no_hardware_is_refused() -> None:
    """Formats of c that are no integers, or none, wrong shapes and steps: one line each."""
    with pytest.raises(InputError, match="its c is stored as e4m3"):
        cell_of(quantized_cell(acts="e4m3")[1])
    odd = quantized_cell()[1]
    odd.cell.act = None
    with pytest.raises(InputError, match=r"its c is stored as float; hardware is written for int2\.\.int16"):
        cell_of(odd)
    one = cell(4, 3, "int4", "int4", "int8")
    with pytest.raises(HwError, match="an LSTM of 3 units has 12 rows, not 9, 12"):
        replace(one, x_codes=one.x_codes[:9])
    with pytest.raises(HwError, match="a format of c goes with an LSTM"):
        replace(one, memory=None)
    with pytest.raises(HwError, match=r"an LSTM's c is int2\.\.int16 in hardware, not uint8"):
        replace(one, memory=parse("uint8"))
    with pytest.raises(HwError, match=r"steps of an LSTM's c are 2\^0 .. 2\^-10, not 2\^-11"):
        replace(one, memory_fraction=11)
