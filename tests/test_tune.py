"""Tuning against its docstring."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from strategies import WEIGHT_FORMATS
from tiny_models import MODELS, nearest_quantized

from hwmodel import formats
from hwmodel.formats import levels
from quantkit.errors import InputError
from quantkit.methods import rtn, tune
from quantkit.model import Calib, Model
from quantkit.qtensor import dequantize, values_of
from quantkit.recipe import quantize, uniform
from quantkit.rounding import round_to


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_starts_at_its_code(weights):
    """A latent weight rounds to the code it starts from, and is the float weight where that rounds there anyway."""
    fmt = formats.parse(weights)
    grid = torch.tensor(levels(fmt))
    values = grid[torch.arange(300) % len(grid)]
    u = torch.linspace(-1.3, 1.1, 300) * grid.abs().max()
    near = tune.nearby(u, values, fmt)
    assert torch.equal(round_to(near, fmt), values)
    assert ((near - u).abs() <= (values - u).abs()).all()
    assert torch.equal(tune.nearby(u, round_to(u, fmt), fmt), u)


@pytest.mark.parametrize("name", MODELS)
def test_untrained_student_is_the_network(name):
    """Before the first step the student gives the quantized network's outputs, ties of floats aside."""
    _, model, calib = nearest_quantized(name, "int4", "int8")
    expected = model.module(calib.inputs)
    student, trainees = tune._student(model)
    assert (student.module(calib.inputs) - expected).abs().median() <= 1e-5 * expected.abs().max()
    for layer_name, layer in model.qlayers().items():
        before = dequantize(layer.q)
        trainees[layer_name].store(layer)
        assert torch.equal(before, dequantize(layer.q))


def test_gradients():
    """dL/dV is s dL/dw~, dL/dlog s the sum over the row of dL/dw~ w~."""
    _, model, _ = nearest_quantized("mlp", "int3", "float")
    layer = next(iter(model.qlayers().values()))
    trainee = tune.Trainee(layer)
    w = trainee.matrix()
    weight = w.detach().requires_grad_(True)
    factor = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    ((w.sin() * factor).sum()).backward()
    ((weight.sin() * factor).sum()).backward()
    torch.testing.assert_close(trainee.V.grad, weight.grad * layer.q.scale)
    torch.testing.assert_close(trainee.log_s.grad, (weight.grad * weight.detach()).sum(dim=1, keepdim=True))


def language() -> tuple[Model, Calib]:
    """A random Llama and random text."""
    tiny_lm = pytest.importorskip("tiny_lm")
    model = Model(tiny_lm.llama(), tiny_lm.tokens(2, 8), None, {"kind": "module"})
    return model, Calib(tiny_lm.tokens(32, 16), batch=16)


def test_language_model_loses_less_of_its_distribution():
    """The KL of the next token falls on text held out, as an independent sum has it, and no bias appears."""
    model, calib = language()
    done = [
        quantize(model, uniform("int3", "float", steps=steps), calib)
        for steps in ((("rtn", {}),), (("rtn", {}), ("tune", {"steps": 40, "lr": 0.02})))
    ]
    ids = calib.inputs[calib.held()]
    with torch.no_grad():
        p = model.module(ids).logits.double().softmax(-1)
        kl = [float((p * (p.log() - m.module(ids).double().log_softmax(-1))).sum(-1).mean()) for m in done]
    report = done[1].meta["steps"][-1]["diagnostics"]
    assert report["loss_before"] == pytest.approx(kl[0], rel=1e-3)
    assert report["loss_after"] == pytest.approx(kl[1], rel=1e-3)
    assert kl[1] < 0.9 * kl[0] and report["changed"] > 0
    assert not any(layer.bias.any() for layer in done[1].qlayers().values())


def test_what_was_float_stays():
    """Only codes and scales change: every other tensor is bit for bit what it was."""
    _, model, calib = nearest_quantized("cnn", "int3", "int8")
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    codes = {n: values_of(layer.q) for n, layer in model.qlayers().items()}
    report = tune.apply(model, calib, steps=30, lr=0.02)
    assert report["loss_after"] < report["loss_before"]
    after = model.module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    moved = sum(int((codes[n] != values_of(layer.q)).sum()) for n, layer in model.qlayers().items())
    assert report["changed"] == pytest.approx(moved / sum(c.numel() for c in codes.values()))


def test_refusals():
    """A weight that is still float, and options out of range, are refused by name."""
    model, calib = tiny_models.MODELS["mlp"]()
    with pytest.raises(InputError, match="steps=0"):
        quantize(model, uniform("int4", "float", steps=(("rtn", {}), ("tune", {"steps": 0}))), calib)
    model = quantize(model, uniform("int4", "float", steps=(("rtn", {}),)), calib)
    name, layer = next(iter(model.qlayers().items()))
    layer.set_weight(None)
    with pytest.raises(InputError, match=f"layer {name!r} has no quantized weight yet"):
        tune.apply(model, calib, steps=1)
    rtn.apply(model, calib)
    tune.apply(model, calib, steps=1)
