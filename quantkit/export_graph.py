"""ONNX nodes of a captured graph (`quantkit.capture`): its modules and its ATen operations, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, fx, nn

from quantkit.attention import Attention, MatMul
from quantkit.errors import InputError
from quantkit.export_layers import Target, layer_nodes, matmul_nodes
from quantkit.export_ops import TABLE
from quantkit.export_walk import TYPES, Walk, facts_of, fixed_nodes
from quantkit.onnx_formats import Graph
from quantkit.qlayers import Point, QLayer

aten = torch.ops.aten

_MODULES = (
    QLayer,
    Point,
    MatMul,
    Attention,
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
)


def check(gm: fx.GraphModule, *, several: bool = False) -> None:
    """Raise InputError, naming the node and what is accepted, for an operation without a translation.

    several: results are accepted, as a step of a recurrent network has them.
    """
    fixed = fixed_nodes(gm)
    for n in gm.graph.nodes:
        if n.op == "call_function" and n not in fixed and n.target not in TABLE:
            name = str(n.target) if isinstance(n.target, torch._ops.OpOverload) else n.target.__name__
            known = sorted({str(f).split(".")[1] for f in TABLE if isinstance(f, torch._ops.OpOverload)})
            raise InputError(f"node {n.name!r}: {name} has no translation to ONNX; accepted: {', '.join(known)}")
        if n.op == "call_module" and not isinstance(gm.get_submodule(str(n.target)), _MODULES):
            kind = type(gm.get_submodule(str(n.target))).__name__
            accepted = ", ".join(m.__name__ for m in _MODULES)
            raise InputError(f"layer {n.target!r}: {kind} has no translation to ONNX; accepted: {accepted}")
    (result,) = gm.graph.output_node().args
    if not isinstance(result, fx.Node) and not several:
        raise InputError("the network returns several values; accepted for export: one tensor")


def translate(
    gm: fx.GraphModule, graph: Graph, sources: Sequence[str], to: Target, examples: Sequence[Tensor]
) -> tuple[list[fx.Node], Walk]:
    """Append the graph's nodes, fed by the tensors `sources`; those that leave it, and the walk with their names."""
    facts, values = facts_of(gm, examples)
    walk, left = Walk(gm, graph, to, facts), iter(sources)
    for n in gm.graph.nodes:
        match n.op:
            case "placeholder":
                walk.names[n] = next(left)
            case "output":
                break
            case _ if n in values:
                tensor = values[n].detach()
                walk.names[n] = graph.constant(
                    tensor.numpy(), str(n.target) if n.op == "get_attr" else n.name, _type(n, tensor)
                )
            case "call_module":
                walk.names[n] = _module(walk, n)
            case "call_function" if facts[n].number is None or facts[n].parts:
                walk.names[n] = TABLE[n.target](walk, n, _arguments(n))
    (result,) = gm.graph.output_node().args
    outputs: list[Any] = list(result) if isinstance(result, list | tuple) else [result]
    _prune(graph, {walk.names[n] for n in outputs})
    return outputs, walk


def _type(n: fx.Node, tensor: Tensor) -> int:
    if tensor.dtype not in TYPES:
        raise InputError(f"node {n.name!r}: {tensor.dtype} cannot be exported; accepted: {', '.join(map(str, TYPES))}")
    return int(TYPES[tensor.dtype])


def _prune(graph: Graph, outputs: set[str]) -> None:
    """Drop nodes and constants that do not reach an output, such as sizes that a reshape made superfluous."""
    needed, kept = set(outputs), []
    for node in reversed(graph.nodes):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    graph.nodes[:] = reversed(kept)
    graph.initializers[:] = [t for t in graph.initializers if t.name in needed]
    used = {(node.domain, node.op_type) for node in graph.nodes}
    for name in [k for k, f in graph.functions.items() if (f.domain, k) not in used]:
        del graph.functions[name]


def _arguments(n: fx.Node) -> dict[str, Any]:
    """The call's arguments by name, defaults included; of a Python function by position."""
    if not isinstance(n.target, torch._ops.OpOverload):
        return {str(i): v for i, v in enumerate(n.args)}
    schema = n.target._schema.arguments
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    return found | {a.name: v for a, v in zip(schema, n.args, strict=False)} | dict(n.kwargs)


def _module(t: Walk, n: fx.Node) -> str:
    name, layer = str(n.target), t.gm.get_submodule(str(n.target))
    inputs = [t.names[a] for a in n.args]  # type: ignore[index]
    if isinstance(layer, Attention):
        return _attention(t, n, layer, inputs)
    if isinstance(layer, MatMul):
        return matmul_nodes(t.graph, inputs[0], inputs[1], layer, name, t.to, t.known(n.args[0], -1, n))
    flat = isinstance(layer, nn.Linear) or (isinstance(layer, QLayer) and layer.op == "linear" and t.to != "qonnx")
    shape = t.shape(n.args[0])
    if not flat or len(shape) == 2:
        return layer_nodes(t.graph, inputs[0], layer, name, t.to)
    x = t.reshaped(inputs[0], (None, shape[-1]), f"{name}.rows")  # Gemm, which is explained in quantkit.export
    y = layer_nodes(t.graph, x, layer, name, t.to)
    return t.reshaped(y, t.shape(n), f"{name}.unrolled")


def _attention(t: Walk, n: fx.Node, layer: Attention, inputs: list[str]) -> str:
    name, graph = str(n.target), t.graph
    q, k, v = inputs[:3]
    shapes = [t.shape(a) for a in n.args]
    rank = len(shapes[0])
    if rank > 2 and shapes[1][-3] != shapes[0][-3]:
        heads, fewer = t.known(n.args[0], -3, n), t.known(n.args[1], -3, n)
        index = t.ints([i // (heads // fewer) for i in range(heads)], f"{name}.heads")
        k, v = (graph.op("Gather", [x, index], f"{name}.repeated", axis=rank - 3) for x in (k, v))
    turned = graph.op("Transpose", [k], f"{name}.turned", perm=[*range(rank - 2), rank - 1, rank - 2])
    width = t.known(n.args[0], -1, n)
    x = matmul_nodes(graph, q, turned, layer.scores, f"{name}.scores", t.to, width)
    t.inner[f"{name.replace('.', '_')}/scores"] = x
    scale = width**-0.5 if layer.scale is None else layer.scale
    x = graph.op("Mul", [x, graph.constant(scale, f"{name}.scale")], f"{name}.scaled")
    lowest = graph.constant(-np.inf, f"{name}.lowest")
    keys = t.known(n.args[1], -2, n)
    if layer.causal:
        seen = np.tril(np.ones((t.known(n.args[0], -2, n), keys), bool))
        x = graph.op("Where", [graph.constant(seen, f"{name}.seen", TensorProto.BOOL), x, lowest], f"{name}.causal")
    if len(inputs) > 3:
        masked = t.facts[n.args[3]].dtype == torch.bool  # type: ignore[index]
        x = graph.op("Where", [inputs[3], x, lowest], f"{name}.masked") if masked else graph.op(
            "Add", [x, inputs[3]], f"{name}.masked"
        )  # fmt: skip
    x = graph.op("Softmax", [x], f"{name}.softmax", axis=-1)
    t.inner[f"{name.replace('.', '_')}/softmax"] = x
    return matmul_nodes(graph, x, v, layer.values, f"{name}.values", t.to, keys)


def as_chain(gm: fx.GraphModule) -> list[tuple[str, nn.Module]]:
    """The graph as layers by name, each fed by the one before and by nothing else, for a target that knows chains only.

    InputError names the first node that is none of: a layer, ReLU, flattening.
    """
    layers: list[tuple[str, nn.Module]] = []
    last: fx.Node | None = None
    for n in gm.graph.nodes:
        if n.op == "output":
            break
        if n.op == "placeholder":
            last = n
            continue
        if n.target is aten.sym_size.int:
            continue
        if n.op == "call_module" and n.all_input_nodes == [last]:
            layers.append((str(n.target), gm.get_submodule(str(n.target))))
        elif n.target is aten.relu.default and n.args == (last,):
            layers.append((n.name, nn.ReLU()))
        elif n.target in (aten.flatten.using_ints, aten.reshape.default) and n.args[0] is last and _flattens(n):
            layers.append((n.name, nn.Flatten()))
        else:
            raise InputError(
                f"node {n.name!r}: {n.target} has no place in a chain of layers; accepted by target finn: Linear, "
                "Conv2d, ReLU or nothing between them, Flatten"
            )
        last = n
    return layers


def _flattens(n: fx.Node) -> bool:
    if n.target is aten.flatten.using_ints:
        return n.args[1:] in ((1,), (1, -1))
    sizes = n.args[1]
    return isinstance(sizes, list) and len(sizes) == 2 and isinstance(sizes[0], fx.Node | int)
