"""Bias correction against its definition."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS, nearest_quantized

from quantkit.methods import bias_correction
from quantkit.methods.bias_correction import mean_output
from quantkit.qlayers import QLayer
from quantkit.recipe import make_plan


def outputs(module, layer, calib):
    """Mean output of one layer per channel, by a hook of our own."""
    kept = []
    handle = layer.register_forward_hook(lambda layer, args, y: kept.append(y))
    with torch.no_grad():
        module(calib.inputs)
    handle.remove()
    y = kept[0].double()
    return y.mean(dim=(0, 2, 3)) if y.dim() == 4 else y.mean(dim=0)


@pytest.mark.parametrize("name", MODELS)
def test_every_mean_is_restored(name):
    """Sequentially corrected, every layer's mean output equals the float network's."""
    floats, model, calib = nearest_quantized(name)
    with torch.no_grad():
        assert bias_correction.apply(model, calib)["largest_shift"] > 0
    for key, layer in floats.layers().items():
        expected = outputs(floats.module, layer, calib)
        corrected = outputs(model.module, model.layers()[key], calib)
        assert torch.allclose(corrected, expected, atol=1e-5 * float(expected.abs().max() + 1))


@pytest.mark.parametrize("name", ["policy", "cnn"])
def test_parallel_repairs_the_own_error(name):
    """Not sequential: the shift of a layer is the mean error it makes itself on the float network's input."""
    floats, model, calib = nearest_quantized(name)
    before = {key: layer.bias.clone() for key, layer in model.qlayers().items()}
    with torch.no_grad():
        bias_correction.apply(model, calib, sequential=False)
        for key, layer in floats.layers().items():
            kept = []
            handle = layer.register_forward_pre_hook(lambda layer, args, kept=kept: kept.append(args[0]))
            floats.module(calib.inputs)
            handle.remove()
            q = model.qlayers()[key]
            shift = q.bias - before[key]
            own = mean_output([layer(kept[0])], q.spatial) - mean_output([q(kept[0])], q.spatial) + shift
            assert torch.allclose(shift.double(), own, atol=2e-5 * float(own.abs().max() + 1))


def test_the_options_differ():
    """Sequential and parallel correction give different biases behind the first layer."""
    results = []
    for sequential in (True, False):
        _, model, calib = nearest_quantized("policy")
        with torch.no_grad():
            bias_correction.apply(model, calib, sequential=sequential)
        results.append([layer.bias.clone() for layer in model.qlayers().values()])
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert not torch.allclose(results[0][2], results[1][2], atol=1e-4)


def test_float_layers_stay():
    """Where nothing is quantized nothing is corrected."""
    model, calib = MODELS["mlp"]()
    for key, layer in list(model.layers().items()):
        model.replace(key, QLayer(layer, make_plan("int4", "int8")))
    before = [layer.bias.clone() for layer in model.qlayers().values()]
    assert bias_correction.apply(model, calib) == {"largest_shift": 0.0}
    assert all(torch.equal(a, b.bias) for a, b in zip(before, model.qlayers().values(), strict=True))
