"""Learned rounding: choose for every weight whether it goes up or down by the error of the layer's output.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020,
arXiv 2004.10568. Per layer, with u = w / s, d the step of the format's grid at u (1 for integers),
lo = d floor(u / d), and one variable V per weight:

    h(V)  = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1),
    w~(V) = s clip(lo + d h(V), smallest, largest),
    minimize over V:   E |w~ x~ - y|^2 + lambda sum (1 - |2 h - 1|^beta),

x~ the layer's input in the quantized network and y its output in the float one. V starts where
w~ = w; beta falls from 20 to 2 after a warmup without the second term; at the end h is rounded.

The steps of a minifloat are frozen at the float weight: lo and lo + d are values of the format for
either sign, and above the largest value the clip decides.

Differs from the paper: with a narrow layer the first term is taken over the whole calibration set
in every step, from x~ x~^T and y x~^T, which costs no more than a batch; only wide layers draw
samples at random. The gradient is written out, with Adam. The first term is measured, row by row,
in the mean error per weight of rounding to nearest, so that lambda means the same for every layer
(0.01 in the paper's unnormalized loss; here 30, above which nothing changes any more). The
activation function behind the layer is not part of the loss. A row that would end with a larger
error than rounding to nearest is rounded to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hwmodel.formats import Float, Format, Levels, max_value, min_exponent, min_value
from quantkit.model import Calib, Model, unquantized
from quantkit.qtensor import ScaleRule, base_of, expand_scale, fit_scale, from_values, quantize
from quantkit.rounding import round_to
from quantkit.walk import Site, Visit, layerwise, rows

CHANGES = frozenset({"weights"})

ZETA, GAMMA = 1.1, -0.1


def steps_of(u: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """(lo, d): the value of the grid at or below u, and the step from there up.

    >>> lo, d = steps_of(torch.tensor([2.4, -0.3, 3.5]), Float(2, 1))
    >>> lo.tolist(), d.tolist()
    ([2.0, -0.5, 3.0], [1.0, 0.5, 1.0])
    """
    if isinstance(fmt, Levels) and fmt.name == "binary":
        return -torch.ones_like(u), torch.full_like(u, 2.0)
    if not isinstance(fmt, Float):
        return u.floor(), torch.ones_like(u)
    exponent = torch.frexp(u).exponent - 1
    exponent = torch.where(u == 0, min_exponent(fmt), exponent).clamp_min(min_exponent(fmt))
    d = torch.ldexp(torch.ones_like(u), exponent - fmt.man)
    return d * torch.floor(u / d), d


def start(lo: Tensor, d: Tensor, u: Tensor) -> Tensor:
    """V with h(V) = (u - lo) / d."""
    fraction = ((u - lo) / d).clamp(0, 1)
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def h(V: Tensor) -> Tensor:
    """How far up each weight goes, 0..1."""
    return torch.sigmoid(V).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


@dataclass
class Moments:
    """The output error of a layer as a function of its weight, D = w~ - w (groups, rows, columns):

    n E |w~ x~ - y|^2 = tr(D xx D^T) + 2 tr(D ex^T) + const.   xx: sum of x~ x~^T, (groups, columns,
    columns). ex: sum of (w x~ - y) x~^T, (groups, rows, columns).
    """

    xx: Tensor
    ex: Tensor

    def gradient(self, D: Tensor) -> Tensor:
        """Half the derivative by D."""
        return torch.baddbmm(self.ex, D, self.xx)

    def error(self, D: Tensor) -> Tensor:
        """The error above per row, (groups, rows), without the constant."""
        return ((torch.bmm(D, self.xx) + 2 * self.ex) * D).sum(dim=-1)


@dataclass
class Samples:
    """The same from `batch` samples drawn anew each time, as if they were `count`.

    x: x~, (groups, n, columns). e: w x~ - y, (groups, n, rows).
    """

    x: Tensor
    e: Tensor
    count: int
    batch: int
    generator: torch.Generator

    def gradient(self, D: Tensor) -> Tensor:
        """Half the derivative by D, estimated."""
        chosen = torch.randint(self.x.shape[1], (self.batch,), generator=self.generator)
        x = self.x[:, chosen]
        e = torch.baddbmm(self.e[:, chosen], x, D.mT)
        return torch.bmm(e.mT, x).mul_(self.count / self.batch)


def learn(
    V: Tensor,
    lo: Tensor,
    d: Tensor,
    limits: tuple[float, float],
    w: Tensor,
    s: Tensor,
    loss: Moments | Samples,
    unit: Tensor,
    *,
    steps: int,
    lr: float,
    reg: float,
    beta: tuple[float, float],
    warmup: float,
) -> Tensor:
    """V after `steps` steps of Adam. All tensors (groups, rows, columns) or broadcast; unit: (groups, rows, 1).

    unit: the loss is measured in these, per row.
    """
    V = V.clone()
    m, v = torch.zeros_like(V), torch.zeros_like(V)
    sd = s * d * ((lo >= limits[0]) & (lo + d <= limits[1]))  # where both choices are clipped, none matters
    first = round(warmup * steps)
    for t in range(steps):
        sig = torch.sigmoid(V)
        stretched = sig * (ZETA - GAMMA) + GAMMA
        up = stretched.clamp(0, 1)
        soft = torch.addcmul(lo, d, up)
        inside = stretched == up
        D = soft.clamp_(*limits).mul_(s).sub_(w)
        g = loss.gradient(D).mul_(2 / unit).mul_(sd)
        if t >= first and reg > 0:
            b = beta[1] + (beta[0] - beta[1]) * (1 - (t - first) / max(1, steps - first))
            x = up.mul_(2).sub_(1)
            g.sub_(x.abs().pow_(b - 1).mul_(2 * reg * b).copysign_(x))
        g.mul_(sig.mul_(1 - sig)).mul_(ZETA - GAMMA).mul_(inside)
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        bias = math.sqrt(1 - 0.999 ** (t + 1))
        V.addcdiv_(m, v.sqrt().div_(bias).add_(1e-8), value=-lr / (1 - 0.9 ** (t + 1)))
    return V


def each(
    model: Model,
    calib: Calib,
    *,
    scale: ScaleRule = "mse",
    percentile: float = 99.9,
    pow2: bool = False,
    steps: int = 1000,
    lr: float = 0.03,
    reg: float = 30.0,
    beta_start: float = 20.0,
    beta_end: float = 2.0,
    warmup: float = 0.2,
    batch: int = 256,
    samples: int = 8192,
) -> Visit:
    """Learn the rounding of every planned weight that is still float, layer by layer.

    reg: lambda; the error it is weighed against is measured in the mean error that rounding to
    nearest makes per weight. batch: samples per step for layers with more than 4 times as many
    columns; `samples` is how many these layers keep of the calibration set (a position of a
    convolution is a sample). Reports how many rows fell back to rounding to nearest.
    """
    report = {"nearest_rows": 0.0}

    def learn_layer(site: Site) -> None:
        layer, fmt, granularity = site.layer, site.layer.plan.weight, site.layer.plan.granularity
        assert fmt is not None
        out, groups = layer.weight.shape[0], layer.groups
        moments = _moments(site)
        importance = None
        if scale == "importance" and moments is not None:
            importance = torch.diagonal(moments.xx, dim1=1, dim2=2)
            importance = (importance + 1e-3 * importance.mean()).repeat_interleave(out // groups, dim=0)
        options: dict[str, Any] = {"percentile": percentile, "importance": importance, "pow2": pow2}
        fitted = fit_scale(layer.weight, fmt, granularity, scale, **options)
        if moments is None:  # the layer never runs
            layer.set_weight(quantize(layer.weight, fitted, fmt, granularity))
            return
        w = layer.weight.detach().float().reshape(groups, out // groups, -1)
        s = expand_scale(fitted, w.shape[2], granularity).expand(out, -1).reshape(groups, out // groups, -1)
        loss: Moments | Samples = moments
        if w.shape[2] > 4 * batch:
            loss = _samples(site, batch, samples, calib.generator)
        beta = (beta_start, beta_end)
        near = round_to(w / s, fmt)
        learned = _round(w, s, fmt, near, moments, loss, steps=steps, lr=lr, reg=reg, beta=beta, warmup=warmup)
        worse = moments.error(learned * s - w) > moments.error(near * s - w)
        values = torch.where(worse.unsqueeze(-1), near, learned)
        report["nearest_rows"] += float(worse.sum())
        shape, base = tuple(layer.weight.shape), base_of(layer.weight, fmt, granularity)
        layer.set_weight(from_values(values.reshape(out, -1), fitted, fmt, granularity, shape, base))

    return Visit(unquantized(model), learn_layer, report, targets=True)


apply = layerwise(each)


def _round(
    w: Tensor, s: Tensor, fmt: Format, near: Tensor, moments: Moments, loss: Moments | Samples, **options: Any
) -> Tensor:
    """Grid values learned for w (groups, rows, columns) at scales s; `near` are the nearest ones."""
    u = w / s
    lo, d = steps_of(u, fmt)
    limits = (-1.0, 1.0) if isinstance(fmt, Levels) else (min_value(fmt), max_value(fmt))
    E = near * s - w
    unit = (torch.bmm(E, moments.xx) * E).sum(dim=-1, keepdim=True) / w.shape[2]
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    V = learn(start(lo, d, u), lo, d, limits, w, s, loss, unit, **options)
    return (lo + d * (h(V) >= 0.5)).clamp_(*limits)


def _pairs(site: Site) -> Iterator[tuple[Tensor, Tensor]]:
    """(x~, w x~ - y) batch by batch: (groups, n, columns), (groups, n, rows); of a convolution at some positions."""
    layer = site.layer
    w = layer.weight.detach().float().reshape(layer.groups, layer.weight.shape[0] // layer.groups, -1)
    bias = layer.bias.reshape(layer.groups, 1, -1)
    for x, y in rows(site, targets=True):
        yield x, torch.bmm(x, w.mT).add_(bias).sub_(y)


def _moments(site: Site) -> Moments | None:
    total: Moments | None = None
    for x, e in _pairs(site):
        if total is None:
            total = Moments(torch.bmm(x.mT, x), torch.bmm(e.mT, x))
        else:
            total.xx.baddbmm_(x.mT, x)
            total.ex.baddbmm_(e.mT, x)
    return total


def _samples(site: Site, batch: int, limit: int, generator: torch.Generator) -> Samples:
    parts = list(_pairs(site))
    x, e = torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=1)
    kept = torch.randperm(x.shape[1], generator=generator)[:limit]
    return Samples(x[:, kept], e[:, kept], x.shape[1], batch, generator)
