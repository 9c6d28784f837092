"""Layer specifications of a quantized ONNX file: QDQ, QCDQ or QONNX, a chain of Gemm, MatMul and Conv.

A file of `quantkit export` says in its metadata (`hardware`) what its layers are in Verilog: exact arithmetic, steps
without weights, the gates of recurrent cells. That is believed where its products are those of the file. Of any other:

A layer's formats are read from the quantizers before its input and its weight: QuantizeLinear with Clip, Quant,
BipolarQuant, FloatQuant, and `quantkit export`'s minifloat functions. Stored integers without a Clip get the
narrowest format that holds them. The accumulator is exact for the weights in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel.accumulator import exact_bits, signed_bits, unit_range
from hwmodel.cost import HwError
from hwmodel.formats import BINARY, TERNARY, Float, Format, FormatError, Int, max_value, min_value, parse, unit
from hwmodel.reference import to_units
from hwmodel.spec import CELL_GATES, Activation, Granularity, LayerSpec, PerGroup, PerRow, PerTensor, Window

ACTIVATIONS: dict[str, Activation] = {
    "Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid", "Elu": "elu", "LeakyRelu": "leaky_relu", "Gelu": "gelu",
    "Clip": "hardtanh",
}  # fmt: skip
SHAPING = ("Cast", "Flatten", "Reshape", "Identity", "Transpose", "Unsqueeze", "Squeeze")
PRODUCTS = ("Gemm", "MatMul", "Conv")
WIDTHS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16}


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


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantizer found: format, real step of its codes' scale, what it reads, and for weights their grid values.

    block: columns of a weight that share a scale, where the file says so.
    """

    fmt: Format
    scale: np.ndarray
    source: str
    values: np.ndarray | None = None
    block: int | None = None


def read_onnx(path: Path) -> list[LayerSpec]:
    """One spec per product, in order; `HwError` names the file, and the layer, that is no such chain.

    All have windows where there are convolutions and the file tells every map.
    """
    graph = _load(path)
    products = [node for node in graph.nodes if node.op in PRODUCTS]
    if not products:
        raise HwError(f"{path} has no layers; expected a chain of {', '.join(PRODUCTS)} with quantizers")
    inputs = [_input(graph, node) for node in products]
    if (told := _told(graph, products, inputs)) is not None:
        return told
    specs = []
    for i, node in enumerate(products):
        follower, end = _behind(graph, node)
        spec = _spec(graph, node, inputs[i], follower)
        if i + 1 < len(products):
            quantizer, factors = inputs[i + 1]
            if quantizer is None:
                raise graph.fail(products[i + 1], "its input is not quantized; expected a quantizer before it")
            if _above(graph, quantizer.source)[0] != end:
                raise graph.fail(products[i + 1], f"it does not follow {layer_name(node)!r} alone; expected a chain")
            pow2 = spec.scale_pow2 and _pow2(quantizer.scale)
            spec = replace(spec, out=quantizer.fmt, out_factors=factors, scale_pow2=pow2)
        else:
            spec = replace(spec, scale_pow2=False)
        specs.append(spec)
    windows = [_window(graph, node, spec) for node, spec in zip(products, specs, strict=True)]
    pools = [_pools(graph, node, spec) for node, spec in zip(products, specs, strict=True)]
    if None in windows or None in pools or all(node.op != "Conv" for node in products):
        return specs
    found: list[LayerSpec] = []
    for spec, window, before in zip(specs, windows, pools, strict=True):
        found += [*(before or ()), replace(spec, window=window)]
    return found


def _pools(graph: Graph, node: Node, spec: LayerSpec) -> list[LayerSpec] | None:
    """The maxima over windows between a product and the one before it, as layers that give its input's codes.

    None where no hardware here follows one.
    """
    found: list[LayerSpec] = []
    for above in _ascent(graph, node):
        if above.op != "MaxPool":
            continue
        dims, facts = graph.shapes.get(above.inputs[0], ()), above.facts
        window = None if facts.get("ceil_mode") else _moving(dims, facts)
        if window is None or spec.act is None:
            return None
        acc_bits = signed_bits(*unit_range(spec.act))
        found.append(LayerSpec(
            layer_name(above), "max", window.channels, math.prod(window.kernel), window.out_height * window.out_width,
            Int(1, signed=False), spec.act, spec.act, PerTensor(), acc_bits=acc_bits, groups=window.channels,
            window=window,
        ))  # fmt: skip
    return found[::-1]


def _moving(dims: Sequence[int | None], facts: dict[str, Any]) -> Window | None:
    """The window of a node's attributes over a map of these sizes, batch first; a signal is a map of width 1.

    None where the file does not tell it, or no hardware here follows it.
    """
    kernel = tuple(facts.get("kernel_shape", ()))
    axes = len(kernel)
    sizes = [size for size in dims[1:] if size is not None]
    gaps = any(d != 1 for d in facts.get("dilations", ()))
    if axes not in (1, 2) or len(dims) != axes + 2 or len(sizes) != axes + 1 or gaps:
        return None
    if facts.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    pads, strides = facts.get("pads", (0,) * 2 * axes), facts.get("strides", (1,) * axes)
    (top, *left), (bottom, *right) = pads[:axes], pads[axes:]
    channels, height, width = (*sizes, 1)[:3]
    window = Window(
        channels, height, width, (*kernel, 1)[:2], (*strides, 1)[:2], (top, bottom, *(left or [0]), *(right or [0]))
    )  # type: ignore[arg-type]
    fits = all(pad < kernel[axis] for axis in range(axes) for pad in (pads[axis], pads[axes + axis]))
    return window if fits else None


def _ascent(graph: Graph, node: Node) -> Iterator[Node]:
    """The nodes from a product's input up to the product before it, nearest first."""
    name = node.inputs[0]
    while (above := graph.made.get(name)) is not None and above.op not in PRODUCTS:
        yield above
        name = next((n for n in above.inputs if _constant(graph, n) is None), "")


def _told(
    graph: Graph, products: Sequence[Node], inputs: Sequence[tuple[Quantized | None, bool]]
) -> list[LayerSpec] | None:
    """The layers that the file says it is in hardware, sums, means and pools among them; None where it says nothing, or
    its products are others."""
    try:
        specs = [LayerSpec.from_json(record) for record in json.loads(graph.facts["hardware"])]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    weighted = [one for spec in specs if not spec.joint and not spec.pool for one in _products(spec)]
    if len(weighted) != len(products):
        return None
    found = [_spec(graph, node, entry, "none") for node, entry in zip(products, inputs, strict=True)]
    keys = ("op", "out_features", "in_features", "positions", "groups", "weight", "act", "acc_bits")
    alike = all(getattr(a, key) == getattr(b, key) for a, b in zip(weighted, found, strict=True) for key in keys)
    return specs if alike else None


def _products(spec: LayerSpec) -> list[LayerSpec]:
    """A layer's products as linear layers: of a recurrent cell those of all gates with its input and with its state."""
    if spec.recurrence is None:
        return [spec]
    rows, state = CELL_GATES[spec.op] * spec.out_features, spec.recurrence
    inputs = replace(spec, op="linear", out_features=rows, recurrence=None)
    return [inputs, replace(inputs, in_features=spec.out_features, act=state.state, acc_bits=state.acc_bits)]


def layer_name(node: Node) -> str:
    """The node's name without the ending that `quantkit export` gives its product.

    >>> layer_name(Node("net.fc1.acc", "Gemm", (), "y", {}))
    'net.fc1'
    """
    name = node.name or node.output
    return name[:-4] if name.endswith((".acc", "_acc")) else name


def _load(path: Path) -> Graph:
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


def _constant(graph: Graph, name: str) -> np.ndarray | None:
    """A constant, through casts and reshapes; None if the value is computed."""
    while (node := graph.made.get(name)) is not None and node.op in SHAPING:
        name = node.inputs[0]
    return graph.constants.get(name)


def _above(graph: Graph, name: str) -> tuple[str, bool]:
    """The value under shaping, divisions by one scale and factors per channel; and whether there were such factors."""
    factors = False
    while (node := graph.made.get(name)) is not None:
        if node.op in SHAPING:
            name = node.inputs[0]
        elif node.op in ("Mul", "Div") and len(node.inputs) == 2:
            sides = [_constant(graph, side) for side in node.inputs]
            if (sides[0] is None) == (sides[1] is None):
                break
            constant = sides[1] if sides[0] is None else sides[0]
            factors |= constant is not None and constant.size > 1
            name = node.inputs[0 if sides[0] is None else 1]
        else:
            break
    return name, factors


def _input(graph: Graph, node: Node) -> tuple[Quantized | None, bool]:
    """The quantizer of a product's input, None for floats, and whether factors per channel come before it."""
    found = _quantizer(graph, node, node.inputs[0])
    return found, found is not None and _above(graph, found.source)[1]


def _quantizer(graph: Graph, layer: Node, name: str) -> Quantized | None:
    """The quantizer that makes a value."""
    clipped: tuple[float, float] | None = None
    while (node := graph.made.get(name)) is not None:
        ends = [None if not end else _constant(graph, end) for end in node.inputs[1:]]
        if node.op in (*SHAPING, "MaxPool") or (node.op == "Mul" and ends[0] is not None):
            name = node.inputs[0]
        elif node.op == "Clip" and None not in ends and _is_quantized(graph, node.inputs[0]):
            clipped = (float(ends[0]), float(ends[1]))  # type: ignore[arg-type]
            name = node.inputs[0]
        elif node.op == "Slice" and len(ends) > 1 and ends[1] is not None:  # the last block of a row is filled up
            found = _quantizer(graph, layer, node.inputs[0])
            if found is None or found.values is None:
                return None
            return replace(found, values=found.values[:, : int(ends[1].item())])
        elif node.op == "DequantizeLinear":
            return _integers(graph, layer, node, clipped)
        elif node.op.startswith(("Quantize", "Dequantize")) and len(node.inputs) == 2:
            return _minifloat(graph, layer, node)
        elif node.op in ("Quant", "BipolarQuant", "FloatQuant"):
            return _qonnx(graph, layer, node)
        else:
            return None
    return None


def _is_quantized(graph: Graph, name: str) -> bool:
    node = graph.made.get(name)
    return node is not None and node.op in ("QuantizeLinear", "DequantizeLinear")


def _integers(graph: Graph, layer: Node, node: Node, clipped: tuple[float, float] | None) -> Quantized:
    """QuantizeLinear, perhaps Clip, and DequantizeLinear; or stored integers and DequantizeLinear.

    clipped: bounds of a Clip behind, in units of the scale there.
    """
    scale = _constant(graph, node.inputs[1])
    bounds = None
    source, before = node.inputs[0], graph.made.get(node.inputs[0])
    if before is not None and before.op == "Clip":
        ends = [_constant(graph, name) for name in before.inputs[1:]]
        if len(ends) != 2 or ends[0] is None or ends[1] is None:
            raise graph.fail(layer, "the Clip of a quantizer needs two constant bounds")
        bounds = (float(ends[0]), float(ends[1]))
        source, before = before.inputs[0], graph.made.get(before.inputs[0])
    if scale is None:
        raise graph.fail(layer, "the scale of a quantizer is computed; expected a constant")
    if (stored := graph.constants.get(source)) is not None:
        values = stored.astype(np.float64)
        fmt = _narrowest(values) if bounds is None else _of_range(graph, layer, *bounds)
        return Quantized(fmt, scale, source, values, node.facts.get("block_size") or None)
    if before is None or before.op != "QuantizeLinear":
        raise graph.fail(layer, "DequantizeLinear reads neither stored integers nor QuantizeLinear")
    real = _constant(graph, before.inputs[1])
    if real is None or real.size != 1:
        raise graph.fail(layer, "its input has more than one scale; expected one per tensor")
    kind = graph.types.get(before.inputs[2], "uint8") if len(before.inputs) > 2 else "uint8"
    if any(
        (zero := graph.constants.get(n.inputs[2])) is not None and zero.any() for n in (before, node) if n.inputs[2:]
    ):
        raise graph.fail(layer, "a zero point that is not 0; symmetric quantization is accepted")
    if clipped is not None:
        bounds = (round(clipped[0] / float(scale)), round(clipped[1] / float(scale)))
    if bounds is None:
        return Quantized(Int(WIDTHS[kind], signed=kind[0] == "i"), real, before.inputs[0])
    return Quantized(_of_range(graph, layer, *bounds), real, before.inputs[0])


def _minifloat(graph: Graph, layer: Node, node: Node) -> Quantized:
    """`Quantize<FORMAT>` of a value or `Dequantize<FORMAT>` of stored bit patterns."""
    verb = "Dequantize" if node.op.startswith("Dequantize") else "Quantize"
    try:
        fmt = parse(node.op.removeprefix(verb).lower())
    except FormatError as error:
        raise graph.fail(layer, str(error)) from None
    scale = _constant(graph, node.inputs[1])
    if scale is None:
        raise graph.fail(layer, "the scale of a quantizer is computed; expected a constant")
    if verb == "Quantize":
        return Quantized(fmt, scale, node.inputs[0])
    codes = graph.constants[node.inputs[0]].astype(np.int64)
    values = to_units(codes, fmt) * unit(fmt)
    matrix, size = values.reshape(len(codes), -1), codes.shape[2] if codes.ndim == 3 else None
    return Quantized(fmt, scale[..., 0] if scale.ndim == 3 else scale, node.inputs[0], matrix, size)


def _qonnx(graph: Graph, layer: Node, node: Node) -> Quantized:
    """A quantizer of QONNX; a division by a scale before it belongs to it."""
    facts = [_constant(graph, name) for name in node.inputs[1:]]
    if any(fact is None for fact in facts):
        raise graph.fail(layer, f"{node.op} needs constant scale, zero point and width")
    scale, *rest = [np.asarray(fact, np.float64) for fact in facts]
    match node.op:
        case "BipolarQuant":
            fmt: Format = BINARY
        case "FloatQuant":
            special = "ieee" if node.facts.get("has_inf") else "fn" if node.facts.get("has_nan") else "none"
            fmt = Float(int(rest[0]), int(rest[1]), special)  # type: ignore[arg-type]
        case _:
            if rest[0].any():
                raise graph.fail(layer, "a zero point that is not 0; symmetric quantization is accepted")
            signed, narrow = bool(node.facts.get("signed", 1)), bool(node.facts.get("narrow", 0))
            width = int(rest[1])
            fmt = TERNARY if (width, signed, narrow) == (2, True, True) else Int(width, signed, narrow)
    stored = _constant(graph, node.inputs[0])
    if stored is not None:
        return Quantized(fmt, scale, node.inputs[0], np.rint(stored / (scale * unit(fmt))) * unit(fmt))
    before = graph.made.get(node.inputs[0])
    if before is not None and before.op == "Div":
        divisor = _constant(graph, before.inputs[1])
        if divisor is not None and divisor.size == 1:
            return Quantized(fmt, scale * divisor, before.inputs[0])
    return Quantized(fmt, scale, node.inputs[0])


def _narrowest(values: np.ndarray) -> Format:
    """The format with the fewest codes that holds stored integers: binary, ternary, or signed integers."""
    found = set(np.unique(values).tolist())
    if found <= {-1.0, 1.0}:
        return BINARY
    if found <= {-1.0, 0.0, 1.0}:
        return TERNARY
    low, high = min(found), max(found)
    return next((Int(b) for b in range(2, 9) if -(2 ** (b - 1)) <= low and high < 2 ** (b - 1)), Int(16))


def _of_range(graph: Graph, layer: Node, low: float, high: float) -> Format:
    if (low, high) == (-1, 1):
        return TERNARY
    widths = (*range(2, 9), 16)
    choices = [Int(b, signed, narrow) for b in widths for signed in (True, False) for narrow in (False, True)]
    for fmt in [Int(1), Int(1, signed=False), *choices]:
        if (min_value(fmt), max_value(fmt)) == (low, high):
            return fmt
    raise graph.fail(
        layer, f"codes of {low:g} .. {high:g} are those of no format; accepted: int1..int16, uint1..uint16"
    )


def _behind(graph: Graph, node: Node) -> tuple[Activation, str]:
    """The activation behind a product with its gain and bias, and the value that leaves it."""
    name, activation, biased = node.output, "none", node.op == "Gemm" and len(node.inputs) > 2
    while True:
        users = graph.used.get(name, [])
        kinds = {user.op for user in users}
        if len(users) == 2 and kinds == {"Mul", "Sigmoid"}:
            user = next(u for u in users if u.op == "Mul")
            activation, name = "silu", user.output
            continue
        if len(users) != 1:
            break
        (user,) = users
        sides = [_constant(graph, side) for side in user.inputs]
        if user.op in SHAPING or (
            user.op in ("Mul", "Add")
            and activation == "none"
            and not biased
            and any(side is not None for side in sides)
        ):
            biased = biased or user.op == "Add"
            name = user.output
        elif user.op in ACTIVATIONS and activation == "none":
            activation, name = ACTIVATIONS[user.op], user.output
        elif user.op == "MaxPool":
            name = user.output
        else:
            break
    return activation, _above(graph, name)[0] if graph.made[name].op in SHAPING else name  # type: ignore[return-value]


def _gain(graph: Graph, node: Node) -> np.ndarray:
    """What the sum is multiplied by: 1 where nothing is."""
    name = node.output
    for user in graph.used.get(name, []):
        if user.op == "Cast":
            return _gain(graph, user)
        if user.op == "Mul":
            for side in user.inputs:
                if side != name and (constant := _constant(graph, side)) is not None:
                    return constant.astype(np.float64)
    return np.ones(1)


def _spec(graph: Graph, node: Node, entry: tuple[Quantized | None, bool], follower: Activation) -> LayerSpec:
    conv = node.op == "Conv"
    quantized = _quantizer(graph, node, node.inputs[1])
    stored = quantized.values if quantized is not None else _constant(graph, node.inputs[1])
    if stored is None:
        raise graph.fail(node, "its weight is computed; expected a constant")
    across = node.op == "MatMul" or (node.op == "Gemm" and not node.facts.get("transB"))
    matrix = stored.T if across else stored.reshape(len(stored), -1)
    positions = _positions(graph, node) if conv else 1
    act = None if entry[0] is None else entry[0].fmt
    common = LayerSpec(
        layer_name(node), "conv2d" if conv else "linear", len(matrix), matrix.shape[1], positions, act=act,
        activation=follower, groups=int(node.facts.get("group", 1)), zeros=float((matrix == 0).mean()),
    )  # fmt: skip
    if quantized is None:
        return common
    units = np.rint(matrix / unit(quantized.fmt)).astype(np.int64)
    gain = _gain(graph, node)
    acc_bits, pow2 = None, False
    if entry[0] is not None:
        acc_bits = int(exact_bits(units, entry[0].fmt).max())
        pow2 = _pow2(entry[0].scale) and _pow2(gain) and _pow2(quantized.scale)
    scale = quantized.scale.T if across else quantized.scale
    scale = scale.reshape(len(scale), -1) if scale.ndim > 2 else scale
    granularity = _granularity(scale, gain, matrix.shape, quantized.block)
    return replace(common, weight=quantized.fmt, granularity=granularity, acc_bits=acc_bits, scale_pow2=pow2)


def _granularity(scale: np.ndarray, gain: np.ndarray, shape: tuple[int, ...], block: int | None) -> Granularity:
    """From the weight's scales, as many as its rows or columns need, and the factors behind the sum."""
    if scale.ndim == 2 and scale.shape[1] == shape[1] and shape[1] > 1:  # written out for every column
        changes = np.flatnonzero((scale[:, 1:] != scale[:, :-1]).any(axis=0)) + 1
        return PerGroup(math.gcd(*changes.tolist())) if len(changes) else PerRow()
    if scale.ndim == 2 and scale.shape[1] > 1:
        return PerGroup(block or shape[1] // scale.shape[1])
    return PerRow() if scale.size > 1 or gain.size > 1 else PerTensor()


def _window(graph: Graph, node: Node, spec: LayerSpec) -> Window | None:
    """The map that a product reads; None where it is not in the file or no hardware here follows it.

    Of a product behind a convolution or a maximum whose whole map it reads, this map.
    """
    if isinstance(spec.granularity, PerGroup):
        return None
    if node.op != "Conv":
        names = [name for above in _ascent(graph, node) for name in (above.output, *above.inputs)]
        for name in [node.inputs[0], *names]:
            known = [size for size in graph.shapes.get(name, ())[1:] if size is not None]
            if len(known) in (2, 3) and math.prod(known) == spec.in_features:
                channels, height, width = (*known, 1)[:3]
                return Window(channels, height, width, (height, width))
        return Window(spec.in_features)
    return _moving(graph.shapes.get(node.inputs[0], ()), node.facts)


def _positions(graph: Graph, node: Node) -> int:
    dims = graph.shapes.get(node.output, ())[2:]
    if not dims or None in dims:
        raise graph.fail(node, "the height and width of its output are not in the file")
    return math.prod(d for d in dims if d is not None)


def _pow2(values: np.ndarray) -> bool:
    """Whether every value is a power of two."""
    return bool((np.frexp(np.abs(values.astype(np.float64)))[0] == 0.5).all())
