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

from quantkit.model import Calib, Model
from quantkit.observers import walk

CHANGES = frozenset({"bias"})


def mean_output(batches: Iterable[Tensor], spatial: int = 0) -> Tensor:
    """Mean per channel, float64, of outputs whose channels are followed by `spatial` dimensions.

    >>> mean_output([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0], [2.0, 5.0]])]).tolist()
    [2.0, 3.0]
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for y in batches:
        rows = (y.movedim(1, -1) if spatial else y).reshape(-1, y.shape[1 if spatial else -1])
        total = total + rows.sum(dim=0, dtype=torch.float64)
        count += rows.shape[0]
    return total / max(count, 1)


def apply(model: Model, calib: Calib, *, sequential: bool = True) -> dict[str, float]:
    """Correct the bias of every layer with a quantized weight or input; returns the largest change."""
    chosen = {n: layer for n, layer in model.qlayers().items() if layer.q is not None or layer.act is not None}
    if sequential:
        sites = walk(model, calib, chosen, targets=True)
    else:
        sites = walk(_float_copy(model), calib, chosen, targets=True)
    largest = 0.0
    for site in sites:
        if not site.inputs:
            continue
        layer = chosen[site.name]
        shift = mean_output(site.targets, layer.spatial) - mean_output((layer(x) for x in site.inputs), layer.spatial)
        layer.bias.data = (layer.bias.double() + shift).float()
        largest = max(largest, float(shift.abs().amax()))
    return {"largest_shift": largest}


def _float_copy(model: Model) -> Model:
    copy = model.copy()
    for layer in copy.qlayers().values():
        layer.set_act(None)
        layer.set_weight(None)
    return copy
