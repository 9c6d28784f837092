"""An environment for recurrent policies in closed loops."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium import spaces


class Drift(gymnasium.Env[np.ndarray, np.ndarray]):
    """Six numbers that drift and are pushed by two actions; 25 steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (6,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=6)
        return self.x.astype(np.float32), {}

    def step(self, action):
        self.x = 0.9 * self.x + 0.3 * self.np_random.normal(size=6) + 0.5 * np.tile(np.clip(action, -1, 1), 3)
        return self.x.astype(np.float32), -float(self.x @ self.x), False, False, {}


gymnasium.register("Drift-v0", Drift, max_episode_steps=25)
