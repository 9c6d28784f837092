"""What a search tries next: proposals from three sources, sifted by what they promise, and what became of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from quantkit.allocate import allocate
from quantkit.errors import InputError
from quantkit.gain import greedy
from quantkit.pareto import nondominated
from quantkit.recipe import Recipe
from quantkit.regression import fit
from quantkit.results import Row
from quantkit.search_fronts import on_fronts, places
from quantkit.search_record import optuna_quiet
from quantkit.search_space import Candidate, Limits, Programs, SearchSpace, Tables, features, pipeline_text
from quantkit.sensitivity import Cell, assemble, untrained
from quantkit.specs import run_order
from quantkit.statistics import Floats
from quantkit.study import Study, design_id
from quantkit.surrogate import Prediction, predict
from quantkit.targets import points

Sampler = Literal["nsga2", "tpe"]
PROPOSALS, PROPOSALS_NETWORK = 4, 1
"""So many designs Optuna proposes for each that is evaluated; fewer where it takes a tenth of a second to price one."""
SCREENED = 6
"""So many designs of a policy are quantized for each that is played."""
_GAPS = 6
"""In so many gaps of a front new designs are allocated."""
_WALK, _WALK_NETWORK = 256, 48
"""At most so many neighbours of a front's designs are looked at."""
Screen = Callable[[Sequence[Recipe]], Mapping[str, Row]]
"""Rows without episodes, by id."""


class Guide:
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
        optuna = optuna_quiet()
        self.model, self.space, self.tables, self.limits = study, space, tables, limits
        self.cost, self.batch, self.races, self.programs, self.screen = cost, batch, races, programs, screen
        self.layers = run_order(study.model)
        self.embeddings = {key[0] for key, cell in tables[0].items() if cell.spec is None}
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
        self.shown: dict[tuple[str, int], tuple[int, float]] = {}
        self.batches = 0

    def begin(self, seeds: Sequence[Candidate]) -> list[Candidate]:
        """The designs that are there before the first proposal, by ascending cost on the first target."""
        self._enqueue(seeds)
        if self.model.labelled is None:
            self._screen(seeds)
        return sorted(seeds, key=lambda one: self._costs(one)[0] or 0.0)

    def hopeful(self, some: Sequence[Candidate], rows: Mapping[str, Row]) -> list[Candidate]:
        """Those that on some target cost less than what returned as much as float, and those of unknown cost."""
        top = self.model.reference.mean
        means = {name: self._shown(row)[1] for name, row in rows.items() if "score" in row}
        reached = [[cost for cost, mean in played if mean >= top] for played in self._played(rows, means)]
        least = [min(costs, default=math.inf) for costs in reached]
        return [
            one
            for one in some
            if any(cost is None or cost < most for cost, most in zip(self._costs(one), least, strict=True))
        ]

    def _costs(self, one: Candidate) -> list[float | None]:
        """What a design is predicted to cost on each target."""
        return [self.limits.cost(row, self.cost) for row in points(self.guesses[one.id].row)]

    def _played(self, rows: Mapping[str, Row], means: Mapping[str, float]) -> list[list[tuple[float, float]]]:
        """Cost and mean return of the designs that were played, on each target."""
        found: list[list[tuple[float, float]]] = [[] for _ in range(places(self.model))]
        for name, mean in means.items():
            for place, one in enumerate(points(rows[name])):
                if (cost := self.limits.cost(one, self.cost)) is not None:
                    found[place].append((cost, mean))
        return found

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
        owed = whole + 1.25 * sum(whole - self._shown(played[i])[0] for i in on_fronts(self.model, shown, self.cost))
        return int((episodes - spent - owed) / max(1.0, spent / max(1, len(played))))

    def ask(self, rows: Mapping[str, Row], most: int) -> list[Candidate]:
        """The designs to play next, at most a batch and `most`: none that has a row, of all that were ever proposed."""
        self.batches += 1
        for one in (*self._between(rows), *self._neighbours(rows), *self._drawn()):
            self.seen.setdefault(one.id, one)
        pool = {name: one for name, one in self.seen.items() if name not in rows}
        for name, one in pool.items():
            if name not in self.guesses:
                self.guesses[name] = predict(one.cells, self.model.settings)
        guessed = {name: self.guesses[name].row for name in pool}
        if self.model.labelled is not None:
            best = self._promising(pool, rows, min(self.batch, most), guessed, self._guessed)
        else:
            some = self._promising(pool, rows, len(pool), guessed, self._guessed)
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
        key = row["id"], len(row["score"]["returns"])
        if key not in self.shown:
            returns, reference = np.asarray(row["score"]["returns"]), np.asarray(self.model.reference.returns)
            if self.races:
                returns, _ = self.model.race(lambda first, count: returns[first : first + count])
            difference = float((returns - reference[: len(returns)]).mean())
            self.shown[key] = len(returns), self.model.reference.mean + difference
        return self.shown[key]

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
        """At most so many of the designs by `gain.greedy`, by what a regression on the played ones expects."""
        costs = {name: [self.limits.cost(row, self.cost) for row in points(priced[name])] for name in names}
        costs = {name: mine for name, mine in costs.items() if any(cost is not None for cost in mine)}
        played = {name: row for name, row in rows.items() if "score" in row and name in self.seen}
        known = [n for n in played if loss == self._guessed or "error" not in self.screened.get(n, {"error": ""})]
        shown = {name: self._shown(row)[1] for name, row in played.items()}
        top, floor = self.model.reference.mean, self.model.floor
        expected = {name: (top, 0.0) for name in sorted(costs)}
        if known and expected:
            unit = abs(top - floor) or 1.0
            values = [min(max((shown[name] - floor) / unit, -0.5), 1.1) for name in known]
            noise = [self._noise(played[name]) / unit**2 for name in known]
            model = fit(self._features(known, loss), values, noise)
            shown |= {n: floor + unit * v for n, v in zip(known, model.smoothed().tolist(), strict=True)}
            means, deviations = model.predict(self._features(list(expected), loss))
            for name, mean, deviation in zip(expected, means.tolist(), deviations.tolist(), strict=True):
                expected[name] = floor + unit * mean, unit * deviation
        return greedy(costs, expected, self._played(played, shown), floor, top, most, loss)

    def _features(self, names: Sequence[str], loss: Callable[[str], float]) -> tuple[Floats, ...]:
        return features([self.seen[name] for name in names], [loss(name) for name in names], len(self.space.pipelines))

    def _noise(self, row: Row) -> float:
        """The variance of the mean return that counts."""
        count, _ = self._shown(row)
        ours, theirs = row["score"]["returns"][:count], self.model.reference.returns[:count]
        return float((np.asarray(ours) - np.asarray(theirs)).var(ddof=min(1, count - 1)) / count)

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
        for place in range(places(self.model)):
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
        """Designs one change away from one on a front that were not proposed yet, and then designs two changes away.

        A change is that of one layer's weights, inputs or granularity, or of the pipeline. At most _WALK
        (_WALK_NETWORK) designs, drawn by chance.
        """
        fronts = {
            row["id"]: self.seen[row["id"]]
            for place in range(places(self.model))
            for _, _, row in self._ends(rows, place)
        }
        most = _WALK if self.model.labelled is None else _WALK_NETWORK
        rng = np.random.default_rng([self.space.seed, self.batches])
        near = [changed for one in fronts.values() for changed in self._changed(one.cells, one.pipeline)]
        found: dict[str, Candidate] = {}
        for i in rng.permutation(len(near)).tolist():
            self._propose(found, near[i], most)
        for i in rng.integers(len(near), size=2 * most).tolist() if near and len(found) < most else ():
            further = self._changed(*near[i])
            self._propose(found, further[rng.integers(len(further))], most)
        return list(found.values())

    def _changed(self, cells: tuple[Cell, ...], pipeline: int) -> list[tuple[tuple[Cell, ...], int]]:
        """All designs one change away."""
        names = [(c.layer, c.weights, c.acts, c.granularity) for c in cells]
        found = [
            (tuple(table[name] for name in names), number)
            for number, table in enumerate(self.tables)
            if number != pipeline and all(name in table for name in names)
        ]
        for key, cell in self.tables[pipeline].items():
            i = self.layers.index(key[0])
            if sum(a != b for a, b in zip(key, names[i], strict=True)) == 1:
                found.append(((*cells[:i], cell, *cells[i + 1 :]), pipeline))
        return found

    def _propose(self, found: dict[str, Candidate], design: tuple[tuple[Cell, ...], int], most: int) -> None:
        """Add a design to those found, unless there are enough or it was proposed before."""
        cells, number = design
        if len(found) < most:
            one = Candidate(assemble(cells, self.space.pipelines[number], self.space.seed), cells, number)
            if one.id not in self.seen:
                found[one.id] = one

    def _drawn(self) -> list[Candidate]:
        """Optuna's proposals."""
        found = []
        each = PROPOSALS if self.model.labelled is None else PROPOSALS_NETWORK
        for _ in range(each * self.batch):
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
                "float" if layer in self.embeddings else trial.suggest_categorical(f"{layer} inputs", self.space.acts),
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
            params[f"{cell.layer} weights"] = cell.weights
            if cell.spec is not None:
                params[f"{cell.layer} inputs"] = cell.acts
        return params
