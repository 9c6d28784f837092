"""Small policies without a checkpoint, for the tests of everything above the loaders."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from quantkit.model import Calib, EnvSpec, Model
from quantkit.policy import Head, InputStage, Policy

CARTPOLE = EnvSpec("CartPole-v1")


def cartpole(seed: int = 0, widths: tuple[int, ...] = (8, 6), act: type[nn.Module] = nn.Tanh) -> Model:
    """An MLP for CartPole-v1 with random weights: short episodes, two actions."""
    return mlp((4, *widths, 2), act=act, seed=seed, env=CARTPOLE)


def mlp(
    sizes: tuple[int, ...],
    *,
    act: type[nn.Module] = nn.ReLU,
    seed: int = 0,
    env: EnvSpec | None = None,
    stage: InputStage | None = None,
    head: Head | None = None,
) -> Model:
    """A chain of linear layers net.fc1, net.act1, net.fc2, ..., net.head."""
    torch.manual_seed(seed)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (a, b) in enumerate(itertools.pairwise(sizes[:-1]), 1):
        modules[f"fc{index}"] = _noisy(nn.Linear(a, b))
        modules[f"act{index}"] = act()
    modules["head"] = _noisy(nn.Linear(sizes[-2], sizes[-1]))
    return _model(modules, stage, head or Head("discrete", nvec=(sizes[-1],)), (sizes[0],), env)


def conv(seed: int = 0, groups: int = 1, **options: Any) -> Model:
    """Two convolutions and two linear layers on (4, 9, 9) images of bytes."""
    torch.manual_seed(seed)
    modules: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=_noisy(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)),
        relu1=nn.ReLU(),
        conv2=_noisy(nn.Conv2d(6, 8, (3, 2), groups=groups, **options)),
        relu2=nn.ReLU(),
        flat=nn.Flatten(),
    )
    with torch.no_grad():
        width = nn.Sequential(modules)(torch.zeros(1, 4, 9, 9)).shape[1]
    modules |= {"fc": _noisy(nn.Linear(width, 16)), "tanh": nn.Tanh(), "head": _noisy(nn.Linear(16, 3))}
    return _model(modules, InputStage(std=255.0), Head("discrete", nvec=(3,)), (4, 9, 9), None)


def calib(model: Model, n: int = 64, seed: int = 1) -> Calib:
    """Random observations of the model's shape; bytes for images."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, *model.example.shape[1:])
    if len(shape) == 4:
        return Calib(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))
    return Calib(torch.randn(shape, generator=generator) * 1.5)


def _noisy(layer: Any) -> Any:
    """Biases that are not tiny, and some weights that are exactly zero."""
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < 0.1] = 0
        if layer.bias is not None:
            layer.bias += 0.3 * torch.randn_like(layer.bias)
    return layer


def _model(
    modules: OrderedDict[str, nn.Module],
    stage: InputStage | None,
    head: Head,
    shape: tuple[int, ...],
    env: EnvSpec | None,
) -> Model:
    policy = Policy(stage or InputStage(), nn.Sequential(modules), head, shape).eval()
    example = torch.zeros(2, *shape, dtype=torch.uint8 if len(shape) == 3 else torch.float32)
    meta = {"kind": "policy", "algo": "ppo", "source": "small.zip", "sha256": "0" * 64}
    return Model(policy, example, env, meta)
