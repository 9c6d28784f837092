"""Search for the front of return against cost: seeded by allocation, thrifty with episodes.

1. Sensitivities of every pipeline are measured (`sensitivity`), and the front of mixed precision under the budgets is
   allocated (`allocate`). Its designs are the first, with the predicted front of uniform precision, which is there to
   be beaten.
2. Batch after batch, designs come from three sources: allocated in the gaps of the front found so far; one layer's
   formats away from a design on it; Optuna's (NSGA-II or TPE). Those that promise to add the most to the front (`gain`)
   by the sum of their layers' losses are quantized and compared with float on the calibration states, which takes
   milliseconds and no episode; those that promise the most by that are played.
3. Returns are raced (`racing`): what is clearly worse, or clearly as good, stops early.
4. Of what is on the front then, returns are completed to all episodes, until the front has only complete ones.

With several hardware targets a design has a cost on each, and plays once: there is a front for each target, and what a
design promises is what it adds to all of them.

Everything is a function of the study, the space and the seed: which designs are proposed depends on rows of whole
batches only, never on who made them or how fast. So a search that was killed goes on by going through the same
proposals again and finding their rows there, several processes share one, and all back ends give the same rows.
Optuna's storage is a record of the trials, written after each batch, and not what a search goes on from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hwmodel.fabric import pricing
from hwmodel.packing import WIDE_PORT
from quantkit.allocate import RESOURCES, Problem, allocate, budget_front, default_latency, problem
from quantkit.backends import Mapper
from quantkit.claims import Claims
from quantkit.errors import InputError
from quantkit.gain import Front, likely
from quantkit.pareto import front, nondominated, value
from quantkit.recipe import Recipe, Step, step_text
from quantkit.results import Row
from quantkit.sensitivity import Cell, assemble, measure, untrained
from quantkit.specs import run_order
from quantkit.study import Study, Task, design_id
from quantkit.surrogate import Prediction, predict
from quantkit.sweep import complete
from quantkit.targets import Target, points
from quantkit.tasks.episodes import Progress

Sampler = Literal["nsga2", "tpe"]
PROPOSALS = 4
"""So many designs Optuna proposes for each that is evaluated."""
SCREENED = 6
"""So many designs are quantized for each that is played."""
_GAPS = 6
"""In so many gaps of a front new designs are allocated."""
_WALK = 256
"""At most so many neighbours of a front's designs are looked at."""
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

    def cost(self, row: Mapping[str, Any], column: str) -> float | None:
        """A column of a row, or of a prediction of one, on its target; None where it has none or is over a budget."""
        found = {name: value(row, name) for name in (column, *self.budgets)}
        over = any((use := found[name]) is None or use > most for name, most in self.budgets.items())
        return None if over else found[column]


@dataclass(frozen=True)
class Candidate:
    """A design that may be played: its cells, one per layer, and the number of its pipeline."""

    recipe: Recipe
    cells: tuple[Cell, ...]
    pipeline: int

    @cached_property
    def id(self) -> str:
        """The id of its row."""
        return design_id(self.recipe)


Tables = list[dict[tuple[str, str, str, str], Cell]]
"""For each pipeline the cells by layer, formats of weights and inputs, and granularity."""
Programs = list[list[tuple[Problem, dict[str, float]]]]
"""For each pipeline and target what `allocate` takes."""
Screen = Callable[[Sequence[Recipe]], Mapping[str, Row]]
"""Rows without episodes, by id."""
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

    episodes: of all designs together, as many are proposed as can be played and completed with so many; None: no bound.
    cost: the resource that is traded for return. budgets: on all resources. batch: designs at once, on which the result
    depends. points: at most of each front to begin with, allocated and uniform, for each pipeline; fewer where there
    are several targets. storage: URL for Optuna's record, None for a journal file in the folder. Designs of which the
    front needs complete returns are played to their end at last, and count once. Raises InputError for formats that fit
    no layer, impossible budgets, a storage that cannot be opened, and as `complete`.
    """
    limits = Limits(dict(budgets or {}))
    _check(study, cost, limits)
    check_storage(storage, folder)  # what cannot be opened is told before anything is measured
    tables, seeds, programs = _seeds(study, folder, space, cost, limits, points, measuring)
    settled: dict[str, Row] = {}

    def evaluate(recipes: Sequence[Recipe], origin: Any, raced: bool) -> None:
        tasks = [Task(recipe, origin, raced) for recipe in recipes]

        def update(done: int, _total: int, row: Row | None) -> None:
            if progress and row is not None:
                progress(min(len(settled) + done, designs), designs, row)

        for row in complete(study, tasks, folder, mapper, update):
            settled[row["id"]] = row

    def screen(recipes: Sequence[Recipe]) -> Mapping[str, Row]:
        rows = complete(study, [Task(recipe, screen=True) for recipe in recipes], folder, mapper, file="screened.jsonl")
        return {row["id"]: row for row in rows}

    guide = _Guide(study, space, tables, limits, cost, sampler, batch, races, programs, screen)
    first = guide.affordable(seeds[:designs], episodes)
    evaluate([seed.recipe for seed in first], "allocation", races)
    guide.begin(first, settled)
    idle = 0
    while len(settled) < designs and idle < _IDLE and (most := guide.affordable_now(settled, episodes)) > 0:
        chosen = guide.ask(settled, min(designs - len(settled), most))
        idle = 0 if chosen else idle + 1
        evaluate([one.recipe for one in chosen], "search", races)
        guide.tell(settled)
        _record(storage, space, guide.study, folder)
    for _ in range(4):  # completing a return may bring another design to the front
        rows = list(settled.values())
        raced = [rows[i] for i in _on_fronts(study, paired(study, rows), cost) if _short(rows[i], study)]
        if not raced:
            break
        by_origin = itertools.groupby(sorted(raced, key=lambda row: row["origin"]), key=lambda row: row["origin"])
        for origin, some in by_origin:
            evaluate([Recipe.from_json(row["recipe"]) for row in some], origin, False)
    return list(settled.values())


def _on_fronts(study: Study, rows: Sequence[Row], cost: str) -> list[int]:
    """Indices of the rows on the front of at least one target."""
    every = [points(row) for row in rows]
    found = [front([on[min(place, len(on) - 1)] for on in every], cost, "mean") for place in range(_places(study))]
    return sorted(set(itertools.chain.from_iterable(found)))


def _places(study: Study) -> int:
    """How many fronts there are."""
    return max(1, len(study.settings.targets))


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
    most: int,
    measuring: Progress | None,
) -> tuple[Tables, list[Candidate], Programs]:
    """The cells of each pipeline, and what to begin with: allocated and uniform fronts, in turns of the pipelines."""
    tables: Tables = []
    fronts: list[list[Candidate]] = []
    programs: Programs = []
    targets = study.settings.targets or (None,)
    each = max(4, most // len(targets)) if len(targets) > 1 else most
    for number, steps in enumerate(space.pipelines):
        cells = measure(study, folder, space.weights, space.acts, space.granularities, steps, measuring)
        tables.append({(c.layer, c.weights, c.acts, c.granularity): c for options in cells.values() for c in options})
        programs.append([_program(cells, cost, limits, target) for target in targets])
        for place, (given, allowed) in enumerate(programs[-1]):
            chosen = [point.cells for point in budget_front(given, cost, allowed, each)]
            chosen += _uniform_front(study, cells, limits, cost, place)[:each]
            fronts.append([Candidate(assemble(some, steps, space.seed), some, number) for some in chosen])
    turns = [seed for group in itertools.zip_longest(*fronts) for seed in group if seed is not None]
    return tables, list({seed.id: seed for seed in turns}.values()), programs


def _program(
    cells: Mapping[str, Sequence[Cell]], cost: str, limits: Limits, target: Target | None
) -> tuple[Problem, dict[str, float]]:
    """What `allocate` takes for one target: options with their costs there, and what they may take at most."""
    allowed = dict(limits.budgets)
    if target is None:
        return problem(cells, on={cost, *allowed}), allowed
    with pricing(target.device.family):
        if (latency := default_latency(cells)) is not None:
            wanted = target.latency_us or latency
            allowed["latency_us"] = min(wanted, allowed.get("latency_us", wanted))
            if target.luts is not None:
                allowed["luts"] = min(target.luts, allowed.get("luts", target.luts))
        port = WIDE_PORT[target.device.family] if target.mapping == "dsp" else None
        return problem(cells, on={cost, *allowed}, port=port), allowed


def _uniform_front(
    study: Study, cells: Mapping[str, Sequence[Cell]], limits: Limits, cost: str, place: int
) -> list[tuple[Cell, ...]]:
    """Of the designs with one pair of formats for all layers, those on the predicted front of one target."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in itertools.chain.from_iterable(cells.values()):
        groups.setdefault((cell.weights, cell.acts, cell.granularity), []).append(cell)
    whole = [tuple(group) for group in groups.values() if len(group) == len(cells)]
    guesses = [predict(group, study.settings) for group in whole]
    costs = [limits.cost(points(guess.row)[place], cost) for guess in guesses]
    known = [i for i, found in enumerate(costs) if found is not None]
    return [whole[known[i]] for i in nondominated([(costs[i] or 0.0, guesses[i].loss) for i in known], (False, False))]


class _Guide:
    """What to try next: proposals, and what became of them. One instance lives as long as its search."""

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
        screen: Screen,
    ) -> None:
        optuna = _optuna()
        self.model, self.space, self.tables, self.limits = study, space, tables, limits
        self.cost, self.batch, self.races, self.programs, self.screen = cost, batch, races, programs, screen
        self.layers = run_order(study.model)
        self.plain = [untrained(steps) for steps in space.pipelines]
        if sampler == "nsga2":
            chosen: Any = optuna.samplers.NSGAIISampler(population_size=batch, seed=space.seed)
        else:
            chosen = optuna.samplers.TPESampler(n_startup_trials=batch, multivariate=True, seed=space.seed)
        self.study = optuna.create_study(sampler=chosen, directions=["minimize", "maximize"])
        self.asked: list[tuple[Any, str | None]] = []
        self.worst = 1e12
        self.seen: dict[str, Candidate] = {}
        self.guesses: dict[str, Prediction] = {}
        self.screened: dict[str, Row] = {}
        self.batches = 0

    def begin(self, seeds: Sequence[Candidate], rows: Mapping[str, Row]) -> None:
        """Tell the designs that were there before the first proposal."""
        self._enqueue(seeds)
        self._screen(seeds)
        self.tell(rows)

    def affordable(self, seeds: Sequence[Candidate], episodes: int | None) -> Sequence[Candidate]:
        """As many of the first designs as take at most half of the episodes, were none of them stopped early."""
        if episodes is None:
            return seeds
        return seeds[: max(1, episodes // (2 * self.model.settings.episodes))]

    def affordable_now(self, rows: Mapping[str, Row], episodes: int | None) -> int:
        """How many more designs can be played, at as many episodes each as so far, and the front be completed then.

        A quarter and one design more are counted as owed, for completing returns may bring others to the front.
        """
        if episodes is None:
            return self.batch
        played = [row for row in rows.values() if "score" in row]
        spent = sum(self._shown(row)[0] for row in played)
        whole = self.model.settings.episodes
        shown = [row | {"score": row["score"] | {"mean": self._shown(row)[1]}} for row in played]
        owed = whole + 1.25 * sum(whole - self._shown(played[i])[0] for i in _on_fronts(self.model, shown, self.cost))
        return int((episodes - spent - owed) / max(1.0, spent / max(1, len(played))))

    def ask(self, rows: Mapping[str, Row], most: int) -> list[Candidate]:
        """The designs to play next, at most a batch and `most`: none that has a row."""
        self.batches += 1
        found = [*self._between(rows), *self._neighbours(rows), *self._drawn()]
        pool = {one.id: one for one in found if one.id not in rows}
        for name, one in pool.items():
            self.seen.setdefault(name, one)
            if name not in self.guesses:
                self.guesses[name] = predict(one.cells, self.model.settings)
        some = self._promising(pool, rows, len(pool), {name: self.guesses[name].row for name in pool}, self._guessed)
        short = [pool[name] for name in some[: SCREENED * self.batch]]
        self._screen(short)
        costs = {one.id: row for one in short if "error" not in (row := self.screened[one.id])}
        best = self._promising(costs, rows, min(self.batch, most), costs, self._lost)
        chosen = [pool[name] for name in best]
        drawn = {name for _, name in self.asked}
        self._enqueue([one for one in chosen if one.id not in drawn])
        return chosen

    def tell(self, rows: Mapping[str, Row]) -> None:
        """What became of all that was asked: values of those with a row, the others count as not tried."""
        import optuna

        told: set[str] = set()
        for trial, name in self.asked:
            row = rows.get(name or "")
            if row is None or name is None or name in told:
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            told.add(name)
            trial.set_user_attr("design", name)
            costs = [cost for priced in points(row) if (cost := self.limits.cost(priced, self.cost)) is not None]
            if not costs or "score" not in row:
                self.study.tell(trial, [self.worst, self.model.random.mean])
            else:
                self.study.tell(trial, [sum(costs) / len(costs), self._shown(row)[1]])
        self.asked.clear()

    def _shown(self, row: Row) -> tuple[int, float]:
        """Episodes and mean return that count: in races those of the race, though it was completed since.

        So that what is proposed does not depend on which returns an earlier run completed. The mean is the float
        policy's plus the mean paired difference, as in `paired`.
        """
        returns, reference = np.asarray(row["score"]["returns"]), np.asarray(self.model.reference.returns)
        if self.races:
            returns, _ = self.model.race(lambda first, count: returns[first : first + count])
        return len(returns), self.model.reference.mean + float((returns - reference[: len(returns)]).mean())

    def _guessed(self, name: str) -> float:
        """A design's loss as the sum of its layers'."""
        return self.guesses[name].loss

    def _lost(self, name: str) -> float:
        """A design's loss on the calibration states: KL of actions, or the square of the error of actions or values."""
        found = self.screened[name]["fidelity"]
        return found["kl"] if "kl" in found else float(found.get("action_error", found.get("q_error"))) ** 2

    def _promising(
        self,
        names: Collection[str],
        rows: Mapping[str, Row],
        most: int,
        priced: Mapping[str, Mapping[str, Any]],
        loss: Callable[[str], float],
    ) -> list[str]:
        """At most so many of the designs, in order of what they are expected to add to the fronts of all targets.

        Each that is taken counts as played then, at its mean expectation, for those after it.
        """
        costs = {name: [self.limits.cost(row, self.cost) for row in points(priced[name])] for name in names}
        costs = {name: mine for name, mine in costs.items() if any(cost is not None for cost in mine)}
        played = {name: row for name, row in rows.items() if "score" in row and name in self.seen}
        shown = {name: self._shown(row)[1] for name, row in played.items()}
        kinds: list[list[tuple[float, float]]] = [[] for _ in self.space.pipelines]
        for name in played:
            if loss == self._guessed or "error" not in self.screened.get(name, {"error": ""}):
                kinds[self.seen[name].pipeline].append((loss(name), shown[name]))
        top, floor = self.model.reference.mean, self.model.floor
        expected = {name: likely(loss(name), kinds[self.seen[name].pipeline]) or [top] for name in sorted(costs)}
        found: list[list[tuple[float, float]]] = [[] for _ in range(_places(self.model))]
        for name, row in played.items():
            for place, one in enumerate(points(row)):
                if (cost := self.limits.cost(one, self.cost)) is not None:
                    found[place].append((cost, shown[name]))
        ends = [
            max([c for c, _ in mine] + [c for other in costs.values() if (c := other[place]) is not None], default=1.0)
            for place, mine in enumerate(found)
        ]

        def fronts() -> list[Front]:
            return [Front(mine, end, floor, top) for mine, end in zip(found, ends, strict=True)]

        def promise(name: str, now: list[Front]) -> float:
            values = expected[name]
            gains = [
                front_.gain(cost, one)
                for front_, cost in zip(now, costs[name], strict=True)
                if cost is not None
                for one in values
            ]
            return sum(gains) / len(values)

        now, chosen = fronts(), list[str]()
        bounds = {name: promise(name, now) for name in expected}  # gains shrink as others are taken
        if most >= len(bounds):
            return sorted(bounds, key=lambda name: (-bounds[name], loss(name), name))
        while bounds and len(chosen) < most:
            name = max(bounds, key=lambda name: (bounds[name], -loss(name), name))
            fresh = promise(name, now)
            if fresh < bounds[name]:
                bounds[name] = fresh
                continue
            del bounds[name]
            chosen.append(name)
            for mine, cost in zip(found, costs[name], strict=True):
                if cost is not None:
                    mine.append((cost, sum(expected[name]) / len(expected[name])))
            now = fronts()
        return chosen

    def _screen(self, some: Sequence[Candidate]) -> None:
        """Quantize and compare on states what was not yet, each with the steps of its pipeline that do not train."""
        plain = {one.id: replace(one.recipe, steps=self.plain[one.pipeline]) for one in some}
        missing = {name: recipe for name, recipe in plain.items() if name not in self.screened}
        rows = self.screen(list({design_id(recipe): recipe for recipe in missing.values()}.values()))
        self.screened |= {name: rows[design_id(recipe)] for name, recipe in missing.items()}

    def _ends(self, rows: Mapping[str, Row], place: int) -> list[tuple[float, float, Row]]:
        """The front found so far of one target: cost, return that counts, and row, by ascending cost."""
        found = []
        for row in rows.values():
            if "score" in row and (cost := self.limits.cost(points(row)[place], self.cost)) is not None:
                found.append((cost, self._shown(row)[1], row))
        best = nondominated([(cost, mean) for cost, mean, _ in found], (False, True))
        return sorted((found[i] for i in best), key=lambda point: point[0])

    def _between(self, rows: Mapping[str, Row]) -> list[Candidate]:
        """New designs allocated in the gaps of the fronts found so far, the widest first.

        A gap is as wide as the logarithm of its costs' ratio times its returns' difference.
        """
        found: dict[str, Candidate] = {}
        for place in range(_places(self.model)):
            ends = [point for point in self._ends(rows, place) if point[0] > 0]
            gaps = sorted(
                itertools.pairwise(ends), key=lambda ab: -math.log(ab[1][0] / ab[0][0]) * (ab[1][1] - ab[0][1])
            )
            for (low, _, _), (high, _, row) in gaps[:_GAPS]:
                number = self.seen[row["id"]].pipeline
                given, allowed = self.programs[number][place]
                for share in (0.5, 0.25, 0.75):
                    try:
                        cells = allocate(given, {**allowed, self.cost: low ** (1 - share) * high**share}).cells
                    except InputError:
                        continue
                    one = Candidate(assemble(cells, self.space.pipelines[number], self.space.seed), cells, number)
                    if one.id not in rows and one.id not in found:
                        found[one.id] = one
                        break
        return list(found.values())

    def _neighbours(self, rows: Mapping[str, Row]) -> list[Candidate]:
        """Designs that differ from one on a front in one layer's weights, inputs or granularity, or in the pipeline.

        Of more than _WALK a sample, another one for each batch.
        """
        middle = {
            row["id"]: self.seen[row["id"]]
            for place in range(_places(self.model))
            for _, _, row in self._ends(rows, place)
        }
        found: dict[tuple[Any, ...], tuple[tuple[Cell, ...], int]] = {}
        for one in middle.values():
            names = [(c.layer, c.weights, c.acts, c.granularity) for c in one.cells]
            for number, table in enumerate(self.tables):
                if number != one.pipeline and all(name in table for name in names):
                    found[(number, *names)] = (tuple(table[name] for name in names), number)
            for key, cell in self.tables[one.pipeline].items():
                i = self.layers.index(key[0])
                if sum(a != b for a, b in zip(key, names[i], strict=True)) == 1:
                    changed = (*one.cells[:i], cell, *one.cells[i + 1 :])
                    found[(one.pipeline, *names[:i], key, *names[i + 1 :])] = (changed, one.pipeline)
        some = list(found.values())
        if len(some) > _WALK:
            rng = np.random.default_rng([self.space.seed, self.batches])
            some = [some[i] for i in sorted(rng.choice(len(some), _WALK, replace=False).tolist())]
        return [
            Candidate(assemble(cells, self.space.pipelines[number], self.space.seed), cells, number)
            for cells, number in some
        ]

    def _drawn(self) -> list[Candidate]:
        """Optuna's proposals."""
        found = []
        for _ in range(PROPOSALS * self.batch):
            trial = self.study.ask()
            cells, number = self._draw(trial)
            if cells is None:  # a format or granularity that a layer cannot have
                self.asked.append((trial, None))
                continue
            found.append(Candidate(assemble(cells, self.space.pipelines[number], self.space.seed), cells, number))
            self.asked.append((trial, found[-1].id))
        return found

    def _enqueue(self, some: Sequence[Candidate]) -> None:
        """Make trials of Optuna's of designs that it did not propose."""
        for one in some:
            self.seen[one.id] = one
            self.guesses[one.id] = predict(one.cells, self.model.settings)
            self.study.enqueue_trial(self._params(one))
        for one in some:
            trial = self.study.ask()
            self._draw(trial)
            self.asked.append((trial, one.id))

    def _draw(self, trial: Any) -> tuple[tuple[Cell, ...] | None, int]:
        """The cells and the pipeline that a trial's parameters stand for; None for cells that do not exist."""
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
        found = [self.tables[index].get(key) for key in keys]
        cells = tuple(cell for cell in found if cell is not None)
        return (cells if len(cells) == len(found) else None), index

    def _params(self, one: Candidate) -> dict[str, Any]:
        """The parameters of a design; a mix of granularities is told as that of its first layer."""
        params: dict[str, Any] = {}
        if len(self.space.pipelines) > 1:
            params["steps"] = pipeline_text(self.space.pipelines[one.pipeline])
        if len(self.space.granularities) > 1:
            params["granularity"] = one.cells[0].granularity
        for cell in one.cells:
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


@contextmanager
def open_storage(url: str | None, folder: Path) -> Iterator[Any]:
    """Optuna's storage at a URL (sqlite:///FILE, postgresql://..., journal:FILE), None for a journal in the folder.

    Its connections are closed at the end. InputError in one line if it cannot be opened.
    """
    _optuna()
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if url is None or url.startswith("journal:"):
            path = folder / "optuna.journal" if url is None else Path(url.removeprefix("journal:"))
            storage: Any = JournalStorage(JournalFileBackend(str(path)))
        else:
            storage = RDBStorage(url)
    except Exception as error:  # whatever the database's driver raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--storage {url}: cannot be opened ({reason}); accepted: sqlite:///FILE, postgresql://USER@HOST/NAME, "
            "journal:FILE"
        ) from None
    try:
        yield storage
    finally:
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()


def check_storage(url: str | None, folder: Path) -> None:
    """InputError in one line if a storage cannot be opened."""
    with open_storage(url, folder):
        pass


def _record(url: str | None, space: SearchSpace, done: Any, folder: Path) -> None:
    """Write the trials that the storage lacks, under a name of the folder, the sampler and the seed.

    A journal of the study's own that a kill has damaged is begun anew: it is a record of what is known anyway.
    """
    name = f"{folder.resolve().name}-{type(done.sampler).__name__}-{space.seed}"
    with Claims(folder) as claims:
        claims.wait("")
        try:
            _add_trials(url, folder, name, done)
        except Exception as error:  # whatever the database's driver raises
            if isinstance(error, InputError):
                raise
            if url is not None:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise InputError(f"--storage {url}: cannot be written ({reason}); finished designs are kept") from None
            (folder / "optuna.journal").unlink(missing_ok=True)
            _add_trials(url, folder, name, done)


def _add_trials(url: str | None, folder: Path, name: str, done: Any) -> None:
    import optuna

    finished = [t for t in done.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    with open_storage(url, folder) as storage:
        kept = optuna.create_study(
            storage=storage, study_name=name, directions=["minimize", "maximize"], load_if_exists=True
        )
        there = {trial.user_attrs.get("design") for trial in kept.get_trials(deepcopy=False)}
        for trial in finished:
            if trial.user_attrs.get("design") not in there:
                kept.add_trial(trial)
                there.add(trial.user_attrs.get("design"))
