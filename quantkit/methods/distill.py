"""Closed-loop distillation: refine a quantized policy until it acts like the float one where it goes itself.

All layers are trained together through their quantizers (`quantkit.course`) on the float network's outputs
(`quantkit.aim`); reward has no part in that. A policy that acts is trained where it goes itself, and its return decides
what is kept (`quantkit.acting`).
A network that does not act is trained on the calibration set alone, the scales of attention's operands included. Of
several rounds the first has a fifteenth of the steps. The others share the rest, each from the best found so far, at
learning rates that fall to a tenth of `lr`: where quantization has cost little, large steps lose more than they find.
Half of their batches are mixtures (`quantkit.mixtures`), which the float network labels: a few hundred inputs alone are
learned by heart. Held-out inputs are few, too: mixtures of them judge as well.

An eighth of the states is held out, and of the model at the start and those at the end of every round that of the
smallest loss on these is kept, where the return does not decide.
"""

from __future__ import annotations

from functools import partial

import torch

from quantkit.acting import best_acting, tour_of
from quantkit.aim import Label, aim
from quantkit.arithmetic import one_thread
from quantkit.contest import Contest
from quantkit.course import Course, Pool, trainable
from quantkit.errors import InputError
from quantkit.model import Calib, Model, float_twin
from quantkit.policy import Policy

CHANGES = frozenset({"refined", "bias"})


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

    rounds: how often the policy acts to find states, `states` of them each time (1: never, only the calibration set is
    used); of a network that does not act, those of the docstring above. lr: of the latent weights, in grid units; it
    falls to zero along a cosine. slow: the rate of scales and biases, in units of lr. laps: how often the `rounds` are
    gone through at most, each time from the smallest loss, while the policy surely earns less than the float one and
    the last lap took a twentieth off that loss. climb: how many steps of the environment `acting.uphill` takes, beside
    those of the contest. Returns the held-out loss before and after, both on the final states, the round whose model
    was kept (0: the start), with visits how much more than the float policy it earned in the contest, and how many
    states there were in the end.
    """
    layers = trainable(model)
    for name, layer in model.qlayers().items():
        if layer.plan.weight is not None and layer.uniform is None:
            raise InputError(f"step 'distill': layer {name!r} has no quantized weight yet; put a step like gptq before")
    if not layers:
        return {"loss_before": 0.0, "loss_after": 0.0, "states": 0.0}
    with one_thread(), torch.no_grad():
        rounds = max(1, rounds)
        visit = calib.visit if rounds > 1 else None
        teacher, start = float_twin(model), model.copy()
        label, loss, known = aim(teacher, calib.inputs, None if visit is None else model.critic)
        pool = Pool.of(calib.inputs, label, known)
        if visit is not None:
            tour = tour_of(visit, states, label)
            (of_teacher, _), (of_start, earned) = tour(teacher, 0), tour(start, 0)
            pool = pool.plus(of_teacher).plus(of_start)
        course = Course.of(start, pool, loss, batch, calib.generator)
        if visit is not None:
            lap = partial(course.rounds, steps, rounds, lr, slow)
            best, report = best_acting(course, lap, tour, Contest(visit, teacher), earned, laps, climb)
        elif rounds > 1 and not isinstance(model.module, Policy):
            best, report = _best_mixed(course, label, steps, rounds, lr, slow)
        else:
            models = [start, *course.rounds(steps, rounds, lr, slow)]
            best, report = _kept(models, [course.error(m) for m in models])
        _copy_into(model, best)
        return report | {"states": float(len(calib.inputs) if visit is None else len(course.pool))}


def _kept(models: list[Model], losses: list[float]) -> tuple[Model, dict[str, float]]:
    """The model of the smallest loss, and the report of `apply`; the first is the start."""
    kept = losses.index(min(losses))
    return models[kept], {"loss_before": losses[0], "loss_after": losses[kept], "round": float(kept)}


def _best_mixed(
    course: Course, label: Label, steps: int, rounds: int, lr: float, slow: float
) -> tuple[Model, dict[str, float]]:
    """`_kept` of the rounds in which a network that does not act is trained."""
    short = steps // 15
    models = [course.start, *course.rounds(short, 1, lr, slow)]
    pool = course.pool = course.pool.plus_mixtures(label, course.generator)
    losses = [course.error(m) for m in models]
    for number in range(rounds - 1):
        best = models[losses.index(min(losses))]
        course = Course.of(best, pool, course.loss, course.batch, course.generator, label)
        rate = lr * 0.1 ** (number / max(1, rounds - 2))
        models += course.rounds((steps - short) // (rounds - 1), 1, rate, slow)
        losses.append(course.error(models[-1]))
    return _kept(models, losses)


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
