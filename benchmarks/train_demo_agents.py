"""Train the two agents of the demo with Stable-Baselines3 and save them under benchmarks/agents.

    python benchmarks/train_demo_agents.py [--only NAME]

LunarLander by PPO and Pendulum by SAC, with the hyper-parameters of rl-baselines3-zoo. About
twenty minutes on one core; the saved zips are what `make demo` quantizes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy


@dataclass(frozen=True)
class Args:
    """Command line."""

    only: str | None
    seed: int
    steps: int


def train_lunar_lander(seed: int, steps: int) -> PPO:
    """PPO 8-64-64-4 on LunarLander-v3."""
    model = PPO(
        "MlpPolicy",
        make_vec_env("LunarLander-v3", n_envs=16, seed=seed),
        n_steps=1024,
        batch_size=256,
        n_epochs=4,
        learning_rate=5e-4,
        gamma=0.999,
        gae_lambda=0.98,
        ent_coef=0.01,
        seed=seed,
        device="cpu",
    )
    return model.learn(steps or 1_000_000)


def train_pendulum(seed: int, steps: int) -> SAC:
    """SAC 3-64-64-1 on Pendulum-v1."""
    env = gym.make("Pendulum-v1")
    model = SAC("MlpPolicy", env, learning_rate=1e-3, policy_kwargs={"net_arch": [64, 64]}, seed=seed, device="cpu")
    return model.learn(steps or 15_000)


AGENTS = {"ppo/LunarLander-v3": train_lunar_lander, "sac/Pendulum-v1": train_pendulum}


def main(args: Args) -> None:
    """Train, evaluate and save each agent."""
    torch.set_num_threads(1)
    folder = Path(__file__).parent / "agents"
    for name, train in AGENTS.items():
        if args.only not in (None, name):
            continue
        model = train(args.seed, args.steps)
        path = folder / f"{name}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path, exclude=["ep_info_buffer", "ep_success_buffer", "_last_obs", "_last_original_obs"])
        env = gym.make(path.stem)
        mean, std = evaluate_policy(model, gym.wrappers.RecordEpisodeStatistics(env), n_eval_episodes=20)
        print(f"{path.relative_to(folder)}: {mean:.1f} +- {std:.1f} over 20 episodes, {path.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(AGENTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="training steps; 0 = each agent's own")
    main(Args(**vars(parser.parse_args())))
