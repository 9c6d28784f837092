"""Float returns of real rl-zoo agents against the published figures of the same episodes.

    python benchmarks/rl_zoo_returns.py --data FOLDER

FOLDER holds agents in rl-zoo layout (algo/Env_1/Env.zip). 20 episodes, seeds from 1000.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from report import publish

from quantkit.loading import load_checkpoint
from quantkit.study import policy_of
from quantkit.tasks.episodes import evaluate_policy

# (mean, std) measured once with stable-baselines3's own predict on the same 20 episodes.
EXPECTED = {
    "ppo/CartPole-v1_1": (500.0, 0.0),
    "ppo/LunarLander-v2_1": (239.9, 28.2),
    "trpo/LunarLanderContinuous-v2_1": (263.8, 19.1),
    "a2c/BipedalWalker-v3_1": (301.4, 0.8),
    "ppo/BipedalWalkerHardcore-v3_1": (113.2, 101.9),
    "dqn/Acrobot-v1_1": (-76.5, 14.5),
    "dqn/MountainCar-v0_1": (-106.3, 7.8),
    "sac/Pendulum-v1_1": (-153.1, 78.1),
    "ars/Hopper-v3_1": (3295, 6),
    "ppo/Hopper-v3_1": (2438, 4),
    "sac/HalfCheetah-v3_1": (9397, 95),
    "ppo/Swimmer-v3_1": (268.7, 5.6),
}


def main(data: Path, episodes: int) -> None:
    """Load and evaluate every agent; a row each."""
    rows = []
    for name, (mean, std) in EXPECTED.items():
        began = time.perf_counter()
        model = load_checkpoint(data / name)
        policy, spec = policy_of(model)
        score = evaluate_policy(policy, spec, episodes=episodes, seed=1000)
        stderr = std / math.sqrt(20)
        rows.append(
            {
                "agent": name,
                "env": spec.id,
                "return": round(score.mean, 2),
                "stderr": round(score.stderr, 2),
                "expected": mean,
                "expected_stderr": round(stderr, 2),
                "within_stderr": str(abs(score.mean - mean) <= max(stderr, 0.5)),
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
        print(rows[-1], flush=True)
    publish("rl_zoo_returns", rows, packages=("torch", "gymnasium", "mujoco"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with algo/Env_1/Env.zip")
    parser.add_argument("--episodes", type=int, default=20)
    args = parser.parse_args()
    main(args.data, args.episodes)
