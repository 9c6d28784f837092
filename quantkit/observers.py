"""What calibration collects: the inputs of layers, streamed batch by batch.

An observer is a function of (layer, input) called for every batch while the model runs as it
is now; it keeps its own sums. Nothing is kept that the observer does not keep. `walk` goes
through the layers in the order of execution for the methods that change one layer after the
other, each with the inputs that the layers changed before it produce.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantkit.model import Calib, Model
from quantkit.policy import Policy
from quantkit.qlayers import Point, QLayer
from quantkit.spool import Filed, Spool, give_back

Observer = Callable[[Any, Tensor], None]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Arithmetic of torch on one thread, and the number of before afterwards.

    How a product or sum is split among threads decides the order of additions and so the last bits, and a weight in
    the middle of two codes is decided by these. `recipe.quantize` runs under it: codes and scales are the same bytes
    whatever `torch.set_num_threads` says. Cores are for other designs meanwhile.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def has_half() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AVX512-BF16, AMX)."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


@contextlib.contextmanager
def half_products(wanted: bool = True) -> Iterator[None]:
    """Products of float32 matrices with operands rounded to bfloat16 and sums in float32, where `has_half`.

    A product of two bfloat16 numbers is exact in float32, so operands that are such numbers lose nothing but the order
    of the sum. Products below some 16^3 multiplications stay in float32.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if wanted else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


def collect(model: Model, calib: Calib, observers: Mapping[str, Observer]) -> None:
    """Run the model over the calibration inputs; `observers[name]` sees every input of the layer or point `name`.

    Embeddings are not observed: their inputs are indices.
    """
    places = {name: part for name, part in model.quantizers().items() if not _looks_up(part)}
    handles = [places[n].register_forward_pre_hook(_hook(see)) for n, see in observers.items() if n in places]
    try:
        with torch.no_grad():
            for batch in calib.batches():
                model.module(batch)
    finally:
        for handle in handles:
            handle.remove()


def _looks_up(part: nn.Module) -> bool:
    return isinstance(part, QLayer) and part.op == "embedding"


def _hook(see: Observer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(layer, args[0])  # type: ignore[arg-type]

    return hook


def channel_range(layer: QLayer | Point, x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every channel of an input, (channels,) each."""
    channel = 1 if isinstance(layer, QLayer) and layer.spatial else x.dim() - 1
    last = x.movedim(channel, -1)
    if not last.is_contiguous():
        others = [axis for axis in range(x.dim()) if axis != channel]
        return (x.amin(dim=others), x.amax(dim=others)) if others else (x, x)
    rows = last.reshape(-1, last.shape[-1])
    while len(rows) % 2 == 0 and rows.shape[1] < 1024:  # in longer rows torch is ten times faster
        rows = rows.reshape(len(rows) // 2, -1)
    low, high = (bound.reshape(-1, last.shape[-1]) for bound in (rows.amin(dim=0), rows.amax(dim=0)))
    return low.amin(dim=0), high.amax(dim=0)


class Sample:
    """A sample of at most `limit` input values and the range of all, for fitting an activation scale.

    Which values are kept is decided by their number in the order in which they come (`thinned`): neither by chance nor
    by how they are cut into batches. top: largest magnitude per channel, (channels,), None before the first batch.
    broken: (index in the batch, value) of the first input that is not finite, or None.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.level, self.count = limit, 0, 0
        self.at, self.kept = torch.empty(0, dtype=torch.int64), torch.empty(0)
        self.low, self.high = float("inf"), float("-inf")
        self.top: Tensor | None = None
        self.broken: tuple[tuple[int, ...], float] | None = None

    def __call__(self, layer: QLayer | Point, x: Tensor) -> None:
        act, layer.act = layer.act, None
        x = layer.input_values(x)
        layer.act = act
        low, high = channel_range(layer, x)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            if self.broken is None:
                index = tuple((~torch.isfinite(x)).nonzero()[0].tolist())
                self.broken = index, float(x[index])
            return
        top = torch.maximum(high, -low)
        self.top = top if self.top is None or self.top.shape != top.shape else torch.maximum(self.top, top)
        self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        end = self.count + x.numel()
        while end >> self.level >= self.limit:
            at = self.at >> self.level
            stays = at & 1 == _side(at >> 1)
            self.at, self.kept, self.level = self.at[stays], self.kept[stays], self.level + 1
        at = thinned(self.count, end, self.level)
        self.at, self.kept = torch.cat([self.at, at]), torch.cat([self.kept, x.take(at - self.count)])
        self.count = end

    def values(self) -> Tensor:
        """The sample, with the extremes included."""
        return torch.cat([self.kept, torch.tensor([self.low, self.high])])


def thinned(first: int, end: int, level: int) -> Tensor:
    """The numbers from `first` to before `end` that stay when one of every 2^level neighbours does, (n,) int64.

    What stays at one level stays at those below, too. Which of two neighbours goes has no period, so that no width of
    an image and no number of features lets the same places be kept again and again.

    >>> [thinned(0, 16, level).tolist() for level in (1, 2)]
    [[0, 3, 4, 6, 9, 11, 12, 14], [0, 6, 9, 12]]
    """
    at = torch.arange(first >> level, ((end - 1) >> level) + 1)
    for _ in range(level):
        at = 2 * at + _side(at)
    return at[(at >= first) & (at < end)]


def _side(pair: Tensor) -> Tensor:
    """Which of two neighbours stays: 0 or 1."""
    return pair * 0x9E3779B1 >> 16 & 1


def spread(count: int, limit: int) -> Tensor | None:
    """At most `limit` numbers below `count`, evenly and ascending; None for all of them.

    Golden-section steps: no two are near each other, and no step fits the width of an image.
    """
    if count <= limit:
        return None
    steps = torch.arange(limit, dtype=torch.float64).mul_(0.6180339887498949).frac_()
    return (steps * count).long().sort().values


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
    parts = parts.made_now() if isinstance(parts, _Later) else parts
    return parts.shapes() if isinstance(parts, _Kept) else [x.shape for x in parts]


def unquantized(model: Model) -> set[str]:
    """Layers planned to have a quantized weight that have none yet."""
    return {name for name, layer in model.qlayers().items() if layer.plan.weight is not None and layer.q is None}


PANEL = 128
"""Rows of a matrix of second moments that are computed together, up to their diagonal."""


class Gram:
    """Sum of x x^T over a layer's input columns, float32 or float64 (groups, columns, columns), and the count.

    What stands above the diagonal is summed nowhere but copied from below: half the work of a product where there are
    many columns. half: of x rounded to bfloat16.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, half: bool = False) -> None:
        self.dtype, self.half = dtype, half
        self.lower: Tensor | None = None
        self.count = 0

    def __call__(self, layer: QLayer, x: Tensor) -> None:
        self.add(layer.columns(x))

    def add(self, rows: Tensor) -> None:
        """Rows as `rows` gives them, (groups, n, columns)."""
        rows = rows.to(self.dtype)
        if self.lower is None:
            self.lower = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
        with half_products(self.half):
            for start, end in _panels(rows.shape[2], 2 * PANEL if self.half else PANEL):
                if self.half and len(rows) == 1:  # several times faster in bfloat16 than a batch of one
                    self.lower[0, start:end, :end].addmm_(rows[0, :, start:end].T, rows[0, :, :end])
                else:
                    self.lower[:, start:end, :end].baddbmm_(rows[:, :, start:end].mT, rows[:, :, :end])
        self.count += rows.shape[1]

    @property
    def total(self) -> Tensor | None:
        """The whole sum, or None before the first rows; the caller may change it when all have been added."""
        if self.lower is not None:
            for start, end in _panels(self.lower.shape[2]):
                self.lower[:, start:end, end:] = self.lower[:, end:, start:end].mT
        return self.lower


def _panels(columns: int, width: int = PANEL) -> list[tuple[int, int]]:
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


class AbsMax:
    """Largest magnitude per input channel, (channels,)."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, layer: QLayer, x: Tensor) -> None:
        if layer.in_scale is not None:
            x = x * layer.per_channel(layer.in_scale)
        low, high = channel_range(layer, x)
        top = torch.maximum(high, -low)
        self.value = top if self.value is None else torch.maximum(self.value, top)


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


def float_twin(model: Model) -> Model:
    """A copy that computes in float: no weight, input or operand of it is quantized."""
    twin = model.copy()
    for part in twin.quantizers().values():
        part.set_act(None)
        if isinstance(part, QLayer):
            part.set_weight(None)
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


def _once(graph: fx.Graph, wanted: set[str]) -> bool:
    calls = [node.target for node in graph.nodes if node.op == "call_module" and node.target in wanted]
    return len(calls) == len(set(calls))


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


class _Kept(Sequence[Tensor]):
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


class _Later(Sequence[Tensor]):
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


class _Batches:
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
        return _Kept(kept) if any(isinstance(value, Filed) for value in kept) else list(kept)

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
    current = _Batches(source, batches)
    reference = _Batches(twin, batches) if isinstance(twin, fx.GraphModule) else None
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
        if not _looks_up(layers[name]):
            site.inputs = current.inputs(node)
            if reference is not None:
                site.floats = reference.inputs(reference.nodes[place])
                site.targets = _Later(functools.partial(_pass, reference, place, site))
        yield site
        outputs = site.outputs
        site.inputs, site.targets, site.floats, site.outputs = [], [], [], None  # the caller may hold on to it
        if current.spool.end:
            give_back()
        if not remaining:
            return
    for name in sorted(remaining):
        yield Site(name, layers[name], [], [])


def _pass(reference: _Batches, place: int, site: Site) -> Sequence[Tensor]:
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
