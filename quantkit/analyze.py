"""Diagnosis of a quantized network: what each layer loses, what that costs the output, and which option to try.

A *place* is a layer with a weight or a `Point`. Each is measured in three ways: its own rounding (weights, inputs)
and its output against the float network's, both while the whole network runs quantized; and the error of the network
when this place alone is quantized. The last adds up to the whole where errors are small and independent, so its share
says where bits are missing. The float network is the quantized one with every quantizer off: steps such as
`equalize` change its weights and not its function.

Advice follows rules over these numbers (`candidates`). Each is then tried: the network is quantized again with the
option, and only what reduces the error by a tenth is kept. So an advice is a measurement, not an opinion.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hwmodel import formats
from hwmodel.formats import Format
from quantkit.advice import candidates
from quantkit.errors import InputError
from quantkit.links import find_links
from quantkit.loading import gaps
from quantkit.model import Calib, Model
from quantkit.observers import Sample
from quantkit.policy import Head, Policy
from quantkit.qlayers import ActQuant, BlockAct, Point, QLayer
from quantkit.recipe import Recipe, format_name, quantize
from quantkit.rounding import round_to
from quantkit.specs import sqnr_db

Metric = Literal["changed_actions", "action_error", "output_error"]
"""Fraction of states with another action; RMS action difference over its range; RMS output difference over RMS."""

NEGLIGIBLE = 0.01
"""Below this error of the whole network nothing is advised."""
GAIN = 0.9
"""An option is advised if it multiplies the error by this or less."""
_BINS = 64


@dataclass(frozen=True)
class Damage:
    """Outputs against float outputs: `error` as the metric says, sqnr_db (inf if equal), and of networks with outputs
    (samples, classes) that are no policy the fraction of samples whose largest output is another, else None."""

    error: float
    sqnr_db: float
    top1_change: float | None


@dataclass(frozen=True)
class Histogram:
    """Counts of a sample of input values (_BINS,) between `edges`. low, high: what is beyond is clipped. grid: values.

    All in real units; low and high are NaN without a format. A format of more than 64 values has an empty grid.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    low: float
    high: float
    grid: tuple[float, ...]


@dataclass(frozen=True)
class Place:
    """What was measured at one layer or point; None where there is nothing to measure.

    weight_sqnr_db, act_sqnr_db, output_sqnr_db: signal to quantization noise of weight, input and output, inf where
    exact. weight_spread, act_spread: the largest row (input channel) over the geometric mean of those that are not
    zero. saturation: fraction of inputs that are clipped, None of blocks, whose scales follow the inputs. silent:
    input channels that are zero on all states. outliers: largest magnitude over the 99.9 percentile. only: the
    network's damage when this place alone is quantized. share: of its noise in the sum over all places.
    """

    name: str
    op: str
    weight: str
    act: str
    granularity: str
    weight_sqnr_db: float | None
    weight_spread: float | None
    act_sqnr_db: float | None
    act_spread: float | None
    saturation: float | None
    silent: int | None
    outliers: float | None
    output_sqnr_db: float | None
    only: Damage
    share: float
    histogram: Histogram | None


@dataclass(frozen=True)
class Finding:
    """An advice that was tried: the error of the whole network before and after; after is None if it was not tried."""

    places: tuple[str, ...]
    problem: str
    option: str
    before: float
    after: float | None


@dataclass(frozen=True)
class Analysis:
    """The diagnosis of one quantized network on n states.

    places: in the order in which they run. gaps: what is not quantized (`loading.gaps`).
    """

    metric: Metric
    n: int
    whole: Damage
    places: tuple[Place, ...]
    findings: tuple[Finding, ...]
    gaps: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite becomes None."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain


def analyze(
    model: Model,
    recipe: Recipe,
    calib: Calib,
    states: Tensor,
    *,
    attempts: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Quantize a float model by the recipe and measure it on `states` (n, *input_shape).

    The whole network is compared with the float model itself. attempts: try each advice, at the price of quantizing
    once for each; otherwise every candidate is listed. Raises InputError as `quantize`.
    """
    quantized = quantize(model, recipe, calib)
    head = _head(model)
    reference = _outputs(model, states)
    result = diagnose(quantized, states, reference=reference, progress=progress)
    if result.whole.error <= NEGLIGIBLE:
        return result
    advice = candidates(result.places, recipe, _linked(quantized))
    if not attempts:
        found = [Finding(a.places, a.problem, a.option, result.whole.error, None) for a in advice]
        return dataclasses.replace(result, findings=tuple(found))
    best: dict[str, Finding] = {}
    for index, a in enumerate(advice):
        if progress:
            progress(index, len(advice))
        try:
            after = damage(_outputs(quantize(model, a.recipe, calib), states), reference, head).error
        except InputError:
            continue  # sums that could overflow, say: no option for this network
        tried = Finding(a.places, a.problem, a.option, result.whole.error, after)
        if after <= GAIN * tried.before and (a.problem not in best or after < (best[a.problem].after or 0.0)):
            best[a.problem] = tried
    return dataclasses.replace(result, findings=tuple(sorted(best.values(), key=lambda f: f.after or 0.0)))


def diagnose(
    quantized: Model,
    states: Tensor,
    *,
    reference: Tensor | None = None,
    stored_sqnr: Mapping[str, float | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Measure a quantized model on `states`; no advice.

    reference: float outputs; without, those of the model with every quantizer off. stored_sqnr: weight SQNR by
    layer, of a model that no longer has its float weights (a quantized directory): the errors of its places are then
    those of inputs alone. Raises InputError for a model that is not quantized and states of another shape.
    """
    if not any(p.act is not None or _q(p) is not None for p in quantized.quantizers().values()):
        raise InputError("nothing of this network is quantized; name formats for --weights and --acts")
    if states.shape[1:] != quantized.example.shape[1:]:
        raise InputError(f"states of shape {tuple(states.shape)} given; accepted: (n, {_shape(quantized)})")
    work, head = quantized.copy(), _head(quantized)
    parts = work.quantizers()
    active = [name for name, part in parts.items() if part.act is not None or _q(part) is not None]
    seen, (noise, signal) = _observe(work, states, active)
    active = [*signal, *(name for name in active if name not in signal)]
    with _only(work):
        base = _outputs(work, states)
    only = {}
    for index, name in enumerate(active):
        if progress:
            progress(index, len(active))
        with _only(work, name):
            only[name] = damage(_outputs(work, states), base, head)
    power = {name: 10 ** (-d.sqnr_db / 10) for name, d in only.items()}
    total = sum(power.values())
    places = []
    for name in active:
        part = parts[name]
        share = power[name] / total if 0 < total < math.inf else 0.0
        stored = None if stored_sqnr is None else stored_sqnr.get(name)
        facts = seen[name].facts(part) if name in seen else dict.fromkeys(_Seen.FACTS)
        weight_sqnr, spread = stored, None
        if isinstance(part, QLayer) and part.q is not None:
            weight_sqnr = stored if stored_sqnr is not None else sqnr_db(part)
            spread = spread_of(part.weight.detach().abs().flatten(1).amax(dim=1))
        places.append(
            Place(
                name,
                part.op if isinstance(part, QLayer) else "point",
                format_name(None if (q := _q(part)) is None else q.fmt),
                format_name(None if part.act is None else part.act.fmt),
                str(part.plan.granularity),
                weight_sqnr_db=weight_sqnr,
                weight_spread=spread,
                output_sqnr_db=_db(signal[name], noise[name]) if name in signal else None,
                only=only[name],
                share=share,
                **facts,  # type: ignore[arg-type]
            )
        )
    out = _outputs(quantized, states)
    whole = damage(out, base if reference is None else reference, head)
    return Analysis(metric_of(head), len(states), whole, tuple(places), (), gaps(quantized))


# --- measures ------------------------------------------------------------------------------------


def metric_of(head: Head | None) -> Metric:
    """What `Damage.error` means for this head; None: a network that is no policy."""
    return "output_error" if head is None else "action_error" if head.kind == "box" else "changed_actions"


def damage(out: Tensor, reference: Tensor, head: Head | None) -> Damage:
    """How far outputs (n, ...) are from float ones; of a recurrent policy every step of (n, time, outputs) counts.

    >>> damage(torch.tensor([[1.0, 2.0], [5.0, 4.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None).top1_change
    0.5
    """
    if head is not None:
        out, reference = (y.reshape(-1, y.shape[-1]) for y in (out, reference))
    a, b = out.double(), reference.double()
    sqnr = _db(float(b.square().sum()), float((a - b).square().sum()))
    if head is None:
        classes = out.dim() == 2 and out.shape[1] > 1
        top1 = float((a.argmax(dim=1) != b.argmax(dim=1)).double().mean()) if classes else None
        return Damage(10 ** (-sqnr / 20), sqnr, top1)
    actions, expected = head.actions(out.numpy()), head.actions(reference.numpy())
    if head.kind == "box":
        span = np.asarray(head.high, np.float64) - np.asarray(head.low, np.float64)
        span = np.where(np.isfinite(span) & (span > 0), span, max(float(np.abs(expected).max()), 1e-30))
        return Damage(float(np.sqrt((((actions - expected) / span) ** 2).mean())), sqnr, None)
    changed = (actions != expected).reshape(len(actions), -1).any(axis=1)
    return Damage(float(changed.mean()), sqnr, None)


def spread_of(ranges: Tensor) -> float | None:
    """The largest of some magnitudes over the geometric mean of those that are not zero; None if all are.

    >>> round(spread_of(torch.tensor([8.0, 2.0, 0.0])), 6)
    2.0
    """
    alive = ranges[ranges > 0].double()
    return float(alive.max() / alive.log().mean().exp()) if alive.numel() else None


def _db(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


class _Seen:
    """What goes into one place: rounding noise, clipping, and a sample."""

    FACTS = ("act_sqnr_db", "act_spread", "saturation", "silent", "outliers", "histogram")

    def __init__(self, part: QLayer | Point) -> None:
        self.sample = Sample(65536)
        self.signal = self.noise = 0.0
        self.clipped = self.count = 0
        self.low, self.high = clip_range(part.act.fmt) if isinstance(part.act, ActQuant) else (-math.inf, math.inf)

    def __call__(self, part: QLayer | Point, x: Tensor) -> None:
        self.sample(part, x)
        if part.act is None:
            return
        if part.in_scale is not None:
            x = x * part.per_channel(part.in_scale)  # type: ignore[union-attr]
        if isinstance(part.act, BlockAct):
            axis = 1 if isinstance(part, QLayer) and part.spatial else -1
            u, error = x, (part.act.values(x, axis) - x).double()
        else:
            u = x / part.act.scale
            error = ((round_to(u, part.act.fmt) - u) * part.act.scale).double()
        self.signal += float(x.double().square().sum())
        self.noise += float(error.square().sum())
        self.clipped += int(((u < self.low) | (u > self.high)).sum())
        self.count += u.numel()

    def facts(self, part: QLayer | Point) -> dict[str, Any]:
        """The fields of `Place` named in FACTS; None if the place never ran."""
        top = self.sample.top
        if top is None:
            return dict.fromkeys(self.FACTS)
        values = self.sample.values().double()
        tail = float(torch.quantile(values.abs(), 0.999))
        known = part.act is not None
        return {
            "act_sqnr_db": _db(self.signal, self.noise) if known else None,
            "act_spread": spread_of(top),
            "saturation": self.clipped / self.count if isinstance(part.act, ActQuant) else None,
            "silent": int((top == 0).sum()),
            "outliers": (float(values.abs().max()) / tail if tail > 0 else math.inf) if values.any() else None,
            "histogram": _histogram(part, values.numpy()),
        }


def clip_range(fmt: Format) -> tuple[float, float]:
    """Between these, in units of the scale, rounding is to the nearest value; beyond, a number is clipped.

    Half a step further than the outermost values: what rounds to them anyway is not clipped.

    >>> clip_range(formats.parse("int4")), clip_range(formats.parse("uint4"))
    ((-8.5, 7.5), (-0.5, 15.5))
    """
    grid = formats.levels(fmt)
    return grid[0] - (grid[1] - grid[0]) / 2, grid[-1] + (grid[-1] - grid[-2]) / 2


def _histogram(part: QLayer | Point, values: np.ndarray) -> Histogram:
    grid: tuple[float, ...] = ()
    low = high = math.nan
    edge_low, edge_high = float(values.min()), float(values.max())
    if isinstance(part.act, ActQuant):  # blocks have no grid of their own: it moves with the inputs
        levels = formats.levels(part.act.fmt)
        low, high = (v * part.act.scale for v in clip_range(part.act.fmt))
        grid = tuple(v * part.act.scale for v in levels) if len(levels) <= 64 else ()
    if edge_low == edge_high:
        edge_low, edge_high = edge_low - 0.5, edge_high + 0.5
    counts, edges = np.histogram(values, bins=_BINS, range=(edge_low, edge_high))
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()), low, high, grid)


def _observe(
    work: Model, states: Tensor, names: Sequence[str]
) -> tuple[dict[str, _Seen], tuple[dict[str, float], dict[str, float]]]:
    """Inputs of every place while the network runs quantized, and noise and signal of their outputs against float."""
    parts, batches = work.quantizers(), _batches(work, states)
    seen = {n: _Seen(parts[n]) for n in names if getattr(parts[n], "op", "") != "embedding"}
    noise: dict[str, float] = {}
    signal: dict[str, float] = {}
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda part, _, output: kept.setdefault(name, []).append(_real(part, output))

    def watch(name: str) -> Callable[..., None]:
        def hook(part: QLayer | Point, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name in seen:
                seen[name](part, args[0])
            expected, given = kept[name].pop(0).double(), _real(part, output).double()
            signal[name] = signal.get(name, 0.0) + float(expected.square().sum())
            noise[name] = noise.get(name, 0.0) + float((given - expected).square().sum())

        return hook

    for batch in batches:
        kept.clear()
        with _only(work), _hooks(parts, {n: keep(n) for n in names}):
            _run(work, batch)
        with _hooks(parts, {n: watch(n) for n in names}):
            _run(work, batch)
    return seen, (noise, signal)


def _real(part: QLayer | Point, output: Tensor) -> Tensor:
    grid = isinstance(part, Point) and part.grid and part.act is not None
    return output * part.act.scale if grid else output  # type: ignore[union-attr]


@contextmanager
def _hooks(parts: Mapping[str, QLayer | Point], hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    handles = [parts[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _only(model: Model, name: str | None = None) -> Iterator[None]:
    """Every quantizer but those of the place `name` is off inside the block."""
    others = {n: part for n, part in model.quantizers().items() if n != name}
    saved = {n: (_q(part), part.act) for n, part in others.items()}
    for part in others.values():
        part.set_act(None)
        if isinstance(part, QLayer):
            part.set_weight(None)
    try:
        yield
    finally:
        for n, (q, act) in saved.items():
            part = others[n]
            part.set_act(act)
            if isinstance(part, QLayer):
                part.set_weight(q)


def _q(part: QLayer | Point) -> Any:
    return part.q if isinstance(part, QLayer) else None


def _head(model: Model) -> Head | None:
    return model.module.head if isinstance(model.module, Policy) else None


def _batches(model: Model, states: Tensor) -> tuple[Tensor, ...]:
    return states.split(max(1, min(512, 2**18 // max(1, model.example[0].numel()))))


def _run(model: Model, batch: Tensor) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model.module(batch)
    return out


def _outputs(model: Model, states: Tensor) -> Tensor:
    return torch.cat([_run(model, batch) for batch in _batches(model, states)])


def _shape(model: Model) -> str:
    return ", ".join(map(str, model.example.shape[1:]))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _linked(model: Model) -> frozenset[str]:
    return frozenset(name for link in find_links(model) if link.kind == "layer" for name in link.producers)


# --- output ------------------------------------------------------------------------------------


def phrase(result: Analysis) -> str:
    """The damage of the whole network in a few words."""
    what = {
        "changed_actions": "of the actions change",
        "action_error": "of the range, RMS action error",
        "output_error": "RMS output error",
    }[result.metric]
    text = (
        f"{result.whole.error:.2%} {what} on {result.n:,} {'inputs' if result.metric == 'output_error' else 'states'}"
    )
    if result.whole.top1_change is not None:
        text += f", top-1 changes on {result.whole.top1_change:.2%}"
    return f"{text}, output SQNR {result.whole.sqnr_db:.1f} dB"


def write_tables(result: Analysis, folder: Path) -> list[Path]:
    """Write layers.csv (a row for each place, without histograms) and analysis.json into a folder that exists."""
    records = []
    for place in result.places:
        record = {k: v for k, v in asdict(place).items() if k not in ("only", "histogram")}
        records.append(record | {f"only_{k}": v for k, v in asdict(place.only).items()})
    table, document = folder / "layers.csv", folder / "analysis.json"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    document.write_text(json.dumps(result.to_json(), indent=1) + "\n")
    return [table, document]


# --- a quantized directory -----------------------------------------------------------------------


def stored_sqnr(directory: Path) -> dict[str, float | None]:
    """Weight SQNR in dB by layer as `quantkit quantize` recorded it, None where float or exact."""
    layers = json.loads((directory / "quantkit.json").read_text())["summary"]["layers"]
    return {entry["name"]: entry["sqnr_db"] for entry in layers}
