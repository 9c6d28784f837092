"""Clipping that is chosen by the error of the layer's output."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import MODELS, SINGLES, attention, single
from torch import nn

from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.methods import act_scales
from quantkit.qlayers import QLayer
from quantkit.recipe import make_plan, quantize, uniform

OUTPUT = (("act_scales", {"scale": "output"}),)


def planned(model, acts="int4"):
    """The model with all inputs planned, weights left float."""
    for name, layer in list(model.layers().items()):
        model.replace(name, QLayer(layer, make_plan("float", acts)).eval())
    return model


def fake(x: np.ndarray, scale: float, low: int, high: int) -> np.ndarray:
    return np.clip(np.rint(x / scale), low, high) * scale


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_the_best_of_all_tried(seed):
    """On one layer the scale is, of 25 around that of least squared error, the best in a search written out by hand."""
    model, calib = single(nn.Linear(9, 4), seed)
    calib.inputs[:, 3] *= 40  # a channel that needs clipping if the weights look at it
    model.module[0].weight.data[:, 3] *= 1e-4
    by_mse, found = (
        quantize(model, uniform("float", "int4", steps=(("act_scales", {"scale": s}),)), calib).qlayers()["0"].act
        for s in ("mse", "output")
    )
    x, w = calib.inputs.double().numpy(), model.module[0].weight.detach().double().numpy()

    def error(scale: float) -> float:
        return float(np.square((fake(x, scale, 0, 15) - x) @ w.T).sum())

    tried = [by_mse.scale * 2 ** (k / 8) for k in range(-12, 13)]
    assert str(found.fmt) == "uint4"
    assert error(found.scale) == pytest.approx(min(map(error, tried)), rel=1e-4)
    assert error(found.scale) < 0.8 * error(by_mse.scale)


@pytest.mark.parametrize("acts", ["int4", "e2m1"])
@pytest.mark.parametrize("build", SINGLES.values(), ids=SINGLES)
def test_never_worse_than_by_squared_error(build, acts):
    """For every kind of layer the output error is at most that of `mse`, on what the search looks at."""
    model, calib = build()
    reference = model.module(calib.inputs).detach()
    errors = []
    for scale in ("mse", "output"):
        recipe = uniform("float", acts, steps=(("act_scales", {"scale": scale, "samples": 2**30}),))
        errors.append(float((quantize(model, recipe, calib).module(calib.inputs) - reference).square().sum()))
    assert errors[1] <= errors[0] * (1 + 1e-5)


def test_powers_of_two_stay():
    """With pow2 every scale is one."""
    model, calib = MODELS["cnn"]()
    done = quantize(model, uniform("int4", "int4", steps=(("act_scales", {"scale": "output", "pow2": True}),)), calib)
    assert all(math.log2(layer.act.scale).is_integer() for layer in done.qlayers().values())


def test_alone_and_together():
    """A policy, an untraced module and a graph get scales for layers and operands, alone or in a walk with others."""
    for model, calib in (MODELS["policy"](), MODELS["mlp"](), attention()):
        with torch.no_grad():
            act_scales.apply(planned(model), calib, scale="output")
        assert all(layer.act is not None for layer in model.qlayers().values())
    model, calib = attention()
    done = quantize(captured(model), uniform("int4", "int4", steps=(*OUTPUT, ("gptq", {}))), calib)
    assert all(part.act is not None for part in done.quantizers().values())


def test_unknown_rule():
    """A rule for weights is refused with those for inputs."""
    model, calib = MODELS["mlp"]()
    with pytest.raises(InputError, match="'importance' is not for inputs; accepted: absmax, percentile, mse, output"):
        act_scales.apply(planned(model), calib, scale="importance")
