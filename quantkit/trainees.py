"""Layers and operands whose quantizers can be trained, in the place of quantized ones.

Per layer, with Q rounding to the format and d/du Q(u) taken as 1 inside its range and 0 outside,

    w~ = s_row Q(V),    x~ = a Q(x / a),    trained: V, log s_row, log a and the bias

(Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153, for the gradient of a), and for
the first layer of a policy x = f * stage(obs) + c with f and c per feature, which the float input stage absorbs.

Differs from the paper: latent weights V are in units of the grid and their own, so that a change of scale does not
round anew; they start inside the cell of the weight's code, as near to the float weight as that allows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hwmodel.formats import Format, Levels, levels, max_value, min_value
from quantkit.links import scale_columns, scale_stage, shift_stage
from quantkit.policy import Policy
from quantkit.qlayers import ActQuant, BlockAct, Point, QLayer
from quantkit.qtensor import expand_scale, from_values, round_scale, scale_format, values_of
from quantkit.rounding import round_to


class _Round(torch.autograd.Function):
    """`round_to` whose derivative is 1: latent weights never leave the range."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, fmt: Format) -> Tensor:
        return round_to(u, fmt)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Quantize(torch.autograd.Function):
    """a Q(x / a) with a = scale exp(log_a); the derivatives are the docstring's, in few passes over x.

    Only x and the result are kept for them, which the operations before and after keep anyhow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_a: Tensor, scale: float, fmt: Format) -> Tensor:
        a = scale * log_a.exp()
        y = round_to(x / a, fmt, inplace=True).mul_(a)
        ctx.save_for_backward(x, y)
        ctx.limits = tuple(float(a) * limit for limit in _limits(fmt))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        low, high = ctx.limits
        slope = y - _inside(x, x, low, high)
        return _inside(grad, x, low, high), slope.mul_(grad).sum(), None, None


def _inside(x: Tensor, u: Tensor, low: float, high: float) -> Tensor:
    """x where low <= u <= high, else 0; one vectorized pass, a third of the time of `torch.where`."""
    low, high = (float(np.nextafter(np.float32(v), np.float32(side))) for v, side in ((low, -np.inf), (high, np.inf)))
    return torch.ops.aten.hardtanh_backward(x, u, low, high)  # whose own bounds are strict


def _limits(fmt: Format) -> tuple[float, float]:
    return (-1.0, 1.0) if isinstance(fmt, Levels) else (min_value(fmt), max_value(fmt))


def inside_cell(u: Tensor, values: Tensor, fmt: Format) -> Tensor:
    """The point nearest to u that rounds to `values`, a little inside; same shape.

    >>> from hwmodel.formats import Int
    >>> inside_cell(torch.tensor([0.25, 1.4, 9.0]), torch.tensor([0.0, 2.0, 1.0]), Int(3)).mul(100).round().tolist()
    [25.0, 155.0, 145.0]
    """
    grid = torch.tensor(levels(fmt), dtype=torch.float32)
    middle = (grid[1:] + grid[:-1]) / 2
    at = torch.searchsorted(grid, values.contiguous()).clamp_(max=len(grid) - 1)
    low = torch.cat([grid[:1], middle])[at]
    high = torch.cat([middle, grid[-1:]])[at]
    return torch.minimum(torch.maximum(u, low + 0.1 * (values - low)), high - 0.1 * (high - values))


class Trainee(nn.Module):
    """A QLayer whose quantizers can be trained; takes its place in a copy of the network."""

    def __init__(self, layer: QLayer, stage: int | None) -> None:
        """stage: how many features of the input stage this layer scales and shifts, or None."""
        super().__init__()
        self.layer = layer
        self.act = layer.act if isinstance(layer.act, ActQuant) else None
        self.blocks = layer.act if isinstance(layer.act, BlockAct) else None
        self.bias = nn.Parameter(torch.zeros_like(layer.bias))
        self.unit = torch.ones(())  # what one unit of `bias` is worth
        self.V: nn.Parameter | None = None
        if layer.uniform is not None:
            q = layer.uniform
            self.s0 = q.scale
            u = layer.weight.detach().flatten(1) / expand_scale(q.scale, values_of(q).shape[1], q.granularity)
            self.V = nn.Parameter(inside_cell(u, values_of(q), q.fmt))
            self.log_s = nn.Parameter(torch.zeros_like(q.scale))
        if self.act is not None:
            self.log_a = nn.Parameter(torch.zeros(()))
        self.stretch = nn.Parameter(torch.zeros(stage)) if stage and self.act else None
        self.shift = nn.Parameter(torch.zeros(stage)) if stage and self.act else None
        if self.act is not None:
            self.reach = max(map(abs, _limits(self.act.fmt))) * self.act.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """f and c of the docstring."""
        assert self.stretch is not None and self.shift is not None
        return self.stretch.exp(), self.shift * self.reach

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if self.stretch is not None:
            f, c = self.factors()
            x = x * f + c
        if layer.in_scale is not None:
            x = x * layer.per_channel(layer.in_scale)
        if self.act is not None:
            x = _Quantize.apply(x, self.log_a, self.act.scale, self.act.fmt)
        if self.blocks is not None:
            x = x + (self.blocks.values(x, layer.axis) - x).detach()
        weight = layer.weight.detach()
        if self.V is not None:
            assert layer.uniform is not None
            s = self.log_s.exp() * self.s0
            s = s + (round_scale(s, scale_format(layer.uniform.granularity), layer.uniform.base) - s).detach()
            weight = (
                _Round.apply(self.V, layer.uniform.fmt) * expand_scale(s, self.V.shape[1], layer.uniform.granularity)
            ).reshape(layer.weight.shape)
        bias = layer.bias + self.bias * self.unit
        if layer.op == "embedding":
            return layer.product(x, weight) + bias
        return layer.product(x, weight, bias)

    @torch.no_grad()
    def bound(self) -> None:
        """Keep latent weights in the format's range, and scales within a factor of 100 of where they began."""
        if self.V is not None and self.layer.uniform is not None:
            self.V.clamp_(*_limits(self.layer.uniform.fmt))
        for name in ("log_s", "log_a", "stretch"):
            if (parameter := getattr(self, name, None)) is not None:
                parameter.clamp_(-4.6, 4.6)

    @torch.no_grad()
    def store(self, layer: QLayer, policy: nn.Module) -> None:
        """Make `layer`, which is as this one's was at the start, what has been learned."""
        if self.stretch is not None:
            assert isinstance(policy, Policy)
            f, c = self.factors()
            scale_stage(policy, f)
            shift_stage(policy, c)
            scale_columns(layer, 1 / f)
        if self.V is not None and layer.uniform is not None:
            q = layer.uniform
            scale = (self.log_s.exp() * self.s0).clamp_min(torch.finfo(torch.float32).tiny)
            layer.set_weight(from_values(round_to(self.V, q.fmt), scale, q.fmt, q.granularity, q.shape, q.base))
        if self.act is not None:
            layer.set_act(ActQuant(self.act.fmt, float(self.log_a.exp() * self.act.scale)))
        layer.bias.data = layer.bias + self.bias * self.unit


class Operand(nn.Module):
    """A quantized `Point` whose scale can be trained; what comes out are real values. Blocks scale themselves."""

    act = None  # so that a product around it applies no scale

    def __init__(self, point: Point) -> None:
        super().__init__()
        assert point.act is not None
        self.quantizer, self.axis = point.act, point.axis
        self.log_a = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.quantizer, BlockAct):
            return x + (self.quantizer.values(x, self.axis) - x).detach()
        return _Quantize.apply(x, self.log_a, self.quantizer.scale, self.quantizer.fmt)

    @torch.no_grad()
    def bound(self) -> None:
        """Keep the scale within a factor of 100 of where it began."""
        self.log_a.clamp_(-4.6, 4.6)

    @torch.no_grad()
    def store(self, point: Point, policy: nn.Module) -> None:
        """Make the point's scale what has been learned."""
        if isinstance(self.quantizer, ActQuant):
            point.set_act(ActQuant(self.quantizer.fmt, float(self.log_a.exp() * self.quantizer.scale)))
