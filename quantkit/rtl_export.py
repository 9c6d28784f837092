"""From a quantized policy to the integers that `hwmodel.emit` turns into Verilog, and the host's float part.

Between two layers the float pipeline of `quantkit.simulate` (scale, bias, activation, factor, division,
rounding) is a step function of the integer sum. `thresholds` finds every step by binary search with
that very float32 arithmetic, so the hardware's codes equal the simulator's, whatever the activation, if
only it ascends; where the sums are few enough to try all of them, that is proved by trying them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from hwmodel.affine import solved
from hwmodel.cost import HwError
from hwmodel.formats import Format, bits, levels, unit
from hwmodel.gru import INDEX, Gru
from hwmodel.network import Layer, Network
from quantkit.bands import Bands
from quantkit.errors import InputError
from quantkit.model import Model
from quantkit.policy import ACTIVATION_NAMES, Head, InputStage, Policy
from quantkit.qlayers import QLayer
from quantkit.qtensor import encode
from quantkit.recurrent import GRUCell
from quantkit.rounding import rounder
from quantkit.simulate import compile_policy
from quantkit.specs import layer_specs

Step = Callable[[np.ndarray], np.ndarray]

ENUMERATED = 1 << 23
"""Sums of one layer up to which thresholds are proved by trying every one."""
FACTOR_BITS = 9
"""Bits, one more or less, of the factors that bring the sums of a GRU to one scale."""
NEAR = 32
"""Sums tried on both sides of each threshold where there are more."""


@dataclass(frozen=True)
class Host:
    """The float part of a policy on hardware: observations to input codes, sums to network outputs and actions."""

    before: Step
    after: Step
    head: Head

    def codes(self, obs: np.ndarray) -> np.ndarray:
        """Input codes (n, inputs) int64 of raw observations (n, *obs_shape)."""
        return self.before(obs)

    def outputs(self, sums: np.ndarray) -> np.ndarray:
        """Network outputs (n, outputs) float32 of the hardware's sums, as `compile_policy` gives them."""
        return self.after(sums)

    def actions(self, sums: np.ndarray) -> np.ndarray:
        """Environment actions of the hardware's sums."""
        return self.head.actions(self.after(sums))


def network_of(model: Model) -> tuple[Network, Host]:
    """The integers of a quantized MLP or linear policy; InputError names the layer that has none."""
    policy = model.module
    if not isinstance(policy, Policy):
        raise InputError("this network is not a policy; hardware is written for chains of linear layers")
    modules = list(policy.net.named_children())
    places = [i for i, (_, m) in enumerate(modules) if isinstance(m, QLayer | nn.Linear | nn.Conv2d)]
    if not places:
        raise InputError("this policy has no layers")
    for i in places:
        _check_layer(*modules[i])
    specs = {spec.name: spec for spec in layer_specs(model)}
    parts = [[m for _, m in modules[a + 1 : b]] for a, b in pairwise([*places, len(modules)])]
    qlayers = [modules[i][1] for i in places]
    layers = []
    try:
        for n, (i, layer) in enumerate(zip(places, qlayers, strict=True)):
            assert isinstance(layer, QLayer) and layer.q is not None
            spec = specs[f"net.{modules[i][0]}"]
            if any(type(m) not in (*ACTIVATION_NAMES, nn.Hardtanh, nn.Identity, nn.Flatten) for m in parts[n]):
                spec = replace(spec, activation="other")
            codes = layer.q.codes.numpy().astype(np.int64)
            plain = Layer(_last(spec), codes, None)
            if n + 1 == len(places):
                layers.append(plain)
                continue
            following = qlayers[n + 1]
            assert isinstance(following, QLayer)
            table = thresholds(_to_values(layer, parts[n], following), plain, _act(following))
            layers.append(Layer(spec, codes, table.astype(object), _line(layer, following)))
        network = solved(Network(tuple(layers), _facts(policy, qlayers[0], qlayers[-1], parts[-1])))
    except HwError as error:
        raise InputError(str(error)) from None
    before = _host_input(policy, [m for _, m in modules[: places[0]]], qlayers[0])
    return network, Host(before, _to_outputs(qlayers[-1], parts[-1]), policy.head)


def gru_of(cell: GRUCell) -> tuple[Gru, Step]:
    """The integers of a quantized GRU cell, and inputs (n, inputs) float32 to the integers that it reads.

    Differs from `GRUCell` in what follows the products: fixed point and tables (`hwmodel.gru`), and a state in steps of
    2^-(B-1), where the simulator has a scale of its own. InputError for a side in float.
    """
    ih, hh = cell.ih, cell.hh
    for name, layer in (("ih", ih), ("hh", hh)):
        _check_layer(f"gru.{name}", layer)
    assert isinstance(ih, QLayer) and isinstance(hh, QLayer) and ih.q is not None and hh.q is not None
    state = _act(hh)
    hidden = cell.hidden
    biases = [layer.bias.detach().numpy().astype(np.float64) for layer in (ih, hh)]
    gains = [np.broadcast_to(np.asarray(layer.kernel().gain, np.float64), biases[0].shape) for layer in (ih, hh)]
    steps = [_step(ih), _step(hh) / hh.act.scale / unit(state) * 2.0 ** (1 - bits(state))]  # type: ignore[union-attr]
    offsets = np.concatenate([(biases[0] + biases[1])[: 2 * hidden], biases[0][2 * hidden :], biases[1][2 * hidden :]])
    assert ih.uniform is not None and hh.uniform is not None
    if ih.uniform.fmt != hh.uniform.fmt or hh.in_scale is not None:
        raise InputError("a GRU in hardware has one format of weights and no factors on its state")
    x_codes, h_codes = (layer.q.codes.numpy().astype(np.int64) for layer in (ih, hh))  # type: ignore[union-attr]
    slopes = [gain * step for gain, step in zip(gains, steps, strict=True)]
    fraction = max(INDEX, FACTOR_BITS - int(np.floor(np.log2(min(float(np.median(s)) for s in slopes)))))
    x_factors, h_factors, fixed = (np.rint(v * 2.0**fraction).astype(np.int64) for v in (*slopes, offsets))
    try:
        found = Gru(ih.uniform.fmt, _act(ih), state, x_codes, h_codes, x_factors, h_factors, fixed, fraction)  # type: ignore[arg-type]
    except HwError as error:
        raise InputError(str(error)) from None
    values, smallest = _to_input(ih), unit(_act(ih))
    return found, lambda x: np.rint(values(np.asarray(x, np.float32)) / smallest).astype(np.int64)


def _check_layer(name: str, layer: nn.Module) -> None:
    if not isinstance(layer, QLayer) or layer.q is None or layer.act is None:
        raise InputError(f"layer net.{name} is in float; hardware needs quantized weights and inputs in every layer")
    if isinstance(layer.q, Bands):
        raise InputError(f"layer net.{name} has columns of 4 bits and of 1 bit; hardware needs one format of weights")
    if layer.op != "linear":
        raise InputError(f"layer net.{name} is a convolution; hardware is written for linear layers only, so far")


def _act(layer: QLayer) -> Format:
    assert layer.act is not None
    return layer.act.fmt


def _last(spec: Any) -> Any:
    return replace(spec, out=None)


def _step(layer: QLayer) -> float:
    assert layer.uniform is not None
    return unit(layer.uniform.fmt) * unit(_act(layer))


def _scaled(layer: QLayer) -> Step:
    """Integer sums (n, rows) to the layer's float32 outputs, as `simulate` computes them."""
    step, gain = _step(layer), np.asarray(layer.kernel().gain, np.float32)
    bias = layer.bias.detach().numpy().copy()

    def run(sums: np.ndarray) -> np.ndarray:
        y = (sums.astype(np.float64) * step).astype(np.float32)
        np.multiply(y, gain, y)
        return np.add(y, bias, y)

    return run


def _line(layer: QLayer, following: QLayer) -> np.ndarray:
    """Gain and bias that a sum meets before the activation, and the value of one step behind it: float64 (rows, 3)."""
    assert following.act is not None
    gain = _step(layer) * np.asarray(layer.kernel().gain, np.float64)
    bias = layer.bias.detach().numpy().astype(np.float64)
    factor = 1.0 if following.in_scale is None else following.in_scale.detach().numpy().astype(np.float64)
    step = following.act.scale * unit(_act(following)) / factor
    return np.stack([np.broadcast_to(column, bias.shape) for column in (gain, bias, step)], axis=1)


def _between(modules: list[nn.Module]) -> Step:
    """The activations between two layers, exactly as the simulator runs them."""
    return compile_policy(Policy(InputStage(), nn.Sequential(*modules), Head("box"), ()))


def _to_input(layer: QLayer) -> Step:
    """Float inputs of a layer to its grid values."""
    assert layer.act is not None
    divisor, rounded = np.array(layer.act.scale, np.float32), rounder(layer.act.fmt)
    factor = None if layer.in_scale is None else layer.in_scale.detach().numpy().copy()

    def run(x: np.ndarray) -> np.ndarray:
        x = x if factor is None else x * factor
        return rounded(np.divide(x, divisor))

    return run


def _to_values(layer: QLayer, modules: list[nn.Module], following: QLayer) -> Step:
    """Integer sums (n, rows) of a layer to the grid values of the next one's input."""
    scaled, between, rounded = _scaled(layer), _between(modules), _to_input(following)
    return lambda sums: rounded(between(scaled(sums)))


def _to_outputs(layer: nn.Module, modules: list[nn.Module]) -> Step:
    assert isinstance(layer, QLayer)
    scaled, between = _scaled(layer), _between(modules)
    return lambda sums: between(scaled(sums))


def _host_input(policy: Policy, modules: list[nn.Module], layer: nn.Module) -> Step:
    assert isinstance(layer, QLayer)
    fmt = _act(layer)
    stage = compile_policy(Policy(policy.stage, nn.Sequential(*modules), policy.head, policy.obs_shape))
    values = _to_input(layer)
    return lambda obs: encode(torch.from_numpy(np.ascontiguousarray(values(stage(obs)))), fmt).numpy().astype(np.int64)


def thresholds(values: Step, layer: Layer, out: Format) -> np.ndarray:
    """For each row and each level but the last, the smallest sum whose value lies above it: int64 (rows, levels - 1).

    values: sums (n, rows) to grid values of `out`. A level that no sum exceeds gets the row's largest sum
    plus one. InputError if the function falls anywhere it was tried.
    """
    grid = np.array(levels(out), np.float32)
    low, high = (bound.astype(np.int64) for bound in layer.sum_range)
    wanted = np.arange(1, len(grid))[:, None]

    def ranks(sums: np.ndarray) -> np.ndarray:
        return np.searchsorted(grid, values(sums))

    left = np.broadcast_to(low, (len(grid) - 1, len(low))).copy()
    right = np.broadcast_to(high + 1, left.shape).copy()
    while (left < right).any():
        middle = left + (right - left) // 2
        above = ranks(np.minimum(middle, high)) >= wanted
        open_ = left < right
        right = np.where(open_ & above, middle, right)
        left = np.where(open_ & ~above, middle + 1, left)
    table = left.T
    wrong = _disproof(ranks, table, low, high)
    if wrong is not None:
        row, total = wrong
        raise InputError(
            f"layer {layer.spec.name}: behind its {layer.spec.activation} the next code does not ascend with the sum "
            f"(row {row}, near sum {total}), so thresholds cannot hold it; relu, tanh, hardtanh and leaky_relu ascend, "
            "sigmoid and elu too unless sums are so fine that rounding noise of float32 shows"
        )
    return table


def _disproof(ranks: Step, table: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[int, int] | None:
    """A row and a sum where counting thresholds gives another rank; None where there is no such sum.

    Every sum is tried, or, if they are too many, those near the thresholds and a grid.
    """
    width = int((high - low).max()) + 1
    if width * len(low) <= ENUMERATED:
        pieces = [low + np.arange(a, min(a + 4096, width))[:, None] for a in range(0, width, 4096)]
    else:
        near = table.T[:, None, :] + np.arange(-NEAR, NEAR)[None, :, None]
        spread = low + np.linspace(0, 1, 4096)[:, None] * (high - low)
        pieces = [near.reshape(-1, len(low)), spread.astype(np.int64)]
    for piece in pieces:
        sums = np.clip(piece, low, high)
        want = ranks(sums)
        counted = [np.searchsorted(row, column, side="right") for row, column in zip(table, sums.T, strict=True)]
        different = np.argwhere(np.stack(counted, axis=1) != want)
        if len(different):
            at, row = map(int, different[0])
            return row, int(sums[at, row])
    return None


def _facts(policy: Policy, first: nn.Module, last: nn.Module, tail: list[nn.Module]) -> dict[str, Any]:
    """What the host computes, in JSON."""
    assert isinstance(first, QLayer) and isinstance(last, QLayer) and first.act is not None
    stage = {key: getattr(policy.stage, key).tolist() for key in ("mean", "std", "low", "high")}
    gain = np.broadcast_to(np.asarray(last.kernel().gain, np.float32), last.bias.shape)
    return {
        "stage": {key: _finite(value) for key, value in stage.items()},
        "in_factor": None if first.in_scale is None else first.in_scale.tolist(),
        "in_scale": first.act.scale,
        "in_format": str(first.act.fmt),
        "step": _step(last),
        "gain": gain.tolist(),
        "bias": last.bias.detach().numpy().tolist(),
        "after": [str(module) for module in tail],
        "head": asdict(policy.head),
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity: text instead."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value if np.isfinite(value) else str(value)
