"""Qronos against the paper's definition, solved by least squares for every column, and against Brevitas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_gptq import drifted
from tiny_models import MODELS, SINGLES
from torch import nn

from hwmodel.formats import nearest
from quantkit.methods import gptq, qronos
from quantkit.model import Calib, Model
from quantkit.qlayers import QLayer
from quantkit.qtensor import values_of
from quantkit.recipe import make_plan, quantize, uniform


def paper(W, X, Xq, scale, fmt, r, order):
    """The two problems of the module's docstring as written there, (rows, columns); numpy float64.

    X (samples, columns) float inputs, Xq quantized ones. r |v - w|^2 is a row sqrt(r) in front of every column.
    """
    columns = W.shape[1]
    hold = np.sqrt(r) * np.eye(columns)
    X, Xq = np.vstack([X, hold]), np.vstack([Xq, hold])
    Q = np.zeros_like(W)
    for row, w in enumerate(W):
        now, target = w.copy(), X @ w
        for t, j in enumerate(order):
            rest = order[t + 1 :]
            missing = target - Xq[:, order[:t]] @ now[order[:t]] - Xq[:, rest] @ now[rest]
            p = Xq[:, j] @ missing / (Xq[:, j] @ Xq[:, j])
            Q[row, j] = nearest(float(p / scale[row]), fmt)
            now[j] = Q[row, j] * scale[row]
            if len(rest):
                done = order[: t + 1]
                now[rest] = np.linalg.lstsq(Xq[:, rest], target - Xq[:, done] @ now[done], rcond=None)[0]
    return Q


def problem(name, acts):
    """A layer with drifted inputs, per group: (layer, W, X, Xq, mean diagonal of the Gram matrix)."""
    site, H = drifted(SINGLES[name], acts)
    layer, parts = site.layer, []
    W = layer.weight.detach().flatten(1).double().numpy().reshape(layer.groups, -1, H.shape[1])
    for g in range(layer.groups):
        Xq = torch.cat([layer.columns(x)[g] for x in site.inputs]).double().numpy()
        act, layer.act = layer.act, None
        X = torch.cat([layer.columns(x)[g] for x in site.inputs]).double().numpy()
        layer.act = act
        parts.append((W[g], X, Xq, float(H[g].diagonal().mean())))
    return site, parts


def run(method, site, **options):
    """Codes (outputs, columns) that a method gives the layer of a site."""
    site.layer.set_weight(None)
    model = Model(nn.Sequential(site.layer), site.inputs[0][:1])
    with torch.no_grad():
        report = method.apply(model, Calib(torch.cat(site.inputs)), scale="absmax", **options)
    return values_of(site.layer.q).double().numpy(), report


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("acts", ["int2", "int4"])
@pytest.mark.parametrize("name", ["linear", "conv", "grouped"])
def test_equals_the_paper(name, acts, act_order):
    """Codes are the paper's; a row that fell back to rounding to nearest is none of them."""
    site, parts = problem(name, acts)
    layer, r = site.layer, 0.03
    codes, report = run(qronos, site, damp=r, ridge=r, act_order=act_order)
    codes = codes.reshape(layer.groups, -1, codes.shape[1])
    scale = layer.q.scale[:, 0].double().numpy()  # fitted to the weights that are aimed at
    same = 0
    for g, (W, X, Xq, mean) in enumerate(parts):
        diagonal = np.sum(Xq**2, axis=0)
        order = np.argsort(-diagonal.astype(np.float32), kind="stable") if act_order else np.arange(W.shape[1])
        expected = paper(
            W, X, Xq, scale.reshape(layer.groups, -1)[g], layer.plan.weight, r * mean * len(X), list(order)
        )
        same += int((codes[g] == expected).all(axis=1).sum())
    assert same >= layer.weight.shape[0] - report["nearest_rows"] - 1  # one row may meet a tie in float32


def test_differs_from_gptq_in_what_is_rounded_first():
    """With gptq's aim the first column is another for some rows, and the rest is GPTQ from there."""
    site, _ = problem("linear", "int2")
    first, _ = run(qronos, site, damp=0.03, ridge=0.03, act_order=False)
    other, _ = run(gptq, site, damp=0.03, ridge=0.03, act_order=False, drift=True)
    changed = first[:, 0] != other[:, 0]
    assert changed.any() and (first[~changed] == other[~changed]).mean() > 0.99


@pytest.mark.parametrize("acts", ["int3", "int4"])
def test_equals_brevitas(acts):
    """Brevitas' Qronos, given the moments of the same inputs, ends with the same weights."""
    pytest.importorskip("brevitas", reason="brevitas is not installed: pip install 'quantkit[dev]'")
    import brevitas.nn as qnn
    from brevitas.graph.qronos import Qronos
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8WeightPerChannelFloat

    site, ((W, X, Xq, mean),) = problem("linear", acts)
    site.layer.plan = make_plan("int4n", acts)
    H, G = Xq.T @ Xq / len(X), X.T @ Xq / len(X)
    damp = 1e-4 * float(np.linalg.eigvalsh(H)[-1]) / mean
    codes, report = run(qronos, site, damp=damp, ridge=damp, act_order=False)
    rule = Int8WeightPerChannelFloat.let(bit_width=4, scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS)
    theirs = qnn.QuantLinear(W.shape[1], W.shape[0], False, weight_quant=rule).eval()
    theirs.weight.data = site.layer.weight.detach().clone()
    scale = site.layer.q.scale
    with torch.no_grad():
        theirs(site.inputs[0])  # makes the scale a parameter
        (value,) = [p for n, p in theirs.named_parameters() if "scaling_impl" in n]
        value.data = (7 * scale).reshape(value.shape)
        theirs.weight_orig = theirs.weight.detach().clone()
        solver = Qronos(theirs, "layer", False, 1, True, num_blocks=W.shape[1], alpha=1e-4)
        solver.H[0], solver.G[0] = torch.from_numpy(H).float(), torch.from_numpy(G).float()
        solver.single_layer_update()
        expected = (theirs.quant_weight().value / scale).round().double().numpy()
    same = (codes == expected).all(axis=1)
    assert same.sum() >= len(W) - report["nearest_rows"] - 1


@pytest.mark.parametrize("name", ["mlp", "policy", "cnn"])
def test_lowers_the_output_error(name):
    """Where inputs are coarse it ends nearer to the float network than plain GPTQ: in the mean of formats."""
    model, calib = MODELS[name]()
    ratios = []
    with torch.no_grad():
        target = model.module(calib.inputs)
        for acts in ("int2", "int3", "int4", "e2m1"):
            done = [
                quantize(model, uniform("int4", acts, steps=((step, {"act_order": True}),)), calib)
                for step in ("gptq", "qronos")
            ]
            errors = [float((d.module(calib.inputs) - target).square().mean()) for d in done]
            ratios.append(errors[1] / errors[0])
    assert np.exp(np.mean(np.log(ratios))) < 0.95


def test_float_inputs_are_gptq():
    """Without drift nothing is to be corrected, and codes are GPTQ's."""
    site, _ = problem("conv", "float")
    assert isinstance(site.layer, QLayer)
    assert np.array_equal(*(run(method, site, act_order=True)[0] for method in (gptq, qronos)))
