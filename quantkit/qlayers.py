"""`QLayer`: one wrapper for Linear and Conv2d whose input and weight may be quantized.

The arithmetic is that of the hardware: the input is divided by its scale and rounded to grid
values, multiplied with the weights' grid values, and the sum is scaled once per output. The
sum is exact, and so independent of batch size, threads and machine: it is taken in float32
where the actual weights keep it below 2^24 units, in float64 otherwise (exact below 2^53, that
is, for all formats but e5 and e6 of 8 and 7 bits). Weights are decoded once, not in every forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwmodel import formats
from hwmodel.formats import Format
from hwmodel.spec import Granularity, PerGroup, PerRow
from quantkit.qtensor import QTensor, dequantize, values_of
from quantkit.rounding import round_to


@dataclass(frozen=True)
class LayerPlan:
    """What a layer should become: formats of weight and input (None = float), weight granularity."""

    weight: Format | None = None
    act: Format | None = None
    granularity: Granularity = field(default_factory=PerRow)


@dataclass(frozen=True)
class ActQuant:
    """A static per-tensor quantizer: values `round(x / scale)` on the grid of `fmt`."""

    fmt: Format
    scale: float


@dataclass(frozen=True)
class Kernel:
    """What a forward multiplies with: `weight` in the dtype of the sum, `gain` for each output afterwards.

    gain: None, a number, or one per output channel, in float32.
    """

    weight: Tensor
    gain: Tensor | float | None


class QLayer(nn.Module):
    """A Linear or Conv2d with optional quantized input and weight.

    weight, bias: the float parameters (bias is created as zeros where there was none). plan: the
    formats asked for. q: the quantized weight once a method has set it. act: the input quantizer
    once calibrated. in_scale: a per-input-channel factor applied to the input first, or None.
    """

    in_scale: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, plan: LayerPlan) -> None:
        super().__init__()
        self.op = "linear" if isinstance(layer, nn.Linear) else "conv2d"
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        bias = torch.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.detach().clone()
        self.bias = nn.Parameter(bias, requires_grad=False)
        if isinstance(layer, nn.Conv2d):
            if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
                raise ValueError(
                    f"padding {layer.padding!r} of mode {layer.padding_mode!r} cannot be quantized; accepted: zeros"
                )
            self.stride, self.padding = layer.stride, layer.padding
            self.dilation, self.groups = layer.dilation, layer.groups
        else:
            self.groups = 1
        self.plan = plan
        self.register_buffer("in_scale", None)
        self.q: QTensor | None = None
        self.act: ActQuant | None = None
        self._frozen: Kernel | None = None

    def set_weight(self, q: QTensor | None) -> None:
        """Use this quantized weight from now on (None: the float weight again)."""
        self.q = q
        self._frozen = None

    def set_act(self, act: ActQuant | None) -> None:
        """Use this input quantizer from now on (None: a float input)."""
        self.act = act
        self._frozen = None

    def scale_input(self, factor: Tensor) -> None:
        """Multiply input channel j by factor[j] and divide the weight's columns by it: the function stays."""
        shape = (1, -1) if self.op == "linear" else (1, -1, 1, 1)
        if self.groups != 1:
            raise ValueError("a grouped convolution has no common input factor")
        self.weight.data = self.weight.data / factor.reshape(shape)
        self.in_scale = factor.clone() if self.in_scale is None else self.in_scale * factor
        self._frozen = None

    def invalidate(self) -> None:
        """Forget what was decoded; call after changing `weight` in place."""
        self._frozen = None

    def effective_weight(self) -> Tensor:
        """The weight in use, in real units: dequantized, or the float one."""
        return self.weight if self.q is None else dequantize(self.q)

    def kernel(self) -> Kernel:
        """The decoded weight. Made once, until the weight or the input quantizer is set anew.

        Where a scale can be applied after the sum the weights are grid values; per-group scales
        are multiplied into them.
        """
        if self._frozen is None:
            act_scale = None if self.act is None else self.act.scale
            if self.q is None:
                self._frozen = Kernel(self.weight.data, act_scale)
            elif isinstance(self.q.granularity, PerGroup):
                weight = dequantize(self.q)
                self._frozen = Kernel(weight if self.act is None else weight.double(), act_scale)
            else:
                gain = self.q.scale[:, 0].double() * (1.0 if act_scale is None else act_scale)
                values = values_of(self.q)
                wide = self.act is not None and not self._fits_float32(values)
                self._frozen = Kernel((values.double() if wide else values).reshape(self.q.shape), gain.float())
        return self._frozen

    def _fits_float32(self, values: Tensor) -> bool:
        """Whether every partial sum is a whole number of units below 2^24."""
        assert self.q is not None and self.act is not None
        largest = float(values.double().abs().sum(dim=1).max()) / formats.unit(self.q.fmt)
        return largest * formats.int_max(self.act.fmt) <= 2**24

    def input_values(self, x: Tensor) -> Tensor:
        """What the multiplier sees: the input scaled and rounded to grid values (or the float input)."""
        if self.in_scale is not None:
            x = x * (self.in_scale if self.op == "linear" else self.in_scale[:, None, None])
        return x if self.act is None else round_to(x / self.act.scale, self.act.fmt)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The bare sum of products, (batch, out, ...) without bias."""
        if self.op == "linear":
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel()
        gain = kernel.gain
        y = self.product(self.input_values(x).to(kernel.weight.dtype), kernel.weight).float()
        if gain is not None:
            y = y * (gain if self.op == "linear" or not isinstance(gain, Tensor) else gain[:, None, None])
        return y + (self.bias if self.op == "linear" else self.bias[:, None, None])

    def real_input(self, x: Tensor) -> Tensor:
        """The input as the weight's columns meet it, in real units: scaled, and quantized if calibrated."""
        values = self.input_values(x)
        return values if self.act is None else values * self.act.scale

    def columns(self, x: Tensor) -> Tensor:
        """`real_input` as rows that meet the weight matrix: (groups, samples, columns)."""
        x = self.real_input(x)
        if self.op == "linear":
            return x.reshape(1, -1, x.shape[-1])
        patches = F.unfold(x, self.weight.shape[2:], self.dilation, self.padding, self.stride)  # type: ignore[arg-type]
        batch, _, positions = patches.shape
        patches = patches.reshape(batch, self.groups, -1, positions)
        return patches.permute(1, 0, 3, 2).reshape(self.groups, batch * positions, -1)

    def extra_repr(self) -> str:
        act = "float" if self.act is None else self.act.fmt
        weight = "float" if self.q is None else f"{self.q.fmt} per {self.q.granularity}"
        return f"{self.op}, {tuple(self.weight.shape)}, input {act}, weight {weight}"
