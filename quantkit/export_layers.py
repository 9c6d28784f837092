"""The ONNX nodes of one layer, for every target: quantized or not, with one input or, a product of activations, two.

The shapes that keep onnxruntime from changing the arithmetic are explained in `quantkit.export`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from onnx import TensorProto
from torch import Tensor, finfo, float32, float64, nn

from hwmodel import formats
from quantkit import export_qcdq, export_qonnx
from quantkit.attention import MatMul
from quantkit.bands import Bands
from quantkit.errors import InputError
from quantkit.onnx_blocks import block_quantizer
from quantkit.onnx_formats import Graph, conv_attributes, quantizer, weight
from quantkit.qlayers import ActQuant, BlockAct, Point, QLayer

Target = Literal["qdq", "qdq-real", "qcdq", "qonnx", "finn"]


def layer_nodes(graph: Graph, x: str, layer: nn.Module, name: str, to: Target, *, flatten: str = "") -> str:
    """Nodes of one layer in evaluation mode; the name of its output. A linear layer takes (batch, features).

    flatten: name of a Flatten before a quantized layer that is to come behind its quantizer, for target finn.
    """
    match layer:
        case QLayer() if layer.op == "embedding":
            return _lookup(graph, x, layer, name, to)
        case QLayer():
            if to == "qonnx" or to == "finn":
                return export_qonnx.layer_nodes(graph, x, layer, name, to=to, flatten=flatten)
            return _quantized(graph, x, layer, name, to)
        case nn.Linear():
            return graph.op("Gemm", [x, *_parameters(graph, layer, name)], f"{name}.out", transB=1)
        case nn.Conv1d() | nn.Conv2d() | nn.ConvTranspose2d():
            if layer.padding_mode != "zeros":
                raise InputError(
                    f"layer {name!r}: a convolution with padding mode {layer.padding_mode!r} cannot be exported; "
                    "accepted: zeros"
                )
            kind = "ConvTranspose" if isinstance(layer, nn.ConvTranspose2d) else "Conv"
            return graph.op(kind, [x, *_parameters(graph, layer, name)], f"{name}.out", **conv_attributes(layer))
        case nn.Embedding():
            table = graph.constant(layer.weight.detach().numpy(), f"{name}.weight")
            return graph.op("Gather", [table, x], f"{name}.out", axis=0)
        case nn.LayerNorm():
            axis = -len(layer.normalized_shape)
            parameters = _parameters(graph, layer, name)
            return graph.op("LayerNormalization", [x, *parameters], f"{name}.out", axis=axis, epsilon=layer.eps)
        case nn.RMSNorm():
            axes = graph.constant(range(-len(layer.normalized_shape), 0), f"{name}.axes", TensorProto.INT64)
            eps = graph.constant(finfo(float32).eps if layer.eps is None else layer.eps, f"{name}.eps")
            square = graph.op("ReduceMean", [graph.op("Mul", [x, x], f"{name}.square"), axes], f"{name}.mean")
            root = graph.op("Sqrt", [graph.op("Add", [square, eps], f"{name}.shifted")], f"{name}.root")
            x = graph.op("Div", [x, root], f"{name}.normalized")
            return graph.op("Mul", [x, *_parameters(graph, layer, name)], f"{name}.out")
        case Point():
            return point_nodes(graph, x, layer, name, to)
        case nn.Flatten() if layer.start_dim == 1 and layer.end_dim == -1:
            return graph.op("Flatten", [x], f"{name}.out", axis=1)
        case nn.Identity() | nn.Dropout():
            return x
        case nn.ReLU():
            return graph.op("Relu", [x], f"{name}.out")
        case nn.Tanh():
            return graph.op("Tanh", [x], f"{name}.out")
        case nn.Sigmoid():
            return graph.op("Sigmoid", [x], f"{name}.out")
        case nn.ELU():
            return graph.op("Elu", [x], f"{name}.out", alpha=float(layer.alpha))
        case nn.LeakyReLU():
            return graph.op("LeakyRelu", [x], f"{name}.out", alpha=float(layer.negative_slope))
        case nn.GELU():
            return graph.op("Gelu", [x], f"{name}.out", approximate=layer.approximate)
        case nn.SiLU():
            return graph.op("Mul", [x, graph.op("Sigmoid", [x], f"{name}.gate")], f"{name}.out")
        case nn.Hardtanh():
            bounds = [graph.constant(layer.min_val, f"{name}.low"), graph.constant(layer.max_val, f"{name}.high")]
            return graph.op("Clip", [x, *bounds], f"{name}.out")
        case _:
            raise InputError(
                f"layer {name!r} ({type(layer).__name__}) cannot be exported; known: Linear, Conv1d, Conv2d, "
                "ConvTranspose2d, Embedding, LayerNorm, RMSNorm, Flatten from dimension 1, ReLU, Tanh, Sigmoid, ELU, "
                "LeakyReLU, GELU, SiLU, Hardtanh"
            )


def _parameters(graph: Graph, layer: nn.Module, name: str) -> list[str]:
    """The weight and, where there is one, the bias of a float layer as constants."""
    tensors = ((kind, getattr(layer, kind, None)) for kind in ("weight", "bias"))
    return [graph.constant(t.detach().numpy(), f"{name}.{kind}") for kind, t in tensors if t is not None]


def _quantized(graph: Graph, x: str, layer: QLayer, name: str, to: Target) -> str:
    real = to != "qdq"
    tail = (1,) * layer.spatial  # a per-channel factor against (batch, channels, ...)
    if layer.in_scale is not None:
        factor = layer.in_scale.detach().numpy().reshape(-1, *tail)
        x = graph.op("Mul", [x, graph.constant(factor, f"{name}.in_scale")], f"{name}.scaled")
    if layer.act is not None:
        x = _grid(graph, x, layer.act, f"{name}.input", to, layer.axis, layer.in_channels)
    w = _weight(graph, layer, f"{name}.weight", to, real=real)
    bias = layer.bias.detach().numpy()
    kernel = layer.kernel()
    wide = not real and layer.op == "linear" and kernel.weight.dtype == float64
    if wide:
        x = graph.op("Cast", [x], f"{name}.wide_input", to=TensorProto.DOUBLE)
        w = graph.op("Cast", [w], f"{name}.wide_weight", to=TensorProto.DOUBLE)
    if layer.op == "linear":
        acc = graph.op("Gemm", [x, w], f"{name}.acc", transB=1)
    elif layer.op == "conv_transpose2d":
        w = _turned(graph, w, layer, f"{name}.weight")
        acc = graph.op("ConvTranspose", [x, w], f"{name}.acc", **conv_attributes(layer))
    else:
        acc = graph.op("Conv", [x, w], f"{name}.acc", **conv_attributes(layer))
    if wide:
        acc = graph.op("Cast", [acc], f"{name}.sum", to=TensorProto.FLOAT)
    gain = None if real else kernel.gain
    if gain is not None:
        values = gain.numpy() if isinstance(gain, Tensor) else np.float32(gain)
        values = values.reshape(-1, *tail) if values.size > 1 else values.reshape(())
        acc = graph.op("Mul", [graph.constant(values, f"{name}.gain"), acc], f"{name}.product")
    return graph.op("Add", [graph.constant(bias.reshape(-1, *tail), f"{name}.bias"), acc], f"{name}.out")


def _weight(graph: Graph, layer: QLayer, name: str, to: Target, *, real: bool) -> str:
    if layer.q is None or isinstance(layer.q, Bands):  # bands are held dense
        return graph.constant(layer.effective_weight().detach().numpy(), name)
    return export_qcdq.weight(graph, layer.q, name) if to == "qcdq" else weight(graph, layer.q, name, real=real)


def _turned(graph: Graph, w: str, layer: QLayer, name: str) -> str:
    """`quantkit.qlayers.turned` in nodes: (out, in / groups, *kernel) as (in, out / groups, *kernel)."""
    if layer.groups == 1:
        return graph.op("Transpose", [w], f"{name}.turned", perm=[1, 0, 2, 3])
    out, inner, *kernel = layer.weight.shape
    split = graph.constant([layer.groups, out // layer.groups, inner, *kernel], f"{name}.split", TensorProto.INT64)
    joined = graph.constant([layer.groups * inner, -1, *kernel], f"{name}.joined", TensorProto.INT64)
    w = graph.op(
        "Transpose", [graph.op("Reshape", [w, split], f"{name}.groups")], f"{name}.swapped", perm=[0, 2, 1, 3, 4]
    )
    return graph.op("Reshape", [w, joined], f"{name}.turned")


def _lookup(graph: Graph, x: str, layer: QLayer, name: str, to: Target) -> str:
    """An embedding: rows of codes times scales. Its bias, zero unless a method corrected it, is left out where zero."""
    table = _weight(graph, layer, f"{name}.weight", to, real=True)
    x = graph.op("Gather", [table, x], f"{name}.rows", axis=0)
    if not layer.bias.any():
        return x
    return graph.op("Add", [graph.constant(layer.bias.detach().numpy(), f"{name}.bias"), x], f"{name}.out")


def _grid(
    graph: Graph, x: str, act: ActQuant | BlockAct, name: str, to: Target, axis: int, channels: int | None
) -> str:
    """Quantize `x`: grid values for target qdq, real values for qdq-real and qcdq, and in blocks.

    Blocks lie along a negative axis of so many channels, None if they are not known here.
    """
    if isinstance(act, BlockAct):
        return block_quantizer(graph, x, act, name, axis=axis, channels=channels)
    if to == "qcdq":
        return export_qcdq.quantizer(graph, x, act, name)
    return quantizer(graph, x, act, name, real=to != "qdq")


def point_nodes(graph: Graph, x: str, point: Point, name: str, to: Target) -> str:
    """Nodes of a quantizer that gives real values, such as the one of a recurrent state."""
    if point.act is None:
        return x
    values, factor = _operand(graph, x, point, name, to, None)
    return values if factor == 1 else graph.op("Mul", [values, graph.constant(factor, f"{name}.scale")], f"{name}.real")


def _operand(graph: Graph, x: str, point: Point, name: str, to: Target, channels: int | None) -> tuple[str, float]:
    """A quantized operand and the factor that its values still lack; channels: numbers along the axis of its blocks."""
    if point.act is None:
        return x, 1.0
    if to == "qonnx" or to == "finn":
        assert isinstance(point.act, ActQuant)  # `export.check` has refused blocks
        return export_qonnx.input_values(graph, x, point.act, name, to=to)
    return _grid(graph, x, point.act, name, to, point.axis, channels), point.act.scale if to == "qdq" else 1.0


def matmul_nodes(graph: Graph, a: str, b: str, layer: MatMul, name: str, to: Target, terms: int) -> str:
    """Nodes of a product of two activations with sums of `terms` products.

    Between Casts to float64 where both are quantized: no sum is rounded, and onnxruntime puts in no integer kernel.
    Target qcdq leaves this kernel in, as for layers, and qonnx casts only sums that may exceed 2^24.
    """
    u, left = _operand(graph, a, layer.left, f"{name}.left", to, terms)
    v, right = _operand(graph, b, layer.right, f"{name}.right", to, terms)
    acts = layer.left.act, layer.right.act
    wide = acts[0] is not None and acts[1] is not None and to != "qcdq"
    if wide and to == "qonnx":
        wide = terms * formats.int_max(acts[0].fmt) * formats.int_max(acts[1].fmt) > 2**24  # type: ignore[union-attr]
    if wide:
        u = graph.op("Cast", [u], f"{name}.wide_left", to=TensorProto.DOUBLE)
        v = graph.op("Cast", [v], f"{name}.wide_right", to=TensorProto.DOUBLE)
    y = graph.op("MatMul", [u, v], f"{name}.acc")
    if wide:
        y = graph.op("Cast", [y], f"{name}.sum", to=TensorProto.FLOAT)
    if left * right == 1:
        return y
    return graph.op("Mul", [graph.constant(left * right, f"{name}.gain"), y], f"{name}.out")
