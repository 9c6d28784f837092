"""A policy as the toolkit sees it: input stage -> network -> head.

The input stage is float arithmetic on raw observations (normalization, image scaling), the
network is a chain of layers that quantization acts on, and the head turns network outputs
into environment actions (argmax, tanh squashing, clipping, rescaling). A `Policy` can be
described by plain JSON values and rebuilt from them, so that a quantized directory needs
nothing of the checkpoint it came from.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.errors import InputError
from quantkit.qlayers import QLayer


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
        x = x.to(torch.float32)
        scales, clips = self._flags()
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


class Policy(nn.Module):
    """An actor: raw observations (batch, *obs_shape) -> network outputs (batch, head.outputs)."""

    def __init__(self, stage: InputStage, net: nn.Sequential, head: Head, obs_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.stage = stage
        self.net = net
        self.head = head
        self.obs_shape = tuple(obs_shape)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(self.stage(obs))

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Stable-Baselines3's `predict`: actions for one observation or a batch, and the state unchanged.

        Always the deterministic action: that is what is quantized. Images may have their channels
        last. Raises InputError when `deterministic` is False or the observation has another shape
        than the policy's.
        """
        if not deterministic:
            raise InputError("a quantized policy only has its deterministic action; call predict(deterministic=True)")
        obs = np.asarray(observation)
        if len(self.obs_shape) == 3 and obs.shape[-3:] == (*self.obs_shape[1:], self.obs_shape[0]) != self.obs_shape:
            obs = np.moveaxis(obs, -1, -3)
        single = obs.shape == self.obs_shape
        if not single and obs.shape[1:] != self.obs_shape:
            raise InputError(f"observation of shape {obs.shape} given to a policy for shape {self.obs_shape}")
        with torch.inference_mode():
            out = self(torch.as_tensor(obs[None] if single else obs)).numpy()
        actions = self.head.actions(out)
        return (actions[0] if single else actions), state


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
                entry = {"op": "flatten"}
            case nn.Hardtanh():
                entry = {"op": "hardtanh", "low": module.min_val, "high": module.max_val}
            case _ if type(module) in ACTIVATION_NAMES:
                options = {key: getattr(module, key) for key in _OPTIONS if hasattr(module, key)}
                entry = {"op": ACTIVATION_NAMES[type(module)], "options": options}
            case _:
                raise InputError(f"layer {name!r} ({type(module).__name__}) cannot be described")
        layers.append({"name": name, **entry})
    stage = {key: list(getattr(policy.stage, key).shape) for key in ("mean", "std", "low", "high")}
    return {"obs_shape": list(policy.obs_shape), "stage": stage, "layers": layers, "head": asdict(policy.head)}


def _describe_layer(layer: nn.Linear | nn.Conv2d | QLayer) -> dict[str, Any]:
    out, inputs, *kernel = layer.weight.shape
    bias = layer.bias is not None
    if not kernel:
        return {"op": "linear", "in": inputs, "out": out, "bias": bias}
    groups = int(layer.groups)  # type: ignore[arg-type]
    entry: dict[str, Any] = {"op": "conv2d", "in": inputs * groups, "out": out, "kernel": kernel}
    entry |= {name: list(getattr(layer, name)) for name in ("stride", "padding", "dilation")}
    return entry | {"groups": groups, "bias": bias}


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
                module = nn.Flatten()
            case "hardtanh":
                module = nn.Hardtanh(entry["low"], entry["high"])
            case op:
                module = activation(op, **entry["options"])
        modules[entry["name"]] = module
    head: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description["head"].items()}
    stage = InputStage(**{name: np.zeros(shape, np.float32) for name, shape in description["stage"].items()})
    return Policy(stage, nn.Sequential(modules), Head(**head), tuple(description["obs_shape"])).eval()
