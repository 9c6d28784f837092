"""SmoothQuant against its definition."""

from __future__ import annotations

import pytest
import torch
from test_links import GRAPHS, MODELS, graph

from quantkit.errors import InputError
from quantkit.methods import rtn, smoothquant
from quantkit.methods.smoothquant import factors
from quantkit.model import Calib
from quantkit.qlayers import QLayer
from quantkit.recipe import make_plan, quantize, uniform
from quantkit.rounding import is_pow2


def wrapped(name, acts="int8"):
    model, x = graph(name)
    for key, layer in list(model.layers().items()):
        model.replace(key, QLayer(layer, make_plan("int4", acts)))
    return model, Calib(x)


def test_equation_4():
    """f is 1 / s of the paper: s_j = max|x_j|^alpha / max|W_:j|^(1 - alpha)."""
    x, w, alpha = torch.tensor([8.0, 0.3, 2.0]), torch.tensor([0.5, 0.7, 2.5]), 0.6
    assert torch.allclose(1 / factors(w, x, alpha), x**alpha / w ** (1 - alpha))
    assert factors(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])).tolist() == [1.0, 1.0]


def test_half_makes_both_sides_equal():
    """With alpha = 1/2 inputs and weights of a channel get the same largest magnitude."""
    x, w = torch.tensor([8.0, 0.3]), torch.tensor([0.5, 0.7])
    f = factors(w, x)
    assert torch.allclose(x * f, w / f)


COUNTS = {
    "policy": (3, 0, 0),
    "tanh_policy": (1, 2, 0),
    "mlp": (1, 2, 0),
    "cnn": (3, 1, 0),
    "image_policy": (3, 0, 0),
    "resnet": (7, 1, 0),
    "vit": (3, 1, 0),
    "llama": (7, 0, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_where_factors_go(name):
    """Factors are absorbed where a link exists, explicit elsewhere, and left out when not allowed."""
    model, calib = wrapped(name)
    absorbed, explicit, left = COUNTS[name]
    report = smoothquant.apply(model, calib)
    assert report == {"absorbed": absorbed, "explicit": explicit, "left_alone": left}
    assert sum(layer.in_scale is not None for layer in model.qlayers().values()) == explicit
    model, calib = wrapped(name)
    assert smoothquant.apply(model, calib, explicit=False) == {
        "absorbed": absorbed,
        "explicit": 0,
        "left_alone": explicit + left,
    }
    assert all(layer.in_scale is None for layer in model.qlayers().values())


@pytest.mark.parametrize("name", COUNTS)
def test_inputs_of_the_network(name):
    """Without other multipliers, inputs=True still allows one where a linear layer reads what the network is given."""
    model, calib = wrapped(name)
    report = smoothquant.apply(model, calib, explicit=False, inputs=True)
    found = [n for n, layer in model.qlayers().items() if layer.in_scale is not None]
    assert report["explicit"] == len(found)
    assert found == (list(model.qlayers())[:1] if name == "mlp" else [])


@torch.no_grad()
@pytest.mark.parametrize("name", {**MODELS, **GRAPHS})
def test_the_function_stays(name):
    """Smoothing changes no output of a float network."""
    model, calib = wrapped(name)
    before = model.module(calib.inputs)
    smoothquant.apply(model, calib)
    after = model.module(calib.inputs)
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@torch.no_grad()
def test_absorbed_in_a_normalization():
    """In front of a transformer's layers, the factors of equation 4 end up in weight and bias of the normalization."""
    model, calib = wrapped("vit")
    norm, layer, seen = model.module.norm2, model.layers()["ff1"], []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().amax(dim=(0, 1))))
    model.module(calib.inputs)
    w = layer.weight.abs().amax(dim=0)
    weight, bias = norm.weight.clone(), norm.bias.clone()
    smoothquant.apply(model, calib, alpha=0.7)
    f = w**0.3 / seen[0] ** 0.7
    assert torch.allclose(norm.weight, weight * f) and torch.allclose(norm.bias, bias * f)


def test_powers_of_two():
    """pow2 makes every explicit factor a power of two."""
    model, calib = wrapped("tanh_policy")
    smoothquant.apply(model, calib, pow2=True)
    factors_used = [v for layer in model.qlayers().values() if layer.in_scale is not None for v in layer.in_scale]
    assert factors_used and all(is_pow2(float(v)) for v in factors_used)


def test_float_inputs_are_left_alone():
    """Layers whose input stays in float are not smoothed."""
    model, calib = wrapped("policy", acts="float")
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    smoothquant.apply(model, calib)
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


def test_spread_inputs_gain():
    """With inputs of very different size per channel, 4-bit activations lose less after smoothing."""
    model, calib = MODELS["policy"]()
    stage, first = model.module.stage, model.module.net[0]
    spread = torch.logspace(-2, 1, 7)
    stage.std, stage.low, stage.high = stage.std / spread, stage.low * spread, stage.high * spread
    first.weight.data = first.weight.data / spread
    with torch.no_grad():
        reference = model.module(calib.inputs)
        errors = []
        for steps in ((), (("smoothquant", {}),)):
            done = quantize(model, uniform("int8", "int4", "row", steps), calib)
            errors.append((done.module(calib.inputs) - reference).square().mean().item())
    assert errors[1] < 0.5 * errors[0]


def test_too_late():
    """After weights are quantized, the step is refused by name."""
    model, calib = wrapped("policy")
    with torch.no_grad():
        rtn.apply(model, calib)
    with pytest.raises(InputError, match="'smoothquant': layer 'net"):
        smoothquant.apply(model, calib)
