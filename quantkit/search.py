"""Search for the front of return against cost: seeded by allocation, thrifty with episodes.

1. Sensitivities of every pipeline are measured (`sensitivity`), and the front of mixed precision under the budgets is
   allocated (`allocate`). Its designs are the first, with the predicted front of uniform precision, which is there to
   be beaten: by ascending cost, until those that are left could add nothing if they returned what float does.
2. Batch after batch, designs come from three sources: allocated in the gaps of the front found so far; one change of a
   layer away from a design on it, then two; Optuna's (NSGA-II or TPE). Of all that were ever proposed, those that
   promise to add the most to the front (`gain`, by what a `regression` on layers' formats and losses expects of them)
   are quantized and compared with float on the calibration states, which takes milliseconds and no episode; those that
   promise the most by that are played. A network takes as long to quantize as to answer: its designs are not compared
   before.
3. Returns are raced (`racing`): what is clearly worse, or clearly as good, stops early, and of a policy what half of
   the episodes leave undecided.
4. Of what is on the front then and as good as random actions, returns are completed to all episodes, until that part
   of the front has only complete ones.

With several hardware targets a design has a cost on each, and plays once: there is a front for each target, and what a
design promises is what it adds to all of them.

Everything is a function of the study, the space and the seed: which designs are proposed depends on rows of whole
batches only, never on who made them or how fast. So a search that was killed goes on by going through the same
proposals again and finding their rows there, several processes share one, and all back ends give the same rows.
Optuna's storage is a record of the trials, written after each batch, and not what a search goes on from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hwmodel.fabric import pricing
from hwmodel.packing import WIDE_PORT
from quantkit.allocate import RESOURCES, Problem, budget_front, default_latency, problem
from quantkit.backends import Mapper
from quantkit.errors import InputError
from quantkit.pareto import nondominated
from quantkit.recipe import Recipe
from quantkit.results import Row
from quantkit.search_fronts import on_fronts, paired, short
from quantkit.search_guide import Guide, Sampler
from quantkit.search_record import check_storage, record
from quantkit.search_space import Candidate, Limits, Programs, SearchSpace, Tables
from quantkit.sensitivity import Cell, assemble, measure
from quantkit.study import Study, Task
from quantkit.surrogate import predict
from quantkit.sweep import complete
from quantkit.targets import Target, points
from quantkit.tasks.episodes import Progress

_IDLE = 10
"""So many batches without a new design end a search: the space is used up."""
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

    guide = Guide(study, space, tables, limits, cost, sampler, batch, races, programs, screen)
    first = guide.begin(guide.affordable(seeds[:designs], episodes))
    for i in range(0, len(first), batch):
        evaluate([seed.recipe for seed in guide.hopeful(first[i : i + batch], settled)], "allocation", races)
    guide.tell(settled)
    idle = 0
    while len(settled) < designs and idle < _IDLE and (most := guide.affordable_now(settled, episodes)) > 0:
        chosen = guide.ask(settled, min(designs - len(settled), most))
        idle = 0 if chosen else idle + 1
        evaluate([one.recipe for one in chosen], "search", races)
        guide.tell(settled)
        record(storage, space, guide.study, folder)
    for _ in range(4):  # completing a return may bring another design to the front
        rows = list(settled.values())
        raced = [rows[i] for i in on_fronts(study, paired(study, rows), cost) if short(rows[i], study)]
        if not raced:
            break
        by_origin = itertools.groupby(sorted(raced, key=lambda row: row["origin"]), key=lambda row: row["origin"])
        for origin, some in by_origin:
            evaluate([Recipe.from_json(row["recipe"]) for row in some], origin, False)
    return list(settled.values())


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
    every = list(itertools.chain.from_iterable(cells.values()))
    acts = dict.fromkeys(cell.acts for cell in every if cell.spec is not None)
    for cell in every:
        for name in (cell.acts,) if cell.spec is not None else acts:
            groups.setdefault((cell.weights, name, cell.granularity), []).append(cell)
    whole = [tuple(group) for group in groups.values() if len(group) == len(cells)]
    guesses = [predict(group, study.settings) for group in whole]
    costs = [limits.cost(points(guess.row)[place], cost) for guess in guesses]
    known = [i for i, found in enumerate(costs) if found is not None]
    return [whole[known[i]] for i in nondominated([(costs[i] or 0.0, guesses[i].loss) for i in known], (False, False))]
