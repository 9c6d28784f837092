"""The chain of layers that an actor is: its tensors asked by name, checked, and put together.

Every library has its own names; all come down to features (nothing, or the three convolutions and one Linear layer of
Mnih et al., Nature 2015), a trunk of Linear layers with an activation between them, and one last Linear.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.errors import InputError
from quantkit.policy import Recurrent, activation

_NATURE_CNN = ((8, 4), (4, 2), (3, 1))  # kernel and stride of its three convolutions


@dataclass(frozen=True)
class Part:
    """One layer with its name in the checkpoint."""

    name: str
    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


class Parts:
    """A state dict asked by name; each answer is checked to be finite float32."""

    def __init__(self, tensors: dict[str, Tensor], where: str) -> None:
        self.tensors = tensors
        self.where = where

    def has(self, prefix: str) -> bool:
        return any(name.startswith(f"{prefix}.") for name in self.tensors)

    def tensor(self, name: str, ndim: int) -> Tensor:
        value = self.tensors.get(name)
        if value is None:
            raise InputError(f"{self.where}: tensor {name!r} is missing")
        if value.ndim != ndim or 0 in value.shape:
            shape = tuple(value.shape)
            raise InputError(f"{self.where}: tensor {name!r} has shape {shape}; expected {ndim} dimensions, none empty")
        value = value.detach().to(torch.float32).contiguous().clone()
        bad = (~torch.isfinite(value)).nonzero()
        if len(bad):
            at = bad[0].tolist()
            number = value[tuple(at)].item()
            raise InputError(f"{self.where}: tensor {name!r} holds {number} at {at}; all weights must be finite")
        return value

    def get(self, name: str, ndim: int, bias: bool = True) -> Part:
        weight = self.tensor(f"{name}.weight", ndim)
        part = Part(name, weight, self.tensor(f"{name}.bias", 1) if bias else None)
        if part.bias is not None and len(part.bias) != len(weight):
            shape = tuple(part.bias.shape)
            raise InputError(f"{self.where}: {name}.bias {shape} does not fit {name}.weight {part.shape}")
        return part

    def stack(self, prefix: str, at_least: int, bias: bool = True) -> list[Part]:
        """The Linear layers prefix.0, prefix.2, ...; anything between them is refused."""
        found = {m[1] for name in self.tensors if (m := re.fullmatch(rf"{re.escape(prefix)}\.(.+)\.\w+", name))}
        odd = sorted(i for i in found if not i.isdecimal() or int(i) % 2)
        if odd:
            raise InputError(
                f"{self.where}: {prefix}.{odd[0]} is not a Linear layer before an activation; only those are read"
            )
        count = max([at_least, *(int(i) // 2 + 1 for i in found)])
        if count > 1000:
            raise InputError(f"{self.where}: {prefix} counts {count} layers; at most 1000 layers are read")
        return [self.get(f"{prefix}.{2 * i}", 2, bias) for i in range(count)]

    def expect(self, trunk: list[Part], depths: tuple[int, ...], prefix: str) -> None:
        """A trunk as deep as net_arch asks: a missing last layer would go unnoticed where all widths are equal."""
        if depths and len(trunk) not in depths:
            asked = " or ".join(map(str, depths))
            raise InputError(
                f"{self.where}: {prefix} has {len(trunk)} hidden layers; net_arch asks for {asked}"
                + (f"; tensor '{prefix}.{2 * len(trunk)}.weight' is missing" if len(trunk) < min(depths) else "")
            )


def fold(net: nn.Sequential, mean: np.ndarray, std: np.ndarray) -> None:
    """Make the first layer take raw inputs where it took `(x - mean) / std`: W / std, b - W (mean / std). In place."""
    owner: nn.Module = net
    name, first = next((n, m) for n, m in net.named_children() if not isinstance(m, nn.Flatten))
    if isinstance(first, Recurrent):
        owner, name = first.loop.cells[0], "ih"
        first = owner.get_submodule(name)
    if not isinstance(first, nn.Linear):
        kind = type(first).__name__
        raise InputError(f"normalize='fold' needs a linear first layer, not {kind}; use normalize='stage'")
    weight = first.weight.detach().double().numpy() / std.reshape(1, -1)
    bias = 0.0 if first.bias is None else first.bias.detach().double().numpy()
    folded = Part(name, torch.from_numpy(weight), torch.from_numpy(bias - weight @ mean.reshape(-1)))
    setattr(owner, name, make_linear(folded))


def check_chain(convs: list[Part], dense: list[Part], obs_shape: tuple[int, ...], outputs: int, where: str) -> None:
    """Each layer takes what the one before gives; InputError names both with their shapes."""
    before, size = f"observations of shape {obs_shape}", obs_shape
    if convs and len(obs_shape) != 3:
        raise InputError(f"{where}: NatureCNN does not take {before}; expected (channels, height, width)")
    for part, (kernel, stride) in zip(convs, _NATURE_CNN, strict=False):
        if part.shape[1] != size[0] or part.shape[2:] != (kernel, kernel) or min(size[1:]) < kernel:
            raise InputError(f"{where}: {part.name}.weight {part.shape} (kernel {kernel}) does not take {before}")
        size = (part.shape[0], *((n - kernel) // stride + 1 for n in size[1:]))
        before = f"what {part.name}.weight {part.shape} gives: {size}"
    width = int(np.prod(size))
    for part in dense:
        if part.shape[1] != width:
            raise InputError(f"{where}: {part.name}.weight {part.shape} takes {part.shape[1]} inputs, not {before}")
        width = part.shape[0]
        before = f"the {width} outputs of {part.name}.weight {part.shape}"
    if width != outputs:
        last = f"{dense[-1].name}.weight {dense[-1].shape}"
        raise InputError(f"{where}: {last} gives {width} outputs; the action space needs {outputs}")


def make_chain(
    convs: list[Part],
    dense: list[Part],
    trunk: list[Part],
    last: Part,
    act: str,
    *,
    flatten: bool,
    limit: float | None,
) -> nn.Sequential:
    """The modules, named conv1, relu1, ..., flatten, fc1, tanh1, ..., head, clip_mean."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    acts = 0

    def activate(name: str) -> None:
        nonlocal acts
        acts += 1
        modules[f"{name}{acts}"] = activation(name)

    for i, (part, (_, stride)) in enumerate(zip(convs, _NATURE_CNN, strict=False)):
        modules[f"conv{i + 1}"] = _conv(part, stride)
        activate("relu")
    if flatten:
        modules["flatten"] = nn.Flatten()
    for i, part in enumerate(dense + trunk):
        modules[f"fc{i + 1}"] = make_linear(part)
        activate("relu" if i < len(dense) else act)
    modules["head"] = make_linear(last)
    if limit is not None:
        modules["clip_mean"] = nn.Hardtanh(-limit, limit)
    return nn.Sequential(modules)


def make_linear(part: Part) -> nn.Linear:
    """The layer that a part is, in float32."""
    out, width = part.shape
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, width, out, bias=part.bias is not None)  # type: ignore[no-untyped-call]
    return _fill(layer, part)


def _conv(part: Part, stride: int) -> nn.Conv2d:
    out, channels, *kernel = part.shape
    layer: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, channels, out, kernel, stride=stride)  # type: ignore[no-untyped-call]
    return _fill(layer, part)


_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


def _fill(layer: _Layer, part: Part) -> _Layer:
    """`layer` with a part's values in float32; it was built uninitialized, so no random numbers were drawn."""
    layer.weight = nn.Parameter(part.weight.to(torch.float32))
    if part.bias is not None:
        layer.bias = nn.Parameter(part.bias.to(torch.float32))
    return layer
