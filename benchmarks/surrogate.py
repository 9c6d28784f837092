"""10,000 mixed-precision designs of a policy ranked without an episode, on one core, and the 20 best played.

    python benchmarks/surrogate.py [--designs 10000] [--verify 20] [--episodes 40]

LunarLander (the agent of this repository), preset fast, int2, 3, 4, 5, 6, 8 for the weights and the inputs of each of
its three layers, drawn at random. Seconds: measuring the sensitivities, and predicting loss and cost of all designs and
finding the front of LUTs against loss. Rows: 20 designs spread evenly over that front (and the next one behind it if
it has fewer), as predicted and as evaluated.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import REPORTS, publish

from hwmodel.devices import find_device
from quantkit.backends import workers
from quantkit.loading import load_checkpoint
from quantkit.pareto import nondominated, value
from quantkit.presets import preset_steps
from quantkit.sensitivity import assemble, measure
from quantkit.study import Settings, Task
from quantkit.surrogate import Prediction, predict
from quantkit.sweep import complete, open_study

AGENT = Path(__file__).parent / "agents" / "ppo" / "LunarLander-v3.zip"
FORMATS = ("int2", "int3", "int4", "int5", "int6", "int8")
STEPS = preset_steps("fast")


def ranked(found: list[Prediction], count: int) -> list[int]:
    """Indices of `count` predictions by ascending LUTs: spread evenly over as many fronts as it takes."""
    left, order = list(range(len(found))), list[int]()
    while len(order) < count and left:
        points = [(found[i].cost("luts") or np.inf, found[i].loss) for i in left]
        members = [left[k] for k in nondominated(points, (False, False))]
        order += members
        left = [i for i in left if i not in set(members)]
    order.sort(key=lambda i: found[i].cost("luts") or 0.0)
    return [order[k] for k in np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))]


def main(designs: int, verify: int, episodes: int) -> None:
    """Measure and publish."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "study"
        settings = Settings(episodes=episodes, device=find_device("xc7a35t"))
        study = open_study(folder, load_checkpoint(AGENT), settings)
        clock = [(time.perf_counter(), time.process_time())]
        cells = measure(study, folder, FORMATS, FORMATS, steps=STEPS)
        clock.append((time.perf_counter(), time.process_time()))
        rng = random.Random(0)
        drawn: dict[tuple[Any, ...], list[Any]] = {}
        while len(drawn) < designs:
            chosen = [rng.choice(options) for options in cells.values()]
            drawn.setdefault(tuple((c.weights, c.acts) for c in chosen), chosen)
        picked = list(drawn.values())
        clock.append((time.perf_counter(), time.process_time()))
        found = [predict(chosen, settings) for chosen in picked]
        best = ranked(found, verify)
        clock.append((time.perf_counter(), time.process_time()))
        with workers(study) as mapper:
            tasks = [Task(assemble(picked[i], STEPS), "search") for i in best]
            rows = complete(study, tasks, folder, mapper)
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(clock)]
    head = {
        "designs": designs, "sensitivities_s": round(spans[0][0], 1), "sensitivities_cpu_s": round(spans[0][1], 1),
        "ranking_s": round(spans[2][0], 1), "ranking_cpu_s": round(spans[2][1], 1),
    }  # fmt: skip
    table = []
    for i, row in zip(best, rows, strict=True):
        formats = " ".join(f"{cell.weights}x{cell.acts}" for cell in picked[i])
        table.append({
            "design": formats, "predicted_luts": value(found[i].row, "luts"), "luts": value(row, "luts"),
            "predicted_loss": float(f"{found[i].loss:.3g}"), "kl": float(f"{row['fidelity']['kl']:.3g}"),
            "return": round(row["score"]["mean"], 1), "stderr": round(row["score"]["stderr"], 1),
            "verdict": row["verdict"]["verdict"], **head,
        })  # fmt: skip
    print(head)
    (REPORTS / "studies").mkdir(parents=True, exist_ok=True)
    publish("studies/surrogate", table, packages=("torch", "numpy"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--designs", type=int, default=10_000)
    parser.add_argument("--verify", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=40)
    args = parser.parse_args()
    main(args.designs, args.verify, args.episodes)
