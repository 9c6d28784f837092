"""SmoothQuant: move the spread of input channels from activations, which share a scale, into weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", ICML 2023, arXiv 2211.10438, equation 4. Input channel j of a layer is multiplied by

    f_j = max|W_:j|^(1 - alpha) / max|x_j|^alpha

and column j of W divided by it (f_j is 1 / s_j of the paper); the function stays the same.

Differs from the paper: the factor is absorbed wherever a producer is found across a positively
homogeneous step, not only in a preceding normalization: in the rows of the layer before, or in the
input stage of a policy. Elsewhere (after tanh, say) the layer keeps an explicit multiplier per
input channel, which costs hardware: `explicit=False` leaves such layers alone, and `pow2=True`
makes every factor a shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.links import (
    Link,
    column_range,
    find_links,
    in_channels,
    scale_columns,
    scale_rows,
    scale_stage,
)
from quantkit.model import Calib, Model
from quantkit.observers import AbsMax, collect
from quantkit.policy import Policy

CHANGES = frozenset({"float"})


def factors(w: Tensor, x: Tensor, alpha: float = 0.5, pow2: bool = False) -> Tensor:
    """f_j of weight magnitudes w and input magnitudes x, (channels,); 1 where one of them is (almost) zero.

    >>> factors(torch.tensor([4.0, 2.0]), torch.tensor([1.0, 0.0])).tolist()
    [2.0, 1.0]
    """
    alive = (w > 1e-9 * w.amax()) & (x > 1e-9 * x.amax())
    one = torch.ones((), dtype=torch.float64)
    f = torch.where(alive, w.double(), one) ** (1 - alpha) / torch.where(alive, x.double(), one) ** alpha
    return (torch.exp2(f.log2().round()) if pow2 else f).float()


def apply(
    model: Model, calib: Calib, *, alpha: float = 0.5, explicit: bool = True, pow2: bool = False
) -> dict[str, float]:
    """Smooth the input of every layer planned to have a quantized one.

    Returns how many layers were absorbed upstream, how many got a multiplier of their own, and how
    many were left alone.
    """
    wanted = {name: layer for name, layer in model.qlayers().items() if layer.plan.act is not None}
    for name, layer in model.qlayers().items():
        if layer.q is not None or layer.act is not None:
            raise InputError(f"step 'smoothquant': layer {name!r} is already quantized; put this step first")
    seen = {name: AbsMax() for name in wanted}
    collect(model, calib, seen)
    absorbed: set[str] = set()
    for link in find_links(model):
        sources = [name for name in link.consumers if name in wanted and seen[name].value is not None]
        if sources:
            _absorb(model, link, seen[sources[0]].value, alpha, pow2)  # type: ignore[arg-type]
            absorbed.update(name for name in link.consumers if name in wanted)
    left = multiplied = 0
    for name, layer in wanted.items():
        x = seen[name].value
        if name in absorbed:
            continue
        if not explicit or x is None or layer.groups != 1:
            left += 1
            continue
        layer.scale_input(factors(column_range(layer, in_channels(layer)), x, alpha, pow2))
        multiplied += 1
    return {"absorbed": float(len(absorbed)), "explicit": float(multiplied), "left_alone": float(left)}


def _absorb(model: Model, link: Link, x: Tensor, alpha: float, pow2: bool) -> None:
    layers = model.layers()
    consumers = [layers[name] for name in link.consumers]
    channels = in_channels(consumers[0]) if link.kind == "input" else layers[link.producer].weight.shape[0]
    w = torch.stack([column_range(layer, channels) for layer in consumers]).amax(dim=0)
    f = factors(w, x.reshape(channels, -1).amax(dim=1), alpha, pow2)
    if link.kind == "input":
        assert isinstance(model.module, Policy)
        scale_stage(model.module, f)
    else:
        scale_rows(layers[link.producer], f)
    for layer in consumers:
        scale_columns(layer, 1 / f)
