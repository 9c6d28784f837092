"""Links: found where rescaling preserves the function, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import MODELS, correlated
from torch import nn

from quantkit.links import Link, column_range, find_links, in_channels, scale_columns, scale_rows, scale_stage
from quantkit.model import Model
from quantkit.policy import Head, InputStage, Policy

EXPECTED = {
    "mlp": [Link("first", ("middle",), "layer")],
    "cnn": [
        Link("conv", ("depthwise",), "layer"),
        Link("depthwise", ("grouped",), "layer"),
        Link("grouped", ("head",), "layer"),
    ],
    "policy": [
        Link("", ("net.0",), "input"),
        Link("net.0", ("net.2",), "layer"),
        Link("net.2", ("net.4",), "layer"),
    ],
    "tanh_policy": [Link("", ("net.0",), "input")],
    "image_policy": [
        Link("", ("net.0",), "input"),
        Link("net.0", ("net.3",), "layer"),
        Link("net.3", ("net.5",), "layer"),
    ],
}


@pytest.mark.parametrize("name", MODELS)
def test_expected_links(name):
    """The tiny models have exactly the links one sees in their code."""
    assert find_links(MODELS[name]()[0]) == EXPECTED[name]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_scaling_a_link_preserves_the_function(name):
    """Multiplying a producer's channels and dividing its consumers' columns changes no output."""
    model, calib = MODELS[name]()
    layers = model.layers()
    for link in find_links(model):
        before = model.module(calib.inputs)
        first = layers[link.consumers[0]]
        channels = in_channels(first) if link.kind == "input" else layers[link.producer].weight.shape[0]
        f = torch.exp(torch.randn(channels, generator=torch.Generator().manual_seed(3)))
        ranges = [column_range(layers[n], channels) for n in link.consumers]
        if link.kind == "input":
            scale_stage(model.module, f)
        else:
            scale_rows(layers[link.producer], f)
        for n, old in zip(link.consumers, ranges, strict=True):
            scale_columns(layers[n], 1 / f)
            assert torch.allclose(column_range(layers[n], channels), old / f)
        assert torch.allclose(model.module(calib.inputs), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


class Branches(nn.Module):
    """One producer with two consumers, and one whose output is also used bare."""

    def __init__(self, bare: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.bare = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3), bare

    def forward(self, x):
        h = F.relu(self.a(x))
        y = self.b(h) + self.c(h)
        return y + h[:, :3] if self.bare else y


def test_branches():
    """Two consumers share one link; a use that is no layer undoes it."""
    x = torch.zeros(1, 4)
    assert find_links(Model(Branches(False), x)) == [Link("a", ("b", "c"), "layer")]
    assert find_links(Model(Branches(True), x)) == []


class Twice(nn.Module):
    """The same layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(F.relu(self.a(F.relu(self.a(x)))))


class Untraceable(nn.Module):
    """Control flow on data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.b(x)


def test_no_links():
    """Shared layers, tied weights, data-dependent control flow and a flattening that mixes channels give none."""
    x = torch.zeros(1, 4)
    assert find_links(Model(Twice(), x)) == []
    assert find_links(Model(Untraceable(), x)) == []
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert find_links(Model(tied, x)) == []
    unflattened = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Linear(5, 3))
    assert find_links(Model(unflattened, torch.zeros(1, 2, 5, 5))) == []


def test_stage_keeps_its_clip():
    """Scaling the input stage scales its clip bounds, so that clipped inputs stay clipped."""
    stage = InputStage(torch.zeros(3).numpy(), torch.ones(3).numpy(), -0.5, 0.8)
    net = nn.Sequential(nn.Linear(3, 2))
    policy = Policy(stage, net, Head("discrete", nvec=(2,)), (3,))
    x = correlated(40, 3, seed=6)
    before = policy.stage(x)
    f = torch.tensor([0.3, 1.7, 5.0])
    scale_stage(policy, f)
    assert torch.allclose(policy.stage(x), before * f, rtol=1e-6)
