"""Bias correction: add to every bias the mean error that quantization leaves in the layer's output.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
arXiv 1906.04721, section 4.2; the empirical form (supplement, section D):

    b <- b + E[y] - E[y~],    y the float network's output of the layer, y~ the quantized one's,

per output channel, over the calibration set and all positions.

Differs from the paper: the expectation is that before the activation function (as in Brevitas), so
no assumption about its shape is needed. `sequential=True` is the paper's order: layers are
corrected one after the other, y~ from inputs that the quantized and corrected layers before
produce. `sequential=False` is the code of Aggarwal et al. (arXiv 2311.12359): both outputs come
from the float network's input, so a layer only repairs its own error.

Apply it once: the float bias is the reference, and a second run would take the corrected one for it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quantkit.model import Calib, Model, float_twin
from quantkit.walk import Site, Visit, visit

CHANGES = frozenset({"bias"})


def mean_output(batches: Iterable[Tensor], spatial: int = 0) -> Tensor:
    """Mean per channel, float64, of outputs whose channels are followed by `spatial` dimensions.

    >>> mean_output([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0], [2.0, 5.0]])]).tolist()
    [2.0, 3.0]
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for y in batches:
        channel = 1 if spatial else y.dim() - 1
        total = total + y.sum(dim=[axis for axis in range(y.dim()) if axis != channel], dtype=torch.float64)
        count += y.numel() // y.shape[channel]
    return total / max(count, 1)


def apply(model: Model, calib: Calib, *, sequential: bool = True) -> dict[str, float]:
    """Correct the bias of every layer with a quantized weight or input; returns the largest change."""
    step = each(model, calib, sequential=sequential)
    visit(model if sequential else float_twin(model), calib, [step])
    return step.report


def each(model: Model, calib: Calib, *, sequential: bool = True) -> Visit:
    """`apply`, layer by layer."""
    layers = model.qlayers()
    report = {"largest_shift": 0.0}

    def correct(site: Site) -> None:
        layer = layers[site.name]
        if not site.inputs or (layer.q is None and layer.act is None):
            return
        outputs = [layer(x) for x in site.inputs]
        shift = mean_output(site.targets, layer.spatial) - mean_output(outputs, layer.spatial)
        layer.bias.data = (layer.bias.double() + shift).float()
        report["largest_shift"] = max(report["largest_shift"], float(shift.abs().amax()))
        if sequential:
            site.outputs = [y.add_(layer.per_channel(shift.float())) for y in outputs]

    names = {n for n, layer in layers.items() if layer.plan.weight is not None or layer.plan.act is not None}
    return Visit(names, correct, report, targets=True, sequential=sequential)
