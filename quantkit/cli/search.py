"""The command that looks for the best design by itself: search."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Literal

import typer

from quantkit.cli.options import (
    CHOOSE,
    HW,
    NUM,
    PRESETS,
    RUN,
    AcceptVersions,
    Checkpoint,
    Config,
    Device,
    Env,
    Episodes,
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
    StudyDirectory,
    app,
    check_space,
    labelled_of,
    listed,
    load,
    pipelines_of,
    targets_for,
)
from quantkit.cli.studies import begun, show_report
from quantkit.console import guarded, note, progress_bar

_SEARCH = "Search"


@app.command(
    rich_help_panel=CHOOSE,
    epilog="Example: quantkit search agent.zip -o study --budget-designs 60 --episodes 100 "
    "--weights int2,int3,int4,int8 --acts int3,int4,int6,int8 --device xc7a35t --latency-us 10",
)
@guarded
def search(
    checkpoint: Checkpoint,
    output: StudyDirectory,
    budget_designs: Annotated[int, typer.Option(min=1, help="Designs to try at most.", rich_help_panel=_SEARCH)] = 60,
    budget_episodes: Annotated[
        int | None,
        typer.Option(min=1, help="Propose no more after so many; labelled inputs count.", rich_help_panel=_SEARCH),
    ] = None,
    weights: Annotated[
        str, typer.Option("--weights", metavar="F,F,..", help="Weight formats of a layer.", rich_help_panel=_SEARCH)
    ] = "int2,int3,int4,int5,int6,int8",
    acts: Annotated[
        str, typer.Option("--acts", metavar="F,F,..", help="Formats of a layer's inputs.", rich_help_panel=_SEARCH)
    ] = "int2,int3,int4,int5,int6,int8",
    granularity: Annotated[
        str, typer.Option(metavar="G,G,..", help="Weight scales: tensor, row, group<size>.", rich_help_panel=_SEARCH)
    ] = "row",
    step: Annotated[
        list[str] | None,
        typer.Option(
            "--step",
            metavar="STEP[+STEP..]",
            help="A pipeline of methods to choose from; repeat for more.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"One more pipeline: {PRESETS}.", rich_help_panel=_SEARCH),
    ] = None,
    sampler: Annotated[
        Literal["nsga2", "tpe"], typer.Option(help="Optuna's sampler.", rich_help_panel=_SEARCH)
    ] = "nsga2",
    search_seed: Annotated[int, typer.Option(min=0, help="Of the proposals.", rich_help_panel=_SEARCH)] = 0,
    batch: Annotated[int, typer.Option(min=2, help="Designs proposed at once.", rich_help_panel=_SEARCH)] = 16,
    race: Annotated[
        bool, typer.Option(help="Stop a design's episodes, or inputs, as soon as they decide.", rich_help_panel=NUM)
    ] = True,
    cost: Annotated[
        Literal["luts", "dsps", "bram18", "latency_us", "weight_kib"] | None,
        typer.Option(help="What return is traded for; luts, unless they are given.", rich_help_panel=_SEARCH),
    ] = None,
    episodes: Episodes = 20,
    seed: Seed = 1000,
    device: Device = "xc7a35t",
    latency_us: Latencies = None,
    luts: Luts = None,
    mapping: Mapping = "lut",
    max_luts: Annotated[float | None, typer.Option(min=0, help="Budget of a design: LUTs.", rich_help_panel=HW)] = None,
    max_dsps: Annotated[float | None, typer.Option(min=0, help="DSPs.", rich_help_panel=HW)] = None,
    max_bram18: Annotated[float | None, typer.Option(min=0, help="18 Kb block RAMs.", rich_help_panel=HW)] = None,
    max_weight_kib: Annotated[float | None, typer.Option(min=0, help="KiB of weights.", rich_help_panel=HW)] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where Optuna's record goes: sqlite:///FILE, postgresql://..; default: a file in the study.",
            rich_help_panel=RUN,
        ),
    ] = None,
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
    json: Json = False,
) -> None:
    """Find the front of mixed precision: allocated, then searched, with as few episodes as decide.

    A policy is measured by the return of its episodes, a network with --inputs, --labels and --calibration by its
    accuracy.
    """
    from quantkit.presets import kind_of, preset_steps
    from quantkit.recipe import parse_format

    check_space(weights, acts, granularity)
    targets = targets_for(device, latency_us, luts, mapping)
    for text in (*listed(weights), *listed(acts)):
        parse_format(text)
    pipelines_of(step, preset)  # their names are checked before anything is loaded
    limits = {"luts": max_luts, "dsps": max_dsps, "bram18": max_bram18, "weight_kib": max_weight_kib}
    if storage is not None:
        from quantkit.search_record import check_storage

        check_storage(storage, output)
    chosen = cost or ("weight_kib" if not targets else "luts" if luts is None else "latency_us")
    model = load(checkpoint, env, factory, normalize, inputs)
    labelled = labelled_of(checkpoint, model, inputs, labels, calibration)
    kind = kind_of(model)
    pipelines = pipelines_of(step, preset, kind) or (preset_steps("fast", kind),)

    from quantkit.backends import workers
    from quantkit.report import write_report
    from quantkit.search import search
    from quantkit.search_space import SearchSpace
    from quantkit.study import settings_for
    from quantkit.sweep import study_origin

    space = SearchSpace(listed(weights), listed(acts), listed(granularity), pipelines, search_seed)
    if labelled is not None:
        episodes, seed = len(labelled.labels), 0
    settings = settings_for(targets, episodes, seed)
    origin = study_origin(checkpoint, env, normalize, sys.argv[1:], factory, calibration, inputs, labels)
    with (
        begun(output, model, settings, origin, labelled, ray, accept_versions) as study,
        workers(study, jobs or os.cpu_count() or 1, ray) as mapper,
        progress_bar("sensitivities", "cells") as measuring,
        progress_bar("designs", "designs") as designs,
    ):
        rows = search(
            study,
            output,
            space,
            mapper,
            designs=budget_designs,
            episodes=budget_episodes,
            sampler=sampler,
            cost=chosen,
            budgets={name: most for name, most in limits.items() if most is not None},
            batch=batch,
            races=race,
            storage=storage,
            measuring=measuring,
            progress=lambda done, total, _: designs(done, total),
        )
    for row in rows:
        if "error" in row:
            note(f"left out: {row['weights']}, {row['acts']}, {row['steps']}: {row['error']}")
    if not json:
        played = sum(row.get("episodes", 0) for row in rows)
        unit = "episodes" if labelled is None else "inputs"
        note(f"{len(rows)} designs on {played:,} {unit}; all of them to the end are {len(rows) * episodes:,}")
    show_report(write_report(output, x=chosen), json)
