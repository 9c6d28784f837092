"""Learned rounding: its parts against their definitions."""

from __future__ import annotations

import pytest
import torch
from strategies import WEIGHT_FORMATS
from tiny_models import MODELS, correlated, single
from torch import nn

from hwmodel.formats import levels, max_value, min_value, parse
from hwmodel.spec import PerRow
from quantkit.methods import adaround
from quantkit.methods.adaround import Moments, Samples, h, learn, start, steps_of
from quantkit.qlayers import LayerPlan, QLayer
from quantkit.qtensor import dequantize, fit_scale, values_of
from quantkit.rounding import round_to


def matrix(rows=6, columns=20, seed=51):
    return torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(seed))


def parts(weights, rule="absmax"):
    """(w, s, u, lo, d, limits) of a random matrix."""
    fmt, w = parse(weights), matrix()
    s = fit_scale(w[0], fmt, PerRow(), rule)[None]
    u = w / s
    lo, d = steps_of(u, fmt)
    limits = (-1.0, 1.0) if weights in ("ternary", "binary") else (min_value(fmt), max_value(fmt))
    return w, s, u, lo, d, limits


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_start_is_the_float_weight(weights):
    """The soft weight starts at the float weight, within the format's range."""
    _w, s, u, lo, d, limits = parts(weights)
    soft = (lo + d * h(start(lo, d, u))).clamp(*limits) * s
    assert torch.allclose(soft, u.clamp(*limits) * s, atol=1e-5)


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_hard_start_is_nearest(weights, rule):
    """Rounding h of the start at 0.5 is round-to-nearest, away from ties."""
    _w, _s, u, lo, d, limits = parts(weights, rule)
    hard = (lo + d * (h(start(lo, d, u)) >= 0.5)).clamp(*limits)
    tie = ((u - lo) / d - 0.5).abs() < 1e-5
    assert torch.equal(hard[~tie], round_to(u, parse(weights))[~tie])


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_up_and_down_are_values(weights):
    """lo and lo + d, clipped, are values of the format, at powers of two and negative ones, too."""
    fmt = parse(weights)
    u = torch.cat([torch.tensor(levels(fmt)), matrix().flatten() * max_value(fmt), torch.tensor([1e9, -1e9, 0.0])])
    lo, d = steps_of(u, fmt)
    limits = (-1.0, 1.0) if weights in ("ternary", "binary") else (min_value(fmt), max_value(fmt))
    for choice in (lo, lo + d):
        assert torch.isin(choice.clamp(*limits), torch.tensor(levels(fmt))).all()
    assert (u[: len(levels(fmt))] == lo[: len(levels(fmt))]).all() or weights == "binary"


def test_gradient_is_autograd_s():
    """One step of plain descent direction equals autograd on the loss of the docstring."""
    w, s, u, lo, d, limits = parts("e2m1", "mse")
    x = correlated(64, 20, seed=3)[None]
    e = 0.1 * correlated(64, 6, seed=4)[None]  # the error that the layers before have made
    moments = Moments(x.mT @ x, e.mT @ x)
    V = start(lo, d, u)
    unit, reg, b = torch.ones(1, 6, 1) * 50, 0.3, 7.0
    options = {"reg": reg, "beta": (b, b), "warmup": 0.0}

    def loss(V):
        up = (torch.sigmoid(V) * 1.2 - 0.1).clamp(0, 1)
        D = (lo + d * up).clamp(*limits) * s - w
        return ((x @ D.mT + e).square().sum(dim=1) / unit[..., 0]).sum() + reg * (1 - (2 * up - 1).abs() ** b).sum()

    V.requires_grad_(True)
    (expected,) = torch.autograd.grad(loss(V), V)
    with torch.no_grad():  # Adam's first step is lr times the sign of the gradient
        moved = learn(V, lo, d, limits, w, s, moments, unit, steps=1, lr=1e-3, **options) - V
    clear = (expected.abs() > 1e-3 * expected.abs().max()) & ((u.abs() - 6).abs() > 1e-4)  # a kink at the limit
    assert clear.float().mean() > 0.3
    assert torch.equal(moved[clear].sign(), -expected[clear].sign())
    zero = expected == 0
    assert not moved[zero].any()


def test_sampled_gradient_is_unbiased():
    """The gradient from random samples is the full one on average."""
    x, e = correlated(300, 8, seed=5)[None], correlated(300, 3, seed=6)[None]
    D = matrix(3, 8)
    full = Moments(x.mT @ x, e.mT @ x).gradient(D)
    samples = Samples(x, e, 300, 30, torch.Generator().manual_seed(1))
    mean = torch.stack([samples.gradient(D) for _ in range(3000)]).mean(dim=0)
    assert torch.allclose(mean, full, atol=0.05 * float(full.abs().max()))


def test_error_is_the_output_error():
    """Moments.error is the summed squared output error, up to what the rounding cannot change."""
    x, e = correlated(90, 8, seed=7)[None], correlated(90, 3, seed=8)[None]
    D = matrix(3, 8)
    moments = Moments(x.mT @ x, e.mT @ x)
    expected = (x @ D.mT + e).square().sum(dim=1) - e.square().sum(dim=1)
    assert torch.allclose(moments.error(D), expected, rtol=1e-3)


def wrapped(build, weights="int3"):
    model, calib = build()
    for key, layer in list(model.layers().items()):
        model.replace(key, QLayer(layer, LayerPlan(parse(weights), None)))
    return model, calib


@pytest.mark.parametrize(
    "option",
    [{"steps": 5}, {"lr": 0.2}, {"reg": 0.0}, {"warmup": 0.9}, {"beta_start": 3.0}, {"beta_end": 15.0}, {"batch": 2}],
    ids=str,
)
def test_options_change_the_result(option):
    """Every option changes some weight; a batch of 2 makes all layers wide ones."""
    results = []
    for options in ({}, option):
        model, calib = wrapped(MODELS["cnn"])
        with torch.no_grad():
            adaround.apply(model, calib, **{"steps": 200, "samples": 100, **options})
        results.append(torch.cat([dequantize(layer.q).flatten() for layer in model.qlayers().values()]))
    assert not torch.equal(*results)


def test_every_weight_goes_up_or_down():
    """A learned weight is one of the two values around the float weight."""
    model, calib = wrapped(lambda: single(nn.Linear(14, 9)), "e2m1")
    adaround.apply(model, calib)
    layer = model.module[0]
    u = layer.weight / layer.q.scale
    lo, d = steps_of(u, parse("e2m1"))
    values = values_of(layer.q)
    assert ((values == lo.clamp(-6, 6)) | (values == (lo + d).clamp(-6, 6))).all()


def test_later_layers_repair_earlier_ones():
    """The target is the float network's output: the error of a chain is below that of its layers done apart."""
    model, calib = MODELS["policy"]()
    reference = model.module(calib.inputs)
    done, _ = wrapped(MODELS["policy"], "int3")
    apart, _ = wrapped(MODELS["policy"], "int3")
    with torch.no_grad():
        adaround.apply(done, calib)
        for name, layer in apart.qlayers().items():
            alone, _ = wrapped(MODELS["policy"], "int3")
            for other, q in alone.qlayers().items():
                if other != name:
                    q.plan = LayerPlan()
            adaround.apply(alone, calib)
            layer.set_weight(alone.qlayers()[name].q)
        errors = [(m.module(calib.inputs) - reference).square().mean().item() for m in (done, apart)]
    assert errors[0] < errors[1]
