"""Formats and scales of the quantizers in an ONNX file.

They are QuantizeLinear with Clip, Quant, BipolarQuant, FloatQuant, and `quantkit export`'s minifloat functions. Stored
integers without a Clip get the narrowest format that holds them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hwmodel.formats import BINARY, TERNARY, Float, Format, FormatError, Int, max_value, min_value, parse, unit
from hwmodel.onnx_graph import SHAPING, Graph, Node, constant_of, value_above
from hwmodel.reference import to_units

WIDTHS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16}


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


def input_quantizer(graph: Graph, node: Node) -> tuple[Quantized | None, bool]:
    """The quantizer of a product's input, None for floats, and whether factors per channel come before it."""
    found = quantizer_of(graph, node, node.inputs[0])
    return found, found is not None and value_above(graph, found.source)[1]


def quantizer_of(graph: Graph, layer: Node, name: str) -> Quantized | None:
    """The quantizer that makes a value."""
    clipped: tuple[float, float] | None = None
    while (node := graph.made.get(name)) is not None:
        ends = [None if not end else constant_of(graph, end) for end in node.inputs[1:]]
        if node.op in (*SHAPING, "MaxPool") or (node.op == "Mul" and ends[0] is not None):
            name = node.inputs[0]
        elif node.op == "Clip" and None not in ends and _is_quantized(graph, node.inputs[0]):
            clipped = (float(ends[0]), float(ends[1]))  # type: ignore[arg-type]
            name = node.inputs[0]
        elif node.op == "Slice" and len(ends) > 1 and ends[1] is not None:  # the last block of a row is filled up
            found = quantizer_of(graph, layer, node.inputs[0])
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
    scale = constant_of(graph, node.inputs[1])
    bounds = None
    source, before = node.inputs[0], graph.made.get(node.inputs[0])
    if before is not None and before.op == "Clip":
        ends = [constant_of(graph, name) for name in before.inputs[1:]]
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
    real = constant_of(graph, before.inputs[1])
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
    scale = constant_of(graph, node.inputs[1])
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
    facts = [constant_of(graph, name) for name in node.inputs[1:]]
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
    stored = constant_of(graph, node.inputs[0])
    if stored is not None:
        return Quantized(fmt, scale, node.inputs[0], np.rint(stored / (scale * unit(fmt))) * unit(fmt))
    before = graph.made.get(node.inputs[0])
    if before is not None and before.op == "Div":
        divisor = constant_of(graph, before.inputs[1])
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
