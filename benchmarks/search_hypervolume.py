"""Searched mixed precision against uniform precision, at equal numbers of episodes: the hypervolume of both fronts.

    python benchmarks/search_hypervolume.py [AGENT ..] [--data ../shared/data/rl-zoo] [--episodes 40] [--fresh 100]

Uniform: binary, ternary, int2, 3, 4, 6, 8 for the weights and the same, int1 and int5 for the inputs of all layers: 63
designs, all their episodes; those with int1 cannot be built, for the observations are signed. Searched:
`quantkit.search` over the same formats for each layer, with the same methods (preset fast, or round to nearest), device
and latency, and as many episodes: what it played beyond, to complete its front, is not counted. Both fronts are chosen
by those episodes and then measured on fresh ones, so that no design profits from the episodes that chose it.

Hypervolume: what a front dominates in the plane of LUTs and return, up to the LUTs of int8 x int8 (the design that one
starts from), over the logarithm of LUTs, in which halving them counts the same everywhere, and over LUTs themselves.
Downwards it ends at the return of random actions (`random`), or half way from there to the float policy (`half`):
what is below is of no use. Returns above the float policy's count as the float policy's. `ratio_possible` is what a
design with the fewest LUTs of all and the float policy's return would reach (log, random). A table and a picture for
each agent: lander and pendulum (of this repository), and of --data cheetah (SAC) and walker (A2C).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from report import REPORTS, publish

from hwmodel.devices import find_device
from quantkit.backends import workers
from quantkit.loading import load_checkpoint
from quantkit.pareto import front, value
from quantkit.presets import preset_steps
from quantkit.recipe import Recipe, Step
from quantkit.results import Row, read_rows
from quantkit.search import search
from quantkit.search_space import SearchSpace
from quantkit.seeds import CALIBRATION
from quantkit.study import Settings, Study, Task
from quantkit.sweep import Space, complete, open_study

WEIGHTS = ("binary", "ternary", "int2", "int3", "int4", "int6", "int8")
ACTS = ("int1", "binary", "ternary", "int2", "int3", "int4", "int5", "int6", "int8")
Point = tuple[float, float]


def agents(data: Path) -> dict[str, tuple[Path, str]]:
    """Checkpoint and part of each agent."""
    here = Path(__file__).parent / "agents"
    return {
        "lander": (here / "ppo" / "LunarLander-v3.zip", "xc7a35t"),
        "pendulum": (here / "sac" / "Pendulum-v1.zip", "xc7a35t"),
        "cheetah": (data / "sac" / "HalfCheetah-v3_1", "xc7z020"),
        "walker": (data / "a2c" / "BipedalWalker-v3_1", "xc7a35t"),
    }


def hypervolume(points: Sequence[Point], luts: float, worst: float, best: float, log: bool) -> float:
    """Area that (LUTs, return) points dominate left of `luts` and above `worst`, returns cut at `best`.

    >>> hypervolume([(10, 3.0), (20, 9.0), (15, 2.0)], luts=40, worst=1.0, best=5.0, log=False)
    100.0
    """
    scale = math.log2 if log else float
    total, right = 0.0, luts
    level = {x: y for x, y in points if x < luts and y > worst}
    for x in sorted(level, reverse=True):
        top = max(min(y, best) for other, y in level.items() if other <= x)
        total += (scale(right) - scale(x)) * (top - worst)
        right = x
    return total


def fresh(study: Study, rows: Sequence[Row], folder: Path, episodes: int) -> list[Point]:
    """The designs of the rows with returns of episodes that nothing has seen."""
    settings = replace(study.settings, episodes=episodes, seed=CALIBRATION.stop)
    other = open_study(folder, study.model, settings)
    with workers(other) as mapper:
        again = complete(other, [Task(Recipe.from_json(row["recipe"])) for row in rows], folder, mapper)
    return [(value(row, "luts") or 0.0, value(row, "mean") or 0.0) for row in again]


def compare(
    name: str, path: Path, part: str, steps: tuple[Step, ...], episodes: int, fresh_episodes: int, work: Path
) -> list[dict[str, Any]]:
    """A row for each front of one agent, and its picture."""
    work.mkdir(parents=True, exist_ok=True)
    model = load_checkpoint(path)
    settings = Settings(episodes=episodes, device=find_device(part))
    uniform = open_study(work / "uniform", model, settings)
    with workers(uniform) as mapper:
        tasks = [Task(recipe) for recipe in Space(WEIGHTS, ACTS, pipelines=(steps,)).recipes()]
        rows_uniform = complete(uniform, tasks, work / "uniform", mapper)
    budget = sum(row.get("episodes", 0) for row in rows_uniform)
    study = open_study(work / "search", model, settings)
    if not (ended := work / "search" / "ended").exists():
        with workers(study) as mapper:
            space = SearchSpace(WEIGHTS, ACTS, pipelines=(steps,))
            search(study, work / "search", space, mapper, designs=1000, episodes=budget, batch=8)
        ended.touch()
    lines = read_rows(work / "search" / "rows.jsonl")
    totals = list(itertools.accumulate(row.get("played", 0) for row in lines))
    count = sum(total <= budget for total in totals)
    rows_search = list({row["id"]: row for row in lines[:count]}.values())
    played = [budget, totals[count - 1]]
    chosen = []
    for rows in (rows_uniform, rows_search):
        whole = [row for row in rows if row.get("episodes") == episodes]
        chosen.append([whole[i] for i in front(whole, "luts", "mean")])
    points = [fresh(uniform, rows, work / "fresh", fresh_episodes) for rows in chosen]
    reference = json.loads((work / "fresh" / "study.json").read_text())
    best, worst = reference["reference"]["mean"], reference["random"]["mean"]
    eight = next(value(row, "luts") for row in rows_uniform if (row["weights"], row["acts"]) == ("int8", "int8"))
    tried = [sum("score" in row for row in rows) for rows in (rows_uniform, rows_search)]
    found = []
    for i, kind in enumerate(("uniform", "searched")):
        floors = {"random": worst, "half": (worst + best) / 2}
        volumes = {
            f"{scale}_{floor}": [hypervolume(points[j], eight or 0.0, low, best, scale == "log") for j in (0, i)]
            for scale in ("log", "linear")
            for floor, low in floors.items()
        }
        cheapest = min(x for mine in points for x, _ in mine)
        possible = hypervolume([(cheapest, best)], eight or 0.0, worst, best, True) / volumes["log_random"][0]
        near = [x for x, y in points[i] if y >= best - 0.05 * (best - worst)]
        found.append({
            "agent": name, "front": kind, "designs": tried[i], "episodes": played[i],
            "on_front": len(points[i]), "fewest_luts": min(x for x, _ in points[i]),
            "fewest_luts_within_5_percent": min(near, default=""),
            **{f"ratio_{kind_}": round(pair[1] / pair[0], 3) for kind_, pair in volumes.items()},
            "ratio_possible": round(possible, 3), "float_return": round(best, 1), "random_return": round(worst, 1),
        })  # fmt: skip
        print(found[-1], flush=True)
    _draw(name, points, [rows_uniform, rows_search], best, worst, eight or 0.0)
    return found


def _draw(name: str, points: list[list[Point]], rows: list[list[Row]], best: float, worst: float, eight: float) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from quantkit.figures import STYLE, log_costs

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.2))
        for (kind, color), mine, every in zip(
            (("uniform", "#2166ac"), ("searched", "#d6604d")), points, rows, strict=True
        ):
            tried = [(value(r, "luts"), value(r, "mean")) for r in every if value(r, "mean") is not None]
            axes.plot(*zip(*tried, strict=True), ".", color=color, alpha=0.25, markersize=4)
            ordered = sorted(mine)
            tops = [max(y for x, y in ordered if x <= at) for at, _ in ordered]
            axes.step([x for x, _ in ordered] + [eight], [*tops, tops[-1]], where="post", color=color, label=kind)
            axes.plot(*zip(*ordered, strict=True), "o", color=color, markersize=4)
        axes.axhline(best, color="#777777", linewidth=1, linestyle="--")
        axes.text(eight, best, "float", ha="right", va="bottom", color="#777777")
        axes.set(xlabel="LUTs", ylabel="return", title=name)
        log_costs(axes)
        axes.set_ylim(bottom=worst)
        axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(REPORTS / "studies" / f"search_{name}.png")
        plt.close(figure)


def main(names: Sequence[str], data: Path, episodes: int, fresh_episodes: int, plain: bool, work: Path) -> None:
    """Measure and publish."""
    torch.set_num_threads(1)
    (REPORTS / "studies").mkdir(parents=True, exist_ok=True)
    known = agents(data)
    for name in names:
        steps, label = ((), f"{name}_rtn") if plain else (preset_steps("fast"), name)
        rows = compare(label, *known[name], steps, episodes, fresh_episodes, work / label)
        publish(f"studies/search_{label}", rows, packages=("torch", "optuna", "scipy", "gymnasium"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agents", nargs="*", default=["lander"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/rl-zoo"))
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--fresh", type=int, default=100)
    parser.add_argument("--plain", action="store_true", help="Round to nearest in place of preset fast.")
    parser.add_argument("--work", type=Path, default=Path("studies_out"), help="Studies; run again to go on.")
    args = parser.parse_args()
    main(args.agents, args.data, args.episodes, args.fresh, args.plain, args.work)
