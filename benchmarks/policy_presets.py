"""What the presets keep of an agent's return at 4, 3 and 2 bits of weight and 4 bits of input.

    python benchmarks/policy_presets.py --data FOLDER --work FOLDER

--data holds agents in rl-zoo layout (algo/Env_1/Env.zip). --work keeps one study per agent, so that a run that was cut
off goes on and several runs with other --agents can share the work. 20 episodes from seed 1000 and, where a row says
so, 20 others of the same quantized policy from seed 7000, each in pair with the float policy's; where they do not
decide, twice as many and so on up to 160, each time with so much confidence that all looks together call a policy that
loses the margin non-inferior in at most 5 % of cases (`quantkit.racing.levels`; `level` is that of the look that the
verdict is of). The margin is 5 % of the distance between the float and a random policy; float and return are means over
`episodes`; quantize_seconds are seconds of a processor. With --publish only the rows that are there are published. Rows
of agents, formats and presets that the options leave out stay in the report as they are, so leave out only what gives
the same policies; rows of level 0.95 are older, of one look at 20 episodes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from report import REPORTS, publish

from quantkit.loading import load_checkpoint
from quantkit.model import Calib, Model
from quantkit.presets import PRESETS, preset_steps
from quantkit.racing import levels, looks
from quantkit.recipe import Recipe, quantize, uniform
from quantkit.results import Row, append_row, read_rows
from quantkit.statistics import Verdict, non_inferior, spread
from quantkit.study import Settings, Study, design_id, policy_of, visited_states
from quantkit.sweep import open_study
from quantkit.tasks.episodes import act_of, rollout

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
SEEDS = (1_000, 7_000)
FORMATS = (("int3", "int4"), ("int2", "int4"), ("int4", "int4"))
LOOKS = looks(160, 20)
"""After how many episodes a policy's returns are compared with the float policy's."""


class Episodes:
    """Returns of a policy's episodes from a seed on, played when they are asked for."""

    def __init__(self, model: Model, seed: int) -> None:
        policy, self.spec = policy_of(model)
        self.act, self.seed = act_of(policy), seed
        self.returns: list[float] = []

    def first(self, n: int) -> list[float]:
        """The first n."""
        had = len(self.returns)
        if n > had:
            self.returns += rollout(self.act, self.spec, episodes=n - had, seed=self.seed + had).returns.tolist()
        return self.returns[:n]


def decide(floats: Episodes, quantized: Episodes, margin: float) -> Verdict:
    """The verdict of the first look that decides, or of the last."""
    for n, level in zip(LOOKS, levels(len(LOOKS)), strict=True):
        verdict = non_inferior(floats.first(n), quantized.first(n), margin, level=level)
        if verdict.verdict != "inconclusive":
            break
    return verdict


def recipe(weights: str, acts: str, preset: str) -> Recipe:
    """The design of a preset, or of plain rounding for "rtn"."""
    return uniform(weights, acts, steps=() if preset == "rtn" else preset_steps(preset))


def folders(work: Path, agent: str) -> dict[int, Path]:
    """Where the agent's study of each seed lies."""
    name = agent.replace("/", "_")
    return {seed: work / (name if seed == SEEDS[0] else f"{name}_{seed}") for seed in SEEDS}


def studies(data: Path, work: Path, agent: str, prepare: bool) -> dict[int, tuple[Path, Study]]:
    """The agent's study of each seed, and its folder; without `prepare` only those that are there."""
    model = load_checkpoint(data / agent)
    return {
        seed: (folder, open_study(folder, model, Settings(seed=seed)))
        for seed, folder in folders(work, agent).items()
        if prepare or (folder / "study.json").exists()
    }


def known(folder: Path) -> dict[str, Row]:
    """Rows by id."""
    return {row["id"]: row for row in read_rows(folder / "rows.jsonl")}


def main(data: Path, work: Path, agents: list[str], formats: list[tuple[str, str]], presets: list[str]) -> None:
    """Evaluate what is missing, agent by agent; each design is quantized once and plays the episodes of all seeds."""
    work.mkdir(parents=True, exist_ok=True)
    reference: dict[tuple[str, int], Episodes] = {}
    for preset in presets:
        for weights, acts in formats:
            for agent in agents:
                found, design = studies(data, work, agent, True), recipe(weights, acts, preset)
                name = design_id(design)
                missing = [seed for seed, (folder, _) in found.items() if name not in known(folder)]
                if not missing:
                    continue
                first = found[SEEDS[0]][1]
                began = time.process_time()
                quantized = quantize(first.model, design, Calib(torch.from_numpy(first.states), visit=visited_states))
                seconds = time.process_time() - began
                for seed in missing:
                    folder, study = found[seed]
                    floats = reference.setdefault((agent, seed), Episodes(study.model, seed))
                    played = Episodes(quantized, seed)
                    verdict = decide(floats, played, study.margin)
                    row = {
                        "id": name,
                        "float": floats.first(verdict.n),
                        "returns": played.returns,
                        "verdict": verdict.to_json(),
                        "quantize_seconds": seconds,
                        "diagnostics": quantized.meta["steps"][-1]["diagnostics"],
                    }
                    append_row(folder / "rows.jsonl", row)
                    means = " -> ".join(f"{np.mean(row[key]):.1f}" for key in ("float", "returns"))
                    outcome = f"{means} {verdict.verdict} after {verdict.n}, {seconds:.1f} s"
                    print(agent, weights, acts, preset, seed, outcome, flush=True)


def published() -> list[dict[str, Any]]:
    """Rows of the report as it is, none without one."""
    path = REPORTS / "policy_presets.csv"
    return pd.read_csv(path, comment="#").to_dict("records") if path.exists() else []


def place(row: dict[str, Any]) -> tuple[int, int, int, int]:
    """Where a row of the report belongs."""
    presets = ["rtn", *PRESETS]
    bits = sorted({w for w, _ in FORMATS}, reverse=True)
    return AGENTS.index(row["agent"]), bits.index(row["weights"]), presets.index(row["preset"]), row["seed"]


def table(data: Path, work: Path, agents: list[str], formats: list[tuple[str, str]], presets: list[str]) -> None:
    """Publish every row that is there, in the place of those that the report has of the same agents and designs."""
    rows = []
    for agent in agents:
        found = studies(data, work, agent, False)
        scored = {seed: known(folder) for seed, (folder, _) in found.items()}
        for weights, acts in sorted(formats, reverse=True):
            for preset in presets:
                name = design_id(recipe(weights, acts, preset))
                for seed, (_, study) in found.items():
                    row = scored[seed].get(name)
                    if row is None or "error" in row:
                        continue
                    rows.append(
                        {
                            "agent": agent,
                            "weights": weights,
                            "acts": acts,
                            "preset": preset,
                            "seed": seed,
                            "float": round(float(np.mean(row["float"])), 2),
                            "margin": round(study.margin, 2),
                            "return": round(float(np.mean(row["returns"])), 2),
                            "stderr": round(spread(row["returns"])[1], 2),
                            "episodes": len(row["returns"]),
                            "level": round(row["verdict"]["level"], 4),
                            "verdict": row["verdict"]["verdict"],
                            "quantize_seconds": round(row["quantize_seconds"], 2),
                        }
                    )
    kept = [
        r
        for r in published()
        if not (r["agent"] in agents and r["preset"] in presets and (r["weights"], r["acts"]) in formats)
    ]
    rows = sorted(kept + rows, key=place)
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
    table(args.data, args.work, args.agents, pairs, args.presets)
