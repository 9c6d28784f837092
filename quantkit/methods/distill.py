"""Closed-loop distillation: refine a quantized policy until it acts like the float one where it goes itself.

All layers are trained together through their quantizers (`quantkit.trainees`) on the float network's outputs; no reward
is used. Rounds alternate (Ross, Gordon, Bagnell, "A Reduction of Imitation Learning and Structured Prediction to
No-Regret Online Learning", AISTATS 2011, arXiv 1011.0686): the policy quantized so far acts, always in the same
episodes, the states that it visits join the ones seen before, the float policy labels them, and training goes on.
A network that does not act is trained on the calibration set alone, the scales of attention's operands included.

The loss is that of `quantkit.losses`. Of a policy that acts, and whose checkpoint has Q-functions of squashed actions
(SAC, TD3, DDPG, TQC), the error of part i of the action in a state s counts

    w_i(s) = 0.2 + 0.8 max(0, d_i(s)) / (mean of max(0, d) over the calibration set)

with d_i(s) what they say that a part moved by 0.3 costs there (`critic.drops`): a few bits are spent where it matters.

Differs from the paper: no mixing with the float policy's actions while collecting. An eighth of the states is held out,
and of the model at the start and those at the end of every round, one whose loss on these is not above the start's is
kept: without visits that of the smallest loss; with them that whose own states are distributed most like the float
policy's over the same episodes (`distance`), as a small error at the wrong place ends an episode and a large one may
not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.critic import drops
from quantkit.errors import InputError
from quantkit.links import find_links
from quantkit.losses import Loss, errors_of, loss_for
from quantkit.model import Calib, Model
from quantkit.observers import float_twin, one_thread, portion
from quantkit.policy import Policy
from quantkit.qlayers import Point, QLayer
from quantkit.trainees import Operand, Trainee

CHANGES = frozenset({"refined", "bias"})


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


Label = Callable[[Tensor], Tensor]
"""States (n, ...) -> what the loss compares the outputs with, (n, numbers)."""


@dataclass
class Pool:
    """States with their labels; an eighth of every addition is held out."""

    train: Tensor
    train_target: Tensor
    held: Tensor
    held_target: Tensor

    @classmethod
    def of(cls, states: Tensor, label: Label, target: Tensor | None = None) -> Pool:
        """The states with what `label` says of them, or the labels `target` where they are known."""
        if target is None:
            target = torch.cat([label(x) for x in states.split(min(1024, portion(states)))])
        held = torch.arange(len(states)) % 8 == 7 if len(states) >= 16 else torch.ones(len(states), dtype=torch.bool)
        train = ~held if len(states) >= 16 else held
        return cls(states[train], target[train], states[held], target[held])

    def plus(self, other: Pool) -> Pool:
        """Both together."""
        return Pool(*(torch.cat([a, b]) for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def loss(self, module: nn.Module, loss: Loss) -> float:
        """Mean loss of a network on the held-out states."""
        with torch.no_grad():
            y = torch.cat([module(x) for x in self.held.split(min(1024, portion(self.held)))])
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
        sums = [value.detach(), *(p.grad.sum() for g in groups for p in g["params"] if p.grad is not None)]
        if not math.isfinite(float(torch.stack(sums).sum())):
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
    slow: float = 0.2,
) -> dict[str, float]:
    """Train the quantized layers of the model together.

    rounds: how often the policy acts to find states, `states` of them each time (1: never, only the calibration
    set is used, as for a network that cannot act). lr: of the latent weights, in grid units; it falls to zero along
    a cosine. slow: the rate of scales and biases, in units of lr. Returns the held-out loss before and after, both on
    the final states, the round whose model was kept (0: the start), with visits the distances of the docstring, and how
    many states there were in the end.
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
        return _distill(model, calib, layers, steps, max(1, rounds), states, batch, lr, slow)


def _distill(
    model: Model,
    calib: Calib,
    layers: dict[str, QLayer | Point],
    steps: int,
    rounds: int,
    states: int,
    batch: int,
    lr: float,
    slow: float,
) -> dict[str, float]:
    with torch.no_grad():
        teacher, start = float_twin(model), model.copy()
        visit = calib.visit if rounds > 1 else None
        label, loss, known = _aim(teacher, calib.inputs, None if visit is None else model.critic)
        pool = Pool.of(calib.inputs, label, known)
        calm, own = calib.inputs, [calib.inputs]
        if visit is not None:
            calm, own = visit(teacher, states, 1), [visit(start, states, 1)]
            for seen in (calm, own[0]):
                pool = pool.plus(Pool.of(seen, label))
        student, trainees = _student(start, layers, pool)
    kinds: dict[str, list[nn.Parameter]] = {"V": [], "slow": [], "stage": []}
    for trainee in trainees.values():
        for name, parameter in trainee.named_parameters():
            kinds["V" if name == "V" else "stage" if name in ("stretch", "shift") else "slow"].append(parameter)
    speeds = {"V": lr, "slow": slow * lr, "stage": 0.5 * lr}
    optimizer = torch.optim.Adam(
        [{"params": p, "lr": speeds[k], "base": speeds[k]} for k, p in kinds.items() if p], fused=True
    )

    def rate(t: int) -> float:
        return min(1.0, (t + 1) / 50) * 0.5 * (1 + math.cos(math.pi * t / max(1, steps)))

    candidates = [start]
    for number in range(rounds):
        span = range(steps * number // rounds, steps * (number + 1) // rounds)
        with torch.enable_grad():
            train(student, pool, loss, optimizer, rate, span, batch, calib.generator)
        current = _stored(start, trainees)
        candidates.append(current)
        if visit is not None:
            own.append(visit(current, states, 1))
            if number + 1 < rounds:
                with torch.no_grad():
                    pool = pool.plus(Pool.of(own[-1], label))
    losses = [pool.loss(m.module, loss) for m in candidates]
    ranks = losses if visit is None else [distance(calm, seen) for seen in own]
    usable = [i for i, value in enumerate(losses) if math.isfinite(value) and value <= losses[0]]
    chosen = min(usable, key=lambda i: ranks[i], default=0)
    _copy_into(model, candidates[chosen])
    report = {"loss_before": losses[0], "loss_after": losses[chosen], "round": float(chosen)}
    if visit is not None:
        report |= {"distance_before": ranks[0], "distance_after": ranks[chosen]}
    return report | {"states": float(len(pool.train) + len(pool.held))}


def _aim(teacher: Model, inputs: Tensor, critic: nn.Module | None) -> tuple[Label, Loss, Tensor | None]:
    """What a state is labelled with, the loss of the outputs there, and the labels of `inputs`, the calibration set.

    Labels are the float outputs, and with a critic of squashed actions the weights of the docstring beside them; None
    where those of `inputs` are yet to be made.
    """
    module = teacher.module
    head = module.head if isinstance(module, Policy) else None
    outputs = torch.cat([module(x) for x in inputs.split(min(1024, portion(inputs)))])
    if critic is None or head is None or not head.squash:
        return module, loss_for(head, outputs), outputs

    def cost(x: Tensor, y: Tensor) -> Tensor:
        return drops(critic, x, torch.tanh(y)).clamp_min(0)

    usual = torch.cat([cost(*xy) for xy in zip(inputs.split(1024), outputs.split(1024), strict=True)]).mean()
    if not bool(usual.isfinite() & (usual > 0)):
        return module, loss_for(head, outputs), outputs
    errors, n = errors_of(head), head.outputs

    def label(x: Tensor) -> Tensor:
        y = module(x)
        return torch.cat([y, 0.2 + 0.8 * cost(x, y) / usual], dim=1)

    return label, lambda y, t: (errors(y, t[:, :n]) * t[:, n:]).sum(dim=1), None


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
