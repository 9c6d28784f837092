"""How often `quantkit pick --max-loss` takes a design that loses more than it may.

    python benchmarks/promise.py [--episodes 400] [--trials 2000]

LunarLander (the agent of this repository), 27 designs: int2, int3, int4 for weights and inputs, each rounded to
nearest, with GPTQ and with preset fast. Each plays `episodes` episodes once; their mean paired difference to float is
taken for the truth. A trial draws n of the episodes for a study; the designs whose one-sided 95 % bound is within the
loss are looked at from the fewest KiB on, eight at most. `study`: the first is taken. `confirmed`: the first whose
bound is within the loss on n other episodes, drawn anew for each, too; that is what `pick` does. Both are the shares of
trials whose design truly loses more; `none`: nothing was confirmed.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import publish

from quantkit.backends import workers
from quantkit.loading import load_checkpoint
from quantkit.presets import preset_steps
from quantkit.recipe import parse_step
from quantkit.statistics import t_quantile
from quantkit.study import Settings, Task
from quantkit.sweep import Space, complete, open_study

AGENT = Path(__file__).parent / "agents" / "ppo" / "LunarLander-v3.zip"
FORMATS = ("int2", "int3", "int4")
PIPELINES = ((), (parse_step("gptq:act_order=true"), parse_step("bias_correction")), preset_steps("fast", "policy"))
TRIES = 8


def main(episodes: int, trials: int, work: Path | None) -> None:
    """Measure and publish."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary) / "study"
        study = open_study(folder, load_checkpoint(AGENT), Settings(episodes=episodes))
        with workers(study) as mapper:
            tasks = [Task(recipe) for recipe in Space(FORMATS, FORMATS, pipelines=PIPELINES).recipes()]
            rows = complete(study, tasks, folder, mapper)
    returns = np.array([row["score"]["returns"] for row in rows])
    apart, kib = returns - np.asarray(study.reference.returns), np.array([row["weight_kib"] for row in rows])
    span = study.reference.mean - study.random.mean
    table: list[dict[str, Any]] = []
    for percent in (1, 2, 5):
        for n in (20, 40, 100):
            rates = shares(apart, kib, percent / 100 * span, n, trials)
            table.append({"loss": f"{percent}%", "episodes": n, "trials": trials, **rates})
    publish("studies/promise", table, packages=("torch", "gymnasium"))


def shares(apart: np.ndarray, kib: np.ndarray, limit: float, n: int, trials: int) -> dict[str, float]:
    """Shares of trials whose design loses more than `limit`; studies of n of the episodes of apart (designs, all)."""
    rng, beyond = np.random.default_rng(0), apart.mean(axis=1) < -limit
    counts = dict.fromkeys(("study", "confirmed", "none"), 0)
    for _ in range(trials):
        order = rng.permutation(apart.shape[1])
        mine, rest = apart[:, order[:n]], order[n:]
        good = np.flatnonzero(low(mine) >= -limit)
        looked = sorted(good, key=lambda i: (kib[i], -mine[i].mean()))[:TRIES]
        counts["study"] += bool(looked) and bool(beyond[looked[0]])
        taken = next((i for i in looked if low(apart[i, rng.choice(rest, n, replace=False)]) >= -limit), None)
        counts["confirmed"] += taken is not None and bool(beyond[taken])
        counts["none"] += taken is None
    return {name: count / trials for name, count in counts.items()}


def low(apart: np.ndarray) -> np.ndarray:
    """One-sided 95 % lower bounds of means over the last axis, by Student's t."""
    n = apart.shape[-1]
    bound: np.ndarray = apart.mean(axis=-1) - t_quantile(0.95, n - 1) * apart.std(axis=-1, ddof=1) / math.sqrt(n)
    return bound


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--work", type=Path, help="Keep the study here; run again to go on.")
    args = parser.parse_args()
    main(args.episodes, args.trials, args.work)
