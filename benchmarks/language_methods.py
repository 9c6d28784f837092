"""Every weight method of the toolkit on two language models, against the bits that it stores.

    python benchmarks/language_methods.py --data ../shared/data/lm

stories260k: perplexity on the first documents of the evaluation text, each cut at 256 tokens; calibrated, and where a
method trains trained, on windows of the calibration text. Arithmetic: the policy of benchmarks/agents/arithmetic,
calibrated on its own sampled answers, measured by greedy decoding; `kl` is that of the float policy's answers, nats a
token. `to_float` is the ratio of perplexities, or the difference of rewards, to float, its standard error paired by
document or problem.

Decoder layers only: embedding and head stay in float. `bits` are those stored for them, per weight: codes, scales
(32 bits for a row, 8 for a group or block, 16 where a baseline's paper says so), masks, and the biases that Tequila and
distill add; tune adds none. Tequila's quantizer is the paper's, AbsMean. PB-LLM and BiLLM are those of
benchmarks/ptq161.py. Nothing here is tuned to a model but numbers of training steps, which are small: reports of single
methods go further.

Rows that reports/language/methods.csv holds already are not measured again; delete it to start anew. Several may run
side by side.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
from ptq161 import Baseline, billm, layerwise, pb_llm
from report import REPORTS, publish
from torch import Tensor, nn

from hwmodel.formats import Block, parse
from quantkit.language import causal_lm
from quantkit.loaders import hf
from quantkit.model import Calib, Model
from quantkit.presets import NETWORK_PRESETS
from quantkit.recipe import Recipe, Step, make_plan, quantize
from quantkit.tasks import perplexity, reward

AGENT = Path(__file__).parent / "agents" / "arithmetic"
TABLE, FIGURE = REPORTS / "language" / "methods.csv", REPORTS / "language" / "methods.png"
LAYERS = "model.layers.*"
CUT, WINDOW = 256, 128

FAMILIES = {
    "RTN": ("#9a9a9a", "o", "round to nearest"),
    "GPTQ": ("#2166ac", "s", "GPTQ"),
    "Qronos": ("#053061", "D", "GPTQ with drift (Qronos-like)"),
    "groups": ("#67a9cf", "^", "GPTQ, groups of 32, 8-bit scales"),
    "AdaRound": ("#1b9e77", "v", "AdaRound"),
    "distilled": ("#33691e", "P", "GPTQ with drift, distilled"),
    "tuned": ("#e41a1c", "d", "GPTQ with drift, tuned"),
    "blocks": ("#e08214", "h", "GPTQ in MXFP4, NVFP4"),
    "ternary": ("#d6336c", "*", "ternary, trained"),
    "PTQ1.61": ("#7b3294", "X", "PTQ1.61"),
    "binary": ("#8c6d31", "p", "PB-LLM, BiLLM style"),
}
"""Color, marker and name of each series of the figure."""


@dataclass(frozen=True)
class Method:
    """A row: a recipe, or a baseline that makes dense weights."""

    family: str
    weights: str = ""
    steps: tuple[Step, ...] = ()
    baseline: Baseline | None = None


@dataclass(frozen=True)
class Subject:
    """model: in float. measure: the columns of a row, of a module called as transformers' are. batch: of training.

    odd: layers whose 172 columns are no multiple of 32 or 16; they have groups of 43.
    """

    model: Model
    calib: Calib
    measure: Callable[[nn.Module], dict[str, Any]]
    batch: int
    odd: str | None = None


def methods(batch: int) -> dict[str, Method]:
    """Rows by name, cheap ones first; `batch` sequences a step of those that train."""
    gptq: Step = ("gptq", {"act_order": True})
    drift: Step = ("gptq", {"act_order": True, "drift": True})
    found = {f"RTN int{b}": Method("RTN", f"int{b}", (("rtn", {}),)) for b in (2, 3, 4)}
    found |= {f"GPTQ int{b}": Method("GPTQ", f"int{b}", (gptq,)) for b in (2, 3, 4)}
    found |= {f"GPTQ with drift int{b}": Method("Qronos", f"int{b}", (drift,)) for b in (2, 3, 4)}
    found |= {f"GPTQ int{b}, groups of 32": Method("groups", f"int{b}/e4m3fnx32", (gptq,)) for b in (2, 3, 4)}
    found |= {f"GPTQ {name}": Method("blocks", name, (gptq,)) for name in ("mxfp4", "nvfp4")}
    found |= {
        "PB-LLM style, 10 % in 8 bits": Method("binary", baseline=pb_llm),
        "BiLLM style": Method("binary", baseline=billm),
    }
    found |= {f"AdaRound int{b}": Method("AdaRound", f"int{b}", (("adaround", {"steps": 500}),)) for b in (2, 3, 4)}
    distilled = tuple((name, {**o, "batch": batch} if "batch" in o else o) for name, o in NETWORK_PRESETS["balanced"])
    found |= {f"GPTQ int{b}, distilled": Method("distilled", f"int{b}", distilled) for b in (2, 3)}
    tuned = (
        ("gptq", {"act_order": True, "drift": True, "scale": "importance"}),
        ("tune", {"steps": 100, "batch": batch}),
    )
    found |= {f"GPTQ int{b}, tuned": Method("tuned", f"int{b}", tuned) for b in (2, 3, 4)}
    ternary = {"steps": 100, "batch": batch, "lr": 0.05, "quantizer": "absmean"}
    found |= {
        "Tequila": Method("ternary", "ternary", (("tequila", ternary),)),
        "TWN": Method("ternary", "ternary", (("tequila", {**ternary, "quantizer": "twn", "reactivate": 0.0}),)),
        "PTQ1.61 with preprocessing": Method(
            "PTQ1.61", "binary", (("ptq161", {"steps": 50, "batch": batch // 4, "repair": 50, "lr_repair": 2e-3}),)
        ),
    }
    return found


def stories(data: Path, documents: int, windows: int) -> Subject:
    """stories260k on TinyStories."""
    model, tokenizer = hf.load(data / "stories260k"), hf.read_tokenizer(data / "stories260k")

    def read(name: str) -> list[Tensor]:
        return perplexity.encode(tokenizer, perplexity.read_documents(data / "text" / f"tinystories_{name}.txt"), 512)

    held = [d[:CUT] for d in read("eval400")[:documents]]
    reference = perplexity.evaluate(model.module, held)

    def measure(module: nn.Module) -> dict[str, Any]:
        score = perplexity.evaluate(module, held)
        ratio, error = perplexity.compare(reference, score)
        return columns("perplexity", score.mean, score.stderr, score.n, ratio, error, math.nan)

    calib = Calib(torch.cat(read("calib400"))[: windows * WINDOW].reshape(windows, WINDOW), batch=16)
    return Subject(model, calib, measure, batch=16, odd="*.mlp.down_proj")


def arithmetic(problems: int) -> Subject:
    """The policy of the repository on fresh problems."""
    model, tokenizer = hf.load(AGENT), hf.read_tokenizer(AGENT)
    end: Any = {"end": model.module.config.eos_token_id}  # type: ignore[union-attr]
    task, few = reward.arithmetic(problems, seed=1000), reward.arithmetic(200, seed=1000)
    reference = reward.evaluate(model.module, tokenizer, task, **end)

    def measure(module: nn.Module) -> dict[str, Any]:
        score = reward.evaluate(module, tokenizer, task, **end)
        divergence = reward.kl(module, model.module, tokenizer, few, **end)[0]
        return columns("reward", score.mean, score.stderr, score.n, *reward.compare(reference, score), divergence)

    rows = reward.rollouts(model.module, tokenizer, reward.arithmetic(1024, seed=1), **end)
    return Subject(model, Calib(rows, batch=128), measure, batch=64)


def columns(
    metric: str, mean: float, stderr: float, n: int, to_float: float, error: float, kl: float
) -> dict[str, Any]:
    """The measured columns of a row."""
    return {
        "metric": metric,
        "mean": round(mean, 4),
        "stderr": round(stderr, 4),
        "n": n,
        "to_float": round(to_float, 4),
        "to_float_stderr": round(error, 4),
        "kl": round(kl, 5),
    }


def row(name: str, subject: Subject, method: Method | None) -> dict[str, Any]:
    """Quantize and measure; None is float."""
    began, bits, module = time.process_time(), 32.0, subject.model.module
    if method is not None and method.baseline is not None:
        weights, bits = layerwise(subject.model, subject.calib, method.baseline)
        module = copy.deepcopy(module)
        for key, weight in weights.items():
            module.get_submodule(key).weight.data = weight.detach().clone()
    elif method is not None:
        plan = [(LAYERS, make_plan(method.weights, "float"))]
        fmt = parse(method.weights)
        if isinstance(fmt, Block) and subject.odd is not None:
            plan.append((subject.odd, make_plan(str(replace(fmt, size=43)), "float")))
        done = quantize(subject.model, Recipe(tuple(plan), method.steps), subject.calib)
        bits, module = stored(done), causal_lm(done)
    seconds = time.process_time() - began
    found = {"method": name, "family": "float" if method is None else method.family, "bits": round(bits, 3)}
    return found | subject.measure(module) | {"cpu_seconds": round(seconds, 1)}


def stored(model: Model) -> float:
    """Bits per weight of the quantized layers; a bias counts 32 bits, as these models have none in float."""
    layers = list(model.qlayers().values())
    bits = sum(q.q.bits + 32 * len(q.bias) * bool(q.bias.any()) for q in layers if q.q is not None)
    return bits / sum(q.weight.numel() for q in layers)


def figure(rows: pd.DataFrame, path: Path) -> None:
    """Both models side by side, one series a method, bars of 95 %, float as a line."""
    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    chart, panels = plt.subplots(1, 2, figsize=(12.4, 5.6), layout="constrained")
    titles = {"stories260k": "stories260k on TinyStories", "arithmetic": "arithmetic, the policy trained by GRPO"}
    for axes, subject in zip(panels, titles, strict=True):
        some = rows[rows.subject == subject]
        for family, (color, marker, label) in FAMILIES.items():
            points = some[some.family == family].sort_values("bits")
            line = "none" if family in ("ternary", "binary", "blocks", "PTQ1.61") else "-"
            axes.errorbar(
                points["bits"], points["mean"], yerr=1.96 * points["stderr"], color=color, marker=marker,
                ms=11 if marker == "*" else 7, mec="white", mew=0.6, linestyle=line, lw=1.2, elinewidth=1, capsize=2,
                label=label,
            )  # fmt: skip
            for _, point in points.iterrows() if line == "none" else ():
                at, side = ((-8, -4), "right") if point["method"] == "TWN" else ((7, 4), "left")
                axes.annotate(
                    short(point["method"]), (point["bits"], point["mean"]), at, textcoords="offset points",
                    fontsize=8.5, color=color, ha=side,
                )  # fmt: skip
        for reference in some[some.family == "float"]["mean"]:
            axes.axhline(reference, color="#444444", lw=1, ls=(0, (4, 3)))
            axes.annotate(
                f"float, {reference:.3g}", (0, reference), xycoords=("axes fraction", "data"), xytext=(4, 3),
                textcoords="offset points", ha="left", va="bottom", fontsize=9, color="#444444",
            )  # fmt: skip
        axes.set_xlabel("bits stored per weight of the decoder layers, scales, masks and biases included")
        axes.set_title(titles[subject], loc="left", fontweight="bold", fontsize=12)
        axes.grid(color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)
        quantized = some[some.family != "float"]
        axes.set_xlim(quantized["bits"].min() - 0.25, quantized["bits"].max() + 0.35)
    panels[0].set_yscale("log")
    top = 1.2 * rows[(rows.subject == "stories260k")]["mean"].max()
    ticks = [t for t in (5, 7, 10, 20, 50, 100, 200, 500) if t < top]
    panels[0].set_yticks(ticks, list(map(str, ticks)))
    panels[0].minorticks_off()
    panels[0].set_ylim(4, top)
    panels[0].set_ylabel("perplexity (lower is better)")
    panels[1].set_ylabel("mean reward of greedy answers (higher is better)")
    panels[1].set_ylim(rows[rows.subject == "arithmetic"]["mean"].min() - 0.06, 1.02)
    chart.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9.5
    )
    chart.savefig(path, dpi=150)
    plt.close(chart)


def short(name: str) -> str:
    """A row's name as it stands beside its point.

    >>> short("PB-LLM style, 10 % in 8 bits"), short("GPTQ mxfp4")
    ('PB-LLM', 'mxfp4')
    """
    return name.removeprefix("GPTQ ").split(" with")[0].split(" style")[0]


def main() -> None:
    """Measure what is missing, publish and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stories260k/ and text/")
    parser.add_argument("--documents", type=int, default=60, help="of stories260k, the first N of 400")
    parser.add_argument("--windows", type=int, default=96, help=f"calibration windows of {WINDOW} tokens")
    parser.add_argument("--problems", type=int, default=500, help="of the arithmetic policy")
    parser.add_argument("--only", default="*", help="rows whose name matches")
    parser.add_argument("--subject", choices=["stories260k", "arithmetic"], help="only this one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    held = set[tuple[str, str]]()
    if TABLE.is_file():
        held = set(pd.read_csv(TABLE, comment="#")[["subject", "method"]].itertuples(index=False, name=None))
    subjects = {
        "stories260k": partial(stories, args.data, args.documents, args.windows),
        "arithmetic": partial(arithmetic, args.problems),
    }
    for name, load in subjects.items():
        if args.subject not in (None, name):
            continue
        missing = [m for m in ("float", *methods(1)) if (name, m) not in held and fnmatchcase(m, args.only)]
        if not missing:
            continue
        subject = load()
        table = {"float": None, **methods(subject.batch)}
        for label in missing:
            found = {"subject": name, **row(label, subject, table[label])}
            pd.DataFrame([found]).to_csv(TABLE, mode="a", header=not TABLE.is_file(), index=False)
            print(found, flush=True)
    rows = pd.read_csv(TABLE, comment="#").sort_values(["subject", "family", "method"], ascending=[False, True, True])
    publish("language/methods", rows.to_dict("records"), packages=("torch", "transformers"), title="methods")
    figure(rows, FIGURE)


if __name__ == "__main__":
    main()
