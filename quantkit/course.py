"""A quantized network in training: all its layers together, through their quantizers (`quantkit.trainees`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.aim import Aim, Label
from quantkit.batches import portion
from quantkit.links import find_links
from quantkit.mixtures import half_mixed, mixtures
from quantkit.model import Model
from quantkit.policy import Policy
from quantkit.qlayers import Point, QLayer
from quantkit.trainees import Operand, Trainee

JUDGES = 256
"""How many held-out inputs and mixtures of them judge the rounds of a network that does not act."""


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

    def __len__(self) -> int:
        return len(self.train) + len(self.held)

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

    @classmethod
    def of(
        cls, start: Model, pool: Pool, loss: Aim, batch: int, generator: torch.Generator, label: Label | None = None
    ) -> Course:
        """The course that begins at `start`."""
        return cls(start, *student_of(start, pool), pool, loss, batch, generator, label)

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

    def rounds(self, steps: int, n: int, lr: float, slow: float) -> Iterator[Model]:
        """What it is after each of n rounds of so many steps together, through which the rates fall along one cosine.

        lr: of the latent weights, in grid units. slow: the rate of scales and biases, in units of lr.
        """
        optimizer = optimizer_of(self.trainees, lr, slow)
        for i in range(n):
            yield self.train(optimizer, rates_of(steps), range(steps * i // n, steps * (i + 1) // n))

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


def trainable(model: Model) -> dict[str, QLayer | Point]:
    """What has an integer-like weight or a quantized input, by name."""
    return {
        n: part
        for n, part in model.quantizers().items()
        if part.act is not None or (isinstance(part, QLayer) and part.uniform is not None)
    }


def student_of(start: Model, pool: Pool) -> tuple[nn.Module, dict[str, Trainee | Operand]]:
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


def optimizer_of(trainees: dict[str, Trainee | Operand], lr: float, slow: float) -> torch.optim.Optimizer:
    """Adam with the rates of `Course.rounds`; those of the input stage are half of lr."""
    kinds: dict[str, list[nn.Parameter]] = {"V": [], "slow": [], "stage": []}
    for trainee in trainees.values():
        for name, parameter in trainee.named_parameters():
            kinds["V" if name == "V" else "stage" if name in ("stretch", "shift") else "slow"].append(parameter)
    speeds = {"V": lr, "slow": slow * lr, "stage": 0.5 * lr}
    return torch.optim.Adam(
        [{"params": p, "lr": speeds[k], "base": speeds[k]} for k, p in kinds.items() if p], fused=True
    )


def rates_of(steps: int) -> Callable[[int], float]:
    """What multiplies the learning rates in each of so many steps: up to one in the first 50, down along a cosine."""
    return lambda t: min(1.0, (t + 1) / 50) * 0.5 * (1 + math.cos(math.pi * t / max(1, steps)))
