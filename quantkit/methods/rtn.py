"""Round to nearest: every weight to the closest value of its format, at a fitted scale.

Scale rules are those of `quantkit.qtensor.fit_scale`; "importance" weights each column's squared
error by the mean square of its input over the calibration set (the iMatrix idea of llama.cpp),
which approximates GPTQ's objective by the diagonal of its Hessian.
"""

from __future__ import annotations

from typing import Any

import torch

from quantkit.model import Calib, Model, unquantized
from quantkit.observers import Gram
from quantkit.qtensor import ScaleRule, fit_scale, quantize
from quantkit.walk import Site, Visit, layerwise, rows

CHANGES = frozenset({"weights"})


def each(
    model: Model, calib: Calib, *, scale: ScaleRule = "mse", percentile: float = 99.9, pow2: bool = False
) -> Visit:
    """Quantize every planned weight that is still float; nothing to report."""

    def quantize_layer(site: Site) -> None:
        layer, fmt, importance = site.layer, site.layer.plan.weight, None
        assert fmt is not None
        if scale == "importance":
            gram = Gram()
            for x, _ in rows(site):
                gram.add(x)
            if gram.total is not None:
                importance = torch.diagonal(gram.total, dim1=-2, dim2=-1) / gram.count  # (groups, columns)
                importance = importance.repeat_interleave(layer.weight.shape[0] // layer.groups, dim=0)
                importance = importance + 1e-3 * importance.mean()
        options: dict[str, Any] = {"percentile": percentile, "importance": importance, "pow2": pow2}
        rule = "mse" if scale == "importance" and importance is None else scale
        fitted = fit_scale(layer.weight, fmt, layer.plan.granularity, rule, **options)
        layer.set_weight(quantize(layer.weight, fitted, fmt, layer.plan.granularity))

    return Visit(unquantized(model), quantize_layer, {}, sequential=False, inputs=scale == "importance")


apply = layerwise(each)
