"""A GRU in Verilog equals its integers, in the cycles predicted, and its integers follow the real cell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_designs import icarus, lint, verilator
from torch import nn

from hwmodel import emit, emit_cell, folding, gates, gru
from hwmodel.cell import Cell
from hwmodel.cost import HwError
from hwmodel.devices import find_device
from hwmodel.emit_files import LINT
from hwmodel.emit_rom import with_roms
from hwmodel.folding import Fold, cell_fold, lead
from hwmodel.formats import parse
from hwmodel.network import Network, legal_codes, reference, sample_codes
from hwmodel.plan import total_cycles
from hwmodel.reference import to_units
from hwmodel.simulate import Simulation, SimulationError
from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.recipe import quantize, uniform
from quantkit.recurrent import GRUCell, substitute
from quantkit.rtl_export import cell_of

DEVICE = find_device("xc7a35t")


def cell(inputs: int, hidden: int, weight: str, act: str, state: str, steps: int = 0, seed: int = 1) -> Cell:
    """Random codes; factors and offsets that reach the curved parts of the tables and beyond; steps: S - (B - 1)."""
    rng = np.random.default_rng(seed)
    fmt, kept = parse(weight), parse(state)
    x, h = (rng.choice(legal_codes(fmt), (3 * hidden, n)) for n in (inputs, hidden))
    factors = [rng.integers(0, 60, 3 * hidden) for _ in range(2)]
    offsets = rng.integers(-20000, 20000, 4 * hidden)
    return Cell("gru", "g", fmt, parse(act), kept, x, h, *factors, offsets, 14, kept.bits - 1 + steps)  # type: ignore[arg-type, union-attr]


def written(one: Cell, simd: tuple[int, int], folder: Path) -> tuple[Network, Fold]:
    """The network of the cell alone, and its fold; its Verilog in `folder`."""
    network, plan = Network((one,)), cell_fold(one.spec, *simd)
    emit.write(network, (plan,), folder, DEVICE)
    return network, plan


@pytest.mark.sim
@icarus
@pytest.mark.parametrize(
    ("inputs", "hidden", "formats", "simd", "steps"),
    [
        (4, 3, ("int4", "uint5", "int6"), (2, 1), 0),
        (8, 4, ("int8", "int8", "int8"), (8, 4), 1),
        (6, 5, ("ternary", "int4", "int8"), (3, 5), 0),
        (3, 2, ("e2m1", "int6", "int7"), (1, 2), 1),
        (3, 1, ("int4", "int4", "int8"), (3, 1), 0),
    ],
)
def test_states_are_the_integers_on_time(
    inputs: int, hidden: int, formats: tuple[str, str, str], simd: tuple[int, int], steps: int, tmp_path: Path
) -> None:
    """Over episodes of 9 steps every state of the Verilog is the reference's, in the cycles predicted."""
    network, plan = written(cell(inputs, hidden, *formats, steps=steps), simd, tmp_path)
    codes = sample_codes(network, 27, seed=2)
    first = np.arange(27) % 9 == 0
    with Simulation(tmp_path, "iverilog") as rtl:
        answer = rtl.run(codes, first)
    want = reference(network, codes, first)
    assert np.array_equal(answer.sums, want) and len(np.unique(want)) > 3
    assert (reference(network, codes) != want).any()  # clearing the state does something
    assert set(answer.cycles.tolist()) == {plan.cycles} == {total_cycles((plan,))}


@pytest.mark.sim
@icarus
def test_sabotage_another_factor_is_seen(tmp_path: Path) -> None:
    """One factor off by nine shows in the states."""
    one = cell(4, 3, "int4", "int4", "int8")
    factors = one.x_factors.copy()
    factors[0] += 9
    network, _ = written(replace(one, x_factors=factors), (1, 1), tmp_path)
    codes = sample_codes(network, 25)
    with Simulation(tmp_path, "iverilog") as rtl:
        answer = rtl.run(codes)
    assert not np.array_equal(answer.sums, reference(Network((one,)), codes))


@pytest.mark.sim
@verilator
def test_verilator_finds_nothing_to_say(tmp_path: Path) -> None:
    """All warnings on, none appears, with a table of codes for all units and for each."""
    one = cell(4, 3, "int4", "int4", "int6")
    for rows in (0, 1, 3):
        table = np.random.default_rng(3).integers(0, 32, (rows, 64)) if rows else None
        folder = tmp_path / str(rows)
        folder.mkdir()
        coded = replace(one, out=parse("uint5") if rows else None, table=table)
        text, roms = emit.cell_text(0, coded, cell_fold(coded.spec, 2, 1))
        (folder / "layer.v").write_text(with_roms(text, roms))
        (folder / "lint.vlt").write_text(LINT.replace("network.v", "layer.v"))
        for name, template in emit.library(frozenset({"gru"})).items():
            (folder / name).write_text(template)
        lint(folder, "layer0")


def scalar_step(one: Cell, x: list[int], h: list[int]) -> list[int]:
    """The next state by Python's integers and `math`, one unit after the other: the slow truth."""

    def even(value: int, shift: int) -> int:
        low, rest = divmod(value, 1 << shift)
        return low + (2 * rest > 1 << shift or (2 * rest == 1 << shift and low % 2 == 1))

    def looked_up(t: int, reach: int, function, low: int) -> int:
        index = min(max(even(t, one.fraction + reach + 1 - 10), -512), 511)
        return min(max(round(function(index * 2.0 ** (reach - 9)) * 1024), low), 1023)

    w, u = to_units(one.x_codes, one.weight).tolist(), to_units(one.h_codes, one.weight).tolist()
    n, found = one.hidden, []
    for j in range(n):
        t = [sum(a * b for a, b in zip(w[j + g * n], x, strict=True)) * int(one.x_factors[j + g * n]) for g in range(3)]
        s = [sum(a * b for a, b in zip(u[j + g * n], h, strict=True)) * int(one.h_factors[j + g * n]) for g in range(3)]
        b = [int(one.offsets[j + g * n]) for g in range(4)]
        r, z = (looked_up(t[g] + b[g] + s[g], 3, lambda v: 1 / (1 + math.exp(-v)), 0) for g in range(2))
        new = looked_up(t[2] + b[2] + (((s[2] + b[3]) * r) // 1024), 2, math.tanh, -1024)
        blend = 1024 * new + z * (h[j] * 2 ** (10 - one.state_fraction) - new)
        half = 1 << (one.state.bits - 1)
        found.append(min(max(even(blend, 20 - one.state_fraction), -half), half - 1))
    return found


@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_is_the_scalar_one(steps: int) -> None:
    """numpy's step equals Python's integers, number by number."""
    one = cell(5, 4, "int5", "int6", "int7", steps=steps)
    rng = np.random.default_rng(5)
    x, h = rng.integers(-32, 32, (60, 5)), rng.integers(-64, 64, (60, 4))
    want = [scalar_step(one, a.tolist(), b.tolist()) for a, b in zip(x, h, strict=True)]
    assert gru.step(one, x, h).tolist() == want


def test_integers_follow_the_real_cell() -> None:
    """A step is within the tables' error and half a unit of the state of the formula in float64."""
    one = cell(6, 4, "int4", "int5", "int8")
    rng = np.random.default_rng(4)
    x, h = rng.integers(-16, 16, (200, 6)), rng.integers(-128, 128, (200, 4))
    scale = 2.0**-one.fraction
    t_x = (x @ to_units(one.x_codes, one.weight).T) * one.x_factors * scale + one.offsets[:12] * scale
    t_h = (h @ to_units(one.h_codes, one.weight).T) * one.h_factors * scale
    t_h[:, 8:] += one.offsets[12:] * scale
    r, z = (1 / (1 + np.exp(-(t_x[:, s] + t_h[:, s]))) for s in (slice(4), slice(4, 8)))
    n = np.tanh(t_x[:, 8:] + r * t_h[:, 8:])
    real = n + z * (h / 128 - n)
    sigmoid, tanh = gates.table_error()
    reach = np.abs(t_h[:, 8:]).max()
    bound = tanh + sigmoid * (2 + reach) + 1 / 128
    assert np.abs(gru.step(one, x, h) / 128 - np.clip(real, -1, 127 / 128)).max() < bound


def quantized_cell(weights: str = "int8", acts: str = "int8") -> tuple[Model, GRUCell]:
    """A GRU over sequences, quantized, and its cell."""
    torch.manual_seed(3)
    model = captured(Model(nn.GRU(6, 5, batch_first=True).eval(), torch.zeros(1, 3, 6), None, {}))
    done = quantize(model, uniform(weights, acts), Calib(torch.randn(20, 12, 6)))
    found = next(part for part in done.module.modules() if isinstance(part, GRUCell))
    return done, found


def test_a_quantized_cell_becomes_integers() -> None:
    """States of the integers stay near those of quantkit's simulation over whole sequences."""
    model, one = quantized_cell()
    integers, entered = cell_of(one)
    x = torch.randn(1, 30, 6)
    with torch.no_grad():
        want = model.module(x)[0][0].numpy()
    h, found = np.zeros((1, 5), np.int64), []
    for row in entered(x[0].numpy()):
        h = gru.step(integers, row[None], h)
        found.append(h[0] * 2.0**-integers.state_fraction)
    assert np.abs(np.array(found) - want).max() < 0.05 and np.abs(want).max() > 0.3


def test_what_has_no_hardware_is_refused() -> None:
    """Float sides, minifloat states, wrong shapes and steps: one line each."""
    with pytest.raises(InputError, match=r"layer cell\.ih is in float"):
        cell_of(substitute(nn.GRUCell(3, 4))[""])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="input is an integer"):
        cell_of(quantized_cell(acts="e4m3")[1])
    odd = quantized_cell()[1]
    odd.state.act = None
    with pytest.raises(InputError, match="stored as float, but the product with it reads int8"):
        cell_of(odd)
    one = cell(4, 3, "int4", "int4", "int8")
    with pytest.raises(HwError, match="has 9 rows"):
        replace(one, x_codes=one.x_codes[:6])
    with pytest.raises(HwError, match=r"steps of a state of int8 are 2\^-7 .. 2\^-10"):
        replace(one, state_fraction=6)
    with pytest.raises(HwError, match="9 factors twice and 12 offsets"):
        replace(one, offsets=one.offsets[:11])
    with pytest.raises(HwError, match=r"a table of shape \(2, 256\)"):
        replace(one, out=parse("int4"), table=np.zeros((2, 256), np.int64))


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Folds found in the test are found anew behind it."""
    yield
    cell_fold.cache_clear()


@pytest.mark.sim
@icarus
@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("simd", [(1, 6), (1, 3), (2, 6)])
def test_the_states_product_starts_as_early_as_it_may(
    simd: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With slow, equal and fast input products all sums are there in time; one unit earlier some are not."""
    one = cell(6, 6, "int4", "int4", "int8")
    for early in (0, 1):
        for module in (folding, emit_cell):
            monkeypatch.setattr(module, "lead", lambda x, h, early=early: lead(x, h) + early)
        cell_fold.cache_clear()
        (tmp_path / str(early)).mkdir()
        network, plan = written(one, simd, tmp_path / str(early))
        codes = sample_codes(network, 8, seed=3)
        assert lead(*plan.parts) < 5  # type: ignore[misc]
        with Simulation(tmp_path / str(early), "iverilog") as rtl:
            if early:
                with pytest.raises(SimulationError, match="undefined"):
                    rtl.run(codes)
            else:
                answer = rtl.run(codes)
                assert np.array_equal(answer.sums, reference(network, codes))
                assert set(answer.cycles.tolist()) == {plan.cycles}
