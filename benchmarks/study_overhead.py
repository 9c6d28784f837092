"""What a study costs beside its evaluations, and two processes against one.

    python benchmarks/study_overhead.py [--designs 24] [--episodes 20]

LunarLander (the agent of this repository). `machinery`: seconds of CPU in `quantkit.sweep.complete` beyond those in
evaluating designs (claiming, writing and syncing rows, reading those of others), as a share of the latter. `speed`:
designs a second against one process, all in this run; starting the processes is not counted, as a study does it once.
On a machine that is busy with other work the second is that work's figure: load_1m tells.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import REPORTS, publish

from hwmodel.devices import find_device
from quantkit.backends import Mapper, workers
from quantkit.loading import load_checkpoint
from quantkit.study import Settings, Study, Task, attempt
from quantkit.sweep import Space, complete, open_study

AGENT = Path(__file__).parent / "agents" / "ppo" / "LunarLander-v3.zip"
WEIGHTS = ("int3", "int4", "int5", "int6", "int8", "e2m1", "e3m2", "ternary")
ACTS = ("int4", "int6", "int8", "e2m1", "e3m2")


def machinery(study: Study, tasks: list[Task], folder: Path) -> dict[str, Any]:
    """Seconds of CPU in this process, in evaluations and beside them."""
    spent = [0.0]

    def mapper(some: Any) -> Any:
        for task in some:
            began = time.process_time()
            row = attempt(study, task)
            spent[0] += time.process_time() - began
            yield task, row

    began, wall = time.process_time(), time.perf_counter()
    complete(study, tasks, folder, mapper)
    total = time.process_time() - began
    row = {"what": "machinery", "processes": 1, "designs": len(tasks), "seconds": time.perf_counter() - wall}
    return row | {"evaluating_cpu_s": spent[0], "beside_cpu_s": total - spent[0], "share": total / spent[0] - 1}


def warm(mapper: Mapper, tasks: list[Task]) -> None:
    """Let every worker start and evaluate something."""
    for _ in mapper(iter(tasks)):
        pass


def main(designs: int, episodes: int) -> None:
    """Measure and publish."""
    torch.set_num_threads(1)
    model, settings = load_checkpoint(AGENT), Settings(episodes=episodes, device=find_device("xc7a35t"))
    tasks = [Task(recipe) for recipe in Space(WEIGHTS, ACTS).recipes()[:designs]]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        first = open_study(Path(folder) / "a", model, settings)
        rows.append(machinery(first, tasks, Path(folder) / "a"))
        for jobs in (1, 2):
            open_study(Path(folder) / f"j{jobs}", model, settings)
            with workers(first, jobs) as mapper:
                warm(mapper, tasks[:jobs])
                began = time.perf_counter()
                complete(first, tasks, Path(folder) / f"j{jobs}", mapper)
                seconds = time.perf_counter() - began
            rows.append({"what": "speed", "processes": jobs, "designs": len(tasks), "seconds": seconds})
    single = rows[1]["seconds"]
    table = []
    for row in rows:
        speed = round(single / row["seconds"], 2) if row["what"] == "speed" else ""
        numbers = {k: f"{row[k]:.4g}" if k in row else "" for k in ("evaluating_cpu_s", "beside_cpu_s", "share")}
        common = {k: row[k] for k in ("what", "processes", "designs")} | {"seconds": round(row["seconds"], 2)}
        table.append(common | numbers | {"speed": speed, "load_1m": round(os.getloadavg()[0], 1)})
    (REPORTS / "studies").mkdir(parents=True, exist_ok=True)
    publish("studies/study_overhead", table, packages=("torch", "gymnasium"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--designs", type=int, default=24)
    parser.add_argument("--episodes", type=int, default=20)
    args = parser.parse_args()
    main(args.designs, args.episodes)
