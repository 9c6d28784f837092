"""SmoothQuant: move the spread of input channels from activations, which share a scale, into weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", ICML 2023, arXiv 2211.10438, equation 4. Input channel j of a layer is multiplied by

    f_j = max|W_:j|^(1 - alpha) / max|x_j|^alpha

and column j of W divided by it (f_j is 1 / s_j of the paper); the function stays the same.

Differs from the paper: the factor is absorbed wherever tracing finds a place for it, not only in a
preceding normalization: in the rows of the layers before (all those of a residual stream; the values
of attention), or in the input stage of a policy. |x_j| and |W_:j| are the largest of all layers that
read the channel. Elsewhere (after tanh, say) the layer keeps an explicit multiplier per input channel,
which costs hardware: `explicit=False` leaves such layers alone, and `pow2=True` makes every factor a
shift. Features that reach a network from outside are often of different units (angles, speeds, forces), and what they
are multiplied with belongs to their preparation, like the input stage of a policy: `inputs=True` allows that even with
`explicit=False`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.links import column_range, find_links, gathered, largest, ranges, rescale
from quantkit.model import Calib, Model
from quantkit.observers import AbsMax, Observer, collect
from quantkit.qlayers import QLayer

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
    model: Model, calib: Calib, *, alpha: float = 0.5, explicit: bool = True, pow2: bool = False, inputs: bool = False
) -> dict[str, float]:
    """Smooth the input of every layer planned to have a quantized one; an embedding has none.

    Returns how many layers were absorbed upstream, how many got a multiplier of their own, and how
    many were left alone.
    """
    layers = model.qlayers()
    for name, layer in layers.items():
        if layer.q is not None or layer.act is not None:
            raise InputError(f"step 'smoothquant': layer {name!r} is already quantized; put this step first")
    wanted = {n: layer for n, layer in layers.items() if layer.plan.act is not None and layer.op != "embedding"}
    seen = {name: AbsMax() for name in wanted}
    collect(model, calib, seen)
    entries = set(wanted) if explicit else entered(model, calib) if inputs else set()
    tops = {name: observer.value for name, observer in seen.items() if observer.value is not None}
    absorbed: set[str] = set()
    for link in find_links(model):
        parts = [gathered(index, tops[name], link.channels) for name, index in link.columns.items() if name in tops]
        if parts:
            _, w = ranges(model, link)
            rescale(model, link, factors(w, largest(parts, link.channels), alpha, pow2))
            absorbed.update(link.columns.keys() & wanted.keys())
    left = multiplied = 0
    for name, layer in wanted.items():
        if name in absorbed:
            continue
        if name not in entries or name not in tops or layer.groups != 1:
            left += 1
            continue
        layer.scale_input(factors(column_range(layer), tops[name], alpha, pow2))
        multiplied += 1
    return {"absorbed": float(len(absorbed)), "explicit": float(multiplied), "left_alone": float(left)}


def entered(model: Model, calib: Calib) -> set[str]:
    """The linear layers that read the network's own input, as it is."""
    one = calib.inputs[:1]
    found: set[str] = set()

    def look(name: str) -> Observer:
        def see(layer: QLayer, x: Tensor) -> None:
            if layer.op == "linear" and x.data_ptr() == one.data_ptr() and x.shape == one.shape:
                found.add(name)

        return see

    collect(model, Calib(one), {name: look(name) for name in model.qlayers()})
    return found
