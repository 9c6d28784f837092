"""An ONNX file as nodes in plain values, and ways along them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel.cost import HwError

SHAPING = ("Cast", "Flatten", "Reshape", "Identity", "Transpose", "Unsqueeze", "Squeeze")
PRODUCTS = ("Gemm", "MatMul", "Conv")


@dataclass(frozen=True, slots=True)
class Node:
    """An ONNX node in plain values."""

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    facts: dict[str, Any]


@dataclass(slots=True)
class Graph:
    """Nodes by output and by input, constants, shapes as far as they are known, types of integer constants, and
    metadata."""

    path: Path
    nodes: list[Node] = field(default_factory=list)
    made: dict[str, Node] = field(default_factory=dict)
    used: dict[str, list[Node]] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    def fail(self, node: Node, problem: str) -> HwError:
        """The error that names file and layer."""
        return HwError(f"{self.path}: layer {layer_name(node)!r}: {problem}")


def layer_name(node: Node) -> str:
    """The node's name without the ending that `quantkit export` gives its product.

    >>> layer_name(Node("net.fc1.acc", "Gemm", (), "y", {}))
    'net.fc1'
    """
    name = node.name or node.output
    return name[:-4] if name.endswith((".acc", "_acc")) else name


def load(path: Path) -> Graph:
    """The graph of a file; `HwError` where it cannot be read."""
    try:
        import onnx
    except ImportError:
        raise HwError(f"{path}: reading ONNX needs the package onnx (pip install onnx)") from None
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path))
        model = onnx.shape_inference.infer_shapes(model)
    except (OSError, DecodeError, ValueError, RuntimeError) as error:
        raise HwError(f"{path} is no ONNX file that can be read: {' '.join(str(error).split())[:200]}") from None
    graph = Graph(path, facts={entry.key: entry.value for entry in model.metadata_props})
    for value in [*model.graph.input, *model.graph.value_info, *model.graph.output]:
        dims = value.type.tensor_type.shape.dim
        graph.shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)

    def keep(name: str, tensor: Any) -> None:
        graph.constants[name] = np.asarray(onnx.numpy_helper.to_array(tensor))
        graph.types[name] = onnx.TensorProto.DataType.Name(tensor.data_type).lower()

    for tensor in model.graph.initializer:
        keep(tensor.name, tensor)
    for proto in model.graph.node:
        facts = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
        if proto.op_type == "Constant" and "value" in facts:
            keep(proto.output[0], facts["value"])
            continue
        node = Node(proto.name, proto.op_type, tuple(proto.input), proto.output[0], facts)
        graph.nodes.append(node)
        graph.made[node.output] = node
        for name in node.inputs:
            graph.used.setdefault(name, []).append(node)
    return graph


def constant_of(graph: Graph, name: str) -> np.ndarray | None:
    """A constant, through casts and reshapes; None if the value is computed."""
    while (node := graph.made.get(name)) is not None and node.op in SHAPING:
        name = node.inputs[0]
    return graph.constants.get(name)


def value_above(graph: Graph, name: str) -> tuple[str, bool]:
    """The value under shaping, divisions by one scale and factors per channel; and whether there were such factors."""
    factors = False
    while (node := graph.made.get(name)) is not None:
        if node.op in SHAPING:
            name = node.inputs[0]
        elif node.op in ("Mul", "Div") and len(node.inputs) == 2:
            sides = [constant_of(graph, side) for side in node.inputs]
            if (sides[0] is None) == (sides[1] is None):
                break
            constant = sides[1] if sides[0] is None else sides[0]
            factors |= constant is not None and constant.size > 1
            name = node.inputs[0 if sides[0] is None else 1]
        else:
            break
    return name, factors


def ascent(graph: Graph, node: Node) -> Iterator[Node]:
    """The nodes from a product's input up to the product before it, nearest first."""
    name = node.inputs[0]
    while (above := graph.made.get(name)) is not None and above.op not in PRODUCTS:
        yield above
        name = next((n for n in above.inputs if constant_of(graph, n) is None), "")
