"""Many designs, one durable row each, resumed from the rows.

A study directory holds `study.json` (what the designs share: written once), `rows.jsonl` and `study.lock` (who does
what now). A design whose row is there is not evaluated again; a directory that belongs to another checkpoint, to
other settings or to other code is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from quantkit.backends import Died, Mapper, workers
from quantkit.claims import Claims
from quantkit.errors import InputError
from quantkit.files import check_new, new_file
from quantkit.model import Model
from quantkit.qlayers import LayerPlan
from quantkit.recipe import Recipe, Step, make_plan
from quantkit.results import Row, RowReader, append_row, read_rows, versions
from quantkit.sources import source_digest
from quantkit.specs import layer_shapes
from quantkit.study import Settings, Study, Task, describe_design, design_id, prepare
from quantkit.tasks.accuracy import Labelled
from quantkit.tasks.episodes import Progress, Score

STUDY_VERSION = 1
FAILURES = 3
"""So many designs that fail in the same way stop a study."""
LIBRARIES = ("torch", "numpy", "gymnasium", "mujoco", "box2d")
"""Whose versions can change a row."""
_WAIT_S = 0.05
T = TypeVar("T")


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


def study_origin(
    checkpoint: Path,
    env: str | None,
    normalize: str,
    command: Sequence[str],
    factory: str | None = None,
    calibration: Path | None = None,
    inputs: Path | None = None,
    labels: Path | None = None,
) -> dict[str, Any]:
    """What loads the model of a study again: the checkpoint's absolute path, the options of loading, the command line.

    calibration: as typed, for commands; inputs, labels: absolute, what a network was measured on. Not among the facts
    that must agree: a checkpoint that has moved is the same checkpoint.
    """
    return {
        "path": str(checkpoint.absolute()),
        "env": env,
        "normalize": normalize,
        "factory": factory,
        "calibration": None if calibration is None else str(calibration),
        "inputs": None if inputs is None else str(inputs.absolute()),
        "labels": None if labels is None else str(labels.absolute()),
        "command": shlex.join(["quantkit", *command]),
    }


def describe_study(model: Model, settings: Settings, labelled: Labelled | None = None) -> dict[str, Any]:
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
        "mapping": settings.mapping,
        "labelled": None if labelled is None else digest(labelled.inputs.numpy(), labelled.labels),
        "calibration": None if labelled is None else digest(labelled.calibration.numpy()),
        "also": [target.to_json() for target in settings.also],
        "source": source_digest(),
        "libraries": {name: v for name, v in versions().items() if name in LIBRARIES},
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(facts))  # tuples become lists
    return as_read_back


def digest(*arrays: np.ndarray) -> str:
    """sha256 of the arrays' shapes, types and bytes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def open_study(
    folder: Path,
    model: Model,
    settings: Settings,
    progress: Progress | None = None,
    *,
    origin: Mapping[str, Any] | None = None,
    accept_versions: bool = False,
    labelled: Labelled | None = None,
) -> Study:
    """The study of a directory: read back if it is there and its facts agree, else prepared and written.

    labelled: what a network that is no policy is measured on.
    origin: how to load the model again and what was typed (`study_origin`); kept from the beginning on, never compared.
    accept_versions: go on although libraries have other versions; each row tells those it was made with. Of several
    processes that begin a study at once, one prepares it and the others wait. Raises InputError naming the fact that
    differs, or a directory that holds something else.
    """
    facts = describe_study(model, settings, labelled)

    def begin() -> dict[str, Any]:
        study = prepare(model, settings, progress, labelled)
        with new_file(folder / "calibration.npy", force=True) as path, path.open("wb") as handle:
            np.save(handle, study.states)
        return {
            "margin": study.margin,
            "reference": study.reference.to_json(),
            "random": study.random.to_json(),
            "versions": versions(),
            "layers": layer_shapes(model),
            "origin": None if origin is None else dict(origin),
        }

    def read(document: dict[str, Any]) -> Study:
        scores = [Score(**{k: _tuple(v) for k, v in document[name].items()}) for name in ("reference", "random")]
        states = np.load(folder / "calibration.npy", allow_pickle=False)
        return Study(model, settings, states, scores[0], scores[1], labelled)

    return open_folder(folder, facts, begin, read, accept_versions=accept_versions)


def open_folder(
    folder: Path,
    facts: Mapping[str, Any],
    begin: Callable[[], Mapping[str, Any]],
    read: Callable[[dict[str, Any]], T],
    *,
    accept_versions: bool = False,
) -> T:
    """What `read` makes of a directory's study.json. One that is not there holds the facts and what `begin` tells.

    `begin` may write other files into the directory. Waits and raises as `open_study`.
    """
    path = folder / "study.json"
    if not path.exists():
        begun = ("calibration.npy", "study.lock", ".calibration.", ".study.")  # what a beginning cut short can leave
        if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(begun) for p in folder.iterdir())):
            raise InputError(f"{folder} exists and is not a study; give another output directory")
        check_new(folder, force=True)
        folder.mkdir(exist_ok=True)
        with Claims(folder) as claims:
            claims.wait("")
            if not path.exists():
                document = {"settings": dict(facts), **begin()}
                with new_file(path, force=True) as temporary:
                    temporary.write_text(json.dumps(document, indent=1) + "\n")
    try:
        document = json.loads(path.read_text())
        old = dict(document["settings"])
        found = read(document)
    except (KeyError, TypeError, ValueError, AttributeError, EOFError, FileNotFoundError):
        raise InputError(f"{folder} is a damaged study; start a new study directory") from None
    for key, fresh in facts.items():
        if old.get(key) != fresh:
            _refuse(folder, key, old, fresh, accept_versions)
    return found


def _refuse(folder: Path, key: str, old: dict[str, Any], fresh: Any, accept_versions: bool) -> None:
    """Raise InputError for a fact that differs, unless the study is older than the fact or the user accepts it."""
    if key not in old and (key in ("source", "libraries") or (key, fresh) in (("mapping", "lut"), ("also", []))):
        return
    if key == "libraries":
        names = [name for name in fresh | old[key] if fresh.get(name) != old[key].get(name)]
        changes = ", ".join(f"{name} {old[key].get(name)} there, {fresh.get(name)} here" for name in names)
        if not accept_versions:
            raise InputError(
                f"{folder} was made with other libraries ({changes}); give another output directory, "
                "or --accept-versions to go on: each row tells its versions"
            )
        return
    if key == "source":
        raise InputError(
            f"{folder} was made by other code of quantkit (digest {old[key]} there, {fresh} here), whose rows may "
            "differ; give another output directory, or go back to the version that made it"
        )
    what = "another checkpoint" if "checkpoint" in key else "other settings"
    raise InputError(
        f"{folder} is a study of {what} ({key}: {old.get(key)!r} there, {fresh!r} here); give another output directory"
    )


def _tuple(v: Any) -> Any:
    return tuple(v) if isinstance(v, list) else math.nan if v is None else v


def run(
    study: Study,
    recipes: Sequence[Recipe],
    folder: Path,
    *,
    jobs: int = 1,
    ray: str | None = None,
    progress: Callable[[int, int, Row | None], None] | None = None,
) -> list[Row]:
    """Evaluate the designs whose row is missing; all rows of these recipes in their order.

    jobs, ray: where, see `backends.workers`; at most one process for each missing design. `progress(done, total, row)`
    is called at the start and after each design. Raises as `complete`.
    """
    tasks = [Task(recipe) for recipe in recipes]
    known = {row["id"]: row for row in read_rows(folder / "rows.jsonl") if "failure" not in row}
    missing = len({task.id for task in tasks if not _done(known.get(task.id), task, study)})
    with workers(study, min(jobs, missing), ray if missing else None) as mapper:
        return complete(study, tasks, folder, mapper, progress)


def complete(
    study: Study,
    tasks: Sequence[Task],
    folder: Path,
    mapper: Mapper,
    progress: Callable[[int, int, Row | None], None] | None = None,
    file: str = "rows.jsonl",
) -> list[Row]:
    """The rows of the tasks, in their order: those that are there in the folder's file, and those that are made now.

    Several processes may do this on one folder at once: each design is claimed by one of them, and the others take its
    row when it is there, or its claim when its process died. A design whose worker died is tried once more. Failed
    designs of earlier runs are tried again. A design that was raced plays only the rest of its episodes. Raises
    InputError when `FAILURES` designs failed in the same way, and when a row cannot be written; finished rows are kept.
    """
    wanted = {task.id: task for task in tasks}
    reader = RowReader(folder / file)
    last = {row["id"]: row for row in reader.fresh(tail=True) if row["id"] in wanted}
    known = {name: row for name, row in last.items() if "failure" not in row and _done(row, wanted[name], study)}
    begun = {name: _played(row) for name, row in last.items() if name not in known}
    failures: dict[str, list[Row]] = {}
    deaths: set[str] = set()
    total = len(wanted)

    def note(row: Row) -> None:
        known[row["id"]] = row
        if progress:
            progress(len(known), total, row)

    def catch_up() -> None:
        for row in reader.fresh():
            if (name := row["id"]) in wanted and name not in known and _done(row, wanted[name], study):
                note(row)

    def claimed(todo: Sequence[str]) -> Iterator[Task]:
        """The tasks that this process may do: those that are not done, and that nobody else is doing."""
        for name in todo:
            if name not in known and claims.take(name):
                catch_up()
                if name in known:
                    claims.give(name)
                else:
                    yield replace(wanted[name], known=begun.get(name, ((), ())))

    if progress:
        progress(len(known), total, None)
    with Claims(folder) as claims:
        while todo := [name for name in wanted if name not in known]:
            before = len(known)
            for task, outcome in mapper(claimed(todo)):
                if isinstance(outcome, Died):
                    claims.give(task.id)
                    if task.id not in deaths:
                        deaths.add(task.id)
                        continue
                    outcome = describe_design(study, task.recipe) | {
                        "error": f"{outcome.reason}, twice",
                        "failure": "the worker died",
                        "origin": task.origin,
                    }
                append_row(folder / file, outcome)
                claims.give(task.id)
                note(outcome)
                if kind := outcome.get("failure"):
                    _stop_after(failures, kind, outcome)
            catch_up()
            if len(known) == before:
                time.sleep(_WAIT_S)  # all that is left is being done elsewhere
    return [known[task.id] for task in tasks]


def _done(row: Row | None, task: Task, study: Study) -> bool:
    """Whether the row answers the task: one whose race ended early does not answer for all episodes."""
    return row is not None and (task.race or row.get("episodes", study.settings.episodes) >= study.settings.episodes)


def _played(row: Row) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Returns and lengths of the episodes of a row whose race ended early."""
    score = row.get("score") or {"returns": (), "lengths": ()}
    return tuple(score["returns"]), tuple(score["lengths"])


def _stop_after(failures: dict[str, list[Row]], kind: str, row: Row) -> None:
    alike = failures.setdefault(kind, [])
    alike.append(row)
    if len(alike) == FAILURES:
        raise InputError(
            f"{FAILURES} designs failed alike, so the study stops ({kind}): {row['error']}; "
            "finished designs are kept: run the same command again when the cause is mended"
        )
