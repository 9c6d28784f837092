"""A policy as the toolkit sees it: input stage -> network -> head.

The input stage is float arithmetic on raw observations (normalization, image scaling), the
network is a chain of layers that quantization acts on, and the head turns network outputs
into environment actions (argmax, tanh squashing, clipping, rescaling). A network with LSTMs takes sequences, and one
step at a time with the states that the step before left. A `Policy` can be
described by plain JSON values and rebuilt from them, so that a quantized directory needs
nothing of the checkpoint it came from.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.errors import InputError
from quantkit.qlayers import QLayer
from quantkit.recurrent import LSTMCell, Unrolled


class InputStage(nn.Module):
    """`clamp((x - mean) / std, low, high)` on raw observations, in float32.

    Buffers broadcast against one observation. Covers VecNormalize (mean, std, low = -clip),
    image scaling (std = 255) and what remains of a normalizer folded into the first layer
    (mean = 0, std = 1 and the clip expressed on raw observations).
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, mean: Any = 0.0, std: Any = 1.0, low: Any = -np.inf, high: Any = np.inf) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std), ("low", low), ("high", high)):
            self.register_buffer(name, torch.as_tensor(np.asarray(value, dtype=np.float32)))
        self._known: tuple[tuple[tuple[int, int], ...], tuple[bool, bool]] | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the stage changes nothing."""
        return not self.scales and not self.clips

    @property
    def scales(self) -> bool:
        """Whether mean or std do anything."""
        return bool((self.mean != 0).any() or (self.std != 1).any())

    @property
    def clips(self) -> bool:
        """Whether low or high do anything."""
        return bool(torch.isfinite(self.low).any() or torch.isfinite(self.high).any())

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self._flags())

    def run(self, x: Tensor, scales: bool, clips: bool) -> Tensor:
        """What the stage does to observations x, if it is known whether it `scales` and `clips`."""
        x = x.to(torch.float32)
        if scales:
            x = (x - self.mean) / self.std
        if clips:
            x = torch.minimum(torch.maximum(x, self.low), self.high)
        return x

    def _flags(self) -> tuple[bool, bool]:
        """`scales` and `clips`, looked up anew only when a buffer was replaced or changed in place."""
        state = tuple((id(b), b._version) for b in self._buffers.values() if b is not None)
        if self._known is None or self._known[0] != state:
            self._known = (state, (self.scales, self.clips))
        return self._known[1]


@dataclass(frozen=True)
class Head:
    """How network outputs become actions.

    kind "discrete": argmax. "multidiscrete": argmax of each segment of `nvec`. "multibinary":
    output > 0. "box": `tanh` if squash, then rescaled from [-1, 1] to [low, high]; otherwise
    clipped to [low, high].
    """

    kind: Literal["discrete", "multidiscrete", "multibinary", "box"]
    nvec: tuple[int, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    squash: bool = False
    start: int = 0

    @property
    def outputs(self) -> int:
        """How many numbers the network must produce."""
        return len(self.low) if self.kind == "box" else sum(self.nvec)

    def actions(self, out: np.ndarray) -> np.ndarray:
        """Network outputs (batch, outputs) -> actions: (batch,) int64, (batch, k) int64 or (batch, dim) float32."""
        match self.kind:
            case "discrete":
                return out.argmax(axis=1).astype(np.int64) + self.start
            case "multidiscrete":
                edges = np.cumsum((0, *self.nvec))
                parts = [out[:, a:b].argmax(axis=1) for a, b in itertools.pairwise(edges)]
                return np.stack(parts, axis=1).astype(np.int64)
            case "multibinary":
                return (out > 0).astype(np.int64)
            case "box":
                low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
                if self.squash:
                    return (low + np.float32(0.5) * (np.tanh(out) + np.float32(1)) * (high - low)).astype(np.float32)
                return np.clip(out, low, high).astype(np.float32)


@dataclass(frozen=True)
class Field:
    """A part of the vector that a policy takes: what an environment gives under `key`, "" where that is all.

    shape: of what is given. sizes: () for numbers, which are flattened; else how many values each of its integers has,
    and integer i of size n becomes n numbers, the i-th 1 and the others 0 (Stable-Baselines3's `preprocess_obs`).
    """

    key: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """How many numbers of the vector it is."""
        return sum(self.sizes) if self.sizes else math.prod(self.shape)

    def vector(self, values: np.ndarray) -> np.ndarray:
        """Values (batch, *shape) -> (batch, width) float32; InputError for an integer that is out of range.

        >>> Field("", (2,), (2, 3)).vector(np.array([[1, 0]])).tolist()
        [[0.0, 1.0, 1.0, 0.0, 0.0]]
        """
        flat = np.asarray(values).reshape(len(values), -1)
        if not self.sizes:
            return flat.astype(np.float32)
        codes = flat.astype(np.int64)
        if (codes < 0).any() or (codes >= np.array(self.sizes)).any():
            raise InputError(f"observation {self.key or 'of integers'}: {codes.tolist()[:4]} is not below {self.sizes}")
        found = np.zeros((len(codes), self.width), np.float32)
        found[np.arange(len(codes))[:, None], codes + np.cumsum((0, *self.sizes[:-1]))] = 1
        return found


def to_vectors(fields: tuple[Field, ...], given: dict[str, np.ndarray]) -> np.ndarray:
    """Arrays (batch, *shape) by the fields' keys as vectors (batch, sum of widths) float32."""
    return np.concatenate([f.vector(given[f.key]) for f in fields], axis=1)


States = tuple[Tensor, Tensor]
"""h and c of a recurrent policy's cells, (cells, batch, hidden) each, as `nn.LSTM` has them."""


class Recurrent(nn.Module):
    """LSTM cells over sequences (batch, time, inputs) -> (batch, time, hidden), without their last states."""

    def __init__(self, loop: Unrolled) -> None:
        super().__init__()
        self.loop = loop

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.loop(x)[0]
        return y


class Policy(nn.Module):
    """An actor: raw observations (batch, *obs_shape) -> network outputs (batch, head.outputs).

    With a `Recurrent` part in `net` it takes sequences that begin with no state, (batch, time, *obs_shape) -> (batch,
    time, head.outputs), and `step` goes on from given states. fields: what the environment's observation, a dictionary
    or integers, becomes a vector by; () where it is an array of `obs_shape`.
    """

    def __init__(
        self,
        stage: InputStage,
        net: nn.Sequential,
        head: Head,
        obs_shape: tuple[int, ...],
        fields: tuple[Field, ...] = (),
    ) -> None:
        super().__init__()
        self.stage = stage
        self.net = net
        self.head = head
        self.obs_shape = tuple(obs_shape)
        self.fields = fields

    @property
    def cells(self) -> tuple[LSTMCell, ...]:
        """The recurrent cells in order; () of a policy without memory."""
        return tuple(cell for part in self.net if isinstance(part, Recurrent) for cell in part.loop.cells)  # type: ignore[misc]

    @property
    def recurrent(self) -> bool:
        """Whether actions depend on earlier observations."""
        return any(isinstance(part, Recurrent) for part in self.net)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(self.stage(obs))

    def start(self, batch: int) -> States:
        """The states in which episodes begin: zeros."""
        cells = self.cells
        return torch.zeros(len(cells), batch, cells[0].hidden), torch.zeros(len(cells), batch, cells[0].hidden)

    def step(self, obs: Tensor, states: States) -> tuple[Tensor, States]:
        """Outputs (batch, head.outputs) of observations (batch, *obs_shape), and the states that they leave."""
        x, first = self.stage(obs).unsqueeze(1), 0
        left: list[States] = []
        for part in self.net:
            if isinstance(part, Recurrent):
                last = first + len(part.loop.cells)
                x, after = part.loop(x, tuple(s[first:last] for s in states))
                left.append(after)
                first = last
            else:
                x = part(x)
        h, c = (torch.cat(parts) for parts in zip(*left, strict=True))
        return x.squeeze(1), (h, c)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Stable-Baselines3's `predict`: actions for one observation or a batch, and the state of the next call.

        state: of a recurrent policy h and c, (cells, batch, hidden) each, None for zeros; where `episode_start` is
        true it counts as zero. Other policies hand it back unchanged. Always the deterministic action: that is what is
        quantized. Images may have their channels last; vectors may come in the place of `fields`. Raises InputError
        when `deterministic` is False or the observation has another shape than the policy's.
        """
        if not deterministic:
            raise InputError("a quantized policy only has its deterministic action; call predict(deterministic=True)")
        obs = self._array(observation)
        if len(self.obs_shape) == 3 and obs.shape[-3:] == (*self.obs_shape[1:], self.obs_shape[0]) != self.obs_shape:
            obs = np.moveaxis(obs, -1, -3)
        single = obs.shape == self.obs_shape
        if not single and obs.shape[1:] != self.obs_shape:
            raise InputError(f"observation of shape {obs.shape} given to a policy for shape {self.obs_shape}")
        x = torch.as_tensor(obs[None] if single else obs)
        with torch.inference_mode():
            if self.recurrent:
                out, after = self.step(x, self._states(state, episode_start, len(x)))
                state = tuple(s.numpy() for s in after)
            else:
                out = self(x)
        actions = self.head.actions(out.numpy())
        return (actions[0] if single else actions), state

    def _array(self, observation: Any) -> np.ndarray:
        """The observation as one array; of `fields` a vector or a batch of them."""
        if not self.fields:
            return np.asarray(observation)
        if not isinstance(observation, dict):
            obs = np.asarray(observation)
            if obs.shape[-1:] == self.obs_shape and obs.shape[-1:] != self.fields[0].shape:
                return obs
        keys = [f.key for f in self.fields]
        if keys != [""] and (not isinstance(observation, dict) or set(keys) - set(observation)):
            raise InputError(f"the policy takes a dictionary with {', '.join(keys)}")
        given = {f.key: np.asarray(observation[f.key] if f.key else observation) for f in self.fields}
        wrong = next((f for f in self.fields if f.shape not in (given[f.key].shape, given[f.key].shape[1:])), None)
        if wrong is not None:
            at = f"observation {wrong.key!r}" if wrong.key else "observation"
            raise InputError(f"{at} of shape {given[wrong.key].shape} given to a policy for shape {wrong.shape}")
        if all(given[f.key].shape == f.shape for f in self.fields):
            return to_vectors(self.fields, {key: value[None] for key, value in given.items()})[0]
        return to_vectors(self.fields, given)

    def _states(self, state: tuple[np.ndarray, ...] | None, episode_start: np.ndarray | None, batch: int) -> States:
        """What SB3's caller keeps, as tensors; zero where an episode starts."""
        zero = self.start(batch)
        if state is None:
            return zero
        given = [torch.as_tensor(np.asarray(s, np.float32)) for s in state]
        if [s.shape for s in given] != [s.shape for s in zero]:
            shapes = [tuple(s.shape) for s in given]
            raise InputError(f"states of shapes {shapes} given; accepted: h and c of shape {tuple(zero[0].shape)}")
        if episode_start is not None:
            going = torch.as_tensor(~np.asarray(episode_start, bool).reshape(-1))
            given = [torch.where(going[None, :, None], s, torch.zeros(())) for s in given]
        return given[0], given[1]


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
ACTIVATION_NAMES: dict[type[nn.Module], str] = {cls: name for name, cls in _ACTIVATIONS.items()}


_OPTIONS = ("alpha", "negative_slope", "approximate")


def activation(name: str, **options: Any) -> nn.Module:
    """A fresh activation module by its lower-case name; InputError lists the known ones."""
    try:
        return _ACTIVATIONS[name](**options)
    except KeyError:
        raise InputError(f"unknown activation {name!r}; known: {', '.join(_ACTIVATIONS)}") from None


def describe(policy: Policy) -> dict[str, Any]:
    """JSON description of a policy's structure, quantized or not; `build` is its inverse (values of tensors aside)."""
    layers: list[dict[str, Any]] = []
    for name, module in policy.net.named_children():
        match module:
            case nn.Linear() | nn.Conv2d() | QLayer():
                entry = _describe_layer(module)
            case nn.Flatten():
                entry = {"op": "flatten"} | ({"from": module.start_dim} if module.start_dim != 1 else {})
            case Recurrent():
                entry = {"op": "lstm", "cells": [_describe_cell(cell) for cell in module.loop.cells]}  # type: ignore[arg-type]
            case nn.Hardtanh():
                entry = {"op": "hardtanh", "low": module.min_val, "high": module.max_val}
            case _ if type(module) in ACTIVATION_NAMES:
                options = {key: getattr(module, key) for key in _OPTIONS if hasattr(module, key)}
                entry = {"op": ACTIVATION_NAMES[type(module)], "options": options}
            case _:
                raise InputError(f"layer {name!r} ({type(module).__name__}) cannot be described")
        layers.append({"name": name, **entry})
    stage = {key: list(getattr(policy.stage, key).shape) for key in ("mean", "std", "low", "high")}
    facts = {"obs_shape": list(policy.obs_shape), "stage": stage, "layers": layers, "head": asdict(policy.head)}
    return facts | ({"fields": [asdict(field) for field in policy.fields]} if policy.fields else {})


def _describe_cell(cell: LSTMCell) -> dict[str, Any]:
    bias = [getattr(layer, "bias", None) is not None for layer in (cell.ih, cell.hh)]
    return {"in": int(cell.ih.weight.shape[1]), "hidden": cell.hidden, "bias": bias}


def _describe_layer(layer: nn.Linear | nn.Conv2d | QLayer) -> dict[str, Any]:
    out, inputs, *kernel = layer.weight.shape
    bias = layer.bias is not None
    if not kernel:
        return {"op": "linear", "in": inputs, "out": out, "bias": bias}
    groups = int(layer.groups)  # type: ignore[arg-type]
    entry: dict[str, Any] = {"op": "conv2d", "in": inputs * groups, "out": out, "kernel": kernel}
    entry |= {name: list(getattr(layer, name)) for name in ("stride", "padding", "dilation")}
    return entry | {"groups": groups, "bias": bias}


def _cell(entry: dict[str, Any]) -> LSTMCell:
    inputs, hidden = entry["in"], entry["hidden"]
    ih, hh = (nn.Linear(n, 4 * hidden, bias=b) for n, b in zip((inputs, hidden), entry["bias"], strict=True))
    return LSTMCell(ih, hh)


def build(description: dict[str, Any]) -> Policy:
    """A policy of the described structure; its tensors have the right shapes and no trained values."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for entry in description["layers"]:
        match entry["op"]:
            case "linear":
                module: nn.Module = nn.Linear(entry["in"], entry["out"], bias=entry["bias"])
            case "conv2d":
                module = nn.Conv2d(
                    entry["in"],
                    entry["out"],
                    tuple(entry["kernel"]),
                    tuple(entry["stride"]),
                    tuple(entry["padding"]),
                    tuple(entry["dilation"]),
                    groups=entry["groups"],
                    bias=entry["bias"],
                )
            case "flatten":
                module = nn.Flatten(entry.get("from", 1))
            case "lstm":
                module = Recurrent(Unrolled([_cell(cell) for cell in entry["cells"]], False, True))
            case "hardtanh":
                module = nn.Hardtanh(entry["low"], entry["high"])
            case op:
                module = activation(op, **entry["options"])
        modules[entry["name"]] = module
    head: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description["head"].items()}
    stage = InputStage(**{name: np.zeros(shape, np.float32) for name, shape in description["stage"].items()})
    fields = tuple(Field(f["key"], tuple(f["shape"]), tuple(f["sizes"])) for f in description.get("fields", []))
    return Policy(stage, nn.Sequential(modules), Head(**head), tuple(description["obs_shape"]), fields).eval()
