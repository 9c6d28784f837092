"""Seconds of a whole-policy estimate: search from cold caches, and again once the layers' folds are known."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import report

from hwmodel.coeffs import coefficients, forget
from hwmodel.devices import find_device
from hwmodel.estimate import estimate
from hwmodel.folding import layer_fold, predict
from hwmodel.formats import parse
from hwmodel.spec import LayerSpec

RUNS = 30


def policy(weight: str, act: str, hidden: int) -> list[LayerSpec]:
    """8 observations, two hidden layers, 4 actions."""
    sizes = [(hidden, 8), (hidden, hidden), (4, hidden)]
    return [
        LayerSpec(
            f"layer{i}", "linear", rows, columns, weight=parse(weight), act=parse(act),
            out=None if i == 2 else parse(act), activation="none" if i == 2 else "tanh",
        )
        for i, (rows, columns) in enumerate(sizes)
    ]  # fmt: skip


def main() -> None:
    device = find_device("xc7a35t")
    rows = []
    for hidden in (32, 64, 256):
        specs = policy("int4", "int4", hidden)
        cold, folded, again, target = [], [], [], []
        for i in range(RUNS):
            forget()
            coefficients()  # read once a process
            start = time.perf_counter()
            found = estimate(specs, device)
            cold.append(time.perf_counter() - start)
            start = time.perf_counter()
            estimate(specs, device, latency_us=found.latency_us * (2 + i / 10))
            target.append(time.perf_counter() - start)
            start = time.perf_counter()
            estimate(specs, device)
            again.append(time.perf_counter() - start)
            forget()
            coefficients()
            fresh = [replace(spec, name=f"{spec.name}.{i}") for spec in specs]
            start = time.perf_counter()
            predict([layer_fold(s, e.pe, e.simd) for s, e in zip(fresh, found.layers, strict=True)])
            folded.append(time.perf_counter() - start)
        rows += [
            {"hidden": hidden, "what": what, "median_ms": round(1e3 * statistics.median(seconds), 3)}
            for what, seconds in (
                ("folding search, cold", cold),
                ("given folds, cold", folded),
                ("another latency, layers known", target),
                ("the same again", again),
            )
        ]
    report.publish("hwmodel/estimate_speed", rows, packages=("numpy",))


if __name__ == "__main__":
    main()
