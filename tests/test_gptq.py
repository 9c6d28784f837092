"""GPTQ against the paper's algorithm, written out literally in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strategies import WEIGHT_FORMATS
from tiny_models import MODELS, SINGLES, correlated, single
from torch import nn

from hwmodel.formats import nearest, parse
from hwmodel.spec import PerGroup, PerRow, PerTensor
from quantkit.columns import aimed, factorize, moments, round_layer
from quantkit.methods import act_scales, gptq
from quantkit.model import Calib
from quantkit.observers import Gram
from quantkit.qlayers import LayerPlan, QLayer
from quantkit.qtensor import dequantize, fit_scale, quantize, values_of
from quantkit.recipe import make_plan, uniform
from quantkit.recipe import quantize as run
from quantkit.walk import Site, walk


def paper(W, H, fmt, scale_of, size, damp=0.01):
    """Algorithm 1 of arXiv 2210.17323 for one matrix; numpy float64. Returns grid values and scales."""
    W, H = W.astype(np.float64).copy(), H.astype(np.float64).copy()
    columns = W.shape[1]
    mean = np.mean(np.diag(H))
    H[np.diag_indices(columns)] += np.where(np.diag(H) == 0, mean, 0) + damp * mean
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    Q, scales = np.zeros_like(W), []
    for j in range(columns):
        if j % size == 0:
            scales.append(scale_of(W[:, j : j + size], j))
        s = scales[-1]
        Q[:, j] = [nearest(float(v), fmt) for v in W[:, j] / s]
        error = (W[:, j] - Q[:, j] * s) / U[j, j]
        W[:, j:] -= np.outer(error, U[j, j:])
    return Q, np.stack(scales, axis=1)


def wrapped(build, weights="int4", granularity=None):
    model, calib = build()
    for key, layer in list(model.layers().items()):
        model.replace(key, QLayer(layer, LayerPlan(parse(weights), None, granularity or PerRow())))
    return model, calib


def gram_of(layer, calib):
    gram = Gram()
    for batch in calib.batches():
        gram(layer, batch)
    return gram.total / gram.count


def kept_by_guard(layer, values, H):
    """Rows of the paper's result that are not worse than round-to-nearest (the others are replaced)."""
    W = layer.weight.flatten(1).double().numpy()
    scale = fit_scale(layer.weight, layer.plan.weight, layer.plan.granularity, "absmax")
    plain = dequantize(quantize(layer.weight, scale, layer.plan.weight, layer.plan.granularity)).flatten(1)
    error = [np.einsum("rc,cd,rd->r", d, H, d) for d in (values - W, plain.double().numpy() - W)]
    return error[0] <= error[1] * (1 - 1e-9)


@pytest.mark.parametrize("granularity", [PerTensor(), PerRow(), PerGroup(6), PerGroup(7)], ids=str)
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_equals_the_paper(weights, granularity):
    """Codes and scales are those of the paper's algorithm, for every format and granularity."""
    model, calib = wrapped(lambda: single(nn.Linear(18, 9)), weights, granularity)
    layer, fmt = model.module[0], parse(weights)
    H = gram_of(layer, calib)[0].numpy()
    fixed = fit_scale(layer.weight, fmt, granularity, "absmax")

    def scale_of(W, j):
        if not isinstance(granularity, PerGroup):
            return fixed[:, 0].numpy().astype(np.float64) * np.ones(9)
        return fit_scale(torch.from_numpy(W).float(), fmt, PerRow(), "absmax")[:, 0].numpy().astype(np.float64)

    size = granularity.size if isinstance(granularity, PerGroup) else 18
    Q, scales = paper(layer.weight.numpy(), H, fmt, scale_of, size)
    gptq.apply(model, calib, scale="absmax", block=4)
    real = Q * np.repeat(scales, size, axis=1)[:, :18]
    rows = kept_by_guard(layer, real, H)
    assert rows.sum() >= (2 if weights == "binary" else 5)
    assert np.array_equal(values_of(layer.q).numpy()[rows], Q[rows])
    if isinstance(granularity, PerGroup):
        assert np.allclose(layer.q.scale.numpy()[rows], scales[rows], rtol=1e-5)


@pytest.mark.parametrize("block", [1, 4, 500])
@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("weights", ["int3", "e2m1"])
def test_groups_by_falling_moment_equal_the_paper(weights, size, block):
    """With act_order columns of one group come at different times, each under its group's scale of before."""
    model, calib = wrapped(lambda: single(nn.Linear(36, 9)), weights, PerGroup(size))
    layer, fmt = model.module[0], parse(weights)
    H = gram_of(layer, calib)[0].numpy()
    scale = fit_scale(layer.weight, fmt, PerGroup(size), "absmax").numpy().astype(np.float64)
    order = np.argsort(-np.diag(H))
    Q, _ = paper(layer.weight.numpy()[:, order], H[order][:, order], fmt, lambda w, j: scale[:, order[j] // size], 1)
    gptq.apply(model, calib, scale="absmax", act_order=True, block=block)
    wanted = Q[:, np.argsort(order)]
    rows = kept_by_guard(layer, wanted * scale.repeat(size, axis=1)[:, :36], H)
    assert rows.sum() >= 5
    assert np.array_equal(values_of(layer.q).numpy()[rows], wanted[rows])
    assert torch.equal(layer.q.scale, fit_scale(layer.weight, fmt, PerGroup(size), "absmax"))


@pytest.mark.parametrize("name", ["grouped", "depthwise"])
def test_every_convolution_group_has_its_own_hessian(name):
    """A grouped convolution equals the paper's algorithm on each of its groups alone."""
    model, calib = wrapped(SINGLES[name], "int3")
    layer = model.module[0]
    H = gram_of(layer, calib).numpy()
    scale = fit_scale(layer.weight, parse("int3"), PerRow(), "absmax").numpy().astype(np.float64)
    W = layer.weight.flatten(1).numpy().reshape(layer.groups, -1, H.shape[1])
    gptq.apply(model, calib, scale="absmax")
    ours = values_of(layer.q).numpy().reshape(W.shape)
    S, matched = scale.reshape(layer.groups, -1), 0
    for g in range(layer.groups):
        Q, _ = paper(W[g], H[g], parse("int3"), lambda w, j, g=g: S[g], H.shape[1])
        near = np.clip(np.rint(W[g] / S[g][:, None]), -4, 3)
        same = (ours[g] == Q).all(axis=1)
        assert (same | (ours[g] == near).all(axis=1)).all()
        matched += same.sum()
    assert matched >= 0.7 * layer.weight.shape[0]


@pytest.mark.parametrize("granularity", [PerTensor(), PerRow(), PerGroup(1)], ids=str)
@pytest.mark.parametrize("name", SINGLES)
@pytest.mark.parametrize("weights", ["int4", "e2m1"])
def test_identity_hessian_is_nearest(weights, name, granularity):
    """H proportional to the identity gives exactly round-to-nearest."""
    model, _ = wrapped(SINGLES[name], weights, granularity)
    layer = model.module[0]
    columns = layer.weight.flatten(1).shape[1]
    H = 2.7 * torch.eye(columns).expand(layer.groups, -1, -1).contiguous()
    expected = quantize(layer.weight, fit_scale(layer.weight, parse(weights), granularity), parse(weights), granularity)
    rule = {"rule": "mse", "percentile": 99.9, "pow2": False}
    round_layer(layer, layer.weight.detach().flatten(1), H, rule, 0.01, False, 16)
    assert torch.equal(layer.q.codes, expected.codes)
    assert torch.equal(layer.q.scale, expected.scale)


@pytest.mark.parametrize("build", [SINGLES["grouped"], lambda: single(nn.Linear(37, 11))], ids=["grouped", "linear"])
@pytest.mark.parametrize("act_order", [False, True])
def test_block_size_changes_nothing(build, act_order):
    """Blocks of 1, 5, 16 and more columns than there are give the same codes."""
    results = []
    for block in (1, 5, 16, 500):
        model, calib = wrapped(build, "int4")
        gptq.apply(model, calib, block=block, act_order=act_order)
        results.append(model.module[0].q.codes)
    assert all(torch.equal(results[0], codes) for codes in results)


def test_factor():
    """N is unit lower triangular and N diag N^T is the damped matrix."""
    x = correlated(50, 8, seed=9)
    H = (x.T @ x)[None].double()
    N, damp = factorize(H, 0.02)
    assert damp == 0.02
    damped = H[0] + 0.02 * H[0].diagonal().mean() * torch.eye(8)
    D = torch.linalg.solve(N[0], torch.linalg.solve(N[0], damped).T)
    assert torch.allclose(N[0].diagonal(), torch.ones(8).double()) and not N[0].triu(1).any()
    assert torch.allclose(D, torch.diag(D.diagonal()), atol=1e-8 * float(D.max()))


def test_an_order_of_columns_is_a_permutation_of_the_matrix():
    """The factor of H in an order is that of the permuted H, group by group, and H stays as it was."""
    x = correlated(60, 14, seed=4).reshape(60, 2, 7).transpose(0, 1)
    H = x.mT @ x
    for few in (H, H[:1]):
        order = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(i)) for i in range(len(few))])
        permuted = torch.stack([h[o][:, o] for h, o in zip(few, order, strict=True)])
        before = few.clone()
        assert torch.equal(factorize(few, 0.01, order)[0], factorize(permuted, 0.01)[0])
        assert torch.equal(few, before)


def test_damping_raises_itself():
    """A matrix that is not positive definite is damped until it is, and the report says how much."""
    H = torch.tensor([[[1.0, 1.02], [1.02, 1.0]]])
    assert factorize(H, 0.0)[1] == 0.1
    assert factorize(torch.tensor([[[1.0, 5.0], [5.0, 1.0]]]), 0.0) is None
    assert factorize(torch.full((1, 2, 2), float("nan"))) is None
    assert factorize(torch.zeros(1, 3, 3))[0].tolist() == [torch.eye(3).tolist()]


def test_falls_back_to_nearest():
    """A layer that calibration never reaches is rounded to nearest and counted."""

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x) if x.sum() < 1e6 else self.unused(x)

    from quantkit.model import Model

    model = Model(Unused(), torch.zeros(1, 4))
    done = run(model, uniform("int4", "float", steps=(("gptq", {}),)), Calib(correlated(20, 4, seed=1)))
    assert done.meta["steps"][-1]["diagnostics"]["nearest_layers"] == 1
    layer = done.qlayers()["unused"]
    scale = fit_scale(layer.weight, parse("int4"), PerRow())
    assert torch.equal(layer.q.codes, quantize(layer.weight, scale, parse("int4"), PerRow()).codes)


def test_dead_inputs_round_to_nearest():
    """The column of an input that is always zero is rounded to nearest, and counted."""
    model, calib = wrapped(lambda: single(nn.Linear(10, 6)))
    calib.inputs[:, 4] = 0
    layer = model.module[0]
    scale = fit_scale(layer.weight, parse("int4"), PerRow())
    near = quantize(layer.weight, scale, parse("int4"), PerRow())
    assert gptq.apply(model, calib)["dead_inputs"] == 1
    assert torch.equal(layer.q.codes[:, 4], near.codes[:, 4])
    assert not torch.equal(layer.q.codes, near.codes)


@pytest.mark.parametrize(
    "option", [{"act_order": True}, {"damp": 3.0}, {"scale": "absmax"}, {"pow2": True}, {"sequential": False}], ids=str
)
def test_options_change_the_result(option):
    """Every option but the block size changes some weight."""
    results = []
    for options in ({}, option):
        model, calib = wrapped(MODELS["policy"], "int3")
        gptq.apply(model, calib, **options)
        results.append(torch.cat([dequantize(layer.q).flatten() for layer in model.qlayers().values()]))
    assert not torch.equal(*results)


def test_act_order_starts_with_the_largest_input():
    """With act_order the column of the largest input is rounded first, that is, to nearest."""
    model, calib = wrapped(lambda: single(nn.Linear(12, 8)), "int3")
    calib.inputs[:, 7] *= 1e3
    gptq.apply(model, calib, act_order=True)
    layer = model.module[0]
    near = quantize(layer.weight, layer.q.scale, parse("int3"), PerRow())
    assert torch.equal(layer.q.codes[:, 7], near.codes[:, 7])


def test_inputs_are_the_quantized_ones():
    """With calibrated activations the Hessian is that of the quantized inputs."""
    model, calib = single(nn.Linear(9, 5))
    fine = run(model, uniform("int4", "int8", steps=(("gptq", {}),)), calib)
    coarse = run(model, uniform("int4", "int2", steps=(("gptq", {}),)), calib)
    assert not torch.equal(fine.qlayers()["0"].q.codes, coarse.qlayers()["0"].q.codes)


def drifted(build, acts):
    """A layer alone with quantized inputs, as its site shows it: (site, Gram matrix)."""
    model, calib = build()
    for key, layer in list(model.layers().items()):
        model.replace(key, QLayer(layer, make_plan("int4", acts)))
    with torch.no_grad():
        act_scales.apply(model, calib)
        (site,) = walk(model, calib, ["0"], targets=True)
    gram = Gram()
    for x in site.inputs:
        gram(site.layer, x)
    return site, gram.total / gram.count


@pytest.mark.parametrize("name", ["linear", "conv", "grouped", "depthwise"])
def test_drift_aims_at_the_float_output(name):
    """W* is the ridge regression of the float output on the quantized input around W, from numpy's least squares."""
    site, _ = drifted(SINGLES[name], "int3")
    layer, damp = site.layer, 0.01
    W = layer.weight.flatten(1)
    got = (
        aimed(layer, *moments(site, 2**62, drift=True), damp)[0].reshape(layer.groups, -1, W.shape[1]).double().numpy()
    )
    for group in range(layer.groups):
        X = torch.cat([layer.columns(x)[group] for x in site.inputs]).double().numpy()
        Y = torch.cat([layer.output_rows(y)[group] for y in site.targets]).double().numpy()
        w = W.reshape(got.shape)[group].double().numpy()
        ridge = np.sqrt(len(X) * damp * np.mean(np.sum(X**2, axis=0)) / len(X)) * np.eye(X.shape[1])
        missing = Y - layer.bias.reshape(layer.groups, -1)[group].double().numpy() - X @ w.T
        moved = np.linalg.lstsq(np.vstack([X, ridge]), np.vstack([missing, 0 * w.T]), rcond=None)[0]
        assert np.allclose(got[group], w + moved.T, atol=1e-4 * np.abs(w).max())


def test_drift_by_float_inputs_is_drift_by_float_outputs():
    """Where the layer's float inputs are known, C is the same without its outputs, which are not looked at; in numpy,
    too; and a second layer with these inputs looks at nothing."""
    generator = torch.Generator().manual_seed(4)
    layers = [QLayer(nn.Linear(37, outputs), make_plan("int4", "float")) for outputs in (53, 5)]
    z = [torch.randn(3, 29, 37, generator=generator) * 2 + 0.3 for _ in range(4)]
    x = [one + 0.2 * torch.randn(one.shape, generator=generator) for one in z]
    shared: dict = {}
    for layer in layers:
        with torch.no_grad():
            targets = Site("a", layer, x, [layer(one) for one in z])
            floats = Site("a", layer, [] if shared else x, [], z, moments=shared)
            (H, C), (other_H, other_C) = moments(targets, 0, drift=True), moments(floats, 0, drift=True)
        X, Z = (torch.cat(part).reshape(-1, 37).double().numpy() for part in (x, z))
        wanted = layer.weight.double().numpy() @ ((Z - X).T @ X) / len(X)
        assert np.allclose(C[0], wanted, atol=1e-4) and np.allclose(other_C[0], wanted, atol=1e-5)
        assert torch.equal(H, other_H) and H.shape == (1, 37, 37) and C.shape == other_C.shape


def test_without_drift_nothing_to_aim_at():
    """With float inputs W* is W."""
    site, _ = drifted(SINGLES["conv"], "float")
    W = site.layer.weight.flatten(1)
    assert all(
        torch.allclose(found, W, atol=1e-5) for found in aimed(site.layer, *moments(site, 2**62, drift=True), 0.01)
    )


@pytest.mark.parametrize("name", ["mlp", "policy", "cnn"])
def test_drift_lowers_the_output_error(name):
    """Where inputs are coarse, aiming at the float output ends nearer to the float network: in the mean of formats."""
    model, calib = MODELS[name]()
    ratios = []
    with torch.no_grad():
        target = model.module(calib.inputs)
        for acts in ("int2", "int3", "int4", "e2m1"):
            plain, aimed = (
                run(model, uniform("int4", acts, steps=(("gptq", {"drift": drift}),)), calib) for drift in (False, True)
            )
            errors = [float((done.module(calib.inputs) - target).square().mean()) for done in (plain, aimed)]
            ratios.append(errors[1] / errors[0])
    assert np.exp(np.mean(np.log(ratios))) < 0.95
