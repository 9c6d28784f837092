"""Links: layers and what stands before them, between which a factor per channel can be moved.

`find_links` gathers the free factors of `quantkit.symmetry` into links, and `rescale` applies a choice of them.
Cross-layer equalization, SmoothQuant and the methods for a policy's input stand on both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from quantkit.model import Model
from quantkit.policy import InputStage, Policy
from quantkit.qlayers import Plain, QLayer, shape_of, turned
from quantkit.symmetry import Factors, free_factors

Layer = Plain | QLayer
Kind = Literal["layer", "norm", "input", "qk"]


@dataclass(frozen=True)
class Link:
    """Channels that `producers` put out and `consumers` read, each with a factor of its own that cancels.

    kind "layer": all producers are layers. "norm": some are normalizations (by module) or a parameter that
    multiplies (by its own name). "input": it is a policy's input stage, and `producers` is empty. "qk": queries and
    keys, which cancel each other; `consumers` is empty.
    channels: how many factors. rows: for each producer, (outputs,), 0 where an output is in no channel of the link,
    i + 1 where factor i multiplies it, -(i + 1) where it divides (keys); the input stage under "". columns: for each
    consumer, (inputs,), i + 1 where factor i divides the column. After a flattened convolution a channel has several
    columns; in a residual stream it has a row in several producers.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    kind: Kind
    channels: int = field(default=0, compare=False)
    rows: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    columns: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)


def find_links(model: Model) -> list[Link]:
    """Every link of a policy or a captured graph in the order of execution; of any other module, and of a recurrent
    policy, none.

    A layer that runs more than once, or shares its weight with another, is part of no link.
    """
    example = torch.cat([model.example, model.example])[:2]
    if isinstance(model.module, fx.GraphModule):
        return _gathered(free_factors(model.module, example))
    policy = model.module
    if not isinstance(policy, Policy) or policy.recurrent:
        return []
    with torch.no_grad():
        graph, x = fx.GraphModule(policy.net, _Tracer().trace(policy.net)), policy.stage(example)
    found = free_factors(graph, x, policy)
    rows = {f"net.{name}" if name else "": labels for name, labels in found.rows.items()}
    columns = {f"net.{name}": labels for name, labels in found.columns.items()}
    return _gathered(Factors(rows, columns, frozenset(f"net.{name}" for name in found.norms)))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QLayer) or super().is_leaf_module(m, module_qualified_name)


def _gathered(found: Factors) -> list[Link]:
    """The variables that run through the same producers and consumers, with the same signs, make one link."""
    sides = [("rows", name, v) for name, v in found.rows.items()]
    sides += [("columns", name, v) for name, v in found.columns.items()]
    places: dict[int, dict[tuple[str, str, bool], None]] = {}
    for side, name, labels in sides:
        for label in filter(None, labels.tolist()):
            places.setdefault(abs(label), {})[side, name, label > 0] = None
    alike: dict[tuple[tuple[str, str, bool], ...], list[int]] = {}
    for variable, where in places.items():
        positive = next(iter(where))[2]  # the first producer multiplies, by definition
        key = tuple((side, name, sign == positive) for side, name, sign in where)
        alike.setdefault(key, []).append(variable if positive else -variable)
    links = []
    for key, variables in alike.items():
        index = {v: i + 1 for i, v in enumerate(variables)} | {-v: -i - 1 for i, v in enumerate(variables)}
        rows, columns = (
            {name: torch.tensor([index.get(v, 0) for v in labels[name].tolist()]) for s, name, _ in key if s == side}
            for side, labels in (("rows", found.rows), ("columns", found.columns))
        )
        opposed = len({sign for _, _, sign in key}) == 2
        if opposed == bool(columns):
            continue  # keys that a layer reads, too; a row that reaches nothing
        kind: Kind = "qk" if opposed else "norm" if rows.keys() & found.norms else "input" if "" in rows else "layer"
        if kind != "input" or bool(rows[""].all()):  # methods for the input stage want the whole of it
            links.append(Link(tuple(filter(None, rows)), tuple(columns), kind, len(variables), rows, columns))
    return links


def rescale(model: Model, link: Link, factor: Tensor) -> None:
    """Multiply channel i of the link by factor[i] > 0 where it is produced, and divide where it is read, in place."""
    layers = model.layers()
    for name, index in link.rows.items():
        f = _spread(index, factor)
        if name in layers:
            scale_rows(layers[name], f)
        elif name:
            owner, _, leaf = name.rpartition(".")
            part = getattr(model.module.get_submodule(owner), leaf)
            for parameter in [part] if isinstance(part, Tensor) else [part.weight, getattr(part, "bias", None)]:
                _scale(parameter, f)
        else:
            assert isinstance(model.module, Policy)
            scale_stage(model.module, f)
    for name, index in link.columns.items():
        scale_columns(layers[name], 1 / _spread(index, factor))


def ranges(model: Model, link: Link, *, bias: bool = True) -> tuple[Tensor, Tensor]:
    """Largest magnitude of the layers' weights that each factor multiplies, and of those it divides, (channels,) each.

    bias: biases count as weights of their rows.
    """
    layers, n = model.layers(), link.channels
    rows = [(index, row_range(layers[name], bias=bias)) for name, index in link.rows.items() if name in layers]
    columns = [(index, column_range(layers[name])) for name, index in link.columns.items()]
    up = [gathered(index, top, n) for index, top in rows]
    down = [gathered(-index, top, n) for index, top in rows] + [gathered(index, top, n) for index, top in columns]
    return largest(up, n), largest(down, n)


def largest(parts: list[Tensor], channels: int) -> Tensor:
    """The largest per channel, (channels,); 0 of no parts."""
    return torch.stack([torch.zeros(channels), *parts]).amax(dim=0)


def gathered(index: Tensor, values: Tensor, channels: int) -> Tensor:
    """The largest of the values >= 0 of each channel, (channels,); index as in `Link.columns`."""
    chosen = index > 0
    return torch.zeros(channels).scatter_reduce(0, index[chosen] - 1, values[chosen].float(), "amax")


def _spread(index: Tensor, factor: Tensor) -> Tensor:
    """What each row or column is multiplied by, (len(index),)."""
    f = torch.cat([1 / factor.flip(0), factor.new_ones(1), factor])
    return f[index + len(factor)]


def matrix_of(layer: Any) -> Tensor:
    """The float weight as (outputs, inputs / groups, positions); of an embedding (features, tokens, 1)."""
    weight: Tensor = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        weight = turned(weight, layer.groups)
    elif shape_of(layer).op == "embedding":
        weight = weight.t()
    return weight.reshape(*weight.shape[:2], -1)


def store_matrix(layer: Any, matrix: Tensor) -> None:
    """Give the layer the weight of which this is the `matrix_of`."""
    shape = layer.weight.shape
    if isinstance(layer, nn.ConvTranspose2d):
        matrix = turned(matrix.reshape(*matrix.shape[:2], *shape[2:]), layer.groups)
    elif shape_of(layer).op == "embedding":
        matrix = matrix[..., 0].t()
    set_weight(layer, matrix.reshape(shape).contiguous())


def row_range(layer: Layer, *, bias: bool = True) -> Tensor:
    """Largest magnitude of each output's weights and, if asked for, bias, (outputs,)."""
    top = matrix_of(layer).abs().amax(dim=(1, 2))
    own = getattr(layer, "bias", None)
    return torch.maximum(top, own.detach().abs()) if bias and isinstance(own, Tensor) else top


def column_range(layer: Layer) -> Tensor:
    """Largest magnitude of the weights that meet each input channel, (inputs,)."""
    matrix, groups = matrix_of(layer).abs(), shape_of(layer).groups
    return matrix.reshape(groups, -1, *matrix.shape[1:]).amax(dim=(1, 3)).flatten()


def scale_columns(layer: Layer, factor: Tensor) -> None:
    """Multiply the weights that meet input channel i by factor[i], in place of the old ones."""
    matrix, groups = matrix_of(layer), shape_of(layer).groups
    split = matrix.reshape(groups, -1, *matrix.shape[1:])
    store_matrix(layer, (split * factor.reshape(groups, 1, -1, 1)).reshape(matrix.shape))


def scale_rows(layer: Layer, factor: Tensor) -> None:
    """Multiply output i (weights and bias) by factor[i]."""
    store_matrix(layer, matrix_of(layer) * factor[:, None, None])
    _scale(getattr(layer, "bias", None), factor)


def _scale(parameter: Tensor | None, factor: Tensor) -> None:
    if parameter is not None:
        parameter.data = parameter.data * factor


def scale_stage(policy: Policy, factor: Tensor) -> None:
    """Multiply output i of the input stage by factor[i], clip bounds included.

    factor: one per output, or one per channel of an image; where a channel's are all the same, that is enough.
    """
    stage: InputStage = policy.stage
    if len(factor) == math.prod(policy.obs_shape):
        factor = factor.reshape(policy.obs_shape)
        if factor.dim() == 3 and bool((factor == factor[:, :1, :1]).all()):
            factor = factor[:, :1, :1]
    else:
        factor = factor.reshape(-1, 1, 1)
    stage.std = stage.std / factor
    stage.low = stage.low * factor
    stage.high = stage.high * factor


def shift_stage(policy: Policy, shift: Tensor) -> None:
    """Add shift[i] to output i of the input stage, clip bounds included."""
    stage: InputStage = policy.stage
    shift = shift.reshape(policy.obs_shape)
    stage.mean = stage.mean - shift * stage.std
    stage.low = stage.low + shift
    stage.high = stage.high + shift


def set_weight(layer: Layer, weight: Tensor) -> None:
    """Give the layer another float weight."""
    layer.weight.data = weight
    if isinstance(layer, QLayer):
        layer.invalidate()
