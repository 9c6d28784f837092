"""Tequila against AbsMean (BitNet), TWN and LSQ from the same start, data, order of batches and number of steps.

    python benchmarks/tequila.py --data ../shared/data/lm
    python benchmarks/tequila.py --subject arithmetic --steps 300 --seeds 1 --out tequila_arithmetic

Language: the linear layers of the blocks of stories260k (embedding, head and normalizations stay as they are, inputs
in float), one scale per output channel; trained on windows of 64 tokens of 400 TinyStories by KL to the float logits.
Perplexity is of the first 40 of 400 other stories, each cut at 256 tokens; `to_absmean` is its ratio to that of AbsMean
with the same seed, with the standard error paired by document.

Policy: a PPO agent of LunarLander, all layers ternary with int8 inputs, distilled on 2,048 states of its own rollouts;
return of 20 episodes from seed 1000, and the share of 2,048 states of other episodes on which the action is the float
policy's. `to_absmean` is the return less AbsMean's, paired by episode.

Arithmetic: the language policy that GRPO has trained (benchmarks/train_arithmetic_policy.py), the same layers, trained
on 8,192 answers of its own by KL to its logits where it answers; mean reward of greedy answers to 1,000 other problems,
`agreement_percent` those on which the answer is the float policy's, `to_absmean` paired by problem. After 300 steps the
reward is float's within its error; the 40 of tequila_arithmetic_short and _means tell the methods apart.

The constant is the paper's with its lambda of 1e-3, and the quantizer the paper's, AbsMean, unless a row says so.
"Tequila on TWN, mean inputs" is the method's default. "+ bias" trains a bias in every layer besides, which asks how
much of the gain is just a bias. "mean inputs" and "mean error" are the constants "mean" and "error" of the method's
docstring, of LSQ too, which asks whether the gain is the quantizer's; "then bias correction" adds after training what
"error" adds while training. RTN rounds without training, at the ternary scale of least squared error. The seed sets the
order of the batches. Standard errors are over documents or episodes; rows with seed "all" have the mean over seeds,
with standard errors over seeds. `loss` is on the first four calibration batches.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from report import REPORTS, publish
from torch import Tensor

from quantkit.capture import captured
from quantkit.language import causal_lm
from quantkit.loaders import hf
from quantkit.loading import load_checkpoint
from quantkit.methods import bias_correction
from quantkit.model import Calib, Model
from quantkit.recipe import Recipe, make_plan, quantize
from quantkit.study import calib_for, policy_of, visited_states
from quantkit.tasks import episodes, perplexity, reward

AGENTS = Path(__file__).parent / "agents"
AGENT = AGENTS / "ppo" / "LunarLander-v3.zip"
WINDOW, CUT = 64, 256
PAPER: dict[str, Any] = {"biases": False, "quantizer": "absmean", "constant": "lambda"}
TWN: dict[str, Any] = {"biases": False, "quantizer": "twn", "constant": "lambda"}
LSQ: dict[str, Any] = {"biases": False, "quantizer": "lsq", "constant": "lambda"}
METHODS: dict[str, dict[str, Any]] = {
    "Tequila": PAPER,
    "AbsMean": PAPER | {"reactivate": 0.0},
    "TWN": TWN | {"reactivate": 0.0},
    "LSQ": LSQ | {"reactivate": 0.0},
    "Tequila on TWN": TWN,
    "Tequila on TWN, lambda 0.01": TWN | {"reactivate": 0.01},
    "Tequila on TWN, lambda 0.03": TWN | {"reactivate": 0.03},
    "Tequila on TWN, mean inputs": TWN | {"constant": "mean"},
    "Tequila on TWN, mean error": TWN | {"constant": "error"},
    "Tequila, mean inputs": PAPER | {"constant": "mean"},
    "Tequila, mean error": PAPER | {"constant": "error"},
    "LSQ, mean inputs": LSQ | {"constant": "mean"},
    "LSQ, mean error": LSQ | {"constant": "error"},
    "TWN, then bias correction": TWN | {"reactivate": 0.0},
    "Tequila, lambda 0.1": PAPER | {"reactivate": 0.1},
    "AbsMean + bias": PAPER | {"biases": True, "reactivate": 0.0},
    "Tequila + bias": PAPER | {"biases": True},
}


def steps(method: str, options: dict[str, Any]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The recipe's steps for a method of the table."""
    return (("rtn", {}),) if method == "RTN" else (("tequila", METHODS[method] | options),)


def finished(method: str, done: Model, calib: Calib) -> Model:
    """The trained model, corrected where the method says so."""
    if method.endswith("bias correction"):
        bias_correction.apply(done, calib)
    return done


def seeds_of(method: str, seeds: int) -> range:
    """RTN draws nothing."""
    return range(1 if method == "RTN" else seeds)


def row(subject: str, method: str, seed: int, options: dict[str, Any], model: Model, seconds: float) -> dict[str, Any]:
    """What both subjects say of a trained model; the columns of the result follow."""
    report = model.meta["steps"][-1]["diagnostics"]
    return {
        "subject": subject,
        "method": method,
        "seed": seed,
        "steps": 0 if method == "RTN" else options["steps"],
        "lr": "" if method == "RTN" else options["lr"],
        "loss": round(report.get("loss_after", math.nan), 5),
        "dead_percent": round(100 * report.get("dead_after", math.nan), 2),
        "changed_percent": round(100 * report.get("changed", math.nan), 2),
        "bias_share": round(report.get("bias_share", math.nan), 6),
        "seconds": round(seconds, 1),
    }


def language(data: Path, methods: list[str], seeds: int, options: dict[str, Any], documents: int) -> list[dict]:
    """Perplexities of stories260k."""
    folder = data / "stories260k"
    model, tokenizer = captured(hf.load(folder)), hf.read_tokenizer(folder)

    def read(name: str) -> list[Tensor]:
        return perplexity.encode(tokenizer, perplexity.read_documents(data / "text" / f"tinystories_{name}.txt"), 512)

    stream = torch.cat(read("calib400"))
    windows = stream[: len(stream) // WINDOW * WINDOW].reshape(-1, WINDOW)
    held = [d[:CUT] for d in read("eval400")[:documents]]
    reference = perplexity.evaluate(causal_lm(model), held, batch=20)
    rows: list[dict[str, Any]] = []
    base: dict[int, perplexity.Perplexity] = {}
    for method in methods:
        for seed in seeds_of(method, seeds):
            began = time.perf_counter()
            plan = (("model.layers.*", make_plan("ternary", "float", "row")),)
            recipe = Recipe(plan, steps(method, options), seed)
            done = finished(method, quantize(model, recipe, Calib(windows, batch=64)), Calib(windows, batch=64))
            found = row("stories260k", method, seed, options, done, time.perf_counter() - began)
            score = perplexity.evaluate(causal_lm(done), held, batch=20)
            if method == "AbsMean":
                base[seed] = score
            ratio, error = perplexity.compare(base[seed], score) if seed in base else (math.nan, math.nan)
            found |= {"metric": "perplexity", "float": round(reference.mean, 4), "value": round(score.mean, 4)}
            found |= {
                "stderr": round(score.stderr, 4),
                "to_absmean": round(ratio, 4),
                "to_absmean_stderr": round(error, 4),
            }
            found["agreement_percent"] = math.nan
            rows.append(found)
            print(found, flush=True)
    return rows


def policy(methods: list[str], seeds: int, options: dict[str, Any]) -> list[dict]:
    """Returns and agreement of the LunarLander policy."""
    model = load_checkpoint(AGENT)
    actor, spec = policy_of(model)
    states = calib_for(model, 2048).inputs
    fresh = visited_states(model, 2048, 9).states.numpy()
    wanted = episodes.act_of(actor)(fresh)
    reference = episodes.evaluate(episodes.act_of(actor), spec)
    rows: list[dict[str, Any]] = []
    base: dict[int, episodes.Score] = {}
    for method in methods:
        for seed in seeds_of(method, seeds):
            began = time.perf_counter()
            recipe = Recipe((("*", make_plan("ternary", "int8", "row")),), steps(method, options), seed)
            done = finished(method, quantize(model, recipe, Calib(states)), Calib(states))
            found = row("LunarLander-v3", method, seed, options, done, time.perf_counter() - began)
            act = episodes.act_of(policy_of(done)[0])
            score = episodes.evaluate(act, spec)
            if method == "AbsMean":
                base[seed] = score
            gains = [a - b for a, b in zip(score.returns, base[seed].returns, strict=True)] if seed in base else []
            error = statistics.stdev(gains) / len(gains) ** 0.5 if gains else math.nan
            found |= {"metric": "return", "float": round(reference.mean, 2), "value": round(score.mean, 2)}
            found |= {"stderr": round(score.stderr, 2), "to_absmean": round(statistics.mean(gains or [math.nan]), 2)}
            found |= {"to_absmean_stderr": round(error, 2)}
            found["agreement_percent"] = round(100 * float((act(fresh) == wanted).mean()), 2)
            rows.append(found)
            print(found, flush=True)
    return rows


def arithmetic(methods: list[str], seeds: int, options: dict[str, Any], problems: int) -> list[dict]:
    """Rewards of the language policy."""
    folder = AGENTS / "arithmetic"
    model, tokenizer = captured(hf.load(folder)), hf.read_tokenizer(folder)
    end, equals = model.meta["config"]["eos_token_id"], tokenizer.token_to_id("=")
    task = reward.arithmetic(problems, seed=1000)
    reference = reward.evaluate(causal_lm(model), tokenizer, task, end=end)
    answers = reward.rollouts(causal_lm(model), tokenizer, reward.arithmetic(8192, seed=1), end=end)
    options = options | {"prompt_end": equals, "answer_end": end}
    rows: list[dict[str, Any]] = []
    base: dict[int, reward.Reward] = {}
    for method in methods:
        for seed in seeds_of(method, seeds):
            began = time.perf_counter()
            plan = (("model.layers.*", make_plan("ternary", "float", "row")),)
            recipe, calib = Recipe(plan, steps(method, options), seed), Calib(answers, batch=256)
            done = finished(method, quantize(model, recipe, calib), calib)
            found = row("arithmetic", method, seed, options, done, time.perf_counter() - began)
            score = reward.evaluate(causal_lm(done), tokenizer, task, end=end)
            if method == "AbsMean":
                base[seed] = score
            gain, error = reward.compare(base[seed], score) if seed in base else (math.nan, math.nan)
            found |= {"metric": "reward", "float": round(reference.mean, 4), "value": round(score.mean, 4)}
            found |= {"stderr": round(score.stderr, 4), "to_absmean": round(gain, 4)}
            found["to_absmean_stderr"] = round(error, 4)
            same = sum(a == b for a, b in zip(score.answers, reference.answers, strict=True))
            found["agreement_percent"] = round(100 * same / score.n, 2)
            rows.append(found)
            print(found, flush=True)
    return rows


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and behind those of a method their mean with the standard error over seeds."""
    result = []
    for key in dict.fromkeys((r["subject"], r["method"]) for r in rows):
        some = [r for r in rows if (r["subject"], r["method"]) == key]
        result += some
        if len(some) < 2:
            continue

        def mean(name: str, some: list[dict[str, Any]] = some) -> float:
            return statistics.mean(r[name] for r in some)

        def error(name: str, some: list[dict[str, Any]] = some) -> float:
            values = [r[name] for r in some]
            return statistics.stdev(values) / len(some) ** 0.5 if all(map(math.isfinite, values)) else math.nan

        numbers = [k for k, v in some[0].items() if isinstance(v, float) and k not in ("lr", "float")]
        mixed = {k: round(mean(k), 4) for k in numbers}
        mixed |= {"seed": "all", "stderr": round(error("value"), 4), "to_absmean_stderr": round(error("to_absmean"), 4)}
        result.append(some[0] | mixed)
    return result


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with stories260k/ and text/")
    parser.add_argument(
        "--subject", choices=["language", "policy", "arithmetic"], action="append", help="more than once"
    )
    parser.add_argument("--methods", nargs="+", choices=["RTN", *METHODS], default=["RTN", "AbsMean", *METHODS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="of a language model, 16 windows each or 64 answers")
    parser.add_argument("--lr", type=float, default=0.05, help="of a language model")
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--out", default="tequila", help="name of the table in reports/language")
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods, subjects = list(dict.fromkeys(args.methods)), args.subject or ["policy", "language"]
    if "language" in subjects and args.data is None:
        parser.error("--data is needed for stories260k")
    rows = []
    if "policy" in subjects:
        rows += policy(methods, args.seeds, {"steps": 1000, "batch": 64, "lr": 0.05})
    if "language" in subjects:
        small = {"steps": args.steps, "batch": 16, "lr": args.lr}
        rows += language(args.data, methods, args.seeds, small, args.documents)
    if "arithmetic" in subjects:
        options = {"steps": args.steps, "batch": 64, "lr": args.lr}
        rows += arithmetic(methods, args.seeds, options, args.problems)
    (REPORTS / "language").mkdir(parents=True, exist_ok=True)
    publish(f"language/{args.out}", over_seeds(rows), packages=("torch", "transformers"), title=args.out)


if __name__ == "__main__":
    main()
