"""How long quantizing a language model will take and how much memory, from its shapes and rates measured here and now.

Counted are products of matrices (2 operations for a multiplication and an addition), and passes of arithmetic over
elements; each at the rate that this machine gives one thread, which is what `recipe.quantize` computes with. The counts
of passes are rough: expect the seconds within a factor of two.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from hwmodel.formats import Int
from quantkit.arithmetic import half_products, one_thread
from quantkit.language_stream import budget
from quantkit.model import Calib, Model
from quantkit.observers import PANEL
from quantkit.qlayers import shape_of
from quantkit.recipe import Recipe, full_steps, step_options
from quantkit.rounding import round_to

LAYERWISE = ("rtn", "act_scales", "gptq", "adaround", "bias_correction")
SEARCH = 31
"""Scales that `fit_scale` tries."""


def forecast(
    model: Model, recipe: Recipe, calib: Calib, *, memory: int | None, whole: str | None, half: bool = False
) -> dict[str, Any]:
    """Facts about a run that has not begun: seconds, of which parts, and memory_bytes at the peak.

    model: captured, with or without weights. whole: why the model cannot be streamed, or None; memory, half: as in
    `language_stream.quantize_streamed`, of one that can. seconds is None where a step trains, as its time depends on
    more than shapes.
    """
    memory = budget(model) if memory is None else memory
    layers = [(name, layer) for name, layer in model.layers().items() if shape_of(layer).op != "embedding"]
    plans = {n: recipe.plan_for(n, i, len(model.layers())) for i, n in enumerate(model.layers())}
    planned = [n for n, _ in layers if plans[n].weight is not None or plans[n].act is not None]
    steps = [(name, _filled(name, options)) for name, options in full_steps(recipe)]
    names = {name for name, _ in steps}
    acts = any(plans[n].act is not None for n in planned)
    drift = any(name == "gptq" and options["drift"] for name, options in steps)
    streams = 1 + (acts or drift or bool(names & {"adaround", "bias_correction"}))
    looks = streams > 1 or not names <= {"rtn", "act_scales"}
    length = calib.inputs.shape[1] if calib.inputs.dim() == 2 else 1
    rows = calib.inputs.numel()
    config = model.meta.get("config", {})
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    blocks = int(config.get("num_hidden_layers") or config.get("n_layer") or 1)

    order = [name for name, _ in layers]
    reached = order[: 1 + max((order.index(name) for name in planned), default=-1)]
    multiply, element = _rates()
    fast = _products(half)
    work: dict[str, list[float]] = {key: [0.0, 0.0] for key in ("forward", "inputs", "rounding")}
    for name, layer in layers:
        n, m = layer.weight.shape
        if looks and name in reached:
            work["forward"][0] += streams * 2 * rows * n * m
            work["forward"][1] += streams * 4 * rows * n + (6 * rows * m if plans[name].act else 0)
        if plans[name].weight is None:
            continue
        for step, options in steps:
            _add(work, step, options, rows, n, m)
    if looks:
        work["forward"][0] += streams * blocks * 4 * rows * length * (layers[0][1].weight.shape[1])
        work["forward"][1] += streams * blocks * 8 * rows * length * heads
    rates = {"forward": fast, "inputs": fast, "rounding": multiply}
    parts = {key: a / rates[key] + b / element for key, (a, b) in work.items()}

    weights = sum(layer.weight.numel() for layer in model.layers().values())
    largest = max((model.layers()[n].weight.numel() for n in planned), default=0)
    columns = max((model.layers()[n].weight.shape[1] for n in planned), default=0)
    table = max(layer.weight.numel() for layer in model.layers().values())
    wide = max((layer.weight.shape[1] for name, layer in layers if name in reached), default=0)
    flowing = (
        (2 if half else 4) * rows * streams * (2 * layers[0][1].weight.shape[1] + wide) if looks and planned else 0
    )
    method = 4 * 8 * largest + 4 * 4 * columns**2 if planned else 0
    held = _used() + max(3 * 4 * table, method + (flowing if whole else min(flowing, memory)))
    trains = sorted(names - set(LAYERWISE))
    return {
        "seconds": None if trains else sum(parts.values()),
        "parts": {} if trains else parts,
        "memory_bytes": int(held + (3 * 4 * weights if whole else 0)),
        "streamed": whole is None,
        "whole_because": whole,
        "not_foretold": f"the time of {', '.join(trains)}, which is no single pass" if trains else None,
        "layers": len(planned),
        "weights": weights,
        "calibration_tokens": rows,
        "activation_bytes": flowing,
        "spilled_bytes": 0 if whole else max(0, flowing - memory),
        "matmul_gflops": fast / 1e9,
        "elements_per_second": element,
    }


def _filled(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """A step's options with the defaults of those not given."""
    return {key: p.default for key, p in step_options(name).items()} | options


def _add(work: dict[str, list[float]], step: str, options: dict[str, Any], rows: int, n: int, m: int) -> None:
    """Operations and passes over elements of a step on a layer of n x m weights."""
    gram = step == "gptq" or options.get("scale") == "importance" or (step == "adaround" and m <= 4 * options["batch"])
    if gram:
        work["inputs"][0] += rows * m * (m + PANEL)
    match step:
        case "rtn":
            work["rounding"][1] += (SEARCH + 4) * n * m
        case "gptq":
            work["rounding"][0] += m**3 + 4 * n * m * m
            work["rounding"][1] += (SEARCH + 20) * n * m
            if options["drift"]:
                work["inputs"][0] += 2 * rows * m * m + m**3
        case "adaround":
            each = 2 * n * m * m if gram else 6 * options["batch"] * n * m
            work["rounding"][0] += options["steps"] * each
            work["rounding"][1] += (SEARCH + 12 * options["steps"]) * n * m
        case "bias_correction":
            work["inputs"][0] += 2 * rows * n * m


def _rates() -> tuple[float, float]:
    """Operations of products of matrices, and elements that a rounding passes over, a second, on one thread."""
    x = torch.randn(2**18)
    with one_thread():
        passed = _seconds(lambda: round_to(x / 0.1, Int(4)).mul_(0.1).sub_(x).square_())
    return _products(half=False), len(x) / passed


def _products(half: bool) -> float:
    """Operations of products of matrices a second, on one thread, in float32 or bfloat16."""
    a = torch.randn(512, 512)
    with one_thread(), half_products(half):
        return 2 * 512**3 / _seconds(lambda: a @ a)


def _seconds(work: Callable[[], Any]) -> float:
    """The least of some runs."""
    found = []
    for _ in range(7):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def _used() -> int:
    """Bytes of memory that this process has taken at its peak so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
