"""Episodes whose every action comes from simulated hardware, compared step by step with the integers and the floats.

This is not a command of `hwmodel`, which knows neither policies nor environments.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel.network import reference, trace
from hwmodel.simulate import Simulation
from quantkit.errors import InputError
from quantkit.model import EnvSpec, Model
from quantkit.policy import Policy
from quantkit.rtl_conv import has_convolutions, policy_of
from quantkit.rtl_export import network_of
from quantkit.seeds import EVALUATION_SEED
from quantkit.simulate import compile_policy
from quantkit.tasks.environments import make_env
from quantkit.tasks.episodes import Progress, rollout


@dataclass(frozen=True)
class Flight:
    """Episodes flown by hardware.

    returns, lengths: of the episodes, in order of their seeds; empty if the flight was ended by a difference.
    cycles_min, cycles_max: from the last input beat accepted to out_valid. difference: the first, in words, or None.
    """

    tool: str
    decisions: int
    cycles_min: int
    cycles_max: int
    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    seconds: float
    difference: str | None


class DifferenceError(Exception):
    """Hardware and reference disagree; the message names vector, cycle and signal."""


class Pilot:
    """`act(observations)` from the Verilog in `folder`, every decision checked against the policy it was written from.

    Sums must equal the integer reference, network outputs and actions the Python simulator's, all bit for
    bit; the first that do not raise `DifferenceError`. Use it in a `with` block.

    A recurrent network has one state, so it acts in one environment at a time: observations are (1, *obs_shape) and
    `begin` announces the first one of an episode. Its outputs are those of the integers, `hwmodel.network.reference`.
    """

    def __init__(self, model: Model, folder: Path, tool: str | None = None) -> None:
        self.network, self.host = policy_of(model) if has_convolutions(model) else network_of(model)
        self._forward: Callable[[np.ndarray], np.ndarray] | None = None
        if isinstance(model.module, Policy) and not self.network.recurrent:
            self._forward = compile_policy(model.module)
        self._states, self._first = self.network.states(1), True
        self.rtl = Simulation(folder, tool)
        self.decisions = 0
        self.cycles: list[int] = []
        if json.dumps(self.rtl.network.to_json()) != json.dumps(self.network.to_json()):
            self.rtl.close()
            raise InputError(f"{folder} was not written from this policy; write it again with quantkit rtl")

    def __enter__(self) -> Pilot:
        return self

    def __exit__(self, *_: object) -> None:
        self.rtl.close()

    def outputs(self, obs: np.ndarray) -> np.ndarray:
        """Network outputs (n, outputs) float32 of observations (n, *obs_shape), from the hardware."""
        codes = self.host.codes(obs)
        if self.network.recurrent:
            assert len(obs) == 1
            answer = self.rtl.run(codes, np.array([self._first]))
            self._states = self.network.states(1) if self._first else self._states
            want, self._first = trace(self.network, codes, self._states)[-1], False
        else:
            answer = self.rtl.run(codes)
            want = reference(self.network, codes)
        self._compare("out_sums", answer.sums, want, answer.cycles)
        found = self.host.outputs(answer.sums)
        if self._forward is not None:
            self._compare("output", found, self._forward(obs), answer.cycles)
        self.decisions += len(obs)
        self.cycles += answer.cycles.tolist()
        return found

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions of the observations; of a network that is no policy, its outputs."""
        found = self.outputs(obs)
        return found if self.host.head is None else self.host.head.actions(found)

    def begin(self, _obs: np.ndarray, _episodes: Sequence[int], steps: Sequence[int]) -> None:
        """Before each decision of a rollout: clear the states where an episode begins."""
        self._first = steps[0] == 0

    def _compare(self, signal: str, got: np.ndarray, want: np.ndarray, cycles: np.ndarray) -> None:
        if np.array_equal(got, want):
            return
        row, column = map(int, np.argwhere(got != want)[0])
        raise DifferenceError(
            f"vector {self.decisions + row}, cycle {int(cycles[row])}, {signal}[{column}]: {got[row, column]}, "
            f"but Python has {want[row, column]}"
        )


def _check_fits(model: Model, spec: EnvSpec) -> None:
    """InputError unless the environment gives observations of the network's shape and takes numbers."""
    env = make_env(spec)
    given, wanted, actions = env.observation_space.shape, tuple(model.example.shape[2:]), env.action_space
    env.close()
    if given != wanted:
        raise InputError(f"environment {spec.id!r} gives observations of shape {given}, the network takes {wanted}")
    if actions.shape is None or not np.issubdtype(actions.dtype or np.int64, np.floating):
        raise InputError(f"environment {spec.id!r} takes {actions}; a network that is no policy gives numbers")


def fly(
    model: Model,
    folder: Path,
    env: EnvSpec,
    *,
    episodes: int = 5,
    seed: int = EVALUATION_SEED,
    tool: str | None = None,
    progress: Progress | None = None,
) -> Flight:
    """Play episodes seed, ..., seed + episodes - 1 from the Verilog that `quantkit rtl` wrote into `folder`."""
    began = time.perf_counter()
    difference, returns, lengths = None, (), ()
    if not isinstance(model.module, Policy):
        _check_fits(model, env)
    with Pilot(model, folder, tool) as pilot:
        try:
            alone: dict[str, Any] = {"n_envs": 1, "record": pilot.begin} if pilot.network.recurrent else {}
            result = rollout(pilot.act, env, episodes=episodes, seed=seed, progress=progress, **alone)
            returns, lengths = tuple(result.returns.tolist()), tuple(result.lengths.tolist())
        except DifferenceError as error:
            difference = str(error)
        cycles = pilot.cycles or [0]
        name = pilot.rtl.tool
    seconds = time.perf_counter() - began
    return Flight(name, pilot.decisions, min(cycles), max(cycles), returns, lengths, seconds, difference)
