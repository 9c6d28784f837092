"""Tequila: ternary weights trained through the rounding, their dead ones put to use as a bias.

"Tequila: Trapping-free Ternary Quantization for Large Language Models", ICLR 2026, arXiv 2509.23809, in the form of
the authors' technical report (arXiv 2602.21233, section 2.2.1). A layer's weight w is, with a and D of its group, anew
in every step,

    w^ = a t,  t = sign(w) where |w| >= D, else 0         AbsMean: a = mean |w|, D = a / 2
                                                          TWN: D = 0.75 mean |w|, a = mean |w| of what is live
    y_j = sum_i w^_ji x_i + b_j + C_j,  C_j = sum of the dead w_ji (t_ji = 0) m_i, over all groups of row j

with m_i the mean of input i, a running mean over the batches that are trained on. The gradient of w^ goes to w
unchanged (straight through), and a dead weight has that of C_j besides. C depends on no input, so that in the end it is
added to b and what is left is an ordinary ternary layer, `a t` and a bias. The outputs are those of the trained network
up to the float error of the sum of products.

The dead zone may be that of any quantizer, and `reactivate=0` leaves just that as a baseline in the same loop:
"absmean" (BitNet b1.58, arXiv 2402.17764), "absmedian", "twn" (Li et al., arXiv 1605.04711) and "lsq" (Esser et al.,
arXiv 1902.08153: a learned, D = a / 2, no gradient of w outside [-a, a]; its gradient scale is left out, as Adam
divides by it).

The constant is one of three; all are in the end a bias.

    constant="lambda"   C_j = lambda sum of the dead w_ji                the paper's, lambda = 1e-3
    constant="mean"     C_j = sum of the dead w_ji m_i                   the default
    constant="error"    C_j = sum of all (w_ji - w^_ji) m_i

"mean" gives every dead weight the lambda with which it misses nothing on average, where the paper's stands for the sign
of an input that is not looked at; its gradient is m_i of the sum that lambda is of in the paper. "error" does so for
live weights, too, and is the constant of least squared error: y_j = sum w^_ji (x_i - m_i) + w_ji m_i. Through it w has
the gradient of the straight-through estimator and no other. It is bias correction (arXiv 1906.04721) inside the loop,
and no longer a matter of the dead zone, which is why it is not the default. After 150 steps of stories260k the
perplexity of "lambda" is 0.999 of TWN's, that of "mean" 0.978 and of "error" 0.927; bias correction behind the training
instead of inside of it makes it 1.86 (3 seeds, reports/language/tequila_means.csv). With the paper's constant the
method is level with its quantizer alone; with "mean" it is ahead of AbsMean, TWN and LSQ with every seed.

Differs from the paper: the constant, as above; the quantizer is TWN's unless "absmean", the paper's, is asked for:
trained with it two language models lost less, with C and without; C itself changed little
(reports/language/tequila.csv, tequila_arithmetic_short). By default the float network's outputs are distilled instead
of predicting the next token (`distill`), learning rates are relative to the size of what they change, and biases,
embeddings and normalizations stay unless `biases` and `others` ask for them. Embeddings are ternary without C, as what
they sum is one row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwmodel.formats import levels
from hwmodel.spec import Granularity
from quantkit.errors import InputError
from quantkit.losses import loss_for
from quantkit.model import Calib, Model, float_twin, unquantized
from quantkit.policy import Policy
from quantkit.qlayers import QLayer
from quantkit.qtensor import expand_scale, from_values, grouped, scale_format
from quantkit.training import Straight, cosine, rounded, train

CHANGES = frozenset({"weights", "bias", "trained"})
Quantizer = Literal["absmean", "absmedian", "twn", "lsq"]
Constant = Literal["lambda", "mean", "error"]
RATE = 0.05
"""Weight of a batch in the running mean of a layer's inputs."""
TERNARY = (-1.0, 0.0, 1.0)


def ternary(w: Tensor, granularity: Granularity, quantizer: Quantizer = "absmean") -> tuple[Tensor, Tensor]:
    """(t, a) of a matrix (rows, columns): t like w, a like `QTensor.scale`, 0 where the group is all zero.

    "lsq" gives the start of its learned scale, 2 mean |w|, and the t of that.

    >>> from hwmodel.spec import PerRow
    >>> t, a = ternary(torch.tensor([[0.5, -1.0, 0.125, 0.375]]), PerRow())
    >>> t.tolist(), a.tolist()
    ([[1.0, -1.0, 0.0, 1.0]], [[0.5]])
    """
    parts = [_ternary(part, quantizer) for part in grouped(w, granularity)]
    return torch.cat([t.reshape(len(w), -1) for t, _ in parts], dim=1), torch.cat([a for _, a in parts], dim=1)


def _ternary(g: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """(t, a) of elements (rows, groups, size): t like them, a (rows, groups)."""
    size = g.abs()
    mean = size.mean(-1)
    match quantizer:
        case "absmean":
            a, threshold = mean, mean / 2
        case "absmedian":
            a = size.median(-1).values
            threshold = a / 2
        case "twn":
            threshold = 0.75 * mean
            live = size >= threshold.unsqueeze(-1)
            a = (size * live).sum(-1) / live.sum(-1)
        case "lsq":
            a, threshold = 2 * mean, mean
    return g.sign() * (size >= threshold.unsqueeze(-1)), a


class _Learned(torch.autograd.Function):
    """t s, with the gradients that LSQ gives w and s; t the values of w / s in {-1, 0, 1}, s > 0 like w."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, s: Tensor, t: Tensor) -> Tensor:
        inside = w.abs() <= s
        ctx.save_for_backward(inside, torch.where(inside, t - w / s, t))
        return t * s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        inside, slope = ctx.saved_tensors
        return grad * inside, grad * slope, None


class Trainee(nn.Module):
    """A QLayer in training; takes its place in a copy of the network.

    w: the latent weight matrix (rows, columns), None of a layer whose quantized weight stays. a: the learned scales of
    "lsq". reactivate: lambda, 0 for no constant of any kind. mean: of the inputs, (1, channels, ...) with the positions
    that a convolution slides over; None until there has been an input.
    """

    def __init__(self, layer: QLayer, quantizer: Quantizer, reactivate: float, constant: Constant = "mean") -> None:
        super().__init__()
        self.layer, self.quantizer, self.constant = layer, quantizer, constant
        self.mean: Tensor | None = None
        self.reactivate = 0.0 if layer.op == "embedding" else reactivate
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.w: nn.Parameter | None = None
        self.a: nn.Parameter | None = None
        if layer.q is None and layer.plan.weight is not None:
            self.w = nn.Parameter(layer.weight.detach().flatten(1).clone())
            if quantizer == "lsq":
                self.a = nn.Parameter(ternary(self.w.detach(), layer.plan.granularity, "lsq")[1])

    def codes(self) -> tuple[Tensor, Tensor]:
        """(t, a) of the latent weights as they are; no gradient goes through t."""
        assert self.w is not None
        w = self.w.detach()
        if self.a is None:
            return ternary(w, self.layer.plan.granularity, self.quantizer)
        a = self.a.abs().clamp_min(torch.finfo(torch.float32).tiny)
        return w.sign() * (w.abs() >= expand_scale(a.detach(), w.shape[1], self.layer.plan.granularity) / 2), a

    def matrix_and_bias(self) -> tuple[Tensor, Tensor]:
        """w^ in real units (rows, columns) and b + C, as trained."""
        if self.w is None:
            return self.layer.effective_weight().flatten(1), self.bias
        t, a = self.codes()
        s = expand_scale(a, t.shape[1], self.layer.plan.granularity)
        matrix: Tensor = Straight.apply(self.w, t * s) if self.a is None else _Learned.apply(self.w, s.expand_as(t), t)
        if self.reactivate == 0:
            return matrix, self.bias
        if self.constant == "lambda":
            return matrix, self.bias + self.reactivate * (self.w * (t == 0)).sum(dim=1)
        if self.mean is None:
            return matrix, self.bias
        missing = self.w - matrix if self.constant == "error" else self.w * (t == 0)
        y = self.layer.product(self.mean, missing.reshape(self.layer.weight.shape))
        return matrix, self.bias + y.flatten(2).mean(dim=2)[0] if self.layer.spatial else self.bias + y[0]

    @torch.no_grad()
    def observe(self, x: Tensor, learning: bool) -> None:
        """Start the mean of inputs, or move it while the layer is learning."""
        if self.constant == "lambda" or self.reactivate == 0 or (self.mean is not None and not learning):
            return
        now = x.reshape(-1, *x.shape[-1 - self.layer.spatial :]).mean(dim=0, keepdim=True)
        self.mean = now if self.mean is None else self.mean + RATE * (now - self.mean)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if layer.op == "embedding":
            matrix, bias = self.matrix_and_bias()
            return layer.product(x, matrix.reshape(layer.weight.shape)) + bias
        if layer.in_scale is not None:
            x = x * layer.per_channel(layer.in_scale)
        if layer.act is not None:
            x = rounded(layer.act, layer.axis, x) * layer.act.scale
        self.observe(x, learning=torch.is_grad_enabled())
        matrix, bias = self.matrix_and_bias()
        weight = matrix.reshape(layer.weight.shape)
        return layer.product(x, weight) + layer.per_channel(bias)

    @torch.no_grad()
    def store(self, layer: QLayer) -> None:
        """Make `layer` what has been learned: ternary codes with their scales, and C in the bias."""
        layer.bias.data = self.matrix_and_bias()[1].clone()
        if self.w is not None:
            fmt = layer.plan.weight
            assert fmt is not None
            t, a = self.codes()
            scale = torch.where(a > 0, a, torch.ones_like(a)).clamp_min(torch.finfo(torch.float32).tiny)
            layer.set_weight(from_values(t, scale, fmt, layer.plan.granularity, tuple(layer.weight.shape)))


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(outputs, float outputs, inputs) -> the mean over the batch."""


def answering(ids: Tensor, prompt_end: int, answer_end: int | None = None) -> Tensor:
    """Where a token of an answer is predicted, bool like ids (batch, tokens): from `prompt_end` on, to `answer_end`.

    >>> answering(torch.tensor([[5, 9, 7, 8, 1, 1]]), 9, 1).long().tolist()
    [[0, 1, 1, 1, 0, 0]]
    """
    begun = (ids == prompt_end).cumsum(dim=1) > 0
    return begun if answer_end is None else begun & ((ids == answer_end).cumsum(dim=1) == 0)


def _loss(model: Model, example: Tensor, inputs: Tensor, distill: float, ends: tuple[int | None, int | None]) -> Loss:
    """What is minimized; `example` are float outputs on some inputs, `ends` the tokens of `answering`."""
    tokens = not inputs.is_floating_point() and example.dim() == 3
    prompt_end, answer_end = ends
    if (answer_end is not None and prompt_end is None) or (prompt_end is not None and not tokens):
        raise InputError("step 'tequila': prompt_end is for language models, answer_end for prompts that have an end")
    if prompt_end is not None and not answering(inputs, prompt_end, answer_end).any():
        raise InputError(f"step 'tequila': no input has the token {prompt_end} that ends a prompt")
    if distill != 1 and not tokens:
        raise InputError(f"step 'tequila': distill={distill} predicts the next token, which only a language model does")
    if tokens:

        def language(y: Tensor, t: Tensor, ids: Tensor) -> Tensor:
            total = y.new_zeros(())
            where = None if prompt_end is None else answering(ids, prompt_end, answer_end)
            if distill > 0:
                log_p, log_q = (F.log_softmax(x if where is None else x[where], dim=-1) for x in (t, y))
                total = total + distill * (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
            if distill < 1:
                each = F.cross_entropy(y[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
                total = total + (1 - distill) * (each if where is None else each[where[:, :-1]]).mean()
            return total

        return language
    of_rows = loss_for(model.module.head if isinstance(model.module, Policy) else None, _rows(example))
    return lambda y, t, _: of_rows(_rows(y), _rows(t)).mean()


def _rows(y: Tensor) -> Tensor:
    """Outputs as (samples, features): of a sequence every position, of an image all of it."""
    return y.flatten(0, 1) if y.dim() == 3 else y.flatten(1)


def apply(
    model: Model,
    calib: Calib,
    *,
    steps: int = 1000,
    batch: int = 64,
    lr: float = 0.05,
    reactivate: float = 1e-3,
    constant: Constant = "mean",
    quantizer: Quantizer = "twn",
    distill: float = 1.0,
    prompt_end: int | None = None,
    answer_end: int | None = None,
    biases: bool = False,
    others: bool = False,
    rounds: int = 4,
    states: int = 4096,
) -> dict[str, float]:
    """Train the layers planned to be ternary, then store codes and biases.

    steps: of Adam, `batch` samples each. lr: relative to the mean magnitude of the weight, and for a bias to that of
    the sum of a row; warmed up over 5 % of the run, then along a cosine to zero. reactivate: lambda, 0 for the
    baselines, which have no C. constant: what C is; lambda is a factor in the paper's alone. distill: 1 for the float
    network's outputs (of a policy: its actions, `quantkit.losses`; of a language model: KL of the next token), 0 for
    the next token of the calibration text itself, in between for both. biases: train those of the layers, too. others:
    train what has no ternary weight, too: layers left in float, normalizations. rounds: with `calib.visit`, how often
    the policy acts to find `states` more states to be trained on.

    Returns the loss on the first four batches of samples before and after, the fraction of dead weights before and
    after, that of weights whose code changed, and the root mean square of C over that of the layers' outputs.
    """
    wanted = unquantized(model)
    for name, layer in model.qlayers().items():
        fmt = layer.plan.weight
        if name in wanted and fmt is not None and tuple(levels(fmt)) != TERNARY:
            raise InputError(f"step 'tequila': layer {name!r} is to be {fmt}; accepted: ternary, int2n")
        if name in wanted and scale_format(layer.plan.granularity) is not None:
            raise InputError(
                f"step 'tequila': layer {name!r} has scales in a format; accepted: tensor, row, group<size>"
            )
    if quantizer not in get_args(Quantizer):
        raise InputError(f"step 'tequila': quantizer={quantizer!r}; accepted: {', '.join(get_args(Quantizer))}")
    if constant not in get_args(Constant):
        raise InputError(f"step 'tequila': constant={constant!r}; accepted: {', '.join(get_args(Constant))}")
    if min(steps, batch, rounds, states) < 1 or lr <= 0 or reactivate < 0 or not 0 <= distill <= 1:
        raise InputError(
            "step 'tequila': steps, batch, rounds and states must be 1 or more, lr above 0, reactivate 0 or more and"
            " distill from 0 to 1"
        )
    if not wanted:
        return {"loss_before": 0.0, "loss_after": 0.0}
    with torch.no_grad():
        teacher = float_twin(model)
        first = calib.inputs[: 4 * batch]
        example = torch.cat([teacher.module(x) for x in first.split(batch)])
        loss = _loss(model, example, calib.inputs, distill, (prompt_end, answer_end))
    student, trainees = _student(model, quantizer, reactivate, constant)
    start = {name: t.codes()[0] for name, t in trainees.items() if t.w is not None}

    def score() -> float:
        with torch.no_grad():
            parts = [float(loss(student.module(x), teacher.module(x), x)) * len(x) for x in first.split(batch)]
        return sum(parts) / len(first)

    before = score()
    pool = calib.inputs

    def on(chosen: Tensor) -> Tensor:
        x = pool[chosen]
        with torch.no_grad():
            target = teacher.module(x) if distill > 0 else x
        return loss(student.module(x), target, x)

    optimizer = torch.optim.Adam(_rates(student, trainees, lr, biases, others))
    spans = rounds if calib.visit is not None else 1
    for number in range(spans):
        if calib.visit is not None:
            pool = torch.cat([pool, calib.visit(_merged(model, student, trainees), states, number + 1).states])
        span = range(steps * number // spans, steps * (number + 1) // spans)
        options: dict[str, Any] = {"samples": len(pool), "batch": batch, "generator": calib.generator}
        with torch.enable_grad():
            train(on, optimizer, span, total=steps, schedule=cosine(), **options)
    after = score()
    share = _share_of_bias(student.module, trainees, first[:batch])
    _store(model, student, trainees)
    ends = {name: trainees[name].codes()[0] for name in start}
    weights = sum(t.numel() for t in start.values())
    return {
        "loss_before": before,
        "loss_after": after,
        "dead_before": sum(int((t == 0).sum()) for t in start.values()) / weights,
        "dead_after": sum(int((t == 0).sum()) for t in ends.values()) / weights,
        "changed": sum(int((start[n] != ends[n]).sum()) for n in start) / weights,
        "bias_share": share,
    }


def _student(
    model: Model, quantizer: Quantizer, reactivate: float, constant: Constant = "mean"
) -> tuple[Model, dict[str, Trainee]]:
    """A copy of the network with trainable layers, by name."""
    student = model.copy()
    trainees = {}
    for name, layer in student.qlayers().items():
        trainees[name] = Trainee(layer, quantizer, reactivate, constant)
        student.replace(name, trainees[name])
    for point in student.points().values():
        point.input_values = functools.partial(rounded, point.act, point.axis)  # type: ignore[method-assign]
    return student, trainees


def _rates(student: Model, trainees: dict[str, Trainee], lr: float, biases: bool, others: bool) -> list[dict[str, Any]]:
    """What is trained, each tensor with its learning rate; the rest takes no gradient."""
    groups: list[dict[str, Any]] = []

    def add(parameter: nn.Parameter | None, size: float) -> None:
        if parameter is not None and size > 0:
            groups.append({"params": [parameter.requires_grad_(True)], "lr": lr * size})

    own = {id(p) for t in trainees.values() for p in t.parameters()}
    for parameter in student.module.parameters():
        parameter.requires_grad_(False)
    for trainee in trainees.values():
        if trainee.w is not None:
            size = float(trainee.w.detach().abs().mean())
            add(trainee.w, size)
            add(trainee.a, size)
            if biases:
                add(trainee.bias, size * trainee.w.shape[1] ** 0.5)
    if others:
        for parameter in student.module.parameters():
            if id(parameter) not in own:
                add(parameter, float(parameter.detach().abs().mean()))
    return groups


def _share_of_bias(module: nn.Module, trainees: dict[str, Trainee], x: Tensor) -> float:
    """Root mean square of C over that of the outputs, averaged over layers."""
    shares: list[float] = []

    def note(trainee: nn.Module, _: object, y: Tensor) -> None:
        assert isinstance(trainee, Trainee)
        extra = trainee.matrix_and_bias()[1] - trainee.bias
        shares.append(float(extra.square().mean().sqrt() / y.square().mean().sqrt().clamp_min(1e-30)))

    handles = [t.register_forward_hook(note) for t in trainees.values() if t.w is not None]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return sum(shares) / len(shares) if shares else 0.0


def _merged(model: Model, student: Model, trainees: dict[str, Trainee]) -> Model:
    """A quantized copy of the model, as trained so far."""
    result = model.copy()
    _store(result, student, trainees)
    return result


@torch.no_grad()
def _store(model: Model, student: Model, trainees: dict[str, Trainee]) -> None:
    """Everything that was learned, into the model."""
    for name, layer in model.qlayers().items():
        trainees[name].store(layer)
    own = tuple(f"{name}." for name in trainees)
    learned = dict(student.module.named_parameters())
    for name, parameter in model.module.named_parameters():
        if not name.startswith(own):
            parameter.data = learned[name].detach().clone()
