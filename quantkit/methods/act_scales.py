"""Static per-tensor activation scales from the calibration set.

A signed integer format becomes unsigned of the same width where no input is negative (after ReLU,
for instance): the same bits then resolve the range twice as finely. Narrow stays narrow only when
the format stays signed.
"""

from __future__ import annotations

import torch

from hwmodel.formats import Int, max_value
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.observers import Sample, collect
from quantkit.qlayers import ActQuant
from quantkit.qtensor import ScaleRule, fit_groups

CHANGES = frozenset({"acts"})


def apply(
    model: Model,
    calib: Calib,
    *,
    scale: ScaleRule = "mse",
    percentile: float = 99.99,
    pow2: bool = False,
    unsigned: bool = True,
    samples: int = 65536,
) -> dict[str, float]:
    """Fit a scale to the input of every layer planned to have a quantized one.

    samples: how many values per layer the search looks at. Returns the number of unsigned inputs.
    """
    if scale == "importance":
        raise InputError("step 'act_scales': rule 'importance' is for weights; accepted: absmax, percentile, mse")
    layers = {name: layer for name, layer in model.qlayers().items() if layer.plan.act is not None}
    batches = len(calib.batches())
    seen = {name: Sample(samples, batches) for name in layers}
    collect(model, calib, seen)
    count = 0
    for name, layer in layers.items():
        values, fmt = seen[name].values(), layer.plan.act
        assert fmt is not None
        if not torch.isfinite(values).all():
            raise InputError(f"layer {name!r}: its input is not finite on the calibration set")
        if isinstance(fmt, Int) and unsigned and fmt.signed and seen[name].low >= 0:
            fmt = Int(fmt.bits, signed=False)
            count += 1
        if max_value(fmt) == 0:
            raise InputError(f"layer {name!r}: format {fmt} has no positive value; use at least 2 bits")
        fitted = fit_groups(values.reshape(1, 1, -1), fmt, scale, percentile=percentile, pow2=pow2)
        layer.set_act(ActQuant(fmt, float(fitted)))
    return {"unsigned_inputs": float(count)}
