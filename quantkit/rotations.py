"""Free rotations: sets of channels that an orthogonal matrix can turn where they are produced and back where they are
read, so that the function stays.

`quantkit.symmetry` follows a factor per channel through a graph; here each row of a layer is a coordinate, and what
may be mixed with what is asked. Whatever is linear keeps coordinates: sums, reshapes, averages over positions, factors
that are the same for all channels, and the products of attention, head by head (queries and keys turn together). A
mean square over all channels (RMSNorm, in one module or in parts) stays as it is under every rotation, a LayerNorm
under one that keeps the vector of ones; their weights move into the layers that read them. Anything else, a ReLU or
the network's output, fixes its coordinates. Coordinates that appear in the same places make a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantkit.attention import Attention, MatMul
from quantkit.links import matrix_of, store_matrix
from quantkit.model import Model
from quantkit.qlayers import Point, QLayer, op_of, shape_of
from quantkit.symmetry import ANY, Follower

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """A normalization whose gain (and bias) can move into the linear layers `readers`.

    name: of the module, or of the parameter that multiplies. offset: what the graph adds to that parameter.
    """

    name: str
    readers: tuple[str, ...]
    offset: float = 0.0


@dataclass(frozen=True)
class Block:
    """Coordinates that can be turned together.

    rows: for each producer, a layer or a parameter, where they are among its outputs, (copies, size). columns: the
    same among the inputs of each consumer. norms: those on the way. centred: whether a LayerNorm is among them, so
    that the rotation has to keep the vector of ones.
    """

    size: int
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    norms: tuple[Norm, ...]
    centred: bool


@torch.no_grad()
def find_blocks(model: Model) -> list[Block]:
    """Every block of at least two coordinates of a captured graph, in the order of execution; else none."""
    if not isinstance(model.module, fx.GraphModule):
        return []
    turner = _Turner(model.module)
    turner.run(torch.cat([model.example, model.example])[:2])
    return turner.blocks()


@torch.no_grad()
def turn(model: Model, block: Block, Q: Tensor) -> None:
    """Turn what the block's producers put out by Q, and what its consumers read back, in float64 and in place.

    Q: (size, size), orthogonal. A weight that two layers share becomes two.
    """
    layers, Q = model.layers(), Q.double()
    for norm in block.norms:
        _fold(model, norm)
    for name, copies in block.rows.items():
        if name not in layers:
            owner, _, leaf = name.rpartition(".")
            parameter = getattr(model.module.get_submodule(owner), leaf)
            parameter.data = _turned(parameter.double(), copies, Q, -1).to(parameter.dtype)
            continue
        layer = layers[name]
        _own(layer)
        store_matrix(layer, _turned(matrix_of(layer).double(), copies, Q, 0).float())
        if (bias := getattr(layer, "bias", None)) is not None:
            bias.data = _turned(bias.double(), copies, Q, 0).float()
    for name, copies in block.columns.items():
        layer = layers[name]
        _own(layer)
        matrix, groups = matrix_of(layer).double(), shape_of(layer).groups
        split = matrix.reshape(groups, -1, *matrix.shape[1:]).transpose(1, 2)  # (groups, inputs / groups, ...)
        turned = _turned(split.reshape(-1, *split.shape[2:]), copies, Q, 0).reshape(split.shape)
        store_matrix(layer, turned.transpose(1, 2).reshape(matrix.shape).float())


def _turned(values: Tensor, copies: Tensor, Q: Tensor, dim: int) -> Tensor:
    values = values.movedim(dim, 0).clone()
    for index in copies:
        values[index] = torch.tensordot(Q, values[index], dims=1)
    return values.movedim(0, dim)


def _own(layer: Any) -> None:
    """Give the layer a parameter of its own, so that a new weight is its alone."""
    layer.weight = nn.Parameter(layer.weight.detach(), requires_grad=layer.weight.requires_grad)


def _fold(model: Model, norm: Norm) -> None:
    """Move the gain and bias of a normalization into the layers that read it."""
    owner, _, leaf = norm.name.rpartition(".")
    part = getattr(model.module.get_submodule(owner), leaf)
    weight, bias = (part, None) if isinstance(part, Tensor) else (part.weight, getattr(part, "bias", None))
    gain = weight.double() + norm.offset
    layers = model.layers()
    for name in norm.readers:
        layer: Any = layers[name]
        _own(layer)
        matrix = layer.weight.detach().double()
        if bias is not None and bool((bias != 0).any()):
            own = torch.zeros(len(matrix)) if layer.bias is None else layer.bias.detach()
            layer.bias = nn.Parameter((own.double() + matrix @ bias.double()).float(), requires_grad=False)
        store_matrix(layer, (matrix * gain).float().unsqueeze(-1))
    weight.data = torch.full_like(weight, 1.0 - norm.offset)
    if bias is not None:
        bias.data = torch.zeros_like(bias)


@dataclass(frozen=True)
class _Mark:
    """Coordinates `labels` (n,) that appear in one place, which lets only those of the same class be mixed (n,)."""

    place: tuple[str, str]
    labels: Tensor
    classes: Tensor


_NONLINEAR = {
    *(aten.relu, aten.leaky_relu, aten.prelu, aten.abs, aten.maximum, aten.minimum, aten.amax),
    *(aten.max_pool1d, aten.max_pool2d, aten.max_pool2d_with_indices),
    *(aten.flip, aten.roll, aten.index, aten.index_select, aten.channel_shuffle),  # may move channels apart
}
_LINEAR_MODULES = (
    *(QLayer, Attention, MatMul, Point, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten),
    *(nn.AvgPool2d, nn.AdaptiveAvgPool2d),
)
_CASTS = {aten.to, aten._to_copy, aten.type_as, aten.clone, aten.contiguous, aten.dropout}


class _Turner(Follower):
    """Runs a graph and marks where every coordinate appears."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, None)
        self.marks: list[_Mark] = []
        self.norm_of: dict[str, tuple[Norm | None, bool]] = {}
        nodes = graph.graph.nodes
        called = [str(n.target) for n in nodes if n.op == "call_module"]
        read = [str(n.target) for n in nodes if n.op == "get_attr" and len(n.users) == 1]
        self.alone = {n for n in (*called, *read) if (called + read).count(n) == 1}

    def blocks(self) -> list[Block]:
        """What may be turned, once the graph has run."""
        seen: dict[int, list[tuple[str, str, int]]] = {}
        marks = [_Mark(m.place, self.variables.roots(m.labels), m.classes) for m in self.marks]
        for mark in marks:
            for label, kind in zip(mark.labels.tolist(), mark.classes.tolist(), strict=True):
                seen.setdefault(label, []).append((*mark.place, kind))
        alike: dict[tuple[tuple[str, str, int], ...], list[int]] = {}
        for label, places in seen.items():
            if label not in (0, ANY):
                alike.setdefault(tuple(places), []).append(label)
        free = {frozenset(labels) for labels in alike.values() if len(labels) > 1}
        while True:  # a norm needs all of its channels in one block
            norms = [set(m.labels.tolist()) for m in marks if m.place[0] == "norm"]
            whole = {b for b in free if all(b.isdisjoint(n) or n == b for n in norms)}
            if whole == free:
                break
            free = whole
        return [self._block(labels, marks) for labels in alike.values() if frozenset(labels) in free]

    def _block(self, labels: list[int], marks: list[_Mark]) -> Block:
        sides: dict[str, dict[str, Tensor]] = {"row": {}, "column": {}}
        norms: list[Norm] = []
        centred = False
        number = {label: i for i, label in enumerate(labels)}
        for mark in marks:
            side, name = mark.place
            index = torch.tensor([number.get(label, -1) for label in mark.labels.tolist()])
            places = index.argsort(stable=True)[(index < 0).sum() :].reshape(len(labels), -1).mT
            if not places.numel():
                continue
            if side == "norm":
                norm, centres = self.norm_of[name]
                norms += [] if norm is None else [norm]
                centred |= centres
            elif side in sides:
                sides[side][name] = places
        return Block(len(labels), sides["row"], sides["column"], tuple(norms), centred)

    def _mark(self, kind: str, name: str, labels: Tensor, classes: Tensor | None = None) -> None:
        labels = labels.flatten()
        self.marks.append(_Mark((kind, name), labels, torch.zeros_like(labels) if classes is None else classes))

    def _labels(self, node: fx.Node, value: Any) -> Any:
        if node.op == "get_attr" and str(node.target) in self.alone and self._is_float(value) and value.dim() > 0:
            labels = self.variables.fresh(value.shape[-1])
            self._mark("row", str(node.target), labels)
            return labels.expand(value.shape)
        return super()._labels(node, value)

    def _module(self, node: fx.Node, module: nn.Module, value: Any) -> Any:
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return self._normed(node, str(node.target), module, value)
        known = isinstance(module, _LINEAR_MODULES) or op_of(module) is not None
        return super()._module(node, module, value) if known else None

    def _layer(self, name: str, layer: Any, x: Any, value: Tensor) -> Tensor:
        if getattr(layer, "in_scale", None) is not None:
            self.variables.fix(self._of(x))
        found = super()._layer(name, layer, x, value)
        groups = shape_of(layer).groups
        for kind, labels in (("column", self.columns.get(name)), ("row", self.rows[name])):
            if labels is not None:
                self._mark(kind, name, labels, torch.arange(groups).repeat_interleave(len(labels) // groups))
        return found

    def _channels(self, labels: Tensor) -> Tensor:
        """Labels of the last dimension, (channels,), those along all others made equal."""
        return self.variables.merge(labels, range(labels.dim() - 1)).flatten()

    def _normed(self, node: fx.Node, name: str, module: nn.LayerNorm | nn.RMSNorm, value: Tensor) -> Tensor | None:
        readers = () if module.weight is None else self._readers(node, value.dim())
        if len(module.normalized_shape) != 1 or readers is None or name not in self.alone:
            return None
        labels = self._channels(self._of(node.args[0]))
        self.norm_of[name] = Norm(name, readers) if readers else None, isinstance(module, nn.LayerNorm)
        self._mark("norm", name, labels)
        return labels.expand(value.shape)

    def _readers(self, node: fx.Node, rank: int) -> tuple[str, ...] | None:
        """The linear layers that alone read the last dimension of a node; None where something else does."""
        found: list[str] = []
        for user in node.users:
            below: tuple[str, ...] | None = None
            target = getattr(user.target, "overloadpacket", user.target)
            if user.op == "call_module":
                layer: Any = self.modules[str(user.target)]
                linear = (isinstance(layer, QLayer) or op_of(layer)) and shape_of(layer).op == "linear"
                if linear and str(user.target) in self.alone and getattr(layer, "in_scale", None) is None:
                    below = (str(user.target),)
            elif target in _CASTS:
                below = self._readers(user, rank)
            elif target in (aten.select, aten.slice, aten.mean) and len(user.args) > 1:
                dims: Any = user.args[1] if isinstance(user.args[1], list | tuple) else [user.args[1]]
                keeps = target is aten.slice or (target is aten.mean and user.args[2:3] == (True,))
                if all(d % rank < rank - 1 for d in dims):
                    below = self._readers(user, rank if keeps else rank - len(dims))
            if below is None:
                return None
            found += below
        return tuple(dict.fromkeys(found))

    def _function(self, node: fx.Node, value: Any) -> Any:
        target = getattr(node.target, "overloadpacket", node.target)
        squares = target is aten.square or (target is aten.pow and node.args[1] == 2)
        if squares and isinstance(node.args[0], fx.Node) and self._averaged(node):
            self.norm_of[node.name] = None, False
            self._mark("norm", node.name, self._channels(self._of(node.args[0])))
            return torch.zeros((), dtype=torch.long).expand(value.shape)
        return None if target in _NONLINEAR else super()._function(node, value)

    @staticmethod
    def _averaged(node: fx.Node) -> bool:
        users = [(getattr(u.target, "overloadpacket", None), u.args[1:2]) for u in node.users]
        return users == [(aten.mean, ([-1],))]

    def _attention(self, node: fx.Node, value: Tensor) -> Tensor:
        q, k, v = self._operands(node)
        self._product(q, k.transpose(-1, -2), (*q.shape[:-1], k.shape[-2]))
        zero = torch.zeros((), dtype=torch.long)
        return self._product(zero.expand(*q.shape[:-1], k.shape[-2]), v, tuple(value.shape))  # type: ignore[return-value]

    def _product(self, a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """Labels of a matrix product. Heads, its leading dimensions but the first, stay apart."""
        if a.dim() < 2 or b.dim() < 2:
            return None
        fixed = [not self.variables.roots(t).any() for t in (a, b)]
        if fixed[0] or not fixed[1]:
            right = self.variables.merge(b, [*range(b.dim() > 2), -2 if fixed[0] else -1])
            self._apart(right)
        if fixed[1] or not fixed[0]:
            left = self.variables.merge(a, [*range(a.dim() > 2), -1 if fixed[1] else -2])
            self._apart(left)
        if fixed[0]:
            return right.expand(shape)
        if fixed[1]:
            return left.expand(shape)
        self.variables.join(left, right.transpose(-1, -2))
        return torch.zeros((), dtype=torch.long).expand(shape)

    def _apart(self, labels: Tensor) -> None:
        heads = labels.shape[:-2].numel()
        classes = torch.arange(heads).repeat_interleave(labels.numel() // heads)
        self._mark("head", str(len(self.marks)), labels, classes)

    def _scaled(self, node: fx.Node, value: Tensor) -> Tensor | None:
        """Labels of a product or quotient by something that is the same for all channels, or by a norm's gain."""
        tensors, product = self._tensors(node), node.target in (aten.mul.Tensor, aten.mul.Scalar)
        if node.kwargs or (not product and node.args[0] not in tensors):
            return None
        if len(tensors) == 1:
            return self._of(tensors[0])
        for x, other in ((tensors[0], tensors[1]), (tensors[1], tensors[0]))[: 2 if product else 1]:
            labels = self.variables.roots(self._of(x))
            if not labels.any():
                continue
            gain = self._gain(other) if product else None
            if gain is not None and self.env[other].shape == value.shape[-1:] == self.env[x].shape[-1:]:
                readers = self._readers(node, value.dim())
                self.variables.fix(self._of(other))
                if readers is None:
                    return None
                channels = self._channels(labels)
                name, offset = gain
                self.norm_of[name] = Norm(name, readers, offset), False
                self._mark("norm", name, channels)
                return channels.expand(value.shape)
            shape = (1,) * (labels.dim() - self.env[other].dim()) + tuple(self.env[other].shape)
            if len(shape) > labels.dim() or self.variables.roots(self._of(other)).any():
                continue
            varies = [bool((labels != labels.narrow(d, 0, 1)).any()) for d in range(labels.dim())]
            if not any(n > 1 and v for n, v in zip(shape, varies, strict=True)):
                return labels.expand(value.shape)
        return None

    def _gain(self, node: fx.Node) -> tuple[str, float] | None:
        """The parameter of one dimension that a node reads, and what is added to it."""
        offset = 0.0
        while node.op == "call_function":
            target, rest = getattr(node.target, "overloadpacket", node.target), node.args[1:]
            if target is aten.add and len(rest) == 1 and isinstance(rest[0], int | float):
                offset += rest[0]
            elif target not in _CASTS:
                return None
            if not isinstance(node.args[0], fx.Node):
                return None
            node = node.args[0]
        name = str(node.target)
        return (name, offset) if node.op == "get_attr" and name in self.alone else None
