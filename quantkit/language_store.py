"""Activations between the layers of a graph that is run layer by layer: in memory up to a budget, the rest on disk."""

from __future__ import annotations

import itertools
import json
import mmap
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quantkit.arithmetic import half_products
from quantkit.attention import Attention, MatMul
from quantkit.qlayers import QLayer
from quantkit.spool import give_back


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in a file, its bare bytes; as it lay in memory, so that sums run in the same order."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        value = torch.from_numpy(np.fromfile(self.path, np.uint8)).view(self.dtype).reshape(self.shape)
        if value.stride() == self.stride or 0 in self.stride:  # the latter is expanded
            return value
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).copy_(value)


class Store:
    """Keeps tensors in memory up to a budget in bytes, and the others in files.

    half: float32 is kept in bfloat16, in memory and on disk alike; whoever reads it gets float32 again.
    """

    def __init__(self, folder: Path, budget: int, half: bool = False) -> None:
        self.folder, self.budget, self.half, self.held = folder, budget, half, 0
        self.numbers = itertools.count()

    def put(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = torch.bfloat16 if self.half and value.dtype == torch.float32 else value.dtype
        size = _size(value) * dtype.itemsize // value.dtype.itemsize
        if self.held + size <= self.budget:
            self.held += size
            return _apart(value, dtype)
        path, value = self.folder / str(next(self.numbers)), value.to(dtype)
        _write(value, path)
        return _OnDisk(path, value.dtype, value.shape, value.stride())

    def drop(self, kept: Any) -> None:
        if isinstance(kept, _OnDisk):
            kept.path.unlink()
        elif isinstance(kept, Tensor):
            self.held -= _size(kept)


def _apart(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in memory of its own, if it is large: between others' it would keep freed pieces from the system."""
    if _size(value) < 2**20 or not value.is_contiguous():
        return value.to(dtype)
    held = torch.frombuffer(mmap.mmap(-1, value.numel() * dtype.itemsize), dtype=dtype)
    return held.reshape(value.shape).copy_(value)


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """A .safetensors file, written from where the tensors lie: the library's own function copies all of them first."""
    header: dict[str, Any] = {}
    at = 0
    for name, array in tensors.items():
        kind = "BOOL" if array.dtype.kind == "b" else f"{array.dtype.kind.upper()}{8 * array.itemsize}"
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    with path.open("wb") as file:
        file.write(framed(header))
        for array in tensors.values():
            np.ascontiguousarray(array).tofile(file)


def framed(header: dict[str, Any]) -> bytes:
    """The beginning of a .safetensors file: the length of what follows (8 bytes, little endian), and that in JSON."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size(value: Tensor) -> int:
    """Bytes: those of an expanded tensor are few."""
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def _write(kept: Any, path: Path) -> list[Any]:
    """Put the bare bytes of a kept tensor into a file; its dtype, shape and stride."""
    if isinstance(kept, _OnDisk):
        shutil.copyfile(kept.path, path)
    else:
        kept.contiguous().flatten().view(torch.uint8).numpy().tofile(path)
    stride = kept.stride if isinstance(kept, _OnDisk) else kept.stride()
    return [str(kept.dtype).removeprefix("torch."), list(kept.shape), list(stride)]


def _get(kept: Any) -> Any:
    return _float(_read(kept))


def _read(kept: Any) -> Any:
    return kept.read() if isinstance(kept, _OnDisk) else kept


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


class Kept(Sequence[Tensor]):
    """What a value is in every batch, read when asked for."""

    def __init__(self, kept: Sequence[Any]) -> None:
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: Any) -> Any:
        return [_get(k) for k in self.kept[i]] if isinstance(i, slice) else _get(self.kept[i])


class Later(Sequence[Tensor]):
    """Kept values that are made when they are first looked at; `kept` is None until then."""

    def __init__(self, make: Callable[[], list[Any]]) -> None:
        self.make = make
        self.kept: list[Any] | None = None

    def __len__(self) -> int:
        return len(self._made())

    def __getitem__(self, i: Any) -> Any:
        return self._made()[i]

    def _made(self) -> Kept:
        if self.kept is None:
            self.kept = self.make()
        return Kept(self.kept)


_MOVES = (torch.ops.aten.reshape.default, torch.ops.aten.transpose.int)
"""What moves numbers and computes none."""


def _is_linear(call: Any) -> bool:
    """Whether a call is a linear layer with a float input."""
    if isinstance(call, QLayer):
        return call.op == "linear" and call.act is None and call.in_scale is None
    return isinstance(call, nn.Linear)


class _Half:
    """A linear layer of float inputs with operands and result in bfloat16, but for what is done to the sum."""

    def __init__(self, layer: nn.Linear | QLayer) -> None:
        self.gain: Tensor | float | None = None
        if isinstance(layer, QLayer):
            self.weight, self.gain = layer.kernel().weight.bfloat16(), layer.kernel().gain
            layer.invalidate()  # decoded no more than this once
        else:
            self.weight = layer.weight.bfloat16()
        self.bias = layer.bias if layer.bias is not None and bool(layer.bias.any()) else None

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x.bfloat16(), self.weight)
        if self.gain is None and self.bias is None:
            return y
        y = y.float() if self.gain is None else y.float().mul_(self.gain)
        return y if self.bias is None else y.add_(self.bias)


@dataclass
class _Step:
    """A node that waits: what it calls, or what it makes of every batch where that is known, in the store."""

    node: fx.Node
    call: Any
    known: list[Any] | None


class Stream:
    """A graph run on all batches as far as somebody asks: nodes `follow`, and `catch_up` runs those that wait.

    A batch goes through all of them before the next one does, so that only what is used behind them is held, and that
    until its last use. What depends on nothing but the size of a batch, as masks and rotations do, is made once a size.
    With a store of bfloat16 the operands and results of linear layers and attention are bfloat16, but where inputs are
    quantized, and sums float32; all else is computed in float32.
    """

    def __init__(self, graph: fx.GraphModule, batches: Sequence[Tensor], store: Store) -> None:
        self.batches, self.store = batches, store
        self.modules = dict(graph.named_modules())
        self.nodes = list(graph.graph.nodes)
        self.fixed = of_sizes(self.nodes)
        self.fixed_values: dict[fx.Node, dict[torch.Size, Any]] = {}
        self.values: dict[fx.Node, list[Any]] = {}
        self.waiting: list[_Step] = []
        self.halves: dict[nn.Module, _Half] = {}
        self.last = {used: i for i, node in enumerate(self.nodes) for used in node.all_input_nodes}
        self.number = {node: i for i, node in enumerate(self.nodes)}

    def has_input(self, node: fx.Node) -> bool:
        """Whether what reaches a module is there, and no node in front of it waits for that."""
        return all(step.node is not node.all_input_nodes[0] for step in self.waiting)

    def inputs(self, node: fx.Node) -> Sequence[Tensor]:
        """What reaches a module, batch by batch."""
        used = node.all_input_nodes[0]
        if used in self.values:
            return Kept(list(self.values[used]))
        return [self._value(used, i, {}) for i in range(len(self.batches))]

    def follow(self, node: fx.Node, module: nn.Module | None = None, known: list[Any] | None = None) -> None:
        """The node is next, with `module` in the place of its own, or with what it makes of every batch."""
        call = node.target if module is None else module
        if node.op == "call_module" and module is None:
            call = self.modules[str(node.target)]
        self.waiting.append(_Step(node, call, known))

    def ahead(self, node: fx.Node, module: nn.Module) -> list[Any]:
        """What `module` makes of the inputs of the node, which stay; to be given to `follow` as known."""
        made = [self.store.put(self._apply(module, node, i, {})) for i in range(len(self.batches))]
        self.halves = {}
        return made

    def catch_up(self) -> None:
        """Run every node that waits."""
        if not self.waiting:
            return
        steps, self.waiting = self.waiting, []
        end = self.number[steps[-1].node] + 1
        made: dict[fx.Node, list[Any]] = {
            step.node: [] for step in steps if self._held(step.node) and self.last.get(step.node, -1) >= end
        }
        for i in range(len(self.batches)):
            now: dict[fx.Node, Any] = {}
            if i % 8 == 7:  # glibc below 2.38 seldom finds room among freed tensors for the next ones of their size
                give_back()
            for step in steps:
                self._step(step, now, i)
                if step.known is not None and step.node in made:
                    made[step.node].append(step.known[i])
                elif step.node in made:
                    made[step.node].append(self.store.put(now[step.node]))
                elif step.known is not None:
                    self.store.drop(step.known[i])
                for used in step.node.all_input_nodes:
                    if self.last[used] == self.number[step.node]:
                        now.pop(used, None)
                        if used in self.values:
                            self.store.drop(self.values[used][i])
                            self.values[used][i] = None
        self.halves = {}
        self.values = {node: v for node, v in self.values.items() if self.last[node] >= end} | made
        self.fixed_values = {node: v for node, v in self.fixed_values.items() if self.last.get(node, -1) >= end}

    def forget(self) -> None:
        """Let go of everything; nothing may be asked for any more."""
        for values in self.values.values():
            for kept in values:
                self.store.drop(kept)
        self.waiting, self.values, self.fixed_values = [], {}, {}

    def _held(self, node: fx.Node) -> bool:
        return node.op not in ("placeholder", "get_attr", "output") and node not in self.fixed

    def _step(self, step: _Step, now: dict[fx.Node, Any], batch: int) -> None:
        if step.node in self.fixed:
            known = self.fixed_values.setdefault(step.node, {})
            size = self.batches[batch].shape
            if size not in known:
                known[size] = self._apply(step.call, step.node, batch, now)
        elif step.known is not None:
            now[step.node] = _read(step.known[batch])
        elif self._held(step.node):
            now[step.node] = self._apply(step.call, step.node, batch, now)

    def _value(self, node: fx.Node, batch: int, now: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return self.batches[batch]
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            return getattr(self.modules[owner], leaf)
        if node in self.fixed:
            return self.fixed_values[node][self.batches[batch].shape]
        if node not in now:
            now[node] = _read(self.values[node][batch])
        return now[node]

    def _apply(self, call: Any, node: fx.Node, batch: int, now: dict[fx.Node, Any]) -> Any:
        """What the call makes of a batch, in the dtype that it is kept in or in float32."""
        linear = self.store.half and _is_linear(call)
        fused = self.store.half and isinstance(call, Attention) and call.plain()
        keep = linear or fused or call in _MOVES

        def pick(used: fx.Node) -> Any:
            value = self._value(used, batch, now)
            if not keep and isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                value = value.float()
                if used in now:  # others may ask for it
                    now[used] = value
            return value

        args: Any = fx.map_arg(node.args, pick)
        kwargs: Any = fx.map_arg(node.kwargs, pick)
        if linear:
            if call not in self.halves:
                self.halves[call] = _Half(call)
            return self.halves[call](*args)
        if fused:  # of the kernel the operands decide
            halves = (x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
            return call(*halves, **kwargs)  # type: ignore[operator]
        if self.store.half and isinstance(call, QLayer | MatMul | Attention) and getattr(call, "act", None) is None:
            with half_products():
                return call(*args, **kwargs)
        return call(*args, **kwargs)

    def save(self, folder: Path) -> None:
        """Write every value that is alive, a file of bare bytes each, and an index; nothing may wait."""
        folder.mkdir()
        index = {
            node.name: [_write(kept, folder / f"{node.name}.{i}") for i, kept in enumerate(values)]
            for node, values in self.values.items()
        }
        (folder / "index.json").write_text(json.dumps(index))

    def load(self, folder: Path, before: int) -> None:
        """Take up what `save` wrote, in front of the node number `before`."""
        index = json.loads((folder / "index.json").read_text())
        for node in self.nodes[:before]:
            if node in self.fixed:
                self.follow(node)
            if node.name in index:
                found = [
                    _OnDisk(folder / f"{node.name}.{i}", getattr(torch, dtype), torch.Size(shape), tuple(stride)).read()
                    for i, (dtype, shape, stride) in enumerate(index[node.name])
                ]
                self.values[node] = [self.store.put(value) for value in found]
        self.catch_up()


def of_sizes(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes of a graph that depend on nothing but constants and the sizes of its inputs."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "call_function" and (
            node.target is torch.ops.aten.sym_size.int
            or all(used in found or used.op == "get_attr" for used in node.all_input_nodes)
        ):
            found.add(node)
    return found
