"""GPTQ: round column after column, and let the columns still free make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
ICLR 2023, arXiv 2210.17323; the arithmetic is that of `quantkit.columns`.

`drift=True` also repairs what the layers before have done to the inputs. With x~ the layer's input
now and y = W x what it put out in float, |W x - Q x~|^2 over the calibration set is |(W* - Q) x~|^2
plus a constant for

    W* = W + E[(y - W x~) x~^T] E[x~ x~^T]^-1,

so W* is rounded in place of W; `ridge` times the mean diagonal of E[x~ x~^T] is added to it before the
inversion, as few samples would be fitted by heart. `qronos` differs from that in the first column alone.

Differs from the paper: the order of the arithmetic; inputs that are never active round to nearest instead
of becoming zero, as a policy visits states that calibration did not; the damping raises itself when
the factorization fails, and what still fails is rounded to nearest; a row that would end with a
larger error than rounding to nearest (each with its own scales) is rounded to nearest. Scales are
fitted before a layer starts, those per group when the group is reached, on the weights to be
rounded then. With `act_order` columns go by falling diagonal of H, and scales per group are fitted
beforehand.
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
    act_order: bool = False,
    block: int = 16,
    sequential: bool = True,
    drift: bool = False,
    ridge: float = 0.2,
    samples: int = 0,
) -> Visit:
    """Quantize every planned weight that is still float.

    sequential: a layer's inputs come from the layers before it as already quantized; otherwise all
    inputs are collected first. drift, ridge: aim at the float network's output of the layer, as above.
    samples: how many inputs of a layer (output positions of a convolution) make H, spread evenly over
    the calibration set; 0: all of a linear layer, and of a convolution 16 per column, at least 8,192.
    Reports how many inputs were never active, how many layers and rows fell back to rounding to
    nearest, and the largest damping that was needed.
    """
    report = dict(NOTHING)
    rule = {"rule": scale, "percentile": percentile, "pow2": pow2}

    def quantize_layer(site: Site) -> None:
        H, C = moments(site, samples, drift=drift)
        W = site.layer.weight.detach().float().flatten(1)
        if drift and H.numel():
            W, _ = aimed(site.layer, H, C, ridge)
        tally(report, round_layer(site.layer, W, H, rule, damp, act_order, block, half=site.half))

    return Visit(unquantized(model), quantize_layer, report, targets=drift, sequential=sequential)


apply = layerwise(each)
