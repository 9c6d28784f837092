"""What the presets keep of an agent's return at 4, 3 and 2 bits of weight and 4 bits of input.

    python benchmarks/policy_presets.py --data FOLDER --work FOLDER

--data holds agents in rl-zoo layout (algo/Env_1/Env.zip). --work keeps one study per agent, so that a run that was cut
off goes on and several runs with other --agents can share the work. 20 episodes, seeds from 1000, margin 5 % of the
distance between the float and a random policy. Only rows that are there are published with --publish.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from report import publish

from quantkit.loading import load_checkpoint
from quantkit.presets import PRESETS, preset_steps
from quantkit.recipe import Recipe, uniform
from quantkit.results import read_rows
from quantkit.study import Settings, design_id
from quantkit.sweep import open_study, run

AGENTS = (
    "sac/Pendulum-v1_1",
    "ppo/CartPole-v1_1",
    "dqn/Acrobot-v1_1",
    "dqn/MountainCar-v0_1",
    "ppo/LunarLander-v2_1",
    "trpo/LunarLanderContinuous-v2_1",
    "ars/Hopper-v3_1",
    "ppo/Hopper-v3_1",
    "ppo/Swimmer-v3_1",
    "sac/HalfCheetah-v3_1",
    "a2c/BipedalWalker-v3_1",
    "ppo/BipedalWalkerHardcore-v3_1",
)
FORMATS = (("int3", "int4"), ("int2", "int4"), ("int4", "int4"))


def recipe(weights: str, acts: str, preset: str) -> Recipe:
    """The design of a preset, or of plain rounding for "rtn"."""
    return uniform(weights, acts, steps=() if preset == "rtn" else preset_steps(preset))


def main(data: Path, work: Path, agents: list[str], formats: list[tuple[str, str]], presets: list[str]) -> None:
    """Evaluate what is missing, agent by agent."""
    for preset in presets:
        for weights, acts in formats:
            for agent in agents:
                folder = work / agent.replace("/", "_")
                study = open_study(folder, load_checkpoint(data / agent), Settings())
                row = run(study, [recipe(weights, acts, preset)], folder)[0]
                outcome = row.get("error") or f"{row['score']['mean']:.1f} {row['verdict']['verdict']}"
                took = f"{row.get('quantize_seconds', 0.0):.1f} s"
                print(agent, weights, acts, preset, f"{study.reference.mean:.1f} ->", outcome, took, flush=True)


def table(data: Path, work: Path, formats: list[tuple[str, str]], presets: list[str]) -> None:
    """Publish every row that is there."""
    rows = []
    for agent in AGENTS:
        folder = work / agent.replace("/", "_")
        if not (folder / "study.json").exists():
            continue
        study = open_study(folder, load_checkpoint(data / agent), Settings())
        known = {row["id"]: row for row in read_rows(folder / "rows.jsonl")}
        for weights, acts in sorted(formats, reverse=True):
            for preset in presets:
                row = known.get(design_id(recipe(weights, acts, preset)))
                if row is None or "error" in row:
                    continue
                rows.append(
                    {
                        "agent": agent,
                        "weights": weights,
                        "acts": acts,
                        "preset": preset,
                        "float": round(study.reference.mean, 2),
                        "margin": round(study.margin, 2),
                        "return": round(row["score"]["mean"], 2),
                        "stderr": round(row["score"]["stderr"], 2),
                        "verdict": row["verdict"]["verdict"],
                        "quantize_seconds": round(row["quantize_seconds"], 2),
                    }
                )
    publish("policy_presets", rows, packages=("torch", "gymnasium", "mujoco"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with algo/Env_1/Env.zip")
    parser.add_argument("--work", type=Path, required=True, help="folder for the studies")
    parser.add_argument("--agents", nargs="*", default=list(AGENTS))
    parser.add_argument("--formats", nargs="*", default=["/".join(pair) for pair in FORMATS], metavar="W/A")
    parser.add_argument("--presets", nargs="*", default=["rtn", *PRESETS])
    parser.add_argument("--publish", action="store_true", help="only make the table of what is there")
    args = parser.parse_args()
    pairs = [(w, a) for w, _, a in (text.partition("/") for text in args.formats)]
    if not args.publish:
        main(args.data, args.work, args.agents, pairs, args.presets)
    table(args.data, args.work, pairs, args.presets)
