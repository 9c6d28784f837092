"""Static per-tensor activation scales from the calibration set.

A signed integer format becomes unsigned of the same width where no input is negative (after ReLU,
for instance): the same bits then resolve the range twice as finely. Narrow stays narrow only when
the format stays signed.

With `scale=output` the clipping of a layer's input is searched by what it does to the layer's output (as Lin et al.,
"AWQ", MLSys 2024, arXiv 2306.00978, section 4, do for weights): of the scale of least squared error times 2^(k / 8),
k = -12..12, the one with the smallest

    E |W Q(x) + b - y|^2,    x the input as the layers before leave it, y the float network's output of the layer.

A value that the weights hardly look at may then be clipped, and one that they multiply is kept.

A block format needs no scale from here, as its scales are found at run time, only the rule that finds
them, and the factor of minifloat scales: with it the largest input seen gets the largest scale.
The default for shared exponents is "even" and not the "floor" of OCP MX 1.0, which clips e2m1 by up to a quarter
of the largest value: on a ViT for MNIST with inputs in mxfp4 the error at the outputs is a seventh (0.033, 0.228).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hwmodel.formats import Block, Float, Int, max_value
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.observers import Sample, collect
from quantkit.qlayers import ActQuant, BlockAct, Point, QLayer
from quantkit.qtensor import BlockRule, ScaleRule, base_for, fit_groups
from quantkit.rounding import round_to
from quantkit.walk import Site, Visit, layerwise, rows

CHANGES = frozenset({"acts"})

Rule = Literal["absmax", "percentile", "mse", "output"]


@dataclass
class Fit(Visit):
    """A visit that can also fit one place to a sample of at most `samples` values taken elsewhere."""

    fit: Callable[[str, QLayer | Point, Sample], None] = field(kw_only=True)
    samples: int = field(kw_only=True)


def each(
    model: Model,
    calib: Calib,
    *,
    scale: Rule = "mse",
    percentile: float = 99.99,
    pow2: bool = False,
    unsigned: bool = True,
    samples: int = 65536,
    block_rule: BlockRule | None = None,
) -> Fit:
    """Fit a scale to the input of every layer, from what reaches it in the float network, and at once to every other
    activation planned to be quantized.

    scale: "output" holds for layers, places without a weight then go by "mse". samples: how many values per layer the
    search looks at. block_rule: of block formats (`qtensor.block_scale`), None for even with e8m0 and absmax with
    minifloat scales; of the other options they heed none. Returns how many inputs
    became unsigned, how many channels are zero on the whole calibration set, and how many places never ran and stay
    float. A layer whose whole input is zero gets the scale of its weights. Raises InputError for an input that is not
    finite.
    """
    if scale not in get_args(Rule):
        raise InputError(f"step 'act_scales': rule {scale!r} is not for inputs; accepted: {', '.join(get_args(Rule))}")
    report = {"unsigned_inputs": 0.0, "silent_channels": 0.0, "idle": 0.0}

    def fit(name: str, part: QLayer | Point, sample: Sample) -> None:
        fmt = part.plan.act
        assert fmt is not None
        if sample.broken is not None:
            index, value = sample.broken
            axis = 1 if isinstance(part, QLayer) and part.spatial else len(index) - 1
            raise InputError(
                f"layer {name!r}: its input is {value} in channel {index[axis]}, first at index {index} of a batch of"
                " the calibration set; all activations must be finite"
            )
        if sample.top is None:
            report["idle"] += 1
            return
        if isinstance(fmt, Block):
            report["silent_channels"] += float((sample.top == 0).sum())
            part.set_act(_block(fmt, block_rule, sample.top))
            return
        if isinstance(fmt, Int) and unsigned and fmt.signed and sample.low >= 0:
            fmt = Int(fmt.bits, signed=False)
            report["unsigned_inputs"] += 1
        if max_value(fmt) == 0:
            raise InputError(f"layer {name!r}: format {fmt} has no positive value; use at least 2 bits")
        values = sample.values()
        report["silent_channels"] += float((sample.top == 0).sum())
        if isinstance(part, QLayer) and not values.any():
            values = part.weight.detach().flatten()
        rule: ScaleRule = "mse" if scale == "output" else scale
        fitted = fit_groups(values.reshape(1, 1, -1), fmt, rule, percentile=percentile, pow2=pow2)
        part.set_act(ActQuant(fmt, float(fitted)))

    def fit_layer(site: Site) -> None:
        floats = site.floats or site.inputs
        sample = Sample(samples)
        for x in floats:
            sample(site.layer, x)
        fit(site.name, site.layer, sample)
        if scale == "output" and isinstance(site.layer.act, ActQuant):
            site.layer.set_act(by_output(site, site.layer.act, samples, pow2))

    points = {name: point for name, point in model.points().items() if point.plan.act is not None}
    seen = {name: Sample(samples) for name in points}
    if points:
        collect(model, calib, seen)
    for name, point in points.items():
        fit(name, point, seen[name])
    layers = model.qlayers().items()
    names = {name for name, layer in layers if layer.plan.act is not None and layer.op != "embedding"}
    return Fit(names, fit_layer, report, targets=bool(names), inputs=bool(names), fit=fit, samples=samples)


@functools.wraps(each)
def apply(model: Model, calib: Calib, **options: Any) -> dict[str, float]:
    """`each` in one pass over the model as it is, where no other step shares the walk."""
    if options.get("scale") == "output":
        return layerwise(each)(model, calib, **options)
    step = each(model, calib, **options)
    seen = {name: Sample(step.samples) for name in step.names}
    if seen:
        collect(model, calib, seen)
    layers = model.qlayers()
    for name in step.names:
        step.fit(name, layers[name], seen[name])
    return step.report


def by_output(site: Site, act: ActQuant, samples: int, pow2: bool) -> ActQuant:
    """The quantizer with the best of the scales around its own by the error of the layer's output.

    samples: the rows of inputs looked at hold about so many values, and are at least 256.
    """
    layer = site.layer
    layer.set_act(None)
    groups, columns = layer.groups, layer.weight[0].numel()
    w = layer.weight.detach().float().reshape(groups, -1, columns)
    bias, limit = layer.bias.reshape(groups, 1, -1), max(256, samples // (columns * groups))
    pairs = list(rows(site, limit, targets=True))
    x, y = torch.cat([x for x, _ in pairs], dim=1), torch.cat([y for _, y in pairs], dim=1) - bias
    scales = [act.scale * 2.0 ** (k if pow2 else k / 8) for k in (range(-1, 2) if pow2 else range(-12, 13))]

    def error(s: float) -> float:
        return float((torch.bmm(round_to(x / s, act.fmt), w.mT).mul_(s) - y).square().sum(dtype=torch.float64))

    best = min([act.scale, *scales], key=error)
    return ActQuant(act.fmt, best)


def _block(fmt: Block, rule: BlockRule | None, top: Tensor) -> BlockAct:
    minifloat = isinstance(fmt.scale, Float)
    if minifloat and rule not in (None, "absmax"):
        raise InputError(f"block rule {rule!r} is for shared exponents (e8m0); accepted for {fmt}: absmax")
    default: BlockRule = "absmax" if minifloat else "even"
    return BlockAct(fmt, rule or default, base_for(top, fmt.elem, fmt.scale))
