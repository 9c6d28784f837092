"""What the LUTs and the delays of each kind of unit depend on, and weights of such features by least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hwmodel import fabric, timing
from hwmodel.convert import factor_rows
from hwmodel.mac import booth_rows
from hwmodel.spec import Rescale

Features = dict[str, Callable[[dict[str, Any]], dict[str, float]]]

FEATURES: Features = {
    "constant": lambda f: {"rows": f["adds"] * f["acc"], "t": f["t"], "one": 1.0},
    "runtime": lambda f: {"rows": booth_rows(f["acc"], True, f["k"], False), "acc": f["acc"], "t": f["t"], "one": 1.0},
    "shift": lambda f: {"moved": f["k"] * (f["acc"] + 2 ** f["k"] - 1), "t": f["t"], "one": 1.0},
    "round_clip": lambda f: {"shift": f["shift"], "q": f["t"] - f["shift"], "out": f["out"], "one": 1.0},
    "jam": lambda f: {"shift": f["shift"], "q": f["t"] - f["shift"], "x": f["x"], "one": 1.0},
    "patch": lambda f: {"match": f["n"] * f["acc"], "codes": f["n"] * f["out"], "out": f["out"], "one": 1.0},
    "sequencer": lambda f: {
        "bits": (f["cols"] - 1).bit_length() + (f["cols"] * f["rows"] - 1).bit_length(),
        "one": 1.0,
    },
    "drain": lambda f: {
        "rows": (f["count"] - 1).bit_length(),
        "slots": (f["share"] - 1).bit_length(),
        "shared": float(f["share"] > 1),
        "one": 1.0,
    },
    "first step": lambda f: {"bits": f["width"], "one": 1.0},
    "step": lambda f: {"bits": f["width"], "one": 1.0},
}
LATTICE: Features = FEATURES | {
    "constant": lambda f: FEATURES["constant"](f) | {"chains": f["adds"]},
    "sequencer": lambda f: FEATURES["sequencer"](f) | {"chains": fabric.chains(f["cols"], f["cols"] * f["rows"])},
    "drain": lambda f: FEATURES["drain"](f) | {"chains": fabric.chains(f["count"])},
    "runtime": lambda f: FEATURES["runtime"](f) | {"chains": factor_rows(f["acc"], f["k"])},
}
"""Of ECP5: every carry chain costs."""
TIMES: Features = {
    "constant": lambda f: timing.factor_facts(Rescale("constant", 0, f["adds"], f["t"], 0, 0), f["acc"]),
    "runtime": lambda f: timing.factor_facts(Rescale("runtime", f["k"], 0, f["t"], 0, 0), f["acc"]),
    "shift": lambda f: timing.factor_facts(Rescale("shift", f["k"], 0, f["t"], 0, 0), f["acc"]),
    "round_clip": lambda f: timing.round_facts(f["t"], f["shift"]),
    "jam": lambda f: timing.round_facts(f["t"], f["shift"]),
    "patch": lambda f: timing.patch_facts(f["n"], f["acc"]),
    "sequencer": FEATURES["sequencer"],
    "drain": FEATURES["drain"],
    "first step": FEATURES["first step"],
    "step": FEATURES["step"],
}
"""What the delays of a kind depend on (`hwmodel.timing`)."""


def least_squares(rows: list[dict[str, float]], y: list[float]) -> dict[str, float]:
    """Relative least squares with nonnegative weights (features that want to be negative are dropped)."""
    names = sorted({name for row in rows for name in row})
    target = np.array(y, float)
    matrix = np.array([[row.get(n, 0.0) for n in names] for row in rows]) / np.maximum(target, 1.0)[:, None]
    ones = target / np.maximum(target, 1.0)
    active = list(range(len(names)))
    while True:
        weights, *_ = np.linalg.lstsq(matrix[:, active], ones, rcond=None)
        if (weights >= 0).all() or len(active) == 1:
            break
        active.pop(int(np.argmin(weights)))
    found = dict.fromkeys(names, 0.0)
    found.update({names[i]: round(float(w), 4) for i, w in zip(active, weights, strict=True)})
    return found
