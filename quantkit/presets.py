"""Named pipelines: `--preset best` is short for the steps below, which is what a recipe and a row record."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import torch.fx

from quantkit.errors import InputError
from quantkit.model import Model
from quantkit.policy import Policy
from quantkit.qlayers import shape_of
from quantkit.recipe import Step
from quantkit.recurrent import GRUCell, LSTMCell

Kind = Literal["policy", "recurrent", "controller", "network", "language"]
"""A policy that can act, one with a memory, a network of linear layers without an environment, any other network that
does not act, a language model."""

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


_OWN_INPUTS: tuple[Step, ...] = (("smoothquant", {"explicit": False, "inputs": True}),)

CONTROLLER_PRESETS: dict[str, tuple[Step, ...]] = {
    "fast": (*_OWN_INPUTS, *_ROUNDING, ("bias_correction", {})),
    "balanced": (*_OWN_INPUTS, *_ROUNDING, ("distill", {"steps": 300, "rounds": 1, "batch": 128})),
    "best": (*_OWN_INPUTS, *_ROUNDING, ("distill", {"steps": 1200, "rounds": 4, "batch": 128, "lr": 0.01})),
}
"""The same for networks of linear layers that come without an environment, as controllers do. Features of different
units get multipliers in front of the network, and scales are not clipped by the mean error at the outputs: what is rare
in the calibration set is what a controller must not get wrong. (A quadrotor's controller, 146-64-64-4 at int8 x
int8: 91 of 100 flights survive with "fast", 75 with that of the networks below; float 94.)"""


_AIMED: Step = ("gptq", {"act_order": True, "drift": True})
_FAITHFUL: tuple[Step, ...] = (("act_scales", {"scale": "output"}), _AIMED)

NETWORK_PRESETS: dict[str, tuple[Step, ...]] = {
    "fast": _FAITHFUL,
    "balanced": (*_FAITHFUL, ("distill", {"steps": 60, "rounds": 1, "batch": 32, "lr": 0.01})),
    "best": (*_FAITHFUL, ("distill", {"steps": 900, "rounds": 4, "batch": 32, "lr": 0.01})),
}
"""The same for other networks that do not act. fast: scales and weights aim at the layers' float outputs, and so need
no bias correction. balanced: all layers are trained together on the calibration set. best: fifteen times as long, the
first as balanced, then on mixtures of the inputs, too."""


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
        "controller": CONTROLLER_PRESETS,
        "network": NETWORK_PRESETS,
        "language": LANGUAGE_PRESETS,
    }[kind]
    return tuple((step, dict(options)) for step, options in table[name])


def kind_of(model: Model) -> Kind:
    """Whose presets the model, captured if it can be, takes."""
    from quantkit.language import is_language  # a row has steps and no preset: what only finds these is kept apart

    module = model.module
    if isinstance(module, Policy):
        return "recurrent" if module.recurrent else "policy"
    if is_language(model):
        return "language"
    if any(shape_of(layer).op != "linear" for layer in model.layers().values()):
        return "network"
    if any(isinstance(part, GRUCell | LSTMCell) for part in module.modules()):
        return "recurrent"
    return "controller" if isinstance(module, torch.fx.GraphModule) and not model.points() else "network"
