"""How far a quantized policy's outputs and actions are from the float ones, state by state."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import numpy as np

from quantkit.errors import InputError
from quantkit.policy import Head


def compare_on_states(
    out_float: np.ndarray, out_quant: np.ndarray, head: Head, *, q_values: bool = False
) -> dict[str, float]:
    """How far quantized outputs (states, outputs) are from float ones on the same states.

    Discrete heads: `agreement` (fraction of states with the same action, all parts of a
    multidiscrete one) and `kl`, the mean of KL(float || quantized) in nats of the action
    distributions (summed over parts). With `q_values` the outputs are values of actions, not
    logits, and instead of `kl` come `q_error` (mean |difference|), `q_error_max` and `q_regret`
    (mean float value lost by taking the quantized action). Box heads: `action_error`, the mean
    |action difference| over the action range (high - low; over 1 where it is unbounded), and
    `action_error_max`.
    """
    a, b = np.asarray(out_float, np.float64), np.asarray(out_quant, np.float64)
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] != head.outputs or a.shape[0] == 0:
        raise InputError(f"outputs must both have shape (states, {head.outputs}), got {a.shape} and {b.shape}")
    acts_a, acts_b = head.actions(np.asarray(out_float)), head.actions(np.asarray(out_quant))
    if head.kind == "box":
        span = np.asarray(head.high, np.float64) - np.asarray(head.low, np.float64)
        error = np.abs(acts_a.astype(np.float64) - acts_b) / np.where(np.isfinite(span), span, 1.0)
        return {"action_error": float(error.mean()), "action_error_max": float(error.max())}
    same = acts_a == acts_b
    result = {"agreement": float((same if same.ndim == 1 else same.all(axis=1)).mean())}
    if q_values:
        if head.kind != "discrete":
            raise InputError(f"Q-values need a discrete head, not {head.kind}")
        error = np.abs(a - b)
        rows = np.arange(a.shape[0])
        regret = a[rows, acts_a - head.start] - a[rows, acts_b - head.start]
        return result | {
            "q_error": float(error.mean()),
            "q_error_max": float(error.max()),
            "q_regret": float(regret.mean()),
        }
    if head.kind == "multibinary":  # each output z is the two logits (0, z)
        a, b = (np.stack([np.zeros_like(z), z], axis=2) for z in (a, b))
        divergence = _kl(a, b).sum(axis=1)
    else:
        edges = np.cumsum((0, *head.nvec))
        parts = [_kl(a[:, i:j], b[:, i:j]) for i, j in pairwise(edges)]
        divergence = np.sum(parts, axis=0)
    return result | {"kl": float(divergence.mean())}


def _kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KL(softmax(a) || softmax(b)) along the last axis."""
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    return cast(np.ndarray, np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0.0))


def _log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max(axis=-1, keepdims=True)
    return cast(np.ndarray, shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
