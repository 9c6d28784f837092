"""Activations between the layers of a graph that is run layer by layer: in memory up to a budget, the rest on disk."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in a file, its bare bytes."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size

    def read(self) -> Tensor:
        return torch.from_numpy(np.fromfile(self.path, np.uint8)).view(self.dtype).reshape(self.shape)


class Store:
    """Keeps tensors in memory up to a budget in bytes, and the others in files."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget, self.held = folder, budget, 0
        self.numbers = itertools.count()

    def put(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if self.held + _size(value) <= self.budget:
            self.held += _size(value)
            return value
        path = self.folder / f"{next(self.numbers)}.pt"
        value.contiguous().flatten().view(torch.uint8).numpy().tofile(path)
        return _OnDisk(path, value.dtype, value.shape)

    def drop(self, kept: Any) -> None:
        if isinstance(kept, _OnDisk):
            kept.path.unlink()
        elif isinstance(kept, Tensor):
            self.held -= _size(kept)


def give_back() -> None:
    """Return what is freed to the system where the C library holds on to it, as glibc does to pieces below 32 MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _size(value: Tensor) -> int:
    """Bytes: those of an expanded tensor are few."""
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def _save(value: Any, path: Path) -> None:
    """A view of something larger is saved alone."""
    part = isinstance(value, Tensor) and value.untyped_storage().nbytes() > _size(value)
    torch.save(value.clone() if part else value, path)


def _get(kept: Any) -> Any:
    return kept.read() if isinstance(kept, _OnDisk) else kept


class Kept(Sequence[Tensor]):
    """What a value is in every batch, read when asked for."""

    def __init__(self, kept: list[Any]) -> None:
        self.kept = list(kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: Any) -> Any:
        return [_get(k) for k in self.kept[i]] if isinstance(i, slice) else _get(self.kept[i])


class Stream:
    """A graph run node after node on all batches; a value is forgotten behind its last use, batch by batch."""

    def __init__(self, graph: fx.GraphModule, batches: Sequence[Tensor], store: Store) -> None:
        self.graph, self.batches, self.store = graph, batches, store
        self.modules = dict(graph.named_modules())
        self.values: dict[fx.Node, list[Any]] = {}
        self.done: dict[fx.Node, list[fx.Node]] = {}
        last = {used: node for node in graph.graph.nodes for used in node.all_input_nodes}
        for used, node in last.items():
            self.done.setdefault(node, []).append(used)

    def inputs(self, node: fx.Node) -> Kept:
        """What reaches a module, batch by batch."""
        return Kept(self.values[node.all_input_nodes[0]])

    def run(self, node: fx.Node, known: Sequence[Any] | None = None) -> None:
        """Compute the node for every batch, unless its values are known and in the store."""
        if node.op in ("placeholder", "get_attr"):
            self.values[node] = list(self.batches) if node.op == "placeholder" else self._constant(node)
        elif node.op != "output":
            call = self.modules[str(node.target)] if node.op == "call_module" else node.target
            results = []
            for i in range(len(self.batches)):
                value = self._apply(call, node, i) if known is None else known[i]
                for used in self.done.get(node, []):
                    self._drop(used, i)
                results.append(self.store.put(value) if known is None else value)
            self.values[node] = results
        for used in self.done.get(node, []):
            del self.values[used]
        if not node.users and node in self.values:
            self._forget(node)

    def ahead(self, node: fx.Node, module: nn.Module) -> list[Any]:
        """What `module` makes of the inputs of the node, which stay; to be given to `run` as known."""
        return [self.store.put(self._apply(module, node, i)) for i in range(len(self.batches))]

    def _forget(self, node: fx.Node) -> None:
        for i in range(len(self.batches)):
            self._drop(node, i)
        del self.values[node]

    def _drop(self, node: fx.Node, batch: int) -> None:
        if node.op not in ("placeholder", "get_attr"):
            self.store.drop(self.values[node][batch])
        self.values[node][batch] = None

    def _constant(self, node: fx.Node) -> list[Any]:
        owner, _, leaf = str(node.target).rpartition(".")
        return [getattr(self.modules[owner], leaf)] * len(self.batches)

    def _apply(self, call: Any, node: fx.Node, batch: int) -> Any:
        def pick(used: fx.Node) -> Any:
            return _get(self.values[used][batch])

        return call(*fx.map_arg(node.args, pick), **fx.map_arg(node.kwargs, pick))

    def save(self, folder: Path) -> None:
        """Write every value that is alive, file by file."""
        folder.mkdir()
        for node, kept in self.values.items():
            for i, value in enumerate(kept) if node.op not in ("placeholder", "get_attr") else ():
                _save(_get(value), folder / f"{node.name}.{i}.pt")

    def load(self, folder: Path, before: int) -> None:
        """Take up what `save` wrote, in front of the node number `before`."""
        nodes = list(self.graph.graph.nodes)
        needed = {used for node in nodes[before:] for used in node.all_input_nodes}
        for node in nodes[:before]:
            if node not in needed:
                continue
            if node.op in ("placeholder", "get_attr"):
                self.run(node)
                continue
            files = [folder / f"{node.name}.{i}.pt" for i in range(len(self.batches))]
            self.values[node] = [self.store.put(torch.load(file, weights_only=True)) for file in files]
