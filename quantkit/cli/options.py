"""The application and the arguments that several commands share."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.model import Calib, Model, Normalization
    from quantkit.presets import Kind
    from quantkit.qlayers import LayerPlan
    from quantkit.recipe import Recipe, Step
    from quantkit.targets import Target
    from quantkit.tasks.accuracy import Labelled

app = typer.Typer(
    name="quantkit",
    help="Quantize a trained policy, measure its return, price it on an FPGA, and take the best design away as ONNX.",
    epilog="Start with: quantkit inspect agent.zip",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

IN, NUM, HW, RUN, OUT = "Checkpoint", "Numbers", "Hardware", "Where it runs", "Output"
LOOK, MAKE, CHOOSE = "Look", "Make", "Choose"

Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="SB3 zip, rl-zoo folder, CleanRL file, Hugging Face or quantized directory, or safetensors with --factory."
    ),
]
Quantized = Annotated[Path, typer.Argument(help="Directory written by quantkit quantize.")]
Study = Annotated[Path, typer.Argument(help="Directory written by quantkit sweep.")]
Env = Annotated[
    str | None, typer.Option("--env", help="Environment id, if the checkpoint does not tell.", rich_help_panel=IN)
]
Factory = Annotated[
    str | None,
    typer.Option(help="module:callable that builds the network of a .safetensors file.", rich_help_panel=IN),
]
Inputs = Annotated[
    Path | None, typer.Option(help=".npy or .npz with inputs, for a network that is no policy.", rich_help_panel=IN)
]
LabelledInputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs", help=".npy or .npz with inputs to measure a network on that is no policy.", rich_help_panel=IN
    ),
]
Labels = Annotated[
    Path | None, typer.Option(help=".npy or .npz with the class of each of --inputs.", rich_help_panel=IN)
]
OtherInputs = Annotated[
    Path | None,
    typer.Option(
        "--calibration", help=".npy or .npz with other inputs, that calibrate such a network.", rich_help_panel=IN
    ),
]
Normalize = Annotated[
    Literal["stage", "fold", "none"],
    typer.Option(
        help="Observation normalization: a float input stage, folded into the first layer, or (CleanRL) none.",
        rich_help_panel=IN,
    ),
]
Episodes = Annotated[int, typer.Option("--episodes", "-n", min=1, help="Episodes to run.", rich_help_panel=NUM)]
Granularity = Annotated[str, typer.Option(help="Weight scales: tensor, row or group<size>.", rich_help_panel=NUM)]
MethodSeed = Annotated[int, typer.Option(min=0, help="Seed of random choices in methods.", rich_help_panel=NUM)]
Seed = Annotated[int, typer.Option(min=0, help="Episode i is seeded with SEED + i.", rich_help_panel=NUM)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=OUT)]
NewDirectory = Annotated[Path, typer.Option("--output", "-o", help="Directory to write.", rich_help_panel=OUT)]
StudyDirectory = Annotated[
    Path, typer.Option("--output", "-o", help="Study directory; run again to go on.", rich_help_panel=OUT)
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.", rich_help_panel=OUT)]
Steps = Annotated[
    list[str] | None,
    typer.Option(
        "--step",
        metavar="NAME[:k=v,..]",
        help="A method: rtn, gptq, adaround, equalize, smoothquant, ...",
        rich_help_panel=NUM,
    ),
]
PRESETS = "fast (milliseconds), balanced (training, seconds), best (the policy acts, too; up to a quarter of an hour)"
Exceptions = Annotated[
    list[str] | None,
    typer.Option(
        "--layer", metavar="PATTERN=W/A", help="Other formats for some layers: first=int8/int8, 'fc*=e2m1/float'.",
        rich_help_panel=NUM,
    ),
]  # fmt: skip
States = Annotated[
    int, typer.Option("--calibration", min=1, help="Calibration states from rollouts.", rich_help_panel=NUM)
]
Mapping = Annotated[
    Literal["lut", "dsp", "auto"],
    typer.Option(help="Products in LUTs, in DSPs, or in DSPs where LUTs do not suffice.", rich_help_panel=HW),
]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=0, help="Processes; 0 = one per core.", rich_help_panel=RUN)]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help="Evaluate on the Ray cluster there: auto, HOST:PORT; local starts one.",
        rich_help_panel=RUN,
    ),
]  # fmt: skip
AcceptVersions = Annotated[
    bool,
    typer.Option(
        "--accept-versions", help="Go on with a study that other versions of libraries began.", rich_help_panel=RUN
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration", metavar="N|FILE.txt", rich_help_panel=NUM,
        help="States from rollouts (default 2048); of a language model, text with documents split at <|endoftext|>.",
    ),
]  # fmt: skip
Cache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache", metavar="NAME[:k=v,..]", help="Cache of keys and values: saq:levels=16-8-4, kivi:bits=2, ...",
        rich_help_panel=NUM,
    ),
]  # fmt: skip


def _configured(context: typer.Context, path: Path | None) -> Path | None:
    """Defaults of the command's options from a file; BadParameter in one line for what is no option."""
    if path is None:
        return None
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            found = yaml.safe_load(path.read_text())
        else:
            import tomllib

            found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except Exception as error:  # yaml's own kinds
        raise typer.BadParameter(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    names = {p.name: p for p in context.command.params if p.name not in ("config", "help", None)}
    names |= {option.lstrip("-"): p for p in names.values() for option in p.opts if option.startswith("--")}
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{path} holds no options; accepted: lines such as device = ...")
    defaults: dict[str, object] = {}
    for key, value in found.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), [str(name) for name in names], n=1, cutoff=0.0)
            raise typer.BadParameter(f"{path}: unknown key {key!r}; did you mean {near[0]!r}?")
        parameter = names[key]
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, list | dict) for v in value)):
            raise typer.BadParameter(f"{path}: {key!r} is not a number, a text or a list of them")
        if isinstance(value, list) and not getattr(parameter, "multiple", False):
            value = ",".join(map(str, value))
        defaults[str(parameter.name)] = (
            [value] if getattr(parameter, "multiple", False) and isinstance(value, str) else value
        )
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", is_eager=True, callback=_configured,
        help="TOML or YAML with any of these options by name; the command line wins.", rich_help_panel=RUN,
    ),
]  # fmt: skip


def load(
    checkpoint: Path,
    env: str | None,
    factory: str | None,
    normalize: Normalization,
    inputs: Path | None = None,
) -> Model:
    """`load_checkpoint`, imported when a command needs it."""
    from quantkit.loading import load_checkpoint

    return load_checkpoint(checkpoint, env=env, normalize=normalize, factory=factory, inputs=inputs)


def listed(text: str) -> tuple[str, ...]:
    """The names in a text that separates them by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def exceptions(texts: list[str] | None, granularity: str) -> tuple[tuple[str, LayerPlan], ...]:
    """The entries of a recipe's plan that `--layer PATTERN=WEIGHTS/INPUTS` stand for; InputError for other texts."""
    from quantkit.recipe import make_plan

    found = []
    for text in texts or []:
        pattern, equals, formats = text.partition("=")
        parts = formats.split("/")  # a block format has a slash of its own: int4/e4m3x32/int8
        cuts = [("/".join(parts[:i]), "/".join(parts[i:])) for i in range(1, len(parts))]
        weight, act = next((cut for cut in cuts if all(map(_is_format, cut))), cuts[0] if cuts else ("", ""))
        if not (pattern and equals and weight and act):
            raise InputError(f"--layer {text!r} is not PATTERN=WEIGHTS/INPUTS, such as first=int8/int8")
        found.append((pattern, make_plan(weight, act, granularity)))
    return tuple(found)


def _is_format(text: str) -> bool:
    from quantkit.recipe import parse_format

    try:
        parse_format(text)
    except InputError:
        return False
    return True


def calib_of(
    model: Model,
    checkpoint: Path,
    calibration: str | None,
    window: int | None,
    documents: int | None,
    inputs: Path | None,
    update: Callable[[int, int], None],
) -> Calib:
    """The calibration set of a model that is no language model; InputError for options of one."""
    from quantkit.study import CALIBRATION_STATES, calib_for

    if window is not None or documents is not None:
        raise InputError(f"--window and --documents are for language models; {checkpoint} is none")
    text = str(CALIBRATION_STATES) if calibration is None else calibration
    if not text.isdecimal() or int(text) < 1:
        raise InputError(
            f"--calibration {text!r}: {checkpoint} is no language model; accepted: a number of states, 1 or more"
        )
    return calib_for(model, int(text), update, inputs)


def bytes_of(text: str, option: str) -> int:
    """4GiB, 500MiB or 2GB in bytes; InputError for other texts."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])(i?)B", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"{option} {text!r} is not an amount of memory, such as 4GiB or 500MB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMG".index(unit.upper())))


def for_kind(recipe: Recipe, preset: str | None, model: Model) -> Recipe:
    """The recipe as the model's kind wants it.

    The preset's steps for models of its kind; what stays in float of a language model.
    """
    from quantkit.language import is_language, with_defaults
    from quantkit.presets import kind_of, preset_steps

    if preset is not None:
        recipe = replace(recipe, steps=preset_steps(preset, kind_of(model)))
    return with_defaults(recipe, model) if is_language(model) else recipe


def recipe_of(
    weights: str,
    acts: str,
    granularity: str,
    step: list[str] | None,
    preset: str | None,
    layer: list[str] | None,
    seed: int,
) -> Recipe:
    """The recipe that the options of one design stand for; InputError before anything is loaded."""
    from quantkit.presets import preset_steps
    from quantkit.recipe import Recipe, make_plan, parse_step

    if preset is not None and step:
        raise InputError("give --preset or --step, not both")
    plan = (("*", make_plan(weights, acts, granularity)), *exceptions(layer, granularity))
    steps = preset_steps(preset) if preset else tuple(parse_step(text) for text in step or [])
    return Recipe(plan, steps, seed)


def pipelines_of(
    step: list[str] | None, preset: list[str] | None, kind: Kind = "policy"
) -> tuple[tuple[Step, ...], ...]:
    """The alternatives that repeated --step A+B and --preset, of this kind of model, stand for; () for none."""
    from quantkit.presets import preset_steps
    from quantkit.recipe import parse_step

    written = (tuple(parse_step(part) for part in text.split("+")) for text in step or [])
    return (*written, *(preset_steps(name, kind) for name in preset or []))


def labelled_of(
    checkpoint: Path, model: Model, inputs: Path | None, labels: Path | None, calibration: Path | None
) -> Labelled | None:
    """What a network is measured on, None of a policy; InputError for files of the wrong kind and for too few."""
    from quantkit.policy import Policy
    from quantkit.study import labelled_inputs

    given = {"--inputs": inputs, "--labels": labels, "--calibration": calibration}
    if isinstance(model.module, Policy):
        if any(given.values()):
            raise InputError(f"{checkpoint} is a policy: it is measured in episodes; leave out {', '.join(given)}")
        return None
    if "config" in model.meta:
        raise InputError(
            f"{checkpoint} is a language model: quantkit sweep takes it with --text FILE.txt, for its perplexity"
        )
    if inputs is None or labels is None or calibration is None:
        missing = ", ".join(name for name, path in given.items() if path is None)
        raise InputError(
            f"{checkpoint} is no policy: give {missing} FILE.npy, to measure its accuracy and to calibrate it"
        )
    return labelled_inputs(model, inputs, labels, calibration)


def check_space(weights: str, acts: str, granularity: str) -> None:
    """InputError where a list of a study names nothing."""
    for option, text in (("--weights", weights), ("--acts", acts), ("--granularity", granularity)):
        if not listed(text):
            raise InputError(f"{option} {text!r} names nothing; give one or more, separated by commas")


Device = Annotated[
    str,
    typer.Option(metavar="PART,..", help="FPGA part (see hwmodel devices) or several, or none.", rich_help_panel=HW),
]
Latencies = Annotated[
    str | None, typer.Option(metavar="US,..", help="Fold the hardware to this latency, or each.", rich_help_panel=HW)
]
Luts = Annotated[
    str | None, typer.Option(metavar="N,..", help="Fold it into this many LUTs, or each.", rich_help_panel=HW)
]

Latency = Annotated[float | None, typer.Option(min=0.0, help="Fewest LUTs within this latency.", rich_help_panel=HW)]
MostLuts = Annotated[int | None, typer.Option(min=1, help="Lowest latency within this many LUTs.", rich_help_panel=HW)]


def targets_for(
    device: str, latency_us: str | None, luts: str | None, mapping: Literal["lut", "dsp", "auto"]
) -> tuple[Target, ...]:
    """Every part of the list with every latency or number of LUTs; () for the part none.

    InputError for what is no positive number, for both kinds of numbers, and for numbers without a part.
    """
    from quantkit.targets import parse_targets

    if latency_us is not None and luts is not None:
        raise InputError("give --latency-us or --luts, not both")
    if device == "none" and (latency_us is not None or luts is not None):
        raise InputError(
            f"{'--luts' if latency_us is None else '--latency-us'} folds the hardware of a part; give --device"
        )
    parts = () if device == "none" else listed(device)
    if device != "none" and not parts:
        raise InputError(f"--device {device!r} names nothing; give one or more parts, separated by commas, or none")
    times = _numbers("--latency-us", latency_us)
    return parse_targets(parts, times, tuple(int(n) for n in _numbers("--luts", luts, whole=True)), mapping)


def _numbers(option: str, text: str | None, whole: bool = False) -> tuple[float, ...]:
    found = []
    for part in listed(text or ""):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0) or (whole and number != int(number)):
            kind = "a whole number" if whole else "a number"
            raise InputError(f"{option} {part!r} is not {kind} above 0; several are separated by commas")
        found.append(number)
    if text is not None and not found:
        raise InputError(f"{option} {text!r} names nothing; give one or more numbers, separated by commas")
    return tuple(found)
