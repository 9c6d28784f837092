"""The smallest networks that have every feature the methods must handle; sizes are unequal on purpose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit.capture import captured
from quantkit.methods import act_scales, rtn
from quantkit.model import Calib, Model
from quantkit.policy import Head, InputStage, Policy
from quantkit.qlayers import QLayer
from quantkit.recipe import make_plan


def generator(seed: int) -> torch.Generator:
    """A generator of the seed."""
    return torch.Generator().manual_seed(seed)


def _initialize(module: nn.Module, seed: int) -> None:
    g = generator(seed)
    for parameter in module.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=g) / fan**0.5
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):  # rows and columns of unequal size
            layer.weight.data *= torch.exp(0.7 * torch.randn(layer.weight.shape[1], generator=g)).reshape(
                1, -1, *(1 for _ in layer.weight.shape[2:])
            )


def _wrap(module: nn.Module, inputs: Tensor, seed: int, kind: str) -> tuple[Model, Calib]:
    _initialize(module, seed)
    return Model(module.eval(), inputs[:1].clone(), meta={"kind": kind}), Calib(inputs, batch=53)


def correlated(samples: int, features: int, seed: int) -> Tensor:
    """Correlated inputs with features of unequal size."""
    g = generator(seed)
    mix = torch.randn(features, features, generator=g)
    return torch.randn(samples, features, generator=g) @ mix * torch.exp(torch.randn(features, generator=g))


class TinyMLP(nn.Module):
    """Functional activations, defined out of the order of execution, a tanh between the last two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(9, 3)
        self.first = nn.Linear(6, 12)
        self.middle = nn.Linear(12, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(F.relu(self.first(x)))))


class TinyCNN(nn.Module):
    """A plain, a depthwise and a grouped convolution, pooling, and a linear layer on the flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 6, (1, 2), groups=2)
        self.head = nn.Linear(6 * 4 * 3, 5)
        self.pool = nn.MaxPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv(x)))
        x = F.leaky_relu(self.depthwise(x), 0.1)
        return self.head(torch.flatten(F.relu(self.grouped(x)), 1))


def mlp() -> tuple[Model, Calib]:
    """A module that is no policy."""
    return _wrap(TinyMLP(), correlated(211, 6, seed=31), 41, "module")


def cnn() -> tuple[Model, Calib]:
    """A convolutional network on 7 x 7 images."""
    g = generator(32)
    images = F.avg_pool2d(torch.randn(67, 3, 9, 9, generator=g), 3, 1) * torch.tensor([0.3, 1.1, 4.0])[:, None, None]
    return _wrap(TinyCNN(), images, 42, "module")


def policy(activation: type[nn.Module] = nn.ReLU) -> tuple[Model, Calib]:
    """A policy chain with a normalizing and clipping input stage."""
    inputs = correlated(197, 7, seed=33) * 3 + 0.8
    stage = InputStage(inputs.mean(dim=0).numpy(), inputs.std(dim=0).numpy(), -1.7, 1.9)
    net = nn.Sequential(nn.Linear(7, 14), activation(), nn.Linear(14, 10), activation(), nn.Linear(10, 3))
    made = Policy(stage, net, Head("box", low=(-1.0,) * 3, high=(1.0,) * 3), (7,))
    return _wrap(made, inputs, 43, "policy")


def tanh_policy() -> tuple[Model, Calib]:
    """A policy whose activations are not homogeneous."""
    return policy(nn.Tanh)


def image_policy() -> tuple[Model, Calib]:
    """A policy on small images scaled by the input stage."""
    images = torch.randint(0, 256, (59, 2, 6, 6), generator=generator(34)).float()
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 2))
    made = Policy(InputStage(std=255.0), net, Head("discrete", nvec=(2,)), (2, 6, 6))
    return _wrap(made, images, 44, "policy")


def single(layer: nn.Module, seed: int = 45) -> tuple[Model, Calib]:
    """One layer alone, with non-negative correlated inputs."""
    g = generator(seed)
    if isinstance(layer, nn.Linear):
        inputs = F.relu(correlated(307, layer.in_features, seed))
    else:
        images = torch.randn(23, layer.in_channels, 9, 9, generator=g)
        inputs = F.relu(F.avg_pool2d(images, 3, 1) * torch.exp(torch.randn(layer.in_channels, 1, 1, generator=g)))
    return _wrap(nn.Sequential(layer), inputs, seed, "module")


MODELS = {"mlp": mlp, "cnn": cnn, "policy": policy, "tanh_policy": tanh_policy, "image_policy": image_policy}


class TinyAttention(nn.Module):
    """One block of a transformer on a sequence, with the mean over positions behind it."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(dim=1))


def attention(width: int = 16, length: int = 5, samples: int = 61) -> tuple[Model, Calib]:
    """A transformer block on short sequences."""
    inputs = correlated(samples * length, width, seed=35).reshape(samples, length, width)
    return _wrap(TinyAttention(width), inputs, 46, "module")


class TinyStream(nn.Module):
    """A residual stream that two branches read through normalizations, an outlier in one of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(7, 12), nn.Linear(12, 3)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(12), nn.RMSNorm(12), nn.LayerNorm(12, bias=False)
        self.up, self.down = nn.Linear(12, 18), nn.Linear(18, 12, bias=False)
        self.gate, self.mix, self.out = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.relu(self.up(self.norm1(x))))
        y = self.norm2(x)
        x = x + self.out(F.silu(self.gate(y)) * self.mix(y))
        return self.head(self.norm3(x))


def stream() -> tuple[Model, Calib]:
    """A captured network with a residual stream of 12 channels."""
    model, calib = _wrap(TinyStream(), correlated(83, 7, seed=38), 47, "module")
    model.module.embed.weight.data[5] *= 20
    return captured(model), calib


SINGLES = {
    "linear": lambda: single(nn.Linear(13, 7)),
    "row": lambda: single(nn.Linear(11, 1)),
    "conv": lambda: single(nn.Conv2d(3, 5, 3, padding=1)),
    "grouped": lambda: single(nn.Conv2d(6, 9, (2, 3), groups=3, stride=2)),
    "depthwise": lambda: single(nn.Conv2d(5, 10, 3, groups=5, dilation=2)),
}


def nearest_quantized(name, weights="int3", acts="int4"):
    """Float model, the same quantized to nearest, calibration."""
    model, calib = MODELS[name]()
    floats = model.copy()
    for key, layer in list(model.layers().items()):
        model.replace(key, QLayer(layer, make_plan(weights, acts)))
    with torch.no_grad():
        act_scales.apply(model, calib)
        rtn.apply(model, calib)
    return floats, model, calib
