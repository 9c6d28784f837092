"""A graph that runs on all batches at once, a few nodes at a time; what must wait does so in memory or in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from quantkit.spool import Filed, Spool

LARGE = 2**20
"""Values from which on what a node makes of all batches waits in a file."""
PORTION = 49_152
"""Input values of a batch, at most, where a graph is walked: 62 digits of MNIST.

So it is whatever the batches of the calibration set are, as the last bits of a convolution change with its batch; with
token ids only, whose layers are wide, smaller batches are heeded.
"""


def portion(inputs: Tensor) -> int:
    """How many of these inputs make a batch of at most `PORTION` values; at least 32."""
    return max(32, PORTION // max(1, inputs[:1].numel()))


class Kept(Sequence[Tensor]):
    """What was kept of every batch, each read when it is looked at."""

    def __init__(self, kept: list[Any]) -> None:
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: Any) -> Any:
        return _read(self.kept[index])

    def shapes(self) -> list[torch.Size]:
        """The shapes of all, without reading any."""
        return [value.shape for value in self.kept]


class Later(Sequence[Tensor]):
    """A list that is made when it is first looked at."""

    def __init__(self, make: Callable[[], Sequence[Tensor]]) -> None:
        self.make: Callable[[], Sequence[Tensor]] | None = make
        self.made: Sequence[Tensor] = ()

    def __len__(self) -> int:
        return len(self.made_now())

    def __getitem__(self, index: Any) -> Any:
        return self.made_now()[index]

    def made_now(self) -> Sequence[Tensor]:
        """The list."""
        if self.make is not None:
            self.made, self.make = self.make(), None
        return self.made


def _read(value: Any) -> Any:
    return value.tensor() if isinstance(value, Filed) else value


class Batches:
    """A graph run on all batches, from one stop to the next; what nothing further reads is forgotten at once.

    From `LARGE` values on, what waits for a later stop does so in a file: a network of images holds several such values
    at once, each as large as the calibration set many times over.
    """

    def __init__(self, module: fx.GraphModule, batches: Iterable[Tensor]) -> None:
        self.module, self.modules = module, dict(module.named_modules())
        self.nodes = list(module.graph.nodes)
        self.batches = list(batches)
        self.spool = Spool()
        self.values: dict[fx.Node, list[Any]] = {}
        self.fixed: dict[fx.Node, Any] = {}
        self.place = 0
        self.last = {used: i for i, node in enumerate(self.nodes) for used in node.all_input_nodes}

    def of(self, node: fx.Node) -> Sequence[Tensor]:
        """What the node has made of each batch."""
        kept = self.values[node]
        return Kept(kept) if any(isinstance(value, Filed) for value in kept) else list(kept)

    def inputs(self, node: fx.Node) -> Sequence[Tensor]:
        """What reaches a module's first argument, batch by batch."""
        return self.of(node.all_input_nodes[0])

    def advance(self, stop: int, known: Sequence[Tensor] | None = None) -> None:
        """Run the nodes in front of number `stop`; known: what the first of them makes of each batch."""
        nodes, end = self.nodes[self.place : stop], stop
        if not nodes:
            return
        self.place = end
        made: dict[fx.Node, list[Any]] = {node: [] for node in nodes if self.last.get(node, -1) >= end}
        for i in range(len(self.batches)):
            now: dict[fx.Node, Any] = {}
            for number, node in enumerate(nodes, end - len(nodes)):
                now[node] = known[i] if known is not None and node is nodes[0] else self._run(node, now, i)
                for used in node.all_input_nodes:
                    if self.last[used] == number:
                        now.pop(used, None)
                        if used in self.values:
                            self.values[used][i] = None
            for node, values in made.items():
                values.append(self._kept(now[node]))
        self.values = {n: v for n, v in self.values.items() if self.last[n] >= end} | made

    def _kept(self, value: Any) -> Any:
        large = isinstance(value, Tensor) and value.dtype == torch.float32
        return self.spool.put(value) if large and value.numel() * len(self.batches) >= LARGE else value

    def _run(self, node: fx.Node, now: dict[fx.Node, Any], batch: int) -> Any:
        if node.op == "placeholder":
            return self.batches[batch]
        if node.op == "get_attr":
            if node not in self.fixed:
                owner, _, leaf = str(node.target).rpartition(".")
                self.fixed[node] = getattr(self.modules[owner], leaf)
            return self.fixed[node]
        if node.op == "output":
            return None

        def pick(used: fx.Node) -> Any:
            if used in self.values and used not in now:
                now[used] = _read(self.values[used][batch])
            return now[used]

        call: Any = self.modules[str(node.target)] if node.op == "call_module" else node.target
        return call(*fx.map_arg(node.args, pick), **fx.map_arg(node.kwargs, pick))
