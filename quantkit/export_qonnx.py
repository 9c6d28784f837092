"""QONNX: the ONNX dialect of FINN, hls4ml and Brevitas, with its own quantizers of any width.

A quantizer is one node of domain `qonnx.custom_op.general`: `Quant(x, scale, zeropt, bitwidth)`
for integers and ternary (2 bits, narrow), `BipolarQuant(x, scale)` for binary, `FloatQuant` for
minifloats. Weights are float initializers behind such a node. Checked against qonnx 1.0 and
hls4ml 1.3, which run the file in their own code.

Two targets, which differ in where a scale that is no power of two is multiplied:

qonnx: outside the quantizers. Div by the activation scale before Quant (scale 1) and one Mul
    after the sum of products, as in `quantkit.qlayers`, so that the sum is of whole numbers and
    exact. A single power of two is exact anywhere and stays inside Quant, where hls4ml looks for it.
    Sums of minifloats beyond 2^24 units are taken in float64 (Cast); of integers in float32,
    since hls4ml knows no Cast, and are rounded there (int8 by int8: from about 1,000 inputs on).
finn: always inside Quant, as FINN's front end expects; refused unless FINN's rules hold
    (`check`). Products of scaled values are rounded: a value that falls on the boundary between
    two grid values may go the other way.

The batch is 1, as these tools want it (`qonnx.transformation.change_batchsize` changes it), every
tensor has its shape in `value_info`, and the opset is 13. The quantizers are also defined as
model-local functions, so that plain onnxruntime runs the file; qonnx and hls4ml use their own code.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from onnx import AttributeProto, FunctionProto, TensorProto, helper, numpy_helper
from torch import nn

from hwmodel import formats
from hwmodel.formats import Float, Format, Int, Levels
from hwmodel.spec import PerGroup
from quantkit.errors import InputError
from quantkit.model import Model
from quantkit.onnx_formats import Graph, conv_attributes
from quantkit.policy import InputStage, Policy
from quantkit.qlayers import ActQuant, QLayer
from quantkit.qtensor import QTensor, dequantize, expand_scale, values_of
from quantkit.rounding import is_pow2

Target = Literal["qonnx", "finn"]
QONNX = "qonnx.custom_op.general"
OPSET = 13
_EXPONENT_BITS = 7  # the most that a minifloat of 8 bits has

_CARRIED = "int2..int8, int16 and uint1..uint16, narrow or not, minifloats, ternary, binary"
_FINN_WEIGHTS = "int2..int8, ternary, binary"
_FINN_BOTH = "FINN accepts layers with both quantized to 8 bits or fewer"


def check(model: Model, to: Target, postprocess: bool, layers: list[tuple[str, nn.Module]]) -> None:
    """Raise InputError, naming the layer and what is accepted, for what the target cannot carry.

    layers: for finn the network as a chain, by name.
    """
    for name, layer in model.quantizers().items():
        known = ("linear", "conv2d") if to == "finn" else ("linear", "conv1d", "conv2d")
        if isinstance(layer, QLayer) and layer.op not in known:
            raise InputError(f"layer {name!r}: target {to} has no {layer.op}; accepted: {', '.join(known)}")
        sides = (
            ("weights", layer.uniform.fmt if isinstance(layer, QLayer) and layer.uniform else None),
            ("inputs", None if layer.act is None else layer.act.fmt),
        )
        for kind, fmt in sides:
            if fmt is not None and (fmt == Int(1) or not isinstance(fmt, Int | Float | Levels)):
                reason = " (qonnx reads 1 bit with a sign as binary)" if fmt == Int(1) else ""
                raise InputError(f"layer {name!r}: target {to} cannot carry {kind} {fmt}{reason}; accepted: {_CARRIED}")
    if to == "finn":
        _check_finn(model, postprocess, layers)


def _check_finn(model: Model, postprocess: bool, layers: list[tuple[str, nn.Module]]) -> None:
    if postprocess:
        raise InputError("target finn ends at the network's outputs; export with --raw and take actions on the host")
    policy = model.module if isinstance(model.module, Policy) else None
    if policy and clips_before(policy):
        raise InputError(
            "input stage: clipping of observations outside the first quantizer's range has no form in FINN; "
            "accepted: (x - mean) / std alone, or a first input scale whose range lies within the clip"
        )
    previous: tuple[str, nn.Module] | None = None
    for name, layer in layers:
        match layer:
            case QLayer():
                _check_finn_layer(name, layer, previous)
            case nn.Linear() | nn.Conv2d():
                raise InputError(f"layer {name!r}: float weights and inputs; {_FINN_BOTH}")
            case nn.ReLU() | nn.Identity() | nn.Dropout():
                pass
            case nn.Flatten() if layer.start_dim == 1 and layer.end_dim == -1:
                pass
            case _:
                raise InputError(
                    f"layer {name!r}: FINN does not take {type(layer).__name__} before a quantizer; "
                    "accepted between layers: ReLU or nothing, Flatten"
                )
        if not isinstance(layer, nn.Flatten | nn.Identity | nn.Dropout):
            previous = (name, layer)


def _check_finn_layer(name: str, layer: QLayer, previous: tuple[str, nn.Module] | None) -> None:
    act, q = layer.act, layer.uniform
    if q is None or act is None:
        side = "weights" if q is None else "inputs"
        raise InputError(f"layer {name!r}: float {side}; {_FINN_BOTH}")
    small_int = isinstance(q.fmt, Int) and q.fmt.signed and 2 <= q.fmt.bits <= 8
    if not small_int and not isinstance(q.fmt, Levels):
        raise InputError(f"layer {name!r}: FINN does not take weights {q.fmt}; accepted: {_FINN_WEIGHTS}")
    if isinstance(q.granularity, PerGroup):
        raise InputError(
            f"layer {name!r}: FINN does not take weight scales per {q.granularity}; accepted: one per tensor or row"
        )
    if isinstance(act.fmt, Float):
        accepted = "integers of at most 8 bits, ternary, binary"
        raise InputError(f"layer {name!r}: FINN does not take inputs {act.fmt}; accepted: {accepted}")
    if formats.bits(act.fmt) > 8:
        raise InputError(f"layer {name!r}: FINN takes inputs of at most 8 bits, not {act.fmt}")
    if layer.in_scale is not None and previous is not None:
        raise InputError(
            f"layer {name!r}: FINN takes one scale per activation tensor, this input has a factor per channel; "
            "accepted: in front of the first layer only (smoothquant:explicit=false,inputs=true)"
        )
    plain = isinstance(act.fmt, Int) and not act.fmt.signed and not act.fmt.narrow
    if previous and isinstance(previous[1], nn.ReLU):
        if not plain:
            raise InputError(
                f"layer {name!r}: after ReLU FINN takes unsigned, not narrow inputs, not {act.fmt}; "
                f"use act_scales with unsigned=true or format uint{formats.bits(act.fmt)}"
            )
    elif isinstance(act.fmt, Int) and not act.fmt.signed:
        raise InputError(
            f"layer {name!r}: without ReLU before it FINN takes signed inputs, not {act.fmt}; "
            "use --step act_scales:unsigned=false "
            "and name the unsigned ones: --acts uint4 --layer first=int4/int4"
        )


def clips_before(policy: Policy) -> bool:
    """Whether the stage's clip changes anything: not where the first layer's quantizer saturates within it, exactly."""
    if not policy.stage.clips:
        return False
    first = next(iter(policy.net.children()), None)
    if not isinstance(first, QLayer) or first.act is None or first.in_scale is not None:
        return True
    stage, act = policy.stage, first.act
    scale = torch.tensor(act.scale, dtype=torch.float32)
    if act.fmt == Levels("binary"):
        return not (bool((stage.high >= 0).all()) and bool((stage.low < 0).all()))
    top, bottom = formats.max_value(act.fmt), formats.min_value(act.fmt)
    return not (bool((stage.high / scale >= top).all()) and bool((stage.low / scale <= bottom).all()))


def stage_for(policy: Policy) -> InputStage:
    """The input stage without a clip that the first quantizer makes superfluous."""
    stage = policy.stage
    return stage if clips_before(policy) else InputStage(stage.mean, stage.std)


def layer_nodes(graph: Graph, x: str, layer: QLayer, name: str, *, to: Target, flatten: str = "") -> str:
    """Nodes of a quantized layer; the name of its output.

    flatten: name of a Flatten before the layer that is to come between its quantizer and its product.
    """
    exact, linear = to == "qonnx", layer.op == "linear"
    tail = (1,) * layer.spatial
    if layer.in_scale is not None:
        channels = layer.in_scale.detach().numpy().reshape(-1, *tail)
        x = graph.op("Mul", [x, graph.constant(channels, f"{name}.in_scale")], f"{name}.scaled")
    gain = np.ones(1)
    if isinstance(layer.act, ActQuant):
        x, missing = input_values(graph, x, layer.act, f"{name}.input", to=to)
        gain = gain * np.float64(missing)
    if flatten:
        x = graph.op("Flatten", [x], f"{flatten}.out", axis=1)
    if layer.uniform is None:
        stored = layer.weight.detach().numpy()
        w = graph.constant(stored.T if linear else stored, f"{name}.weight")
    else:
        scalar = layer.uniform.scale.numel() == 1 and is_pow2(
            float(layer.uniform.scale)
        )  # hls4ml 1.3 fails on one per row
        inside = scalar or not exact or isinstance(layer.uniform.granularity, PerGroup)
        w = _weight(graph, layer.uniform, f"{name}.weight", inside=inside)
        if not inside:
            gain = gain * layer.uniform.scale[:, 0].double().numpy()
    wide = exact and linear and _wide(layer)
    if wide:
        x = graph.op("Cast", [x], f"{name}.wide_input", to=TensorProto.DOUBLE)
        w = graph.op("Cast", [w], f"{name}.wide_weight", to=TensorProto.DOUBLE)
    if linear:
        acc = graph.op("MatMul", [x, w], f"{name}.acc")
    else:
        acc = graph.op("Conv", [x, w], f"{name}.acc", **conv_attributes(layer))
    if wide:
        acc = graph.op("Cast", [acc], f"{name}.sum", to=TensorProto.FLOAT)
    shape = (-1, *tail)
    if not (gain == 1).all():
        values = gain.astype(np.float32)
        factor = graph.constant(values.reshape(shape) if values.size > 1 else values.reshape(()), f"{name}.gain")
        acc = graph.op("Mul", [acc, factor], f"{name}.product")
    bias = graph.constant(layer.bias.detach().numpy().reshape(shape), f"{name}.bias")
    return graph.op("Add", [acc, bias], f"{name}.out")


def input_values(graph: Graph, x: str, act: ActQuant, name: str, *, to: Target) -> tuple[str, float]:
    """Quantize `x`: its values and the factor they still lack, 1 where the scale is inside the quantizer."""
    inside = is_pow2(act.scale) or to != "qonnx"
    if not inside:
        owner = name.removesuffix(".input")
        x = graph.op("Div", [x, graph.constant(np.float32(act.scale), f"{name}.unit")], f"{owner}.units")
    values = _quantizer(graph, x, act.fmt, np.float32(act.scale if inside else 1), name)
    return values, 1.0 if inside else act.scale


def _wide(layer: QLayer) -> bool:
    """Whether the sum needs float64 to be exact and the layer is none that hls4ml could read."""
    if layer.kernel().weight.dtype != torch.float64 or layer.uniform is None or layer.act is None:
        return False
    minifloat = isinstance(layer.uniform.fmt, Float) or isinstance(layer.act.fmt, Float)
    return minifloat or isinstance(layer.uniform.granularity, PerGroup)


def _weight(graph: Graph, q: QTensor, name: str, *, inside: bool) -> str:
    """A weight as float initializer and quantizer: (in, out) for a matrix, (out, in, ...) for a convolution."""
    values = (dequantize(q) if inside else values_of(q).reshape(q.shape)).numpy()
    scale = q.scale if inside else torch.ones(1, 1)
    matrix = len(q.shape) == 2
    if scale.numel() == 1:
        scales = scale.reshape(()).numpy()
    elif isinstance(q.granularity, PerGroup):
        scales = expand_scale(scale, q.codes.shape[1], q.granularity).expand(q.codes.shape).reshape(q.shape).numpy()
    else:
        scales = scale.reshape(-1, *[1] * (len(q.shape) - 1)).numpy()
    if matrix:
        values, scales = values.T, scales.T
    return _quantizer(graph, graph.constant(values, name), q.fmt, scales, f"{name}.quant")


def _quantizer(graph: Graph, x: str, fmt: Format, scale: np.ndarray | np.float32, name: str) -> str:
    scales = graph.constant(scale, f"{name}.scale")

    def number(value: float, what: str) -> str:
        return graph.constant(np.float32(value), f"{name}.{what}")

    if isinstance(fmt, Levels) and fmt.name == "binary":
        return _call(graph, "BipolarQuant", [x, scales], f"{name}.values")
    if isinstance(fmt, Float):
        facts = [
            number(fmt.exp, "exponent_bits"),
            number(fmt.man, "mantissa_bits"),
            number(formats.bias(fmt), "exponent_bias"),
            number(formats.max_value(fmt), "max"),
        ]
        flags = {"has_inf": fmt.special == "ieee", "has_nan": fmt.special != "none", "has_subnormal": True}
        attributes = {key: int(value) for key, value in flags.items()} | {"saturation": 1}
        return _call(graph, "FloatQuant", [x, scales, *facts], f"{name}.values", **attributes, rounding_mode="ROUND")
    narrow = isinstance(fmt, Levels) or (isinstance(fmt, Int) and fmt.narrow)
    facts = [number(0, "zeropt"), number(formats.bits(fmt), "bitwidth")]
    return _call(
        graph,
        "Quant",
        [x, scales, *facts],
        f"{name}.values",
        signed=int(formats.is_signed(fmt)),
        narrow=int(narrow),
        rounding_mode="ROUND",
    )


def _call(graph: Graph, kind: str, inputs: list[str], name: str, **attributes: int | str) -> str:
    graph.functions.setdefault(kind, _FUNCTIONS[kind]())
    return graph.op(kind, inputs, name, domain=QONNX, **attributes)


class _Body:
    """The nodes of a model-local function with output `y`; `line("a = Op b c")` appends one."""

    def __init__(self) -> None:
        self.nodes: list = []

    def line(self, text: str) -> None:
        output, _, call = text.partition(" = ")
        kind, *inputs = call.split()
        self.nodes.append(helper.make_node(kind, inputs, [output]))

    def number(self, name: str, value: float) -> None:
        tensor = numpy_helper.from_array(np.asarray(value, np.float32))
        self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))

    def attribute(self, name: str) -> None:
        """The function's integer attribute `name` as a float scalar."""
        node = helper.make_node("Constant", [], [f"{name}_int"])
        node.attribute.add(name="value_int", ref_attr_name=name, type=AttributeProto.INT)
        self.nodes += [node, helper.make_node("Cast", [f"{name}_int"], [name], to=TensorProto.FLOAT)]

    def function(self, kind: str, inputs: list[str], attributes: list[str]) -> FunctionProto:
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_function(QONNX, kind, inputs, ["y"], self.nodes, opsets, attributes)


def _quant() -> FunctionProto:
    """Integers: low = signed * (narrow - 2^(b - 1)), high = 2^(b - signed) - 1 - narrow * (1 - signed)."""
    body = _Body()
    body.attribute("signed")
    body.attribute("narrow")
    body.number("one", 1)
    body.number("two", 2)
    for text in (
        "width = Sub bitwidth signed",
        "count = Pow two width",
        "below = Sub narrow count",
        "low = Mul signed below",
        "last = Sub count one",
        "unsigned = Sub one signed",
        "drop = Mul narrow unsigned",
        "high = Sub last drop",
        "u = Div x scale",
        "moved = Add u zeropt",
        "least = Max moved low",
        "most = Min least high",
        "code = Round most",
        "back = Sub code zeropt",
        "y = Mul back scale",
    ):
        body.line(text)
    return body.function("Quant", ["x", "scale", "zeropt", "bitwidth"], ["signed", "narrow", "rounding_mode"])


def _bipolar_quant() -> FunctionProto:
    body = _Body()
    body.number("zero", 0)
    body.number("one", 1)
    body.number("minus", -1)
    for text in ("positive = GreaterOrEqual x zero", "sign = Where positive one minus", "y = Mul sign scale"):
        body.line(text)
    return body.function("BipolarQuant", ["x", "scale"], [])


def _float_quant() -> FunctionProto:
    """Minifloats: the binade of |x / scale| by bisection (see `quantkit.onnx_formats`), half to even in its steps."""
    body = _Body()
    body.number("one", 1)
    body.number("two", 2)
    for text in (
        "u = Div x scale",
        "min_val = Neg max_val",
        "least = Max u min_val",
        "v = Min least max_val",
        "size = Abs v",
        "lowest = Sub one exponent_bias",
        f"binade_{_EXPONENT_BITS} = Pow two lowest",
    ):
        body.line(text)
    for k in reversed(range(_EXPONENT_BITS)):
        body.number(f"factor_{k}", 2.0 ** (2**k))
        body.line(f"next_{k} = Mul binade_{k + 1} factor_{k}")
        body.line(f"above_{k} = GreaterOrEqual size next_{k}")
        body.line(f"binade_{k} = Where above_{k} next_{k} binade_{k + 1}")
    for text in (
        "fraction = Pow two mantissa_bitwidth",
        "step = Div binade_0 fraction",
        "steps = Div v step",
        "whole = Round steps",
        "value = Mul whole step",
        "y = Mul value scale",
    ):
        body.line(text)
    inputs = ["x", "scale", "exponent_bitwidth", "mantissa_bitwidth", "exponent_bias", "max_val"]
    attributes = ["has_inf", "has_nan", "has_subnormal", "saturation", "rounding_mode"]
    return body.function("FloatQuant", inputs, attributes)


_FUNCTIONS = {"Quant": _quant, "BipolarQuant": _bipolar_quant, "FloatQuant": _float_quant}
