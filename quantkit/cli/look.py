"""Commands that look at a checkpoint: inspect, evaluate, analyze."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.options import (
    IN,
    LOOK,
    NUM,
    OUT,
    PRESETS,
    Cache,
    Checkpoint,
    Env,
    Exceptions,
    Factory,
    Force,
    Granularity,
    Inputs,
    Json,
    MethodSeed,
    Normalize,
    Seed,
    States,
    Steps,
    app,
    for_kind,
    load,
    recipe_of,
)
from quantkit.console import guarded, print_json, print_table, progress_bar, remarks, say, warn
from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.analyze import Analysis
    from quantkit.model import Model


@app.command(rich_help_panel=LOOK, epilog="Example: quantkit inspect ppo/LunarLander-v2_1")
@guarded
def inspect(
    checkpoint: Checkpoint,
    env: Env = None,
    factory: Factory = None,
    inputs: Inputs = None,
    normalize: Normalize = "stage",
    json: Json = False,
) -> None:
    """Show what a checkpoint holds: algorithm, environment, layers, parameters."""
    from quantkit.loading import describe_checkpoint

    document = describe_checkpoint(load(checkpoint, env, factory, normalize, inputs))
    if json:
        print_json(document)
        return
    say(f"{checkpoint}")
    for key in ("kind", "algo", "env", "observations", "made_of", "memory", "actions", "normalizer", "parameters"):
        if (text := _phrase(document[key])) != "none":
            say(f"  {key.replace('_', ' ')}: {text}")
    fields = {"name": "layer", "op": "op", "in_features": "in", "out_features": "out", "parameters": "parameters"}
    fields |= {"weight": "weights", "act": "input"}
    rows = [[_phrase(entry[key]) for key in fields] for entry in document["layers"]]
    justify = {"in": "right", "out": "right", "parameters": "right"}
    rows += [[point["name"], "point", "", "", "", "", point["act"]] for point in document["points"]]
    print_table("", {heading: justify.get(heading, "left") for heading in fields.values()}, rows)
    for remark in remarks(document):
        warn(remark)


def _phrase(fact: Any) -> str:
    """A fact of `inspect` in words: a space as Discrete(4), a normalizer by its mode."""
    match fact:
        case None:
            return "none"
        case {"mode": mode, **rest}:
            return f"{mode}, clip {rest['clip']:g}" if rest.get("clip") else str(mode)
        case {"type": "Box", "shape": shape, **rest}:
            bounds = f" in {rest['low']}..{rest['high']}" if "low" in rest else ""
            return f"Box{tuple(shape)}{bounds}"
        case {"type": kind, "nvec": nvec}:
            return f"{kind}({', '.join(map(str, nvec))})"
        case int():
            return f"{fact:,}"
        case dict() if fact and all(isinstance(value, str) for value in fact.values()):
            return ", ".join(f"{key} {value}".strip() for key, value in fact.items())
    return str(fact)


@app.command(rich_help_panel=LOOK, epilog="Example: quantkit evaluate agent.zip --episodes 20 --seed 1000 --json")
@guarded
def evaluate(
    checkpoint: Checkpoint,
    env: Env = None,
    episodes: Annotated[
        int | None,
        typer.Option(
            "--episodes", "-n", min=1, help="Episodes (20), or problems of a task (500).", rich_help_panel=NUM
        ),
    ] = None,
    seed: Seed = 1000,
    factory: Factory = None,
    inputs: Inputs = None,
    labels: Annotated[
        Path | None,
        typer.Option(help=".npy or .npz with a class for each input: measure accuracy.", rich_help_panel=IN),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text of a language model, documents split at <|endoftext|>: measure perplexity.", rich_help_panel=IN
        ),
    ] = None,
    kv_cache: Cache = None,
    task: Annotated[
        str | None,
        typer.Option(help="Problems for a language policy: arithmetic. Measure the reward.", rich_help_panel=IN),
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw answers to --task at temperature 1.", rich_help_panel=NUM)
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(help="A float policy: the KL divergence to it on its answers to --task.", rich_help_panel=IN),
    ] = None,
    normalize: Normalize = "stage",
    json: Json = False,
) -> None:
    """Report the return of deterministic episodes; with --labels, the accuracy; with --text, the perplexity; with
    --task, the reward.

    Each with its uncertainty.
    """
    from quantkit.policy import Policy

    if kv_cache is not None:
        from quantkit.caches import parse_cache

        parse_cache(kv_cache)
    if task is None and (sample or reference is not None):
        raise InputError("--sample and --reference are for --task")
    model = load(checkpoint, env, factory, normalize, inputs)

    from quantkit.language import is_language

    if is_language(model) and task is not None:
        if text is not None or kv_cache is not None:
            raise InputError("--task is evaluated alone; leave out --text and --kv-cache")
        _evaluate_reward(checkpoint, model, task, episodes or 500, seed, sample, reference, json)
    elif is_language(model):
        _evaluate_perplexity(checkpoint, model, text, kv_cache, json)
    elif text is not None or kv_cache is not None or task is not None:
        raise InputError(f"{checkpoint} is no language model; --task, --text and --kv-cache are for one")
    elif isinstance(model.module, Policy) and labels is None:
        _evaluate_policy(checkpoint, model, episodes or 20, seed, json)
    elif isinstance(model.module, Policy):
        raise InputError(f"{checkpoint} is a policy: it is evaluated in episodes; --labels is for other networks")
    elif labels is None or inputs is None:
        raise InputError(
            f"{checkpoint} is no policy: give --inputs FILE.npy and --labels FILE.npy to measure its accuracy"
        )
    else:
        _evaluate_accuracy(checkpoint, model, inputs, labels, json)


def _evaluate_policy(checkpoint: Path, model: Model, episodes: int, seed: int, json: bool) -> None:
    from quantkit.study import policy_of
    from quantkit.tasks.episodes import evaluate_policy

    policy, spec = policy_of(model)
    with progress_bar("episodes", "episodes") as update:
        score = evaluate_policy(policy, spec, episodes=episodes, seed=seed, progress=update)
    if json:
        print_json(score.to_json())
        return
    say(
        f"{checkpoint} on {spec.id}: return {score.mean:.2f} ± {score.stderr:.2f} "
        f"(standard error of {score.n} episodes)"
        if score.n > 1
        else f"{checkpoint} on {spec.id}: return {score.mean:.2f} (one episode: no error known)"
    )
    if score.n > 1:
        say(f"  std {score.std:.2f}, interquartile mean {score.iqm:.2f} [{score.iqm_low:.2f}, {score.iqm_high:.2f}]")
    say(f"  seeds {seed}..{seed + episodes - 1}, {sum(score.lengths):,} steps in {score.seconds:.1f} s")


def _evaluate_accuracy(checkpoint: Path, model: Model, inputs: Path, labels: Path, json: bool) -> None:
    from quantkit.study import calib_for
    from quantkit.tasks.accuracy import evaluate as accuracy
    from quantkit.tasks.accuracy import read_labels

    classes = read_labels(labels)
    states = calib_for(model, None, inputs=inputs).inputs
    with progress_bar("inputs", "inputs") as update:
        try:
            score = accuracy(model.module, states, classes, progress=update)
        except InputError as error:
            raise InputError(f"{labels} for {inputs}: {error}") from None
    if json:
        print_json(score.to_json())
        return
    say(
        f"{checkpoint}: accuracy {score.mean:.2%} ± {score.stderr:.2%} (standard error of {score.n:,} inputs, "
        f"{score.correct:,} right)"
    )
    say(f"  95 % interval [{score.low:.2%}, {score.high:.2%}], {score.seconds:.1f} s")


def _evaluate_perplexity(checkpoint: Path, model: Model, text: Path | None, kv_cache: str | None, json: bool) -> None:
    from quantkit.caches import make_cache
    from quantkit.language import perplexity
    from quantkit.loaders.hf import read_tokenizer

    if text is None:
        raise InputError(
            f"{checkpoint} is a language model: give --text FILE.txt for its perplexity, or --task arithmetic"
        )
    cache = None if kv_cache is None else lambda config: make_cache(kv_cache, config)
    with progress_bar("perplexity", "documents") as update:
        score = perplexity(model, read_tokenizer(checkpoint), text, cache=cache, progress=update)
    if json:
        kept = ("metric", "mean", "stderr", "n", "tokens", "seconds")
        print_json({key: getattr(score, key) for key in kept} | {"kv_cache": kv_cache})
        return
    error = f"± {score.stderr:.4f} (standard error of" if score.n > 1 else "(no error known of"
    say(f"{checkpoint} on {text}: perplexity {score.mean:.4f} {error} {score.n:,} documents)")
    say(f"  {score.tokens:,} tokens predicted in {score.seconds:.1f} s" + (f", cache {kv_cache}" if kv_cache else ""))


def _evaluate_reward(
    checkpoint: Path,
    model: Model,
    task: str,
    problems: int,
    seed: int,
    sample: bool,
    reference: Path | None,
    json: bool,
) -> None:
    from quantkit.language import runner
    from quantkit.loaders.hf import read_tokenizer
    from quantkit.tasks import reward

    if task not in reward.TASKS:
        raise InputError(f"--task {task!r}; accepted: {', '.join(reward.TASKS)}")
    made, tokenizer, end = (
        reward.TASKS[task](problems, seed),
        read_tokenizer(checkpoint),
        model.meta["config"].get("eos_token_id"),
    )
    if not isinstance(end, int):
        raise InputError(
            f"{checkpoint}: config.json has eos_token_id {end}; a task needs the one token that ends an answer"
        )
    options: Any = {"end": end, "temperature": float(sample), "seed": seed}
    with progress_bar("problems", "problems") as update:
        score = reward.evaluate(runner(model), tokenizer, made, **options, progress=update)
    document = score.to_json() | {"task": task}
    if reference is not None:
        other = load(reference, None, None, "stage", None)
        if other.meta.get("vocabulary") != model.meta["vocabulary"]:
            raise InputError(
                f"{reference} and {checkpoint} have different vocabularies; give the float policy it came from"
            )
        with progress_bar("KL", "problems") as update:
            nats, error = reward.kl(runner(model), runner(other), tokenizer, made, **options, progress=update)
        document |= {"kl": nats, "kl_stderr": error if problems > 1 else None}
    if json:
        print_json(document)
        return
    how = "drawn" if sample else "greedy"
    say(f"{checkpoint} on {problems:,} problems of {task}, {how} answers: reward {score.mean:.4f} ± {score.stderr:.4f}")
    right = f"{score.exact_match:.2%}, 95 % interval [{score.exact_low:.2%}, {score.exact_high:.2%}]"
    say(f"  right {right}, {score.seconds:.1f} s")
    if reference is not None:
        say(f"  KL to {reference}: {nats:.5f} ± {error:.5f} nats a token")


@app.command(
    rich_help_panel=LOOK, epilog="Example: quantkit analyze agent.zip --weights int4 --acts int4 -o agent.analysis"
)
@guarded
def analyze(
    checkpoint: Checkpoint,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="FORMAT", help="Weight format.", rich_help_panel=NUM)
    ] = None,
    acts: Annotated[
        str | None, typer.Option("--acts", metavar="FORMAT", help="Format of layer inputs.", rich_help_panel=NUM)
    ] = None,
    granularity: Granularity = "row",
    step: Steps = None,
    preset: Annotated[str | None, typer.Option(help=f"Methods put together: {PRESETS}.", rich_help_panel=NUM)] = None,
    layer: Exceptions = None,
    calibration: States = 2048,
    states: Annotated[
        int | None,
        typer.Option(min=1, help="States to measure on; default 2048 of a policy, else 256.", rich_help_panel=NUM),
    ] = None,
    attempts: Annotated[
        bool,
        typer.Option(
            "--try/--no-try", help="Quantize once more for each option and keep those that help.", rich_help_panel=NUM
        ),
    ] = True,
    inputs: Inputs = None,
    seed: MethodSeed = 0,
    env: Env = None,
    factory: Factory = None,
    normalize: Normalize = "stage",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for layers.csv, analysis.json and figures.", rich_help_panel=OUT),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Tell what each layer loses to quantization, which layers matter, and which option to try."""
    from quantkit.files import check_new

    if output is not None:
        check_new(output, force=force, marker="analysis.json")
    stored = (checkpoint / "quantkit.json").is_file()
    if stored and (weights or acts or step or preset or layer):
        raise InputError(f"{checkpoint} is quantized already; give its checkpoint to try other formats and steps")
    if not stored and (weights is None or acts is None):
        raise InputError(f"{checkpoint} is not quantized; give formats: --weights int4 --acts int4")
    recipe = None if stored else recipe_of(weights or "", acts or "", granularity, step, preset, layer, seed)
    model = load(checkpoint, env, factory, normalize, inputs)

    from quantkit import analyze as analysis
    from quantkit.recipe import check
    from quantkit.study import calib_for, fresh_states

    if recipe is not None:
        recipe = for_kind(recipe, preset, model)
        check(model, recipe)
    with progress_bar("rollouts", "episodes") as update:
        seen = fresh_states(model, states, inputs, behind=0 if stored else calibration)
        calib = None if recipe is None else calib_for(model, calibration, update, inputs)
    with progress_bar("analyze", "") as update:
        if recipe is None or calib is None:
            result = analysis.diagnose(model, seen, stored_sqnr=analysis.stored_sqnr(checkpoint), progress=update)
        else:
            result = analysis.analyze(model, recipe, calib, seen, attempts=attempts, progress=update)
    files = [] if output is None else _write_analysis(result, output, str(checkpoint.name), force)
    if json:
        print_json(result.to_json() | {"files": files})
        return
    _show_analysis(result, checkpoint, stored, preset, attempts)
    for path in files:
        say(f"wrote {path}")


def _write_analysis(result: Analysis, folder: Path, title: str, force: bool) -> list[str]:
    from quantkit.analysis_figure import analysis_figure
    from quantkit.analyze import write_tables
    from quantkit.figures import save_figure
    from quantkit.files import new_directory

    with new_directory(folder, force=force, marker="analysis.json") as temporary:
        names = [path.name for path in write_tables(result, temporary)]
        names += [path.name for path in save_figure(analysis_figure(result, title), temporary / "layers")]
    return [str(folder / name) for name in names]


def _show_analysis(result: Analysis, checkpoint: Path, stored: bool, preset: str | None, attempts: bool) -> None:
    from quantkit.analyze import phrase

    columns = {"layer": "left", "weights": "left", "input": "left"}
    columns |= dict.fromkeys(
        ("weight dB", "input dB", "output dB", "clipped", "silent", "max/99.9 %", "only this layer", "share"), "right"
    )

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else "exact" if value == math.inf else format(value, form)

    rows = []
    for place in result.places:
        silent = "-" if place.silent is None else str(place.silent)
        rows.append(
            [
                place.name, place.weight, place.act, number(place.weight_sqnr_db, ".1f"),
                number(place.act_sqnr_db, ".1f"), number(place.output_sqnr_db, ".1f"),
                number(place.saturation, ".2%"), silent, number(place.outliers, ".3g"),
                number(place.only.error, ".2%"), number(place.share, ".0%"),
            ]
        )  # fmt: skip
    worst = max(range(len(rows)), key=lambda i: result.places[i].share)
    print_table(f"{checkpoint}: {phrase(result)}", columns, rows, highlight=worst if len(rows) > 1 else None)
    if stored:
        say("a quantized directory holds no float weights: errors are of inputs alone, on top of its weights")
    for finding in result.findings:
        names = ", ".join(finding.places[:4]) + (f" and {len(finding.places) - 4} more" * (len(finding.places) > 4))
        instead = " instead of --preset" if preset and finding.option.startswith("--step") else ""
        gain = "not tried" if finding.after is None else f"tried: {finding.before:.2%} -> {finding.after:.2%}"
        say(f"{names}: {finding.problem}\n  -> {finding.option}{instead}   ({gain})")
    if not result.findings and not stored:
        say("nothing to advise" + (": no option that the measures suggest reduces the error" if attempts else ""))
    for remark in remarks(result.gaps):
        warn(remark)
