"""Qronos: correct what has gone wrong before a layer, then round column after column and spread the error.

Zhang et al., "Qronos: Correcting the Past by Shaping the Future... in Post-Training Quantization", ICLR 2026,
arXiv 2505.11695. With X the inputs of the layer in the float network, X~ those of the quantized one (a column per
input), and w^(0) = w for each output, the paper alternates for t = 1, 2, ...

    q_t         = argmin over the grid of  |X w - sum_(j<t) q_j X~_j - p X~_t - sum_(j>t) w^(t-1)_j X~_j|^2  over p,
    w^(t)_(>t)  = argmin over v of         |X w - sum_(j<=t) q_j X~_j - sum_(j>t) v_j X~_j|^2.

After the first column this is GPTQ from the weights that best repeat the float outputs (the paper's theorem), and
the arithmetic is that of `quantkit.columns`: W* = argmin |X w - X~ v|^2 is rounded as GPTQ would, except that the
first column is the nearest to the p above, all others being as they were.

Differs from the paper: both problems are held near w by r |v - w|^2, r being `ridge` times the mean diagonal of
X~^T X~ (the paper: 1e-6 of its largest eigenvalue, and only in the second), as a policy's few calibration states
would be fitted by heart; damping, dead inputs and the fallback to rounding to nearest are those of `gptq`. Beyond its
first column it is `gptq:drift=true`.
"""

from __future__ import annotations

from quantkit.columns import NOTHING, aimed, moments, round_layer, tally
from quantkit.model import Calib, Model, unquantized
from quantkit.qtensor import ScaleRule
from quantkit.walk import Site, Visit, layerwise

CHANGES = frozenset({"weights"})


def each(
    model: Model,
    calib: Calib,
    *,
    scale: ScaleRule = "mse",
    percentile: float = 99.9,
    pow2: bool = False,
    damp: float = 0.01,
    ridge: float = 0.2,
    act_order: bool = True,
    block: int = 16,
    samples: int = 0,
) -> Visit:
    """Quantize every planned weight that is still float, each layer with the inputs that the ones before leave it.

    Options and reports are those of `gptq`; columns go by falling diagonal of X~^T X~ unless `act_order` is false.
    """
    report = dict(NOTHING)
    rule = {"rule": scale, "percentile": percentile, "pow2": pow2}

    def quantize_layer(site: Site) -> None:
        H, C = moments(site, samples, drift=True)
        W = first = site.layer.weight.detach().float().flatten(1)
        if H.numel():
            W, first = aimed(site.layer, H, C, ridge)
        tally(report, round_layer(site.layer, W, H, rule, damp, act_order, block, first, site.half))

    return Visit(unquantized(model), quantize_layer, report, targets=True)


apply = layerwise(each)
