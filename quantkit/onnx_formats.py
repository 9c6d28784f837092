"""Number formats in ONNX: quantizers and stored weights, from standard operators only.

An integer quantizer is QuantizeLinear, a Clip where the format has fewer codes than the type
that holds it, and DequantizeLinear. A minifloat quantizer is a model-local function: the
binade of |x / scale| is found by bisection over powers of two (multiply, compare, select: all
exact, where `floor(log2(x))` is not), and Round, which is half to even, rounds in units of the
binade's step. Minifloat weights are stored as bit patterns and looked up in a table.

Both quantizers give *grid values* unless `real` is asked for: the scale is left to whoever
multiplies the sum of products, as in `quantkit.qlayers`, so that the sum stays exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from hwmodel import formats
from hwmodel.formats import Block, Float, Format, Int, Levels
from hwmodel.spec import PerGroup
from quantkit.qlayers import ActQuant, QLayer
from quantkit.qtensor import QTensor, values_of

DOMAIN = "quantkit"
OPSET = 21  # the first with 4-bit types, 16-bit QuantizeLinear and blocked DequantizeLinear


@dataclass
class Graph:
    """A growing ONNX graph: nodes, constants, and the model-local functions they call.

    dot: what stands for the dots of layer names. four_bits: whether activations of 4 bits have a 4-bit type and
    not 8 bits with a Clip; onnxruntime moves quantizers over pooling and then lacks a pooling of 4-bit numbers.
    """

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    functions: dict[str, FunctionProto] = field(default_factory=dict)
    dot: str = "."
    four_bits: bool = True
    _names: set[str] = field(default_factory=set)

    def op(self, kind: str, inputs: list[str], name: str, *, domain: str = "", **attributes: Any) -> str:
        """Append one node; its output and the node itself are called `name`, numbered if that is taken."""
        output = self._fresh(name)
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def constant(self, values: Any, name: str, kind: int = TensorProto.FLOAT) -> str:
        """Store a constant of the given ONNX type; 4-bit types are packed two to a byte."""
        output = self._fresh(name)
        array = np.asarray(values).astype(helper.tensor_dtype_to_np_dtype(kind), order="C")
        self.initializers.append(numpy_helper.from_array(array, output))
        return output

    def call(self, function: FunctionProto, inputs: list[str], name: str) -> str:
        """Append a call of a model-local function, storing the function on first use."""
        self.functions.setdefault(function.name, function)
        return self.op(function.name, inputs, name, domain=DOMAIN)

    def _fresh(self, name: str) -> str:
        name = name.replace(".", self.dot)
        unique, number = name, 1
        while unique in self._names:
            number += 1
            unique = f"{name}_{number}"
        self._names.add(unique)
        return unique


_TYPES = {
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
    (16, True): TensorProto.INT16,
    (16, False): TensorProto.UINT16,
}


def quantizer(graph: Graph, x: str, act: ActQuant, name: str, *, real: bool = False) -> str:
    """Quantize the float value `x`: grid values of `act.fmt`, or those times the scale if `real`."""
    fmt = act.fmt
    scale = graph.constant(np.float32(act.scale), f"{name}.scale")
    if has_function(fmt):
        values = graph.call(quantize_function(fmt), [x, scale], f"{name}.values")
        return graph.op("Mul", [values, scale], f"{name}.real") if real else values
    native = graph.four_bits and fmt in (
        Int(4),
        Int(4, signed=False),
    )  # Clip knows 8 bits but not 4, so only full-range formats
    assert not isinstance(fmt, Block | Float)  # an element format has one scale, and minifloats are done
    width = 4 if native else 16 if formats.bits(fmt) == 16 else 8
    kind = _TYPES[width, formats.is_signed(fmt)]
    low, high = _range(fmt)
    zero = graph.constant(0, f"{name}.zero", kind)
    back = scale if real else graph.constant(1.0, f"{name}.one")
    codes = graph.op("QuantizeLinear", [x, scale, zero], f"{name}.codes")
    clips = (low, high) != _range(Int(width, formats.is_signed(fmt)))
    if clips and width == 8:
        bounds = [graph.constant(low, f"{name}.low", kind), graph.constant(high, f"{name}.high", kind)]
        codes = graph.op("Clip", [codes, *bounds], f"{name}.clipped")
    values = graph.op("DequantizeLinear", [codes, back, zero], f"{name}.values")
    if clips and width == 16:  # no Clip of 16-bit integers in onnxruntime: the same bounds on the floats
        unit = np.float32(act.scale if real else 1)
        bounds = [graph.constant(np.float32(v) * unit, f"{name}.{end}") for v, end in ((low, "low"), (high, "high"))]
        values = graph.op("Clip", [values, *bounds], f"{name}.clipped")
    return values


def conv_attributes(layer: nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | QLayer) -> dict[str, Any]:
    """Attributes of the Conv or ConvTranspose node of a convolution with zero padding."""
    attributes = {
        "strides": list(layer.stride),
        "pads": _pads(layer),
        "dilations": list(layer.dilation),
        "group": layer.groups,
        "kernel_shape": list(layer.weight.shape[2:]),
    }
    if isinstance(layer, nn.ConvTranspose2d) or (isinstance(layer, QLayer) and layer.op == "conv_transpose2d"):
        attributes["output_padding"] = list(layer.output_padding)
    return attributes


def _pads(layer: nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | QLayer) -> list[int]:
    """Zeros before every dimension, then behind; "same" pads an odd number one more behind, as torch does."""
    if not isinstance(layer.padding, str):
        return [*layer.padding, *layer.padding]
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.weight.shape[2:], strict=True)]
    if layer.padding == "valid":
        reach = [0] * len(reach)
    return [*(r // 2 for r in reach), *(r - r // 2 for r in reach)]


def _range(fmt: Int | Levels) -> tuple[int, int]:
    return int(formats.min_value(fmt)), int(formats.max_value(fmt))


def weight(graph: Graph, q: QTensor, name: str, *, real: bool = False) -> str:
    """A stored weight decoded to a float tensor of shape `q.shape`.

    Grid values where one scale per row or tensor can follow the sum of products; times the
    scales where it cannot (groups) or if `real`.
    """
    scaled = real or isinstance(q.granularity, PerGroup)
    scales = q.scale.numpy() if scaled else np.ones((1, 1), np.float32)
    if isinstance(q.fmt, Float):
        return _weight_codes(graph, q, q.fmt, scales, name)
    values = values_of(q).numpy().astype(np.int64)
    width = 4 if formats.bits(q.fmt) <= 4 else 8 if formats.bits(q.fmt) <= 8 else 16
    kind = _TYPES[width, formats.is_signed(q.fmt)]
    if scales.shape[1] > 1:
        stored = graph.constant(values, f"{name}.codes", kind)
        scale = graph.constant(scales, f"{name}.scale")
        assert isinstance(q.granularity, PerGroup)
        size = q.granularity.size
        real_values = graph.op("DequantizeLinear", [stored, scale], f"{name}.values", axis=1, block_size=size)
        return _reshape(graph, real_values, q.shape, values.shape, name)
    stored = graph.constant(values.reshape(q.shape), f"{name}.codes", kind)
    if scales.shape == (1, 1):
        scale = graph.constant(scales[0, 0], f"{name}.scale")
        return graph.op("DequantizeLinear", [stored, scale], f"{name}.values")
    scale = graph.constant(scales[:, 0], f"{name}.scale")
    return graph.op("DequantizeLinear", [stored, scale], f"{name}.values", axis=0)


def _weight_codes(graph: Graph, q: QTensor, fmt: Float, scales: np.ndarray, name: str) -> str:
    rows, columns = q.codes.shape
    kind = TensorProto.UINT4 if formats.bits(fmt) <= 4 else TensorProto.UINT8
    size = q.granularity.size if isinstance(q.granularity, PerGroup) else columns
    full = np.pad(q.codes.numpy(), ((0, 0), (0, -columns % size)))  # the last group of a row may be shorter
    blocks = (rows, full.shape[1] // size, size)
    codes = graph.constant(full.reshape(blocks), f"{name}.codes", kind)
    scale = graph.constant(scales[:, :, None], f"{name}.scale")
    values = graph.call(dequantize_function(fmt), [codes, scale], f"{name}.values")
    if full.shape == q.codes.shape:
        return _reshape(graph, values, q.shape, blocks, name)
    ends = {"from": 0, "to": columns, "axis": 1}
    bounds = [graph.constant([value], f"{name}.{key}", TensorProto.INT64) for key, value in ends.items()]
    values = graph.op("Slice", [_reshape(graph, values, full.shape, blocks, f"{name}.full"), *bounds], f"{name}.cut")
    return _reshape(graph, values, q.shape, q.codes.shape, name)


def _reshape(graph: Graph, x: str, shape: tuple[int, ...], have: tuple[int, ...], name: str) -> str:
    if tuple(shape) == tuple(have):
        return x
    return graph.op("Reshape", [x, graph.constant(list(shape), f"{name}.shape", TensorProto.INT64)], f"{name}.shaped")


def function_name(verb: str, fmt: Format) -> str:
    """Name of a format's model-local function.

    >>> function_name("Quantize", Float(4, 3, "fn"))
    'QuantizeE4M3FN'
    """
    text = str(fmt)
    return verb + (text.capitalize() if isinstance(fmt, Levels) else text.upper())


def has_function(fmt: Format | str) -> TypeGuard[Float | Levels]:
    """Whether rounding to a format is a function of its own; of the others Clip and Round are enough."""
    return isinstance(fmt, Float) or (isinstance(fmt, Levels) and fmt.name == "binary")


def quantize_function(fmt: Float | Levels) -> FunctionProto:
    """`y = Quantize<fmt>(x, scale)`: the grid value nearest to x / scale, ties to even, saturating.

    Equals `quantkit.rounding.round_to(x / scale, fmt)` on every float32; NaN stays NaN.
    """
    body = Body()
    u = body.op("Div", "x", "scale")
    if isinstance(fmt, Levels):  # binary
        zero = body.number(0.0)
        rest = body.op("Where", body.op("Less", u, zero), body.number(-1.0), u)  # NaN is left
        body.op("Where", body.op("GreaterOrEqual", u, zero), body.number(1.0), rest, output="y")
        return body.function(function_name("Quantize", fmt), ["x", "scale"])
    u = body.op("Clip", u, body.number(formats.min_value(fmt)), body.number(formats.max_value(fmt)))
    magnitude = body.op("Abs", u)
    lowest = formats.min_exponent(fmt)
    highest = math.frexp(formats.max_value(fmt))[1] - 1
    binade = body.number(2.0**lowest)
    for k in reversed(range(max(highest - lowest, 0).bit_length())):  # bisection: binade = 2^floor(log2 |u|)
        candidate = body.op("Mul", binade, body.number(2.0 ** (2**k)))
        binade = body.op("Where", body.op("GreaterOrEqual", magnitude, candidate), candidate, binade)
    step = body.op("Mul", binade, body.number(2.0**-fmt.man))
    body.op("Mul", body.op("Round", body.op("Div", u, step)), step, output="y")
    return body.function(function_name("Quantize", fmt), ["x", "scale"])


def dequantize_function(fmt: Float) -> FunctionProto:
    """`y = Dequantize<fmt>(codes, scale)`: the values of the bit patterns, times the broadcast scale."""
    body = Body()
    table = body.number([formats.decode(code, fmt) for code in range(2 ** formats.bits(fmt))])
    values = body.op("Gather", table, body.op("Cast", "codes", to=TensorProto.INT32))
    body.op("Mul", values, "scale", output="y")
    return body.function(function_name("Dequantize", fmt), ["codes", "scale"])


class Body:
    """The nodes of a model-local function with one output, `y`."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def number(self, value: float | list[float]) -> str:
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(value, np.float32)))

    def integers(self, values: list[int]) -> str:
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(values, np.int64)))

    def function(self, name: str, inputs: list[str]) -> FunctionProto:
        used = [helper.make_opsetid("", OPSET)]
        used += [helper.make_opsetid(DOMAIN, 1)] if any(node.domain for node in self.nodes) else []
        return helper.make_function(DOMAIN, name, inputs, ["y"], self.nodes, used)
