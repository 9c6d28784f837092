"""Named pipelines: `--preset best` is short for the steps below, which is what a recipe and a row record."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from quantkit.errors import InputError
from quantkit.recipe import Step

Kind = Literal["policy", "recurrent", "network", "language"]
"""A policy, one with a memory, a network that does not act, a language model."""

_SCALING: tuple[Step, ...] = (("center", {}), ("smoothquant", {"explicit": False}))
_ROUNDING: tuple[Step, ...] = (("gptq", {"act_order": True}),)

PRESETS: dict[str, tuple[Step, ...]] = {
    "fast": (*_SCALING, *_ROUNDING, ("bias_correction", {})),
    "balanced": (*_SCALING, *_ROUNDING, ("distill", {"steps": 300, "rounds": 1, "batch": 128})),
    "best": (
        *_SCALING,
        ("act_scales", {}),
        ("input_grid", {}),
        *_ROUNDING,
        (
            "distill",
            {"steps": 12000, "rounds": 32, "states": 2048, "lr": 0.02, "slow": 0.5, "laps": 3, "climb": 800_000},
        ),
    ),
}
"""fast: milliseconds. balanced: training on the calibration set, a second or two. best: the policy acts, too, and
its return counts; half a minute of a core to a minute and a half, and where it surely falls short of float some minutes
more, for further laps and the climb."""


RECURRENT_PRESETS: dict[str, tuple[Step, ...]] = {
    "fast": PRESETS["fast"],
    "balanced": (*_SCALING, *_ROUNDING, ("distill", {"steps": 300, "rounds": 1, "batch": 16})),
    "best": (
        *_SCALING,
        *_ROUNDING,
        ("distill", {"steps": 1600, "rounds": 8, "states": 1024, "batch": 16, "lr": 0.01}),
    ),
}
"""The same for policies with a memory, trained through time on `batch` sequences a step: five seconds and half a minute
of a core for an LSTM of 16 cells."""


_AIMED: Step = ("gptq", {"act_order": True, "drift": True})
_FAITHFUL: tuple[Step, ...] = (("act_scales", {"scale": "output"}), _AIMED)

NETWORK_PRESETS: dict[str, tuple[Step, ...]] = {
    "fast": _FAITHFUL,
    "balanced": (*_FAITHFUL, ("distill", {"steps": 60, "rounds": 1, "batch": 32, "lr": 0.01})),
    "best": (*_FAITHFUL, ("distill", {"steps": 900, "rounds": 4, "batch": 32, "lr": 0.01})),
}
"""The same for networks that do not act. fast: scales and weights aim at the layers' float outputs, and so need no bias
correction. balanced: all layers are trained together on the calibration set. best: fifteen times as long, the first as
balanced, then on mixtures of the inputs, too."""


_WEIGHED: Step = ("gptq", {"act_order": True, "drift": True, "scale": "importance"})

LANGUAGE_PRESETS: dict[str, tuple[Step, ...]] = {
    "fast": (_AIMED,),
    "balanced": (("adaround", {}),),
    "best": (_WEIGHED, ("tune", {"steps": 300, "batch": 4})),
}
"""The same for language models. fast, balanced: layer by layer and so block by block. best: then all weights together,
on the float network's logits, with the whole model in memory; `batch` windows a step."""


def preset_steps(name: str, kind: Kind = "policy") -> tuple[Step, ...]:
    """The steps of a preset, for a network of this kind, each time a fresh copy.

    InputError with the nearest name for an unknown one.
    """
    if name not in PRESETS:
        near: Any = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise InputError(f"unknown preset {name!r}; did you mean {near[0]!r}? Presets: {', '.join(PRESETS)}")
    table = {
        "policy": PRESETS,
        "recurrent": RECURRENT_PRESETS,
        "network": NETWORK_PRESETS,
        "language": LANGUAGE_PRESETS,
    }[kind]
    return tuple((step, dict(options)) for step, options in table[name])
