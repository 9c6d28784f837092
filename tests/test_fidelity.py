"""Outputs and actions on states against torch and numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from quantkit.errors import InputError
from quantkit.policy import Head
from quantkit.tasks.fidelity import compare_on_states

LANDER = Head("discrete", nvec=(4,))


def test_agreement_of_discrete_heads():
    """Agreement counts equal actions, KL is torch's, and Q-values report differences and lost value instead."""
    rng = np.random.default_rng(1)
    a = rng.normal(size=(50, 4)).astype(np.float32)
    b = a + rng.normal(scale=0.7, size=a.shape).astype(np.float32)
    result = compare_on_states(a, b, LANDER)
    assert result["agreement"] == np.mean(a.argmax(1) == b.argmax(1)) and 0 < result["agreement"] < 1
    log_p, log_q = (torch.log_softmax(torch.from_numpy(z).double(), 1) for z in (a, b))
    kl = nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert result["kl"] == pytest.approx(float(kl))
    values = compare_on_states(a, b, LANDER, q_values=True)
    assert "kl" not in values and values["q_error"] == pytest.approx(np.abs(a - b).mean())
    lost = a.max(1) - a[np.arange(50), b.argmax(1)]
    assert values["q_regret"] == pytest.approx(lost.mean()) and values["q_regret"] > 0
    shifted = compare_on_states(a + 300, b - 900, LANDER)
    assert shifted["kl"] == pytest.approx(result["kl"], rel=1e-3)


def test_agreement_of_composite_heads():
    """Multidiscrete KL adds up over the parts; multibinary KL is that of independent coins."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 30, 5))
    joint = compare_on_states(a, b, Head("multidiscrete", nvec=(2, 3)))
    parts = [
        compare_on_states(a[:, :2], b[:, :2], Head("discrete", nvec=(2,))),
        compare_on_states(a[:, 2:], b[:, 2:], Head("discrete", nvec=(3,))),
    ]
    assert joint["kl"] == pytest.approx(parts[0]["kl"] + parts[1]["kl"])
    assert joint["agreement"] <= min(part["agreement"] for part in parts)
    p, q = (1 / (1 + np.exp(-z)) for z in (a, b))
    coins = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(axis=1).mean()
    assert compare_on_states(a, b, Head("multibinary", nvec=(1,) * 5))["kl"] == pytest.approx(coins)


def test_agreement_of_box_heads():
    """Action error is relative to the action range and measured after clipping."""
    head = Head("box", low=(-2.0, 0.0), high=(2.0, 10.0))
    a, b = np.array([[0.0, 5.0], [3.0, 5.0]]), np.array([[1.0, 5.0], [9.0, 7.0]])
    result = compare_on_states(a, b, head)
    assert result == pytest.approx({"action_error": (0.25 + 0.2) / 4, "action_error_max": 0.25})
    assert compare_on_states(a, a, head)["action_error_max"] == 0


def test_outputs_of_other_shapes_are_refused():
    """Outputs that do not belong together or to the head are input errors."""
    for a, b in itertools.permutations([np.zeros((3, 4)), np.zeros((3, 2)), np.zeros((0, 4))], 2):
        with pytest.raises(InputError, match="outputs"):
            compare_on_states(a, b, LANDER)
