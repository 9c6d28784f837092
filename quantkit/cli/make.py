"""Commands that make something of it: quantize, generate, export, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quantkit.cli.language import language_job, run_language_job, show_forecast
from quantkit.cli.options import (
    IN,
    MAKE,
    NUM,
    OUT,
    PRESETS,
    Cache,
    Calibration,
    Checkpoint,
    Env,
    Episodes,
    Exceptions,
    Factory,
    Force,
    Granularity,
    Inputs,
    Json,
    MethodSeed,
    NewDirectory,
    Normalize,
    Quantized,
    Seed,
    Steps,
    app,
    bytes_of,
    calib_of,
    for_kind,
    load,
    recipe_of,
)
from quantkit.console import guarded, print_json, print_table, progress_bar, remarks, say, warn
from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.model import Model, Normalization
    from quantkit.recipe import Recipe


@app.command(
    rich_help_panel=MAKE,
    epilog="Example: quantkit quantize agent.zip -o agent.q --weights int4 --acts e3m2 "
    "--step smoothquant --step gptq:act_order=true",
)
@guarded
def quantize(
    checkpoint: Checkpoint,
    output: NewDirectory,
    weights: Annotated[
        str,
        typer.Option(
            "--weights", metavar="FORMAT", help="Weight format: int4, e2m1, ternary, ...", rich_help_panel=NUM
        ),
    ],
    acts: Annotated[
        str, typer.Option("--acts", metavar="FORMAT", help="Format of layer inputs, or float.", rich_help_panel=NUM)
    ],
    granularity: Granularity = "row",
    step: Steps = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Methods put together for you: {PRESETS}.", rich_help_panel=NUM)
    ] = None,
    layer: Exceptions = None,
    calibration: Calibration = None,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a calibration window; default 512 or the context.", rich_help_panel=NUM),
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Only the first documents of the text.", rich_help_panel=NUM)
    ] = None,
    inputs: Inputs = None,
    seed: MethodSeed = 0,
    env: Env = None,
    factory: Factory = None,
    normalize: Normalize = "stage",
    memory: Annotated[
        str | None,
        typer.Option(
            help="Of a language model: activations to hold, such as 4GiB; the rest goes to disk. Default: what its "
            "largest weight takes.",
            rich_help_panel=NUM,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="What a language model computes its products in when it is calibrated: float32, bfloat16, or auto, "
            "as its weights are stored, where the processor has it.",
            rich_help_panel=NUM,
        ),
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Foretell time and memory of a language model; write nothing.", rich_help_panel=OUT
        ),
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Quantize a checkpoint into a directory; repeat --step to apply methods in order.

    Of a language model the embeddings, the head and the operands of attention stay in float unless --layer names them:
    --layer 'lm_head=int8/float'. It is read and quantized block by block; an interrupted run leaves OUTPUT.partial and
    goes on from there when the same command is given again.
    """
    from quantkit.files import check_new

    recipe = recipe_of(weights, acts, granularity, step, preset, layer, seed)
    budget = None if memory is None else bytes_of(memory, "--memory")
    check_new(output, force=force, marker="quantkit.json")

    from quantkit.loading import gaps, is_hugging_face

    if factory is None and is_hugging_face(checkpoint):
        if inputs is not None or env is not None:
            raise InputError(f"{checkpoint} is a language model; --inputs and --env are for other networks")
        job = language_job(checkpoint, recipe, preset, calibration, window, documents, dtype)
        if dry_run:
            show_forecast(job, checkpoint, budget, json)
            return
        quantized, document = run_language_job(job, checkpoint, output, budget, force)
    else:
        if dtype != "auto":
            raise InputError(f"--dtype is for language models; {checkpoint} is none")
        if dry_run:
            raise InputError(f"--dry-run is for language models; {checkpoint} is none and takes seconds")
        quantized, document = _quantize_whole(
            checkpoint, output, recipe, preset, calibration, window, documents, inputs, env, factory, normalize, force
        )
    missing = gaps(quantized)
    document = {"output": str(output), **document, **missing}
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


def _quantize_whole(
    checkpoint: Path,
    output: Path,
    recipe: Recipe,
    preset: str | None,
    calibration: str | None,
    window: int | None,
    documents: int | None,
    inputs: Path | None,
    env: str | None,
    factory: str | None,
    normalize: Normalization,
    force: bool,
) -> tuple[Model, dict[str, Any]]:
    """Quantize what is no language model and write it; the model and its summary."""
    from quantkit.artifact import save_artifact, summary
    from quantkit.recipe import check
    from quantkit.recipe import quantize as run

    model = load(checkpoint, env, factory, normalize, inputs)
    recipe = for_kind(recipe, preset, model)
    check(model, recipe)
    with progress_bar("calibration rollouts", "episodes") as update:
        calib = calib_of(model, checkpoint, calibration, window, documents, inputs, update)
    with progress_bar("quantize", "steps") as update:
        quantized = run(model, recipe, calib, lambda _name, done, total: update(done, total))
    save_artifact(quantized, output, force=force)
    return quantized, summary(quantized)


@app.command(
    rich_help_panel=MAKE,
    epilog="Example: quantkit generate model.q --prompt 'Once upon a time' --kv-cache saq:levels=16-8-4",
)
@guarded
def generate(
    directory: Annotated[
        Path, typer.Argument(help="Directory written by quantkit quantize, a Hugging Face one, or model.onnx.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to go on from.", rich_help_panel=IN)],
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to make at most; fewer where the model ends.", rich_help_panel=NUM)
    ] = 100,
    sample: Annotated[
        bool, typer.Option("--sample/--greedy", help="Draw tokens, or take the likeliest.", rich_help_panel=NUM)
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Of --sample: above 0; default 1.", rich_help_panel=NUM)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of --sample.", rich_help_panel=NUM)] = 0,
    kv_cache: Cache = None,
    json: Json = False,
) -> None:
    """Continue a text with a language model."""
    from quantkit.caches import parse_cache

    if temperature is not None and not sample:
        raise InputError(f"--temperature {temperature:g} is of --sample; greedy decoding has none")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise InputError(f"--temperature {temperature:g}: accepted: a number above 0")
    if kv_cache is not None:
        parse_cache(kv_cache)
    heat = 0.0 if not sample else 1.0 if temperature is None else temperature
    if directory.suffix == ".onnx":
        from quantkit.onnx_generate import continued as continued_onnx

        if kv_cache is not None:
            raise InputError(f"{directory}: an ONNX file has a cache of its own in float32; leave out --kv-cache")
        made = continued_onnx(directory, prompt, max_tokens, temperature=heat, seed=seed)
    else:
        made = _continued(directory, prompt, max_tokens, heat, seed, kv_cache)
    if json:
        print_json(made)
    else:
        say(made["text"])


def _continued(
    directory: Path, prompt: str, tokens: int, heat: float, seed: int, kv_cache: str | None
) -> dict[str, Any]:
    """The prompt continued in torch."""
    from quantkit.caches import make_cache
    from quantkit.language import continued, is_language
    from quantkit.loaders.hf import end_tokens, read_tokenizer

    model = load(directory, None, None, "stage")
    if not is_language(model):
        raise InputError(f"{directory} is no language model; accepted: a directory of one, quantized or not")
    cache = None if kv_cache is None else lambda config: make_cache(kv_cache, config)
    ends = end_tokens(directory, model.meta["config"])
    options: dict[str, Any] = {"temperature": heat, "seed": seed, "cache": cache, "ends": ends}
    return continued(model, read_tokenizer(directory), prompt, tokens, **options)


@app.command(rich_help_panel=MAKE, epilog="Example: quantkit export agent.q -o agent.onnx --postprocess")
@guarded
def export(
    directory: Quantized,
    output: Annotated[Path, typer.Option("--output", "-o", help="File or directory to write.", rich_help_panel=OUT)],
    to: Annotated[
        Literal["qdq", "qdq-real", "qcdq", "qonnx", "finn", "onnx-nbits", "compressed-tensors", "gguf"],
        typer.Option(
            help="qdq: exact in onnxruntime, scales after the sum; qdq-real: scales inside DequantizeLinear, for other "
            "converters; qcdq: the same with Clip, 8-bit types and opset 13; qonnx: for hls4ml and other QONNX tools; "
            "finn: QONNX that keeps FINN's rules. Language models: onnx-nbits: directory with model.onnx, weights of "
            "2, 4 or 8 bits and a cache; compressed-tensors: directory for transformers; gguf: file for llama.cpp."
        ),
    ] = "qdq",
    postprocess: Annotated[
        bool,
        typer.Option(
            "--postprocess/--raw", help="Put argmax, squashing, clipping and rescaling of actions into the file."
        ),
    ] = False,
    accuracy_level: Annotated[
        int, typer.Option(help="Of onnx-nbits: 4 rounds inputs to 8 bits and is fast, 1 keeps float32.")
    ] = 4,
    factory: Factory = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an ONNX file: input `obs`, output `actions`, normalizer inside; or a language model for a stock runtime."""
    if to == "onnx-nbits" or to == "compressed-tensors" or to == "gguf":
        from quantkit.export_language import export as export_language

        found: dict[str, Any] = {"output": str(output), "to": to}
        found |= export_language(directory, output, to, level=accuracy_level, force=force)
        if json:
            print_json(found)
        else:
            for line in exported(found):
                say(line)
        return
    from quantkit.artifact import load_artifact
    from quantkit.export import export_onnx

    model = load_artifact(directory, factory=factory)
    if "config" in model.meta:
        raise InputError(f"{directory} is a language model; accepted: --to onnx-nbits, compressed-tensors, gguf")
    export_onnx(model, output, to=to, postprocess=postprocess, overwrite=force)
    if json:
        print_json({"output": str(output), "to": to, "bytes": output.stat().st_size})
    else:
        say(f"{output}: {output.stat().st_size:,} bytes; prove it with: quantkit verify {directory} {output}")


def exported(found: dict[str, Any]) -> list[str]:
    """What `export` says of a language model's file."""
    output, to = found["output"], found["to"]
    lines = [f"{output}: {found['bytes']:,} bytes; the weights' bits make {found['accounted_bytes']:,}"]
    if found.get("wider"):
        name, how = next(iter(found["wider"].items()))
        lines.append(f"{len(found['wider'])} layers are stored wider: {name}: {how}, ...")
    if to == "onnx-nbits":
        lines.append(f"logits of 16 tokens in onnxruntime are within {found['error']:.1e} of the largest of torch's")
        lines.append(f"go on with: quantkit generate {output}/model.onnx --prompt TEXT")
    elif to == "gguf":
        lines.append(f"scales are float16, off by up to {found['scale_error']:.1e}; tokenizer: {found['tokenizer']}")
    else:
        lines.append(f"go on with: transformers.AutoModelForCausalLM.from_pretrained('{output}')")
    return lines


@app.command(rich_help_panel=MAKE, epilog="Example: quantkit verify agent.q agent.onnx --episodes 20")
@guarded
def verify(
    directory: Quantized,
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
