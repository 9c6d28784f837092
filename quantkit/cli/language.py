"""How `quantkit quantize` treats a Hugging Face directory: block by block where that can be, foretold beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.cli.options import for_kind
from quantkit.console import print_json, print_table, progress_bar, say
from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.loaders.hf import Weights
    from quantkit.model import Calib, Model
    from quantkit.recipe import Recipe


@dataclass
class Job:
    """model: captured; without weights, which `weights` reads, if it can be streamed. whole: why it cannot, or None.

    half: whether it is computed in bfloat16.
    """

    model: Model
    weights: Weights | None
    recipe: Recipe
    calib: Calib
    whole: str | None
    half: bool


def language_job(
    checkpoint: Path,
    recipe: Recipe,
    preset: str | None,
    calibration: str | None,
    window: int | None,
    documents: int | None,
    dtype: str = "auto",
) -> Job:
    """What is to be done to a directory; InputError for everything that can be told without reading weights."""
    from quantkit.capture import captured
    from quantkit.language_stream import why_whole
    from quantkit.loading import hugging_face
    from quantkit.recipe import check

    hf = hugging_face(checkpoint)
    weights: Weights | None
    try:
        model, weights = hf.outline(checkpoint)
    except KeyError as error:
        model, weights = hf.load(checkpoint), None
        unread = f"its files name tensors as transformers did once ({error.args[0]})"
    calib = _calibration(model, checkpoint, recipe, calibration, window, documents)
    model = captured(model, inplace=True)
    recipe = for_kind(recipe, preset, model)
    check(model, recipe)
    whole = unread if weights is None else why_whole(model, recipe)
    return Job(model, weights, recipe, calib, whole, _half(dtype, weights, whole))


DTYPES = ("auto", "float32", "bfloat16")


def _half(dtype: str, weights: Weights | None, whole: str | None) -> bool:
    """Whether --dtype asks for bfloat16; InputError where it cannot be had."""
    from quantkit.arithmetic import has_half

    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r}; accepted: {', '.join(DTYPES)}")
    if dtype == "bfloat16" and whole is not None:
        raise InputError(f"--dtype bfloat16 is for what is quantized block by block; here {whole}")
    if dtype == "bfloat16" and not has_half():
        raise InputError("--dtype bfloat16: this processor does not multiply bfloat16; accepted here: auto, float32")
    stored = weights is not None and whole is None and weights.stored_in() == "BF16"
    return dtype == "bfloat16" or (dtype == "auto" and stored and has_half())


def _calibration(
    model: Model, checkpoint: Path, recipe: Recipe, calibration: str | None, window: int | None, documents: int | None
) -> Calib:
    """The calibration set of a language model; without a text only where no step looks at it."""
    from quantkit.language import needs_text, read_calibration
    from quantkit.loaders.hf import read_tokenizer
    from quantkit.model import Calib

    if calibration is None:
        if needs_text(recipe):
            raise InputError(f"{checkpoint} is a language model: give --calibration FILE.txt for its steps and inputs")
        return Calib(model.example)
    if not Path(calibration).is_file():
        raise InputError(
            f"--calibration {calibration!r} is not a file; a language model is calibrated on text, FILE.txt"
        )
    return read_calibration(model, read_tokenizer(checkpoint), Path(calibration), window, documents)


def run_language_job(
    job: Job, checkpoint: Path, output: Path, memory: int | None, force: bool
) -> tuple[Model, dict[str, Any]]:
    """Quantize into the directory; the model and its summary."""
    from quantkit.artifact import save_artifact, summary
    from quantkit.language_stream import quantize_streamed
    from quantkit.loaders.hf import companions, load
    from quantkit.recipe import quantize

    if job.weights is not None and job.whole is None:
        with progress_bar("quantize", "layers") as update:
            return quantize_streamed(
                checkpoint, job.model, job.weights, job.recipe, job.calib, output, memory=memory, half=job.half,
                force=force, progress=update,
            )  # fmt: skip
    model = job.model if job.weights is None else load(checkpoint)
    with progress_bar("quantize", "steps") as update:
        quantized = quantize(model, job.recipe, job.calib, lambda _name, done, total: update(done, total))
    save_artifact(quantized, output, force=force, files=companions(checkpoint))
    return quantized, summary(quantized)


def show_forecast(job: Job, checkpoint: Path, memory: int | None, json: bool) -> None:
    """What `--dry-run` says."""
    from quantkit.language_forecast import forecast

    found = forecast(job.model, job.recipe, job.calib, memory=memory, whole=job.whole, half=job.half)
    if json:
        print_json(found)
        return
    seconds = "not foretold" if found["seconds"] is None else f"about {_duration(found['seconds'])}"
    say(f"{checkpoint}: {seconds}, peak memory about {found['memory_bytes'] / 2**30:.2f} GiB; nothing written")
    facts = {key: value for key, value in found.items() if value is not None and key not in ("seconds", "parts")}
    rows = [[key, f"{value:,.4g}" if isinstance(value, float) else str(value)] for key, value in facts.items()]
    rows += [[f"seconds of {key}", f"{value:,.2f}"] for key, value in found["parts"].items()]
    print_table("", {"fact": "left", "value": "right"}, rows)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
