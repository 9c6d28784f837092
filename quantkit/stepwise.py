"""One step in time of a recurrent network, as a function of an observation and of states.

A network over sequences (batch, time, ...) hides its states in `recurrent.Unrolled`; hardware and runtimes that act in
a loop want observation and states in, output and states out. `step_graph` gives the graph of that function, with
quantized layers as modules under the names they have in the network, and `chain_of` its layers in a row. Both are
proved by running them: over a few random steps they must give what the network gives of the sequence.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantkit.capture import exported, modularized
from quantkit.errors import InputError, one_line
from quantkit.model import Model
from quantkit.policy import InputStage
from quantkit.qlayers import Point, QLayer
from quantkit.recurrent import Cell, GRUCell, LSTMCell, Unrolled

aten = torch.ops.aten

STEPS = 3
"""Steps in time over which a graph is compared with its network."""
NEAR = 1e-4
"""Of the largest output: float layers may sum in another order in batches of another shape."""


@dataclass(frozen=True)
class State:
    """A tensor (batch, size) that a cell leaves for the next step; part: "h", or "c" of an LSTM."""

    cell: str
    part: str
    size: int


@dataclass(frozen=True)
class Step:
    """graph: (observation, *states) -> (output, *states), all with the batch first. examples: inputs of it."""

    graph: fx.GraphModule
    states: tuple[State, ...]
    examples: tuple[Tensor, ...]

    def start(self, batch: int) -> list[Tensor]:
        """The states before a first step: zeros."""
        return [torch.zeros(batch, state.size) for state in self.states]

    def over(self, x: Tensor) -> Tensor:
        """Outputs (batch, time, ...) of observations (batch, time, ...) from zero states."""
        states, found = self.start(len(x)), []
        with torch.no_grad():
            for observation in x.unbind(1):
                y, *states = self.graph(observation, *states)
                found.append(y)
        return torch.stack(found, dim=1)


def is_recurrent(module: nn.Module) -> bool:
    """Whether states run through the module in loops that can be taken one step at a time."""
    return any(isinstance(part, Unrolled) for part in module.modules())


def cells_of(module: nn.Module) -> dict[str, Cell]:
    """The cells by name, in the order of their loops."""
    return {name: part for name, part in module.named_modules() if isinstance(part, GRUCell | LSTMCell)}


def observation(model: Model) -> Tensor:
    """The first step's observations (batch, ...) of the example, which is of sequences."""
    return model.example[:, 0] if batch_first(model.module) else model.example[0]


def batch_first(module: nn.Module) -> bool:
    """Whether a recurrent network takes (batch, time, ...), and not (time, batch, ...)."""
    return next(part.batch_first for part in module.modules() if isinstance(part, Unrolled))


def step_graph(model: Model, *, whole: bool = False) -> Step:
    """The step of a network over sequences, its batch free; whole: cells stay one module each, not their products.

    InputError for loops backwards in time, cells outside of `nn.GRU` and `nn.LSTM`, initial states of the network's
    own, and whatever `torch.export` cannot follow.
    """
    module = model.module
    loops = [(name, part) for name, part in module.named_modules() if isinstance(part, Unrolled)]
    for name, loop in loops:
        if loop.bidirectional:
            raise InputError(f"layer {name!r} runs backwards in time, which has no step; accepted: one direction")
    inside = {f"{name}.cells.{i}".lstrip(".") for name, loop in loops for i in range(len(loop.cells))}
    cells = cells_of(module)
    if not loops or set(cells) - inside:
        outside = ", ".join(sorted(set(cells) - inside)) or "none"
        raise InputError(f"a step needs cells inside of nn.GRU or nn.LSTM; outside of one: {outside}")
    first = {loop.batch_first for _, loop in loops}
    if len(first) > 1:
        raise InputError("recurrent layers with batch_first and without cannot be taken one step at a time")
    if model.example.dim() < 3:
        raise InputError(
            f"a step is of a network over sequences (batch, time, ...), not over {tuple(model.example.shape)}"
        )
    example = observation(model)
    states = tuple(
        State(name, part, cell.hidden)
        for name, cell in cells.items()
        for part in (("h", "c") if isinstance(cell, LSTMCell) else ("h",))
    )
    examples = (torch.cat([example[:1]] * 2), *(torch.zeros(2, state.size) for state in states))
    copied, box = copy.deepcopy(module), _Box()
    one = _OneStep(_with_leaves(copied, box, whole), box, 1 if first == {True} else 0)
    try:
        graph = _restored(exported(one, examples), one, module)
    except InputError:
        raise
    except Exception as error:  # whatever the module's own Python does under export
        raise InputError(f"one step of this network cannot be followed: {one_line(error)}") from None
    step = Step(graph, states, examples)
    _prove(step.over, module, example, first == {True})
    return step


def chain_of(model: Model) -> list[tuple[str, nn.Module]]:
    """The step as layers, activations and whole cells in a row, by name, each fed by the one before alone.

    InputError names the first node that is none of these.
    """
    step = step_graph(model, whole=True)
    gm = step.graph
    last, *states = (n for n in gm.graph.nodes if n.op == "placeholder")
    (results,) = gm.graph.output_node().args
    assert isinstance(results, list | tuple)
    chain: list[tuple[str, nn.Module]] = []
    for n in gm.graph.nodes:
        if n.op in ("placeholder", "output") or not _depends(n, last):
            continue
        if n.op == "call_module" and list(n.args) == [last, *states[: len(n.args) - 1]]:
            part = gm.get_submodule(str(n.target))
            chain.append((str(n.target), part.cell if isinstance(part, _Joined) else part))  # type: ignore[arg-type]
            states = states[len(n.args) - 1 :]
        elif n.target in MODULES and n.args[0] is last:
            chain.append((n.name, MODULES[n.target](*n.args[1:])))
        elif not (n.target in _SHAPES and _depends(n, last)):
            raise InputError(
                f"node {n.name!r}: {n.target} has no place in a chain; hardware of a recurrent network is written for "
                "linear layers, cells of GRU and LSTM and between them "
                f"{', '.join(sorted({m.__name__ for m in MODULES.values()}))}"
            )
        last = n
    if results[0] is not last or states:
        raise InputError("the output of this network is not that of its last layer; hardware is written for chains")

    def over(x: Tensor) -> Tensor:
        kept: dict[str, Any] = {}
        found = []
        with torch.no_grad():
            for y in x.unbind(1):
                for name, part in chain:
                    if isinstance(part, Cell):
                        kept[name] = part(y, kept.get(name))
                        y = part.output(kept[name])
                    else:
                        y = part(y)
                found.append(y)
        return torch.stack(found, dim=1)

    _same(over(_random(step.examples[0])), step.over(_random(step.examples[0])))
    return chain


def _depends(n: fx.Node, last: fx.Node) -> bool:
    """Whether the node reads `last`, alone or as the only one of a list."""
    return last in n.all_input_nodes


MODULES: dict[Any, Any] = {  # what stands for an operation on one value and numbers, by its position in the call
    aten.relu.default: nn.ReLU,
    aten.tanh.default: nn.Tanh,
    aten.sigmoid.default: nn.Sigmoid,
    aten.elu.default: nn.ELU,
    aten.leaky_relu.default: nn.LeakyReLU,
    aten.hardtanh.default: nn.Hardtanh,
    aten.clamp.default: nn.Hardtanh,
}
_SHAPES = {
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.reshape.default,
    aten.transpose.int,
    aten.stack.default,
    aten.cat.default,
    aten.unbind.int,
    aten.slice.Tensor,
    aten.clone.default,
    operator.getitem,
}
"""Operations that, in a step, leave a vector what it is: `chain_of` proves it of each network."""


def _prove(over: Any, module: nn.Module, example: Tensor, batch_first: bool) -> None:
    x = _random(example)
    with torch.no_grad():
        want = module(x if batch_first else x.transpose(0, 1))
        got = over(x)
        if want.dim() < got.dim():
            got = got[:, -1]  # the network gives the last step only
        elif not batch_first:
            want = want.transpose(0, 1)
    _same(got, want)


def _random(example: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, STEPS, *example.shape[1:], generator=generator)


def _same(got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape or not (got - want).abs().max() <= NEAR * want.abs().max():
        raise InputError(
            "this network does more between two steps than its recurrent layers keep: taken one step at a time, its "
            "outputs are others"
        )


@dataclass
class _Box:
    """States on their way around the network's own code: given to the cells, made by them."""

    given: list[Any] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)


class _Loop(nn.Module):
    """`Unrolled` of one step with states from the box."""

    def __init__(self, loop: Unrolled, box: _Box) -> None:
        super().__init__()
        self.cells, self.axis = loop.cells, 1 if loop.batch_first else 0
        self._box = (box,)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        (box,) = self._box
        if state is not None:
            raise InputError("this network gives a recurrent layer a first state; accepted: none, which is zero")
        y, last = x.select(self.axis, 0), []
        for cell in self.cells:
            if not box.given:
                raise InputError("a recurrent layer runs more than once; accepted: once")
            end = cell(y, box.given.pop(0))
            y = end[0] if isinstance(end, tuple) else end
            box.made += list(end) if isinstance(end, tuple) else [end]
            last.append(end)
        return y.unsqueeze(self.axis), Unrolled._joined(last, False)


class _OneStep(nn.Module):
    """(observation, *states) -> (output, *states) of a module with `_Loop`s."""

    def __init__(self, module: nn.Module, box: _Box, axis: int) -> None:
        super().__init__()
        self.module, self.axis = module, axis
        self._box = (box,)
        self.pairs = [isinstance(part, LSTMCell) for part in cells_of(module).values()]

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        (box,) = self._box
        box.made, box.given = [], list(_paired(states, self.pairs))
        y = self.module(x.unsqueeze(self.axis))
        if not isinstance(y, Tensor):
            raise InputError("the network returns several values; accepted for a step: one tensor")
        if box.given:
            raise InputError("a recurrent layer of this network does not run")
        return (y.squeeze(self.axis) if y.dim() > x.dim() else y), *box.made


def _paired(states: tuple[Tensor, ...], pairs: list[bool]) -> Iterator[Any]:
    left = iter(states)
    for pair in pairs:
        yield (next(left), next(left)) if pair else next(left)


class _Leaf(nn.Module):
    """Stands for the module `name` of the network, whose output has `features`, or as many as its input."""

    def __init__(self, name: str, features: int | None) -> None:
        super().__init__()
        self.name, self.features = name, features

    def forward(self, *inputs: Tensor) -> Tensor:
        features = inputs[0].shape[-1] if self.features is None else self.features
        result: Tensor = _leaf()(list(inputs), self.name, features)
        return result


class _Stage(nn.Module):
    """A policy's input stage as fixed operations: export follows no question to its numbers."""

    def __init__(self, stage: InputStage) -> None:
        super().__init__()
        self.stage, self.scales, self.clips = stage, stage.scales, stage.clips

    def forward(self, x: Tensor) -> Tensor:
        return self.stage.run(x, self.scales, self.clips)


class _LeafCell(GRUCell):
    """A whole GRU cell as a leaf."""

    def __init__(self, name: str, cell: GRUCell) -> None:
        super().__init__(cell.ih, cell.hh)
        self.leaf = _Leaf(name, cell.hidden)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        assert h is not None
        result: Tensor = self.leaf(x, h)
        return result


class _LeafPair(LSTMCell):
    """A whole LSTM cell as a leaf, which gives h and c joined."""

    def __init__(self, name: str, cell: LSTMCell) -> None:
        super().__init__(cell.ih, cell.hh)
        self.leaf, self.units = _Leaf(name, 2 * cell.hidden), cell.hidden

    def forward(self, x: Tensor, hc: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        assert hc is not None
        both: Tensor = self.leaf(x, *hc)
        return both[..., : self.units], both[..., self.units :]


class _Joined(nn.Module):
    """(x, h, c) -> h' and c' joined, of an LSTM cell: what `_LeafPair` stands for."""

    def __init__(self, cell: LSTMCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return torch.cat(self.cell(x, (h, c)), dim=-1)


@cache
def _leaf() -> Any:
    @torch.library.custom_op("quantkit::leaf", mutates_args=())
    def leaf(inputs: list[Tensor], name: str, features: int) -> Tensor:
        raise AssertionError("only exported")

    @leaf.register_fake
    def _(inputs: list[Tensor], name: str, features: int) -> Tensor:
        return inputs[0].new_empty(*inputs[0].shape[:-1], features)

    return torch.ops.quantkit.leaf.default


def _with_leaves(module: nn.Module, box: _Box, whole: bool) -> nn.Module:
    """The module, its loops taken one step at a time and its layers opaque to export, in place."""
    root = nn.ModuleDict({"root": module})
    for name, part in list(module.named_modules()):
        owner, _, leaf = f"root.{name}".rstrip(".").rpartition(".")
        match part:
            case QLayer() if part.op != "linear":
                raise InputError(f"layer {name!r}: beside recurrent layers only linear ones are taken step by step")
            case QLayer() | nn.Linear():
                new: nn.Module = _Leaf(name, int(part.weight.shape[0]))
            case Point():
                new = _Leaf(name, None)
            case InputStage():
                new = _Stage(part)
            case GRUCell() if whole:
                new = _LeafCell(name, part)
            case LSTMCell() if whole:
                new = _LeafPair(name, part)
            case _:
                continue
        setattr(root.get_submodule(owner), leaf, new)
    for name, part in list(root.named_modules()):
        if isinstance(part, Unrolled):
            owner, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(owner), leaf, _Loop(part, box))
    return root["root"]


def _restored(gm: fx.GraphModule, exported_: nn.Module, module: nn.Module) -> fx.GraphModule:
    """The graph with the network's own modules in the place of leaves."""
    used: dict[str, nn.Module] = {}
    for n in list(gm.graph.nodes):
        if n.op == "call_function" and n.target is _leaf():
            inputs, name, _ = n.args
            with gm.graph.inserting_before(n):
                call = gm.graph.create_node("call_module", str(name), tuple(inputs))  # type: ignore[arg-type]
            call.meta = dict(n.meta)
            n.replace_all_uses_with(call)
            gm.graph.erase_node(n)
            part = module.get_submodule(str(name))
            used[str(name)] = _Joined(part) if isinstance(part, LSTMCell) else part
    return modularized(gm, exported_, used)
