"""Center the inputs of a policy, so that a symmetric quantizer wastes no codes on one side, and its Q-values or logits.

A feature j of the network's input with mean m_j over the calibration set is shifted by c_j = -m_j, and the
first layer's bias takes it back: W x + b = W (x + c) + (b - W c). The input stage is float arithmetic and
carries an offset already, so the shift is free. For an unsigned format c_j = -min x_j.

A discrete head takes the largest of its outputs (of each part), so what all of them have in common is of no use: the
mean over actions is taken out of the last layer's rows and bias, W - 1 mean(W). The rows of a Q-network are nearly the
value of the state, and a grid of few bits that must hold it has no step left for the differences between actions.
Actions and softmax stay; what a Q-network gives afterwards is each Q-value less the mean of them all.

An idea of asymmetric quantization (a zero point per channel: Nagel et al., "A White Paper on Neural Network
Quantization", 2021, arXiv 2106.08295, section 2.2.1). Differs from it: the zero point is moved out of the
quantizer into the float input stage, so the integer arithmetic has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwmodel.formats import Int
from quantkit.errors import InputError
from quantkit.links import find_links, set_weight, shift_stage
from quantkit.model import Calib, Model
from quantkit.policy import Policy
from quantkit.qlayers import QLayer

CHANGES = frozenset({"float"})


def shift_of(x: Tensor, unsigned: bool) -> Tensor:
    """c of inputs x (samples, features).

    >>> shift_of(torch.tensor([[1.0, -2.0], [3.0, -4.0], [2.0, -3.0]]), False).tolist()
    [-2.0, 3.0]
    """
    c = -x.amin(dim=0) if unsigned else -x.double().mean(dim=0).float()
    return torch.where(x.amax(dim=0) - x.amin(dim=0) < 1e-6 * x.abs().amax(dim=0), torch.zeros_like(c), c)


def without_mean(rows: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Rows (outputs, ...) minus their mean within each part, the same shape; a part of one row is left alone.

    >>> without_mean(torch.tensor([1.0, 3.0, 5.0]), (2, 1)).tolist()
    [-1.0, 1.0, 5.0]
    """
    return torch.cat([r - r.mean(dim=0) if len(r) > 1 else r for r in rows.split(parts)])


def apply(model: Model, calib: Calib) -> dict[str, float]:
    """Center what reaches the first layer of a policy, if that is linear and planned to have a quantized input, and
    what a discrete or multidiscrete head is given, if the network ends with a linear layer.

    A feature that never changes is left alone. Returns how many features were shifted, and how many outputs.
    """
    policy, layers = model.module, model.layers()
    for name, layer in model.qlayers().items():
        if layer.q is not None or layer.act is not None:
            raise InputError(f"step 'center': layer {name!r} is already quantized; put this step first")
    moved = 0.0
    for link in find_links(model):
        consumers = [layers[name] for name in link.consumers]
        if link.kind != "input" or not isinstance(policy, Policy) or len(policy.obs_shape) != 1:
            continue
        chosen = [layer for layer in consumers if isinstance(layer, QLayer) and layer.plan.act is not None]
        if len(chosen) < len(consumers):
            continue
        fmt = chosen[0].plan.act
        x = torch.cat([policy.stage(batch) for batch in calib.batches()])
        c = shift_of(x, isinstance(fmt, Int) and not fmt.signed)
        shift_stage(policy, c)
        for layer in chosen:
            factor = 1.0 if layer.in_scale is None else layer.in_scale
            layer.bias.data = (layer.bias.double() - layer.weight.double() @ (c * factor).double()).float()
        moved += float((c != 0).sum())
    outputs = 0.0
    if isinstance(policy, Policy) and policy.head.kind in ("discrete", "multidiscrete"):
        last = list(policy.net.children())[-1]
        if isinstance(last, QLayer) and last.op == "linear":
            set_weight(last, without_mean(last.weight.detach().double(), policy.head.nvec).float())
            last.bias.data = without_mean(last.bias.double(), policy.head.nvec).float()
            outputs = float(policy.head.outputs)
    return {"shifted": moved, "outputs": outputs}
