"""Episodes that races play against a fixed count, for the same answers.

    python benchmarks/racing.py [--episodes 100] [--orders 200]

LunarLander (the agent of this repository), 36 designs: every pair of int2, 3, 4, 5, 6, 8 for weights and inputs, round
to nearest. Each plays all episodes once. A race (`quantkit.racing`) over the same returns, in the order of seeds and in
random orders, tells how many of them it would have played and what it would have said. Answers of the fixed count are
those of the plain paired test at 95 % on all episodes; `opposite` counts designs that one calls non-inferior and the
other inferior, `undecided` those that only the fixed count decides. `choice`: the design with the fewest LUTs that is
called non-inferior.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import REPORTS, publish

from hwmodel.devices import find_device
from quantkit.backends import workers
from quantkit.loading import load_checkpoint
from quantkit.pareto import value
from quantkit.racing import race
from quantkit.results import Row
from quantkit.statistics import non_inferior
from quantkit.study import Settings, Task
from quantkit.sweep import Space, complete, open_study

AGENT = Path(__file__).parent / "agents" / "ppo" / "LunarLander-v3.zip"
FORMATS = ("int2", "int3", "int4", "int5", "int6", "int8")


def raced(reference: np.ndarray, returns: np.ndarray, margin: float) -> tuple[int, str]:
    """Episodes and verdict of a race over known returns."""
    played, verdict = race(reference, lambda first, count: returns[first : first + count], margin)
    return len(played), verdict.verdict


def choice(rows: list[Row], verdicts: list[str]) -> str:
    """The cheapest design of those called non-inferior."""
    good = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict == "non-inferior"]
    best = min(good, key=lambda row: value(row, "luts") or 0.0, default=None)
    return "none" if best is None else f"{best['weights']} x {best['acts']}"


def main(episodes: int, orders: int, work: Path | None) -> None:
    """Measure and publish."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary) / "study"
        study = open_study(folder, load_checkpoint(AGENT), Settings(episodes=episodes, device=find_device("xc7a35t")))
        with workers(study) as mapper:
            rows = complete(study, [Task(recipe) for recipe in Space(FORMATS, FORMATS).recipes()], folder, mapper)
    reference = np.asarray(study.reference.returns)
    returns = [np.asarray(row["score"]["returns"]) for row in rows]
    fixed = [non_inferior(reference, mine, study.margin).verdict for mine in returns]
    rng = np.random.default_rng(0)
    total = episodes * len(rows)
    table: list[dict[str, Any]] = [_row("fixed count", total, total, fixed, fixed, choice(rows, list(fixed)))]
    results = [raced(reference, mine, study.margin) for mine in returns]
    found = [verdict for _, verdict in results]
    table.append(
        _row("raced, order of seeds", sum(n for n, _ in results), total, found, list(fixed), choice(rows, found))
    )
    every, choices = [], Counter[str]()
    for _ in range(orders):
        order = rng.permutation(episodes)
        again = [raced(reference[order], mine[order], study.margin) for mine in returns]
        every += again
        choices[choice(rows, [verdict for _, verdict in again])] += 1
    mean = _row(
        f"raced, mean of {orders} orders", sum(n for n, _ in every) / orders, total,
        [verdict for _, verdict in every], list(fixed) * orders, choices.most_common(1)[0][0], orders,
    )  # fmt: skip
    table.append(mean | {"same_choice": round(choices[choice(rows, list(fixed))] / orders, 3)})
    (REPORTS / "studies").mkdir(parents=True, exist_ok=True)
    publish("studies/racing", table, packages=("torch", "gymnasium"))


def _row(
    what: str, played: float, total: int, verdicts: list[Any], fixed: list[Any], chosen: str, orders: int = 1
) -> dict[str, Any]:
    pairs = Counter(zip(fixed, verdicts, strict=True))
    counts = Counter(verdicts)
    opposite = pairs["inferior", "non-inferior"] + pairs["non-inferior", "inferior"]
    return {
        "what": what, "episodes": round(played), "fewer": round(total / played, 2),
        **{name: round(counts[name] / orders, 2) for name in ("non-inferior", "inferior", "inconclusive")},
        "opposite": round(opposite / orders, 2),
        "undecided": round(
            sum(n for (a, b), n in pairs.items() if a != "inconclusive" and b == "inconclusive") / orders, 2
        ),
        "choice": chosen, "same_choice": 1.0,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--work", type=Path, default=None, help="Keep the study here; run again to go on.")
    args = parser.parse_args()
    main(args.episodes, args.orders, args.work)
