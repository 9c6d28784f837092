"""A GRU cell in Verilog equals its integers, in the cycles predicted, and its integers follow the real cell."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hwmodel import gru
from hwmodel.cost import HwError
from hwmodel.emit import LINT
from hwmodel.formats import bits, parse
from hwmodel.network import legal_codes
from hwmodel.reference import to_units
from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.recipe import quantize, uniform
from quantkit.recurrent import GRUCell, substitute
from quantkit.rtl_export import gru_of

icarus = pytest.mark.skipif(not shutil.which("iverilog"), reason="iverilog is not installed (apt-get install iverilog)")
verilator = pytest.mark.skipif(not shutil.which("verilator"), reason="verilator is not installed (apt-get install)")


def cell(inputs: int, hidden: int, weight: str, act: str, state: str, seed: int = 1) -> gru.Gru:
    """Random codes; factors and offsets that reach the curved parts of the tables and beyond."""
    rng = np.random.default_rng(seed)
    fmt = parse(weight)
    x, h = (rng.choice(legal_codes(fmt), (3 * hidden, n)) for n in (inputs, hidden))
    factors = [rng.integers(0, 60, 3 * hidden) for _ in range(2)]
    return gru.Gru(fmt, parse(act), parse(state), x, h, *factors, rng.integers(-20000, 20000, 4 * hidden), 14)  # type: ignore[arg-type]


def codes(one: gru.Gru, steps: int) -> np.ndarray:
    """Random input codes (steps, inputs)."""
    return np.random.default_rng(2).integers(0, 2 ** bits(one.act), (steps, one.x_codes.shape[1]))


@pytest.mark.sim
@icarus
@pytest.mark.parametrize(
    ("inputs", "hidden", "formats", "simd"),
    [
        (4, 3, ("int4", "uint5", "int6"), (2, 1)),
        (8, 4, ("int8", "int8", "int8"), (8, 4)),
        (6, 5, ("ternary", "int4", "int8"), (3, 5)),
        (3, 2, ("e2m1", "int6", "int5"), (1, 2)),
    ],
)
def test_states_are_the_integers_on_time(
    inputs: int, hidden: int, formats: tuple[str, str, str], simd: tuple[int, int], tmp_path: Path
) -> None:
    """Over 25 steps from state zero, every state of the Verilog is the reference's, in the cycles predicted."""
    one = cell(inputs, hidden, *formats)
    plans = gru.plan(one, simd)
    gru.write(one, plans, tmp_path)
    x = codes(one, 25)
    states, cycles = gru.simulate(tmp_path, x, hidden, "iverilog")
    assert np.array_equal(states, gru.run(one, to_units(x, one.act))) and len(np.unique(states)) > 5
    assert set(cycles.tolist()) == {gru.cycles(plans)}


@pytest.mark.sim
@icarus
def test_sabotage_another_factor_is_seen(tmp_path: Path) -> None:
    """One factor off by one shows in the states."""
    one = cell(4, 3, "int4", "int4", "int8")
    plans = gru.plan(one, (1, 1))
    factors = one.x_factors.copy()
    factors[0] += 9
    gru.write(replace(one, x_factors=factors), plans, tmp_path)
    x = codes(one, 25)
    assert not np.array_equal(gru.simulate(tmp_path, x, 3, "iverilog")[0], gru.run(one, to_units(x, one.act)))


@pytest.mark.sim
@verilator
def test_verilator_finds_nothing_to_say(tmp_path: Path) -> None:
    """All warnings on, none appears."""
    one = cell(4, 3, "int4", "int4", "int8")
    gru.write(one, gru.plan(one, (2, 1)), tmp_path)
    (tmp_path / "lint.vlt").write_text(LINT)
    names = [str(path.relative_to(tmp_path)) for path in sorted((tmp_path / "rtl").glob("*.v"))]
    command = ["verilator", "--lint-only", "-Wall", "--default-language", "1364-2005", "lint.vlt", "network.v", *names]
    done = subprocess.run([*command, "--top-module", "gru"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


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
    sigmoid, tanh = gru.table_error()
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
    integers, entered = gru_of(one)
    x = torch.randn(1, 30, 6)
    with torch.no_grad():
        want = model.module(x)[0][0].numpy()
    found = gru.run(integers, entered(x[0].numpy())) / 128
    assert np.abs(found - want).max() < 0.05 and np.abs(want).max() > 0.3


def test_what_has_no_hardware_is_refused() -> None:
    """Float sides, minifloat states, wrong shapes: one line each."""
    with pytest.raises(InputError, match="is in float"):
        gru_of(substitute(nn.GRUCell(3, 4))[""])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="input is an integer"):
        gru_of(quantized_cell(acts="e4m3")[1])
    one = cell(4, 3, "int4", "int4", "int8")
    with pytest.raises(HwError, match="has 9 rows"):
        replace(one, x_codes=one.x_codes[:6])
