"""PTQ1.61: a fifth of the columns in 4 bits, the rest in one bit with scales learned block by block.

"PTQ1.61: Push the Real Limit of Extremely Low-Bit Post-Training Quantization Methods for Large Language Models", ACL
2025, arXiv 2502.13179; where paper and released code (zjq0455/PTQ1.61, 4561118) disagree, the code. With S the columns
whose inputs are largest in the float network, w a weight (n, m), low outside S and high in S,

    low  = (r1 r2^T) o (s sign(w - mu) + mu)      mu_j = mean, s_j = mean magnitude of row j's nonzero w outside S
    high = RTN4(w)                                asymmetric, by rows; r1 = r2 = 1 at first

s (n), r1 (n) and r2 (m) are learned, a block at a time, by AdamW. F being the block and X, Xq its inputs in the float
and in the quantized network,

    Y_full = F(X, w),  Y_fq = F(Xq, w),  Y_q = F(Xq, low + high)
    loss   = sum over Y in {Y_full, Y_fq} of MSE(Y, Y_q) - log |mean cos(Y, Y_q)|

The mean is over samples and tokens, the cosine over features (of images: channels). A block is what a list of modules
holds at one index, a decoder layer for instance; without such a list it is the whole network, to its last layer.

Preprocessing (`repair`) does it twice: on the network quantized once, low-rank additions to the weights are trained,
on the next token of the calibration text (where there are no tokens: on the float network's outputs, which the paper
does not have), and merged; the result is what the second pass takes for the float network.

Differs from the released code: sign(0) = 1; of columns of equal score only as many are taken as there is room for;
the learning rate of s is relative to its mean, and rates are at the upper end of the paper's search, for a quarter of
its steps; all is in float32, stored vectors in bfloat16; a block that training leaves with a larger loss than it began
with keeps r1 = r2 = 1 and its first s; the repair has no dropout; a convolution's columns are those of its unfolded
weight. Batches are cut once and stay together. Activations that are planned to be quantized are, with gradients
straight through.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hwmodel.formats import BINARY
from hwmodel.spec import PerRow
from quantkit.bands import Bands, dense, half, nearest4, signed
from quantkit.errors import InputError
from quantkit.graph_blocks import Block, Flow, Split, blocks_of, graph_of
from quantkit.model import Calib, Model, float_twin, unquantized
from quantkit.observers import collect, spread
from quantkit.qlayers import Point, QLayer
from quantkit.training import Straight, cosine, train

CHANGES = frozenset({"weights", "bands"})
Score = Literal["max", "mean"]
Range = Literal["row", "salient"]


def mask(score: Tensor, ratio: float, ties: Tensor | None = None) -> Tensor:
    """The salient columns, bool (m,): the int(ratio m) + 1 of largest score. None for ratio 0, all for 1.

    ties: a second score, (m,), which orders columns of equal first one; then the earlier column.

    >>> mask(torch.tensor([3.0, 1.0, 4.0, 1.5, 5.0]), 0.2).tolist()
    [False, False, True, False, True]
    """
    order = torch.arange(len(score)) if ties is None else ties.argsort(descending=True, stable=True)
    order = order[score[order].argsort(descending=True, stable=True)]
    count = {0.0: 0, 1.0: len(score)}.get(ratio, int(ratio * len(score)) + 1)
    return torch.zeros(len(score), dtype=torch.bool).index_fill_(0, order[:count], True)


def start(w: Tensor, salient: Tensor, over: Range = "row") -> Bands:
    """A weight matrix (n, m) with r1 = r2 = 1, so that a = s and b = mu, both still in float32."""
    low = w[:, ~salient]
    count = (low != 0).sum(dim=1, keepdim=True).clamp_min(1)
    mu, s = low.sum(dim=1, keepdim=True) / count, low.abs().sum(dim=1, keepdim=True) / count
    codes, scale, zero = nearest4(w[:, salient], w if over == "row" else None)
    return Bands(salient, codes, scale, zero, low >= mu, s, mu, torch.ones(w.shape[1]), tuple(w.shape))


class Inputs:
    """Largest and mean magnitude of what meets each column of a layer's weight, (m,), zeros before the first batch.

    Of a grouped convolution the largest of the groups. Of images at most `limit` places of each batch are looked at.
    """

    def __init__(self, columns: int, limit: int = 8192) -> None:
        self.limit, self.count = limit, 0
        self.largest, self.total = torch.zeros(columns), torch.zeros(columns)

    def __call__(self, layer: QLayer, x: Tensor) -> None:
        at = spread(layer.positions(x.shape), self.limit) if layer.spatial else None
        rows = layer.columns(x, at).abs()
        self.largest = torch.maximum(self.largest, rows.amax(dim=(0, 1)))
        self.total = self.total + rows.sum(dim=1).amax(dim=0)
        self.count += rows.shape[1]

    def mask(self, score: Score, ratio: float) -> Tensor:
        """The salient columns; the other score decides between equals, such as inputs that are clipped."""
        mean = self.total / max(1, self.count)
        return mask(self.largest, ratio, mean) if score == "max" else mask(mean, ratio, self.largest)


class Scaled(nn.Module):
    """A QLayer whose s, r1 and r2 are learned; signs, mu and the salient columns stay."""

    def __init__(self, layer: QLayer, first: Bands) -> None:
        super().__init__()
        self.layer, self.first = layer, first
        high = torch.zeros(len(first.signs), len(first.salient))
        high[:, first.salient] = dense(first).reshape(high.shape)[:, first.salient]
        sigma = torch.zeros_like(high)
        sigma[:, ~first.salient] = signed(first.signs)
        self.high, self.sigma, self.mu = high, sigma, first.b * ~first.salient
        self.s = nn.Parameter(first.a.clone())
        self.r1, self.r2 = nn.Parameter(torch.ones_like(first.a)), nn.Parameter(torch.ones_like(first.c))

    def weight(self) -> Tensor:
        """w as learned so far, (n, m)."""
        return self.r1 * self.r2 * (self.s * self.sigma + self.mu) + self.high

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.layer, x, self.weight())

    @torch.no_grad()
    def bands(self) -> Bands:
        """What is stored: the scales folded and rounded to bfloat16."""
        c = torch.where(self.first.salient, 1.0, self.r2)
        vectors = {"a": half(self.r1 * self.s), "b": half(self.r1 * self.first.b), "c": half(c)}
        return replace(self.first, **vectors, shape=tuple(self.layer.weight.shape))


def linear(layer: QLayer, x: Tensor, matrix: Tensor) -> Tensor:
    """The layer with another weight matrix (n, m); gradients pass the rounding of its input."""
    plain = x if layer.in_scale is None else x * layer.per_channel(layer.in_scale)
    seen = plain if layer.act is None else Straight.apply(plain, layer.real_input(x))
    return layer.product(seen, matrix.reshape(layer.weight.shape)) + layer.per_channel(layer.bias)


class LowRank(nn.Module):
    """A quantized layer with `gain * up @ down` added to its weight; up (n, rank) starts at zero."""

    def __init__(self, layer: QLayer, rank: int, gain: float, generator: torch.Generator) -> None:
        super().__init__()
        n, m = layer.weight.flatten(1).shape
        rank, bound = min(rank, n, m), m**-0.5
        self.layer, self.gain = layer, gain
        self.fixed = layer.effective_weight().flatten(1)
        self.down = nn.Parameter((2 * torch.rand(rank, m, generator=generator) - 1) * bound)
        self.up = nn.Parameter(torch.zeros(n, rank))

    def weight(self) -> Tensor:
        """The merged weight matrix."""
        return self.fixed + self.gain * self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.layer, x, self.weight())


def apply(
    model: Model,
    calib: Calib,
    *,
    ratio: float = 0.2,
    score: Score = "max",
    high: Range = "row",
    steps: int = 600,
    batch: int | None = None,
    lr: float = 1e-2,
    lr_s: float = 0.01,
    angular: bool = True,
    blocks: Split = "auto",
    repair: int = 0,
    rank: int = 64,
    lr_repair: float = 1e-4,
    spare: str = "*o_proj",
) -> dict[str, float]:
    """Set the weights of the layers planned to be `binary` to `Bands`.

    ratio: of salient columns. score: largest or mean magnitude of a column's input. high: whether the 4-bit range of
    a row is that of all its weights, as in the released code, or of the salient ones. steps: of AdamW for each block,
    `batch` samples each (None: 4 texts, 64 of other inputs); 0 for no learning. lr: of r1 and r2. lr_s: of s,
    relative to the mean of s. angular: whether the loss has its second term. blocks: "network" for one block; "layer"
    cuts wherever a single value passes from one layer to the next. repair: steps of preprocessing, AdamW with
    `lr_repair` along a cosine, of additions of this `rank` to all layers but those whose name matches `spare`.

    Returns the number of blocks, the mean of their losses before and after, how many training made worse and were
    kept as they began, the fraction of salient columns, bits per weight, and the repair's loss before and after.
    """
    planned = unquantized(model)
    wanted = [name for name in model.qlayers() if name in planned]
    batch = batch if batch is not None else 64 if calib.inputs.is_floating_point() else 4
    _check(model, wanted)
    if not 0 <= ratio <= 1 or min(steps, repair) < 0 or min(batch, rank) < 1 or min(lr, lr_s, lr_repair) <= 0:
        raise InputError(
            "step 'ptq161': ratio from 0 to 1, steps and repair 0 or more, batch and rank 1 or more, learning rates"
            " above 0 are accepted"
        )
    if not wanted:
        return {"blocks": 0.0}
    options = _Options(ratio, score, high, steps, batch, lr, lr_s, angular, blocks)
    report = _pass(model, calib, wanted, options)
    if repair:
        before, after = _repair(model, calib, wanted, repair, rank, lr_repair, spare, batch)
        report = {**_pass(model, calib, wanted, options), "repair_before": before, "repair_after": after}
    return report


def _check(model: Model, wanted: list[str]) -> None:
    layers = model.qlayers()
    for name in wanted:
        layer = layers[name]
        if layer.op == "embedding":
            raise InputError(f"step 'ptq161': {name!r} is an embedding; plan it as float")
        if layer.plan.weight != BINARY or layer.plan.granularity != PerRow():
            raise InputError(
                f"step 'ptq161': layer {name!r} is to be {layer.plan.weight} per {layer.plan.granularity};"
                " accepted: binary per row, which becomes bands of 4 bits and 1 bit"
            )


@dataclass(frozen=True)
class _Options:
    ratio: float
    score: Score
    high: Range
    steps: int
    batch: int
    lr: float
    lr_s: float
    angular: bool
    blocks: Split


def _pass(model: Model, calib: Calib, wanted: list[str], o: _Options) -> dict[str, float]:
    """Quantize the wanted layers of a model in which they are float."""
    layers = model.qlayers()
    for name in wanted:
        layers[name].set_weight(None)
    twin = float_twin(model)
    seen = {name: Inputs(layers[name].weight[0].numel()) for name in wanted}
    collect(twin, calib, seen)
    student, scaled = model.copy(), {}
    for name, layer in student.qlayers().items():
        if name in seen:
            w = layer.weight.detach().flatten(1)
            scaled[name] = Scaled(layer, start(w, seen[name].mask(o.score, o.ratio), o.high))
            student.replace(name, scaled[name])
    _straight(student)
    if isinstance(model.module, fx.GraphModule) and not isinstance(model.module.graph.output_node().args[0], fx.Node):
        raise InputError("step 'ptq161': the network has several outputs; accepted: one tensor")
    graph, batches = graph_of(model.module), calib.inputs.split(o.batch)
    flows = {k: Flow(graph, m.module, batches) for k, m in (("X", twin), ("Xq", model), ("Yq", student))}
    report = {"blocks": 0.0, "loss_before": 0.0, "loss_after": 0.0, "kept": 0.0}
    for block in blocks_of(graph, wanted, o.blocks):
        parts = [scaled[name] for name in block.names]
        before, after = _learn(flows, block, parts, o, calib.generator) if block.nodes else (0.0, 0.0)
        for name, part in zip(block.names, parts, strict=True):
            layers[name].set_weight(part.bands())
        flows["X"].advance(block.nodes)
        flows["Xq"].advance(block.nodes)
        report["blocks"] += 1
        report["kept"] += after > before
        report["loss_before"] += before
        report["loss_after"] += min(before, after)
    for key in ("loss_before", "loss_after"):
        report[key] /= report["blocks"]
    columns, weights = sum(len(p.first.salient) for p in scaled.values()), sum(layers[n].weight.numel() for n in wanted)
    report["salient"] = sum(int(p.first.salient.sum()) for p in scaled.values()) / columns
    report["bits_per_weight"] = sum(p.first.bits for p in scaled.values()) / weights
    return report


def _learn(
    flows: Mapping[str, Flow], block: Block, parts: list[Scaled], o: _Options, generator: torch.Generator
) -> tuple[float, float]:
    """Train the scales of a block; its loss before and after. Where that rose, or is no number, they are put back."""
    flows["X"].advance(block.before)
    flows["Xq"].advance(block.before)
    full = flows["X"].outputs(block)
    fq = flows["X"].outputs(block, flows["Xq"].values)
    count = len(full)

    def loss(i: int) -> Tensor:
        y = flows["Yq"].output(block, flows["Xq"].values[i])
        return objective(y, full[i], o.angular) + objective(y, fq[i], o.angular)

    def score() -> float:
        with torch.no_grad():
            return sum(float(loss(i)) for i in range(count)) / count

    before = score()
    if not o.steps:
        return before, before
    first = [[p.detach().clone() for p in part.parameters(recurse=False)] for part in parts]
    groups: list[dict[str, Any]] = [{"params": [p for part in parts for p in (part.r1, part.r2)], "lr": o.lr}]
    groups += [{"params": [p.s], "lr": o.lr_s * rate} for p in parts if (rate := float(p.s.detach().mean())) > 0]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    with torch.enable_grad():
        some: dict[str, Any] = {"samples": count, "batch": 1, "generator": generator}
        train(lambda chosen: loss(int(chosen)), optimizer, range(o.steps), total=o.steps, **some)
    after = score()
    if not after <= before:
        for part, values in zip(parts, first, strict=True):
            for p, value in zip(part.parameters(recurse=False), values, strict=True):
                p.data = value
    return before, after if math.isfinite(after) else math.inf


def objective(y: Tensor, target: Tensor, angular: bool = True) -> Tensor:
    """Mean squared error less the logarithm of the mean cosine's magnitude; outputs (batch, ..., features).

    Of images (batch, channels, height, width) the features are the channels.
    """
    error = F.mse_loss(y, target)
    if not angular:
        return error
    c = F.cosine_similarity(y, target, dim=1 if y.dim() == 4 else -1).mean()
    return error - c.abs().clamp_min(1e-12).log()


def _straight(student: Model) -> None:
    """Let gradients pass the rounding of activations that no layer owns."""

    def open(point: Point) -> Callable[[Tensor], Tensor]:
        act = point.act

        def values(x: Tensor) -> Tensor:
            if act is None:
                return x
            rounded: Tensor = Straight.apply(x / act.scale, Point.input_values(point, x))
            return rounded

        return values

    for point in student.points().values():
        point.input_values = open(point)  # type: ignore[method-assign, assignment]


def _repair(
    model: Model, calib: Calib, wanted: list[str], steps: int, rank: int, lr: float, spare: str, batch: int
) -> tuple[float, float]:
    """Train low-rank additions to the quantized weights and make the merged weights the float ones; the losses."""
    student, teacher = model.copy(), float_twin(model)
    added: dict[str, LowRank] = {}
    for name, layer in student.qlayers().items():
        if name in wanted and not fnmatch.fnmatchcase(name, spare):
            added[name] = LowRank(layer, rank, 16 / 64, calib.generator)
            student.replace(name, added[name])
    if not added:
        raise InputError(f"step 'ptq161': spare={spare!r} matches every layer; nothing is left to repair")
    _straight(student)
    tokens = not calib.inputs.is_floating_point()

    def loss(chosen: Tensor) -> Tensor:
        x = calib.inputs[chosen]
        y = student.module(x)
        if tokens and y.dim() == 3:
            return F.cross_entropy(y[:, :-1].transpose(1, 2), x[:, 1:])
        with torch.no_grad():
            target = teacher.module(x)
        return F.mse_loss(y, target)

    def score() -> float:
        with torch.no_grad():
            some = torch.arange(len(calib.inputs)).split(batch)[:16]
            return sum(float(loss(chosen)) for chosen in some) / len(some)

    before = score()
    trained = [p for part in added.values() for p in (part.up, part.down)]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)
    with torch.enable_grad():
        options: dict[str, Any] = {"samples": len(calib.inputs), "batch": batch, "generator": calib.generator}
        train(loss, optimizer, range(steps), total=steps, schedule=cosine(), **options)
    after = score()
    for name, layer in model.qlayers().items():
        if name in wanted:
            with torch.no_grad():
                merged = added[name].weight() if name in added else layer.effective_weight()
            layer.weight.data = merged.reshape(layer.weight.shape).clone()
    return before, after
