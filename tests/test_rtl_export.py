"""Thresholds reproduce the simulator's float pipeline exactly; whole policies agree bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn
from typer.testing import CliRunner

from hwmodel import network as networks
from hwmodel import simulate
from quantkit import rtl_export, rtl_thresholds
from quantkit.artifact import save_artifact
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.policy import Head, InputStage, Policy
from quantkit.recipe import Recipe, make_plan, parse_step, quantize
from quantkit.rtl_export import network_of
from quantkit.rtl_thresholds import thresholds
from quantkit.simulate import compile_policy

FORMATS = [("int3", "int4"), ("e2m1", "e3m2"), ("ternary", "int5"), ("int4", "e2m1"), ("binary", "uint3"),
           ("e4m3", "e2m2"), ("int8", "int8")]  # fmt: skip


def quantized(
    weights: str,
    acts: str,
    activation: type[nn.Module] = nn.Tanh,
    granularity: str = "row",
    steps: tuple[str, ...] = (),
) -> tuple[Model, torch.Tensor]:
    """The tiny policy of the tests, quantized, and observations for it."""
    model, calib = tiny_models.policy(activation)
    plan = (("*", make_plan(weights, acts, granularity)),)
    return quantize(model, Recipe(plan, tuple(parse_step(s) for s in steps), 0), calib), calib.inputs


@pytest.mark.parametrize(("weights", "acts"), FORMATS)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.ELU])
def test_integers_equal_the_simulator(weights: str, acts: str, activation: type[nn.Module]) -> None:
    """Codes in, integer reference, gain and bias: the floats of `compile_policy`, for any format and activation."""
    model, obs = quantized(weights, acts, activation)
    if activation is nn.Sigmoid and weights == "e4m3":  # the one case whose sums are finer than float32's noise
        with pytest.raises(InputError, match="rounding noise of float32"):
            network_of(model)
        return
    network, host = network_of(model)
    got = host.outputs(networks.reference(network, host.codes(obs.numpy())))
    want = compile_policy(model.module)(obs.numpy())  # type: ignore[arg-type]
    assert np.array_equal(got, want)


@pytest.mark.parametrize(("granularity", "steps"), [("tensor", ()), ("row", ("smoothquant", "gptq"))])
def test_factors_and_granularity(granularity: str, steps: tuple[str, ...]) -> None:
    """Scales per tensor and SmoothQuant's input factors go into the thresholds too."""
    model, obs = quantized("int4", "int4", nn.Tanh, granularity, steps)
    network, host = network_of(model)
    got = host.outputs(networks.reference(network, host.codes(obs.numpy())))
    assert np.array_equal(got, compile_policy(model.module)(obs.numpy()))  # type: ignore[arg-type]


def test_linear_and_squashed_policies() -> None:
    """One layer alone, and an activation behind the last layer, which the host computes."""
    inputs = tiny_models.correlated(150, 6, seed=3)
    stage = InputStage(0.3, 1.7, -1.5, 1.5)
    for net in (nn.Sequential(nn.Linear(6, 3)), nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3), nn.Tanh())):
        policy = Policy(stage, net, Head("box", low=(-1.0,) * 3, high=(1.0,) * 3), (6,)).eval()
        model = Model(policy, inputs[:1], meta={"kind": "policy"})
        plan = (("*", make_plan("int5", "int6", "row")),)
        model = quantize(model, Recipe(plan, (), 0), Calib(inputs))
        network, host = network_of(model)
        sums = networks.reference(network, host.codes(inputs.numpy()))
        assert np.array_equal(host.outputs(sums), compile_policy(model.module)(inputs.numpy()))  # type: ignore[arg-type]
        assert np.array_equal(host.actions(sums), model.module.predict(inputs.numpy())[0])  # type: ignore[union-attr,operator]


def test_sabotage_a_moved_threshold_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold off by one is a threshold that the proof refuses."""
    model, _ = quantized("int3", "int4")
    network, _ = network_of(model)
    layer, table = network.layers[0], network.layers[0].thresholds
    assert table is not None
    found = {}

    def spy(values: rtl_thresholds.Step, bare: networks.Layer, out: object) -> np.ndarray:
        found["values"] = values
        raise InputError("seen")

    monkeypatch.setattr(rtl_export, "thresholds", spy)
    with pytest.raises(InputError, match="seen"):
        network_of(model)
    grid = np.array(rtl_thresholds.levels(layer.spec.out), np.float32)  # type: ignore[arg-type]
    ranks = lambda sums: np.searchsorted(grid, found["values"](sums))  # noqa: E731
    low, high = (bound.astype(np.int64) for bound in layer.sum_range)
    right = table.astype(np.int64)
    assert rtl_thresholds._disproof(ranks, right, low, high) is None
    wrong = right.copy()
    wrong[3, 7] += 1
    assert rtl_thresholds._disproof(ranks, wrong, low, high) == (3, int(right[3, 7]))


@pytest.mark.parametrize(("weights", "acts"), [("int3", "int4"), ("e2m1", "e3m2"), ("ternary", "int5")])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.LeakyReLU])
def test_a_network_in_a_row_needs_no_policy(weights: str, acts: str, activation: type[nn.Module]) -> None:
    """Integers, gain and bias of any module of linear layers give the floats of the module itself."""
    model, obs = row_of(nn.Linear(5, 11), activation(), nn.Linear(11, 7), activation(), nn.Linear(7, 3))
    done = quantize(model, Recipe((("*", make_plan(weights, acts)),)), Calib(obs))
    network, host = network_of(done)
    assert [spec.name for spec in network.specs] == ["0", "2", "4"] and host.head is None
    with torch.no_grad():
        want = done.module(obs).numpy()
    assert np.array_equal(host.outputs(networks.reference(network, host.codes(obs.numpy()))), want)


def row_of(*modules: nn.Module) -> tuple[Model, torch.Tensor]:
    """A network that is no policy, and inputs for it."""
    torch.manual_seed(8)
    for module in modules:
        for parameter in module.parameters():
            parameter.data = torch.randn_like(parameter) * 0.6
    obs = 2 * torch.randn(300, 5)
    return Model(nn.Sequential(*modules).eval(), obs[:2], meta={"kind": "module"}), obs


def test_what_is_no_row_is_refused() -> None:
    """A normalization between layers, an activation that falls, and inputs that are no vectors, by name."""
    normalized = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)
    falling = nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)
    for modules, words in ((normalized, "1: a LayerNorm mixes features"), (falling, "gelu.* has no place there")):
        model, obs = row_of(*modules)
        with pytest.raises(InputError, match=words):
            network_of(quantize(model, Recipe((("*", make_plan("int4", "int4")),)), Calib(obs)))
    model, obs = row_of(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    model.example = obs[None, :2]
    with pytest.raises(InputError, match=r"inputs have the shape \(2, 5\)"):
        network_of(quantize(model, Recipe((("*", make_plan("int4", "int4")),)), Calib(obs.view(-1, 2, 5))))


def test_what_has_no_hardware_is_refused() -> None:
    """Float layers, convolutions, group scales, functions that fall, and networks that are no policy, by name."""
    with pytest.raises(InputError, match=r"net\.0 is in float"):
        network_of(quantized("int4", "float")[0])
    with pytest.raises(InputError, match="it is not traced"):
        network_of(tiny_models.mlp()[0])
    model, calib = tiny_models.image_policy()
    plan = (("*", make_plan("int4", "int4", "row")),)
    with pytest.raises(InputError, match=r"net\.0 is a convolution"):
        network_of(quantize(model, Recipe(plan, (), 0), calib))
    with pytest.raises(InputError, match=r"net\.0.*group"):
        network_of(_grouped())
    model, _ = quantized("int4", "int4")
    first = network_of(model)[0].layers[0]
    bare = dataclasses.replace(first, spec=dataclasses.replace(first.spec, out=None), thresholds=None)
    with pytest.raises(InputError, match="does not ascend"):
        thresholds(lambda s: np.clip(np.abs(s).astype(np.float32), 0, 7), bare, model.qlayers()["net.2"].act.fmt)  # type: ignore[union-attr]


def _grouped() -> Model:
    model, calib = tiny_models.policy(nn.ReLU)
    plan = (("*", make_plan("int4", "int4", "row")), ("net.0", make_plan("int4", "int4", "group7")))
    return quantize(model, Recipe(plan, (), 0), calib)


@pytest.mark.sim
@pytest.mark.skipif(not shutil.which("iverilog"), reason="iverilog is not installed (apt-get install iverilog)")
def test_a_policy_runs_from_its_verilog(tmp_path: Path) -> None:
    """`quantkit rtl` writes a design whose simulation gives the policy's floats for every observation."""
    model, obs = quantized("int3", "int4")
    save_artifact(model, tmp_path / "p.q")
    arguments = ["rtl", str(tmp_path / "p.q"), "-o", str(tmp_path / "p.rtl"), "--latency-us", "1", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    _, host = network_of(model)
    with simulate.Simulation(tmp_path / "p.rtl", "iverilog") as rtl:
        answer = rtl.run(host.codes(obs.numpy()[:60]))
    assert np.array_equal(host.outputs(answer.sums), compile_policy(model.module)(obs.numpy()[:60]))  # type: ignore[arg-type]
    assert set(answer.cycles.tolist()) == {plan["cycles"]} and plan["cycles"] <= 100
