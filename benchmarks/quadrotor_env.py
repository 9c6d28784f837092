"""The flights of `quadrotors.py` as environments: gymnasium makes `benchmarks.quadrotor_env:Crazyflie-v0`, X500, Race.

An observation is the state (18) and the last action (4), as RAPTOR reads them; an action is four rotor commands,
clipped to [-1, 1]. An episode of 500 steps (5 s) starts up to 90 degrees tilted and ends early 5 m from the goal; a
step's reward is 1 - distance / 5 m, so 500 is a perfect flight. The simulator is the data folder's, `QUADROTOR_DATA` or
../shared/data/quad.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

AIRFRAMES = {"Crazyflie": "crazyflie", "X500": "x500", "Race": "race"}
STEPS, TOO_FAR, START_M = 500, 5.0, 0.5


class Quadrotor(gymnasium.Env[np.ndarray, np.ndarray]):
    """One airframe of the data folder."""

    def __init__(self, airframe: str) -> None:
        data = Path(os.environ.get("QUADROTOR_DATA", "../shared/data/quad"))
        spec = importlib.util.spec_from_file_location("quad_sim", data / "quad_sim.py")
        if spec is None or spec.loader is None or not (data / "quad_sim.py").is_file():
            raise gymnasium.error.Error(f"{data} has no quad_sim.py; set QUADROTOR_DATA to its folder")
        self._sim = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._sim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the simulator leaves its files open
            self._frame = self._sim.from_raptor_json(str(data / "params" / f"{airframe}.json"))
        self.observation_space = spaces.Box(-np.inf, np.inf, (22,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        start = int(self.np_random.integers(2**31)) if seed is None else seed
        self._quad = self._sim.Quad(self._frame, 1, start, max_pos=START_M)
        self._last = np.full(4, self._quad.hover_action)
        return self._observed(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._last = np.clip(action, -1, 1)
        self._quad.step(self._last[None])
        distance = float(np.linalg.norm(self._quad.x))
        return self._observed(), 1 - distance / TOO_FAR, not distance <= TOO_FAR, False, {"distance_m": distance}

    def _observed(self) -> np.ndarray:
        return np.concatenate([self._quad.obs()[0], self._last]).astype(np.float32)


for name, airframe in AIRFRAMES.items():
    gymnasium.register(f"{name}-v0", Quadrotor, max_episode_steps=STEPS, kwargs={"airframe": airframe})
