"""Cross-layer equalization against its definition."""

from __future__ import annotations

import pytest
import torch
from test_links import MODELS, graph

from quantkit.errors import InputError
from quantkit.links import find_links, ranges
from quantkit.methods import act_scales, equalize
from quantkit.methods.equalize import factors
from quantkit.model import Calib
from quantkit.qlayers import QLayer
from quantkit.recipe import make_plan, quantize, uniform


def wrapped(name):
    model, x = graph(name)
    for key, layer in list(model.layers().items()):
        model.replace(key, QLayer(layer, make_plan("int4", "int8")))
    return model, Calib(x)


@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_factor_makes_ranges_meet(alpha):
    """After one step r1^alpha equals r2^(1 - alpha), and a second step changes nothing."""
    r1, r2 = torch.tensor([3.0, 0.2, 7.0]), torch.tensor([0.5, 4.0, 7.0])
    f = factors(r1, r2, alpha)
    assert torch.allclose((r1 * f) ** alpha, (r2 / f) ** (1 - alpha))
    assert torch.allclose(factors(r1 * f, r2 / f, alpha), torch.ones(3))


def test_dead_channels_keep_their_scale():
    """A channel without weight on either side has factor 1."""
    assert factors(torch.tensor([0.0, 2.0, 1e-30]), torch.tensor([3.0, 0.0, 2.0])).tolist() == [1.0, 1.0, 1.0]


@torch.no_grad()
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", ["policy", "cnn", "image_policy", "resnet", "vit", "llama", "shuffled"])
def test_ranges_are_equal_afterwards(name, streams):
    """Once the sweeps converge, what a factor multiplies and divides has the same range; the function stays."""
    model, calib = wrapped(name)
    before = model.module(calib.inputs)
    report = equalize.apply(model, calib, tolerance=0.01, sweeps=200, streams=streams)
    assert report["largest_factor"] <= 1.01 and report["sweeps"] < 200
    links = [link for link in find_links(model) if link.kind == "layer"]
    links = [link for link in links if streams or len(link.producers) == 1]
    assert report["links"] == len(links) > 0
    for link in links:
        up, down = ranges(model, link)
        assert torch.allclose(up, down, rtol=0.03)
    after = model.module(calib.inputs)
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@torch.no_grad()
def test_the_largest_producer_counts():
    """In a residual stream, r1 is the largest of all rows of a channel, and r2 of all columns, by the definition."""
    model, calib = wrapped("resnet")
    layers = model.layers()
    names = ["stem", "blocks.0.conv2", "blocks.1.conv2"]
    rows = torch.stack([layers[n].weight.abs().flatten(1).amax(1).maximum(layers[n].bias.abs()) for n in names])
    last = layers["blocks.2.conv2"]  # its channels 1 to 4 meet those of the stream
    rows = torch.cat([rows, last.weight.abs().flatten(1).amax(1).maximum(last.bias.abs())[None, 1:5]])
    columns = torch.stack([layers[f"blocks.{i}.conv1"].weight.abs().amax(dim=(0, 2, 3)) for i in range(3)])
    columns = torch.cat([columns, layers["head"].weight.abs().amax(dim=0)[None, 1:5]])
    stem = layers["stem"].weight.clone()
    equalize.apply(model, calib, sweeps=1, streams=True)
    f = (columns.amax(dim=0) / rows.amax(dim=0)).sqrt()
    assert torch.allclose(layers["stem"].weight, stem * f[:, None, None, None])


def test_bias_option():
    """Without merge_bias the bias does not count, and the result differs."""
    results = []
    for merge in (True, False):
        model, calib = wrapped("policy")
        model.layers()["net.0"].bias.data[3] = 9.0
        equalize.apply(model, calib, merge_bias=merge)
        results.append(model.layers()["net.0"].weight.clone())
    assert not torch.equal(*results)


def test_per_tensor_weights_gain():
    """With one scale per tensor, equalization lowers the error of a network whose channels differ in size."""
    model, calib = MODELS["policy"]()
    with torch.no_grad():
        model.module.net[0].weight.data *= torch.logspace(-1.5, 0.5, 14)[:, None]
        model.module.net[0].bias.data *= torch.logspace(-1.5, 0.5, 14)
        model.module.net[2].weight.data /= torch.logspace(-1.5, 0.5, 14)
        reference = model.module(calib.inputs)
        errors = []
        for steps in ((), (("equalize", {}),)):
            done = quantize(model, uniform("int4", "float", "tensor", steps), calib)
            errors.append((done.module(calib.inputs) - reference).square().mean().item())
    assert errors[1] < 0.5 * errors[0]


def test_too_late():
    """After activations are calibrated or weights quantized, the step is refused by name."""
    model, calib = wrapped("policy")
    with torch.no_grad():
        act_scales.apply(model, calib)
    with pytest.raises(InputError, match="'equalize': layer 'net"):
        equalize.apply(model, calib)


def test_no_links_no_change():
    """A network without links is left alone."""
    model, calib = wrapped("tanh_policy")
    before = model.layers()["net.0"].weight.clone()
    assert equalize.apply(model, calib)["links"] == 0
    assert torch.equal(model.layers()["net.0"].weight, before)
