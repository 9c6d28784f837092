"""Where float rounding decides: values at the boundary of two grid values, actions whose best two are equal."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.policy import Head
from quantkit.qlayers import QLayer
from quantkit.rounding import round_to

ACTION_TOLERANCE = 1e-4
"""Continuous actions agree within this part of their range."""
BOUNDARY = 2.0**-19
"""A value is at a rounding boundary if moving it by this part of its layer's largest input rounds it elsewhere."""


def torch_outputs(module: nn.Module, inputs: np.ndarray) -> np.ndarray:
    """The module's outputs."""
    with torch.inference_mode():
        return module(torch.from_numpy(np.ascontiguousarray(inputs))).numpy()


def same_actions(head: Head, actions: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which rows have the same action, (n,); a continuous one within ACTION_TOLERANCE."""
    if head.kind != "box":
        return (actions == others).reshape(len(actions), -1).all(axis=1)
    span = np.asarray(head.high, np.float64) - np.asarray(head.low, np.float64)
    span = np.where(np.isfinite(span), span, np.abs(actions).max(initial=1.0))
    return (np.abs(actions.astype(np.float64) - others) <= ACTION_TOLERANCE * span).all(axis=1)


def near_tie(head: Head, out: np.ndarray, tolerance: float) -> np.ndarray:
    """Rows whose discrete action float rounding may decide: best two, or zero, within 2 tolerances."""
    tie = np.zeros(len(out), bool)
    if head.kind == "multibinary":
        tie = (np.abs(out) <= 2 * tolerance).any(axis=1)
    elif head.kind in ("discrete", "multidiscrete"):
        edges = np.cumsum((0, *head.nvec))
        for first, last in pairwise(edges.tolist()):
            if last - first > 1:
                top = np.sort(out[:, first:last], axis=1)[:, -2:]
                tie |= top[:, 1] - top[:, 0] <= 2 * tolerance
    return tie


def at_boundary(module: nn.Module, inputs: np.ndarray) -> np.ndarray:
    """Which inputs lead some quantizer to a value that a tiny move would round elsewhere."""
    found = np.zeros(len(inputs), bool)
    if not len(inputs):
        return found

    def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not isinstance(layer, QLayer) or layer.act is None:
            return
        x = arguments[0]
        if layer.in_scale is not None:
            x = x * layer.per_channel(layer.in_scale)
        u = x.flatten(1) / layer.act.scale
        move = BOUNDARY * u.abs().amax(dim=1, keepdim=True)
        differs = round_to(u + move, layer.act.fmt) != round_to(u - move, layer.act.fmt)
        found[:] |= differs.any(dim=1).numpy()

    handles = [m.register_forward_pre_hook(hook) for m in module.modules() if isinstance(m, QLayer)]
    try:
        torch_outputs(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
