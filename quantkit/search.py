"""Search for the front of return against cost: seeded by allocation, led by Optuna, thrifty with episodes.

1. Sensitivities of every pipeline are measured (`sensitivity`), and the front of mixed precision under the budgets is
   allocated (`allocate`). Its designs are the first, with the predicted front of uniform precision, which is there to
   be beaten.
2. Batch after batch, half of the designs are allocated where the front of returns found so far has its widest gaps,
   and the others are Optuna's (NSGA-II or TPE): formats for each layer, a granularity and a pipeline. Of these more are
   proposed than evaluated: those whose predicted cost is over a budget, or whose predicted loss and cost most others
   beat, are dropped before an episode is played.
3. Returns are raced (`racing`): what is clearly worse, or clearly as good, stops early.
4. Of what is on the front then, returns are completed to all episodes, until the front has only complete ones.

Everything is a function of the study, the space and the seed: which designs are proposed depends on rows of whole
batches only, never on who made them or how fast. So a search that was killed goes on by going through the same
proposals again and finding their rows there, several processes share one, and all back ends give the same rows.
Optuna's storage is a record of the trials, written after each batch, and not what a search goes on from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hwmodel.packing import WIDE_PORT
from quantkit.allocate import RESOURCES, Problem, allocate, budget_front, default_latency, problem
from quantkit.backends import Mapper
from quantkit.claims import Claims
from quantkit.errors import InputError
from quantkit.pareto import front, nondominated, value
from quantkit.racing import race
from quantkit.recipe import Recipe, Step, step_text
from quantkit.results import Row
from quantkit.sensitivity import Cell, assemble, measure
from quantkit.study import Study, Task, design_id
from quantkit.surrogate import Prediction, predict
from quantkit.sweep import complete
from quantkit.tasks.episodes import Progress

Sampler = Literal["nsga2", "tpe"]
PROPOSALS = 4
"""So many designs are proposed for each that is evaluated."""
_IDLE = 10
"""So many batches without a new design end a search: the space is used up."""


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen: formats of weights and inputs for each layer, one granularity and one pipeline for all."""

    weights: tuple[str, ...]
    acts: tuple[str, ...]
    granularities: tuple[str, ...] = ("row",)
    pipelines: tuple[tuple[Step, ...], ...] = ((),)
    seed: int = 0


@dataclass(frozen=True)
class Limits:
    """What a design may use at most, by resource of `quantkit.allocate`."""

    budgets: Mapping[str, float]

    def over(self, row: Mapping[str, Any]) -> bool:
        """Whether a row, or a prediction of one, is over a budget, or has no number where it needs one."""
        for name, most in self.budgets.items():
            found = value(row, name)
            if found is None or found > most:
                return True
        return False


Tables = list[dict[tuple[str, str, str, str], Cell]]
"""For each pipeline the cells by layer, formats of weights and inputs, and granularity."""
Seed = tuple[Recipe, tuple[Cell, ...]]
Programs = list[tuple[Problem, dict[str, float]]]
"""For each pipeline what `allocate` takes."""
Update = Callable[[int, int, Row | None], None]


def search(
    study: Study,
    folder: Path,
    space: SearchSpace,
    mapper: Mapper,
    *,
    designs: int,
    episodes: int | None = None,
    sampler: Sampler = "nsga2",
    cost: str = "luts",
    budgets: Mapping[str, float] | None = None,
    batch: int = 16,
    points: int = 12,
    races: bool = True,
    storage: str | None = None,
    measuring: Progress | None = None,
    progress: Update | None = None,
) -> list[Row]:
    """Rows of the designs that were tried, in order: the allocation's first, then at most `designs` in all.

    episodes: once so many were played, no more designs are proposed; None: no bound. cost: the resource that is traded
    for return. budgets: on all resources. batch: designs at once, on which the result depends. points: at most of each
    front to begin with, allocated and uniform, for each pipeline. storage: URL for Optuna's record, None for a journal
    file in the folder. Designs of which the front needs complete returns are played to their end at last, and count
    once. Raises InputError for formats that fit no layer, impossible budgets, a storage that cannot be opened, and as
    `complete`.
    """
    limits = Limits(dict(budgets or {}))
    _check(study, cost, limits)
    open_storage(storage, folder)  # what cannot be opened is told before anything is measured
    tables, seeds, programs = _seeds(study, folder, space, cost, limits, points, measuring)
    seeds = seeds[:designs]
    settled: dict[str, Row] = {}

    def evaluate(recipes: Sequence[Recipe], origin: Any, raced: bool) -> None:
        tasks = [Task(recipe, origin, raced) for recipe in recipes]

        def update(done: int, _total: int, row: Row | None) -> None:
            if progress and row is not None:
                progress(min(len(settled) + done, designs), designs, row)

        for row in complete(study, tasks, folder, mapper, update):
            settled[row["id"]] = row

    evaluate([recipe for recipe, _ in seeds], "allocation", races)
    guide = _Guide(study, space, tables, limits, cost, sampler, batch, races, programs)
    guide.begin(seeds, settled)
    idle = 0
    while len(settled) < designs and idle < _IDLE and (episodes is None or guide.played(settled) < episodes):
        chosen = guide.ask(settled, designs - len(settled))
        idle = 0 if chosen else idle + 1
        evaluate(chosen, "search", races)
        guide.tell(settled)
        _record(storage, space, guide.study, folder)
    for _ in range(4):  # completing a return may bring another design to the front
        rows = list(settled.values())
        raced = [rows[i] for i in front(paired(study, rows), cost, "mean") if _short(rows[i], study)]
        if not raced:
            break
        by_origin = itertools.groupby(sorted(raced, key=lambda row: row["origin"]), key=lambda row: row["origin"])
        for origin, some in by_origin:
            evaluate([Recipe.from_json(row["recipe"]) for row in some], origin, False)
    return list(settled.values())


def paired(study: Study, rows: Sequence[Row]) -> list[Row]:
    """The rows with mean returns that compare: float mean plus mean paired difference, where only some were played.

    Episodes differ more from each other than policies do, so means over different episodes would not compare.
    """
    found = []
    for row in rows:
        if "score" in row and _short(row, study):
            mean = study.reference.mean + row["verdict"]["diff_mean"]
            row = row | {"score": row["score"] | {"mean": mean}}
        found.append(row)
    return found


def _short(row: Mapping[str, Any], study: Study) -> bool:
    return row.get("episodes", study.settings.episodes) < study.settings.episodes


def _check(study: Study, cost: str, limits: Limits) -> None:
    for name in (cost, *limits.budgets):
        if name not in RESOURCES:
            raise InputError(f"unknown resource {name!r}; accepted: {', '.join(RESOURCES)}")
        if study.settings.device is None and name != "weight_kib":
            raise InputError(f"{name} needs a device to be known; without one there is weight_kib")


def _seeds(
    study: Study,
    folder: Path,
    space: SearchSpace,
    cost: str,
    limits: Limits,
    points: int,
    measuring: Progress | None,
) -> tuple[Tables, list[Seed], Programs]:
    """The cells of each pipeline, and what to begin with: allocated and uniform fronts, in turns of the pipelines."""
    tables: Tables = []
    fronts: list[list[Seed]] = []
    programs: Programs = []
    for steps in space.pipelines:
        cells = measure(study, folder, space.weights, space.acts, space.granularities, steps, measuring)
        tables.append({(c.layer, c.weights, c.acts, c.granularity): c for options in cells.values() for c in options})
        allowed = dict(limits.budgets)
        if study.settings.device is not None and (latency := default_latency(cells)) is not None:
            wanted = study.settings.latency_us or latency
            allowed["latency_us"] = min(wanted, allowed.get("latency_us", wanted))
            allowed |= {} if study.settings.luts is None else {"luts": study.settings.luts}
        part = study.settings.device
        port = WIDE_PORT[part.family] if part is not None and study.settings.mapping == "dsp" else None
        given = problem(cells, on={cost, *allowed}, port=port)
        programs.append((given, allowed))
        chosen = [point.cells for point in budget_front(given, cost, allowed, points)]
        chosen += _uniform_front(study, cells, limits, cost)[:points]
        fronts.append([(assemble(some, steps, space.seed), some) for some in chosen])
    turns = [seed for group in itertools.zip_longest(*fronts) for seed in group if seed is not None]
    return tables, list({design_id(recipe): (recipe, cells) for recipe, cells in turns}.values()), programs


def _uniform_front(
    study: Study, cells: Mapping[str, Sequence[Cell]], limits: Limits, cost: str
) -> list[tuple[Cell, ...]]:
    """Of the designs with one pair of formats for all layers, those on the predicted front of loss against cost."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in itertools.chain.from_iterable(cells.values()):
        groups.setdefault((cell.weights, cell.acts, cell.granularity), []).append(cell)
    whole = [tuple(group) for group in groups.values() if len(group) == len(cells)]
    guesses = [predict(group, study.settings) for group in whole]
    known = [i for i, guess in enumerate(guesses) if not limits.over(guess.row) and guess.cost(cost) is not None]
    points = [(guesses[i].cost(cost) or 0.0, guesses[i].loss) for i in known]
    return [whole[known[i]] for i in nondominated(points, (False, False))]


class _Guide:
    """Optuna's side of a search: proposals, and what became of them. One instance lives as long as its search."""

    def __init__(
        self,
        study: Study,
        space: SearchSpace,
        tables: Tables,
        limits: Limits,
        cost: str,
        sampler: Sampler,
        batch: int,
        races: bool,
        programs: Programs,
    ) -> None:
        optuna = _optuna()
        self.model, self.space, self.tables, self.limits = study, space, tables, limits
        self.cost, self.batch, self.races, self.programs = cost, batch, races, programs
        self.layers = list(study.model.layers())
        if sampler == "nsga2":
            chosen: Any = optuna.samplers.NSGAIISampler(population_size=batch, seed=space.seed)
        else:
            chosen = optuna.samplers.TPESampler(n_startup_trials=batch, multivariate=True, seed=space.seed)
        self.study = optuna.create_study(sampler=chosen, directions=["minimize", "maximize"])
        self.asked: list[tuple[Any, str | None]] = []
        self.worst = 1e12
        self.seen: dict[str, Prediction] = {}

    def begin(self, seeds: Sequence[Seed], rows: Mapping[str, Row]) -> None:
        """Tell the designs that were there before the first proposal."""
        self._suggest(seeds)
        self.tell(rows)

    def _suggest(self, seeds: Sequence[Seed]) -> Sequence[Seed]:
        """The designs, made trials of Optuna's."""
        for recipe, cells in seeds:
            self.study.enqueue_trial(self._params(recipe, cells))
        for recipe, cells in seeds:
            trial, name = self.study.ask(), design_id(recipe)
            self._draw(trial)
            self.asked.append((trial, name))
            self.seen[name] = predict(cells, self.model.settings)
        return seeds

    def _between(self, rows: Mapping[str, Row]) -> list[Seed]:
        """Up to half a batch of new designs allocated in the gaps of the front found so far, the widest first.

        A gap is as wide as the logarithm of its costs' ratio times its returns' difference.
        """
        good = [row for row in rows.values() if "score" in row and not self.limits.over(row)]
        points = [(cost, self._shown(row)[1], row) for row in good if (cost := value(row, self.cost))]
        ends = sorted(
            (points[i] for i in nondominated([(c, mean) for c, mean, _ in points], (False, True))), key=lambda p: p[0]
        )
        gaps = sorted(itertools.pairwise(ends), key=lambda ab: -math.log(ab[1][0] / ab[0][0]) * (ab[1][1] - ab[0][1]))
        texts = [pipeline_text(steps) for steps in self.space.pipelines]
        found: dict[str, Seed] = {}
        for (low, _, _), (high, _, row) in gaps:
            index = texts.index(row["steps"]) if row["steps"] in texts else 0
            given, allowed = self.programs[index]
            for share in (0.5, 0.25, 0.75):
                try:
                    cells = allocate(given, {**allowed, self.cost: low ** (1 - share) * high**share}).cells
                except InputError:
                    continue
                recipe = assemble(cells, self.space.pipelines[index], self.space.seed)
                if (name := design_id(recipe)) not in rows and name not in found:
                    found[name] = (recipe, cells)
                    break
            if len(found) >= self.batch // 2:
                break
        return list(found.values())

    def ask(self, rows: Mapping[str, Row], most: int) -> list[Recipe]:
        """The designs to evaluate next, at most a batch and `most`: none that has a row."""
        allocated = [recipe for recipe, _ in self._suggest(self._between(rows)[:most])]
        found: dict[str, tuple[Recipe, Prediction]] = {}
        for _ in range(PROPOSALS * self.batch):
            trial = self.study.ask()
            cells, steps = self._draw(trial)
            if cells is None:  # a format or granularity that a layer cannot have
                self.asked.append((trial, None))
                continue
            recipe = assemble(cells, steps, self.space.seed)
            name = design_id(recipe)
            if name not in self.seen:
                self.seen[name] = predict(cells, self.model.settings)
            self.asked.append((trial, name))
            if name not in rows and not self.limits.over(self.seen[name].row) and recipe not in allocated:
                found[name] = (recipe, self.seen[name])
        best = sorted(found, key=lambda name: (self._beaten(found[name][1], rows), name))
        return [*allocated, *(found[name][0] for name in best)][: min(self.batch, most)]

    def tell(self, rows: Mapping[str, Row]) -> None:
        """What became of all that was asked: values of those with a row, the others count as not tried."""
        import optuna

        for trial, name in self.asked:
            row = rows.get(name or "")
            if row is None:
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            trial.set_user_attr("design", name)
            cost = value(row, self.cost)
            if cost is None or "score" not in row or self.limits.over(row):
                self.study.tell(trial, [self.worst, self.model.random.mean])
            else:
                self.study.tell(trial, [cost, self.model.reference.mean + self._shown(row)[1]])
        self.asked.clear()

    def played(self, rows: Mapping[str, Row]) -> int:
        """Episodes of the rows, as they were when they were told."""
        return sum(self._shown(row)[0] for row in rows.values() if "score" in row)

    def _shown(self, row: Row) -> tuple[int, float]:
        """Episodes and mean paired difference that count: in races those of the race, though it was completed since.

        So that what is proposed does not depend on which returns an earlier run completed.
        """
        returns, reference = np.asarray(row["score"]["returns"]), np.asarray(self.model.reference.returns)
        if self.races:
            returns, _ = race(reference, lambda first, count: returns[first : first + count], self.model.margin)
        return len(returns), float((returns - reference[: len(returns)]).mean())

    def _beaten(self, one: Prediction, rows: Mapping[str, Row]) -> int:
        """How many evaluated designs are predicted to cost no more and to lose no more."""
        cost = one.cost(self.cost)
        known = [self.seen[name] for name in rows if name in self.seen]
        costs = [(other.cost(self.cost), other.loss) for other in known]
        return sum(c is not None and cost is not None and c <= cost and loss <= one.loss for c, loss in costs)

    def _draw(self, trial: Any) -> tuple[list[Cell] | None, tuple[Step, ...]]:
        """The cells and the steps that a trial's parameters stand for; None for cells that do not exist."""
        index = 0
        if len(self.space.pipelines) > 1:
            texts = [pipeline_text(steps) for steps in self.space.pipelines]
            index = texts.index(trial.suggest_categorical("steps", texts))
        granularity = self.space.granularities[0]
        if len(self.space.granularities) > 1:
            granularity = trial.suggest_categorical("granularity", self.space.granularities)
        keys = [
            (
                layer,
                trial.suggest_categorical(f"{layer} weights", self.space.weights),
                trial.suggest_categorical(f"{layer} inputs", self.space.acts),
                granularity,
            )
            for layer in self.layers
        ]
        found = [self.tables[index].get(key) for key in keys]  # type: ignore[call-overload]
        cells = [cell for cell in found if cell is not None]
        return (cells if len(cells) == len(found) else None), self.space.pipelines[index]

    def _params(self, recipe: Recipe, cells: Sequence[Cell]) -> dict[str, Any]:
        """The parameters of an allocated design; a mix of granularities is told as that of its first layer."""
        params: dict[str, Any] = {}
        if len(self.space.pipelines) > 1:
            params["steps"] = pipeline_text(recipe.steps)
        if len(self.space.granularities) > 1:
            params["granularity"] = cells[0].granularity
        for cell in cells:
            params |= {f"{cell.layer} weights": cell.weights, f"{cell.layer} inputs": cell.acts}
        return params


def pipeline_text(steps: tuple[Step, ...]) -> str:
    """The text of a pipeline as rows have it."""
    return "+".join(step_text(step) for step in steps) or "rtn"


# --- Optuna's storage -----------------------------------------------------------------------------


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise InputError('Optuna is not installed; pip install "quantkit[study]"') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_storage(url: str | None, folder: Path) -> Any:
    """Optuna's storage at a URL (sqlite:///FILE, postgresql://..., journal:FILE), None for a journal in the folder.

    InputError in one line if it cannot be opened.
    """
    _optuna()
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if url is None or url.startswith("journal:"):
            path = folder / "optuna.journal" if url is None else Path(url.removeprefix("journal:"))
            return JournalStorage(JournalFileBackend(str(path)))
        return RDBStorage(url)
    except Exception as error:  # whatever the database's driver raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--storage {url}: cannot be opened ({reason}); accepted: sqlite:///FILE, postgresql://USER@HOST/NAME, "
            "journal:FILE"
        ) from None


def _record(url: str | None, space: SearchSpace, done: Any, folder: Path) -> None:
    """Write the trials that the storage lacks, under a name of the folder, the sampler and the seed.

    A journal of the study's own that a kill has damaged is begun anew: it is a record of what is known anyway.
    """
    name = f"{folder.resolve().name}-{type(done.sampler).__name__}-{space.seed}"
    with Claims(folder) as claims:
        claims.wait("")
        try:
            _add_trials(open_storage(url, folder), name, done)
        except Exception as error:  # whatever the database's driver raises
            if isinstance(error, InputError):
                raise
            if url is not None:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise InputError(f"--storage {url}: cannot be written ({reason}); finished designs are kept") from None
            (folder / "optuna.journal").unlink(missing_ok=True)
            _add_trials(open_storage(url, folder), name, done)


def _add_trials(storage: Any, name: str, done: Any) -> None:
    import optuna

    finished = [t for t in done.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    kept = optuna.create_study(
        storage=storage, study_name=name, directions=["minimize", "maximize"], load_if_exists=True
    )
    there = {trial.user_attrs.get("design") for trial in kept.get_trials(deepcopy=False)}
    for trial in finished:
        if trial.user_attrs.get("design") not in there:
            kept.add_trial(trial)
            there.add(trial.user_attrs.get("design"))
