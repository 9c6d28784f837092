"""Free factors: which rows of weights can be multiplied, and which columns divided, so that the function stays.

Each row of a layer, each weight of a normalization and each output of a policy's input stage is a variable: its
factor f > 0. The graph runs once on an example, and beside each value runs a tensor of the same shape, its labels,
that say which variable scales each element. Reshapes, transposes and slices act on labels as on the value; steps with
g(f x) = f g(x) keep them; a sum makes the labels of its terms equal; a layer takes one label per column, and starts
new ones; the product of queries and keys makes one the inverse of the other. Whatever is not known fixes what it
reads: f = 1. What is free at the end, is a symmetry of the network.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantkit.attention import Attention, MatMul
from quantkit.policy import Policy
from quantkit.qlayers import Point, QLayer, op_of, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Factors:
    """Labels of the rows (outputs,) of each producer and of the columns (inputs,) of each consumer, by name.

    0: the factor is 1. v: that of variable v. -v: its inverse. Producers are layers and normalizations, parameters that
    multiply, and the input stage under "". norms: those that are no layers. In the order of execution.
    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    norms: frozenset[str]


@torch.no_grad()
def free_factors(graph: fx.GraphModule, example: Tensor, policy: Policy | None = None) -> Factors:
    """Follow the graph on the example; policy: whose network it is, if the input stage may be scaled, too."""
    follower = Follower(graph, policy)
    follower.run(example)
    roots = follower.variables.roots
    rows, columns = ({n: roots(v) for n, v in found.items()} for found in (follower.rows, follower.columns))
    columns = {n: torch.where(v == ANY, 0, v) for n, v in columns.items()}
    return Factors(rows, columns, frozenset(follower.norms))


ANY = 1 << 30  # the label of an element that is always zero


class Variables:
    """Signed union-find. Label 0: the factor is 1. v: that of variable v. -v: its inverse."""

    def __init__(self) -> None:
        self.parent = [0]

    def fresh(self, count: int) -> Tensor:
        """Labels of new variables, (count,)."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def root(self, label: int) -> int:
        """The label that all equal ones share."""
        if label == ANY:
            return label
        found = abs(label)
        sign = 1
        while self.parent[found] != found:
            above = self.parent[found]
            found, sign = abs(above), sign if above > 0 else -sign
        self.parent[abs(label)] = found * sign  # shorter for the next one
        return found * sign if label > 0 else -found * sign

    def equate(self, a: int, b: int) -> None:
        """Make two labels equal; one that equals its own inverse is 0."""
        a, b = self.root(a), self.root(b)
        if a == b or ANY in (a, b):
            return
        if a == 0 or a == -b:
            self.parent[abs(b)] = 0
        elif a > 0:
            self.parent[a] = b
        else:
            self.parent[-a] = -b

    def roots(self, labels: Tensor) -> Tensor:
        """Every label's root, same shape."""
        known, where = _slim(labels)[0].unique(return_inverse=True)
        found = torch.tensor([self.root(v) for v in known.tolist()], dtype=torch.long)
        return found[where].expand(labels.shape)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """Equate two tensors of labels element by element; the result has a's labels, b's where a's is any."""
        a, b = torch.broadcast_tensors(a, b)
        u, v = _slim(a, b)
        differ = u != v
        pairs = (u[differ] * (1 << 32) + v[differ]).unique()
        second = (pairs + (1 << 31)) % (1 << 32) - (1 << 31)
        for left, right in zip(((pairs - second) >> 32).tolist(), second.tolist(), strict=True):
            self.equate(left, right)
        return torch.where(u == ANY, v, u).expand(a.shape)

    def merge(self, labels: Tensor, dims: Iterable[int]) -> Tensor:
        """Equate all labels along `dims`, which stay with size 1."""
        kept = tuple(dims)
        if not kept:
            return labels
        first = labels.amin(dim=kept, keepdim=True)  # any is the largest
        self.join(labels, first)
        return first

    def fix(self, labels: Tensor) -> None:
        """Make every factor 1."""
        self.join(labels, torch.zeros((), dtype=torch.long))


def _slim(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors without the repetitions that all of them have along a dimension."""
    for dim in range(tensors[0].dim()):
        if all(t.stride(dim) == 0 for t in tensors):
            tensors = tuple(t.narrow(dim, 0, min(1, t.shape[dim])) for t in tensors)
    return tensors


def _inverse(labels: Tensor) -> Tensor:
    return torch.where(labels == ANY, labels, -labels)


_SAME_MODULES = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout2d, Point)
_POOL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_SAME = {aten.relu, aten.leaky_relu, aten.prelu, aten.neg, aten.abs, aten.clone, aten.to, aten._to_copy, aten.dropout}
_SHAPE = {
    *(aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
    *(aten.permute, aten.transpose, aten.t, aten.movedim, aten.numpy_T, aten.swapaxes, aten.contiguous),
    *(aten.slice, aten.select, aten.narrow, aten.chunk, aten.split, aten.split_with_sizes, aten.unbind),
    *(aten.cat, aten.stack, aten.expand, aten.expand_as, aten.repeat, aten.repeat_interleave, aten.index_select),
    *(aten.flip, aten.roll, aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle, aten.index),
}
_POOLS = {
    **dict.fromkeys((aten.max_pool1d, aten.avg_pool1d, aten.adaptive_avg_pool1d, aten.upsample_nearest1d), 1),
    **dict.fromkeys((aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d, aten.upsample_nearest2d), 2),
    **dict.fromkeys((aten.max_pool2d_with_indices, aten._adaptive_avg_pool2d, aten.upsample_bilinear2d), 2),
}


class Follower(fx.Interpreter):
    """Runs a graph, and finds for every value the labels of its elements (None: all are 0).

    rows, columns, norms: as in `Factors`, before the last variables are made equal.
    """

    def __init__(self, graph: fx.GraphModule, policy: Policy | None) -> None:
        super().__init__(graph)
        self.policy, self.variables = policy, Variables()
        self.labels: dict[fx.Node, Any] = {}
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.norms: set[str] = set()
        self.modules = dict(graph.named_modules())
        self.alone = _alone(graph, self.modules)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.labels[n] = self._labels(n, value)
        return value

    def _labels(self, node: fx.Node, value: Any) -> Any:
        if node.op == "placeholder" and self.policy is not None:
            self.rows[""] = self.variables.fresh(math.prod(self.policy.obs_shape))
            return self.rows[""].reshape(value.shape[1:]).expand(value.shape)
        found = None
        if node.op == "call_module":
            found = self._module(node, self.modules[str(node.target)], value)
        elif node.op == "call_function":
            found = self._function(node, value)
        if found is None:
            for used in node.all_input_nodes:
                self._fix(self.labels[used])
        return found

    def _fix(self, labels: Any) -> None:
        for each in labels if isinstance(labels, list | tuple) else [labels]:
            if each is not None:
                self.variables.fix(each)

    def _of(self, argument: Any) -> Tensor:
        """The labels of a tensor argument, with zeros for None."""
        labels = self.labels[argument]
        return torch.zeros((), dtype=torch.long).expand(self.env[argument].shape) if labels is None else labels

    def _module(self, node: fx.Node, module: nn.Module, value: Any) -> Any:
        """The labels behind a module; None if it is not known, runs twice or shares its weight."""
        name, x = str(node.target), node.args[0]
        if isinstance(module, QLayer) or op_of(module) is not None:
            return self._layer(name, module, x, value) if name in self.alone else None  # type: ignore[arg-type]
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            if name not in self.alone or module.weight is None or module.weight.dim() != 1:
                return None
            self.variables.fix(self._of(x))
            return self._norm(name, value)
        if isinstance(module, MatMul):
            return self._product(self._of(x), self._of(node.args[1]), value.shape)
        if isinstance(module, Attention):
            return self._attention(node, value)
        if isinstance(module, _SAME_MODULES):
            return self._of(x)
        if isinstance(module, nn.Flatten):
            return module(self._of(x))
        return self._pooled(self._of(x), 2, value) if isinstance(module, _POOL_MODULES) else None

    def _norm(self, name: str, value: Tensor) -> Tensor:
        self.norms.add(name)
        self.rows[name] = self.variables.fresh(value.shape[-1])
        return self.rows[name].expand(value.shape)

    def _layer(self, name: str, layer: Any, x: Any, value: Tensor) -> Tensor:
        shape = shape_of(layer)
        axis = -1 - len(shape.kernel)
        if shape.op != "embedding":
            labels = self._of(x)
            others = [d for d in range(labels.dim()) if d != labels.dim() + axis]
            self.columns[name] = self.variables.merge(labels, others).flatten()
        self.rows[name] = self.variables.fresh(shape.outputs)
        return self.rows[name].reshape(-1, *(1 for _ in shape.kernel)).expand(value.shape)

    def _operands(self, node: fx.Node) -> tuple[Tensor, Tensor, Tensor]:
        """Labels of the queries, keys and values of attention, a head of each for every head of queries."""
        q, k, v = (self._of(a) for a in node.args[:3])
        for mask in node.args[3:]:
            self._fix(self.labels[mask])  # type: ignore[index]
        if q.dim() > 2:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], dim=-3) for t in (k, v))
        return q, k, v

    def _attention(self, node: fx.Node, value: Tensor) -> Tensor:
        q, k, v = self._operands(node)
        self._fix(self._product(q, k.transpose(-1, -2), (*q.shape[:-1], k.shape[-2])))  # in front of the softmax
        return self.variables.merge(v, [-2]).expand(value.shape)

    def _product(self, a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """Labels of a matrix product: those of one side if the other is fixed; 0 if both are free and cancel."""
        if a.dim() < 2 or b.dim() < 2:
            return None
        if not self.variables.roots(a).any():
            return self.variables.merge(b, [-2]).expand(shape)
        if not self.variables.roots(b).any():
            return self.variables.merge(a, [-1]).expand(shape)
        left, right = self.variables.merge(a, [-2]), self.variables.merge(b, [-1])
        self.variables.join(left, _inverse(right).transpose(-1, -2))
        return torch.zeros((), dtype=torch.long).expand(shape)

    def _pooled(self, labels: Tensor, spatial: int, value: Any) -> Any:
        merged = self.variables.merge(labels, range(-spatial, 0))
        if isinstance(value, tuple):  # with the indices of the maxima
            return [merged.expand(value[0].shape), torch.zeros_like(value[1])]
        return merged.expand(value.shape)

    def _function(self, node: fx.Node, value: Any) -> Any:
        """The labels behind an ATen operation; None if it is not known to keep factors."""
        target, source = getattr(node.target, "overloadpacket", node.target), node.args[0] if node.args else None
        if target is aten.sym_size:
            return []  # a size says nothing about values
        if target is operator.getitem:
            labels: Any = self.labels[source]  # type: ignore[index]
            return labels[node.args[1]] if isinstance(labels, list | tuple) else None  # type: ignore[index]
        arguments: Any = fx.map_arg((node.args[1:], node.kwargs), self.env.__getitem__)
        rest, options = arguments
        if target in _SHAPE and isinstance(source, fx.Node | list | tuple):
            moved = self._of(source) if isinstance(source, fx.Node) else [self._of(a) for a in source]  # type: ignore[arg-type]
            return node.target(moved, *rest, **options)  # type: ignore[operator]
        if target in (aten.add, aten.sub, aten.maximum, aten.minimum):
            terms = self._tensors(node)
            return self.variables.join(*map(self._of, terms)) if len(terms) == 2 else None
        if target in (aten.mul, aten.div):
            return self._scaled(node, value)
        if not isinstance(source, fx.Node) or not self._is_float(self.env[source]):
            return None
        if target in _SAME and self._is_float(value):
            return self._of(source)
        if target in _POOLS:
            return self._pooled(self._of(source), _POOLS[target], value)
        if target in (aten.mean, aten.sum, aten.amax) and rest and isinstance(rest[0], list | tuple) and rest[0]:
            return self.variables.merge(self._of(source), rest[0]).reshape(value.shape)
        if target is aten.pad and (len(rest) < 2 or (rest[1] == "constant" and not any(rest[2:]))):
            return nn.functional.pad(self._of(source), rest[0], value=ANY)
        return None

    @staticmethod
    def _is_float(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point()

    def _tensors(self, node: fx.Node) -> list[fx.Node]:
        """Which of the two operands are tensors."""
        return [a for a in node.args[:2] if isinstance(a, fx.Node) and isinstance(self.env[a], Tensor)]

    def _scaled(self, node: fx.Node, value: Tensor) -> Tensor | None:
        """Labels of a product or quotient by element: those of one side where the other is fixed.

        A parameter of one dimension that multiplies something fixed is a producer.
        """
        divides, tensors = node.target not in (aten.mul.Tensor, aten.mul.Scalar), self._tensors(node)
        if node.kwargs or (divides and node.args[0] not in tensors):  # rounded, or a quotient of a number
            return None
        if len(tensors) == 1:
            return self._of(tensors[0])
        a, b = (self.variables.roots(self._of(t)) for t in tensors)
        if divides:
            return None if b.any() else a.expand(value.shape)
        for gain, other in ((tensors[0], b), (tensors[1], a)):
            name = str(gain.target)
            if gain.op == "get_attr" and name in self.alone and not other.any():
                if self.env[gain].shape == value.shape[-1:]:
                    return self._norm(name, value)
        a, b = torch.broadcast_tensors(a, b)
        both = (a != 0) & (b != 0)
        for labels in (a, b):
            self.variables.fix(torch.where(both, labels, 0))
        return torch.where(both, 0, a + b)


def _alone(graph: fx.GraphModule, modules: dict[str, nn.Module]) -> set[str]:
    """Names of modules and parameters that are used once and share no memory with others."""
    called = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    read = [n for n in graph.graph.nodes if n.op == "get_attr" and str(n.target) in parameters]
    weights = {n: getattr(modules[n], "weight", None) for n in dict.fromkeys(called)}
    weights |= {str(n.target): parameters[str(n.target)] for n in read}
    owners: dict[int, int] = {}
    for weight in weights.values():
        if isinstance(weight, Tensor):
            owners[weight.data_ptr()] = owners.get(weight.data_ptr(), 0) + 1
    once = [n for n in weights if called.count(n) == 1]
    once += [t for n in read if len(n.users) == 1 and parameters[t := str(n.target)].dim() == 1]
    return {n for n in once if isinstance(w := weights[n], Tensor) and owners[w.data_ptr()] == 1}
