"""From a point of a study to a directory that can be deployed: quantized policy or network, ONNX, estimate, card.

The design is quantized again (`quantkit.rebuild`), and what it gives is compared with its row: recipe, fidelity,
hardware and mean return on the same seeds, or accuracy on the same labelled inputs. A difference (another version,
another machine's rounding) is written down and said, not hidden. What is measured of the files it becomes is in
`quantkit.product`.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hwmodel.cost import HwError
from hwmodel.devices import Device, find_device
from hwmodel.estimate import Estimate, estimate
from hwmodel.estimate import Mapping as Mapping_
from hwmodel.spec import LayerSpec
from quantkit.artifact import save_artifact, summary
from quantkit.card import write_card
from quantkit.errors import InputError
from quantkit.files import check_new, new_directory, new_file, sha256_of
from quantkit.model import Model
from quantkit.pareto import COLUMNS, COSTS, metric_of, value
from quantkit.product import confirm_network, confirm_policy, export_network, export_policy, study_inputs
from quantkit.rebuild import rebuild, study_model, study_states
from quantkit.report import default_cost, read_study
from quantkit.results import Row, append_row, versions
from quantkit.seeds import CONFIRM
from quantkit.specs import layer_specs
from quantkit.study import fidelity, outputs_of, policy_of
from quantkit.targets import Target, seen_from, targets_of
from quantkit.tasks.episodes import Progress
from quantkit.tasks.robustness import compare, default_conditions
from quantkit.wishes import loss_bound, named, parse_loss, span_of, wanted

MARKER = "pick.json"
_PRICED = ("luts", "ffs", "dsps", "bram18", "latency_us")


@dataclass(frozen=True)
class Choice:
    """A design: its row, the model quantized again, its price (None without a part), how it was chosen in words."""

    row: Row
    model: Model
    priced: Estimate | None
    why: str


def choices(
    rows: Sequence[Row],
    why: str,
    model: Model,
    states: np.ndarray,
    target: Target | None,
    *,
    x: str,
    same_target: bool,
    tries: int = 8,
    progress: Progress | None = None,
) -> Iterator[Choice]:
    """Those of the first `tries` rows that can be built within the target, quantized again and priced, cheapest by `x`
    first.

    same_target: the rows are priced for it already, and each is built when it is asked for. Without a target all of
    these rows. InputError where none can be built within it: the nearest, and what binds.
    """
    looked = list(rows[: max(1, tries)])
    more = f"; of {len(rows)} such designs the {len(looked)} cheapest were priced for {target}"
    words = why + (more if len(rows) > 1 and target is not None and not same_target else "")
    misses: list[tuple[float, str]] = []

    def offered() -> Iterator[Choice]:
        for done, row in enumerate(looked):
            if progress:
                progress(done, len(looked))
            built = rebuild(row, model, states)
            if target is None:
                yield Choice(row, built, None, words)
                continue
            try:
                price = target.price(layer_specs(built))
            except HwError as error:
                number, text = _nearest(built, target)
                misses.append((number, f"{text}, by {named(row)}: {error}"))
                continue
            if price.fits:
                yield Choice(row, built, price, words)
            else:
                number, text = _nearest(built, target)
                misses.append((number, f"{text}, by {named(row)}: it needs {_over(price, target.device)}"))

    found = offered()
    if not same_target:
        found = iter(sorted(found, key=lambda one: (_cost_of(one, x), -one.row["score"]["mean"])))
    if (first := next(found, None)) is None:
        raise InputError(f"no design can be built in {target} ({why}); the nearest possible is {min(misses)[1]}")
    yield first
    yield from found


@dataclass(frozen=True)
class Passed:
    """A design that came first and was not taken: on fresh seeds, or inputs, no more than `bound` lost is shown."""

    row: Row
    fresh: Mapping[str, Any]
    bound: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        score = self.fresh["score"]
        return {
            "id": self.row["id"], "weights": self.row["weights"], "acts": self.row["acts"], "seed": score["seed"],
            "n": score["n"], "diff_mean": self.fresh["verdict"]["diff_mean"], "loss_bound": _finite(self.bound),
        }  # fmt: skip


def _unconfirmed(passed: Sequence[Passed], limit: float, span: float, metric: str) -> InputError:
    """That no design was confirmed, and the nearest."""
    near = min(passed, key=lambda one: one.bound)
    percent = f" ({100 * near.bound / span:.3g}%)" if span and math.isfinite(near.bound) else ""
    return InputError(
        f"what the study says of the {len(passed)} cheapest designs within the loss is not confirmed by what no choice "
        f"has seen: at most {limit:.4g} of {metric} was to be lost; the nearest is {near.bound:.4g}{percent}, by "
        f"{named(near.row)}, whose mean loss there is {-near.fresh['verdict']['diff_mean']:.4g} over "
        f"{near.fresh['score']['n']:,}; "
        + (
            "more --confirm episodes narrow the interval, more --tries look further, --confirm 0 takes the study's word"
            if metric == "return"
            else "more --inputs narrow the interval, more --tries look further"
        )
    )


def _nearest(model: Model, target: Target) -> tuple[float, str]:
    """What comes nearest to a target that is missed, and how near: the lowest latency that fits, or the fewest LUTs."""
    part = target.device
    try:
        if target.luts is not None:
            least = target.price(layer_specs(model), latency_us=1e9)
            return least.luts, f"{least.luts:,} LUTs ({least.latency_us:g} µs)"
        quickest = target.price(layer_specs(model), luts=part.luts)
    except HwError:
        return math.inf, f"none in {part.name}"
    if not quickest.fits:
        return math.inf, f"a larger part than {part.name}"
    return quickest.latency_us, f"{quickest.latency_us:g} µs ({quickest.luts:,} LUTs)"


def _over(price: Estimate, part: Device) -> str:
    name = str(price.binding)
    return f"{getattr(price, name):,} {COLUMNS[name][1]} of {getattr(part, name):,}"


def differences(choice: Choice, model: Model, document: Mapping[str, Any], states: np.ndarray) -> list[str]:
    """What of the design's row is not reproduced: fidelity on the study's states, and the hardware it was priced at."""
    row, settings = choice.row, document["settings"]
    fresh: dict[str, Any] = {"fidelity": fidelity(choice.model, states, outputs_of(model, states))}
    if settings.get("device"):
        own = Target(find_device(settings["device"]), **_folding(settings))
        fresh["cost"] = json.loads(json.dumps(own.cost(layer_specs(choice.model))))
    found = []
    for name, ours in fresh.items():
        theirs = row.get(name) or {}
        keys = [key for key in {**theirs, **ours} if key != "model" and theirs.get(key) != ours.get(key)]
        found += [f"{name}.{key}: {theirs.get(key)} in the row, {ours.get(key)} here" for key in sorted(keys)]
    return found


@dataclass(frozen=True)
class View:
    """The study as one target sees it. same: its rows are priced for that target."""

    target: Target | None
    same: bool
    document: Mapping[str, Any]
    rows: Sequence[Row]


def _views(document: Mapping[str, Any], rows: Sequence[Row], wish: Mapping[str, Any]) -> list[View]:
    """Of the study's targets those that have all that is wished for; where none has, the first one changed so far."""
    targets = targets_of(document["settings"])
    found = []
    for place, target in enumerate(targets):
        if all(target.to_json()[key] == value_ for key, value_ in wish.items()):
            found.append(View(target, True, *seen_from(document, rows, place)))
    if found:
        return found
    alone = seen_from(document, rows, 0)
    if not wish and not targets:
        return [View(None, False, *alone)]
    folding = _folding(document["settings"])
    if wish.get("latency_us") is not None or wish.get("luts") is not None:
        folding |= {"latency_us": None, "luts": None}
    new = {"device": document["settings"].get("device"), **folding, **wish}
    return [View(Target(find_device(new.pop("device")), **new), False, *alone)]


T = TypeVar("T")


def _each(views: Sequence[View], work: Callable[[View], T]) -> list[T]:
    """The work on each view on which it can be done; the first InputError if that is none."""
    done, errors = list[T](), list[InputError]()
    for view in views:
        try:
            done.append(work(view))
        except InputError as error:
            errors.append(error)
    if not done:
        raise errors[0]
    return done


def _cost_of(choice: Choice, x: str) -> float:
    if choice.priced is not None and x in _PRICED:
        return float(getattr(choice.priced, x))
    return value(choice.row, x) or 0.0


def _folding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How a study's hardware is folded; studies of before there was a choice of mapping used LUTs."""
    return {
        key: settings.get(key, default) for key, default in (("latency_us", None), ("luts", None), ("mapping", "lut"))
    }


def pick(
    folder: Path,
    output: Path,
    *,
    max_loss: str | None = None,
    at_knee: bool = False,
    design: str | None = None,
    x: str | None = None,
    device: str | None = None,
    latency_us: float | None = None,
    luts: int | None = None,
    mapping: Mapping_ | None = None,
    tries: int = 8,
    checkpoint: Path | None = None,
    factory: str | None = None,
    confirm: int | None = None,
    inputs: Path | None = None,
    labels: Path | None = None,
    robustness: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Choose a design of a study and write its directory; what pick.json says.

    confirm: episodes on fresh seeds, of float and design; None for as many as the study has, 0 for none. inputs,
    labels: of a network in place of these, what the study has not seen. There, too, a design has to be proved to lose
    no more than `max_loss`, or the next of the first `tries` is looked at, on other seeds: the cheapest of many is one
    whose study was lucky. factory: as of `study_model`. Raises InputError for wishes that cannot be met (`wanted`,
    `choices`), before anything is written.
    """
    document, rows = read_study(folder)
    settings, reference = document["settings"], document["reference"]
    network = bool(settings.get("labelled"))
    if network and (confirm is not None or robustness):
        raise InputError("--confirm and --robustness are for policies; a network takes fresh --inputs and --labels")
    if not network and (inputs or labels or factory):
        raise InputError("--factory, --inputs and --labels are for networks; a policy is confirmed on fresh seeds")
    if (inputs is None) != (labels is None):
        raise InputError("give --inputs and --labels together: what no choice has seen, and its classes")
    if latency_us is not None and luts is not None:
        raise InputError("give --latency-us or --luts, not both")
    column = default_cost(rows) if x is None else x
    if column not in COSTS:
        raise InputError(f"--x {x!r} is no cost; costs: {', '.join(COSTS)}")
    if device is None and not settings.get("device") and (latency_us is not None or luts is not None):
        raise InputError("the study names no part; give --device for a latency or LUT budget")
    wish = {"device": device, "latency_us": latency_us, "luts": luts, "mapping": mapping}
    views = _views(document, rows, {key: found for key, found in wish.items() if found is not None})
    views = views[:1] if design is not None else views
    wishes: dict[str, Any] = {"max_loss": max_loss, "at_knee": at_knee, "design": design}
    _each(views, lambda view: wanted(view.document, view.rows, column, **wishes))  # before anything is loaded
    check_new(output, force=force, marker=MARKER)

    model = study_model(document, folder, checkpoint, factory)
    states = study_states(folder, model)
    labelled = study_inputs(document, folder, model) if network else None

    def count(what: str) -> Progress | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    def offers(view: View) -> Iterator[tuple[Choice, View]]:
        eligible, why = wanted(view.document, view.rows, column, **wishes)
        words = f"{why}; the cheapest of {len(eligible)} such designs" if view.same and len(eligible) > 1 else why
        found = choices(
            eligible, words, model, states, view.target,
            x=column, same_target=view.same, tries=tries, progress=count("price"),
        )  # fmt: skip
        first = next(found)  # or InputError: nothing can be built there
        return ((one, view) for one in itertools.chain([first], found))

    def confirmed(choice: Choice, number: int) -> dict[str, Any] | None:
        """Scores on what no choice has seen; each design that is looked at has seeds of its own."""
        if labelled is not None:
            if inputs is None or labels is None:
                return None
            return confirm_network(choice.model, model, document["margin"], labelled, inputs, labels)
        episodes = reference["n"] if confirm is None else confirm
        if not episodes:
            return None
        first = CONFIRM.start + number * episodes
        return confirm_policy(choice.model, model, document["margin"], episodes, first, count("fresh seeds"))

    limit = math.inf if max_loss is None else parse_loss(max_loss, span_of(document))
    passed: list[Passed] = []
    for choice, view in heapq.merge(*_each(views, offers), key=lambda pair: _cost_of(pair[0], column)):
        fresh = confirmed(choice, len(passed))
        if fresh is None or loss_bound(fresh) <= limit:
            target, settings = view.target, view.document["settings"]
            break
        passed.append(Passed(choice.row, fresh, loss_bound(fresh)))
    else:
        raise _unconfirmed(passed, limit, span_of(document), metric_of(rows))
    if len(views) > 1:
        choice = replace(choice, why=f"{choice.why}; the cheapest of {len(views)} hardware targets")
    if passed:
        unseen = "inputs" if network else "seeds"
        choice = replace(choice, why=f"{choice.why}; {len(passed)} before it were not confirmed on fresh {unseen}")
    row, seed = choice.row, int(reference.get("seed", settings.get("seed", 0)))
    problems = differences(choice, model, view.document, states)
    record: dict[str, Any] = {
        "format_version": 1,
        "study": folder.name,
        "chosen": {
            "why": choice.why,
            "by": column,
            "loss_bound": _finite(loss_bound(row)),
            "designs": len(rows),
            "limit": _finite(limit),
            "passed_over": [one.to_json() for one in passed],
        },
        "target": None if target is None else target.to_json(),
        "row": row,
        "reference": reference,
        "random": document.get("random"),
        "margin": document["margin"],
        "settings": settings,
        "summary": summary(choice.model),
        "estimate": None if choice.priced is None else choice.priced.to_json(),
        "capacity": None if target is None else {k: getattr(target.device, k) for k in _PRICED[:4]},
        "versions": versions(),
    } | ({"factory": factory} if network else {})
    if fresh is not None:
        record["fresh"] = fresh
    if robustness:
        policy, spec = policy_of(choice.model)
        options: dict[str, Any] = {"reference": policy_of(model)[0], "episodes": reference["n"], "seed": seed}
        found = compare(policy, spec, default_conditions(spec), **options, progress=count("robustness"))
        record["robustness"] = found
        append_row(folder / "robustness.jsonl", {"id": row["id"], **found})
    with new_directory(output, force=force, marker=MARKER) as place:
        save_artifact(choice.model, place / "model")
        for file in (place / "model").iterdir():
            shutil.move(file, place / file.name)
        (place / "model").rmdir()
        if target is not None:
            record["estimate"] = _of_directory(place, target, choice).to_json()
        tick = count("verify in onnxruntime")
        if labelled is not None:
            record["onnx"] = export_network(choice.model, place, labelled, tick)
        else:
            record["onnx"] = export_policy(choice.model, place, states, row["score"]["n"], seed, tick)
        mean = record["onnx"]["verified"]["mean_torch"]
        if mean != row["score"]["mean"]:
            same = "inputs" if network else "seeds"
            problems.append(f"score.mean: {row['score']['mean']} in the row, {mean} here, on the same {same}")
        record["differences"] = problems
        if choice.priced is not None:
            _write(place / "estimate.json", record["estimate"])
        _write(place / MARKER, record)
        write_card(place, record, {p.name: (p.stat().st_size, sha256_of(p)) for p in sorted(place.iterdir())})
    return record


def _of_directory(folder: Path, target: Target, choice: Choice) -> Estimate:
    """What the directory's own specs take, as `hwmodel estimate` says: they know the constants behind the sums, which
    rows of a study are priced without. The choice's price where they miss the target."""
    specs = [LayerSpec.from_json(spec) for spec in json.loads((folder / "specs.json").read_text())["layers"]]
    try:
        return estimate(specs, target.device, latency_us=target.latency_us, luts=target.luts, mapping=target.mapping)
    except HwError:
        assert choice.priced is not None
        return choice.priced


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _write(path: Path, document: Any) -> None:
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
