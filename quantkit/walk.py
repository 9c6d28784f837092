"""The layers of a model in the order of execution, each with the inputs that the layers changed before it produce.

`walk` goes through them, `visit` lets methods that follow each other finish one layer after the other, and `rows` are
what meets a layer's weight matrix.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantkit.batches import Batches, Kept, Later, portion
from quantkit.model import Calib, Model, float_twin
from quantkit.observers import Observer, collect, looks_up, spread
from quantkit.policy import Policy
from quantkit.qlayers import QLayer
from quantkit.spool import give_back


@dataclass
class Site:
    """A layer at its turn.

    inputs: what reaches it now, batch by batch. targets: what it puts out in the float network,
    for the same batches; empty unless asked for. floats: what reaches it in the float network, of a
    graph with targets only, until `targets` are looked at. outputs: what the layer makes of `inputs`
    as it leaves the site, if a visitor has computed it. moments: those of `inputs`, by what they are of, as
    `columns.moments` keeps them, which layers with the same inputs share (queries, keys and values; gate and up).
    half: whether these are summed from inputs rounded to bfloat16, as the products of the network are.
    """

    name: str
    layer: QLayer
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    floats: Sequence[Tensor] = field(default_factory=list)
    outputs: Sequence[Tensor] | None = None
    moments: dict[Any, Tensor] = field(default_factory=dict)
    half: bool = False


@dataclass
class Visit:
    """What a method does layer by layer: `visit` is called with the site of every layer in `names`.

    report: diagnostics, complete when the walk is over. targets, sequential: as in `walk`. inputs: whether
    the method looks at inputs at all.
    """

    names: set[str]
    visit: Callable[[Site], None]
    report: dict[str, float]
    targets: bool = False
    sequential: bool = True
    inputs: bool = True


def visit(model: Model, calib: Calib, visits: list[Visit]) -> None:
    """One walk for methods that follow each other: at every layer all of them in turn.

    So a layer is finished, its scales, weights and bias, before the next one is looked at.
    """
    names: set[str] = set().union(*(v.names for v in visits))
    if not any(v.inputs for v in visits):
        layers = model.qlayers()
        sites: Iterable[Site] = (Site(name, layers[name], [], []) for name in layers if name in names)
    else:
        targets, sequential = any(v.targets for v in visits), all(v.sequential for v in visits if v.inputs)
        sites = walk(model, calib, names, sequential=sequential, targets=targets)
    with torch.no_grad():
        for site in sites:
            for step in visits:
                if site.name in step.names:
                    site.outputs = None  # of the layer as it was before this step
                    step.visit(site)


def walk(
    model: Model, calib: Calib, names: Iterable[str], *, sequential: bool = True, targets: bool = False
) -> Iterator[Site]:
    """The named layers in the order of execution, each with its inputs.

    sequential: inputs come from the model as it is at that moment, changes made to the layers
    before included; otherwise from the model as it was at the start. Layers that never run come
    last, without inputs. A `Policy` and a graph cost one pass in all; what could not be traced, and
    a graph of which a layer runs twice, one pass per layer. Embeddings come without inputs.
    """
    wanted = set(names)
    layers = model.qlayers()
    source = model if sequential else model.copy()
    twin = float_twin(model) if targets else None
    steps = _chain(source.module)
    if steps is not None:
        sites = _walk_chain(steps, _chain(twin.module) if twin else None, source, twin, calib, wanted, layers)
    elif isinstance(source.module, fx.GraphModule) and _once(source.module.graph, wanted):
        sites = _walk_graph(source.module, twin.module if twin else None, calib, wanted, layers)
    else:
        sites = _walk_any(source, twin, calib, wanted, layers)
    while True:
        with torch.no_grad():  # not across a yield: an abandoned walk would restore the caller's mode whenever it dies
            site = next(sites, None)
        if site is None:
            return
        yield site


def layerwise(each: Callable[..., Visit]) -> Callable[..., dict[str, float]]:
    """The `apply` of a method that is written as a `Visit`, with the same options."""

    @functools.wraps(each)
    def apply(model: Model, calib: Calib, **options: Any) -> dict[str, float]:
        step = each(model, calib, **options)
        visit(model, calib, [step])
        return step.report

    return apply


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


def _once(graph: fx.Graph, wanted: set[str]) -> bool:
    calls = [node.target for node in graph.nodes if node.op == "call_module" and node.target in wanted]
    return len(calls) == len(set(calls))


def _walk_graph(
    source: fx.GraphModule,
    twin: nn.Module | None,
    calib: Calib,
    wanted: set[str],
    layers: Mapping[str, QLayer],
) -> Iterator[Site]:
    remaining = set(wanted)
    size = portion(calib.inputs)
    batches = calib.inputs.split(size if calib.inputs.is_floating_point() else min(calib.batch, size))
    current = Batches(source, batches)
    reference = Batches(twin, batches) if isinstance(twin, fx.GraphModule) else None
    outputs: Sequence[Tensor] | None = None  # of the last layer as its site left it
    for place, node in enumerate(current.nodes):
        name = str(node.target) if node.op == "call_module" else ""
        if name not in remaining:
            continue
        remaining.discard(name)
        current.advance(place, outputs)
        site = Site(name, layers[name], [], [])
        if reference is not None:
            reference.advance(place)
        if not looks_up(layers[name]):
            site.inputs = current.inputs(node)
            if reference is not None:
                site.floats = reference.inputs(reference.nodes[place])
                site.targets = Later(functools.partial(_pass, reference, place, site))
        yield site
        outputs = site.outputs
        site.inputs, site.targets, site.floats, site.outputs = [], [], [], None  # the caller may hold on to it
        if current.spool.end:
            give_back()
        if not remaining:
            return
    for name in sorted(remaining):
        yield Site(name, layers[name], [], [])


def _pass(reference: Batches, place: int, site: Site) -> Sequence[Tensor]:
    """What the float layer at a place puts out; its inputs are let go."""
    site.floats = []
    reference.advance(place + 1)
    return reference.of(reference.nodes[place])


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


BLOCK = 2**18
"""Values of the rows that are looked at together, about."""


def rows(
    site: Site, samples: int = 0, *, targets: bool = False, floats: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """What meets the layer's weight matrix: inputs (groups, n, columns) with targets (groups, n, rows), with float
    inputs, or alone.

    samples: how many of them in all, spread evenly over the calibration set; 0: every one of a linear layer, and of a
    convolution 16 per column, at least 8,192, as neighbouring positions of an image see nearly the same. Which ones,
    and how many come at a time, does not depend on the batches in which the site has them.
    """
    layer = site.layer
    columns = layer.weight[0].numel()
    block = max(512 if site.half else 256, BLOCK // (columns * layer.groups))
    counts, chosen = [], None
    if samples or layer.spatial:
        counts = [layer.positions(shape) for shape in _shapes(site.inputs)]
        chosen = spread(sum(counts), samples or max(8192, 16 * columns))
    first = held = 0
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    for number in range(len(site.inputs)):
        at = None
        if chosen is not None:
            lower, upper = torch.searchsorted(chosen, torch.tensor([first, first + counts[number]])).tolist()
            at = chosen[lower:upper] - first
            first += counts[number]
            if not len(at):
                continue
        for few in [None] if at is None else at.split(block):
            xs.append(layer.columns(site.inputs[number], few))
            if targets:
                ys.append(layer.output_rows(site.targets[number], few))
            else:
                ys.append(layer.columns(site.floats[number], few) if floats else xs[-1][:, :, :0])
            held += xs[-1].shape[1]
            if held >= block:
                x, y = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in (xs, ys))
                whole = held - held % block
                yield from zip(x[:, :whole].split(block, dim=1), y[:, :whole].split(block, dim=1), strict=True)
                held -= whole
                xs, ys = ([x[:, whole:].clone()], [y[:, whole:].clone()]) if held else ([], [])
    if held:
        yield torch.cat(xs, dim=1), torch.cat(ys, dim=1)


def _shapes(parts: Sequence[Tensor]) -> list[torch.Size]:
    parts = parts.made_now() if isinstance(parts, Later) else parts
    return parts.shapes() if isinstance(parts, Kept) else [x.shape for x in parts]
