"""Commands that choose among designs: sweep, pareto."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.options import (
    CHOOSE,
    IN,
    NUM,
    PRESETS,
    AcceptVersions,
    Checkpoint,
    Config,
    Device,
    Env,
    Episodes,
    Exceptions,
    Factory,
    Jobs,
    Json,
    LabelledInputs,
    Labels,
    Latencies,
    Luts,
    Mapping,
    Normalize,
    OtherInputs,
    Ray,
    Seed,
    Study,
    StudyDirectory,
    app,
    check_space,
    exceptions,
    labelled_of,
    listed,
    load,
    pipelines_of,
    targets_for,
)
from quantkit.cli.studies import begun, show_report
from quantkit.console import guarded, note, print_json, print_table, progress_bar, say, warn
from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.presets import Kind
    from quantkit.recipe import Recipe


@app.command(
    rich_help_panel=CHOOSE,
    epilog="Example: quantkit sweep agent.zip -o study --weights int3,int4,e2m1 --acts int4,e3m2 "
    "--step rtn --step equalize+gptq --episodes 20 --device xc7a35t --jobs 2",
)
@guarded
def sweep(
    checkpoint: Checkpoint,
    output: StudyDirectory,
    weights: Annotated[str, typer.Option("--weights", metavar="F,F,..", help="Weight formats.", rich_help_panel=NUM)],
    acts: Annotated[
        str, typer.Option("--acts", metavar="F,F,..", help="Formats of layer inputs.", rich_help_panel=NUM)
    ],
    granularity: Annotated[
        str, typer.Option(metavar="G,G,..", help="Weight scales: tensor, row, group<size>.", rich_help_panel=NUM)
    ] = "row",
    step: Annotated[
        list[str] | None,
        typer.Option(
            "--step",
            metavar="STEP[+STEP..]",
            help="A pipeline of methods to try; repeat for alternatives.",
            rich_help_panel=NUM,
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"One more pipeline: {PRESETS}. Repeat for alternatives.", rich_help_panel=NUM
        ),
    ] = None,
    layer: Exceptions = None,
    episodes: Episodes = 20,
    seed: Seed = 1000,
    device: Device = "xc7a35t",
    latency_us: Latencies = None,
    luts: Luts = None,
    mapping: Mapping = "lut",
    jobs: Jobs = 0,
    ray: Ray = None,
    accept_versions: AcceptVersions = False,
    config: Config = None,
    env: Env = None,
    normalize: Normalize = "stage",
    factory: Factory = None,
    inputs: LabelledInputs = None,
    labels: Labels = None,
    calibration: OtherInputs = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text of a language model, documents split at <|endoftext|>.", rich_help_panel=IN),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens of its calibration windows.", rich_help_panel=NUM)
    ] = None,
    json: Json = False,
) -> None:
    """Evaluate and cost every combination of formats, methods and granularity; draw the Pareto front.

    A policy is measured by the return of its episodes, a network with --inputs, --labels and --calibration by its
    accuracy, a language model with --text and --calibration FILE.txt by its perplexity against stored bits, in one
    process and without hardware.
    """
    from quantkit.presets import kind_of
    from quantkit.recipe import check
    from quantkit.sweep import Space

    check_space(weights, acts, granularity)
    targets = targets_for(device, latency_us, luts, mapping)
    kind: Kind = "language" if text else "network" if labels else "policy"
    pipelines = pipelines_of(step, preset, kind) or ((),)
    space = Space(
        listed(weights), listed(acts), listed(granularity), pipelines, exceptions(layer, listed(granularity)[0])
    )
    recipes = space.recipes()
    if text is not None or window is not None:
        _sweep_language(checkpoint, recipes, output, text, calibration, window, json)
        return
    model = load(checkpoint, env, factory, normalize, inputs)
    labelled = labelled_of(checkpoint, model, inputs, labels, calibration)
    if preset and kind_of(model) != kind:
        space = replace(space, pipelines=pipelines_of(step, preset, kind_of(model)))
        recipes = space.recipes()

    from quantkit.report import write_report
    from quantkit.study import settings_for
    from quantkit.sweep import run, study_origin

    for recipe in recipes:
        check(model, recipe)
    if labelled is not None:
        episodes, seed = len(labelled.labels), 0
    settings = settings_for(targets, episodes, seed)
    origin = study_origin(checkpoint, env, normalize, sys.argv[1:], factory, calibration, inputs, labels)
    with begun(output, model, settings, origin, labelled, ray, accept_versions) as study:
        with progress_bar("designs", "designs") as update:
            rows = run(
                study,
                recipes,
                output,
                jobs=jobs or os.cpu_count() or 1,
                ray=ray,
                progress=lambda done, total, _: update(done, total),
            )
    report = write_report(output)
    for row in rows:
        if "error" in row:
            names = ", ".join((row["weights"], row["acts"], row["granularity"], row["steps"]))
            note(f"left out: {names}: {row['error']}")
    left = {name: why for row in rows for name, why in row.get("float_layers", {}).items()}
    if not json:
        for name, why in left.items():
            warn(f"{name} stays in float: {why}")
    show_report(report, json)


def _sweep_language(
    checkpoint: Path,
    recipes: list[Recipe],
    output: Path,
    text: Path | None,
    calibration: Path | None,
    window: int | None,
    json: bool,
) -> None:
    from quantkit.loading import is_hugging_face

    if text is None or not is_hugging_face(checkpoint):
        raise InputError(f"{checkpoint}: --text FILE.txt, with or without --window, is for a Hugging Face directory")
    from quantkit.language_sweep import TABLE, best_of, sweep_language

    model = load(checkpoint, None, None, "stage")
    with progress_bar("designs", "designs") as update:
        document, rows = sweep_language(
            checkpoint, model, recipes, output, text=text, calibration=calibration, window=window, progress=update
        )
    reference, front = document["reference"], set(best_of(rows))
    if json:
        print_json({"reference": reference["mean"], "rows": rows, "front": [rows[i]["id"] for i in sorted(front)]})
        return
    say(f"float: perplexity {reference['mean']:.4f} of {reference['n']:,} documents, {reference['tokens']:,} tokens")
    cells = []
    for index, row in sorted(enumerate(rows), key=lambda pair: pair[1].get("bits_per_weight", 0.0)):
        if "error" in row:
            note(f"left out: {row['weights']}, {row['acts']}, {row['granularity']}, {row['steps']}: {row['error']}")
            continue
        names = [row["weights"].split()[0], row["acts"].split()[0], row["granularity"], row["steps"]]
        numbers = [f"{row['score']['mean']:.4f}", f"{row['ratio']:.4f} ± {row['ratio_stderr'] or 0.0:.4f}"]
        numbers += [f"{row['bits_per_weight']:.3f}", f"{row['weight_kib']:,.1f}", "*" * (index in front)]
        cells.append([*names, *numbers])
    columns = dict.fromkeys(("weights", "inputs", "scales", "method"), "left")
    columns |= dict.fromkeys(("perplexity", "against float", "bits", "KiB"), "right") | {"front": "left"}
    print_table("Perplexity against bits stored for each quantized weight", columns, cells)
    say(f"wrote {output / TABLE}")


@app.command(rich_help_panel=CHOOSE, epilog="Example: quantkit pareto study --x weight_kib --y mean")
@guarded
def pareto(
    study: Study,
    x: Annotated[
        str, typer.Option(help="Cost: luts, ffs, dsps, bram18, latency_us, weight_kib, bits_per_weight.")
    ] = "luts",
    y: Annotated[str, typer.Option(help="Quality: mean, iqm, agreement, ...")] = "mean",
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of several hardware targets the one with this in its name.")
    ] = None,
    json: Json = False,
) -> None:
    """Show the Pareto front of a study and redraw its figures for other axes."""
    from quantkit.report import write_report

    stem = "pareto" if (x, y) == ("luts", "mean") else f"pareto_{y}_{x}"
    stem += "" if target is None else "_" + re.sub(r"\W+", "_", target)
    show_report(write_report(study, x=x, y=y, stem=stem, target=target), json)
