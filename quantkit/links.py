"""Where rescaling a channel preserves the function: from one layer through positively homogeneous
steps to the layers that consume it.

A producer's channel may be multiplied by f > 0 if every path from it reaches a layer that divides
the matching columns by f, over steps with g(f x) = f g(x): ReLU, LeakyReLU, identity, dropout in
evaluation, flattening, pooling. The input stage of a policy is a producer, too, as it ends in a
clip whose bounds can be scaled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quantkit.model import Model
from quantkit.policy import InputStage, Policy
from quantkit.qlayers import Plain, QLayer, shape_of

Layer = Plain | QLayer


@dataclass(frozen=True)
class Link:
    """Channels of `producer` are the inputs of `consumers` (names of layers), up to homogeneous steps.

    kind "layer": the producer is a layer. kind "input": it is the policy's input stage, and
    `producer` is empty. After a flattened convolution, each channel meets several columns in a row.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: Literal["layer", "input"]


_STEPS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
_FUNCTIONS = {F.relu, torch.relu, F.leaky_relu, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout}
_METHODS = {"relu", "relu_", "contiguous"}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QLayer) or super().is_leaf_module(m, module_qualified_name)


def find_links(model: Model) -> list[Link]:
    """Every link of the model in the order of execution; none where the module cannot be traced.

    A layer that runs more than once, or shares its parameters with another, is part of no link.
    """
    policy = model.module if isinstance(model.module, Policy) else None
    root = model.module if policy is None else policy.net
    prefix = "" if policy is None else "net."
    try:
        graph = _Tracer().trace(root)
    except Exception:  # whatever the module's own Python does with a proxy; no link is the answer
        return []
    modules = dict(root.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, Layer)}
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    owners: dict[int, int] = {}
    for layer in layers.values():
        owners[id(layer.weight)] = owners.get(id(layer.weight), 0) + 1
    alone = {n for n, layer in layers.items() if calls.count(n) == 1 and owners[id(layer.weight)] == 1}
    links = []
    for node in graph.nodes:
        if node.op == "placeholder" and policy is not None:
            found = _consumers(node, modules, alone)
            if found and _fits_stage(policy, [layers[name] for name, _ in found]):
                links.append(Link("", tuple(prefix + name for name, _ in found), "input"))
        elif node.op == "call_module" and node.target in alone:
            found = _consumers(node, modules, alone)
            if found and all(_fits(layers[str(node.target)], layers[name], flat) for name, flat in found):
                links.append(Link(prefix + str(node.target), tuple(prefix + name for name, _ in found), "layer"))
    return links


def _consumers(start: fx.Node, modules: dict[str, nn.Module], alone: set[str]) -> list[tuple[str, bool]] | None:
    """Layers that consume `start` and whether it was flattened on the way; None if anything else does."""
    found: list[tuple[str, bool]] = []
    pending = [(user, False) for user in start.users]
    while pending:
        node, flat = pending.pop(0)
        name = str(node.target)
        module = modules.get(name) if node.op == "call_module" else None
        if isinstance(module, Layer) and name in alone:
            found.append((name, flat))
            continue
        flattens = _flattens(node, module)
        if not flattens and not (isinstance(module, _STEPS) or _is_homogeneous(node)):
            return None
        pending.extend((user, flat or flattens) for user in node.users)
    return found


def _is_homogeneous(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    return node.op == "call_method" and node.target in _METHODS


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    if isinstance(module, nn.Flatten):
        return module.start_dim == 1 and module.end_dim == -1
    arguments: tuple[Any, ...] = node.args[1:]
    if (node.op == "call_function" and node.target is torch.flatten) or (
        node.op == "call_method" and node.target == "flatten"
    ):
        named = (*arguments, *(node.kwargs[key] for key in ("start_dim", "end_dim") if key in node.kwargs))
        return named in ((1,), (1, -1))
    return False


def _fits(producer: Layer, consumer: Layer, flat: bool) -> bool:
    channels = producer.weight.shape[0]
    inputs = in_channels(consumer)
    if is_conv(producer) and not is_conv(consumer):
        return flat and inputs % channels == 0
    return is_conv(producer) == is_conv(consumer) and inputs == channels


def _fits_stage(policy: Policy, consumers: list[Layer]) -> bool:
    kinds = {is_conv(layer) for layer in consumers}
    if len(kinds) != 1:
        return False
    size = policy.obs_shape[0] if kinds == {True} else math.prod(policy.obs_shape)
    return len(policy.obs_shape) in ((3,) if kinds == {True} else (1, 2, 3)) and all(
        in_channels(layer) == size for layer in consumers
    )


def is_conv(layer: Layer) -> bool:
    """Whether the layer is a convolution."""
    return layer.op == "conv2d" if isinstance(layer, QLayer) else isinstance(layer, nn.Conv2d)


def in_channels(layer: Layer) -> int:
    """Input channels of a convolution, input features of a linear layer."""
    return shape_of(layer).inputs


def column_range(layer: Layer, channels: int) -> Tensor:
    """Largest magnitude of the weights that meet each of `channels` producer channels, (channels,)."""
    groups = int(getattr(layer, "groups", 1))
    weight = layer.weight.detach().abs().flatten(2) if is_conv(layer) else layer.weight.detach().abs()[..., None]
    per_input = weight.reshape(groups, -1, *weight.shape[1:]).amax(dim=(1, 3)).flatten()
    return per_input.reshape(channels, -1).amax(dim=1)


def scale_columns(layer: Layer, factor: Tensor) -> None:
    """Multiply the weights that meet producer channel i by factor[i], in place of the old ones."""
    groups = int(getattr(layer, "groups", 1))
    per_input = factor.repeat_interleave(in_channels(layer) // len(factor))
    rows = layer.weight.shape[0] // groups
    matrix = per_input.reshape(groups, 1, -1).expand(-1, rows, -1).reshape(layer.weight.shape[0], -1)
    set_weight(layer, layer.weight.detach() * (matrix[..., None, None] if is_conv(layer) else matrix))


def scale_rows(layer: Layer, factor: Tensor) -> None:
    """Multiply output channel i (weights and bias) by factor[i]."""
    set_weight(layer, layer.weight.detach() * factor.reshape(-1, *(1 for _ in layer.weight.shape[1:])))
    if isinstance(layer.bias, Tensor):
        layer.bias.data = layer.bias.data * factor


def scale_stage(policy: Policy, factor: Tensor) -> None:
    """Multiply output i of the input stage by factor[i] (per channel for images), clip bounds included."""
    stage: InputStage = policy.stage
    if len(factor) == math.prod(policy.obs_shape):
        factor = factor.reshape(policy.obs_shape)
    else:
        factor = factor.reshape(-1, 1, 1)
    stage.std = stage.std / factor
    stage.low = stage.low * factor
    stage.high = stage.high * factor


def shift_stage(policy: Policy, shift: Tensor) -> None:
    """Add shift[i] to output i of the input stage, clip bounds included."""
    stage: InputStage = policy.stage
    shift = shift.reshape(policy.obs_shape)
    stage.mean = stage.mean - shift * stage.std
    stage.low = stage.low + shift
    stage.high = stage.high + shift


def set_weight(layer: Layer, weight: Tensor) -> None:
    """Give the layer another float weight."""
    layer.weight.data = weight
    if isinstance(layer, QLayer):
        layer.invalidate()
