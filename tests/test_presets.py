"""Presets are names of steps and nothing more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_policies
import torch
from tiny_models import MODELS, attention
from torch import nn
from typer.testing import CliRunner

from quantkit.capture import captured
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.presets import NETWORK_PRESETS, PRESETS, kind_of, preset_steps
from quantkit.recipe import Recipe, full_steps, parse_step, quantize, step_text, uniform
from quantkit.study import design_id

AGENT = Path(__file__).parents[1] / "benchmarks/agents/sac/Pendulum-v1.zip"


@pytest.mark.parametrize("name", PRESETS)
def test_plain_data(name):
    """A preset is steps that --step could have given, and a recipe of it survives JSON with the same id."""
    steps = preset_steps(name)
    assert tuple(parse_step(step_text(step)) for step in steps) == steps
    recipe = uniform("int3", "int4", steps=steps)
    back = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert back == recipe and design_id(back) == design_id(recipe)
    assert [n for n, _ in full_steps(recipe)].count("act_scales") == 1


def test_copies():
    """Changing what was returned does not change the preset."""
    preset_steps("best")[-1][1]["steps"] = 1
    assert preset_steps("best")[-1][1].get("steps") != 1


def test_unknown():
    """The nearest name is suggested."""
    with pytest.raises(InputError, match=r"unknown preset 'fats'; did you mean 'fast'\? Presets: fast, balanced, best"):
        preset_steps("fats")


@pytest.mark.parametrize(("act", "weights"), [(torch.nn.Tanh, "e1m1"), (torch.nn.ReLU, "int2")])
def test_closer_than_nearest(act, weights):
    """On a small policy each preset ends closer to the float outputs than rounding to nearest."""
    model = small_policies.cartpole(act=act, widths=(24, 16))
    calib = small_policies.calib(model, 512)
    with torch.no_grad():
        target = model.module(calib.inputs)
        errors = {}
        for name in ("rtn", "fast", "balanced"):
            steps = () if name == "rtn" else preset_steps(name)
            done = quantize(model, uniform(weights, "int4", steps=steps), calib)
            assert all(layer.in_scale is None for layer in done.qlayers().values())
            p, q = (torch.softmax(y, dim=1) for y in (target, done.module(calib.inputs)))
            errors[name] = float((p - q).abs().mean())
    assert errors["fast"] < errors["rtn"] and errors["balanced"] < errors["rtn"]


def test_command_line(tmp_path):
    """`quantize --preset` records the steps; with --step, or unknown, it is refused; `sweep` tries presets, too."""

    def call(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)

    common = ("--weights", "int3", "--acts", "int4", "--preset", "fast")
    result = call("quantize", AGENT, "-o", tmp_path / "q", *common, "--calibration", "50", "--json")
    assert result.exit_code == 0, result.stderr
    recipe = json.loads((tmp_path / "q" / "quantkit.json").read_text())["meta"]["recipe"]
    assert [tuple(step) for step in recipe["steps"]] == [(n, o) for n, o in preset_steps("fast")]
    refused = call("quantize", AGENT, "-o", tmp_path / "x", *common, "--step", "gptq")
    assert refused.exit_code == 2 and "give --preset or --step, not both" in refused.stderr
    refused = call("quantize", AGENT, "-o", tmp_path / "x", *common[:-1], "bets")
    assert refused.exit_code == 2 and "did you mean 'best'" in refused.stderr
    result = call("sweep", AGENT, "-o", tmp_path / "s", *common, "--step", "rtn", "-n", "2", "--jobs", "1", "--json")
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "s" / "rows.jsonl").read_text().splitlines()]
    assert {row["steps"] for row in rows} == {"rtn", "+".join(step_text(s) for s in preset_steps("fast"))}


@pytest.mark.parametrize("kind", ["controller", "network", "language"])
@pytest.mark.parametrize("name", NETWORK_PRESETS)
@pytest.mark.parametrize("build", [MODELS["cnn"], attention], ids=["cnn", "attention"])
def test_networks(name, build, kind):
    """The presets of other networks are plain data, too, and end nearer to the float outputs than nearest rounding."""
    steps = preset_steps(name, kind)
    assert tuple(parse_step(step_text(step)) for step in steps) == steps
    model, calib = build()
    with torch.no_grad():
        target = model.module(calib.inputs)
        plain, done = (quantize(model, uniform("int3", "int4", steps=s), calib) for s in ((), steps))
        errors = [float((m.module(calib.inputs) - target).square().mean()) for m in (plain, done)]
    assert errors[1] < errors[0]


def test_kinds():
    """Linear layers alone are a controller's, with a GRU a recurrent one's; a convolution or attention is neither's."""
    kinds = {name: kind_of(captured(MODELS[name]()[0])) for name in ("mlp", "cnn")}
    assert kinds == {"mlp": "controller", "cnn": "network"} and kind_of(attention()[0]) == "network"
    assert kind_of(small_policies.cartpole()) == "policy"
    gru = nn.GRU(3, 4, batch_first=True)
    assert kind_of(captured(Model(gru, torch.randn(2, 5, 3), None, {}))) == "recurrent"


@pytest.mark.parametrize("name", PRESETS)
def test_units_of_features_do_not_matter(name):
    """A controller whose features come in other units loses as much as before: no unit needs more bits."""
    torch.manual_seed(0)
    x, units = torch.randn(512, 6), torch.tensor([1.0, 1024, 2**-10, 8, 64, 2**-5])
    losses = []
    for unit in (torch.ones(6), units):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
        net[0].weight.data /= unit
        model = captured(Model(net.eval(), x[:1] * unit, None, {}))
        with torch.no_grad():
            target = model.module(x * unit)
            steps = preset_steps(name, kind_of(model))
            done = quantize(model, uniform("int4", "int6", steps=steps), Calib(x * unit))
            losses.append(float((done.module(x * unit) - target).square().mean() / target.square().mean()))
    assert losses[0] < 0.02 and abs(losses[1] - losses[0]) < 0.1 * losses[0], losses
