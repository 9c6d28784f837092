"""A network cut into blocks at single values, and run block by block on all batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from quantkit.policy import Policy
from quantkit.qlayers import QLayer

Split = Literal["auto", "network", "layer"]
"""What a block is: what a list of modules holds at one index (or the network where there is none), all, or a layer."""


@dataclass(frozen=True)
class Block:
    """A stretch of the graph that ends as soon as, behind its last layer, a single value goes on: a residual sum, say.

    names: the layers to be quantized. before: nodes that come before the first of them. nodes: from there to the end.
    end: the node that goes on.
    """

    names: tuple[str, ...]
    before: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    end: fx.Node | None


def graph_of(module: nn.Module) -> fx.Graph:
    """The module as a graph of calls: its own (with one output), a policy's chain, or one call of it all."""
    if isinstance(module, fx.GraphModule):
        return module.graph
    graph = fx.Graph()
    value = graph.placeholder("x")
    calls = [""]
    if isinstance(module, Policy):
        steps = dict(module.net.named_children())
        if all(isinstance(step, QLayer) or not any(True for _ in step.children()) for step in steps.values()):
            calls = ["stage", *(f"net.{name}" for name in steps)]
    for name in calls:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


def blocks_of(graph: fx.Graph, wanted: list[str], split: Split) -> Iterator[Block]:
    """The blocks in the order of their run; layers that never run come last, without nodes."""
    nodes = list(graph.nodes)
    if nodes[-2].target == "":
        yield Block(tuple(wanted), tuple(nodes[:-2]), (nodes[-2],), nodes[-2])
        return
    first: dict[str, int] = {}
    for place, node in enumerate(nodes):
        if node.op == "call_module" and node.target in wanted:
            first.setdefault(str(node.target), place)
    order = sorted(first, key=first.__getitem__)
    cuts, begin, names = _cuts(nodes, set(order)), 0, []
    keys = _keys(order, split)
    for number, name in enumerate(order):
        names.append(name)
        following = first[order[number + 1]] if number + 1 < len(order) else len(nodes)
        possible = [p for p in cuts if first[name] <= p < following]
        last = number + 1 == len(order)
        if last or (possible and keys[name] != keys[order[number + 1]]):
            end, value = (possible[0], cuts[possible[0]]) if possible else (len(nodes) - 2, nodes[-1].args[0])
            start = first[names[0]]
            yield Block(tuple(names), tuple(nodes[begin:start]), tuple(nodes[start : end + 1]), value)  # type: ignore[arg-type]
            begin, names = end + 1, []
    idle = tuple(name for name in wanted if name not in first)
    if idle:
        yield Block(idle, (), (), None)


def _keys(names: list[str], split: Split) -> dict[str, str]:
    """What tells the layers of one block from those of the next: `model.layers.3` of `model.layers.3.mlp.up_proj`."""
    if split == "network":
        return dict.fromkeys(names, "")
    if split == "layer":
        return {name: name for name in names}
    keys = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        keys[name] = "" if number is None else ".".join(parts[: number + 1])
    counts = Counter(keys.values())
    return keys if any(key and count > 1 for key, count in counts.items()) else dict.fromkeys(names, "")


def _cuts(nodes: list[fx.Node], layers: set[str]) -> dict[int, fx.Node]:
    """Place -> the one value behind it that depends on any of the layers and is still needed."""
    last = {used: place for place, node in enumerate(nodes) for used in node.all_input_nodes}
    depends: set[fx.Node] = set()
    live: set[fx.Node] = set()
    found = {}
    for place, node in enumerate(nodes[:-1]):
        if (node.op == "call_module" and node.target in layers) or not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
            live.add(node)
        live = {value for value in live if last.get(value, -1) > place}
        if len(live) == 1:
            (found[place],) = live
    return found


class Flow:
    """A network run stretch by stretch on all batches, its values kept only while they are needed."""

    def __init__(self, graph: fx.Graph, module: nn.Module, batches: tuple[Tensor, ...]) -> None:
        self.modules = dict(module.named_modules())
        nodes = list(graph.nodes)
        self.last = {used.name: node.name for node in nodes for used in node.all_input_nodes}
        (entry,) = [node.name for node in nodes if node.op == "placeholder"]
        self.values: list[dict[str, Any]] = [{entry: x} for x in batches]
        self.done = {entry}

    def advance(self, nodes: tuple[fx.Node, ...]) -> None:
        """Run these nodes, those already run excepted, and forget what no later one needs."""
        fresh = [node for node in nodes if node.name not in self.done]
        with torch.no_grad():
            for values in self.values:
                self._run(fresh, values)
        self.done |= {node.name for node in fresh}

    def output(self, block: Block, values: Mapping[str, Any]) -> Tensor:
        """What the block makes of these values at its beginning."""
        assert block.end is not None
        mine = dict(values)
        self._run(block.nodes, mine)
        y: Tensor = mine[block.end.name]
        return y

    def outputs(self, block: Block, values: list[dict[str, Any]] | None = None) -> list[Tensor]:
        """`output` for every batch, of these values or the own ones, without gradients."""
        with torch.no_grad():
            return [self.output(block, v) for v in (self.values if values is None else values)]

    def _run(self, nodes: Any, values: dict[str, Any]) -> None:
        def pick(used: fx.Node) -> Any:
            return values[used.name]

        for node in nodes:
            if node.op == "get_attr":
                owner, _, leaf = str(node.target).rpartition(".")
                values[node.name] = getattr(self.modules[owner], leaf)
            elif node.op in ("call_module", "call_function", "call_method"):
                args, kwargs = fx.map_arg(node.args, pick), fx.map_arg(node.kwargs, pick)
                if node.op == "call_method":
                    values[node.name] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    call = self.modules[str(node.target)] if node.op == "call_module" else node.target
                    values[node.name] = call(*args, **kwargs)
            for used in node.all_input_nodes:
                if self.last[used.name] == node.name:
                    values.pop(used.name, None)
