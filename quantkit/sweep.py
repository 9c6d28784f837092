"""Many designs over a process pool, one durable row each, resumed from the rows.

A study directory holds `study.json` (what the designs share: written once) and `rows.jsonl`. A
design whose row is there is not evaluated again; a directory that belongs to another
checkpoint or to other settings is refused.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit.errors import InputError
from quantkit.files import check_new, new_file
from quantkit.model import Model
from quantkit.recipe import LayerPlan, Recipe, Step, make_plan
from quantkit.results import Row, append_row, read_rows, versions
from quantkit.study import Settings, Study, design_id, evaluate_design, prepare
from quantkit.tasks.episodes import Progress, Score

STUDY_VERSION = 1


@dataclass(frozen=True)
class Space:
    """The designs of a sweep: the product of four lists, with fixed exceptions for some layers."""

    weights: tuple[str, ...]
    acts: tuple[str, ...]
    granularities: tuple[str, ...] = ("row",)
    pipelines: tuple[tuple[Step, ...], ...] = ((),)
    exceptions: tuple[tuple[str, LayerPlan], ...] = ()
    seed: int = 0

    def recipes(self) -> list[Recipe]:
        """Every design once, in a fixed order. InputError on an unknown format or granularity."""
        found: dict[str, Recipe] = {}
        for w, a, g, steps in itertools.product(self.weights, self.acts, self.granularities, self.pipelines):
            recipe = Recipe((("*", make_plan(w, a, g)), *self.exceptions), steps, self.seed)
            found.setdefault(design_id(recipe), recipe)
        return list(found.values())


def study_origin(checkpoint: Path, env: str | None, normalize: str, command: Sequence[str]) -> dict[str, Any]:
    """What loads the model of a study again: the checkpoint's absolute path, the options of loading, the command line.

    Not among the facts that must agree: a checkpoint that has moved is the same checkpoint.
    """
    return {
        "path": str(checkpoint.absolute()),
        "env": env,
        "normalize": normalize,
        "command": shlex.join(["quantkit", *command]),
    }


def describe_study(model: Model, settings: Settings) -> dict[str, Any]:
    """The facts that must be the same for two rows to be comparable, as JSON values."""
    facts = {
        "study_version": STUDY_VERSION,
        "checkpoint": model.meta.get("source"),
        "checkpoint_sha256": model.meta.get("sha256"),
        "normalizer": (model.meta.get("normalizer") or {}).get("mode"),
        "algo": model.meta.get("algo"),
        "env": None if model.env is None else asdict(model.env),
        "episodes": settings.episodes,
        "seed": settings.seed,
        "device": None if settings.device is None else settings.device.name,
        "latency_us": settings.latency_us,
        "luts": settings.luts,
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(facts))  # tuples become lists
    return as_read_back


def open_study(
    folder: Path,
    model: Model,
    settings: Settings,
    progress: Progress | None = None,
    *,
    origin: Mapping[str, Any] | None = None,
) -> Study:
    """The study of a directory: read back if it is there and its facts agree, else prepared and written.

    origin: how to load the model again and what was typed (`study_origin`); kept from the beginning on, never compared.
    Raises InputError naming the fact that differs, or a directory that holds something else.
    """
    path = folder / "study.json"
    facts = describe_study(model, settings)
    if not path.exists():
        begun = {"calibration.npy"}  # all that a beginning cut short can have left
        if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - begun):
            raise InputError(f"{folder} exists and is not a study; give another output directory")
        check_new(folder, force=True)
        study = prepare(model, settings, progress)
        _write_study(folder, study, facts, origin)
        return study
    try:
        stored = json.loads(path.read_text())
        old = dict(stored["settings"])
        scores = [Score(**{k: _tuple(v) for k, v in stored[name].items()}) for name in ("reference", "random")]
        states = np.load(folder / "calibration.npy", allow_pickle=False)
    except (KeyError, TypeError, ValueError, AttributeError, EOFError, FileNotFoundError):
        raise InputError(f"{folder} is a damaged study; start a new study directory") from None
    for key, fresh in facts.items():
        if old.get(key) != fresh:
            what = "another checkpoint" if "checkpoint" in key else "other settings"
            raise InputError(
                f"{folder} is a study of {what} ({key}: {old.get(key)!r} there, {fresh!r} here); "
                "give another output directory"
            )
    return Study(model, settings, states, *scores)


def _tuple(v: Any) -> Any:
    return tuple(v) if isinstance(v, list) else math.nan if v is None else v


def _write_study(folder: Path, study: Study, facts: dict[str, Any], origin: Mapping[str, Any] | None) -> None:
    folder.mkdir(exist_ok=True)
    document = {
        "settings": facts,
        "margin": study.margin,
        "reference": study.reference.to_json(),
        "random": study.random.to_json(),
        "versions": versions(),
        "origin": None if origin is None else dict(origin),
    }
    with new_file(folder / "calibration.npy", force=True) as path, path.open("wb") as handle:
        np.save(handle, study.states)
    with new_file(folder / "study.json", force=True) as path:
        path.write_text(json.dumps(document, indent=1) + "\n")


def run(
    study: Study,
    recipes: Sequence[Recipe],
    folder: Path,
    *,
    jobs: int = 1,
    progress: Callable[[int, int, Row | None], None] | None = None,
) -> list[Row]:
    """Evaluate the designs whose row is missing; all rows of these recipes in their order.

    jobs: processes; 1 runs in this one. Each works on one core. `progress(done, total, row)` is
    called at the start and after each design.
    """
    path = folder / "rows.jsonl"
    known = {row["id"]: row for row in read_rows(path)}
    wanted = {design_id(recipe): recipe for recipe in recipes}
    missing = [recipe for name, recipe in wanted.items() if name not in known]
    done = len(wanted) - len(missing)
    if progress:
        progress(done, len(wanted), None)
    for row in _rows(study, missing, min(jobs, len(missing))):
        append_row(path, row)
        known[row["id"]] = row
        done += 1
        if progress:
            progress(done, len(wanted), row)
    return [known[design_id(recipe)] for recipe in recipes]


def _rows(study: Study, recipes: Sequence[Recipe], jobs: int) -> Iterator[Row]:
    if jobs <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from (evaluate_design(study, recipe) for recipe in recipes)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with one_thread_per_process(), ProcessPoolExecutor(jobs, context, _start_worker, (study,)) as pool:
        yield from _in_order_of_completion(pool, recipes, jobs)


def _in_order_of_completion(pool: ProcessPoolExecutor, recipes: Iterable[Recipe], jobs: int) -> Iterator[Row]:
    queue = iter(recipes)
    running = {pool.submit(_work, recipe) for recipe in itertools.islice(queue, 2 * jobs)}
    try:
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(_work, recipe) for recipe in itertools.islice(queue, len(finished))}
            for future in finished:
                yield future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process died (out of memory?); finished designs are kept, "
            "run the same command again, with fewer --jobs"
        ) from None
    finally:
        for future in running:
            future.cancel()


class one_thread_per_process:  # noqa: N801  (reads as a statement)
    """Environment in which child processes start with one BLAS thread each."""

    _names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

    def __enter__(self) -> None:
        self._old = {name: os.environ.get(name) for name in self._names}
        os.environ.update(dict.fromkeys(self._names, "1"))

    def __exit__(self, *_: object) -> None:
        for name, old in self._old.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


_study: Study | None = None


def _start_worker(study: Study) -> None:
    global _study
    torch.set_num_threads(1)
    _study = study
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers would wait forever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(recipe: Recipe) -> Row:
    assert _study is not None
    return evaluate_design(_study, recipe)
