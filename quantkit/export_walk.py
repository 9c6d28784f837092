"""What a translation to ONNX knows of a captured graph: the facts of its nodes, and the names of their values.

What ONNX needs to know and a graph does not say (ranks, types, which dimensions depend on the batch) is observed:
the example runs once with a batch of 2 and once with 3. So a reshape is to constants and at most one -1, whatever
arithmetic on symbolic sizes stands in the graph, and what no input reaches becomes a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, fx

from quantkit.errors import InputError
from quantkit.export_layers import Target
from quantkit.onnx_formats import Graph

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


def facts_of(gm: fx.GraphModule, examples: Sequence[Tensor]) -> tuple[dict[fx.Node, Fact], dict[fx.Node, Tensor]]:
    """Facts by node, and the values of nodes that no input reaches; both from runs of each input's first example."""
    fixed = fixed_nodes(gm)
    runs = []
    for batch in (2, 3):
        seen: dict[fx.Node, Any] = {}
        recorder = _Recorder(gm, seen, fixed)
        with torch.no_grad():
            recorder.run(*(torch.cat([example[:1]] * batch) for example in examples))
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


def fixed_nodes(gm: fx.GraphModule) -> set[fx.Node]:
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

    def result(self, node: fx.Node) -> torch.dtype:
        """The dtype of what it gives, int64 of a size."""
        return self.facts[node].dtype or torch.int64

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
        if self.result(x) == dtype:
            return str(self.names[x])
        return self.graph.op("Cast", [self.names[x]], f"{name}.cast", to=TYPES[dtype])

    def number(self, x: Any, n: fx.Node) -> Any:
        """A number known at export, of an argument that ONNX takes as a constant only."""
        known = self.facts[x].number if isinstance(x, fx.Node) else x
        if isinstance(x, fx.Node) and known is None:
            raise InputError(f"node {n.name!r}: {n.target} by a size that depends on the batch cannot be exported")
        return known

    def known(self, node: Any, dim: int, n: fx.Node) -> int:
        """A dimension that must not depend on the batch, for the node `n`."""
        size = self.shape(node)[dim]
        if size is None:
            raise InputError(f"node {n.name!r}: its dimension {dim} depends on the batch; accepted: a fixed one")
        return size

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

    def output_shape(self, node: fx.Node) -> list[int | str | None]:
        """The shape of a node: "batch" for that dimension, None for another that depends on it."""
        fact = self.facts[node]
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


Operation = Callable[[Walk, fx.Node, dict[str, Any]], Any]
"""Takes the walk, the node and its arguments by name, appends nodes, and gives the name of the result."""
