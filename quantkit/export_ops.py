"""The table of ATen operations, each as ONNX nodes: here those that compute, in `quantkit.export_moves` the others."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from quantkit.errors import InputError
from quantkit.export_moves import MOVES
from quantkit.export_walk import TYPES, Operation, Walk

aten = torch.ops.aten
LATER = frozenset(
    ("Gelu", "LayerNormalization", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "HardSwish", "Shape")
)
"""Operators used in a form that opset 13 does not have and opset 20 does."""


def _unary(kind: str, **options: str) -> Operation:
    """One ONNX node of one input; options: ONNX attribute -> argument."""

    def nodes(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
        x = t.value(n.args[0], t.result(n), n.name)
        return t.graph.op(kind, [x], n.name, **{key: a[name] for key, name in options.items()})

    return nodes


def _binary(kind: str) -> Operation:
    """Arithmetic in the type of the result, with the second operand times `alpha`."""

    def nodes(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
        dtype = t.result(n)
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
    x, y = (t.value(v, t.result(n), n.name) for v in (a["other"], a["self"]))
    return t.graph.op("Sub", [x, y], n.name)


def _cast(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return t.value(n.args[0], t.result(n), n.name)


def _rsqrt(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return t.graph.op("Reciprocal", [t.graph.op("Sqrt", [t.names[a["self"]]], f"{n.name}.root")], n.name)


def _clamp(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    low, high = (a.get(k, a.get(f"{k}_val")) for k in ("min", "max"))
    kind = TYPES[t.result(n)]
    x = t.value(a["self"], t.result(n), n.name)
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
    return t.graph.op(kind, [t.value(a["self"], t.result(n), n.name)], n.name, axis=a["dim"])


def _reduce(kind: str) -> Operation:
    def nodes(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
        dims = a.get("dim")
        axes = list(range(len(t.shape(a["self"])))) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
        x = t.value(a["self"], t.result(n), n.name)
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
    have = [t.known(a["self"], d, n) for d in range(-count, 0)]
    if set(wanted) == {1}:
        axes = t.ints(range(-count, 0), f"{n.name}.axes")
        return t.graph.op("ReduceMean", [t.names[a["self"]], axes], n.name, keepdims=1)
    if any(h % w for h, w in zip(have, wanted, strict=True)):
        raise InputError(f"node {n.name!r}: adaptive pooling from {have} to {wanted}; accepted: a divisor of each size")
    kernel = [h // w for h, w in zip(have, wanted, strict=True)]
    return t.graph.op("AveragePool", [t.names[a["self"]]], n.name, kernel_shape=kernel, strides=kernel)


_PADS = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    x, rank, dtype = t.names[a["self"]], len(t.shape(a["self"])), t.result(n)
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


def _batch_norm(t: Walk, n: fx.Node, a: dict[str, Any]) -> Any:
    if a.get("training"):
        raise InputError(f"node {n.name!r}: batch normalization in training mode cannot be exported; accepted: eval()")
    channels = t.known(a["input"], 1, n)
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
    channels = t.known(a["input"], 1, n)
    size = channels // groups * math.prod(t.known(a["input"], d, n) for d in range(2, len(shape)))
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


TABLE: dict[Any, Operation] = {
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
    **dict.fromkeys((aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default), _batch_norm),
    aten.layer_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
    **dict.fromkeys((aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec), _upsample),
    **dict.fromkeys((aten.to.dtype, aten._to_copy.default), _cast),
    operator.add: _size_arithmetic("Add"),
    operator.sub: _size_arithmetic("Sub"),
    operator.mul: _size_arithmetic("Mul"),
    operator.floordiv: _size_arithmetic("Div"),
    operator.mod: _size_arithmetic("Mod"),
    **MOVES,
}  # fmt: skip
