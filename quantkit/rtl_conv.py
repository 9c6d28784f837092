"""From a quantized network with convolutions to the integers of `hwmodel.emit_conv`.

A layer whose output meets nothing but ascending activations, zero padding and flattening on its way to one other layer
gives that layer's input codes, by thresholds (`rtl_thresholds`); a maximum over windows in between takes the greatest
of these codes, which is the code of the greatest number. Where every residual sum, mean and average reads integers at
scales that are powers of two (step joints), and layers that read one map read the same codes, sums, means and branches
are hardware, too, and the network is one design (`whole`). Otherwise layers before them give their exact sums, and what
follows is left to the host in float32, as the simulator computes it. Zeros padded before a layer are taken into its
window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hwmodel.accumulator import signed_bits, unit_range
from hwmodel.affine import solved_layer
from hwmodel.cost import HwError
from hwmodel.formats import Format, Int, unit
from hwmodel.joint import FACTORS, ONES, widened
from hwmodel.network import MAX_ACC_BITS, Layer, Network
from hwmodel.spec import LayerSpec, PerTensor, Window
from quantkit.errors import InputError
from quantkit.joints import Pooling
from quantkit.model import Model
from quantkit.policy import ACTIVATION_NAMES, Policy
from quantkit.qlayers import ActQuant, Point, QLayer
from quantkit.qtensor import encode
from quantkit.rounding import is_pow2
from quantkit.rtl_export import Host
from quantkit.rtl_graph import SILENT, Graph, Pads, Route, Step, graph_of, route_of
from quantkit.rtl_thresholds import (
    act_format,
    activating,
    input_facts,
    line_of,
    output_facts,
    quantizing,
    requantizing,
    scaling,
    thresholds,
)
from quantkit.simulate import compile_policy
from quantkit.specs import layer_specs


@dataclass(frozen=True)
class Part:
    """A layer as hardware. name: dotted, as in the model. to: the layer whose input codes leave; None where sums leave.

    before: operations that the host computes between other hardware and this layer, in words. pads: zeros that the
    network pads before the layer and the window itself in hardware.
    """

    name: str
    network: Network
    to: str | None
    before: tuple[str, ...]
    pads: Pads

    @property
    def window(self) -> Window:
        """The layer's window."""
        found = self.network.specs[0].window
        assert found is not None
        return found


@dataclass(frozen=True)
class Design:
    """Layers that feed each other as one piece of hardware: codes of the first one's input to sums of the last one.

    parts: the layers with weights; steps without weights between them are in `network` only. before: what the host
    computes between other hardware and the first layer, in words.
    """

    name: str
    network: Network
    parts: tuple[Part, ...]
    before: tuple[str, ...]


def designs_of(model: Model) -> tuple[tuple[Design, ...], tuple[str, ...]]:
    """The quantized network as few designs as its branches allow, in the order in which they run; and what the host
    computes behind all of them, in words."""
    graph = graph_of(model)
    if (one := whole(model)) is not None:
        return (one,), tuple(graph.before("output"))
    parts = {part.name: part for part in parts_of(model)}
    fed = {part.to for part in parts.values()}
    designs = []
    for name, part in parts.items():
        if name in fed:
            continue
        row = [part]
        while row[-1].to is not None:
            row.append(parts[row[-1].to])
        facts = _facts(part.before, graph.layers[name], graph.layers[row[-1].name])
        network = Network(tuple(p.network.layers[0] for p in row), facts)
        designs.append(Design(name, network, tuple(row), part.before))
    return tuple(designs), tuple(graph.before("output"))


def policy_of(model: Model) -> tuple[Network, Host]:
    """The integers of a quantized policy with convolutions, and the host's float part, as `rtl_export.network_of`.

    InputError where branches part it into several designs.
    """
    policy = model.module
    if not isinstance(policy, Policy):
        raise InputError("this network is not a policy")
    designs, _ = designs_of(model)
    if len(designs) != 1:
        several = ", ".join(design.name for design in designs)
        raise InputError(f"this policy is {len(designs)} designs in hardware ({several}); one is needed")
    (design,) = designs
    first, last = design.parts[0], design.parts[-1]
    children = {f"net.{leaf}": module for leaf, module in policy.net.named_children()}
    names, layers = list(children), model.qlayers()
    head = [children[n] for n in names[: names.index(first.name)]]
    tail = [children[n] for n in names[names.index(last.name) + 1 :]]
    stage = compile_policy(Policy(policy.stage, nn.Sequential(*head), policy.head, policy.obs_shape))
    behind = activating(tail)

    def before(obs: np.ndarray) -> np.ndarray:
        return input_codes(first, layers[first.name], torch.from_numpy(np.ascontiguousarray(stage(obs))))

    return design.network, Host(before, lambda sums: behind(outputs(last, layers[last.name], sums)), policy.head)


def _facts(before: Sequence[str], first: QLayer, last: QLayer) -> dict[str, Any]:
    """What the host computes before and behind a design, in JSON."""
    return {"before": list(before), **input_facts(first), **output_facts(last)}


def has_convolutions(model: Model) -> bool:
    """Whether a layer of the model is a convolution of images or signals, so that hardware needs windows."""
    modules = list(model.module.modules())
    found = {m.op for m in modules if isinstance(m, QLayer)}
    return bool(found & {"conv1d", "conv2d"}) or any(isinstance(m, nn.Conv1d | nn.Conv2d) for m in modules)


def parts_of(model: Model) -> tuple[Part, ...]:
    """The layers of a quantized network in the order in which they run; InputError names one without hardware."""
    graph = graph_of(model)
    specs = {spec.name: spec for spec in layer_specs(model)}
    paths = {name: graph.path(name) for name in graph.layers}
    sources = {path[-1].name: name for name, path in paths.items() if path}
    parts = []
    for name, layer in graph.layers.items():
        assert layer.q is not None
        before = None if name not in sources else graph.layers[sources[name]]
        spec = replace(specs[name], out=None, window=_window(graph, name, before))
        codes = layer.q.codes.numpy().astype(np.int64).reshape(spec.out_features, spec.in_features)  # type: ignore[union-attr]
        to = paths[name][-1].name if paths[name] else None
        try:
            made = Layer(spec, codes, None)
            if to is not None:
                between = [step.module for step in paths[name][:-1]]
                made = _requantized(made, layer, [m for m in between if m is not None], graph.layers[to])
            network = Network((made,))
        except HwError as error:
            raise InputError(str(error)) from None
        outside = () if before is not None else tuple(graph.before(name))
        parts.append(Part(name, network, to, outside, graph.pads(name)))
    return tuple(parts)


# ---------------------------------------------------------------------------------------------------
# A network with branches as one design


def whole(model: Model) -> Design | None:
    """A network with branches, sums, means or windows without weights as one design; None where there are none or not
    all is integers."""
    graph = graph_of(model)
    names = [name for name, step in graph.steps.items() if name in graph.layers or step.joint]
    first, last = names[0], names[-1]
    if first not in graph.layers or last not in graph.layers:
        return None
    routes = {name: route_of(graph, name) for name in ["", *names[:-1]]}
    if any(route is None for route in routes.values()):
        return None
    sources: dict[str, dict[int, str]] = {name: {} for name in names}
    for source, route in routes.items():
        for reader, operand in route.readers:  # type: ignore[union-attr]
            sources[reader][operand] = source
    branched = any(graph.steps[name].joint for name in names) or any(len(r.readers) > 1 for r in routes.values())  # type: ignore[union-attr]
    if not branched or any(len(sources[name]) != 1 + (graph.steps[name].joint == "add") for name in names):
        return None
    specs = {spec.name: spec for spec in layer_specs(model)}
    shapes: dict[str, tuple[int, int, int]] = {}
    made: list[Layer] = []
    parts: list[Part] = []
    try:
        for name in names:
            reads = tuple(sources[name][operand] for operand in sorted(sources[name]))
            route = routes.get(name)
            if name in graph.layers:
                window = _stream_window(graph, name, shapes.get(reads[0]))
                spec = replace(specs[name], out=None, window=window, sources=reads)
                found = _product(spec, graph.layers[name], route)
                alone = replace(found, spec=replace(found.spec, sources=()))
                to = None if route is None else route.readers[0][0]
                outside = tuple(graph.before(name)) if reads == ("",) else ()
                parts.append(Part(name, Network((alone,)), to, outside, graph.pads(name)))
            else:
                acts = [routes[source].quantizer.act for source in reads]  # type: ignore[union-attr]
                alike = all(shapes[source] == shapes[reads[0]] for source in reads)
                joint = _joint(graph.steps[name], reads, acts, shapes[reads[0]], route) if alike else None
                if joint is None:
                    return None
                found = joint
            shapes[name] = _leaving(found.spec)
            made.append(found)
        network = Network(tuple(made), _facts(parts[0].before, graph.layers[first], graph.layers[last]))
    except HwError as error:
        raise InputError(str(error)) from None
    return Design(first, network, tuple(parts), parts[0].before)


def _stream_window(graph: Graph, name: str, map_: tuple[int, int, int] | None) -> Window:
    """The window of a layer that reads a map (channels, height, width), or the network's input."""
    if graph.layers[name].op != "linear" or map_ is None:
        return _window(graph, name, None)
    channels, height, width = map_
    return Window(channels, height, width, (height, width))


def _leaving(spec: LayerSpec) -> tuple[int, int, int]:
    assert spec.window is not None
    return spec.out_features, spec.window.out_height, spec.window.out_width


def _product(spec: LayerSpec, layer: QLayer, route: Route | None) -> Layer:
    """A layer with weights, with the thresholds of the codes that leave it."""
    codes = layer.q.codes.numpy().astype(np.int64).reshape(spec.out_features, spec.in_features)  # type: ignore[union-attr]
    plain = Layer(spec, codes, None)
    return plain if route is None else _requantized(plain, layer, route.between, route.quantizer)


def _joint(
    step: Step, sources: tuple[str, ...], acts: list[Any], map_: tuple[int, int, int], route: Route | None
) -> Layer | None:
    """A step without weights with the thresholds of the codes that leave it; None where operands do not align by
    shifts."""
    if route is None:
        return None
    if step.joint == "max":
        return _maximum(step, sources, act_format(route.quantizer), map_)
    if not all(isinstance(act.fmt, Int) and is_pow2(act.scale) for act in acts):
        return None
    channels, height, width = map_
    pool = step.pool or Pooling("average", (height, width), (1, 1), (0, 0), height * width, False)
    unit_value = min(act.scale for act in acts)
    factors = [round(act.scale / unit_value) for act in acts]
    if max(factors) > 128:
        return None
    formats = {"act": acts[0].fmt, "second": acts[1].fmt} if step.joint == "add" else {"act": acts[0].fmt}
    common: dict[str, Any] = {"granularity": PerTensor(), "acc_bits": MAX_ACC_BITS, "sources": sources, **formats}
    count = 1 if step.joint == "add" else pool.divisor
    if step.joint == "add":
        window = Window(1, height, width)
        spec = LayerSpec(step.name, "add", 1, 2, height * width, FACTORS, window=window, **common)
        codes = np.array([factors])
    else:
        window = _pooled(pool, (1, height, width))
        taps, positions = math.prod(window.kernel), window.out_height * window.out_width
        spec = LayerSpec(step.name, step.joint, 1, taps, positions, ONES, window=window, **common)  # type: ignore[arg-type]
        codes = np.ones((1, taps), np.int64)
    low, high = Layer(spec, codes, None).sum_range
    if max(-int(min(low)), int(max(high))) >= 2**24:  # float32 would round the sum
        return None
    plain = Layer(replace(spec, acc_bits=signed_bits(int(min(low)), int(max(high)))), codes, None)
    between, rounded = activating(_active(route.between)), quantizing(route.quantizer)

    def values(sums: np.ndarray) -> np.ndarray:
        y = (sums * unit_value).astype(np.float32)
        return rounded(between(y / np.float32(count)))

    following = route.quantizer.act
    assert isinstance(following, ActQuant)
    table = thresholds(values, plain, following.fmt)
    line = np.array([[unit_value / count, 0.0, following.scale * unit(following.fmt)]])
    spec = replace(plain.spec, out=following.fmt, activation=_named(_active(route.between)))
    return widened(solved_layer(Layer(spec, codes, table.astype(object), line)), channels)


def _maximum(step: Step, sources: tuple[str, ...], fmt: Format, map_: tuple[int, int, int]) -> Layer:
    """The greatest of the codes of each window."""
    assert step.pool is not None
    window, low_high = _pooled(step.pool, map_), unit_range(fmt)
    taps, positions = math.prod(window.kernel), window.out_height * window.out_width
    spec = LayerSpec(
        step.name, "max", map_[0], taps, positions, ONES, fmt, fmt, PerTensor(), acc_bits=signed_bits(*low_high),
        groups=map_[0], window=window, sources=sources,
    )  # fmt: skip
    return Layer(spec, np.ones((map_[0], taps), np.int64), None)


def _pooled(pool: Pooling, map_: tuple[int, int, int]) -> Window:
    """The windows over a map (channels, height, width)."""
    (above, left), (_, height, width) = pool.padding, map_
    padding = (above, pool.beyond(height, 0), left, pool.beyond(width, 1))
    return Window(*map_, pool.kernel, pool.stride, padding)


def _requantized(plain: Layer, layer: QLayer, between: Sequence[nn.Module], following: QLayer | Point) -> Layer:
    """The layer with the thresholds of the codes that the following one reads."""
    kept = _active(between)
    table = thresholds(requantizing(layer, kept, following), plain, act_format(following))
    spec = replace(plain.spec, out=act_format(following), activation=_named(kept))
    return solved_layer(Layer(spec, plain.codes, table.astype(object), line_of(layer, following)))


def _active(between: Sequence[nn.Module]) -> list[nn.Module]:
    """The activations."""
    return [m for m in between if not isinstance(m, (nn.ZeroPad2d, nn.Flatten, *SILENT))]


def _named(activations: Sequence[nn.Module]) -> Any:
    names = ["hardtanh" if isinstance(m, nn.Hardtanh) else ACTIVATION_NAMES[type(m)] for m in activations]
    return names[0] if len(names) == 1 else "other" if names else "none"


def _window(graph: Graph, name: str, before: QLayer | None) -> Window:
    """The window of a layer, the zeros before it included; before: the layer whose codes it reads, if one."""
    layer, shape, (top, bottom, left, right) = graph.layers[name], graph.shapes[name], graph.pads(name)
    if layer.op == "linear":
        if len(shape) != 1:
            raise InputError(f"layer {name} reads inputs of shape {shape}; hardware reads one vector, or a map")
        if before is None or before.op == "linear":
            return Window(shape[0])
        channels = before.weight.shape[0]
        _, height, width = _map_after(graph, name, channels)
        return Window(channels, height, width, (height, width))
    if any(d != 1 for d in layer.dilation):
        raise InputError(f"layer {name} has dilation {tuple(layer.dilation)}; hardware reads windows without gaps")
    own = (*layer.padding, 0)[:2]
    channels, height, width = (*shape, 1)[:3]
    kernel, stride = (*layer.weight.shape[2:], 1)[:2], (*layer.stride, 1)[:2]
    padding = (own[0] + top, own[0] + bottom, own[1] + left, own[1] + right)
    return Window(channels, height - top - bottom, width - left - right, kernel, stride, padding)  # type: ignore[arg-type]


def _map_after(graph: Graph, name: str, channels: int) -> tuple[int, int, int]:
    """The map that a linear layer reads flattened: that of the convolution before it."""
    source = next(n for n in graph.layers if (path := graph.path(n)) and path[-1].name == name)
    window = _window(graph, source, None)
    return channels, window.out_height, window.out_width


# ---------------------------------------------------------------------------------------------------
# Beside the simulator


def seen(model: Model, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The float input and output of every layer by name, as the simulator has them for the inputs x."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _, args, y, name=name: found.update({name: (args[0], y)}))  # type: ignore[misc]
        for name, layer in model.qlayers().items()
    ]
    try:
        with torch.inference_mode():
            model.module(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def input_codes(part: Part, layer: QLayer, x: Tensor) -> np.ndarray:
    """The codes (n, inputs) int64 that hardware reads for a layer's float inputs, in the stream's order."""
    with torch.inference_mode():
        values = layer.input_values(x)
    codes = encode(values.contiguous(), act_format(layer)).numpy().astype(np.int64)
    window, (top, _, left, _) = part.window, part.pads
    maps = codes[..., None] if codes.ndim == 3 else codes
    if codes.ndim == 2:
        maps = codes.reshape(len(codes), window.channels, window.height, window.width)
    maps = maps[:, :, top : top + window.height, left : left + window.width]
    return maps.transpose(0, 2, 3, 1).reshape(len(codes), -1)


def outputs(part: Part, layer: QLayer, sums: np.ndarray) -> np.ndarray:
    """The layer's float32 outputs for hardware's sums (n, outputs): (n, channels, height, width) or (n, channels,
    length), or (n, features)."""
    spec, window = part.network.specs[0], part.window
    y = scaling(layer)(sums.reshape(-1, spec.out_features))
    if layer.op == "linear":
        return y.reshape(len(sums), -1)
    maps = y.reshape(len(sums), window.out_height, window.out_width, -1).transpose(0, 3, 1, 2)
    return maps[..., 0] if layer.op == "conv1d" else maps
