"""What a study costs beside its evaluations, and two processes against one.

    python benchmarks/study_overhead.py [--designs 24] [--episodes 20]

LunarLander (the agent of this repository). `machinery`: seconds of CPU in `quantkit.sweep.complete` beyond those in
evaluating designs (claiming, writing and syncing rows, reading those of others), as a share of the latter. `start`:
seconds until all processes are there, libraries loaded, and each has evaluated a design. `speed`: designs a second
against one process, all in this run, without starting, as a study does that once. On a machine that is busy with other
work seconds are that work's figure, load_1m tells; workers_cpu_s is not: CPU of the processes that evaluate.
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


def workers_cpu() -> float:
    """Seconds of CPU that this process and those that it started, directly or not, have used so far."""
    found: dict[int, tuple[int, float]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        found[int(stat.parent.name)] = (int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
    family = [os.getpid()]
    for parent in family:
        family += [pid for pid, (of, _) in found.items() if of == parent]
    return sum(found[pid][1] for pid in family if pid in found)


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
            common = {"processes": jobs, "designs": len(tasks)}
            with workers(first, jobs) as mapper:
                began, cpu = time.perf_counter(), workers_cpu()
                warm(mapper, tasks[:jobs])
                middle, half = time.perf_counter(), workers_cpu()
                rows.append({"what": "start", **common, "seconds": middle - began, "workers_cpu_s": half - cpu})
                complete(first, tasks, Path(folder) / f"j{jobs}", mapper)
                rows.append({
                    "what": "speed", **common,
                    "seconds": time.perf_counter() - middle, "workers_cpu_s": workers_cpu() - half,
                })  # fmt: skip
    single = next(row["seconds"] for row in rows if row["what"] == "speed")
    names = ("evaluating_cpu_s", "beside_cpu_s", "share", "workers_cpu_s")
    table = []
    for row in rows:
        speed = round(single / row["seconds"], 2) if row["what"] == "speed" else ""
        numbers = {k: f"{row[k]:.4g}" if k in row else "" for k in names}
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
