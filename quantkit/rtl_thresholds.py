"""The float32 arithmetic from a layer's integer sums to the next one's codes, and the thresholds that stand for it.

Between two layers the float pipeline of `quantkit.simulate` (scale, bias, activation, factor, division,
rounding) is a step function of the integer sum. `thresholds` finds every step by binary search with
that very float32 arithmetic, so the hardware's codes equal the simulator's, whatever the activation, if
only it ascends; where the sums are few enough to try all of them, that is proved by trying them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from hwmodel.formats import Format, levels, unit
from hwmodel.network import Layer
from quantkit.bands import Bands
from quantkit.errors import InputError
from quantkit.policy import Head, InputStage, Policy
from quantkit.qlayers import Point, QLayer
from quantkit.rounding import rounder
from quantkit.simulate import compile_policy

Step = Callable[[np.ndarray], np.ndarray]

ENUMERATED = 1 << 23
"""Sums of one layer up to which thresholds are proved by trying every one."""
NEAR = 32
"""Sums tried on both sides of each threshold where there are more."""


def quantized_layer(name: str, layer: nn.Module) -> QLayer:
    """The layer itself; InputError where its sums are no integers of one format of weights."""
    if not isinstance(layer, QLayer) or layer.q is None or layer.act is None:
        raise InputError(f"layer {name} is in float; hardware needs quantized weights and inputs in every layer")
    if isinstance(layer.q, Bands):
        raise InputError(f"layer {name} has columns of 4 bits and of 1 bit; hardware needs one format of weights")
    return layer


def act_format(layer: QLayer | Point) -> Format:
    """The format of the codes that a layer reads, or that leave a point."""
    assert layer.act is not None
    return layer.act.fmt


def sum_step(layer: QLayer) -> float:
    """What one of a layer's sums counts, before its gain."""
    assert layer.uniform is not None
    return unit(layer.uniform.fmt) * unit(act_format(layer))


def scaling(layer: QLayer) -> Step:
    """Integer sums (n, rows) to the layer's float32 outputs, as `simulate` computes them."""
    step, gain = sum_step(layer), np.asarray(layer.kernel().gain, np.float32)
    bias = layer.bias.detach().numpy().copy()

    def run(sums: np.ndarray) -> np.ndarray:
        y = (sums.astype(np.float64) * step).astype(np.float32)
        np.multiply(y, gain, y)
        return np.add(y, bias, y)

    return run


def line_of(layer: QLayer, following: QLayer | Point) -> np.ndarray:
    """Gain and bias that a sum meets before the activation, and the value of one step behind it: float64 (rows, 3)."""
    assert following.act is not None
    gain = sum_step(layer) * np.asarray(layer.kernel().gain, np.float64)
    bias = layer.bias.detach().numpy().astype(np.float64)
    factor = 1.0 if following.in_scale is None else following.in_scale.detach().numpy().astype(np.float64)
    step = following.act.scale * unit(act_format(following)) / factor
    return np.stack([np.broadcast_to(column, bias.shape) for column in (gain, bias, step)], axis=1)


def activating(modules: list[nn.Module]) -> Step:
    """The activations between two layers, exactly as the simulator runs them."""
    return compile_policy(Policy(InputStage(), nn.Sequential(*modules), Head("box"), ()))


def quantizing(layer: QLayer | Point) -> Step:
    """Float inputs of a layer to its grid values."""
    assert layer.act is not None
    divisor, rounded = np.array(layer.act.scale, np.float32), rounder(layer.act.fmt)
    factor = None if layer.in_scale is None else layer.in_scale.detach().numpy().copy()

    def run(x: np.ndarray) -> np.ndarray:
        x = x if factor is None else x * factor
        return rounded(np.divide(x, divisor))

    return run


def requantizing(layer: QLayer, modules: list[nn.Module], following: QLayer | Point) -> Step:
    """Integer sums (n, rows) of a layer to the grid values of the next one's input."""
    scaled, between, rounded = scaling(layer), activating(modules), quantizing(following)
    return lambda sums: rounded(between(scaled(sums)))


def input_facts(layer: QLayer) -> dict[str, Any]:
    """What `quantizing` does, in JSON."""
    assert layer.act is not None
    return {
        "in_factor": None if layer.in_scale is None else layer.in_scale.tolist(),
        "in_scale": layer.act.scale,
        "in_format": str(act_format(layer)),
    }


def output_facts(layer: QLayer) -> dict[str, Any]:
    """What `scaling` does, in JSON."""
    gain = np.broadcast_to(np.asarray(layer.kernel().gain, np.float32), layer.bias.shape)
    return {"step": sum_step(layer), "gain": gain.tolist(), "bias": layer.bias.tolist()}


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
