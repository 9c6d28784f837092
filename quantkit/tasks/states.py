"""The states that a policy meets in rollouts: a uniform sample of them, or the sequences that a memory is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quantkit.errors import InputError
from quantkit.model import EnvSpec
from quantkit.seeds import CALIBRATION
from quantkit.tasks.episodes import Actor, Progress, Rollout, rollout


def collect_visits(
    act: Actor,
    spec: EnvSpec,
    n: int,
    *,
    seed: int = CALIBRATION.start,
    episodes: int = 20,
    n_envs: int | None = None,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`n` observations (n, *obs_shape) drawn uniformly, without replacement, from the states of rollouts, and the
    returns and lengths of all their episodes, (played,) float64 and int64.

    At least `episodes` episodes are run, and more in rounds of that many until n states were
    seen. The order is random, so any leading part is a uniform sample as well. Deterministic,
    and independent of `n_envs`: each state has a random key from (seed, episode, step) and the n
    smallest keys win.
    """
    if n < 1:
        raise InputError(f"the number of calibration states must be at least 1, got {n}")
    sample, first = _Sample(n), 0
    played: list[Rollout] = []
    while sample.seen < n:
        sample.streams.clear()
        sample.seed = seed + first
        options: dict[str, Any] = {"n_envs": n_envs, "progress": progress, "record": sample.record}
        played.append(rollout(act, spec, episodes=episodes, seed=seed + first, **options))
        first += episodes
    return sample.best(), np.concatenate([r.returns for r in played]), np.concatenate([r.lengths for r in played])


def collect_sequences(
    act: Actor,
    spec: EnvSpec,
    n: int,
    time: int,
    *,
    seed: int = CALIBRATION.start,
    episodes: int = 20,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a policy with a memory met in rollouts: sequences (n, time, *obs_shape), and the returns and
    lengths of all its episodes, (played,) float64 and int64.

    Episodes are cut into pieces that follow each other, the last of which ends with the episode and may overlap the one
    before; an episode shorter than `time` stays at its last observation. At least `episodes` episodes are run, and more
    in rounds of that many until n pieces were seen; the n are drawn without replacement, in random order.
    Deterministic. Where a piece begins inside of an episode, its reader's memory is empty while the actor's was not.
    """
    if n < 1 or time < 1:
        raise InputError(f"the number of sequences and their length must be at least 1, got {n} and {time}")
    pieces, played = list[np.ndarray](), list[Rollout]()
    first = 0
    while len(pieces) < n:
        kept: dict[int, list[np.ndarray]] = {}

        def record(obs: np.ndarray, numbers: Sequence[int], _: Sequence[int], kept: Any = kept) -> None:
            for row, number in zip(obs.copy(), numbers, strict=True):
                kept.setdefault(number, []).append(row)

        played.append(rollout(act, spec, episodes=episodes, seed=seed + first, progress=progress, record=record))
        for number in sorted(kept):
            met = kept[number]
            for start in sorted({*range(0, max(1, len(met) - time + 1), time), max(0, len(met) - time)}):
                piece = met[start : start + time]
                pieces.append(np.stack(piece + piece[-1:] * (time - len(piece))))
        first += episodes
    chosen = np.random.default_rng([seed, 4]).permutation(len(pieces))[:n]
    states = np.stack([pieces[i] for i in chosen])
    return states, np.concatenate([r.returns for r in played]), np.concatenate([r.lengths for r in played])


class _Sample:
    """The n states with the smallest random keys among all that were shown; holds at most about 2 n."""

    def __init__(self, n: int) -> None:
        self.n, self.seed, self.seen, self.held = n, 0, 0, 0
        self.kept: list[tuple[np.ndarray, np.ndarray]] = []  # states, keys
        self.bound = 1.0  # no key at or above it can still be among the n smallest
        self.streams: dict[int, np.random.Generator] = {}

    def record(self, obs: np.ndarray, numbers: Sequence[int], _steps: Sequence[int]) -> None:
        for number in numbers:
            if number not in self.streams:
                self.streams[number] = np.random.default_rng([self.seed + number, 2])
        keys = np.array([self.streams[number].random() for number in numbers])
        chosen = keys < self.bound
        self.seen += len(numbers)
        self.held += int(chosen.sum())
        self.kept.append((obs[chosen], keys[chosen]))
        if self.held > 2 * self.n + 64:
            self.best()

    def best(self) -> np.ndarray:
        """Forget all but the n best, and return them in order of their keys."""
        states, keys = (np.concatenate(part) for part in zip(*self.kept, strict=True))
        best = np.argsort(keys, kind="stable")[: self.n]
        self.kept, self.held = [(states[best], keys[best])], best.size
        if best.size == self.n:
            self.bound = float(keys[best[-1]])
        return states[best]
