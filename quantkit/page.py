"""A study as one HTML file that needs no network: data, styles, script and plotly are inside.

`page_data` says everything the page shows, as JSON; the template (templates/page.*) draws it. Whatever
comes from rows reaches the page as text, never as markup.
"""

from __future__ import annotations

import fnmatch
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmodel.cost import HwError
from hwmodel.devices import find_device
from hwmodel.formats import Float, FormatError, bits, element, parse
from quantkit.errors import InputError
from quantkit.files import check_new, new_file
from quantkit.pareto import COLUMNS, COSTS, front, knee, label, metric_of, value, why_knee
from quantkit.report import default_cost, failures, normalize_of, read_study
from quantkit.results import Row, read_rows
from quantkit.targets import seen_from, targets_of

if TYPE_CHECKING:
    from markupsafe import Markup

RESOURCES = ("luts", "ffs", "dsps", "bram18")
_INSTALL = "pip install 'quantkit[study]'"


def write_page(folder: Path, output: Path, *, checkpoint: Path | None = None, force: bool = False) -> Path:
    """Write the page of a study; InputError as `page_data`, for an existing file, and without plotly or jinja2."""
    if folder.is_dir():  # else what is wrong is not that nothing can be written there
        check_new(output, force=force)
    page = render(page_data(folder, checkpoint=checkpoint))
    with new_file(output, force=force) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return output


def render(document: Mapping[str, Any]) -> str:
    """The HTML text of a `page_data` document."""
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError(f"the page needs {error.name}: {_INSTALL}") from None
    templates = resources.files("quantkit").joinpath("templates")

    def read(name: str) -> str:
        return templates.joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        **document["head"],
        css=Markup(read("page.css")),
        script=Markup(read("page.js")),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        data=embedded(document["study"]),
    )


def embedded(document: Any) -> Markup:
    """JSON that no HTML parser can leave: every <, > and & is an escape of the string it stands in."""
    from markupsafe import Markup

    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def page_data(folder: Path, *, checkpoint: Path | None = None) -> dict[str, Any]:
    """{"head": texts of the template, "study": what its script draws}.

    checkpoint: where the layers' shapes are read; by default the path that the study remembers, if that is still the
    same file. Raises InputError as `read_study`, and for a checkpoint given that is another one.
    """
    from quantkit.figures import half_interval

    whole, every = read_study(folder)
    document, rows = seen_from(whole, every, 0)
    settings, reference, margin = document["settings"], document["reference"], document["margin"]
    layers = _layers(document, rows, checkpoint)
    x = default_cost(rows)
    chosen = knee(rows, front(rows, x, "mean"), reference["mean"], margin, x)
    measured = {record["id"]: record for record in read_rows(folder / "robustness.jsonl")}
    device = _device(settings.get("device"))
    metric = metric_of(rows)
    study = {
        "metric": metric,
        "settings": settings,
        "seed": reference.get("seed", settings.get("seed", 0)),
        "episodes": reference["n"],
        "reference": {
            "mean": reference["mean"],
            "iqm": reference["iqm"],
            "returns": reference.get("returns", []) if metric == "return" else [],
        },
        "margin": margin,
        "device": device,
        "columns": {
            name: {"label": label(name, metric), "higher": COLUMNS[name][2], "cost": name in COSTS}
            for name in COLUMNS
            if any(value(row, name) is not None for row in rows)
        },
        "layers": layers,
        "designs": [
            _design(row, layers, document, folder.name, half_interval(row, reference), measured.get(row["id"]))
            for row in rows
        ],
        "x": x,
        "y": "mean",
        "knee": chosen if chosen is not None else 0,
        "sensitivity": _sensitivity(folder / "sensitivity.jsonl"),
        "targets": [_target_data(whole, every, place, x) for place in _several(whole["settings"])],
    }
    return {"head": _head(whole, rows, study, failures(folder)), "study": study}


def _several(settings: Mapping[str, Any]) -> range:
    """The numbers of the study's hardware targets, if there is more than one."""
    return range(1 + len(settings["also"]) if settings.get("also") else 0)


def _target_data(document: Mapping[str, Any], rows: Sequence[Row], place: int, x: str) -> dict[str, Any]:
    """One hardware target: name, part, the design to take there, and what each design costs, in the rows' order."""
    seen, priced = seen_from(document, rows, place)
    reference, margin = seen["reference"], seen["margin"]
    chosen = knee(priced, front(priced, x, "mean"), reference["mean"], margin, x) or 0
    best = priced[chosen]
    take = {key: value(best, key) for key in ("mean", "latency_us")} | {"cost": value(best, x)}
    return {
        "name": str(targets_of(seen["settings"])[0]),
        "part": seen["settings"]["device"],
        "device": _device(seen["settings"]["device"]),
        "knee": chosen,
        "take": take | {key: best.get(key) for key in ("id", "weights", "acts", "steps")},
        "costs": [_cost_data(row) for row in priced],
    }


def _cost_data(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a design differs from target to target."""
    cost = row.get("cost") or {}
    found = {key: cost.get(key) for key in ("fits", "clock_mhz", "residual")}
    found |= {"cost": cost.get("layers"), "cost_error": cost.get("error")}
    return found | {"values": {name: v for name in COLUMNS if (v := value(row, name)) is not None}}


def _design(
    row: Row, layers: Sequence[Mapping[str, Any]], document: Mapping[str, Any], study: str, interval: float,
    robustness: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    score, reference = row["score"], document["reference"]
    origin = document.get("origin") or {}
    plan, built = (
        row.get("recipe", {}).get("plan", []),
        ["--factory", origin["factory"]] if origin.get("factory") else [],
    )
    found = {
        "interval": interval,
        "iqm": None if score.get("iqm_low") is None else [score["iqm_low"], score["iqm_high"]],
        "n": score["n"],
        "partial": row.get("partial", False),
        "stderr": score.get("stderr"),
        "returns": score.get("returns", []) if metric_of([row]) == "return" else [],
        "changed": _changed(row, reference),
        "paired": bool(score.get("returns")) and score.get("seed") == reference.get("seed"),
        "verdict": row.get("verdict"),
        "layers": [_formats(plan, layer["name"], i, len(layers)) for i, layer in enumerate(layers)],
        "command": quantize_command(row, document["settings"], origin),
        "pick": shlex.join(["quantkit", "pick", study, "-o", f"{study}_{row['id']}", "--id", row["id"], *built]),
        "robustness": robustness,
    }
    names = ("id", "weights", "acts", "granularity", "steps", "family", "origin")
    return {k: row.get(k) for k in names} | _cost_data(row) | found


def _changed(row: Row, reference: Mapping[str, Any]) -> list[int] | None:
    """[labelled inputs that only float answers rightly, that only the design does]; None where episodes count."""
    if metric_of([row]) == "return":
        return None
    pairs = list(zip(reference["returns"], row["score"]["returns"], strict=False))  # a race ends early
    return [sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)]


def _formats(plan: Sequence[Mapping[str, Any]], name: str, index: int, count: int) -> list[Any]:
    """[weight, act, granularity] of a layer under a recipe's plan: as `Recipe.plan_for`, without torch."""
    found: Mapping[str, Any] = {"weight": "float", "act": "float", "granularity": "row"}
    for entry in plan:
        position = {"first": 0, "last": count - 1}.get(entry["layers"])
        if position == index or (position is None and fnmatch.fnmatchcase(name, entry["layers"])):
            found = entry
    return [_described(found["weight"]), _described(found["act"]), found["granularity"]]


def _described(text: str) -> dict[str, Any]:
    """Name, bits and kind of a format; bits None of float."""
    try:
        fmt = parse(text)
    except FormatError:
        return {"name": text, "bits": None, "float": False}
    return {"name": text, "bits": bits(element(fmt)), "float": isinstance(element(fmt), Float)}


def quantize_command(row: Mapping[str, Any], settings: Mapping[str, Any], origin: Mapping[str, Any]) -> str | None:
    """`quantkit quantize ...` that makes the design again; None where its options cannot say the recipe.

    They cannot say different granularities for different layers, and a plan that does not begin with all layers.
    """
    from quantkit.recipe import step_text

    recipe = row.get("recipe")
    if not recipe:
        return None
    base, *others = recipe["plan"]
    if base["layers"] != "*" or any(entry["granularity"] != base["granularity"] for entry in others):
        return None
    words = ["quantkit", "quantize", _typed(settings, origin), "-o", f"{row['id']}.q"]
    words += ["--weights", base["weight"], "--acts", base["act"]]
    words += ["--granularity", base["granularity"]] if base["granularity"] != "row" else []
    for entry in others:
        words += ["--layer", f"{entry['layers']}={entry['weight']}/{entry['act']}"]
    for name, options in recipe["steps"]:
        words += ["--step", step_text((name, options))]
    words += ["--seed", str(recipe["seed"])] if recipe["seed"] else []
    words += ["--env", origin["env"]] if origin.get("env") else []
    asked = normalize_of({"settings": settings, "origin": origin})
    words += ["--normalize", asked] if asked != "stage" else []
    words += ["--factory", origin["factory"]] if origin.get("factory") else []
    words += ["--inputs", origin["calibration"]] if origin.get("calibration") else []
    return shlex.join(words)


def _typed(settings: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """The checkpoint as it was typed when the study was begun, or else its name."""
    if not origin.get("path"):
        return str(settings.get("checkpoint"))
    name = Path(origin["path"]).name
    try:
        words = shlex.split(origin.get("command") or "")
    except ValueError:
        words = []
    return next((word for word in words if Path(word).name == name), name)


def _layers(document: Mapping[str, Any], rows: Sequence[Row], given: Path | None) -> list[dict[str, Any]]:
    """Name, inputs, outputs and kernel of each layer: of the checkpoint, or as the study remembers them.

    Of an older study without its checkpoint names only, as far as rows tell them.
    """
    settings, origin = document["settings"], document.get("origin") or {}
    path = given if given is not None else Path(origin["path"]) if origin.get("path") else None
    model = None
    if path is not None:
        from quantkit.loading import load_checkpoint

        try:
            if given is not None or path.exists():
                model = load_checkpoint(path, env=origin.get("env"), normalize=normalize_of(document))
        except InputError:
            if given is not None:
                raise
    if model is not None and model.meta.get("sha256") != settings.get("checkpoint_sha256"):
        if given is not None:
            raise InputError(
                f"{given} is another checkpoint (sha256 {str(model.meta.get('sha256'))[:12]}...) than the study's "
                f"{settings.get('checkpoint')} ({str(settings.get('checkpoint_sha256'))[:12]}...)"
            )
        model = None
    if model is not None:
        from quantkit.specs import layer_shapes

        return layer_shapes(model)
    if document.get("layers"):
        stored: list[dict[str, Any]] = document["layers"]
        return stored
    priced: list[dict[str, Any]] = next(
        (row["cost"]["layers"] for row in rows if (row.get("cost") or {}).get("layers")), []
    )
    return [{"name": layer["name"], "inputs": None, "outputs": None, "kernel": None} for layer in priced]


def _device(name: str | None) -> dict[str, int] | None:
    try:
        return None if name is None else {r: getattr(find_device(name), r) for r in RESOURCES}
    except HwError:
        return None


def _sensitivity(path: Path) -> dict[str, Any]:
    """{metric, and method where there are several: layers, formats and values (layers, formats)}.

    The last of repeated measurements counts.
    """
    found: dict[str, dict[tuple[str, str], float]] = {}
    rows = read_rows(path)
    varies = [key for key in ("steps", "granularity") if len({str(row.get(key)) for row in rows}) > 1]
    for row in rows:
        try:
            name = ", ".join([str(row["metric"]).replace("_", " "), *(str(row[key]) for key in varies)])
            cell = (str(row["layer"]), f"{row['weights']} × {row['acts']}")
            number = math.nan if row["value"] is None else float(row["value"])
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: not rows of layer, weights, acts, granularity, steps, metric, value") from None
        found.setdefault(name, {})[cell] = number
    tables = {}
    for name, cells in found.items():
        layers, formats = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
        values = [[cells.get((layer, fmt)) for fmt in formats] for layer in layers]
        finite = [[v if v is not None and math.isfinite(v) else None for v in line] for line in values]
        tables[name] = {"layers": layers, "formats": formats, "values": finite}
    return tables


def _head(
    document: Mapping[str, Any], rows: Sequence[Row], study: Mapping[str, Any], failed: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    settings, reference = document["settings"], document["reference"]
    env, algo = (settings.get("env") or {}).get("id", "?"), str(settings.get("algo") or "policy").upper()
    good = sum((row.get("verdict") or {}).get("verdict") == "non-inferior" for row in rows)
    best, seed = rows[study["knee"]], study["seed"]
    why = why_knee(best, reference["mean"], study["margin"])
    stderr = reference.get("stderr")
    metric, n = study["metric"], reference["n"]
    acts = metric == "return"
    what = "policy" if acts else "network"
    facts = [
        (f"float {what}", _text(reference["mean"]), f"± {stderr:.2g} standard error" if stderr else "one episode"),
        ("designs", str(len(rows)), f"{good} non-inferior to float"),
        ("the design to take", f"{best['weights']} × {best['acts']}", f"{best['steps']}: {why}"),
    ]
    cost = value(best, study["x"])
    if cost is not None:
        have = (study["device"] or {}).get(study["x"])
        note = (
            f"{100 * cost / have:.2g} % of {settings['device']}" if have else f"{metric} {_text(value(best, 'mean'))}"
        )
        facts.append((f"its {label(study['x'])}", _text(cost), note))
    versions = {**document.get("versions", {})}
    differ = sorted({k for row in rows for k, v in row.get("versions", {}).items() if versions.get(k, v) != v})
    origin = document.get("origin") or {}
    reproduce = [
        ("checkpoint", str(settings.get("checkpoint"))),
        ("sha256", str(settings.get("checkpoint_sha256"))),
        *(_episodes(settings, seed, n) if acts else _labelled(settings, origin, n)),
        ("hardware target", _targets(settings)),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or "not recorded"),
    ]
    if differ:
        reproduce.append(("rows made with other versions of", ", ".join(differ)))
    most = "the same" if all(design["n"] >= n for design in study["designs"]) else "at most the same"
    lead = f"{algo} policy of {settings.get('checkpoint')}" if acts else f"Network of {settings.get('checkpoint')}"
    lead += f", quantized {len(rows)} ways and " + (
        f"played on {most} {n} episodes" if acts else f"measured on {most} {n:,} labelled inputs"
    )
    lead += " as its float original" + (
        f"; hardware estimated for {settings['device']}." if settings.get("device") else "."
    )
    return {
        "title": f"{env if acts else settings.get('checkpoint')}: {metric} against cost",
        "metric": metric,
        "lead": lead,
        "facts": facts,
        "command": origin.get("command"),
        "reproduce": reproduce,
        "failed": failed,
        "meaning": _meaning(document, study),
    }


def _episodes(settings: Mapping[str, Any], seed: int, n: int) -> list[tuple[str, str]]:
    return [
        ("environment", _environment(settings.get("env") or {})),
        ("observation normalization", str(settings.get("normalizer") or "none")),
        ("episode seeds", f"{seed}..{seed + n - 1}, the same for float and every design"),
    ]


def _labelled(settings: Mapping[str, Any], origin: Mapping[str, Any], n: int) -> list[tuple[str, str]]:
    found = [
        ("labelled inputs", f"{n:,}, sha256 {settings.get('labelled')}"),
        ("calibration", f"{origin.get('calibration') or 'inputs'}, sha256 {settings.get('calibration')}"),
    ]
    return [*found, ("built by", str(origin["factory"]))] if origin.get("factory") else found


def _meaning(document: Mapping[str, Any], study: Mapping[str, Any]) -> list[str]:
    """What the page's numbers mean, a sentence or two each."""
    random = document.get("random") or {}
    what = "episodes" if study["metric"] == "return" else "labelled inputs"
    bars = "Error bars of the mean: 95 % t interval of the paired difference to float, drawn around the design's mean: "
    if study["metric"] == "return":
        lines = [
            "Return: undiscounted, of deterministic episodes; ± is the standard error of the mean.",
            f"{bars}what quantization did, not how episodes vary. Bars of the interquartile mean: its 95 % bootstrap "
            "interval.",
            f"Margin: {_text(study['margin'])} of return, 5 % of the distance between the float and a random policy"
            + (f" ({_text(random['mean'])})." if "mean" in random else "."),
        ]
    else:
        lines = [
            "Accuracy: the share of labelled inputs whose class is the largest output; ± is its standard error.",
            f"{bars}what quantization did, input by input.",
            f"Margin: {_text(study['margin'])} of accuracy, 1 % of the distance between the float network and one that "
            f"always gives the most frequent class ({_text(random.get('mean'))}).",
        ]
    lines += [
        "Non-inferior: the one-sided bound of the paired loss (95 %, or as said) is within the margin. Inferior: the "
        f"gain's bound is below it. Inconclusive: more {what} are needed. Bounds hold for one design, not for the "
        "best of many.",
        "The design to take: the cheapest on the front that is non-inferior; where none is, the cheapest whose mean is "
        "within the margin, else the best.",
    ]
    if study["device"]:
        lines.append(
            "Hardware: an estimate of logical LUTs, flip-flops, DSPs and 18 Kb block RAMs, fitted to synthesis runs, "
            "at the stated clock; no place and route was run. All designs are folded to one target: they compare."
        )
    if any(design["n"] < study["episodes"] for design in study["designs"]):
        lines.append(
            "Some designs were stopped early, when their verdict was clear after fewer episodes; the bounds have "
            "the confidence that keeps 95 % over all looks at the returns."
        )
    return lines


def _text(number: float | None) -> str:
    if number is None:
        return "–"
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.4g}"


def _environment(env: Mapping[str, Any]) -> str:
    text = str(env.get("id", "?"))
    extra = {k: v for k, v in env.items() if k not in ("id", "trained_on") and v}
    return text + (f", {json.dumps(extra)}" if extra else "")


def _targets(settings: Mapping[str, Any]) -> str:
    return "; ".join(_target(one) for one in (settings, *settings.get("also", ())))


def _target(settings: Mapping[str, Any]) -> str:
    if not settings.get("device"):
        return "none"
    made = {"dsp": " with products in DSPs", "auto": " with products in DSPs where LUTs do not suffice"}
    part = settings["device"] + made.get(settings.get("mapping", "lut"), "")
    if settings.get("latency_us") is not None:
        return f"{part}, fewest LUTs within {settings['latency_us']:g} µs"
    if settings.get("luts") is not None:
        return f"{part}, lowest latency within {settings['luts']:,} LUTs"
    return f"{part}, fewest LUTs within the default latency"
