"""What calibration collects: the inputs of layers, streamed batch by batch.

An observer is a function of (layer, input) called for every batch while the model runs as it
is now; it keeps its own sums. Nothing is kept that the observer does not keep. `walk` goes
through the layers in the order of execution for the methods that change one layer after the
other, each with the inputs that the layers changed before it produce.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.model import Calib, Model
from quantkit.policy import Policy
from quantkit.qlayers import QLayer

Observer = Callable[[QLayer, Tensor], None]


def collect(model: Model, calib: Calib, observers: Mapping[str, Observer]) -> None:
    """Run the model over the calibration inputs; `observers[name]` sees every input of the layer `name`."""
    layers = model.qlayers()
    handles = [layers[name].register_forward_pre_hook(_hook(see)) for name, see in observers.items()]
    try:
        with torch.no_grad():
            for batch in calib.batches():
                model.module(batch)
    finally:
        for handle in handles:
            handle.remove()


def _hook(see: Observer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(layer, args[0])  # type: ignore[arg-type]

    return hook


class Sample:
    """A sample of at most `limit` input values and the range of all, for fitting an activation scale.

    Values are kept by a fixed stride per batch, so that the result does not depend on chance.
    """

    def __init__(self, limit: int, batches: int) -> None:
        self.per_batch = max(1, limit // max(1, batches))
        self.parts: list[Tensor] = []
        self.low, self.high = float("inf"), float("-inf")

    def __call__(self, layer: QLayer, x: Tensor) -> None:
        act, layer.act = layer.act, None
        flat = layer.input_values(x).flatten()
        layer.act = act
        self.low, self.high = min(self.low, flat.min().item()), max(self.high, flat.max().item())
        stride = -(-flat.numel() // self.per_batch)
        self.parts.append(flat[::stride].clone())

    def values(self) -> Tensor:
        """The sample, with the extremes included."""
        return torch.cat([*self.parts, torch.tensor([self.low, self.high])])


class Gram:
    """Sum of x x^T over a layer's input columns, float32 or float64 (groups, columns, columns), and the count."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.total: Tensor | None = None
        self.count = 0

    def __call__(self, layer: QLayer, x: Tensor) -> None:
        rows = layer.columns(x).to(self.dtype)
        if self.total is None:
            self.total = rows.mT @ rows
        else:
            self.total.baddbmm_(rows.mT, rows)
        self.count += rows.shape[1]


class AbsMax:
    """Largest magnitude per input channel, (channels,)."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, layer: QLayer, x: Tensor) -> None:
        if layer.in_scale is not None:
            x = x * (layer.in_scale if layer.op == "linear" else layer.in_scale[:, None, None])
        axis = x.shape[-1] if layer.op == "linear" else x.shape[1]
        moved = x.reshape(-1, axis) if layer.op == "linear" else x.movedim(1, -1).reshape(-1, axis)
        top = moved.abs().amax(dim=0)
        self.value = top if self.value is None else torch.maximum(self.value, top)


@dataclass
class Site:
    """A layer at its turn.

    inputs: what reaches it now, batch by batch. targets: what it puts out in the float network,
    for the same batches; empty unless asked for.
    """

    name: str
    layer: QLayer
    inputs: list[Tensor]
    targets: list[Tensor]


def walk(
    model: Model, calib: Calib, names: Iterable[str], *, sequential: bool = True, targets: bool = False
) -> Iterator[Site]:
    """The named layers in the order of execution, each with its inputs.

    sequential: inputs come from the model as it is at that moment, changes made to the layers
    before included; otherwise from the model as it was at the start. Layers that never run come
    last, without inputs. A `Policy` costs one pass in all; another module one pass per layer.
    """
    wanted = set(names)
    layers = model.qlayers()
    source = model if sequential else model.copy()
    twin = _float_twin(model) if targets else None
    steps = _chain(source.module)
    with torch.no_grad():
        if steps is not None:
            yield from _walk_chain(steps, _chain(twin.module) if twin else None, source, twin, calib, wanted, layers)
        else:
            yield from _walk_any(source, twin, calib, wanted, layers)


def _float_twin(model: Model) -> Model:
    twin = model.copy()
    for layer in twin.qlayers().values():
        layer.set_act(None)
        layer.set_weight(None)
    return twin


def _chain(module: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The named steps of a policy whose layers all sit directly in its network, each once."""
    if not isinstance(module, Policy):
        return None
    steps = [(f"net.{name}", step) for name, step in module.net.named_children()]
    flat = all(isinstance(step, QLayer) or not any(True for _ in step.children()) for _, step in steps)
    return steps if flat and len(steps) == len(module.net) else None


def _walk_chain(
    steps: list[tuple[str, nn.Module]],
    float_steps: list[tuple[str, nn.Module]] | None,
    source: Model,
    twin: Model | None,
    calib: Calib,
    wanted: set[str],
    layers: Mapping[str, QLayer],
) -> Iterator[Site]:
    current = [source.module.stage(batch) for batch in calib.batches()]  # type: ignore[operator]
    reference = [] if twin is None else [twin.module.stage(batch) for batch in calib.batches()]  # type: ignore[operator]
    remaining = len(wanted)
    for index, (name, step) in enumerate(steps):
        if remaining == 0:
            return
        if float_steps is not None:
            reference = [float_steps[index][1](x) for x in reference]
        if name in wanted:
            remaining -= 1
            yield Site(name, layers[name], current, reference)
        if remaining:
            current = [step(x) for x in current]


class _EnoughError(Exception):
    """Raised in a hook: the rest of the forward pass is not needed."""


def _walk_any(
    source: Model, twin: Model | None, calib: Calib, wanted: set[str], layers: Mapping[str, QLayer]
) -> Iterator[Site]:
    calls: dict[str, int] = {}

    def count(name: str) -> Observer:
        def see(layer: QLayer, x: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1

        return see

    collect(source, Calib(calib.inputs[:1]), {name: count(name) for name in wanted})
    for name in [*calls, *sorted(wanted - calls.keys())]:
        inputs = _seen(source, calib, name, calls, lambda layer, x: x)
        outputs = [] if twin is None else _seen(twin, calib, name, calls, lambda layer, x: layer.forward(x))
        yield Site(name, layers[name], inputs, outputs)


def _seen(
    model: Model, calib: Calib, name: str, calls: Mapping[str, int], of: Callable[[QLayer, Tensor], Tensor]
) -> list[Tensor]:
    """`of(layer, input)` for every call of one layer; a pass ends there if the layer runs only once."""
    kept: list[Tensor] = []

    def see(layer: QLayer, x: Tensor) -> None:
        kept.append(of(layer, x))
        if calls[name] == 1:
            raise _EnoughError

    for batch in calib.batches() if name in calls else ():
        with contextlib.suppress(_EnoughError):
            collect(model, Calib(batch, len(batch)), {name: see})
    return kept
