"""Where the maps of a captured network meet: operands of sums of two activations, and what means and averages are of.

Layers quantize their inputs, but a residual sum adds what layers and activations leave in float. A `Point` at every
such value puts it on a grid (`quantkit.methods.joints`), so that the sum is one of integers. A point has the name of
the graph's node whose value it quantizes, with "_grid" behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from quantkit.errors import InputError
from quantkit.model import Model
from quantkit.qlayers import Point, QLayer

aten = torch.ops.aten
ENDING = "_grid"
_SILENT = (nn.Identity, nn.ZeroPad2d, nn.Flatten)
_SHAPING = (aten.pad.default, aten.constant_pad_nd.default, aten.flatten.using_ints, aten.reshape.default)
_MAXIMA = (aten.max_pool2d.default, aten.max_pool1d.default)
_AVERAGES = (aten.avg_pool2d.default, aten.avg_pool1d.default)
_FLAT = (aten.max_pool1d.default, aten.avg_pool1d.default)
"""Of signals, which are maps of width 1."""
_PLAIN = ("relu", "relu_", "tanh", "sigmoid", "hardtanh", "hardtanh_", "leaky_relu", "silu", "gelu", "elu")
_SIGNALS = (*(getattr(aten, name).default for name in _PLAIN), aten.add.Tensor, aten.add_.Tensor)
"""What gives a signal where it is given signals."""


@dataclass(frozen=True)
class Pooling:
    """Windows (height, width) over maps, (length, 1) over signals. op: "max", or "average" by `divisor` with zeros
    outside the map; ceil: windows that begin inside the map and end outside are taken, too."""

    op: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    divisor: int
    ceil: bool

    def beyond(self, size: int, axis: int) -> int:
        """What is padded behind `size` lines (axis 0) or columns (axis 1).

        >>> Pooling("max", (2, 2), (2, 2), (0, 0), 1, True).beyond(5, 0)
        1
        """
        k, s, p = self.kernel[axis], self.stride[axis], self.padding[axis]
        if not self.ceil:
            return p
        last = -(-(size + 2 * p - k) // s)
        last -= last * s >= size + p
        return max(p, last * s + k - size - p)


def pooling(node: fx.Node) -> Pooling | None:
    """A node's windows; None of any other node, of windows with gaps, and of averages of fewer numbers at the edges."""
    if node.op != "call_function" or node.target not in (*_MAXIMA, *_AVERAGES):
        return None
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    facts: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs

    def pair(name: str, default: int) -> tuple[int, int]:
        value = facts.get(name)
        values = [value] if isinstance(value, int) else list(value or [default])
        return values[0], across[name] if node.target in _FLAT else values[-1]

    across = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    kernel, padding, ceil = pair("kernel_size", 1), pair("padding", 0), bool(facts.get("ceil_mode"))
    stride = pair("stride", 1) if facts.get("stride") else kernel
    if node.target in _MAXIMA:
        gaps = pair("dilation", 1) != (1, 1)
        return None if gaps else Pooling("max", kernel, stride, padding, 1, ceil)
    if ceil or (any(padding) and not facts.get("count_include_pad", True)):
        return None
    divisor = facts.get("divisor_override") or math.prod(kernel)
    return Pooling("average", kernel, stride, padding, int(divisor), ceil)


def is_average(node: fx.Node) -> bool:
    """Whether a node takes averages over windows."""
    found = pooling(node)
    return found is not None and found.op == "average"


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two values that are computed, each once."""
    plain = node.kwargs.get("alpha", 1) == 1 and all(isinstance(a, fx.Node) and a.op != "get_attr" for a in node.args)
    return bool(node.op == "call_function" and node.target in (aten.add.Tensor, aten.add_.Tensor) and plain)


def is_mean(node: fx.Node) -> bool:
    """Whether a node takes the mean over height and width of maps (batch, channels, height, width), or over the length
    of signals (batch, channels, length)."""
    if node.op != "call_function":
        return False
    if node.target in (aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default):
        return list(node.args[1]) in ([1], [1, 1])  # type: ignore[arg-type]
    if node.target is not aten.mean.dim:
        return False
    axes = rank(node.args[0])
    dims = sorted(d % axes for d in node.args[1] or ())  # type: ignore[union-attr, operator]
    return dims == [*range(2, axes)] and (axes == 4 or (axes == 3 and _is_signal(node.args[0])))


def _is_signal(node: Any) -> bool:
    """Whether a value of three axes is what a convolution gives, behind functions of its numbers: others are sequences,
    whose last axis are features."""
    if node.op == "call_function":
        plain = (*_SIGNALS, *_MAXIMA, *_AVERAGES, *_SHAPING[:2])
        return node.target in plain and all(map(_is_signal, node.all_input_nodes))
    held = node.graph.owning_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(held, Point):
        return _is_signal(node.args[0])
    return isinstance(held, nn.Conv1d) or (isinstance(held, QLayer) and held.op == "conv1d")


def rank(node: Any) -> int:
    """The axes of a node's value; 4 where the graph does not tell it."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 4


def sites(graph: fx.Graph) -> list[fx.Node]:
    """The nodes whose values a sum, a mean or an average reads, in running order.

    Those of points and the network's input aside.
    """
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if is_sum(node) or is_mean(node) or is_average(node):
            found |= dict.fromkeys(node.all_input_nodes[: 1 + is_sum(node)])
    modules = graph.owning_module
    assert modules is not None
    return [
        node
        for node in graph.nodes
        if node in found
        and node.op != "placeholder"
        and not (node.op == "call_module" and isinstance(modules.get_submodule(str(node.target)), Point))
    ]


def place(model: Model, names: Iterable[str] | None = None) -> list[str]:
    """Put points behind all `sites`, or behind those whose points have these names; returns the names.

    Nothing of a network that is no graph. LookupError for a name of no site.
    """
    gm = model.module
    if not isinstance(gm, fx.GraphModule):
        return []
    nodes = {f"{node.name}{ENDING}": node for node in sites(gm.graph)}
    wanted = list(nodes) if names is None else list(names)
    for name in wanted:
        node = nodes[name]
        gm.add_submodule(name, Point().eval())
        with gm.graph.inserting_after(node):
            call = gm.graph.call_module(name, (node,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call, lambda user, call=call: user is not call)  # type: ignore[misc]
    if wanted:
        gm.graph.lint()
        gm.recompile()
    return wanted


def readers(model: Model) -> dict[str, list[QLayer]]:
    """The layers that read the very value of a node, zeros padded, shapes and maxima aside, by the node's name.

    A layer is listed at the first of the values that are the same in this sense.
    """
    gm = model.module
    if not isinstance(gm, fx.GraphModule):
        return {}
    origins: dict[fx.Node, fx.Node] = {}
    found: dict[str, list[QLayer]] = {}
    for node in gm.graph.nodes:
        held = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        sources = [origins[a] for a in node.all_input_nodes[:1]]
        if isinstance(held, QLayer):
            found.setdefault(sources[0].name, []).append(held)
        same = isinstance(held, _SILENT) or node.target in (*_SHAPING, *_MAXIMA)
        origins[node] = sources[0] if same and sources else node
    return found


def check(model: Model) -> None:
    """Raise InputError where the network's graph is not known though it is no policy."""
    if "untraced" in model.meta:
        raise InputError(f"step 'joints' needs to know which layer feeds which: {model.meta['untraced']}")
