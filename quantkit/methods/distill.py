"""Closed-loop distillation: refine a quantized policy until it acts like the float one where it goes itself.

All layers are trained together through their quantizers, with the straight-through estimator, on the float
network's outputs; no reward is used. Rounds alternate (Ross, Gordon, Bagnell, "A Reduction of Imitation Learning
and Structured Prediction to No-Regret Online Learning", AISTATS 2011, arXiv 1011.0686): the policy quantized so far
acts, the states that it visits join the ones seen before, the float policy labels them, and training goes on.

Per layer, with Q rounding to the format and d/du Q(u) taken as 1 inside its range and 0 outside,

    w~ = s_row Q(V),    x~ = a Q(x / a),    trained: V, log s_row, log a and the bias

(Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153, for the gradient of a), and for
the first layer of a policy x = f * stage(obs) + c with f and c per feature, which the float input stage absorbs.
A network that does not act is trained on the calibration set alone, the scales of attention's operands included.

The loss is that of `quantkit.losses`.

Differs from the papers: latent weights V are in units of the grid and their own, so that a change of scale does not
round anew; they start inside the cell of the weight's code, as near to the float weight as that allows; no mixing
with the float policy's actions while collecting. An eighth of the states is held out, and of the model at the start
and those at the end of every round, one whose loss on these is not above the start's is kept: without visits that of
the smallest loss; with them that whose own states are distributed most like the float policy's over the same episodes
(`distance`), as a small error at the wrong place ends an episode and a large one may not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwmodel.formats import Format, Levels, levels, max_value, min_value
from quantkit.errors import InputError
from quantkit.links import find_links, scale_columns, scale_stage, shift_stage
from quantkit.losses import Loss, loss_for
from quantkit.model import Calib, Model
from quantkit.observers import float_twin, one_thread
from quantkit.policy import Policy
from quantkit.qlayers import ActQuant, BlockAct, Point, QLayer
from quantkit.qtensor import expand_scale, from_values, round_scale, scale_format, values_of
from quantkit.rounding import round_to

CHANGES = frozenset({"refined", "bias"})


class _Round(torch.autograd.Function):
    """`round_to` whose derivative is 1 inside the range and 0 outside."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, fmt: Format) -> Tensor:
        low, high = _limits(fmt)
        ctx.save_for_backward((u >= low) & (u <= high))
        return round_to(u, fmt)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None


class _Quantize(torch.autograd.Function):
    """a Q(x / a) with a = scale exp(log_a); the derivatives are the docstring's, in few passes over x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_a: Tensor, scale: float, fmt: Format) -> Tensor:
        a = scale * log_a.exp()
        u = x / a
        q = round_to(u, fmt)
        inside = u.clamp(*_limits(fmt)) == u
        ctx.save_for_backward(inside, torch.where(inside, q - u, q), a)
        return q.mul_(a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        inside, slope, a = ctx.saved_tensors
        return grad * inside, slope.mul_(grad).sum() * a, None, None


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


def distance(a: Tensor, b: Tensor) -> float:
    """How differently two samples of as many states are distributed: mean over features of the Wasserstein-1
    distance in standard deviations of `a`; features that are constant in `a` in those of both together.

    >>> distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [1.0]]))
    1.0
    """
    n = min(len(a), len(b))
    x, y = a[:n].flatten(1).double(), b[:n].flatten(1).double()
    spread = x.std(dim=0, unbiased=False)
    both = torch.cat([x, y]).std(dim=0, unbiased=False)
    spread = torch.where(spread > 1e-3 * both, spread, both)
    moved = (x.sort(dim=0).values - y.sort(dim=0).values).abs().mean(dim=0)
    return float((moved / torch.where(spread > 0, spread, torch.ones_like(spread))).mean())


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
            u = layer.weight.detach().flatten(1) / expand_scale(q.scale, values_of(q).shape[1])
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
            weight = (_Round.apply(self.V, layer.uniform.fmt) * expand_scale(s, self.V.shape[1])).reshape(
                layer.weight.shape
            )
        bias = layer.bias + self.bias * self.unit
        if layer.op == "linear":
            return F.linear(x, weight, bias)
        return layer.product(x, weight) + layer.per_channel(bias)

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


@dataclass
class Pool:
    """States with the float network's outputs; an eighth of every addition is held out."""

    train: Tensor
    train_target: Tensor
    held: Tensor
    held_target: Tensor

    @classmethod
    def of(cls, states: Tensor, teacher: nn.Module) -> Pool:
        target = torch.cat([teacher(x) for x in states.split(1024)])
        held = torch.arange(len(states)) % 8 == 7 if len(states) >= 16 else torch.ones(len(states), dtype=torch.bool)
        train = ~held if len(states) >= 16 else held
        return cls(states[train], target[train], states[held], target[held])

    def plus(self, other: Pool) -> Pool:
        """Both together."""
        return Pool(*(torch.cat([a, b]) for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def loss(self, module: nn.Module, loss: Loss) -> float:
        """Mean loss of a network on the held-out states."""
        with torch.no_grad():
            y = torch.cat([module(x) for x in self.held.split(1024)])
            return float(loss(y, self.held_target).double().mean())


def train(
    student: nn.Module,
    pool: Pool,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    rates: Callable[[int], float],
    steps: range,
    batch: int,
    generator: torch.Generator,
) -> None:
    """Steps of the optimizer on random batches; `rates` multiplies its learning rates.

    A step whose loss or gradient is not finite is skipped.
    """
    groups = optimizer.param_groups
    trainees = [m for m in student.modules() if isinstance(m, Trainee | Operand)]
    for t in steps:
        for group in groups:
            group["lr"] = group["base"] * rates(t)
        chosen = torch.randint(len(pool.train), (batch,), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        value = loss(student(pool.train[chosen]), pool.train_target[chosen]).mean()
        value.backward()
        if not math.isfinite(float(value.detach())) or not all(
            bool(p.grad.isfinite().all()) for g in groups for p in g["params"] if p.grad is not None
        ):
            continue
        optimizer.step()
        with torch.no_grad():
            for m in trainees:
                m.bound()


def apply(
    model: Model,
    calib: Calib,
    *,
    steps: int = 2000,
    rounds: int = 12,
    states: int = 4096,
    batch: int = 256,
    lr: float = 0.004,
) -> dict[str, float]:
    """Train the quantized layers of the model together.

    rounds: how often the policy acts to find states, `states` of them each time (1: never, only the calibration
    set is used, as for a network that cannot act). lr: of the latent weights, in grid units; it falls to zero along
    a cosine. Returns the held-out loss before and after, both on the final states, the round whose model was kept
    (0: the start), with visits the distances of the docstring, and how many states there were in the end.
    """
    layers = {
        n: part
        for n, part in model.quantizers().items()
        if part.act is not None or (isinstance(part, QLayer) and part.uniform is not None)
    }
    for name, layer in model.qlayers().items():
        if layer.plan.weight is not None and layer.uniform is None:
            raise InputError(f"step 'distill': layer {name!r} has no quantized weight yet; put a step like gptq before")
    if not layers:
        return {"loss_before": 0.0, "loss_after": 0.0, "states": 0.0}
    with one_thread():
        return _distill(model, calib, layers, steps, max(1, rounds), states, batch, lr)


def _distill(
    model: Model,
    calib: Calib,
    layers: dict[str, QLayer | Point],
    steps: int,
    rounds: int,
    states: int,
    batch: int,
    lr: float,
) -> dict[str, float]:
    with torch.no_grad():
        teacher = float_twin(model)
        pool = Pool.of(calib.inputs, teacher.module)
        loss = loss_for(model.module.head if isinstance(model.module, Policy) else None, _outputs(pool))
        start = model.copy()
        calm = start_states = calib.inputs
        visit = calib.visit if rounds > 1 else None
        if visit is not None:
            calm, start_states = visit(teacher, states, 1), visit(start, states, 1)
            for seen in (calm, start_states):
                pool = pool.plus(Pool.of(seen, teacher.module))
        student, trainees = _student(start, layers, pool)
    kinds: dict[str, list[nn.Parameter]] = {"V": [], "slow": [], "stage": []}
    for trainee in trainees.values():
        for name, parameter in trainee.named_parameters():
            kinds["V" if name == "V" else "stage" if name in ("stretch", "shift") else "slow"].append(parameter)
    speeds = {"V": lr, "slow": 0.2 * lr, "stage": 0.5 * lr}
    optimizer = torch.optim.Adam(
        [{"params": p, "lr": speeds[k], "base": speeds[k]} for k, p in kinds.items() if p], fused=True
    )

    def rate(t: int) -> float:
        return min(1.0, (t + 1) / 50) * 0.5 * (1 + math.cos(math.pi * t / max(1, steps)))

    candidates, own = [start], [start_states]
    for number in range(rounds):
        span = range(steps * number // rounds, steps * (number + 1) // rounds)
        with torch.enable_grad():
            train(student, pool, loss, optimizer, rate, span, batch, calib.generator)
        current = _stored(start, trainees)
        candidates.append(current)
        if visit is not None:
            seen = visit(current, states, 1)
            own.append(seen)
            if number + 1 < rounds:
                with torch.no_grad():
                    pool = pool.plus(Pool.of(seen, teacher.module))
    losses = [pool.loss(m.module, loss) for m in candidates]
    ranks = losses if visit is None else [distance(calm, seen) for seen in own]
    usable = [i for i, value in enumerate(losses) if math.isfinite(value) and value <= losses[0]]
    chosen = min(usable, key=lambda i: ranks[i], default=0)
    _copy_into(model, candidates[chosen])
    report = {"loss_before": losses[0], "loss_after": losses[chosen], "round": float(chosen)}
    if visit is not None:
        report |= {"distance_before": ranks[0], "distance_after": ranks[chosen]}
    return report | {"states": float(len(pool.train) + len(pool.held))}


def _outputs(pool: Pool) -> Tensor:
    return torch.cat([pool.train_target, pool.held_target])


def _student(
    start: Model, layers: dict[str, QLayer | Point], pool: Pool
) -> tuple[nn.Module, dict[str, Trainee | Operand]]:
    """A copy of the network with trainable layers, by name."""
    copy = start.copy()
    links = [link for link in find_links(copy) if link.kind == "input"] if isinstance(copy.module, Policy) else []
    fed = links[0].consumers if len(links) == 1 and len(links[0].consumers) == 1 else ()
    trainees: dict[str, Trainee | Operand] = {}
    for name, part in copy.quantizers().items():
        if name not in layers:
            continue
        if isinstance(part, Point):
            trainees[name] = Operand(part)
            continue
        stage = None
        if name in fed and part.op == "linear" and part.in_scale is None:
            shape = copy.module.obs_shape  # type: ignore[union-attr]
            stage = part.weight.shape[1] if len(shape) == 1 else None  # type: ignore[arg-type]
        trainees[name] = Trainee(part, stage)
    spread: dict[str, Tensor] = {}
    handles = []
    for name, trainee in trainees.items():
        if isinstance(trainee, Operand):
            continue

        def note(_m: nn.Module, _a: object, y: Tensor, name: str = name) -> None:
            spread[name] = y.double().std(unbiased=False).float()

        handles.append(trainee.layer.register_forward_hook(note))
    with torch.no_grad():
        copy.module(pool.held[:512])
    for handle in handles:
        handle.remove()
    for name, trainee in trainees.items():
        if isinstance(trainee, Trainee):
            trainee.unit = spread.get(name, torch.ones(())).clamp_min(1e-12)
        copy.replace(name, trainee)
    return copy.module, trainees


def _stored(start: Model, trainees: dict[str, Trainee | Operand]) -> Model:
    result = start.copy()
    parts = result.quantizers()
    for name, trainee in trainees.items():
        trainee.store(parts[name], result.module)  # type: ignore[arg-type]
    return result


def _copy_into(model: Model, best: Model) -> None:
    """Everything that was learned, into the layers and the stage that the caller holds."""
    if isinstance(model.module, Policy) and isinstance(best.module, Policy):
        for name in ("mean", "std", "low", "high"):
            setattr(model.module.stage, name, getattr(best.module.stage, name))
    found = best.qlayers()
    for name, layer in model.qlayers().items():
        layer.weight.data, layer.bias.data = found[name].weight.data, found[name].bias.data
        layer.set_weight(found[name].q)
        layer.set_act(found[name].act)
    for name, point in best.points().items():
        model.points()[name].set_act(point.act)
