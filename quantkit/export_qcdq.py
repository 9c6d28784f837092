"""QCDQ: QuantizeLinear, Clip, DequantizeLinear with real scales, for integers of 2 to 8 bits.

The form in which Brevitas exports to plain ONNX tools: every number is held in 8 bits, and a Clip
before DequantizeLinear, of weights too, says how many of them are used (qonnx's `QCDQToQuant`
reads the width from it). Operators of opset 13 only. It differs from target `qdq-real`, which
stores up to 4 bits as 4-bit types of opset 21 and has neither Clip nor zero point on weights. With
the zero points, which qonnx requires, onnxruntime takes its 8-bit integer kernel: exact sums on
processors with VNNI and the like; by its documentation 8-bit ones may saturate on older x86.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from hwmodel import formats
from hwmodel.formats import Format, Int, Levels
from hwmodel.spec import PerGroup
from quantkit.errors import InputError
from quantkit.model import Model
from quantkit.onnx_formats import Graph
from quantkit.qlayers import ActQuant, QLayer
from quantkit.qtensor import QTensor, values_of


def carries(fmt: Format) -> bool:
    """Whether an 8-bit container and a Clip can express the format."""
    return (isinstance(fmt, Int) and 2 <= fmt.bits <= 8) or fmt == Levels("ternary")


def check(model: Model) -> None:
    """Raise InputError, naming the layer and what is accepted, for what QCDQ cannot carry."""
    for name, layer in model.quantizers().items():
        q = layer.uniform if isinstance(layer, QLayer) else None
        sides = (
            ("weights", None if q is None else q.fmt),
            ("inputs", None if layer.act is None else layer.act.fmt),
        )
        for kind, fmt in sides:
            if fmt is not None and not carries(fmt):
                raise InputError(
                    f"layer {name!r}: target qcdq cannot carry {kind} {fmt}; accepted: int2..int8, uint2..uint8, "
                    "narrow or not, ternary (minifloats and binary: target qdq or qonnx)"
                )
        if q is not None and isinstance(q.granularity, PerGroup):
            raise InputError(
                f"layer {name!r}: target qcdq cannot carry weight scales per {q.granularity}; "
                "accepted: one per tensor or row (groups: target qdq)"
            )


def quantizer(graph: Graph, x: str, act: ActQuant, name: str) -> str:
    """Quantize the float value `x`: real values."""
    kind = TensorProto.INT8 if formats.is_signed(act.fmt) else TensorProto.UINT8
    scale = graph.constant(np.float32(act.scale), f"{name}.scale")
    zero = graph.constant(0, f"{name}.zero", kind)
    codes = graph.op("QuantizeLinear", [x, scale, zero], f"{name}.codes")
    return graph.op("DequantizeLinear", [_clip(graph, codes, act.fmt, kind, name), scale, zero], f"{name}.values")


def weight(graph: Graph, q: QTensor, name: str) -> str:
    """A stored weight, 8-bit codes, decoded to real values of shape `q.shape`."""
    kind = TensorProto.INT8 if formats.is_signed(q.fmt) else TensorProto.UINT8
    stored = graph.constant(values_of(q).numpy().reshape(q.shape), f"{name}.codes", kind)
    codes = _clip(graph, stored, q.fmt, kind, name, always=True)  # qonnx 1.0 fails on bare codes with scales per row
    per_row = q.scale.numel() > 1
    scale = graph.constant(q.scale[:, 0].numpy() if per_row else q.scale.numpy()[0, 0], f"{name}.scale")
    zero = graph.constant(np.zeros(len(q.scale)) if per_row else 0, f"{name}.zero", kind)
    axis: dict[str, Any] = {"axis": 0} if per_row else {}
    return graph.op("DequantizeLinear", [codes, scale, zero], f"{name}.values", **axis)


def _clip(graph: Graph, codes: str, fmt: Format, kind: int, name: str, *, always: bool = False) -> str:
    low, high = int(formats.min_value(fmt)), int(formats.max_value(fmt))
    if not always and (low, high) in ((-128, 127), (0, 255)):
        return codes
    bounds = [graph.constant(low, f"{name}.low", kind), graph.constant(high, f"{name}.high", kind)]
    return graph.op("Clip", [codes, *bounds], f"{name}.clipped")
