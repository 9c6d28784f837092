"""Quantizers whose scales are found at run time, in ONNX: MX, NVFP4 and every other block of activations.

One model-local function per format, rule and axis, from standard operators only. Every step is exact or is the
rounding that `quantkit.qlayers.BlockAct` does as well, so the values are its bits: the power of two below a block's
largest magnitude is found by bisection, where `floor(log2(x))` could be one off.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import FunctionProto

from hwmodel import formats
from hwmodel.formats import Block, Float
from quantkit.errors import InputError
from quantkit.onnx_formats import DOMAIN, Body, Graph, function_name, has_function, quantize_function
from quantkit.qlayers import BlockAct
from quantkit.qtensor import largest

_LEAST, _MOST = 2.0**-127, 2.0**127
"""The smallest and the largest scale of e8m0."""


def check(act: BlockAct, name: str, to: str) -> None:
    """InputError for targets without such quantizers, and for exponents by squared error, whose sums another runtime
    may add in another order."""
    if to not in ("qdq", "qdq-real"):
        raise InputError(
            f"layer {name!r}: inputs in {act.fmt} are scaled at run time, which target {to} does not carry; accepted: "
            f"targets qdq and qdq-real, or formats with one scale such as {act.fmt.elem} (weights may be in blocks)"
        )
    if act.rule == "mse":
        raise InputError(
            f"layer {name!r}: inputs in {act.fmt} whose exponent is searched by squared error (block_rule=mse) are not "
            "exported; accepted: act_scales:block_rule=floor, ceil, even or absmax"
        )


def block_quantizer(graph: Graph, x: str, act: BlockAct, name: str, *, axis: int, channels: int | None) -> str:
    """Nodes of `act.values(x, axis)`, in real units; axis: negative; channels: how many lie along it, if known."""
    scaled = isinstance(act.fmt.scale, Float)
    for fmt in (act.fmt.elem, act.fmt.scale):
        if has_function(fmt):
            inner = quantize_function(fmt)
            graph.functions.setdefault(inner.name, inner)
    base = [graph.constant(np.float32(act.base), f"{name}.base")] if scaled else []
    return graph.call(
        _function(act, axis, channels is None or channels % act.fmt.size != 0), [x, *base], f"{name}.values"
    )


def _function(act: BlockAct, axis: int, padded: bool) -> FunctionProto:
    """`y = QuantizeBlocks(x)`, or of x and the base of minifloat scales. padded: the last block is shorter."""
    fmt, body = act.fmt, Body()
    shape = body.op("Shape", "x")
    x, whole = ("x", shape) if not padded else _padded(body, shape, fmt.size, axis)
    parts = [_cut(body, whole, 0, axis), body.integers([-1, fmt.size])]
    parts += [_cut(body, whole, axis + 1, None)] if axis < -1 else []
    blocks = body.op("Reshape", x, body.op("Concat", *parts, axis=0))
    absmax = body.op("ReduceMax", body.op("Abs", blocks), body.integers([axis]), keepdims=1)
    scale = _shared(body, absmax, act) if fmt.scale == "e8m0" else _stored(body, absmax, fmt)
    values = body.op("Mul", _rounded(body, blocks, scale, fmt), scale)
    if padded:
        values = body.op("Reshape", values, whole)
        end = body.op("Gather", shape, body.integers([axis]), axis=0)
        body.op("Slice", values, body.integers([0]), end, body.integers([axis]), output="y")
    else:
        body.op("Reshape", values, whole, output="y")
    rule = act.rule.upper() if fmt.scale == "e8m0" else ""
    text = "".join(c if c.isalnum() else "_" for c in str(fmt).upper())
    name = f"Quantize{text}{rule}" + ("" if axis == -1 else f"_axis{-axis}") + ("_padded" if padded else "")
    return body.function(name, ["x"] if fmt.scale == "e8m0" else ["x", "base"])


def _cut(body: Body, shape: str, start: int, end: int | None) -> str:
    """shape[start:end]; None for its end."""
    stop = np.iinfo(np.int64).max if end is None else end
    return body.op("Slice", shape, body.integers([start]), body.integers([stop]))


def _padded(body: Body, shape: str, size: int, axis: int) -> tuple[str, str]:
    """x with zeros up to a multiple of `size` along the axis, and its shape."""
    channels = body.op("Gather", shape, body.integers([axis]), axis=0)
    short = body.op("Mod", body.op("Neg", channels), body.integers([size]))
    pads = body.op("Concat", body.integers([0]), short, axis=0)
    x = body.op("Pad", "x", pads, "", body.integers([axis]))
    return x, body.op("Shape", x)


def _shared(body: Body, absmax: str, act: BlockAct) -> str:
    """The power of two of `qtensor.shared_exponent`; 1 for a block of zeros."""
    elem = act.fmt.elem
    top = largest(elem)
    emax = math.frexp(top)[1] - 1
    finite = body.op("Min", absmax, body.number(_MOST))
    binade = body.number(_LEAST)
    for k in reversed(range(8)):  # by bisection: 2^floor(log2 absmax)
        candidate = body.op("Mul", body.op("Mul", binade, body.number(2.0 ** (2**k - 1))), body.number(2.0))
        binade = body.op("Where", body.op("GreaterOrEqual", finite, candidate), candidate, binade)
    scale = body.op("Mul", binade, body.number(2.0**-emax))
    if act.rule != "floor":
        man = elem.man if isinstance(elem, Float) else emax
        even = act.rule == "even"
        bound = body.op("Mul", binade, body.number(2 - 2.0 ** -(man + 1) if even else math.ldexp(top, -emax)))
        above = body.op("GreaterOrEqual" if even else "Greater", finite, bound)
        scale = body.op("Where", above, body.op("Mul", scale, body.number(2.0)), scale)
    scale = body.op("Min", body.op("Max", scale, body.number(_LEAST)), body.number(_MOST))
    return body.op("Where", body.op("Greater", absmax, body.number(0.0)), scale, body.number(1.0))


def _stored(body: Body, absmax: str, fmt: Block) -> str:
    """absmax over the element's largest value, as a minifloat times `base`; `base` for a block of zeros."""
    assert isinstance(fmt.scale, Float)
    wanted = body.op("Div", absmax, body.number(largest(fmt.elem)))
    wanted = body.op("Max", wanted, body.number(float(np.finfo(np.float32).tiny)))
    wanted = body.op("Where", body.op("Equal", absmax, body.number(0.0)), "base", wanted)
    rounded = body.op(function_name("Quantize", fmt.scale), wanted, "base", domain=DOMAIN)
    return body.op("Mul", body.op("Max", rounded, body.number(formats.unit(fmt.scale))), "base")


def _rounded(body: Body, x: str, scale: str, fmt: Block) -> str:
    """Grid values of x / scale."""
    elem = fmt.elem
    if has_function(elem):
        return body.op(function_name("Quantize", elem), x, scale, domain=DOMAIN)
    low, high = formats.min_value(elem), formats.max_value(elem)
    return body.op("Round", body.op("Clip", body.op("Div", x, scale), body.number(low), body.number(high)))
