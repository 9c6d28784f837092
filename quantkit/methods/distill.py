"""Closed-loop distillation: refine a quantized policy until it acts like the float one where it goes itself.

All layers are trained together through their quantizers (`quantkit.trainees`) on the float network's outputs; reward
has no part in that, only in what follows. Rounds alternate (Ross, Gordon, Bagnell, "A Reduction of Imitation Learning
and Structured Prediction to No-Regret Online Learning", AISTATS 2011, arXiv 1011.0686): the policy quantized so far
acts, each time in new episodes, the states that it visits join the ones seen before, the float policy labels them, and
training goes on.
A network that does not act is trained on the calibration set alone, the scales of attention's operands included. Of
several rounds the first has a fifteenth of the steps. The others share the rest, each from the best found so far, at
learning rates that fall to a tenth of `lr`: where quantization has cost little, large steps lose more than they find.
Half of their batches are mixtures, inputs with a random box of another's (Yun et al., "CutMix", ICCV 2019, arXiv
1905.04899), which the float network labels: a few hundred inputs alone are learned by heart. Held-out inputs are few,
too: mixtures of them judge as well.

The loss is that of `quantkit.losses`. Of a policy that acts, and whose checkpoint has Q-functions of squashed actions
(SAC, TD3, DDPG, TQC), it is, with a the float and a' the quantized action, e their error and Q the critic's value,

    0.3 e(a', a) + e(0.3) max(0, Q(s, a) - Q(s, a')) / (what a part moved by 0.3 costs on average, `critic.drops`)

for how much less a policy earns is the mean of such drops over the states that it visits itself (`quantkit.critic`):
few bits cannot imitate everywhere, so they are spent where it matters.

Differs from the paper: no mixing with the float policy's actions while collecting. An eighth of the states is held out,
and of the model at the start and those at the end of every round that of the smallest loss on these is kept. With
visits, the return decides (`Contest`), whether more rounds follow, too, and moves what is not a weight on from there
(`uphill`): a small error at the wrong place ends an episode and a large one may not matter, so that of a hopper's
rounds, all of nearly the same loss, one earned an eighth of the float policy's return and one all but a fortieth.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.contest import HEATS, Contest, sure
from quantkit.critic import drops
from quantkit.errors import InputError
from quantkit.links import find_links
from quantkit.losses import errors_of, loss_for
from quantkit.model import Calib, Model
from quantkit.observers import float_twin, one_thread, portion
from quantkit.policy import Policy
from quantkit.qlayers import Point, QLayer
from quantkit.trainees import Operand, Trainee

CHANGES = frozenset({"refined", "bias"})


FINALISTS = 6
"""How many models of the smallest loss, and how many of the greatest return where they were trained, are compared."""
CLIMB = 1000
"""`visit`'s first seed of the episodes that are climbed in."""
DIRECTIONS, WIDTH, PLAYED = 32, 0.02, 2
"""How many directions a step of climbing tries, how far, and in how many episodes on each side."""
LENGTHS = (0.04, 0.02, 0.01)
"""How far it goes up the slope."""
JUDGES = 256
"""How many held-out inputs and mixtures of them judge the rounds of a network that does not act."""


Label = Callable[[Tensor], Tensor]
"""States (n, ...) -> what the loss compares the outputs with, (n, numbers)."""
Aim = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(states, outputs, labels) -> loss per state (n,)."""


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

    def plus_mixtures(self, label: Label, generator: torch.Generator) -> Pool:
        """This one with `mixtures` of the held-out states among them: `JUDGES` are held out then, or more."""
        n = JUDGES - len(self.held)
        if n <= 0:
            return self
        one, other = (self.held[torch.randint(len(self.held), (n,), generator=generator)] for _ in range(2))
        new = mixtures(one, other, generator)
        target = torch.cat([self.held_target, *(label(x) for x in new.split(portion(new)))])
        return Pool(self.train, self.train_target, torch.cat([self.held, new]), target)

    def loss(self, module: nn.Module, loss: Aim) -> float:
        """Mean loss of a network on the held-out states."""
        n = min(1024, portion(self.held))
        with torch.no_grad():
            parts = zip(self.held.split(n), self.held_target.split(n), strict=True)
            return float(torch.cat([loss(x, module(x), t) for x, t in parts]).double().mean())


@dataclass
class Course:
    """A network in training: a copy of `start` whose layers are `trainees`, on the states of `pool`."""

    start: Model
    student: nn.Module
    trainees: dict[str, Trainee | Operand]
    pool: Pool
    loss: Aim
    batch: int
    generator: torch.Generator
    label: Label | None = None
    """What half of every batch is labelled with once it is mixed; None: nothing is."""

    def train(self, optimizer: torch.optim.Optimizer, rates: Callable[[int], float], steps: range) -> Model:
        """What it is after steps of the optimizer on random batches; `rates` multiplies its learning rates.

        A step whose loss or gradient is not finite is skipped.
        """
        groups = optimizer.param_groups
        with torch.enable_grad():
            for t in steps:
                for group in groups:
                    group["lr"] = group["base"] * rates(t)
                chosen = torch.randint(len(self.pool.train), (self.batch,), generator=self.generator)
                optimizer.zero_grad(set_to_none=True)
                x, target = self.pool.train[chosen], self.pool.train_target[chosen]
                if self.label is not None:
                    x, target = half_mixed(x, target, self.label, self.generator)
                value = self.loss(x, self.student(x), target).mean()
                value.backward()
                sums = [value.detach(), *(p.grad.sum() for g in groups for p in g["params"] if p.grad is not None)]
                if not math.isfinite(float(torch.stack(sums).sum())):
                    continue
                optimizer.step()
                with torch.no_grad():
                    for m in self.trainees.values():
                        m.bound()
        return self.model()

    @torch.no_grad()
    def model(self) -> Model:
        """The quantized model that the network is now."""
        result = self.start.copy()
        parts = result.quantizers()
        for name, trainee in self.trainees.items():
            trainee.store(parts[name], result.module)  # type: ignore[arg-type]
        return result

    @property
    def soft(self) -> list[nn.Parameter]:
        """All that is trained but the weights: scales, biases and the input stage."""
        named = [pair for trainee in self.trainees.values() for pair in trainee.named_parameters()]
        return [p for name, p in named if p.requires_grad and name != "V"]

    def latent(self) -> list[Tensor]:
        """All that is trained as it is now, to `load` again."""
        return [p.detach().clone() for t in self.trainees.values() for p in t.parameters() if p.requires_grad]

    @torch.no_grad()
    def load(self, latent: list[Tensor]) -> None:
        """Go back to what `latent` gave."""
        parameters = [p for t in self.trainees.values() for p in t.parameters() if p.requires_grad]
        for p, value in zip(parameters, latent, strict=True):
            p.copy_(value)

    @torch.no_grad()
    def put(self, place: list[Tensor], width: float, direction: list[Tensor]) -> Model:
        """The model whose `soft` parameters are `place` + `width` `direction`, bounded as in training."""
        for p, value, d in zip(self.soft, place, direction, strict=True):
            p.copy_(value + width * d)
        for m in self.trainees.values():
            m.bound()
        return self.model()

    def error(self, model: Model) -> float:
        """The held-out loss of a model; infinite where it is not a number."""
        value = self.pool.loss(model.module, self.loss)
        return value if math.isfinite(value) else math.inf


@torch.no_grad()
def half_mixed(x: Tensor, target: Tensor, label: Label, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch (n, ...) and its labels where the first n // 2 inputs are `mixtures` with the others, labelled anew."""
    n = len(x) // 2
    if n == 0:
        return x, target
    new = mixtures(x[:n], x[-n:], generator)
    return torch.cat([new, x[n:]]), torch.cat([label(new), target[n:]])


def mixtures(x: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """x (n, channels, ...) with a box of `other` at the same place, its share of the volume and its corner uniform.

    The box has all channels; inputs (n, features) have none, and a run of their features is the box.
    """
    axes = range(2 if x.dim() > 2 else 1, x.dim())
    share = torch.rand(len(x), generator=generator) ** (1 / max(1, len(axes)))
    inside = torch.ones([1] * x.dim(), dtype=torch.bool)
    for axis in axes:
        size = x.shape[axis]
        length = (share * size).round()
        begin = (torch.rand(len(x), generator=generator) * (size - length + 1)).floor()
        at = torch.arange(size)
        run = (at >= begin[:, None]) & (at < (begin + length)[:, None])
        inside = inside & run.reshape([len(x) if a == 0 else size if a == axis else 1 for a in range(x.dim())])
    return torch.where(inside, other, x)


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
    laps: int = 1,
    climb: int = 0,
) -> dict[str, float]:
    """Train the quantized layers of the model together.

    rounds: how often the policy acts to find states, `states` of them each time (1: never, only the calibration
    set is used); of a network that does not act, those of the docstring above. lr: of the latent weights, in grid
    units; it falls to zero along a cosine. slow: the rate of scales and biases, in units of lr. laps: how often the
    `rounds` are gone through at most, each time from the smallest loss, while the policy surely earns less than the
    float one and the last lap took a twentieth off that loss. climb: how many steps of the environment `uphill` takes,
    beside those of the contest. Returns the held-out loss before and after, both on the final states, the round whose
    model was kept (0: the start), with visits how much more than the float policy it earned in the contest, and how
    many states there were in the end.
    """
    layers = trainable(model)
    for name, layer in model.qlayers().items():
        if layer.plan.weight is not None and layer.uniform is None:
            raise InputError(f"step 'distill': layer {name!r} has no quantized weight yet; put a step like gptq before")
    if not layers:
        return {"loss_before": 0.0, "loss_after": 0.0, "states": 0.0}
    with one_thread():
        return _distill(model, calib, steps, max(1, rounds), states, batch, lr, slow, laps, climb)


def trainable(model: Model) -> dict[str, QLayer | Point]:
    """What has an integer-like weight or a quantized input, by name."""
    return {
        n: part
        for n, part in model.quantizers().items()
        if part.act is not None or (isinstance(part, QLayer) and part.uniform is not None)
    }


def uphill(course: Course, contest: Contest, best: Model, generator: torch.Generator, budget: int) -> Model:
    """The best of a contest after steps up the slope of the return, which start where `course` is.

    The slope is the mean of (R(p + w d) - R(p - w d)) d / std R over normal d, w = WIDTH, where R is the mean return of
    PLAYED episodes, new ones for each d, and p are scales, biases and the input stage, in the units that they are
    trained in: what earns much with small errors everywhere is sought. (Mania, Guy, Recht, "Simple Random Search
    Provides a Competitive Approach to Reinforcement Learning", 2018, arXiv 1803.07055, its version V1.) p moves by the
    first of LENGTHS times the slope that wins the contest. It stays where none does, and DIRECTIONS more make the slope
    better known: so steps are as small, and slopes as sure, as the return demands. (Differs from the paper, whose steps
    are all of one length and all taken.) It ends after `budget` steps of the environment beside those of the contest,
    where no direction changes anything, and once the best surely earns as much as the float policy.
    """
    place, played, seed = [p.detach().clone() for p in course.soft], 0, CLIMB
    found: list[tuple[float, float, list[Tensor]]] = []
    while played < budget and sure(contest.gains) < 0:
        for _ in range(DIRECTIONS):
            d = [torch.randn(p.shape, generator=generator) for p in place]
            up, down = (contest.visit(course.put(place, w, d), 1, seed, PLAYED) for w in (WIDTH, -WIDTH))
            played += int(up.lengths.sum() + down.lengths.sum())
            found.append((float(up.returns.mean()), float(down.returns.mean()), d))
            seed += 1
        spread = float(torch.tensor([r for *rs, _ in found for r in rs]).std(unbiased=False))
        if not spread > 0:
            break
        slope = [torch.zeros_like(p) for p in place]
        for high, low, d in found:
            slope = [s + (high - low) / (spread * len(found)) * v for s, v in zip(slope, d, strict=True)]
        for length in LENGTHS:
            model = course.put(place, length, slope)
            if contest.won(model):
                best, place, found = model, [p.detach().clone() for p in course.soft], []
                break
    return best


@torch.no_grad()
def _distill(
    model: Model,
    calib: Calib,
    steps: int,
    rounds: int,
    states: int,
    batch: int,
    lr: float,
    slow: float,
    laps: int,
    budget: int,
) -> dict[str, float]:
    visit = calib.visit if rounds > 1 else None
    teacher, start = float_twin(model), model.copy()
    label, loss, known = _aim(teacher, calib.inputs, None if visit is None else model.critic)
    pool = Pool.of(calib.inputs, label, known)
    earned: list[float] = []
    if visit is not None:
        for actor in (teacher, start):
            seen = visit(actor, states, HEATS[-1][-1] + 1)
            pool = pool.plus(Pool.of(seen.states, label))
        earned.append(float(seen.returns.mean()))
    course = Course(start, *_student(start, pool), pool, loss, batch, calib.generator)
    if visit is None and rounds > 1 and not isinstance(model.module, Policy):
        best, report = _rounds(course, label, steps, rounds, lr, slow)
        _copy_into(model, best)
        return report | {"states": float(len(calib.inputs))}
    rate = _rates(steps)
    candidates, latent = [start], [course.latent()] if visit is not None else []

    def lap(first: int) -> None:
        """Another `rounds` rounds from where the course is, the number of whose first is `first`."""
        optimizer = _optimizer(course.trainees, lr, slow)
        for number in range(rounds):
            span = range(steps * number // rounds, steps * (number + 1) // rounds)
            candidates.append(course.train(optimizer, rate, span))
            if visit is not None:
                latent.append(course.latent())
                seen = visit(candidates[-1], states, HEATS[-1][-1] + 1 + first + number)
                course.pool = course.pool.plus(Pool.of(seen.states, label))
                earned.append(float(seen.returns.mean()))

    lap(1)
    losses = [course.error(m) for m in candidates]
    kept, report = losses.index(min(losses)), {}
    best = candidates[kept]
    if visit is not None:
        contest = Contest(visit, teacher)
        kept = _choose(contest, candidates, losses, earned, 0, kept)
        for _ in range(laps - 1):
            if sure(contest.gains) >= 0:
                break
            before = len(candidates)
            course.load(latent[losses.index(min(losses))])
            lap(before)
            losses = [course.error(m) for m in candidates]
            kept = _choose(contest, candidates, losses, earned, before, kept)
            if min(losses[before:]) > 0.95 * min(losses[:before]):
                break
        course.load(latent[kept])
        best = uphill(course, contest, candidates[kept], calib.generator, budget)
        report = {"gain": float(contest.gains.mean())}
    _copy_into(model, best)
    report |= {"loss_before": losses[0], "loss_after": course.error(best), "round": float(kept)}
    return report | {"states": float(len(course.pool.train) + len(course.pool.held))}


def _choose(
    contest: Contest, candidates: list[Model], losses: list[float], earned: list[float], first: int, kept: int
) -> int:
    """The number of the candidate that the contest is won by, of those from `first` on and `kept`, the best so far."""
    order = sorted(range(first, len(candidates)), key=lambda i: losses[i])
    rich = sorted(order, key=lambda i: -earned[i])
    for i in [i for i in rich if i in order[:FINALISTS] or i in rich[:FINALISTS]]:
        kept = i if contest.won(candidates[i]) else kept
    return kept


def _rates(steps: int) -> Callable[[int], float]:
    """What multiplies the learning rates in each of so many steps: up to one in the first 50, down along a cosine."""
    return lambda t: min(1.0, (t + 1) / 50) * 0.5 * (1 + math.cos(math.pi * t / max(1, steps)))


def _rounds(
    course: Course, label: Label, steps: int, rounds: int, lr: float, slow: float
) -> tuple[Model, dict[str, float]]:
    """The best model of the rounds in which a network that does not act is trained, and the report of `apply`."""

    def trained(course: Course, steps: int, lr: float) -> Model:
        return course.train(_optimizer(course.trainees, lr, slow), _rates(steps), range(steps))

    short = steps // 15
    models = [course.start, trained(course, short, lr)]
    course.pool = pool = course.pool.plus_mixtures(label, course.generator)
    losses = [course.error(m) for m in models]
    for number in range(rounds - 1):
        best = models[losses.index(min(losses))]
        course = Course(best, *_student(best, pool), pool, course.loss, course.batch, course.generator, label)
        models.append(trained(course, (steps - short) // (rounds - 1), lr * 0.1 ** (number / max(1, rounds - 2))))
        losses.append(course.error(models[-1]))
    kept = losses.index(min(losses))
    return models[kept], {"loss_before": losses[0], "loss_after": losses[kept], "round": float(kept)}


def _optimizer(trainees: dict[str, Trainee | Operand], lr: float, slow: float) -> torch.optim.Optimizer:
    kinds: dict[str, list[nn.Parameter]] = {"V": [], "slow": [], "stage": []}
    for trainee in trainees.values():
        for name, parameter in trainee.named_parameters():
            kinds["V" if name == "V" else "stage" if name in ("stretch", "shift") else "slow"].append(parameter)
    speeds = {"V": lr, "slow": slow * lr, "stage": 0.5 * lr}
    return torch.optim.Adam(
        [{"params": p, "lr": speeds[k], "base": speeds[k]} for k, p in kinds.items() if p], fused=True
    )


def _aim(teacher: Model, inputs: Tensor, critic: nn.Module | None) -> tuple[Label, Aim, Tensor | None]:
    """What a state is labelled with, the loss of the outputs there, and the labels of `inputs`, the calibration set.

    Labels are the float outputs, and with a critic of squashed actions the value of the float action beside them; None
    where those of `inputs` are yet to be made.
    """
    module = teacher.module
    head = module.head if isinstance(module, Policy) else None
    outputs = torch.cat([module(x) for x in inputs.split(min(1024, portion(inputs)))])
    plain = loss_for(head, outputs)
    if critic is None or head is None or not head.squash:
        return module, lambda _x, y, t: plain(y, t), outputs
    judge = copy.deepcopy(critic).requires_grad_(False)
    parts = zip(inputs.split(1024), outputs.split(1024), strict=True)
    usual = torch.cat([drops(judge, x, torch.tanh(y)).clamp_min(0) for x, y in parts]).mean()
    if not bool(usual.isfinite() & (usual > 0)):
        return module, lambda _x, y, t: plain(y, t), outputs
    errors, n = errors_of(head), head.outputs
    moved = torch.atanh(torch.full((1, 1), 0.3))
    worth = float(errors(moved, torch.zeros(1, 1)).sum() / usual)

    def label(x: Tensor) -> Tensor:
        y = module(x)
        return torch.cat([y, judge(x, torch.tanh(y))[:, None]], dim=1)

    def loss(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        lost = (t[:, n] - judge(x, torch.tanh(y))).clamp_min(0)
        return 0.3 * errors(y, t[:, :n]).sum(dim=1) + worth * lost

    return label, loss, None


def _student(start: Model, pool: Pool) -> tuple[nn.Module, dict[str, Trainee | Operand]]:
    """A copy of the network with trainable layers, by name."""
    twin, layers = start.copy(), trainable(start)
    links = [link for link in find_links(twin) if link.kind == "input"] if isinstance(twin.module, Policy) else []
    fed = links[0].consumers if len(links) == 1 and len(links[0].consumers) == 1 else ()
    trainees: dict[str, Trainee | Operand] = {}
    for name, part in twin.quantizers().items():
        if name not in layers:
            continue
        if isinstance(part, Point):
            trainees[name] = Operand(part)
            continue
        stage = None
        if name in fed and part.op == "linear" and part.in_scale is None:
            shape = twin.module.obs_shape  # type: ignore[union-attr]
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
        twin.module(pool.held[: min(512, portion(pool.held))])
    for handle in handles:
        handle.remove()
    for name, trainee in trainees.items():
        if isinstance(trainee, Trainee):
            trainee.unit = spread.get(name, torch.ones(())).clamp_min(1e-12)
        twin.replace(name, trainee)
    return twin.module, trainees


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
