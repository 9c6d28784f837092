"""The ATen operations that move numbers and compute none, as ONNX nodes: slices, shapes, repetitions, choices."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from quantkit.errors import InputError
from quantkit.export_walk import TYPES, Operation, Walk

aten = torch.ops.aten


_END = 2**63 - 1


def _identity(t: Walk, n: fx.Node, a: dict[str, Any]) -> Any:
    return t.names[n.args[0]]  # type: ignore[index]


def _cat(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    dtype = t.result(n)
    return t.graph.op("Concat", [t.value(x, dtype, n.name) for x in a["tensors"]], n.name, axis=a["dim"])


def _stack(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    dim = a["dim"] % len(t.shape(n))
    axes = t.ints([dim], f"{n.name}.axes")
    parts = [t.graph.op("Unsqueeze", [t.value(x, t.result(n), n.name), axes], f"{n.name}.part") for x in a["tensors"]]
    return t.graph.op("Concat", parts, n.name, axis=dim)


def _slice(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    x, start, end = t.names[a["self"]], a["start"] or 0, _END if a["end"] is None else a["end"]
    if (start, a["step"]) == (0, 1) and isinstance(end, int) and end >= _END:
        return str(x)
    bounds = [t.sizes([v], f"{n.name}.{what}") for v, what in ((start, "start"), (end, "end"))]
    return t.graph.op(
        "Slice", [x, *bounds, t.ints([a["dim"]], f"{n.name}.axis"), t.ints([a["step"]], f"{n.name}.step")], n.name
    )


def _at(t: Walk, x: str, dim: int, i: int, name: str) -> str:
    """x[..., i, ...] as Slice and Squeeze: onnxruntime 1.31 fails on several Gathers of one tensor with numbers."""
    axis = t.ints([dim], f"{name}.axis")
    end = _END if i == -1 else i + 1
    x = t.graph.op("Slice", [x, t.ints([i], f"{name}.start"), t.ints([end], f"{name}.end"), axis], f"{name}.part")
    return t.graph.op("Squeeze", [x, axis], name)


def _select(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return _at(t, t.names[a["self"]], a["dim"], t.number(a["index"], n), n.name)


def _unbind(t: Walk, n: fx.Node, a: dict[str, Any]) -> list[str]:
    return [_at(t, t.names[a["self"]], a["dim"], i, n.name) for i in range(len(t.facts[n].parts))]


def _split(t: Walk, n: fx.Node, a: dict[str, Any]) -> list[str]:
    """chunk, split: one Slice for each part."""
    x, first, found = t.names[a["self"]], 0, []
    axis = t.ints([a["dim"]], f"{n.name}.axis")
    for part in t.facts[n].parts:
        size = part.shape[a["dim"]]
        if size is None:
            raise InputError(
                f"node {n.name!r}: {n.target} along a dimension that depends on the batch; accepted: others"
            )
        bounds = [t.ints([first], f"{n.name}.start"), t.ints([first + size], f"{n.name}.end")]
        found.append(t.graph.op("Slice", [x, *bounds, axis], n.name))
        first += size
    return found


def _getitem(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return str(t.names[a["0"]][a["1"]])


def _reshape(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return t.reshaped(t.names[a["self"]], t.shape(n), n.name, a.get("shape", a.get("size")))


def _unsqueeze(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    axes = t.ints([a["dim"] % len(t.shape(n))], f"{n.name}.axes")
    return t.graph.op("Unsqueeze", [t.names[a["self"]], axes], n.name)


def _squeeze(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    shape, dims = t.shape(a["self"]), a.get("dim")
    dims = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    ones = [d % len(shape) for d in dims if shape[d] == 1]
    x = t.names[a["self"]]
    return t.graph.op("Squeeze", [x, t.ints(ones, f"{n.name}.axes")], n.name) if ones else str(x)


def _permute(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    rank = len(t.shape(a["self"]))
    if "dims" in a:
        order = [d % rank for d in a["dims"]]
    else:
        order = list(range(rank))
        first, second = (a["dim0"] % rank, a["dim1"] % rank) if "dim0" in a else (0, rank - 1)
        order[first], order[second] = order[second], order[first]
    return t.graph.op("Transpose", [t.names[a["self"]]], n.name, perm=order)


def _expand(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    target = [
        known if known is not None else size if isinstance(size, fx.Node) else 1  # 1 leaves a dimension as it is
        for size, known in zip(a["size"], t.shape(n), strict=True)
    ]
    return t.graph.op("Expand", [t.names[a["self"]], t.sizes(target, n.name)], n.name)


def _full(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    fill = a.get("fill_value", 1 if "ones" in str(n.target) else 0)
    value = t.graph.constant(t.number(fill, n), f"{n.name}.fill", TYPES[t.result(n)])
    if "_like" in str(n.target):
        return _as(t, n, value, a["self"])
    return t.graph.op("Expand", [value, t.sizes(a["size"], n.name)], n.name)


def _as(t: Walk, n: fx.Node, x: str, other: fx.Node) -> str:
    return t.graph.op("Expand", [x, t.graph.op("Shape", [t.names[other]], f"{n.name}.shape")], n.name)


def _expand_as(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return _as(t, n, t.names[a["self"]], a["other"])


def _repeat(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    x, shape, repeats = t.names[a["self"]], t.shape(a["self"]), a["repeats"]
    if len(repeats) > len(shape):
        x = t.reshaped(x, (*(1,) * (len(repeats) - len(shape)), *shape), f"{n.name}.wider")
    return t.graph.op("Tile", [x, t.sizes(repeats, n.name)], n.name)


def _repeat_interleave(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    if a["dim"] is None:
        raise InputError(
            f"node {n.name!r}: repeat_interleave without a dimension cannot be exported; accepted: with one"
        )
    times = t.number(a["repeats"], n)
    index = t.ints([i // times for i in range(t.known(a["self"], a["dim"], n) * times)], f"{n.name}.index")
    return t.graph.op("Gather", [t.names[a["self"]], index], n.name, axis=a["dim"])


def _where(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    x, y = (t.value(a[k], t.result(n), n.name) for k in ("self", "other"))
    return t.graph.op("Where", [t.names[a["condition"]], x, y], n.name)


def _masked_fill(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    x, y = (t.value(a[k], t.result(n), n.name) for k in ("self", "value"))
    return t.graph.op("Where", [t.names[a["mask"]], y, x], n.name)


def _lookup(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    return t.graph.op("Gather", [t.names[a["weight"]], t.names[a["indices"]]], n.name, axis=0)


def _size(t: Walk, n: fx.Node, a: dict[str, Any]) -> str:
    dim = a["dim"] % len(t.shape(a["self"]))
    return t.graph.op("Shape", [t.names[a["self"]]], n.name, start=dim, end=dim + 1)


MOVES: dict[Any, Operation] = {
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    **dict.fromkeys(
        (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default), _split
    ),
    operator.getitem: _getitem,
    **dict.fromkeys(
        (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int), _reshape
    ),
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    **dict.fromkeys((aten.permute.default, aten.transpose.int), _permute),
    aten.expand.default: _expand,
    aten.expand_as.default: _expand_as,
    **dict.fromkeys((
            aten.full.default, aten.zeros.default, aten.ones.default, aten.new_full.default, aten.new_zeros.default,
            aten.new_ones.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
        ),
        _full,
    ),
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    aten.embedding.default: _lookup,
    aten.clone.default: _identity,
    aten.sym_size.int: _size,
}  # fmt: skip
