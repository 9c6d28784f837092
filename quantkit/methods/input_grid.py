"""Place the grid of every observation feature where the float policy's action suffers least.

The first layer's input quantizer has one scale for all features, but the float input stage may stretch and shift each
feature for free: feature j is seen as x~_j = (a Q((f_j x_j + c_j) / a) - c_j) / f_j. Feature after feature, f_j and
c_j are chosen from a few candidates around the current ones to minimize the loss of `quantkit.losses` between the float
network's outputs on x~ and on x; all other layers stay float meanwhile. The input stage takes f and c, the first
layer's columns and bias take them back, so the float function stays.

Coordinate search of clipping ranges by task loss, as in Nahshan et al., "Loss Aware Post-Training Quantization",
2019, arXiv 1911.07190. Differs from the paper: per feature instead of per layer, offsets too, no quadratic model.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from quantkit.links import find_links, scale_columns, scale_stage, shift_stage
from quantkit.losses import loss_for
from quantkit.model import Calib, Model
from quantkit.policy import Policy
from quantkit.qlayers import ActQuant
from quantkit.rounding import round_to

CHANGES = frozenset({"float"})

STRETCHES = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)
SHIFTS = (-0.25, 0.0, 0.25, 0.5)
"""In steps of the grid: a quarter moves the thresholds, a half puts one where a level was."""


def seen(x: Tensor, act: ActQuant, f: Tensor, c: Tensor) -> Tensor:
    """x~ of the docstring for one feature's values x, in units of x.

    >>> from hwmodel.formats import Int
    >>> seen(torch.tensor([0.2, 0.9]), ActQuant(Int(4), 1.0), torch.tensor(2.0), torch.tensor(0.5)).tolist()
    [0.25, 0.75]
    """
    return (round_to((x * f + c) / act.scale, act.fmt) * act.scale - c) / f


def apply(model: Model, calib: Calib, *, sweeps: int = 2, states: int = 512) -> dict[str, float]:
    """Search the input grid of a policy whose first layer is linear and has its input quantizer already.

    states: how many of the calibration set the loss is taken on. Returns the loss before and after.
    """
    policy = model.module
    found = [link for link in find_links(model) if link.kind == "input" and len(link.consumers) == 1]
    layer = model.qlayers().get(found[0].consumers[0]) if len(found) == 1 else None
    if layer is None or not isinstance(layer.act, ActQuant) or layer.q is not None or layer.in_scale is not None:
        return {"loss_before": 0.0, "loss_after": 0.0}
    if not isinstance(policy, Policy) or len(policy.obs_shape) != 1:
        return {"loss_before": 0.0, "loss_after": 0.0}
    act, twin = layer.act, model.copy()
    for other in twin.qlayers().values():
        other.set_act(None)
        other.set_weight(None)
    net = twin.module.get_submodule("net")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            x = policy.stage(calib.inputs[:states])
            target = net(x)
            loss = loss_for(policy.head, target)
            f, c = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
            now = torch.stack([seen(x[:, j], act, f[j], c[j]) for j in range(len(f))], dim=1)
            before = best = float(loss(net(now), target).double().mean())
            for _ in range(sweeps):
                for j in range(len(f)):
                    pairs = [(f[j] * k, c[j] + s * act.scale) for k, s in itertools.product(STRETCHES, SHIFTS)]
                    columns = torch.stack([seen(x[:, j], act, *pair) for pair in pairs])
                    tries = now.repeat(len(pairs), 1, 1)
                    tries[:, :, j] = columns
                    y = net(tries.flatten(0, 1))
                    losses = loss(y, target.repeat(len(pairs), 1)).double().reshape(len(pairs), -1).mean(dim=1)
                    i = int(losses.argmin())
                    if float(losses[i]) < best * (1 - 1e-4):
                        best = float(losses[i])
                        f[j], c[j] = pairs[i]
                        now[:, j] = columns[i]
    finally:
        torch.set_num_threads(threads)
    scale_stage(policy, f)
    shift_stage(policy, c)
    scale_columns(layer, 1 / f)
    layer.bias.data = (layer.bias.double() - layer.weight.double() @ c.double()).float()
    layer.invalidate()
    return {"loss_before": before, "loss_after": best}
