"""The `quantkit` command: arguments in, calls of the library, tables or JSON out. No logic lives here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quantkit.console import guarded, note, print_json, print_table, progress_bar, say
from quantkit.errors import InputError

# Rollouts multiply small matrices: numpy's BLAS threads cost more than they bring (torch keeps its own).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if TYPE_CHECKING:
    from quantkit.model import Model
    from quantkit.qlayers import LayerPlan

app = typer.Typer(
    name="quantkit",
    help="Quantize a trained policy, measure its return, price it on an FPGA, and take the best design away as ONNX.",
    epilog="Start with: quantkit inspect agent.zip",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_IN, _NUM, _HW, _OUT = "Checkpoint", "Numbers", "Hardware", "Output"
_LOOK, _MAKE, _CHOOSE = "Look", "Make", "Choose"

Checkpoint = Annotated[
    Path, typer.Argument(help="SB3 zip, rl-zoo folder, quantized directory, or safetensors with --factory.")
]
Env = Annotated[
    str | None, typer.Option("--env", help="Environment id, if the checkpoint does not tell.", rich_help_panel=_IN)
]
Factory = Annotated[
    str | None,
    typer.Option(help="module:callable that builds the network of a .safetensors file.", rich_help_panel=_IN),
]
Inputs = Annotated[
    Path | None, typer.Option(help=".npy or .npz with inputs, for a network that is no policy.", rich_help_panel=_IN)
]
Normalize = Annotated[
    Literal["stage", "fold"],
    typer.Option(
        help="Observation normalization: a float input stage, or folded into the first layer.", rich_help_panel=_IN
    ),
]
Episodes = Annotated[int, typer.Option("--episodes", "-n", min=1, help="Episodes to run.", rich_help_panel=_NUM)]
Seed = Annotated[int, typer.Option(min=0, help="Episode i is seeded with SEED + i.", rich_help_panel=_NUM)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=_OUT)]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.", rich_help_panel=_OUT)]
Steps = Annotated[
    list[str] | None,
    typer.Option(
        "--step",
        metavar="NAME[:k=v,..]",
        help="A method: rtn, gptq, adaround, equalize, smoothquant, ...",
        rich_help_panel=_NUM,
    ),
]
_PRESETS = "fast (milliseconds), balanced (training, seconds), best (the policy acts, too; up to a minute)"
Exceptions = Annotated[
    list[str] | None,
    typer.Option(
        "--layer", metavar="PATTERN=W/A", help="Other formats for some layers: first=int8/int8, 'fc*=e2m1/float'.",
        rich_help_panel=_NUM,
    ),
]  # fmt: skip
States = Annotated[
    int, typer.Option("--calibration", min=1, help="Calibration states from rollouts.", rich_help_panel=_NUM)
]


@app.command(rich_help_panel=_LOOK, epilog="Example: quantkit inspect ppo/LunarLander-v2_1")
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

    document = describe_checkpoint(_load(checkpoint, env, factory, normalize, inputs))
    if json:
        print_json(document)
        return
    say(f"{checkpoint}")
    for key in ("kind", "algo", "env", "observations", "actions", "normalizer", "parameters"):
        if (text := _phrase(document[key])) != "none":
            say(f"  {key}: {text}")
    fields = {"name": "layer", "op": "op", "in_features": "in", "out_features": "out", "parameters": "parameters"}
    fields |= {"weight": "weights", "act": "input"}
    rows = [[_phrase(entry[key]) for key in fields] for entry in document["layers"]]
    justify = {"in": "right", "out": "right", "parameters": "right"}
    print_table("", {heading: justify.get(heading, "left") for heading in fields.values()}, rows)


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
    return str(fact)


@app.command(rich_help_panel=_LOOK, epilog="Example: quantkit evaluate agent.zip --episodes 20 --seed 1000 --json")
@guarded
def evaluate(
    checkpoint: Checkpoint,
    env: Env = None,
    episodes: Episodes = 20,
    seed: Seed = 1000,
    normalize: Normalize = "stage",
    json: Json = False,
) -> None:
    """Run deterministic episodes and report the return with its uncertainty."""
    from quantkit.study import policy_of
    from quantkit.tasks.episodes import evaluate_policy

    model = _load(checkpoint, env, None, normalize)
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
    from quantkit.presets import preset_steps
    from quantkit.recipe import Recipe, make_plan, parse_step

    if preset is not None and step:
        raise InputError("give --preset or --step, not both")
    check_new(output, force=force, marker="quantkit.json")
    plan = (("*", make_plan(weights, acts, granularity)), *_exceptions(layer, granularity))
    steps = preset_steps(preset) if preset else tuple(parse_step(text) for text in step or [])
    recipe = Recipe(plan, steps, seed)
    model = _load(checkpoint, env, factory, normalize, inputs)

    from quantkit.artifact import save_artifact, summary
    from quantkit.recipe import quantize as run
    from quantkit.study import calib_for

    with progress_bar("calibration rollouts", "episodes") as update:
        calib = calib_for(model, calibration, update, inputs)
    with progress_bar("quantize", "steps") as update:
        quantized = run(model, recipe, calib, lambda _name, done, total: update(done, total))
    save_artifact(quantized, output, force=force)
    document = {"output": str(output), **summary(quantized)}
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


@app.command(rich_help_panel=_MAKE, epilog="Example: quantkit rtl agent.q -o agent.rtl --device xc7a35t --latency-us 2")
@guarded
def rtl(
    directory: Annotated[Path, typer.Argument(help="Directory written by quantkit quantize.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.", rich_help_panel=_OUT)],
    device: Annotated[str, typer.Option(help="FPGA part (see hwmodel devices).", rich_help_panel=_HW)] = "xc7a35t",
    latency_us: Annotated[
        float | None, typer.Option(min=0.0, help="Fewest LUTs within this latency.", rich_help_panel=_HW)
    ] = None,
    luts: Annotated[
        int | None, typer.Option(min=1, help="Lowest latency within this many LUTs.", rich_help_panel=_HW)
    ] = None,
    clock_mhz: Annotated[
        float, typer.Option(min=1.0, help="Clock assumed; it is not predicted.", rich_help_panel=_HW)
    ] = 100.0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write the quantized policy as Verilog whose codes and sums equal the simulator's bit for bit."""
    from hwmodel import emit
    from hwmodel.devices import find_device
    from hwmodel.plan import plan_network
    from quantkit.artifact import load_artifact
    from quantkit.files import check_new, new_directory
    from quantkit.rtl_export import network_of

    part = find_device(device)
    check_new(output, force=force, marker="network.json")
    network, _ = network_of(load_artifact(directory))
    plans = plan_network(network, part, latency_us=latency_us, luts=luts, clock_mhz=clock_mhz)
    with new_directory(output, force=force, marker="network.json") as folder:
        emit.write(network, plans, folder, part, clock_mhz=clock_mhz)
    document = emit.summary(network, plans, part, clock_mhz)
    if json:
        print_json({"output": str(output), **document})
        return
    keys = ("name", "pe", "simd", "converters", "cycles", "luts", "ffs", "bram18")
    rows = [[str(entry[key]) for key in keys] for entry in document["layers"]]
    columns = {"layer": "left"} | dict.fromkeys(("PE", "SIMD", *keys[3:]), "right")
    title = f"{output}: {document['latency_us']:g} us at {clock_mhz:g} MHz, about {document['luts']:,} LUTs"
    print_table(title, columns, rows)
    say(f"prove it with: hwmodel simulate {output}")


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


@app.command(
    rich_help_panel=_CHOOSE,
    epilog="Example: quantkit sweep agent.zip -o study --weights int3,int4,e2m1 --acts int4,e3m2 "
    "--step rtn --step equalize+gptq --episodes 20 --device xc7a35t --jobs 2",
)
@guarded
def sweep(
    checkpoint: Checkpoint,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Study directory; run again to go on.", rich_help_panel=_OUT)
    ],
    weights: Annotated[str, typer.Option("--weights", metavar="F,F,..", help="Weight formats.", rich_help_panel=_NUM)],
    acts: Annotated[
        str, typer.Option("--acts", metavar="F,F,..", help="Formats of layer inputs.", rich_help_panel=_NUM)
    ],
    granularity: Annotated[
        str, typer.Option(metavar="G,G,..", help="Weight scales: tensor, row, group<size>.", rich_help_panel=_NUM)
    ] = "row",
    step: Annotated[
        list[str] | None,
        typer.Option(
            "--step",
            metavar="STEP[+STEP..]",
            help="A pipeline of methods to try; repeat for alternatives.",
            rich_help_panel=_NUM,
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"One more pipeline: {_PRESETS}. Repeat for alternatives.", rich_help_panel=_NUM
        ),
    ] = None,
    layer: Exceptions = None,
    episodes: Episodes = 20,
    seed: Seed = 1000,
    device: Annotated[
        str, typer.Option(help="FPGA part (see hwmodel devices), or none.", rich_help_panel=_HW)
    ] = "xc7a35t",
    latency_us: Annotated[
        float | None, typer.Option(min=0.0, help="Fold the hardware to this latency.", rich_help_panel=_HW)
    ] = None,
    luts: Annotated[
        int | None, typer.Option(min=1, help="Fold the hardware into this many LUTs.", rich_help_panel=_HW)
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0 = one per core.", rich_help_panel=_OUT)] = 0,
    env: Env = None,
    normalize: Normalize = "stage",
    json: Json = False,
) -> None:
    """Evaluate and cost every combination of formats, methods and granularity; draw the Pareto front."""
    from hwmodel.devices import find_device
    from quantkit.presets import preset_steps
    from quantkit.recipe import check, parse_step
    from quantkit.sweep import Space

    if latency_us is not None and luts is not None:
        raise InputError("give --latency-us or --luts, not both")
    for option, text in (("--weights", weights), ("--acts", acts), ("--granularity", granularity)):
        if not _list(text):
            raise InputError(f"{option} {text!r} names nothing; give one or more, separated by commas")
    pipelines = tuple(tuple(parse_step(part) for part in text.split("+")) for text in step or [])
    pipelines = (*pipelines, *(preset_steps(name) for name in preset or [])) or ((),)
    space = Space(_list(weights), _list(acts), _list(granularity), pipelines, _exceptions(layer, _list(granularity)[0]))
    recipes = space.recipes()
    part = None if device == "none" else find_device(device)
    model = _load(checkpoint, env, None, normalize)

    from quantkit.report import write_report
    from quantkit.study import Settings
    from quantkit.sweep import open_study, run

    for recipe in recipes:
        check(model, recipe)
    settings = Settings(episodes, seed, part, latency_us, luts)
    with progress_bar("float and random policy", "episodes") as update:
        study = open_study(output, model, settings, update)
    with progress_bar("designs", "designs") as update:
        rows = run(
            study,
            recipes,
            output,
            jobs=jobs or os.cpu_count() or 1,
            progress=lambda done, total, _: update(done, total),
        )
    report = write_report(output)
    for row in rows:
        if "error" in row:
            names = ", ".join((row["weights"], row["acts"], row["granularity"], row["steps"]))
            note(f"left out: {names}: {row['error']}")
    _show_report(report, json)


@app.command(rich_help_panel=_CHOOSE, epilog="Example: quantkit pareto study --x weight_kib --y mean")
@guarded
def pareto(
    study: Annotated[Path, typer.Argument(help="Directory written by quantkit sweep.")],
    x: Annotated[
        str, typer.Option(help="Cost: luts, ffs, dsps, bram18, latency_us, weight_kib, bits_per_weight.")
    ] = "luts",
    y: Annotated[str, typer.Option(help="Quality: mean, iqm, agreement, ...")] = "mean",
    json: Json = False,
) -> None:
    """Show the Pareto front of a study and redraw its figures for other axes."""
    from quantkit.report import write_report

    stem = "pareto" if (x, y) == ("luts", "mean") else f"pareto_{y}_{x}"
    _show_report(write_report(study, x=x, y=y, stem=stem), json)


def _show_report(report: dict[str, Any], json: bool) -> None:
    from quantkit.pareto import COLUMNS, value

    if json:
        print_json(report)
        return
    x, y = report["x"], report["y"]
    reference = report["reference"]
    say(
        f"float policy: {reference['mean']:.2f} ± {reference['stderr'] or 0.0:.2f}; "
        f"margin {report['margin']:.2f}; {report['designs']} designs"
    )
    shown = list(dict.fromkeys((x, "luts", "weight_kib", "latency_us")))
    rows = []
    for row in report["front"]:
        score = row["score"]
        numbers = [(value(row, c), c) for c in shown]
        cells = ["-" if v is None else f"{v:,.0f}" if c in ("luts", "ffs") else f"{v:,.4g}" for v, c in numbers]
        names = [row["weights"], row["acts"], row["granularity"], row["steps"]]
        rows.append([*names, f"{score['mean']:.2f} ± {score['stderr'] or 0.0:.2f}", row["verdict"]["verdict"], *cells])
    columns = dict.fromkeys(("weights", "inputs", "scales", "method"), "left")
    columns |= {"return": "right", "against float": "left"} | {COLUMNS[c][1]: "right" for c in shown}
    knee = report["knee"]
    highlight = next((i for i, row in enumerate(report["front"]) if knee and row["id"] == knee["id"]), None)
    print_table(f"Pareto front of {COLUMNS[y][1]} against {COLUMNS[x][1]}", columns, rows, highlight=highlight)
    if knee:
        say(f"take: weights {knee['weights']}, inputs {knee['acts']}, {knee['steps']}")
    say("\n".join(f"wrote {path}" for path in report["files"]))


def _load(
    checkpoint: Path,
    env: str | None,
    factory: str | None,
    normalize: Literal["stage", "fold"],
    inputs: Path | None = None,
) -> Model:
    from quantkit.loading import load_checkpoint

    return load_checkpoint(checkpoint, env=env, normalize=normalize, factory=factory, inputs=inputs)


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _exceptions(texts: list[str] | None, granularity: str) -> tuple[tuple[str, LayerPlan], ...]:
    from quantkit.recipe import make_plan

    found = []
    for text in texts or []:
        pattern, equals, formats = text.partition("=")
        weight, slash, act = formats.partition("/")
        if not (pattern and equals and weight and slash and act):
            raise InputError(f"--layer {text!r} is not PATTERN=WEIGHTS/INPUTS, such as first=int8/int8")
        found.append((pattern, make_plan(weight, act, granularity)))
    return tuple(found)


def main() -> None:
    """Console entry point. What the argument parser refuses is one line, as every other mistake."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "quantkit"
        if message := " ".join(usage().split()):  # empty after help that was asked for by saying nothing
            print(f"error: {message} (see {command} --help)", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.exit(code or 0)
