"""A quantized network as hardware sees it: steps that read each other, and what lies between its layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import fx, nn

from quantkit.errors import InputError
from quantkit.joints import Pooling, is_mean, is_sum, pooling, rank
from quantkit.model import Model
from quantkit.policy import ACTIVATION_NAMES, Policy
from quantkit.qlayers import ActQuant, Point, QLayer
from quantkit.rtl_thresholds import quantized_layer
from quantkit.specs import flows

aten = torch.ops.aten
Pads = tuple[int, int, int, int]
"""Lines of zeros above and below, columns to the left and to the right."""
SILENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


@dataclass(frozen=True)
class Step:
    """One operation of a network. inputs: names of the steps read, "" for the network's own input.

    module: a layer, an activation, `nn.ZeroPad2d` or `nn.Flatten`; None for any other operation, told in `text`.
    point: where a value is quantized that is no layer's input. joint: "add" of two values, "mean" over a map, "max" or
    "average" over the windows `pool`.
    """

    name: str
    inputs: tuple[str, ...]
    module: nn.Module | None
    text: str
    point: Point | None = None
    joint: Literal["", "add", "mean", "max", "average"] = ""
    pool: Pooling | None = None


@dataclass(frozen=True)
class Graph:
    """steps: by name, in running order. layers: those with weights. shapes: their inputs', without the batch."""

    steps: dict[str, Step]
    layers: dict[str, QLayer]
    shapes: dict[str, tuple[int, ...]]

    def readers(self, name: str) -> list[Step]:
        """The steps that read a step."""
        return [step for step in self.steps.values() if name in step.inputs]

    def path(self, name: str) -> list[Step]:
        """The steps from a layer to the one that its codes can go to, that one last; empty where sums must leave."""
        found: list[Step] = []
        while True:
            readers = self.readers(found[-1].name if found else name)
            if len(readers) != 1 or readers[0].inputs.count(found[-1].name if found else name) != 1:
                return []
            found.append(readers[0])
            if readers[0].name in self.layers:
                break
            if len(readers[0].inputs) != 1 or readers[0].module is None:
                return []
        flattens = any(isinstance(step.module, nn.Flatten) for step in found)
        per_input = flattens and self.layers[found[-1].name].in_scale is not None
        return [] if per_input else found

    def pads(self, name: str) -> Pads:
        """The zeros padded right before a layer."""
        step, total = self.steps[name], np.zeros(4, int)
        while step.inputs and isinstance(module := self.steps[step.inputs[0]].module, nn.ZeroPad2d):
            left, right, top, bottom = module.padding  # type: ignore[misc]
            total += [top, bottom, left, right]
            step = self.steps[step.inputs[0]]
        return tuple(map(int, total))  # type: ignore[return-value]

    def before(self, name: str) -> list[str]:
        """The operations between a layer and the layers before it, in running order, in words."""
        wanted, found = set(self.steps[name].inputs), []
        for step in reversed(self.steps.values()):
            if step.name in wanted and step.name not in self.layers and step.name != "":
                wanted.update(step.inputs)
                if not isinstance(step.module, nn.ZeroPad2d | nn.Identity):
                    found.append(step.text)
        return found[::-1]


@dataclass(frozen=True)
class Route:
    """What a step gives: codes of `quantizer` behind the activations `between`, which are those of the steps `passed`,
    to (reader, operand) pairs. The activations behind a maximum come before it: all of them ascend."""

    passed: tuple[str, ...]
    between: tuple[nn.Module, ...]
    quantizer: QLayer | Point
    readers: tuple[tuple[str, int], ...]


def graph_of(model: Model) -> Graph:
    """The steps of a quantized network; InputError names a layer without hardware, or why its steps are not known."""
    steps = {step.name: step for step in _steps(model)}
    layers: dict[str, QLayer] = {}
    for name, step in steps.items():
        if isinstance(step.module, nn.Linear | nn.Conv1d | nn.Conv2d | QLayer):
            layers[name] = _checked(name, step.module)
    if not layers:
        raise InputError("this network has no layers")
    shapes = {name: tuple(inputs[1:]) for name, (inputs, _) in flows(model, layers).items()}
    return Graph(steps, layers, shapes)


def _checked(name: str, layer: nn.Module) -> QLayer:
    """The layer itself, or InputError where it has no hardware."""
    found = quantized_layer(name, layer)
    if found.op not in ("linear", "conv1d", "conv2d"):
        raise InputError(f"layer {name} is of kind {found.op}; accepted in hardware: linear, conv1d, conv2d")
    return found


def route_of(graph: Graph, name: str) -> Route | None:
    """Where a value goes, "" the network's input; None where it goes elsewhere than as one grid of codes."""
    ends: list[tuple[str, int]] = []
    ways: list[tuple[tuple[str, ...], QLayer | Point]] = []

    def follow(at: str, between: tuple[str, ...], quantizer: Point | None, shaped: bool) -> bool:
        for step in graph.readers(at):
            layer = graph.layers.get(step.name)
            if layer is not None:
                if shaped and layer.in_scale is not None and isinstance(_flat(graph, step), nn.Flatten):
                    return False
                ends.append((step.name, 0))
                ways.append((between, layer))
                if quantizer is not None:
                    ways.append((between, quantizer))
            elif step.joint == "max":
                behind = None if shaped or name == "" else route_of(graph, step.name)
                if behind is None:
                    return False
                ends.append((step.name, 0))
                ways.append(((*between, *behind.passed), behind.quantizer))
                if quantizer is not None:
                    ways.append((between, quantizer))
            elif step.joint:
                if quantizer is None or shaped:
                    return False
                ends.extend((step.name, slot) for slot, source in enumerate(step.inputs) if source == at)
                ways.append((between, quantizer))
            elif step.point is not None:
                if shaped or (quantizer is not None and quantizer.act != step.point.act):
                    return False
                if not follow(step.name, between, step.point, False):
                    return False
            elif isinstance(step.module, (nn.ZeroPad2d, nn.Flatten, *SILENT)):
                shapes = shaped or isinstance(step.module, nn.ZeroPad2d | nn.Flatten)
                if not follow(step.name, between, quantizer, shapes):
                    return False
            elif step.module is not None and quantizer is None and name != "":
                if not follow(step.name, (*between, step.name), None, shaped):
                    return False
            else:
                return False
        return True

    if not follow(name, (), None, False) or not ends:
        return None
    (between, quantizer), *others = ways
    alike = all(way == between and _same_codes(quantizer, other) for way, other in others)
    if not alike or not isinstance(quantizer.act, ActQuant):
        return None
    modules = [graph.steps[step].module for step in between]
    return Route(between, tuple(m for m in modules if m is not None), quantizer, tuple(ends))


def _flat(graph: Graph, step: Step) -> nn.Module | None:
    return graph.steps[step.inputs[0]].module


def _same_codes(one: QLayer | Point, other: QLayer | Point) -> bool:
    return one.act == other.act and one.in_scale is None and other.in_scale is None


def _steps(model: Model) -> list[Step]:
    module = model.module
    if isinstance(module, Policy):
        found, last = [Step("", (), None, "input")], ""
        for leaf, child in module.net.named_children():
            found.append(Step(f"net.{leaf}", (last,), child, type(child).__name__))
            last = f"net.{leaf}"
        found.append(Step("output", (last,), None, "output"))
        return [replace(s, module=None) if not _known(s.module) else s for s in found]
    if not isinstance(module, fx.GraphModule):
        reason = model.meta.get("untraced") or "its graph is not known"
        raise InputError(f"hardware needs to know which layer feeds which: {reason}")
    names: dict[fx.Node, str] = {}
    found = []
    for n in module.graph.nodes:
        if n.target is aten.sym_size.int:
            continue
        names[n] = "" if n.op == "placeholder" else str(n.target) if n.op == "call_module" else n.name
        inputs = tuple(names[a] for a in n.all_input_nodes if a in names)
        held = module.get_submodule(str(n.target)) if n.op == "call_module" else _function(n)
        text = type(held).__name__ if held is not None else str(n.target).removeprefix("aten.").split(".")[0]
        point, pool = held if isinstance(held, Point) else None, None if held is not None else pooling(n)
        joint = pool.op if pool else "add" if is_sum(n) else "mean" if is_mean(n) else ""
        if joint == "add":
            inputs = tuple(names[a] for a in n.args)  # type: ignore[index]
        found.append(Step(names[n], inputs, held if _known(held) else None, text, point, joint, pool))  # type: ignore[arg-type]
    return found


def _known(module: nn.Module | None) -> bool:
    """Whether a module is a layer or does nothing else to each number than an activation does."""
    simple = (nn.Hardtanh, nn.ZeroPad2d, nn.Flatten, *SILENT, nn.Linear, nn.Conv1d, nn.Conv2d, QLayer)
    return isinstance(module, simple) or type(module) in ACTIVATION_NAMES


def _function(n: fx.Node) -> nn.Module | None:
    """The module that does what a node does; None where it is none of those that may stand between two layers."""
    if n.op != "call_function":
        return None
    if n.target in (aten.relu.default, aten.relu_.default):
        return nn.ReLU()
    if (pool := pooling(n)) is not None and pool.kernel == pool.stride == (1, 1) and not any(pool.padding):
        return nn.Identity()
    if n.target is aten.tanh.default:
        return nn.Tanh()
    if n.target is aten.sigmoid.default:
        return nn.Sigmoid()
    if n.target in (aten.hardtanh.default, aten.hardtanh_.default):
        low, high = (*n.args[1:], *(-1.0, 1.0)[len(n.args) - 1 :])  # type: ignore[misc]
        return nn.Hardtanh(float(low), float(high))  # type: ignore[arg-type]
    if n.target is aten.leaky_relu.default:
        return nn.LeakyReLU(float(n.args[1]) if len(n.args) > 1 else 0.01)  # type: ignore[arg-type]
    if n.target in (aten.pad.default, aten.constant_pad_nd.default):
        constant = n.target is aten.constant_pad_nd.default or n.args[2:3] in ((), ("constant",))
        value = n.args[2 if n.target is aten.constant_pad_nd.default else 3 :]
        sizes = list(n.args[1])  # type: ignore[arg-type]
        signal = rank(n) == 3  # whose length is the height of a map of width 1
        if constant and len(sizes) == (2 if signal else 4) and min(sizes) >= 0 and not any(value):  # type: ignore[type-var, operator]
            return nn.ZeroPad2d((0, 0, *sizes) if signal else tuple(sizes))  # type: ignore[arg-type]
    if n.target in (aten.squeeze.dim, aten.squeeze.dims) and rank(n) == 2:
        return nn.Flatten()
    if n.target is aten.flatten.using_ints and n.args[1:] in ((1,), (1, -1)):
        return nn.Flatten()
    if n.target in (aten.reshape.default, aten.view.default) and len(n.args[1]) == 2:  # type: ignore[arg-type]
        return nn.Flatten()
    return None
