"""Round to nearest: every weight to the closest value of its format, at a fitted scale.

Scale rules are those of `quantkit.qtensor.fit_scale`; "importance" weights each column's squared
error by the mean square of its input over the calibration set (the iMatrix idea of llama.cpp),
which approximates GPTQ's objective by the diagonal of its Hessian.
"""

from __future__ import annotations

import torch

from quantkit.model import Calib, Model
from quantkit.observers import Gram, collect
from quantkit.qtensor import ScaleRule, fit_scale, quantize

CHANGES = frozenset({"weights"})


def apply(
    model: Model, calib: Calib, *, scale: ScaleRule = "mse", percentile: float = 99.9, pow2: bool = False
) -> dict[str, float]:
    """Quantize every planned weight that is still float; returns nothing to report."""
    layers = {n: layer for n, layer in model.qlayers().items() if layer.plan.weight is not None and layer.q is None}
    grams = {name: Gram() for name in layers} if scale == "importance" else {}
    if grams:
        collect(model, calib, grams)
    for name, layer in layers.items():
        importance, fmt = None, layer.plan.weight
        assert fmt is not None
        if name in grams and (gram := grams[name].total) is not None:
            importance = torch.diagonal(gram, dim1=-2, dim2=-1) / grams[name].count  # (groups, columns)
            importance = importance.repeat_interleave(layer.weight.shape[0] // layer.groups, dim=0)
            importance = importance + 1e-3 * importance.mean()
        fitted = fit_scale(
            layer.weight,
            fmt,
            layer.plan.granularity,
            scale,
            percentile=percentile,
            importance=importance,
            pow2=pow2,
        )
        layer.set_weight(quantize(layer.weight, fitted, fmt, layer.plan.granularity))
    return {}
