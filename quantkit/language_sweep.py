"""A sweep of a language model: perplexity against stored bits, one durable row for each design.

The folder holds `study.json` (what the designs share), `rows.jsonl` and, at the end, `perplexity.csv`. A design whose
row is there is not measured again; a folder of another model, other texts or other code is refused. Designs are
quantized one after the other, in memory. What they would take on an FPGA is not estimated.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.files import new_file, sha256_of
from quantkit.language import needs_text, perplexity, read_calibration, with_defaults
from quantkit.loaders.hf import read_tokenizer
from quantkit.model import Calib, Model
from quantkit.pareto import nondominated
from quantkit.recipe import Recipe, check, quantize
from quantkit.results import Row, append_row, read_rows, versions
from quantkit.sources import source_digest
from quantkit.specs import repeated
from quantkit.study import describe_recipe
from quantkit.sweep import open_folder
from quantkit.tasks.perplexity import Perplexity, compare

TABLE = "perplexity.csv"
_COLUMNS = (
    "id", "weights", "acts", "granularity", "steps", "perplexity", "stderr", "ratio", "ratio_stderr", "n", "tokens",
    "bits_per_weight", "weight_kib", "front",
)  # fmt: skip
Progress = Callable[[int, int], None]


def sweep_language(
    checkpoint: Path,
    model: Model,
    recipes: Sequence[Recipe],
    folder: Path,
    *,
    text: Path,
    calibration: Path | None = None,
    window: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """study.json and the rows of the recipes, in their order; those that are missing are measured and written.

    Perplexity on the documents of `text`, compared with float by document. calibration: text in windows of `window`
    tokens; embeddings, head and operands of attention stay in float unless a recipe names them. What a design makes
    impossible is in its row's `error`. Raises InputError for texts and recipes that do not fit, a missing calibration
    text, and a folder of something else. A row's bits_per_weight are those stored for the quantized weights, scales and
    biases included; weight_kib is all that is stored, what stays in float with 32 bits.
    """
    tokenizer = read_tokenizer(checkpoint)
    calib = Calib(model.example)
    if calibration is not None:
        calib = read_calibration(model, tokenizer, calibration, window)
    elif any(needs_text(recipe) for recipe in recipes):
        raise InputError(f"{checkpoint} is a language model: give --calibration FILE.txt for the sweep's steps")
    model = captured(model, inplace=True)
    wanted = [with_defaults(recipe, model) for recipe in recipes]
    for recipe in wanted:
        check(model, recipe)

    def score(one: Model) -> Perplexity:
        return perplexity(one, tokenizer, text)

    facts = {
        "kind": "language",
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": model.meta["sha256"],
        "text": sha256_of(text),
        "calibration": None if calibration is None else sha256_of(calibration),
        "window": None if calibration is None else calib.inputs.shape[1],
        "source": source_digest(),
    }

    def begin() -> dict[str, Any]:
        return {"reference": asdict(score(model)), "versions": versions()}

    def read(document: dict[str, Any]) -> tuple[dict[str, Any], Perplexity]:
        lists = {key: tuple(document["reference"][key]) for key in ("losses", "lengths")}
        return document, Perplexity(**document["reference"] | lists)

    document, reference = open_folder(folder, facts, begin, read)
    known = {row["id"]: row for row in read_rows(folder / "rows.jsonl")}
    rows = []
    for number, recipe in enumerate(wanted):
        if progress:
            progress(number, len(wanted))
        described = describe_recipe(recipe)
        if described["id"] not in known:
            row = described | _measured(model, recipe, calib, score, reference)
            append_row(folder / "rows.jsonl", row)
            known[row["id"]] = row
        rows.append(known[described["id"]])
    if progress:
        progress(len(wanted), len(wanted))
    _write_table(folder / TABLE, list(known.values()))
    return document, rows


def best_of(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of the rows of which none has both fewer bits and a lower perplexity, by ascending bits."""
    known = [i for i, row in enumerate(rows) if "error" not in row]
    points = [(rows[i]["bits_per_weight"], rows[i]["score"]["mean"]) for i in known]
    return sorted((known[i] for i in nondominated(points, (False, False))), key=lambda i: rows[i]["bits_per_weight"])


def _measured(
    model: Model, recipe: Recipe, calib: Calib, score: Callable[[Model], Perplexity], reference: Perplexity
) -> Row:
    began = time.perf_counter()
    try:
        quantized = quantize(model, recipe, calib)
    except InputError as error:
        return {"error": str(error), "seconds": time.perf_counter() - began}
    found = score(quantized)
    ratio, stderr = compare(reference, found)
    bits, weights, rest = _stored(quantized)
    return {
        "score": {k: _plain(v) for k, v in asdict(found).items() if k not in ("losses", "lengths")},
        "ratio": _plain(ratio),
        "ratio_stderr": _plain(stderr),
        "bits_per_weight": bits / max(1, weights),
        "weight_kib": (bits + 32 * rest) / 8192,
        "float_layers": quantized.meta.get("float_layers", {}),
        "versions": versions(),
        "seconds": time.perf_counter() - began,
    }


def _stored(quantized: Model) -> tuple[int, int, int]:
    """Bits stored for the quantized weights, how many these are, and all other parameters, in float.

    Biases that are all zero are not stored, and those of quantized layers count to their weights' bits. A float weight
    that two layers share counts once.
    """
    parts = [layer for layer in quantized.qlayers().values() if layer.q is not None]
    biases = [b for layer in parts if (b := getattr(layer, "bias", None)) is not None]
    again = [quantized.layers()[name].weight for name in repeated(quantized)]
    known = {id(p) for p in (*(layer.weight for layer in parts), *biases, *again)}
    rest = {id(p): p.numel() for p in quantized.module.parameters() if id(p) not in known}
    bits = sum(layer.q.bits for layer in parts if layer.q is not None)
    return (
        bits + 32 * sum(b.numel() for b in biases if b.any()),
        sum(layer.weight.numel() for layer in parts),
        sum(rest.values()),
    )


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_table(path: Path, rows: Sequence[Row]) -> None:
    front = set(best_of(rows))
    with new_file(path, force=True) as temporary, temporary.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, _COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for index, row in sorted(enumerate(rows), key=lambda pair: pair[1].get("bits_per_weight", math.inf)):
            if "error" not in row:
                score = {key: row["score"][key] for key in ("stderr", "n", "tokens")}
                writer.writerow(row | score | {"perplexity": row["score"]["mean"], "front": index in front})
