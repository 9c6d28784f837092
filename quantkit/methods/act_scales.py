"""Static per-tensor activation scales from the calibration set.

A signed integer format becomes unsigned of the same width where no input is negative (after ReLU,
for instance): the same bits then resolve the range twice as finely. Narrow stays narrow only when
the format stays signed.

A block format needs no scale from here, as its scales are found at run time, only the rule that finds
them, and the factor of minifloat scales: with it the largest input seen gets the largest scale.
The default for shared exponents is "even" and not the "floor" of OCP MX 1.0, which clips e2m1 by up to a quarter
of the largest value: on a ViT for MNIST with inputs in mxfp4 the error at the outputs is a seventh (0.033, 0.228).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hwmodel.formats import Block, Float, Int, max_value
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.observers import Sample, Site, Visit, collect
from quantkit.qlayers import ActQuant, BlockAct, Point, QLayer
from quantkit.qtensor import BlockRule, ScaleRule, base_for, fit_groups

CHANGES = frozenset({"acts"})


@dataclass
class Fit(Visit):
    """A visit that can also fit one place to a sample of at most `samples` values taken elsewhere."""

    fit: Callable[[str, QLayer | Point, Sample], None] = field(kw_only=True)
    samples: int = field(kw_only=True)


def each(
    model: Model,
    calib: Calib,
    *,
    scale: ScaleRule = "mse",
    percentile: float = 99.99,
    pow2: bool = False,
    unsigned: bool = True,
    samples: int = 65536,
    block_rule: BlockRule | None = None,
) -> Fit:
    """Fit a scale to the input of every layer, from what reaches it in the float network, and at once to every other
    activation planned to be quantized.

    samples: how many values per layer the search looks at. block_rule: of block formats (`qtensor.block_scale`), None
    for even with e8m0 and absmax with minifloat scales; of the other options they heed none. Returns how many inputs
    became unsigned, how many channels are zero on the whole calibration set, and how many places never ran and stay
    float. A layer whose whole input is zero gets the scale of its weights. Raises InputError for an input that is not
    finite.
    """
    if scale == "importance":
        raise InputError("step 'act_scales': rule 'importance' is for weights; accepted: absmax, percentile, mse")
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
        fitted = fit_groups(values.reshape(1, 1, -1), fmt, scale, percentile=percentile, pow2=pow2)
        part.set_act(ActQuant(fmt, float(fitted)))

    def fit_layer(site: Site) -> None:
        sample = Sample(samples, len(site.floats))
        for x in site.floats:
            sample(site.layer, x)
        fit(site.name, site.layer, sample)

    points = {name: point for name, point in model.points().items() if point.plan.act is not None}
    seen = {name: Sample(samples, len(calib.batches())) for name in points}
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
    step = each(model, calib, **options)
    seen = {name: Sample(step.samples, len(calib.batches())) for name in step.names}
    if seen:
        collect(model, calib, seen)
    layers = model.qlayers()
    for name in step.names:
        step.fit(name, layers[name], seen[name])
    return step.report


def _block(fmt: Block, rule: BlockRule | None, top: Tensor) -> BlockAct:
    minifloat = isinstance(fmt.scale, Float)
    if minifloat and rule not in (None, "absmax"):
        raise InputError(f"block rule {rule!r} is for shared exponents (e8m0); accepted for {fmt}: absmax")
    default: BlockRule = "absmax" if minifloat else "even"
    return BlockAct(fmt, rule or default, base_for(top, fmt.elem, fmt.scale))
