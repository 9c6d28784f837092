"""Round to nearest: the yardstick of the other methods."""

from __future__ import annotations

import pytest
import torch
from strategies import WEIGHT_FORMATS
from tiny_models import MODELS, SINGLES

from hwmodel.formats import levels, parse
from quantkit.methods import rtn
from quantkit.qlayers import QLayer
from quantkit.qtensor import dequantize, fit_scale, quantize
from quantkit.recipe import make_plan


def wrapped(build, weights="int4", granularity="row"):
    model, calib = build()
    for key, layer in list(model.layers().items()):
        model.replace(key, QLayer(layer, make_plan(weights, "float", granularity)))
    return model, calib


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("rule", ["absmax", "percentile", "mse"])
def test_nearest_at_the_fitted_scale(rule, weights, granularity):
    """Every weight is the nearest of all scaled values."""
    model, calib = wrapped(MODELS["cnn"], weights, granularity)
    rtn.apply(model, calib, scale=rule)
    for layer in model.qlayers().values():
        scale = fit_scale(layer.weight, parse(weights), layer.plan.granularity, rule)
        assert torch.equal(layer.q.scale, scale)
        grid = torch.tensor(levels(parse(weights))).double() * scale.double()[..., None]
        distance = (layer.weight.flatten(1).double()[..., None] - grid).abs().amin(dim=-1)
        ours = (layer.weight.double() - dequantize(layer.q).double()).flatten(1).abs()
        assert torch.allclose(ours, distance, atol=1e-6 * float(layer.weight.abs().max()))


@pytest.mark.parametrize("name", SINGLES)
def test_importance_uses_the_inputs(name):
    """Rule importance weights columns by the mean square of their inputs, per convolution group."""
    model, calib = wrapped(SINGLES[name], "int3")
    rtn.apply(model, calib, scale="importance")
    layer = model.module[0]
    rows = layer.columns(calib.inputs)
    square = rows.square().mean(dim=1).repeat_interleave(layer.weight.shape[0] // layer.groups, dim=0)
    square = square + 1e-3 * square.mean()
    expected = fit_scale(layer.weight, parse("int3"), layer.plan.granularity, "importance", importance=square)
    assert torch.allclose(layer.q.scale, expected, rtol=1e-4)


def test_values_on_the_grid_are_kept():
    """A weight that already lies on a grid is preserved exactly by absmax and mse."""
    model, calib = wrapped(MODELS["mlp"])
    g = torch.Generator().manual_seed(9)
    for layer in model.qlayers().values():
        values = torch.randint(-7, 8, layer.weight.shape, generator=g).float()
        values[:, 0] = 7
        layer.weight.data = values * 0.0625
    for rule in ("absmax", "mse"):
        for layer in model.qlayers().values():
            layer.set_weight(None)
        rtn.apply(model, calib, scale=rule)
        assert all(torch.equal(dequantize(layer.q), layer.weight) for layer in model.qlayers().values())


def test_equals_the_core_function():
    """rtn is quantize at fit_scale, nothing else."""
    model, calib = wrapped(MODELS["policy"], "e2m1")
    rtn.apply(model, calib)
    for layer in model.qlayers().values():
        fmt, granularity = layer.plan.weight, layer.plan.granularity
        q = quantize(layer.weight, fit_scale(layer.weight, fmt, granularity), fmt, granularity)
        assert torch.equal(q.codes, layer.q.codes)
