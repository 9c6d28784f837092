"""Tuning: all quantized weights of a network trained together through their rounding, on the float network's outputs.

Knowledge distillation from the network to its quantized self, as in Liu et al., "LLM-QAT: Data-Free Quantization Aware
Training for Large Language Models", ACL Findings 2024, arXiv 2305.17888, from a good start. Per layer, with Q rounding
to the format and d/du Q(u) taken as 1,

    w~ = s_row Q(V),    trained: V and log s_row, by Adam;

of a language model the loss is E KL(softmax t || softmax y) of the next token, t the float logits and y these, of other
networks that of `quantkit.losses`. Nothing is added: what the weights are stored in is what it was, and biases,
normalizations, embeddings and input quantizers stay bit for bit.

Differs from the paper: the data are the calibration set's; V is in units of the grid and starts as near to the float
weight as rounding to the code allows (of a few points between the two); nothing else is trained. An eighth of the
inputs is held out, and a run whose loss on these ends above the start's is dropped. Float outputs are computed batch by
batch and never all held, as `distill` does, which also trains biases and input scales and lets a policy act.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwmodel.formats import Format, Levels, max_value, min_value
from quantkit.arithmetic import one_thread
from quantkit.errors import InputError
from quantkit.losses import Loss, loss_for
from quantkit.model import Calib, Model, float_twin
from quantkit.policy import Policy
from quantkit.qlayers import QLayer
from quantkit.qtensor import expand_scale, from_values, round_scale, scale_format, values_of
from quantkit.rounding import round_to
from quantkit.training import Straight, cosine, rounded, train

CHANGES = frozenset({"refined"})


def nearby(u: Tensor, values: Tensor, fmt: Format) -> Tensor:
    """Points that round to `values`: the first that does of u, 0.8 of the way to it, 0.64, ...; same shape.

    >>> from hwmodel.formats import Int
    >>> nearby(torch.tensor([0.25, 1.4]), torch.tensor([0.0, 2.0]), Int(3)).mul(100).round().tolist()
    [25.0, 152.0]
    """
    found = values
    for k in range(16, -1, -1):
        point = u if k == 0 else torch.lerp(values, u, 0.8**k)
        found = torch.where(round_to(point, fmt) == values, point, found)
    return found


class Trainee(nn.Module):
    """A QLayer whose quantized weight is trained; takes its place in a copy of the network."""

    def __init__(self, layer: QLayer) -> None:
        super().__init__()
        self.layer = layer
        self.V: nn.Parameter | None = None
        if (q := layer.uniform) is not None:
            values = values_of(q)
            low, high = (-1.0, 1.0) if isinstance(q.fmt, Levels) else (min_value(q.fmt), max_value(q.fmt))
            u = layer.weight.detach().flatten(1) / expand_scale(q.scale, values.shape[1], q.granularity)
            self.V = nn.Parameter(nearby(u.clamp(low, high), values, q.fmt))
            self.log_s = nn.Parameter(torch.zeros_like(q.scale))

    def scale(self) -> Tensor:
        """Scales as they will be stored; the gradient is that of the unrounded ones."""
        q = self.layer.uniform
        assert q is not None
        s = (self.log_s.exp() * q.scale).clamp_min(torch.finfo(torch.float32).tiny)
        return Straight.apply(s, round_scale(s.detach(), scale_format(q.granularity), q.base))

    def matrix(self) -> Tensor:
        """w~ in real units, like the layer's weight."""
        layer = self.layer
        if self.V is None or (q := layer.uniform) is None:
            return layer.effective_weight()
        values = Straight.apply(self.V, round_to(self.V.detach(), q.fmt))
        return (values * expand_scale(self.scale(), values.shape[1], q.granularity)).reshape(layer.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if layer.op == "embedding":
            return layer.product(x, self.matrix()) + layer.bias
        if layer.in_scale is not None:
            x = x * layer.per_channel(layer.in_scale)
        if layer.act is not None:
            x = rounded(layer.act, layer.axis, x) * layer.act.scale
        return layer.product(x, self.matrix()) + layer.per_channel(layer.bias)

    @torch.no_grad()
    def store(self, layer: QLayer) -> None:
        """Give `layer`, which is as this one's was at the start, the codes and scales that have been learned."""
        if self.V is not None and (q := layer.uniform) is not None:
            values, scale = round_to(self.V, q.fmt), self.scale()
            layer.set_weight(from_values(values, scale, q.fmt, q.granularity, q.shape, q.base))


def apply(model: Model, calib: Calib, *, steps: int = 200, batch: int = 16, lr: float = 0.01) -> dict[str, float]:
    """Train the quantized weights of the model together.

    steps: of Adam, `batch` inputs each. lr: of V, in units of the grid; scales learn a fifth as fast; both are warmed
    up over 5 % of the run and then fall to zero along a cosine. Returns the held-out loss before and after, and the
    share of weights whose code has changed. Raises InputError for a layer whose weight is yet to be quantized.
    """
    if min(steps, batch) < 1 or lr <= 0:
        raise InputError(f"step 'tune': steps={steps}, batch={batch}, lr={lr}; accepted: 1 or more, 1 or more, above 0")
    for name, layer in model.qlayers().items():
        if layer.plan.weight is not None and layer.uniform is None:
            raise InputError(f"step 'tune': layer {name!r} has no quantized weight yet; put a step like gptq before")
    student, trainees = _student(model)
    if not any(t.V is not None for t in trainees.values()):
        return {"loss_before": 0.0, "loss_after": 0.0, "changed": 0.0}
    inputs, held = calib.rest().inputs, calib.inputs[calib.held()] if len(calib.inputs) >= 16 else calib.inputs
    with one_thread():
        with torch.no_grad():
            teacher = float_twin(model)
            loss = _loss(model, torch.cat([teacher.module(x) for x in inputs[: 4 * batch].split(batch)]), inputs)

        def score(module: nn.Module) -> float:
            with torch.no_grad():
                return sum(float(loss(module(x), teacher.module(x)).sum()) for x in held.split(batch)) / len(held)

        def on(chosen: Tensor) -> Tensor:
            with torch.no_grad():
                target = teacher.module(inputs[chosen])
            return loss(student.module(inputs[chosen]), target).mean()

        before = score(model.module)
        weights = [t.V for t in trainees.values() if t.V is not None]
        scales = [t.log_s for t in trainees.values() if t.V is not None]
        optimizer = torch.optim.Adam([{"params": weights, "lr": lr}, {"params": scales, "lr": 0.2 * lr}], fused=True)
        options = {"samples": len(inputs), "batch": batch, "generator": calib.generator, "schedule": cosine()}
        with torch.enable_grad():
            train(on, optimizer, range(steps), total=steps, **options)  # type: ignore[arg-type]
        result = model.copy()
        for name, layer in result.qlayers().items():
            trainees[name].store(layer)
        after = score(result.module)
    if not after <= before:
        return {"loss_before": before, "loss_after": before, "changed": 0.0}
    changed = total = 0
    learned = result.qlayers()
    for name, layer in model.qlayers().items():
        if (old := layer.uniform) is not None and (new := learned[name].uniform) is not None:
            changed += int((values_of(old) != values_of(new)).sum())
            total += old.codes.numel()
            layer.set_weight(new)
    return {"loss_before": before, "loss_after": after, "changed": changed / total}


def _student(model: Model) -> tuple[Model, dict[str, Trainee]]:
    """A copy of the network with trainable layers, by name."""
    student, trainees = model.copy(), {}
    for parameter in student.module.parameters():
        parameter.requires_grad_(False)
    for name, layer in student.qlayers().items():
        trainees[name] = Trainee(layer)
        student.replace(name, trainees[name])
    for point in student.points().values():
        point.input_values = functools.partial(rounded, point.act, point.axis)  # type: ignore[method-assign]
    return student, trainees


def _loss(model: Model, example: Tensor, inputs: Tensor) -> Loss:
    """What is minimized, per input; `example` are float outputs on some inputs."""
    if example.dim() == 3 and not inputs.is_floating_point():

        def next_token(y: Tensor, t: Tensor) -> Tensor:
            log_q, log_p = F.log_softmax(y, dim=-1), F.log_softmax(t, dim=-1)
            return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1).mean(dim=-1)

        return next_token
    if isinstance(model.module, Policy):
        return loss_for(model.module.head, example)
    of_rows = loss_for(None, example.flatten(1))
    return lambda y, t: of_rows(y.flatten(1), t.flatten(1))
