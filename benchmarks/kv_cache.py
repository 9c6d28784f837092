"""Perplexity against bytes of the key-value cache: float, SAQ, KIVI and transformers' QuantizedCache.

    python benchmarks/kv_cache.py --data ../shared/data/lm

stories260k (5 layers, 4 key-value heads of 8 channels, 512 tokens) on 400 TinyStories, each from its own beginning.
Tokens go through the cache as in decoding: every query meets keys and values as old as they then are.
`bits_context` are the bits a cached number takes at 512 tokens, metadata and recent tokens included, from the bytes
that a cache of that length holds; `bits_documents` are those at each document's own end, summed over documents.
`loss_percent` is the rise of perplexity over float with its standard error, paired by document. `times_smaller` (at 512
tokens) and `times_smaller_documents` are against 16 bits, which are also measured, as SAQ with its one level.

KIVI comes with larger residuals too, so that stairs can be compared with it at equal bytes. The rows of quanto need
the package optimum-quanto and are left out without it; its cache quantizes all tokens anew whenever its residual is
full, and a prompt at once, so it is fed token by token.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from report import REPORTS, publish
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, QuantizedCache

from quantkit.caches import make_cache
from quantkit.tasks.perplexity import Perplexity, compare, encode, evaluate, read_documents

CONTEXT = 512
STAIRS = ("16", "16-8-4", "16-8-4-2", "16-8", "16-4-2", "16-4", "16-2")
RESIDUALS = {2: (32, 64, 96), 4: (32, 64)}  # KIVI
SERIES = {
    "SAQ 16-8-4": ("#2166ac", "o"),
    "SAQ 16-8-4-2": ("#2166ac", "s"),
    "SAQ, others": ("#92c5de", "o"),
    "KIVI-4": ("#d6604d", "D"),
    "KIVI-2": ("#b2182b", "D"),
    "quanto": ("#5aae61", "^"),
}


def caches(config: Any) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Name -> (series, maker of an empty cache)."""
    made: dict[str, tuple[str, Callable[[], Any]]] = {}

    def add(series: str, text: str) -> None:
        made[text] = (series, lambda: make_cache(text, config))

    for levels in STAIRS:
        own = f"SAQ {levels}"
        series = own if own in SERIES else "SAQ, others"
        add(series, f"saq:levels={levels},block=32,group=32,values=heads")
    for levels in ("16-8-4", "16-8-4-2"):
        add(f"SAQ {levels}", f"saq:levels={levels},block=64,group=32,values=heads")
    add("SAQ, others", "saq:levels=16-8-4-2,block=32,group=32,values=heads,sink=2")
    for bits, residuals in RESIDUALS.items():
        for residual in residuals:
            add(f"KIVI-{bits}", f"kivi:bits={bits},residual={residual},group=32,values=heads")
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        for bits in (4, 2):
            made[f"transformers quanto {bits} bits, residual 32, group 32"] = (
                "quanto",
                lambda bits=bits: quanto(config, bits),
            )
    return made


class StepwiseQuantizedCache(QuantizedCache):
    """transformers' own, with what the evaluation and the table ask of a cache."""

    def room(self) -> int:
        """One token at a time."""
        return 1

    def bytes_held(self) -> int:
        """Bytes of codes, scales and shifts, and of the residual as if it were float16 (it is float32)."""
        total = 0
        for layer in self.layers:
            for quantized in (layer._quantized_keys, layer._quantized_values):
                parts = (quantized._data._data, quantized._scale, quantized._shift)
                total += parts[0].numel() + 2 * sum(p.numel() for p in parts[1:])
            total += 2 * (layer.keys.numel() + layer.values.numel())
        return total


def quanto(config: Any, bits: int) -> StepwiseQuantizedCache:
    """QuantizedCache with its quanto backend at the group and residual of the others."""
    return StepwiseQuantizedCache("quanto", config, nbits=bits, q_group_size=32, residual_length=32)


def bits_at_lengths(make: Callable[[], Any], config: Any) -> list[int]:
    """Bits that a cache of one sequence of random tokens holds after 0, 1, ..., CONTEXT of them, fed one by one."""
    cache, dim = make(), config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    bits = [0]
    for _ in range(CONTEXT):
        for layer in range(config.num_hidden_layers):
            x = torch.randn(1, config.num_key_value_heads, 1, dim, generator=generator)
            cache.update(x, x, layer)
        bits.append(8 * cache.bytes_held())
    return bits


def short(row: dict[str, Any]) -> str:
    """What tells a row from the others of its series."""
    options = dict(item.split("=") for item in row["cache"].partition(":")[2].split(",") if "=" in item)
    if row["series"] == "quanto":
        return f"{row['cache'].split()[2]} bits"
    if "residual" in options:
        return f"residual {options['residual']}"
    own = row["series"] != "SAQ, others"
    sink = f", sink {options['sink']}" if "sink" in options else ""
    return f"block {options['block']}" if own else options["levels"] + sink


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Rise of perplexity against bits of a cached number over the documents, one curve a series; 16 is outside."""
    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "quantkit"}
    chart, axes = plt.subplots(figsize=(8.0, 4.8), layout="constrained")
    for series, (color, marker) in SERIES.items():
        points = sorted(
            (r["bits_documents"], r["loss_percent"], r["loss_stderr"], short(r)) for r in rows if r["series"] == series
        )
        if not points:
            continue
        xs, ys, errors, names = zip(*points, strict=True)
        line = "" if series == "SAQ, others" else "-"
        axes.errorbar(
            xs, ys, yerr=errors, color=color, marker=marker, linestyle=line, ms=7, lw=1.2, capsize=2, label=series
        )
        for x, y, name in zip(xs, ys, names, strict=True):
            if x < 10:
                at, side = ((-7, -11), "right") if series.startswith("SAQ 16") else ((7, 4), "left")
                axes.annotate(name, (x, y), at, textcoords="offset points", ha=side, fontsize=8, color="#555555")
    axes.axhline(0.5, color="#888888", lw=0.9, ls="--")
    axes.annotate(
        "0.5 %", (1, 0.5), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#666666", fontsize=9
    )
    axes.set_yscale("symlog", linthresh=0.1, linscale=0.6)
    axes.set_yticks([0, 0.1, 1, 10, 100, 1000], ["0", "0.1", "1", "10", "100", "1000"])
    axes.set_ylim(-0.05, 3 * max(r["loss_percent"] for r in rows))
    axes.set_xlim(3, 10)
    axes.set_xlabel("bits of a cached number at the documents' ends, metadata and recent tokens included")
    axes.set_ylabel("rise of perplexity over float, %")
    axes.set_title("Key-value caches of stories260k on 400 TinyStories", loc="left", fontweight="bold", fontsize=12)
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    chart.savefig(path, dpi=160)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stories260k/ and text/")
    parser.add_argument("--documents", type=int, help="only the first N")
    parser.add_argument("--batch", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.data / "stories260k", dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(args.data / "stories260k" / "tokenizer.json"))
    text = read_documents(args.data / "text" / "tinystories_eval400.txt")[: args.documents]
    documents = encode(tokenizer, text, CONTEXT)
    config = model.config
    reference = evaluate(model, documents, batch=args.batch)
    numbers = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    )

    def row(name: str, series: str, score: Perplexity, make: Callable[[], Any] | None) -> dict[str, Any]:
        ratio, error = compare(reference, score)
        lengths = [len(d) for d in documents]
        held = [32 * numbers * n for n in range(CONTEXT + 1)] if make is None else bits_at_lengths(make, config)
        whole = held[CONTEXT] / (numbers * CONTEXT)
        each = sum(held[n] for n in lengths) / (numbers * sum(lengths))
        return {
            "cache": name,
            "series": series,
            "perplexity": round(score.mean, 4),
            "stderr": round(score.stderr, 4),
            "loss_percent": round(100 * (ratio - 1), 3),
            "loss_stderr": round(100 * error, 3),
            "bits_context": round(whole, 3),
            "bits_documents": round(each, 3),
            "times_smaller": round(16 / whole, 2),
            "times_smaller_documents": round(16 / each, 2),
        }

    rows = [row("float32, no cache", "float", reference, None)]
    for name, (series, make) in caches(config).items():
        rows.append(row(name, series, evaluate(model, documents, batch=args.batch, cache=make), make))
        print(rows[-1], flush=True)
    (REPORTS / "language").mkdir(parents=True, exist_ok=True)
    publish("language/kv_cache", rows, packages=("torch", "transformers"), title="kv_cache")
    figure(rows, REPORTS / "language" / "kv_cache.png")


if __name__ == "__main__":
    main()
