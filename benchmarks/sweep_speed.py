"""Designs a minute: our sweep, Brevitas layers under SB3's evaluate_policy, Brevitas layers under our rollouts.

    python benchmarks/sweep_speed.py [--designs 60] [--episodes 20] [--jobs 2]

LunarLander (the agent of this repository), all in one run. A design is: quantize, calibrate, 20
episodes, and for ours also hardware cost, fidelity and a durable row. Rates for one process, and
for our sweep with `--jobs` processes, starting them included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from brevitas_policy import BrevitasPolicy, brevitas_network
from report import publish
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from hwmodel.devices import find_device
from quantkit.loading import load_checkpoint
from quantkit.study import Settings, policy_of
from quantkit.sweep import Space, open_study, run
from quantkit.tasks import episodes as episodes_task

AGENT = Path(__file__).parent / "agents" / "ppo" / "LunarLander-v3.zip"
WEIGHTS = ("int3", "int4", "int5", "int6", "int8", "e2m1", "e2m2", "e3m2", "e4m3", "ternary")
ACTS = ("int4", "int6", "int8", "e2m1", "e3m2", "e4m3")


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main(designs: int, episodes: int, jobs: int) -> None:
    """Measure and publish."""
    torch.set_num_threads(1)
    model = load_checkpoint(AGENT)
    policy, spec = policy_of(model)
    settings = Settings(episodes=episodes, device=find_device("xc7a35t"))
    recipes = Space(WEIGHTS, ACTS).recipes()[:designs]
    rows = []

    def add(what: str, count: int, seconds: float, processes: int) -> None:
        row = {"what": what, "processes": processes, "designs": count, "seconds": round(seconds, 2)}
        rows.append(row | {"designs_per_minute": round(60 * count / seconds, 2)})
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        study = open_study(Path(folder) / "a", model, settings)
        add("ours, sweep", len(recipes), timed(lambda: run(study, recipes, Path(folder) / "a", jobs=jobs)), jobs)
        open_study(Path(folder) / "b", model, settings)
        some = recipes[:: max(1, len(recipes) // 12)]
        add("ours, sweep", len(some), timed(lambda: run(study, some, Path(folder) / "b", jobs=1)), 1)
    states = torch.from_numpy(study.states)

    def brevitas() -> BrevitasPolicy:
        return BrevitasPolicy(policy, brevitas_network(policy, states))

    add(
        "Brevitas, our batched rollouts", 1,
        timed(lambda: episodes_task.evaluate(brevitas().act, spec, episodes=episodes, seed=1000)), 1,
    )  # fmt: skip
    env = make_vec_env(spec.id, n_envs=1, seed=1000, env_kwargs=spec.kwargs)
    add(
        "Brevitas, SB3 evaluate_policy", 1,
        timed(lambda: evaluate_policy(brevitas(), env, n_eval_episodes=episodes)), 1,
    )  # fmt: skip
    single = rows[1]["designs_per_minute"]
    for row in rows:
        row["ours_is_faster_by"] = round(single / row["designs_per_minute"], 1) if row["processes"] == 1 else ""
    publish("sweep_speed", rows, packages=("torch", "brevitas", "stable-baselines3", "gymnasium"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--designs", type=int, default=60)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    main(args.designs, args.episodes, args.jobs)
