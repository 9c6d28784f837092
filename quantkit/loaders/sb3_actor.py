"""The actor inside an SB3 state dict: which tensors it is made of, checked, and put together as a chain.

Every algorithm has its own names; all come down to features (nothing, or NatureCNN), a trunk of
Linear layers with an activation between them, and one last Linear.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.errors import InputError
from quantkit.policy import activation

ALGOS = ("ppo", "a2c", "trpo", "dqn", "qrdqn", "ars", "sac", "td3", "ddpg", "tqc")
_ON_POLICY = ("ppo", "a2c", "trpo")
_ACTIVATIONS = {
    "ReLU": "relu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "ELU": "elu",
    "LeakyReLU": "leaky_relu",
    "GELU": "gelu",
    "SiLU": "silu",
}
_NATURE_CNN = ((8, 4), (4, 2), (3, 1))  # kernel and stride of its three convolutions


@dataclass(frozen=True)
class _Part:
    """One layer with its name in the checkpoint."""

    name: str
    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


@dataclass(frozen=True)
class Actor:
    """net: the chain from observation to outputs. squash: whether tanh follows. activation: its name in the trunk."""

    net: nn.Sequential
    squash: bool
    activation: str


def build_actor(
    algo: str,
    tensors: dict[str, Tensor],
    kwargs: dict[str, Any],
    obs_shape: tuple[int, ...],
    outputs: int,
    box: bool,
    where: str,
) -> Actor:
    """The actor of `algo` from a policy's state dict and its readable policy_kwargs.

    outputs: how many numbers the action space needs; box: whether its actions are continuous.
    Raises InputError naming the tensor that is missing, not finite or does not fit the layer before it.
    """
    parts = _Parts(tensors, where)
    act = _activation_name(kwargs, "tanh" if algo in _ON_POLICY else "relu", where)
    features = next((p for p in _feature_prefixes(algo) if parts.has(f"{p}.cnn")), None)
    convs = [parts.get(f"{features}.cnn.{2 * i}", 4) for i in range(3)] if features else []
    dense = [parts.get(f"{features}.linear.0", 2)] if features else []
    linear_ars = algo == "ars" and kwargs.get("linear", False)
    bias = bool(kwargs.get("with_bias", not linear_ars)) if algo == "ars" else True
    depth = _depth(kwargs.get("net_arch"), linear_ars, features is not None)
    limit: float | None = None
    match algo:
        case "ppo" | "a2c" | "trpo":
            trunk = parts.stack("mlp_extractor.shared_net", 0) + parts.stack("mlp_extractor.policy_net", 0)
            parts.expect(trunk, depth, "mlp_extractor.policy_net")
            last, squash = parts.get("action_net", 2), bool(kwargs.get("squash_output", False))
        case "sac" | "tqc":
            trunk = parts.stack("actor.latent_pi", 0)
            parts.expect(trunk, depth, "actor.latent_pi")
            clipped = parts.has("actor.mu.0")  # gSDE with clip_mean: Sequential(Linear, Hardtanh)
            last, squash = parts.get("actor.mu.0" if clipped else "actor.mu", 2), True
            limit = _positive(kwargs.get("clip_mean", 2.0), where) if clipped else None
        case _:
            stem = {"dqn": "q_net.q_net", "qrdqn": "quantile_net.quantile_net", "ars": "action_net"}.get(
                algo, "actor.mu"
            )
            # in older sb3-contrib, ARSLinearPolicy's network was one bare Linear
            bare = linear_ars and "action_net.weight" in tensors
            chain = [parts.get(stem, 2, bias)] if bare else parts.stack(stem, 1, bias)
            parts.expect(chain[:-1], depth, stem)
            trunk, last = chain[:-1], chain[-1]
            squash = algo in ("td3", "ddpg") or (algo == "ars" and bool(kwargs.get("squash_output", not linear_ars)))
    if algo == "qrdqn":
        last = _mean_over_quantiles(last, outputs, where)
    _check_chain(convs, dense + trunk + [last], obs_shape, outputs, where)
    net = _chain(convs, dense, trunk, last, act, flatten=len(obs_shape) != 1, limit=limit)
    return Actor(net, squash and box, act)


def fold(net: nn.Sequential, mean: np.ndarray, std: np.ndarray) -> None:
    """Make the first layer take raw inputs where it took `(x - mean) / std`: W / std, b - W (mean / std). In place."""
    name, first = next((n, m) for n, m in net.named_children() if not isinstance(m, nn.Flatten))
    if not isinstance(first, nn.Linear):
        kind = type(first).__name__
        raise InputError(f"normalize='fold' needs a linear first layer, not {kind}; use normalize='stage'")
    weight = first.weight.detach().double().numpy() / std.reshape(1, -1)
    bias = 0.0 if first.bias is None else first.bias.detach().double().numpy()
    folded = _Part(name, torch.from_numpy(weight), torch.from_numpy(bias - weight @ mean.reshape(-1)))
    setattr(net, name, _linear(folded))


class _Parts:
    """A state dict asked by name; each answer is checked to be finite float32."""

    def __init__(self, tensors: dict[str, Tensor], where: str) -> None:
        self.tensors = tensors
        self.where = where

    def has(self, prefix: str) -> bool:
        return any(name.startswith(f"{prefix}.") for name in self.tensors)

    def tensor(self, name: str, ndim: int) -> Tensor:
        value = self.tensors.get(name)
        if value is None:
            raise InputError(f"{self.where}: tensor {name!r} is missing from policy.pth")
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

    def get(self, name: str, ndim: int, bias: bool = True) -> _Part:
        weight = self.tensor(f"{name}.weight", ndim)
        part = _Part(name, weight, self.tensor(f"{name}.bias", 1) if bias else None)
        if part.bias is not None and len(part.bias) != len(weight):
            shape = tuple(part.bias.shape)
            raise InputError(f"{self.where}: {name}.bias {shape} does not fit {name}.weight {part.shape}")
        return part

    def stack(self, prefix: str, at_least: int, bias: bool = True) -> list[_Part]:
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

    def expect(self, trunk: list[_Part], depths: tuple[int, ...], prefix: str) -> None:
        """A trunk as deep as net_arch asks: a missing last layer would go unnoticed where all widths are equal."""
        if depths and len(trunk) not in depths:
            asked = " or ".join(map(str, depths))
            raise InputError(
                f"{self.where}: {prefix} has {len(trunk)} hidden layers; net_arch asks for {asked}"
                + (f"; tensor '{prefix}.{2 * len(trunk)}.weight' is missing" if len(trunk) < min(depths) else "")
            )


def _feature_prefixes(algo: str) -> tuple[str, ...]:
    own = {"dqn": "q_net", "qrdqn": "quantile_net"}.get(algo, "actor")
    first = "pi_features_extractor" if algo in _ON_POLICY else f"{own}.features_extractor"
    return first, "features_extractor"


def _activation_name(kwargs: dict[str, Any], default: str, where: str) -> str:
    """The trunk's activation from text such as "<class 'torch.nn.modules.activation.ReLU'>"."""
    text = kwargs.get("activation_fn")
    if text is None:
        return default
    match = re.fullmatch(r"<class 'torch\.nn\.modules\.activation\.(\w+)'>", str(text))
    if not match or match[1] not in _ACTIVATIONS:
        raise InputError(f"{where}: activation_fn {str(text)[:80]!r} is not known; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[match[1]]


def _depth(net_arch: Any, linear: bool, cnn: bool) -> tuple[int, ...]:
    """How many hidden layers the actor may have by net_arch; () where that cannot be told."""
    if linear:
        return (0,)
    if net_arch is None:
        return (0, 2) if cnn else (2,)  # SB3's defaults differ between versions in width only
    if isinstance(net_arch, dict):
        net_arch = [net_arch]
    if not isinstance(net_arch, list):
        return ()
    widths = 0
    for entry in net_arch:
        own = entry.get("pi") or [] if isinstance(entry, dict) else [entry]
        widths += len(own) if isinstance(own, list) else 1
    return (widths,)


def _positive(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{where}: clip_mean {str(value)[:40]!r} is not a positive number")
    return float(value)


def _mean_over_quantiles(part: _Part, actions: int, where: str) -> _Part:
    """The mean over quantiles is linear, so it goes into the last layer: (quantiles * actions, in) -> (actions, in)."""
    if len(part.weight) % actions or part.bias is None:
        raise InputError(f"{where}: {part.name}.weight {part.shape} does not give quantiles of {actions} actions")
    weight = part.weight.double().reshape(-1, actions, part.shape[1]).mean(dim=0)
    return _Part(part.name, weight, part.bias.double().reshape(-1, actions).mean(dim=0))


def _check_chain(convs: list[_Part], dense: list[_Part], obs_shape: tuple[int, ...], outputs: int, where: str) -> None:
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


def _chain(
    convs: list[_Part],
    dense: list[_Part],
    trunk: list[_Part],
    last: _Part,
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
        modules[f"fc{i + 1}"] = _linear(part)
        activate("relu" if i < len(dense) else act)
    modules["head"] = _linear(last)
    if limit is not None:
        modules["clip_mean"] = nn.Hardtanh(-limit, limit)
    return nn.Sequential(modules)


def _linear(part: _Part) -> nn.Linear:
    out, width = part.shape
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, width, out, bias=part.bias is not None)  # type: ignore[no-untyped-call]
    return _fill(layer, part)


def _conv(part: _Part, stride: int) -> nn.Conv2d:
    out, channels, *kernel = part.shape
    layer: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, channels, out, kernel, stride=stride)  # type: ignore[no-untyped-call]
    return _fill(layer, part)


_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


def _fill(layer: _Layer, part: _Part) -> _Layer:
    """`layer` with a part's values in float32; it was built uninitialized, so no random numbers were drawn."""
    layer.weight = nn.Parameter(part.weight.to(torch.float32))
    if part.bias is not None:
        layer.bias = nn.Parameter(part.bias.to(torch.float32))
    return layer
