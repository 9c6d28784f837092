"""Commands that make something of it: quantize, export, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from quantkit.cli.options import (
    _MAKE,
    _NUM,
    _OUT,
    _PRESETS,
    Checkpoint,
    Env,
    Episodes,
    Exceptions,
    Factory,
    Force,
    Inputs,
    Json,
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


@app.command(
    rich_help_panel=_MAKE,
    epilog="Example: quantkit quantize agent.zip -o agent.q --weights int4 --acts e3m2 "
    "--step smoothquant --step gptq:act_order=true",
)
@guarded
def quantize(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.", rich_help_panel=_OUT)],
    weights: Annotated[
        str,
        typer.Option(
            "--weights", metavar="FORMAT", help="Weight format: int4, e2m1, ternary, ...", rich_help_panel=_NUM
        ),
    ],
    acts: Annotated[
        str, typer.Option("--acts", metavar="FORMAT", help="Format of layer inputs, or float.", rich_help_panel=_NUM)
    ],
    granularity: Annotated[
        str, typer.Option(help="Weight scales: tensor, row or group<size>.", rich_help_panel=_NUM)
    ] = "row",
    step: Steps = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Methods put together for you: {_PRESETS}.", rich_help_panel=_NUM)
    ] = None,
    layer: Exceptions = None,
    calibration: States = 2048,
    inputs: Inputs = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random choices in methods.", rich_help_panel=_NUM)] = 0,
    env: Env = None,
    factory: Factory = None,
    normalize: Normalize = "stage",
    force: Force = False,
    json: Json = False,
) -> None:
    """Quantize a checkpoint into a directory; repeat --step to apply methods in order."""
    from quantkit.files import check_new
    from quantkit.recipe import check, check_groups

    recipe = recipe_of(weights, acts, granularity, step, preset, layer, seed)
    check_new(output, force=force, marker="quantkit.json")
    model = load(checkpoint, env, factory, normalize, inputs)
    recipe = for_kind(recipe, preset, model)
    check(model, recipe)
    check_groups(model, recipe)

    from quantkit.artifact import save_artifact, summary
    from quantkit.loading import gaps
    from quantkit.recipe import quantize as run
    from quantkit.study import calib_for

    with progress_bar("calibration rollouts", "episodes") as update:
        calib = calib_for(model, calibration, update, inputs)
    with progress_bar("quantize", "steps") as update:
        quantized = run(model, recipe, calib, lambda _name, done, total: update(done, total))
    save_artifact(quantized, output, force=force)
    missing = gaps(quantized)
    document = {"output": str(output), **summary(quantized), **missing}
    if json:
        print_json(document)
        return
    rows = [
        [
            e["name"],
            "x".join(map(str, e["shape"])),
            e["weight"],
            e["act"],
            "-" if e["sqnr_db"] is None else f"{e['sqnr_db']:.1f}",
        ]
        for e in document["layers"]
    ]
    columns = {"layer": "left", "shape": "right", "weights": "left", "input": "left", "SQNR dB": "right"}
    print_table(f"{output}: {document['bits_per_weight']:.2f} bits per weight", columns, rows)
    for remark in remarks(missing):
        warn(remark)


@app.command(rich_help_panel=_MAKE, epilog="Example: quantkit export agent.q -o agent.onnx --postprocess")
@guarded
def export(
    directory: Annotated[Path, typer.Argument(help="Directory written by quantkit quantize.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write.", rich_help_panel=_OUT)],
    to: Annotated[
        Literal["qdq", "qdq-real", "qcdq", "qonnx", "finn"],
        typer.Option(
            help="qdq: exact in onnxruntime, scales after the sum; qdq-real: scales inside DequantizeLinear, for other "
            "converters; qcdq: the same with Clip, 8-bit types and opset 13; qonnx: for hls4ml and other QONNX tools; "
            "finn: QONNX that keeps FINN's rules."
        ),
    ] = "qdq",
    postprocess: Annotated[
        bool,
        typer.Option(
            "--postprocess/--raw", help="Put argmax, squashing, clipping and rescaling of actions into the file."
        ),
    ] = False,
    factory: Factory = None,
    force: Force = False,
) -> None:
    """Write an ONNX file: input `obs`, output `actions`, normalizer inside."""
    from quantkit.artifact import load_artifact
    from quantkit.export import export_onnx

    export_onnx(load_artifact(directory, factory=factory), output, to=to, postprocess=postprocess, overwrite=force)
    say(f"{output}: {output.stat().st_size:,} bytes; prove it with: quantkit verify {directory} {output}")


@app.command(rich_help_panel=_MAKE, epilog="Example: quantkit verify agent.q agent.onnx --episodes 20")
@guarded
def verify(
    directory: Annotated[Path, typer.Argument(help="Directory written by quantkit quantize.")],
    onnx_file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="File written by quantkit export.")],
    episodes: Episodes = 10,
    seed: Seed = 1000,
    factory: Factory = None,
    inputs: Inputs = None,
    json: Json = False,
) -> None:
    """Run torch and onnxruntime on the same states and episodes and compare; exit 1 if they disagree."""
    from quantkit.artifact import load_artifact
    from quantkit.study import verify_export

    model = load_artifact(directory, factory=factory)
    with progress_bar("verify", "episodes") as update:
        result = verify_export(model, onnx_file, episodes=episodes, seed=seed, inputs=inputs, progress=update)
    document = result.to_json()
    if json:
        print_json(document)
    else:
        rows = [[key, f"{v:.6g}" if isinstance(v, float) else str(v)] for key, v in document.items()]
        print_table(f"{onnx_file} against {directory}", {"check": "left", "result": "right"}, rows)
        say("verified: onnxruntime behaves like the quantized policy" if result.ok else "NOT verified")
    if not result.ok:
        raise typer.Exit(1)
