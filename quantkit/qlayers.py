"""`QLayer`: one wrapper for every layer with a weight matrix whose input and weight may be quantized,
and `Point`, a place without a weight where an activation is quantized.

The arithmetic is that of the hardware: the input is divided by its scale and rounded to grid
values, multiplied with the weights' grid values, and the sum is scaled once per output. The
sum is exact, and so independent of batch size, threads and machine: it is taken in float32
where the actual weights keep it below 2^24 units, in float64 otherwise (exact below 2^53, that
is, for all formats but e5 and e6 of 8 and 7 bits). Weights are decoded once, not in every forward.

With scales per group or block no common unit is left: values are multiplied by their scales before
the sum, which is taken in float64. Every product is exact in it (with minifloat scales: but for one
rounding of value times scale to float32), and so is the sum while the sum of magnitudes stays below
2^53 smallest units of its terms; beyond that it is right to 2^-53 of that sum for every term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwmodel import formats
from hwmodel.formats import Block, Format
from hwmodel.spec import Granularity, PerGroup, PerRow
from quantkit.bands import BANDS, Bands
from quantkit.errors import InputError
from quantkit.qtensor import BlockRule, QTensor, block_scale, dequantize, values_of
from quantkit.rounding import round_to

Op = Literal["linear", "conv1d", "conv2d", "conv_transpose2d", "embedding"]
Plain = nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding
_OPS: dict[type[nn.Module], Op] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.Embedding: "embedding",
}


def op_of(module: nn.Module) -> Op | None:
    """The operation of a module that `QLayer` can stand for; None for any other.

    A subclass with a `forward` of its own is another: what it computes around its weight is unknown.
    """
    for base, op in _OPS.items():
        if isinstance(module, base):
            return op if type(module).forward is base.forward else None
    return None


@dataclass(frozen=True)
class Shape:
    """A layer's operation, input and output channels (or features, or tokens), kernel (empty if none) and groups."""

    op: Op
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    groups: int


def shape_of(layer: Plain | QLayer) -> Shape:
    """The shape of a layer, quantized or not."""
    op = layer.op if isinstance(layer, QLayer) else op_of(layer)
    assert op is not None
    first, second, *kernel = layer.weight.shape
    groups = int(getattr(layer, "groups", 1))
    if op == "embedding":
        return Shape(op, first, second, (), 1)
    if op == "conv_transpose2d" and not isinstance(layer, QLayer):
        return Shape(op, first, second * groups, tuple(kernel), groups)
    return Shape(op, second * groups, first, tuple(kernel), groups)


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
class BlockAct:
    """A dynamic quantizer: every `fmt.size` neighbouring channels share a scale found from them at run time.

    rule: how, see `qtensor.block_scale`. base: what minifloat scales are multiplied by, fixed by calibration; None
    for e8m0. The last block is shorter where the size does not divide the channels.
    """

    fmt: Block
    rule: BlockRule = "even"
    base: float | None = None

    @property
    def scale(self) -> float:
        """What is left to multiply sums with: nothing, as blocks carry their scales into the sum."""
        return 1.0

    def values(self, x: Tensor, axis: int = -1) -> Tensor:
        """x quantized in blocks along `axis`, in real units, float32; infinities saturate, NaN stays NaN."""
        moved = x.movedim(axis, -1)
        channels = moved.shape[-1]
        blocks = F.pad(moved, (0, -channels % self.fmt.size)).unflatten(-1, (-1, self.fmt.size))
        scale = block_scale(blocks, self.fmt, self.rule, self.base).unsqueeze(-1)
        values = round_to(blocks / scale, self.fmt.elem).mul_(scale)
        return values.flatten(-2)[..., :channels].movedim(-1, axis)


@dataclass(frozen=True)
class Kernel:
    """What a forward multiplies with: `weight` in the dtype of the sum, `gain` for each output afterwards.

    gain: None, a number, or one per output channel, in float32.
    """

    weight: Tensor
    gain: Tensor | float | None


class QLayer(nn.Module):
    """A Linear, convolution or Embedding with optional quantized input and weight.

    weight: the float weight, with a row per output channel, (out, in) or (out, in / groups, *kernel), for a
    transposed convolution, too; (tokens, features) of an embedding, whose rows are looked up and not summed and
    whose input is never quantized. bias: created as zeros where there was none. plan: the formats asked for.
    channels_last: whether images are brought into, and leave in, the layout of memory that convolutions of few
    channels compute several times faster in; the values are the same but for float noise of sums that are not exact.
    q: the quantized weight once a method has set it. act: the input quantizer once calibrated. in_scale: a
    per-input-channel factor applied to the input first, or None.
    """

    in_scale: Tensor | None

    def __init__(self, layer: Plain, plan: LayerPlan) -> None:
        """Raises ValueError for padding other than zeros and for a layer of another kind."""
        super().__init__()
        op = op_of(layer)
        if op is None:
            raise ValueError(f"a {type(layer).__name__} cannot be quantized; accepted: {', '.join(_OPS.values())}")
        self.op: Op = op
        self.groups, self.channels_last = 1, False
        weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
        channels = weight.shape[1] if op == "embedding" else weight.shape[0]
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            if layer.padding_mode != "zeros":
                raise ValueError(f"padding mode {layer.padding_mode!r} cannot be quantized; accepted: zeros")
            self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
            self.padding = _padding(layer)
            self.output_padding = layer.output_padding
        if op == "conv_transpose2d":
            weight, channels = turned(weight, self.groups), weight.shape[1] * self.groups
        hollow = 0 in weight.stride()  # one number for all of them: a weight that is yet to be read takes no memory
        self.weight = nn.Parameter(weight if hollow else weight.clone(), requires_grad=False)
        bias = weight.new_zeros(channels) if bias is None else bias.detach().clone()
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.plan = plan
        self.register_buffer("in_scale", None)
        self.q: QTensor | Bands | None = None
        self.act: ActQuant | BlockAct | None = None
        self._frozen: Kernel | None = None

    @property
    def spatial(self) -> int:
        """Dimensions behind the channels: 2 of images, 1 of sequences, 0 where channels come last."""
        return self.weight.dim() - 2

    @property
    def axis(self) -> int:
        """The axis of the channels in this layer's input."""
        return -1 - self.spatial

    @property
    def in_channels(self) -> int:
        """Input channels, or features."""
        return self.weight.shape[1] * self.groups

    def per_channel(self, values: Tensor) -> Tensor:
        """(channels,) shaped to broadcast against this layer's input or output."""
        return values.reshape(-1, *(1,) * self.spatial)

    def set_weight(self, q: QTensor | Bands | None) -> None:
        """Use this quantized weight from now on (None: the float weight again)."""
        self.q = q
        self._frozen = None

    def set_act(self, act: ActQuant | BlockAct | None) -> None:
        """Use this input quantizer from now on (None: a float input)."""
        self.act = act
        self._frozen = None

    def scale_input(self, factor: Tensor) -> None:
        """Multiply input channel j by factor[j] and divide the weight's columns by it: the function stays."""
        if self.groups != 1:
            raise ValueError("a grouped convolution has no common input factor")
        self.weight.data = self.weight.data / self.per_channel(factor)
        self.in_scale = factor.clone() if self.in_scale is None else self.in_scale * factor
        self._frozen = None

    def invalidate(self) -> None:
        """Forget what was decoded; call after changing `weight` in place."""
        self._frozen = None

    @property
    def uniform(self) -> QTensor | None:
        """The quantized weight where it has one format, None where it is float; InputError where it is in bands."""
        if isinstance(self.q, Bands):
            raise InputError(f"weights in {BANDS} (step ptq161) have two formats; accepted here: weights of one")
        return self.q

    def effective_weight(self) -> Tensor:
        """The weight in use, in real units: dequantized, or the float one."""
        return self.weight if self.q is None else dequantize(self.q)

    def kernel(self) -> Kernel:
        """The decoded weight. Made once, until the weight or the input quantizer is set anew.

        Where a scale can be applied after the sum the weights are grid values; per-group scales
        are multiplied into them, those of an embedding and of bands.
        """
        if self._frozen is None:
            act_scale = None if self.act is None else self.act.scale
            if self.q is None:
                self._frozen = Kernel(self.weight.data, act_scale)
            elif isinstance(self.q, Bands) or isinstance(self.q.granularity, PerGroup) or self.op == "embedding":
                weight = dequantize(self.q)
                self._frozen = Kernel(weight if self.act is None else weight.double(), act_scale)
            else:
                gain = self.q.scale[:, 0].double() * (1.0 if act_scale is None else act_scale)
                values = values_of(self.q)
                wide = self.act is not None and not self._fits_float32(self.q, values)
                self._frozen = Kernel((values.double() if wide else values).reshape(self.q.shape), gain.float())
        return self._frozen

    def _fits_float32(self, q: QTensor, values: Tensor) -> bool:
        """Whether every partial sum is a whole number of units below 2^24."""
        assert self.act is not None
        if isinstance(self.act, BlockAct):
            return False
        largest = float(values.double().abs().sum(dim=1).max()) / formats.unit(q.fmt)
        return largest * formats.int_max(self.act.fmt) <= 2**24

    def input_values(self, x: Tensor) -> Tensor:
        """What the multiplier sees: grid values of the scaled input; real ones if in blocks, or if it stays float."""
        if self.in_scale is not None:
            x = x * self.per_channel(self.in_scale)
        return _values(x, self.act, self.axis)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The bare sum of products, (batch, out, ...), with `bias` only if it is given; an embedding heeds none."""
        if self.channels_last and self.op == "conv2d":
            x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        match self.op:
            case "linear":
                return F.linear(x, weight, bias)
            case "conv1d":
                return F.conv1d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
            case "conv2d":
                return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
            case "conv_transpose2d":
                options = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
                return F.conv_transpose2d(x, turned(weight, self.groups), bias, *options)  # type: ignore[arg-type]
            case "embedding":
                return F.embedding(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel()
        if self.op == "embedding":
            return self.product(x, kernel.weight) + self.bias
        gain = kernel.gain
        y = self._sum(self.input_values(x), kernel.weight)
        if gain is not None:
            y = y.mul_(self.per_channel(gain) if isinstance(gain, Tensor) else gain)
        return y.add_(self.per_channel(self.bias))

    def _sum(self, x: Tensor, weight: Tensor) -> Tensor:
        """`product` in the dtype of the weight, as float32."""
        if weight.dtype == torch.float64 and self.spatial == 2:  # few at a time: torch lays out all patches beforehand
            return torch.cat([self.product(part.double(), weight).float() for part in x.split(8)])
        return self.product(x.to(weight.dtype), weight).float()

    def real_input(self, x: Tensor) -> Tensor:
        """The input as the weight's columns meet it, in real units: scaled, and quantized if calibrated."""
        values = self.input_values(x)
        return values if self.act is None else values * self.act.scale

    def columns(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """`real_input` as rows that meet the weight matrix: (groups, samples, columns).

        A sample is an input of a linear layer or an output position of a convolution, numbered image by image.
        at: the numbers of those wanted, (samples,) int64; None for all. x: float32, with `at` also float16.
        """
        if at is not None and self.op == "linear":
            x = x.reshape(-1, x.shape[-1])[at].float()
        if at is not None and self.op in ("conv1d", "conv2d"):  # only what is wanted is quantized
            patches, padded = self._patches_at(x, at)
            patches = self.real_input(patches.float()).masked_fill(padded, 0.0)
            return patches.reshape(len(at), self.groups, -1).transpose(0, 1)
        x = self.real_input(x.float())
        if self.op == "linear":
            return x.reshape(1, -1, x.shape[-1])
        if self.op == "conv_transpose2d":
            patches = self._transposed_patches(x)
        else:
            image = x.unsqueeze(2) if self.op == "conv1d" else x
            patches = F.unfold(image, *self._window())
        batch, _, positions = patches.shape
        patches = patches.reshape(batch, self.groups, -1, positions)
        patches = patches.permute(1, 0, 3, 2).reshape(self.groups, batch * positions, -1)
        return patches if at is None else patches[:, at]

    def output_rows(self, y: Tensor, at: Tensor | None = None) -> Tensor:
        """An output of this layer, float32 or float16, in the order of `columns`: (groups, samples, rows), float32."""
        if self.spatial:
            y = y.flatten(2).transpose(1, 2)
        y = y.reshape(-1, self.groups, y.shape[-1] // self.groups)
        return (y if at is None else y[at]).float().transpose(0, 1)

    def positions(self, shape: torch.Size) -> int:
        """How many samples an input of this shape holds: how often it meets the weight matrix."""
        return math.prod(shape[:-1]) if self.op == "linear" else shape[0] * math.prod(self._output_size(shape[2:]))

    def _output_size(self, size: Sequence[int]) -> list[int]:
        """A convolution's outputs in each dimension behind the channels, for as many inputs."""
        settings = zip(size, self.weight.shape[2:], self.dilation, self.padding, self.stride, strict=True)
        if self.op == "conv_transpose2d":
            sizes = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, d, p, s in settings]
            return [n + extra for n, extra in zip(sizes, self.output_padding, strict=True)]
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in settings]

    def _window(self) -> tuple[tuple[int, ...], ...]:
        """Kernel, dilation, padding and stride in two dimensions."""
        settings = ((self.weight.shape[2:], 1), (self.dilation, 1), (self.padding, 0), (self.stride, 1))
        return tuple(_two(values, fill) for values, fill in settings)

    def _patches_at(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """What the output positions `at` of a convolution see, (samples, channels, *kernel), and where that is padding.

        The latter, (samples, 1, *kernel), holds values of the edge.
        """
        counts = _two(self._output_size(x.shape[2:]), 1)
        image = x.unsqueeze(2) if self.op == "conv1d" else x
        size, dilation, padding, stride = self._window()
        place = at % (counts[0] * counts[1])
        starts = (place // counts[1] * stride[0], place % counts[1] * stride[1])
        places = [
            start[:, None] + d * torch.arange(k) - p
            for start, d, k, p in zip(starts, dilation, size, padding, strict=True)
        ]
        down, along = (p.clamp(0, n - 1) for p, n in zip(places, image.shape[2:], strict=True))
        last = image.movedim(1, -1)[(at // (counts[0] * counts[1]))[:, None, None], down[:, :, None], along[:, None, :]]
        outside = (places[0] != down)[:, :, None] | (places[1] != along)[:, None, :]
        patches, outside = last.movedim(-1, 1), outside.unsqueeze(1)
        return (patches.squeeze(2), outside.squeeze(2)) if self.op == "conv1d" else (patches, outside)

    def _transposed_patches(self, x: Tensor) -> Tensor:
        """What each output of a transposed convolution sums, in the order of the weight's columns."""
        size = self.weight.shape[2:]
        stuffed = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], self.stride, strict=True)))
        stuffed[:, :, :: self.stride[0], :: self.stride[1]] = x
        edges: list[int] = []  # of the last dimension first, as F.pad has it
        for axis in (1, 0):
            reach = self.dilation[axis] * (size[axis] - 1) - int(self.padding[axis])
            edges += [reach, reach + int(self.output_padding[axis])]
        patches = F.unfold(F.pad(stuffed, edges), size, self.dilation)  # type: ignore[arg-type]
        batch, _, positions = patches.shape
        return patches.reshape(batch, -1, size.numel(), positions).flip(2).reshape(batch, -1, positions)

    def extra_repr(self) -> str:
        act = "float" if self.act is None else self.act.fmt
        weight = (
            "float"
            if self.q is None
            else BANDS
            if isinstance(self.q, Bands)
            else f"{self.q.fmt} per {self.q.granularity}"
        )
        return f"{self.op}, {tuple(self.weight.shape)}, input {act}, weight {weight}"


def turned(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight (in, out / groups, *kernel) as (out, in / groups, *kernel), or back."""
    split = weight.reshape(groups, -1, *weight.shape[1:])
    return split.transpose(1, 2).reshape(-1, split.shape[1], *weight.shape[2:])


def _two(values: Sequence[int], fill: int) -> tuple[int, ...]:
    return tuple(values) if len(values) == 2 else (fill, *values)


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d) -> tuple[int, ...]:
    if not isinstance(layer.padding, str):
        return tuple(int(p) for p in layer.padding)
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(r % 2 for r in reach):
        raise ValueError("padding 'same' with an even kernel pads one side more; pad explicitly before the layer")
    return tuple(r // 2 for r in reach)


def _values(x: Tensor, act: ActQuant | BlockAct | None, axis: int) -> Tensor:
    match act:
        case None:
            return x
        case ActQuant():
            return round_to(x / act.scale, act.fmt, inplace=True)
        case BlockAct():
            return act.values(x, axis)


class Point(nn.Module):
    """A place where an activation is quantized: the identity until `set_act`.

    plan: the format asked for, in `plan.act`. grid: whether what comes out are grid values, for a product that is
    scaled afterwards, or real ones. axis: along which blocks lie.
    """

    in_scale = None

    def __init__(self, *, grid: bool = False, axis: int = -1) -> None:
        super().__init__()
        self.plan = LayerPlan()
        self.grid, self.axis = grid, axis
        self.act: ActQuant | BlockAct | None = None

    def set_act(self, act: ActQuant | BlockAct | None) -> None:
        """Use this quantizer from now on (None: float)."""
        self.act = act

    def input_values(self, x: Tensor) -> Tensor:
        """x in grid values, or x itself without a quantizer."""
        return _values(x, self.act, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        values = self.input_values(x)
        return values if self.act is None or self.grid else values * self.act.scale

    def extra_repr(self) -> str:
        return "float" if self.act is None else str(self.act.fmt)
