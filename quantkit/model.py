"""`Model`: the one mutable record that travels from loader to export.

Fields: the module, one example input, the links along which rescaling preserves the
function, and plain-JSON facts (`meta`) about where it came from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from quantkit.qlayers import Plain, Point, QLayer, op_of


@dataclass(frozen=True)
class EnvSpec:
    """The environment a policy was trained for, in today's names.

    id, kwargs: what `gymnasium.make` takes. time_feature: horizon of an appended `1 - t/horizon`
    input, or None. pad_obs: zeros appended to the observation to reach this many inputs, or None.
    trained_on: the id the checkpoint was trained with.
    """

    id: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    time_feature: int | None = None
    pad_obs: int | None = None
    trained_on: str | None = None


Normalization = Literal["stage", "fold", "none"]
"""Where observations are normalized: in a float input stage, in the first layer, or not although they could be."""


@dataclass
class Model:
    """A network and what is known of it.

    module: a `Policy` or any nn.Module. example: one batch of inputs. env: where a policy acts.
    critic: what the float agent learned of the value of its actions (`quantkit.critic`), where the checkpoint tells.
    meta: JSON facts, at least `kind` ("policy" or "module"), `algo`, `source` (file name) and
    `sha256` of the checkpoint; `untraced` (why) of a module whose graph is not known, `float_layers`
    (name: reason) of what has weights and cannot be quantized.
    """

    module: nn.Module
    example: Tensor
    env: EnvSpec | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    critic: nn.Module | None = None

    def layers(self) -> dict[str, Plain | QLayer]:
        """Layers with a weight that can be quantized or is, by dotted name, in order of definition."""
        return {
            name: module  # type: ignore[misc]
            for name, module in self.module.named_modules()
            if isinstance(module, QLayer) or op_of(module) is not None
        }

    def qlayers(self) -> dict[str, QLayer]:
        """The layers already wrapped for quantization, in order of definition."""
        return {name: module for name, module in self.module.named_modules() if isinstance(module, QLayer)}

    def points(self) -> dict[str, Point]:
        """Where activations other than a layer's input are quantized: operands of attention, states of cells."""
        return {name: module for name, module in self.module.named_modules() if isinstance(module, Point)}

    def quantizers(self) -> dict[str, QLayer | Point]:
        """Everything that may quantize an activation: `qlayers` and `points`."""
        return {**self.qlayers(), **self.points()}

    def copy(self) -> Model:
        """An independent copy."""
        return Model(copy.deepcopy(self.module), self.example.clone(), self.env, copy.deepcopy(self.meta), self.critic)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` where the submodule `name` is; it takes over buffers, as those of Gemma's embedding."""
        parent, _, leaf = name.rpartition(".")
        for key, buffer in self.module.get_submodule(name)._buffers.items():
            if not hasattr(module, key):
                module.register_buffer(key, buffer)
        setattr(self.module.get_submodule(parent) if parent else self.module, leaf, module)


class Visits(NamedTuple):
    """Inputs that a model met when it acted, and what each of the episodes earned in how many steps."""

    states: Tensor  # (n, *input_shape)
    returns: Tensor  # (episodes,) float64
    lengths: Tensor  # (episodes,) int64


@dataclass
class Calib:
    """Inputs to calibrate on: a tensor (samples, *input_shape), walked in batches of `batch`.

    generator: the source of randomness of every step that needs one. visit: `visit(model, n, seed, episodes=8)`
    gives n inputs that this model meets when it acts itself, of a policy with an environment only; the same episodes
    for the same seed, from 1, and exactly `episodes` where n is 1, else as many more as n takes.
    """

    inputs: Tensor
    batch: int = 512
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    visit: Callable[..., Visits] | None = None

    def held(self) -> Tensor:
        """Which inputs a method that trains judges itself by and never trains on: (samples,), true for every eighth."""
        return torch.arange(len(self.inputs)) % 8 == 7

    def rest(self) -> Calib:
        """The calibration set without these; all of one with fewer than 16 inputs."""
        kept = self.inputs[~self.held()] if len(self.inputs) >= 16 else self.inputs
        return Calib(kept, self.batch, self.generator, self.visit)

    def batches(self) -> tuple[Tensor, ...]:
        """The inputs in batches."""
        return self.inputs.split(self.batch)


def unquantized(model: Model) -> set[str]:
    """Layers planned to have a quantized weight that have none yet."""
    return {name for name, layer in model.qlayers().items() if layer.plan.weight is not None and layer.q is None}


def float_twin(model: Model) -> Model:
    """A copy that computes in float: no weight, input or operand of it is quantized."""
    twin = model.copy()
    for part in twin.quantizers().values():
        part.set_act(None)
        if isinstance(part, QLayer):
            part.set_weight(None)
    return twin
