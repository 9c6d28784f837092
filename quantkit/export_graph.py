"""ONNX nodes of a captured graph (`quantkit.capture`): its modules and its ATen operations, one after the other.

What ONNX needs to know and a graph does not say (ranks, types, which dimensions depend on the batch) is observed:
the example runs once with a batch of 2 and once with 3. So a reshape is to constants and at most one -1, whatever
arithmetic on symbolic sizes stands in the graph, and what no input reaches becomes a constant.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, fx, nn

from quantkit.errors import InputError
from quantkit.export_layers import Target, layer_nodes, matmul_nodes
from quantkit.onnx_formats import Graph
from quantkit.qlayers import Attention, MatMul, QLayer

aten = torch.ops.aten

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
LATER = frozenset(
    ("Gelu", "LayerNormalization", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "HardSwish", "Shape")
)
"""Operators used in a form that opset 13 does not have and opset 20 does."""

_MODULES = (
    QLayer,
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
_END = 2**63 - 1


def check(gm: fx.GraphModule) -> None:
    """Raise InputError, naming the node and what is accepted, for an operation without a translation."""
    fixed = _fixed(gm)
    for n in gm.graph.nodes:
        if n.op == "call_function" and n not in fixed and n.target not in _TABLE:
            name = str(n.target) if isinstance(n.target, torch._ops.OpOverload) else n.target.__name__
            known = sorted({str(f).split(".")[1] for f in _TABLE if isinstance(f, torch._ops.OpOverload)})
            raise InputError(f"node {n.name!r}: {name} has no translation to ONNX; accepted: {', '.join(known)}")
        if n.op == "call_module" and not isinstance(gm.get_submodule(str(n.target)), _MODULES):
            kind = type(gm.get_submodule(str(n.target))).__name__
            accepted = ", ".join(m.__name__ for m in _MODULES)
            raise InputError(f"layer {n.target!r}: {kind} has no translation to ONNX; accepted: {accepted}")
    (result,) = gm.graph.output_node().args
    if not isinstance(result, fx.Node):
        raise InputError("the network returns several values; accepted for export: one tensor")


@dataclass(frozen=True)
class Fact:
    """What a node gives: shape and dtype of a tensor, a number, or the parts of a tuple.

    None in a shape, and a number of None, depend on the batch. of_two: the shape for a batch of 2.
    """

    shape: tuple[int | None, ...] = ()
    of_two: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    number: int | float | bool | None = None
    parts: tuple[Fact, ...] = ()


def facts_of(gm: fx.GraphModule, example: Tensor) -> tuple[dict[fx.Node, Fact], dict[fx.Node, Tensor]]:
    """Facts by node, and the values of nodes that no input reaches; both from runs of the first example."""
    fixed = _fixed(gm)
    runs = []
    for batch in (2, 3):
        seen: dict[fx.Node, Any] = {}
        recorder = _Recorder(gm, seen, fixed)
        with torch.no_grad():
            recorder.run(torch.cat([example[:1]] * batch))
        runs.append(seen)
    values = {n: v for n, v in runs[0].items() if n in fixed and isinstance(v, Tensor)}
    return {n: _merged(_fact(v), _fact(runs[1][n])) for n, v in runs[0].items()}, values


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node gave: tensors themselves if fixed, else without their storage."""

    def __init__(self, gm: fx.GraphModule, seen: dict[fx.Node, Any], fixed: set[fx.Node]) -> None:
        super().__init__(gm)
        self.seen, self.fixed = seen, fixed

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.seen[n] = result if n in self.fixed else _light(result)
        return result


def _light(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return [_light(v) for v in value] if isinstance(value, list | tuple) else value


def _fact(value: Any) -> Fact:
    if isinstance(value, Tensor):
        return Fact(tuple(value.shape), tuple(value.shape), value.dtype)
    if isinstance(value, list | tuple):
        return Fact(parts=tuple(_fact(v) for v in value))
    return Fact(number=value)


def _merged(a: Fact, b: Fact) -> Fact:
    shape = tuple(x if x == y else None for x, y in zip(a.shape, b.shape, strict=True))
    number = a.number if a.number == b.number else None
    return Fact(shape, a.of_two, a.dtype, number, tuple(_merged(x, y) for x, y in zip(a.parts, b.parts, strict=True)))


def _fixed(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose value depends on no input."""
    fixed: set[fx.Node] = set()
    for n in gm.graph.nodes:
        if n.op == "get_attr" or (n.op == "call_function" and all(m in fixed for m in n.all_input_nodes)):
            fixed.add(n)
    return fixed


@dataclass
class Walk:
    """One translation: the growing ONNX graph, and the name (of a tuple: names) that holds each node's value.

    names: of a size that depends on the batch the name of an int64 tensor (1,). inner: values within an
    `Attention`, by "layer_name/part".
    """

    gm: fx.GraphModule
    graph: Graph
    to: Target
    facts: dict[fx.Node, Fact]
    names: dict[fx.Node, Any] = field(default_factory=dict)
    inner: dict[str, str] = field(default_factory=dict)

    def shape(self, node: Any) -> tuple[int | None, ...]:
        """Its shape, None where a dimension depends on the batch."""
        return self.facts[node].shape

    def ints(self, values: Sequence[int], name: str) -> str:
        """A constant of int64 numbers."""
        return self.graph.constant(list(values), name, TensorProto.INT64)

    def value(self, x: Any, dtype: torch.dtype, name: str) -> str:
        """The name of a node's value, or of a number as a constant, in the dtype asked for."""
        if not isinstance(x, fx.Node):
            return self.graph.constant(x, f"{name}.number", TYPES[dtype])
        fact = self.facts[x]
        if fact.number is not None:
            return self.graph.constant(fact.number, f"{name}.number", TYPES[dtype])
        if (fact.dtype or torch.int64) == dtype:
            return str(self.names[x])
        return self.graph.op("Cast", [self.names[x]], f"{name}.cast", to=TYPES[dtype])

    def number(self, x: Any, n: fx.Node) -> Any:
        """A number known at export, of an argument that ONNX takes as a constant only."""
        known = self.facts[x].number if isinstance(x, fx.Node) else x
        if isinstance(x, fx.Node) and known is None:
            raise InputError(f"node {n.name!r}: {n.target} by a size that depends on the batch cannot be exported")
        return known

    def sizes(self, values: Sequence[Any], name: str) -> str:
        """A tensor of sizes, each a number or a node."""
        known: list[Any] = [self.facts[v].number if isinstance(v, fx.Node) else v for v in values]
        if all(k is not None for k in known):
            return self.ints(known, f"{name}.sizes")
        parts = [
            self.names[v] if k is None else self.ints([k], f"{name}.size") for v, k in zip(values, known, strict=True)
        ]
        return self.graph.op("Concat", parts, f"{name}.sizes", axis=0)

    def named(self) -> dict[str, str]:
        """The ONNX tensor of every node that gives one, by the node's name; in an `Attention` by "layer_name/part"."""
        tensors = {n.name: name for n, name in self.names.items() if isinstance(name, str) and n.op.startswith("call")}
        kept = {output for node in self.graph.nodes for output in node.output}
        return {key: name for key, name in (tensors | self.inner).items() if name in kept}

    def output_shape(self) -> list[int | str | None]:
        """The output's shape: "batch" for that dimension, None for another that depends on it."""
        (node,) = self.gm.graph.output_node().args
        fact = self.facts[node]  # type: ignore[index]
        return [known or ("batch" if two == 2 else None) for known, two in zip(fact.shape, fact.of_two, strict=True)]

    def reshaped(self, x: str, shape: Sequence[int | None], name: str, exact: Sequence[Any] | None = None) -> str:
        """x in another shape, with -1 for the one dimension that depends on the batch; `exact`: where several do."""
        if sum(d is None for d in shape) > 1:
            if exact is None:
                raise InputError(f"node {name!r}: several dimensions depend on the batch; accepted: one")
            target = self.sizes(exact, name)
        else:
            target = self.ints([-1 if d is None else d for d in shape], f"{name}.shape")
        return self.graph.op("Reshape", [x, target], name)


def translate(gm: fx.GraphModule, graph: Graph, source: str, to: Target, example: Tensor) -> tuple[str, Walk]:
    """Append the graph's nodes, fed by the tensor `source`; the name of its output, and the walk."""
    facts, values = facts_of(gm, example)
    walk = Walk(gm, graph, to, facts)
    for n in gm.graph.nodes:
        match n.op:
            case "placeholder":
                walk.names[n] = source
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
                walk.names[n] = _TABLE[n.target](walk, n, _arguments(n))
    (result,) = gm.graph.output_node().args
    output: str = walk.names[result]  # type: ignore[index]
    _prune(graph, output)
    return output, walk


def _type(n: fx.Node, tensor: Tensor) -> int:
    if tensor.dtype not in TYPES:
        raise InputError(f"node {n.name!r}: {tensor.dtype} cannot be exported; accepted: {', '.join(map(str, TYPES))}")
    return int(TYPES[tensor.dtype])


def _prune(graph: Graph, output: str) -> None:
    """Drop nodes and constants that do not reach the output, such as sizes that a reshape made superfluous."""
    needed, kept = {output}, []
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


# Modules


def _module(t: Walk, n: fx.Node) -> str:
    name, layer = str(n.target), t.gm.get_submodule(str(n.target))
    inputs = [t.names[a] for a in n.args]  # type: ignore[index]
    if isinstance(layer, Attention):
        return _attention(t, n, layer, inputs)
    if isinstance(layer, MatMul):
        return matmul_nodes(t.graph, inputs[0], inputs[1], layer, name, t.to, _known(t, n.args[0], -1, n))
    flat = isinstance(layer, nn.Linear) or (isinstance(layer, QLayer) and layer.op == "linear" and t.to != "qonnx")
    shape = t.shape(n.args[0])
    if not flat or len(shape) == 2:
        return layer_nodes(t.graph, inputs[0], layer, name, t.to)
    x = t.reshaped(inputs[0], (None, shape[-1]), f"{name}.rows")  # Gemm, which is explained in quantkit.export
    y = layer_nodes(t.graph, x, layer, name, t.to)
    return t.reshaped(y, t.shape(n), f"{name}.unrolled")


def _known(t: Walk, node: Any, dim: int, n: fx.Node) -> int:
    """A dimension that must not depend on the batch."""
    size = t.shape(node)[dim]
    if size is None:
        raise InputError(f"node {n.name!r}: its dimension {dim} depends on the batch; accepted: a fixed one")
    return size


def _attention(t: Walk, n: fx.Node, layer: Attention, inputs: list[str]) -> str:
    name, graph = str(n.target), t.graph
    q, k, v = inputs[:3]
    shapes = [t.shape(a) for a in n.args]
    rank = len(shapes[0])
    if rank > 2 and shapes[1][-3] != shapes[0][-3]:
        heads, fewer = _known(t, n.args[0], -3, n), _known(t, n.args[1], -3, n)
        index = t.ints([i // (heads // fewer) for i in range(heads)], f"{name}.heads")
        k, v = (graph.op("Gather", [x, index], f"{name}.repeated", axis=rank - 3) for x in (k, v))
    turned = graph.op("Transpose", [k], f"{name}.turned", perm=[*range(rank - 2), rank - 1, rank - 2])
    width = _known(t, n.args[0], -1, n)
    x = matmul_nodes(graph, q, turned, layer.scores, f"{name}.scores", t.to, width)
    t.inner[f"{name.replace('.', '_')}/scores"] = x
    scale = width**-0.5 if layer.scale is None else layer.scale
    x = graph.op("Mul", [x, graph.constant(scale, f"{name}.scale")], f"{name}.scaled")
    lowest = graph.constant(-np.inf, f"{name}.lowest")
    keys = _known(t, n.args[1], -2, n)
    if layer.causal:
        seen = np.tril(np.ones((_known(t, n.args[0], -2, n), keys), bool))
        x = graph.op("Where", [graph.constant(seen, f"{name}.seen", TensorProto.BOOL), x, lowest], f"{name}.causal")
    if len(inputs) > 3:
        masked = t.facts[n.args[3]].dtype == torch.bool  # type: ignore[index]
        x = graph.op("Where", [inputs[3], x, lowest], f"{name}.masked") if masked else graph.op(
            "Add", [x, inputs[3]], f"{name}.masked"
        )  # fmt: skip
    x = graph.op("Softmax", [x], f"{name}.softmax", axis=-1)
    t.inner[f"{name.replace('.', '_')}/softmax"] = x
    return matmul_nodes(graph, x, v, layer.values, f"{name}.values", t.to, keys)


# Operations: each takes the walk, the node and its arguments, and gives the name of the result

Operation = Callable[[Walk, fx.Node, dict[str, Any]], Any]


def _unary(kind: str, **options: str) -> Operation:
    """One ONNX node of one input; options: ONNX attribute -> argument."""

    def nodes(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
        x = t.value(n.args[0], _result(t, n), n.name)
        return t.graph.op(kind, [x], n.name, **{key: a[name] for key, name in options.items()})

    return nodes


def _result(t: Walk, n: fx.Node) -> torch.dtype:
    return t.facts[n].dtype or torch.int64


def _binary(kind: str) -> Operation:
    """Arithmetic in the type of the result, with the second operand times `alpha`."""

    def nodes(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
        dtype = _result(t, n)
        x, y = (t.value(v, dtype, n.name) for v in n.args[:2])
        if a.get("alpha", 1) != 1:
            y = t.graph.op(
                "Mul", [y, t.graph.constant(a["alpha"], f"{n.name}.alpha", TYPES[dtype])], f"{n.name}.scaled"
            )
        return t.graph.op(kind, [x, y], n.name)

    return nodes


def _size_arithmetic(kind: str) -> Operation:
    """The same for sizes, which are int64 tensors (1,)."""

    def nodes(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
        x, y = (t.sizes([v], n.name) for v in n.args)
        return t.graph.op(kind, [x, y], n.name)

    return nodes


def _comparison(kind: str, *, negated: bool = False) -> Operation:
    def nodes(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
        samples: list[Any] = [
            torch.empty([1] * len(t.shape(v)), dtype=t.facts[v].dtype) if isinstance(v, fx.Node) else v
            for v in n.args[:2]
        ]
        dtype = torch.result_type(*samples)
        y = t.graph.op(kind, [t.value(v, dtype, n.name) for v in n.args[:2]], n.name)
        return t.graph.op("Not", [y], f"{n.name}.negated") if negated else y

    return nodes


def _logical(kind: str) -> Operation:
    """An operation on truth values; InputError for the same on the bits of integers."""

    def nodes(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
        kinds = {t.facts[v].dtype for v in n.args if isinstance(v, fx.Node)}
        if kinds != {torch.bool}:
            raise InputError(f"node {n.name!r}: {n.target} of integers cannot be exported; accepted: of Booleans")
        return t.graph.op(kind, [t.names[v] for v in n.args], n.name)  # type: ignore[index]

    return nodes


def _rsub(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    if a["alpha"] != 1:
        raise InputError(f"node {n.name!r}: {n.target} with alpha {a['alpha']} cannot be exported; accepted: 1")
    x, y = (t.value(v, _result(t, n), n.name) for v in (a["other"], a["self"]))
    return t.graph.op("Sub", [x, y], n.name)


def _identity(t: Walk, n: fx.Node, a: dict[str, Any]) -> Any:
    return t.names[n.args[0]]  # type: ignore[index]


def _cast(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return t.value(n.args[0], _result(t, n), n.name)


def _rsqrt(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return t.graph.op("Reciprocal", [t.graph.op("Sqrt", [t.names[a["self"]]], f"{n.name}.root")], n.name)


def _clamp(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    low, high = (a.get(k, a.get(f"{k}_val")) for k in ("min", "max"))
    kind = TYPES[_result(t, n)]
    x = t.value(a["self"], _result(t, n), n.name)
    bounds = [
        "" if v is None else t.graph.constant(t.number(v, n), f"{n.name}.{end}", kind)
        for v, end in ((low, "low"), (high, "high"))
    ]
    return t.graph.op("Clip", [x, *(bounds if bounds[1] else bounds[:1])], n.name)


def _relu6(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return _clamp(t, n, a | {"min": 0, "max": 6})


def _silu(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    x = t.names[a["self"]]
    return t.graph.op("Mul", [x, t.graph.op("Sigmoid", [x], f"{n.name}.gate")], n.name)


def _mish(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    x = t.names[a["self"]]
    gate = t.graph.op("Tanh", [t.graph.op("Softplus", [x], f"{n.name}.softplus")], f"{n.name}.gate")
    return t.graph.op("Mul", [x, gate], n.name)


def _elu(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    if (a["scale"], a["input_scale"]) != (1, 1):
        raise InputError(f"node {n.name!r}: an ELU with scale {a['scale']} cannot be exported; accepted: 1")
    return t.graph.op("Elu", [t.names[a["self"]]], n.name, alpha=float(a["alpha"]))


def _hardsigmoid(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return t.graph.op("HardSigmoid", [t.names[a["self"]]], n.name, alpha=1 / 6, beta=0.5)


def _softplus(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    if a["beta"] != 1:
        raise InputError(f"node {n.name!r}: softplus with beta {a['beta']} cannot be exported; accepted: 1")
    return t.graph.op("Softplus", [t.names[a["self"]]], n.name)


def _prelu(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    slope, rank = t.names[a["weight"]], len(t.shape(a["self"]))
    if t.shape(a["weight"]) != (1,) and rank > 2:
        slope = t.reshaped(slope, (t.shape(a["weight"])[0], *(1,) * (rank - 2)), f"{n.name}.slope")
    return t.graph.op("PRelu", [t.names[a["self"]], slope], n.name)


def _softmax(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    kind = "LogSoftmax" if "log" in str(n.target) else "Softmax"
    return t.graph.op(kind, [t.value(a["self"], _result(t, n), n.name)], n.name, axis=a["dim"])


def _reduce(kind: str) -> Operation:
    def nodes(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
        dims = a.get("dim")
        axes = list(range(len(t.shape(a["self"])))) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
        x = t.value(a["self"], _result(t, n), n.name)
        return t.graph.op(kind, [x, t.ints(axes, f"{n.name}.axes")], n.name, keepdims=int(a.get("keepdim", False)))

    return nodes


def _norm2(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    if a["ord"] != 2:
        raise InputError(f"node {n.name!r}: a norm of order {a['ord']} cannot be exported; accepted: 2")
    return str(_reduce("ReduceL2")(t, n, a))


def _argmax(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    if a["dim"] is None:
        raise InputError(f"node {n.name!r}: argmax over all dimensions cannot be exported; accepted: one dimension")
    return t.graph.op("ArgMax", [t.names[a["self"]]], n.name, axis=a["dim"], keepdims=int(a["keepdim"]))


def _max_dim(t: Walk, n: fx.Node, a: dict[str, Any]) -> list[str]:
    x, axes = t.names[a["self"]], t.ints([a["dim"]], f"{n.name}.axes")
    return [
        t.graph.op("ReduceMax", [x, axes], n.name, keepdims=int(a["keepdim"])),
        t.graph.op("ArgMax", [x], f"{n.name}.index", axis=a["dim"], keepdims=int(a["keepdim"])),
    ]


def _spatial(values: Any, count: int) -> list[int]:
    found = [values] if isinstance(values, int) else list(values)
    return found * count if len(found) == 1 else found


def _pool(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    average = "avg" in str(n.target)
    count = 1 if "1d" in str(n.target) else 2
    kernel = _spatial(a["kernel_size"], count)
    padding = _spatial(a["padding"], count)
    options: dict[str, Any] = {"kernel_shape": kernel, "strides": _spatial(a["stride"] or kernel, count)}
    options |= {"pads": [*padding, *padding], "ceil_mode": int(a["ceil_mode"])}
    if not average:
        return t.graph.op("MaxPool", [t.names[a["self"]]], n.name, dilations=_spatial(a["dilation"], count), **options)
    if a.get("divisor_override") is not None or a["ceil_mode"]:
        raise InputError(
            f"node {n.name!r}: {n.target} with ceil_mode or a divisor cannot be exported; accepted: without"
        )
    options["count_include_pad"] = int(a["count_include_pad"])
    return t.graph.op("AveragePool", [t.names[a["self"]]], n.name, **options)


def _adaptive_pool(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    count = 1 if "1d" in str(n.target) else 2
    wanted = _spatial(a["output_size"], count)
    have = [_known(t, a["self"], d, n) for d in range(-count, 0)]
    if set(wanted) == {1}:
        axes = t.ints(range(-count, 0), f"{n.name}.axes")
        return t.graph.op("ReduceMean", [t.names[a["self"]], axes], n.name, keepdims=1)
    if any(h % w for h, w in zip(have, wanted, strict=True)):
        raise InputError(f"node {n.name!r}: adaptive pooling from {have} to {wanted}; accepted: a divisor of each size")
    kernel = [h // w for h, w in zip(have, wanted, strict=True)]
    return t.graph.op("AveragePool", [t.names[a["self"]]], n.name, kernel_shape=kernel, strides=kernel)


_PADS = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    x, rank, dtype = t.names[a["self"]], len(t.shape(a["self"])), _result(t, n)
    edges = [t.number(p, n) for p in a["pad"]]
    if not any(edges):
        return str(x)
    begin, end = [0] * rank, [0] * rank
    for i in range(len(edges) // 2):
        begin[rank - 1 - i], end[rank - 1 - i] = edges[2 * i], edges[2 * i + 1]
    mode = _PADS[a.get("mode", "constant")]
    if mode == "wrap" and t.to not in ("qdq", "qdq-real"):
        raise InputError(
            f"node {n.name!r}: target {t.to} has no circular padding; accepted: constant, reflect, replicate"
        )
    fill = t.graph.constant(a["value"] or 0, f"{n.name}.fill", TYPES[dtype])
    return t.graph.op("Pad", [x, t.ints([*begin, *end], f"{n.name}.pads"), fill], n.name, mode=mode)


def _cat(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    dtype = _result(t, n)
    return t.graph.op("Concat", [t.value(x, dtype, n.name) for x in a["tensors"]], n.name, axis=a["dim"])


def _stack(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    dim = a["dim"] % len(t.shape(n))
    axes = t.ints([dim], f"{n.name}.axes")
    parts = [t.graph.op("Unsqueeze", [t.value(x, _result(t, n), n.name), axes], f"{n.name}.part") for x in a["tensors"]]
    return t.graph.op("Concat", parts, n.name, axis=dim)


def _slice(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    x, start, end = t.names[a["self"]], a["start"] or 0, _END if a["end"] is None else a["end"]
    if (start, a["step"]) == (0, 1) and isinstance(end, int) and end >= _END:
        return str(x)
    bounds = [t.sizes([v], f"{n.name}.{what}") for v, what in ((start, "start"), (end, "end"))]
    return t.graph.op(
        "Slice", [x, *bounds, t.ints([a["dim"]], f"{n.name}.axis"), t.ints([a["step"]], f"{n.name}.step")], n.name
    )


def _at(t: Walk, x: str, dim: int, i: int, name: str) -> str:
    """x[..., i, ...] as Slice and Squeeze: onnxruntime 1.31 fails on several Gathers of one tensor with numbers."""
    axis = t.ints([dim], f"{name}.axis")
    end = _END if i == -1 else i + 1
    x = t.graph.op("Slice", [x, t.ints([i], f"{name}.start"), t.ints([end], f"{name}.end"), axis], f"{name}.part")
    return t.graph.op("Squeeze", [x, axis], name)


def _select(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return _at(t, t.names[a["self"]], a["dim"], t.number(a["index"], n), n.name)


def _unbind(t: Walk, n: fx.Node, a: dict[str, Any]) -> list[str]:
    return [_at(t, t.names[a["self"]], a["dim"], i, n.name) for i in range(len(t.facts[n].parts))]


def _split(t: Walk, n: fx.Node, a: dict[str, Any]) -> list[str]:
    """chunk, split: one Slice for each part."""
    x, first, found = t.names[a["self"]], 0, []
    axis = t.ints([a["dim"]], f"{n.name}.axis")
    for part in t.facts[n].parts:
        size = part.shape[a["dim"]]
        if size is None:
            raise InputError(
                f"node {n.name!r}: {n.target} along a dimension that depends on the batch; accepted: others"
            )
        bounds = [t.ints([first], f"{n.name}.start"), t.ints([first + size], f"{n.name}.end")]
        found.append(t.graph.op("Slice", [x, *bounds, axis], n.name))
        first += size
    return found


def _getitem(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return str(t.names[a["0"]][a["1"]])


def _reshape(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return t.reshaped(t.names[a["self"]], t.shape(n), n.name, a.get("shape", a.get("size")))


def _unsqueeze(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    axes = t.ints([a["dim"] % len(t.shape(n))], f"{n.name}.axes")
    return t.graph.op("Unsqueeze", [t.names[a["self"]], axes], n.name)


def _squeeze(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    shape, dims = t.shape(a["self"]), a.get("dim")
    dims = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    ones = [d % len(shape) for d in dims if shape[d] == 1]
    x = t.names[a["self"]]
    return t.graph.op("Squeeze", [x, t.ints(ones, f"{n.name}.axes")], n.name) if ones else str(x)


def _permute(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    rank = len(t.shape(a["self"]))
    if "dims" in a:
        order = [d % rank for d in a["dims"]]
    else:
        order = list(range(rank))
        first, second = (a["dim0"] % rank, a["dim1"] % rank) if "dim0" in a else (0, rank - 1)
        order[first], order[second] = order[second], order[first]
    return t.graph.op("Transpose", [t.names[a["self"]]], n.name, perm=order)


def _expand(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    target = [
        known if known is not None else size if isinstance(size, fx.Node) else 1  # 1 leaves a dimension as it is
        for size, known in zip(a["size"], t.shape(n), strict=True)
    ]
    return t.graph.op("Expand", [t.names[a["self"]], t.sizes(target, n.name)], n.name)


def _full(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    fill = a.get("fill_value", 1 if "ones" in str(n.target) else 0)
    value = t.graph.constant(t.number(fill, n), f"{n.name}.fill", TYPES[_result(t, n)])
    if "_like" in str(n.target):
        return _as(t, n, value, a["self"])
    return t.graph.op("Expand", [value, t.sizes(a["size"], n.name)], n.name)


def _as(t: Walk, n: fx.Node, x: str, other: fx.Node) -> str:
    return t.graph.op("Expand", [x, t.graph.op("Shape", [t.names[other]], f"{n.name}.shape")], n.name)


def _expand_as(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return _as(t, n, t.names[a["self"]], a["other"])


def _repeat(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    x, shape, repeats = t.names[a["self"]], t.shape(a["self"]), a["repeats"]
    if len(repeats) > len(shape):
        x = t.reshaped(x, (*(1,) * (len(repeats) - len(shape)), *shape), f"{n.name}.wider")
    return t.graph.op("Tile", [x, t.sizes(repeats, n.name)], n.name)


def _repeat_interleave(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    if a["dim"] is None:
        raise InputError(
            f"node {n.name!r}: repeat_interleave without a dimension cannot be exported; accepted: with one"
        )
    times = t.number(a["repeats"], n)
    index = t.ints([i // times for i in range(_known(t, a["self"], a["dim"], n) * times)], f"{n.name}.index")
    return t.graph.op("Gather", [t.names[a["self"]], index], n.name, axis=a["dim"])


def _where(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    x, y = (t.value(a[k], _result(t, n), n.name) for k in ("self", "other"))
    return t.graph.op("Where", [t.names[a["condition"]], x, y], n.name)


def _masked_fill(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    x, y = (t.value(a[k], _result(t, n), n.name) for k in ("self", "value"))
    return t.graph.op("Where", [t.names[a["mask"]], y, x], n.name)


def _lookup(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return t.graph.op("Gather", [t.names[a["weight"]], t.names[a["indices"]]], n.name, axis=0)


def _batch_norm(t: Walk, n: fx.Node, a: dict[str, Any]) -> Any:
    if a.get("training"):
        raise InputError(f"node {n.name!r}: batch normalization in training mode cannot be exported; accepted: eval()")
    channels = _known(t, a["input"], 1, n)
    parameters = [
        t.graph.constant(np.full(channels, fill), f"{n.name}.{key}") if a[key] is None else t.names[a[key]]
        for key, fill in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1))
    ]
    y = t.graph.op("BatchNormalization", [t.names[a["input"]], *parameters], n.name, epsilon=float(a["eps"]))
    return [y] if t.facts[n].parts else y


def _layer_norm(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    shape = a["normalized_shape"]
    weight = t.graph.constant(np.ones(shape), f"{n.name}.weight") if a["weight"] is None else t.names[a["weight"]]
    inputs = [t.names[a["input"]], weight, *([] if a["bias"] is None else [t.names[a["bias"]]])]
    return t.graph.op("LayerNormalization", inputs, n.name, axis=-len(shape), epsilon=float(a["eps"]))


def _group_norm(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    """Layer normalization over each group, then a factor and a bias for each channel."""
    shape, groups = t.shape(a["input"]), a["num_groups"]
    channels = _known(t, a["input"], 1, n)
    size = channels // groups * math.prod(_known(t, a["input"], d, n) for d in range(2, len(shape)))
    x = t.reshaped(t.names[a["input"]], (None, groups, size), f"{n.name}.groups")
    ones = t.graph.constant(np.ones(size), f"{n.name}.ones")
    x = t.graph.op("LayerNormalization", [x, ones], f"{n.name}.normalized", axis=-1, epsilon=float(a["eps"]))
    x = t.reshaped(x, shape, f"{n.name}.channels")
    for key, kind in (("weight", "Mul"), ("bias", "Add")):
        if a[key] is not None:
            factor = t.reshaped(t.names[a[key]], (channels, *(1,) * (len(shape) - 2)), f"{n.name}.{key}")
            x = t.graph.op(kind, [x, factor], f"{n.name}.{kind.lower()}")
    return x


def _upsample(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    have, want = t.shape(a["input"])[2:], t.shape(n)[2:]
    if None in have or None in want or any(w % h for h, w in zip(have, want, strict=True)):  # type: ignore[operator]
        raise InputError(
            f"node {n.name!r}: upsampling from {have} to {want} cannot be exported; accepted: whole factors"
        )
    factors = [1.0, 1.0, *(w / h for h, w in zip(have, want, strict=True))]  # type: ignore[operator]
    scales = t.graph.constant(factors, f"{n.name}.scales")
    options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return t.graph.op("Resize", [t.names[a["input"]], "", scales], n.name, **options)


def _size(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    dim = a["dim"] % len(t.shape(a["self"]))
    return t.graph.op("Shape", [t.names[a["self"]]], n.name, start=dim, end=dim + 1)


_TABLE: dict[Any, Operation] = {
    aten.add.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    **dict.fromkeys((aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar), _binary("Pow")),
    aten.rsub.Scalar: _rsub,
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), _comparison("Equal")),
    **dict.fromkeys((aten.ne.Tensor, aten.ne.Scalar), _comparison("Equal", negated=True)),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _comparison("Less")),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _comparison("LessOrEqual")),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _comparison("Greater")),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _comparison("GreaterOrEqual")),
    **dict.fromkeys((aten.logical_not.default, aten.bitwise_not.default), _logical("Not")),
    **dict.fromkeys((aten.logical_and.default, aten.__and__.Tensor), _logical("And")),
    **dict.fromkeys((aten.logical_or.default, aten.__or__.Tensor), _logical("Or")),
    **{
        getattr(aten, name).default: _unary(kind)
        for name, kind in {
            "neg": "Neg", "abs": "Abs", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "erf": "Erf", "sin": "Sin",
            "cos": "Cos", "floor": "Floor", "ceil": "Ceil", "round": "Round", "reciprocal": "Reciprocal",
            "relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid", "hardswish": "HardSwish",
        }.items()
    },
    aten.leaky_relu.default: _unary("LeakyRelu", alpha="negative_slope"),
    aten.gelu.default: _unary("Gelu", approximate="approximate"),
    aten.rsqrt.default: _rsqrt,
    **dict.fromkeys(
        (aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default), _clamp
    ),
    aten.relu6.default: _relu6,
    aten.silu.default: _silu,
    aten.mish.default: _mish,
    aten.elu.default: _elu,
    aten.hardsigmoid.default: _hardsigmoid,
    aten.softplus.default: _softplus,
    aten.prelu.default: _prelu,
    **dict.fromkeys((aten.softmax.int, aten.log_softmax.int), _softmax),
    **dict.fromkeys((aten.mean.dim, aten.mean.default), _reduce("ReduceMean")),
    **dict.fromkeys((aten.sum.dim_IntList, aten.sum.default), _reduce("ReduceSum")),
    aten.amax.default: _reduce("ReduceMax"),
    aten.amin.default: _reduce("ReduceMin"),
    aten.linalg_vector_norm.default: _norm2,
    aten.argmax.default: _argmax,
    aten.max.dim: _max_dim,
    **dict.fromkeys(
        (
            aten.max_pool1d.default, aten.max_pool2d.default, aten.avg_pool1d.default, aten.avg_pool2d.default,
        ),
        _pool,
    ),
    **dict.fromkeys((aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default), _adaptive_pool),
    aten.pad.default: _pad,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    **dict.fromkeys(
        (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default), _split
    ),
    operator.getitem: _getitem,
    **dict.fromkeys(
        (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int), _reshape
    ),
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    **dict.fromkeys((aten.permute.default, aten.transpose.int), _permute),
    aten.expand.default: _expand,
    aten.expand_as.default: _expand_as,
    **dict.fromkeys((
            aten.full.default, aten.zeros.default, aten.ones.default, aten.new_full.default, aten.new_zeros.default,
            aten.new_ones.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
        ),
        _full,
    ),
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    aten.embedding.default: _lookup,
    **dict.fromkeys((aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default), _batch_norm),
    aten.layer_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
    **dict.fromkeys((aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec), _upsample),
    **dict.fromkeys((aten.to.dtype, aten._to_copy.default), _cast),
    aten.clone.default: _identity,
    aten.sym_size.int: _size,
    operator.add: _size_arithmetic("Add"),
    operator.sub: _size_arithmetic("Sub"),
    operator.mul: _size_arithmetic("Mul"),
    operator.floordiv: _size_arithmetic("Div"),
    operator.mod: _size_arithmetic("Mod"),
}  # fmt: skip


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
