"""Tracing a decoder of many equal blocks by two of them: what export makes of the second stands for all behind it.

`torch.export` takes a third of a second for a block, and a language model repeats one 12 to 80 times.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

_OWN = frozenset({"_parameters", "_buffers", "_modules", "layer_idx"})
_PLAIN = (int, float, str, bool, tuple, torch.dtype, torch.Size, type(None))


def traced_by_two(module: nn.Module, trace: Callable[[nn.Module], fx.GraphModule]) -> fx.GraphModule | None:
    """`trace(module)`, for which only two of its blocks have been traced, or None where that may not be the same.

    It is taken for the same if the blocks are equal in everything but the numbers in their tensors (types, attributes,
    shapes), if transformers' configuration treats all layers alike, and if the graphs of the first two blocks are one
    graph, with one block's results in the place of those of the block before.
    """
    name = blocks_of(module)
    if name is None:
        return None
    blocks = module.get_submodule(name)
    held = dict(blocks._modules)
    blocks._modules = dict(list(held.items())[:2])
    try:
        graph = trace(module)
    finally:
        blocks._modules = held
    return _extended(graph, module, name, len(held))


def blocks_of(module: nn.Module) -> str | None:
    """The name of the list of at least three equal blocks in transformers' decoder; None where there is none."""
    config = getattr(module, "config", None)
    count = getattr(config, "num_hidden_layers", 0)
    if count < 3 or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return None
    each = [v for v in vars(config).values() if isinstance(v, list) and len(v) == count]
    if any(value != values[0] for values in each for value in values):  # a kind of attention for every layer
        return None
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return name if all(_alike(part[0], block) for block in part) else None
    return None


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules differ in the numbers in their tensors only, and in the attribute `layer_idx`."""
    mine, other = dict(a.named_modules()), dict(b.named_modules())
    return mine.keys() == other.keys() and all(_facts_alike(part, other[name]) for name, part in mine.items())


def _facts_alike(a: nn.Module, b: nn.Module) -> bool:
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    for tensors, others in ((a._parameters, b._parameters), (a._buffers, b._buffers)):
        if [(n, t if t is None else t.shape) for n, t in tensors.items()] != [
            (n, t if t is None else t.shape) for n, t in others.items()
        ]:
            return False
    pairs = [(value, vars(b)[key]) for key, value in vars(a).items() if key not in _OWN]
    return all(_equal(v, w) for v, w in pairs)


def _equal(v: Any, w: Any) -> bool:
    """Whether two attributes are surely the same: one object, equal plain values, empty (hooks), equal partials."""
    if isinstance(v, functools.partial) and isinstance(w, functools.partial):
        return v.func is w.func and _equal(v.args, w.args) and v.keywords == w.keywords
    if isinstance(v, dict | set | list):
        return type(v) is type(w) and not v and not w
    return v is w or (isinstance(v, _PLAIN) and type(v) is type(w) and v == w)


def _extended(gm: fx.GraphModule, module: nn.Module, name: str, count: int) -> fx.GraphModule | None:
    """The graph with two blocks called `name`.0 and `name`.1 as one with `count`; None where they are not alike."""
    first, second = ([node for node in gm.graph.nodes if _block(node, name) == k] for k in (0, 1))
    image = dict(zip(first, second, strict=False))
    carried = {node for b in second for node in b.all_input_nodes if node in image}  # from the first to the second
    leaving = {node for node in second if any(user not in image.values() for user in node.users)}
    if len(first) != len(second) or leaving != {image[node] for node in carried}:
        return None
    entering: dict[fx.Node, fx.Node] = {}  # what the first block takes from outside and the second from the first
    for a, b in image.items():
        if a.op != b.op or not _same_call(a, b, image, carried, entering, name):
            return None

    last = {node: image[node] for node in carried}
    behind = {node: [user for user in node.users if user not in image.values()] for node in leaving}
    constants = [node for node in second if node.op == "get_attr"]
    place, constant_place = second[-1], constants[-1] if constants else None
    for k in range(2, count):
        made: dict[fx.Node, fx.Node] = dict(last)
        for node in second:
            fixed = node.op == "get_attr"
            with gm.graph.inserting_after(constant_place if fixed else place):
                copy = gm.graph.node_copy(node, lambda n, made=made: made.get(n, n))  # type: ignore[misc]
            copy.meta["nn_module_stack"] = _stack(node, name, k)
            if fixed:
                copy.target = f"{name}.{k}{str(node.target).removeprefix(f'{name}.1')}"
                _install(gm, module, str(copy.target))
                constant_place = copy
            else:
                place = copy
            made[node] = copy
        last = {node: made[image[node]] for node in carried}
    for node in carried:
        for user in behind[image[node]]:
            user.replace_input_with(image[node], last[node])
    gm.graph.lint()
    return gm


def _block(node: fx.Node, name: str) -> int | None:
    """Which block of the list `name` a node is in."""
    paths = [str(node.target)] if node.op == "get_attr" else [str(p) for p, _ in _stack_of(node).values()]
    for path in paths:
        if found := re.match(rf"{re.escape(name)}\.(\d+)(\.|$)", re.sub(r"@\d+", "", path)):
            return int(found[1])
    return None


def _stack_of(node: fx.Node) -> dict[str, Any]:
    return node.meta.get("nn_module_stack") or {}


def _stack(node: fx.Node, name: str, k: int) -> dict[str, Any]:
    """The modules around a node of the second block, as they are called around its copy in block k."""
    old, new = f"{name}.1", f"{name}.{k}"
    return {
        key: (new + path.removeprefix(old) if path == old or path.startswith(f"{old}.") else path, kind)
        for key, (path, kind) in _stack_of(node).items()
    }


def _same_call(
    a: fx.Node,
    b: fx.Node,
    image: dict[fx.Node, fx.Node],
    carried: set[fx.Node],
    entering: dict[fx.Node, fx.Node],
    name: str,
) -> bool:
    """Whether b is to the second block what a is to the first; `entering` is completed."""
    if a.op == "get_attr":
        return str(a.target).removeprefix(f"{name}.0") == str(b.target).removeprefix(f"{name}.1")
    inputs, others = a.all_input_nodes, b.all_input_nodes
    if a.target != b.target or len(inputs) != len(others):
        return False
    if fx.map_arg((a.args, a.kwargs), inputs.index) != fx.map_arg((b.args, b.kwargs), others.index):
        return False
    for x, y in zip(inputs, others, strict=True):
        if x in image:
            if image[x] is not y:
                return False
        elif y in carried:
            if entering.setdefault(x, y) is not y:
                return False
        elif x is not y:
            return False
    return True


def _install(gm: fx.GraphModule, module: nn.Module, target: str) -> None:
    """Give the graph's module the tensor that `module` has under this name."""
    *path, leaf = target.split(".")
    owner: nn.Module = gm
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    source = module.get_submodule(".".join(path))
    if leaf in source._buffers:
        owner.register_buffer(leaf, source._buffers[leaf])
    else:
        owner.register_parameter(leaf, source._parameters[leaf])
