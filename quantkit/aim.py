"""What a network is trained towards: the labels of states, and the loss of its outputs there.

The loss is that of `quantkit.losses`. Of a policy that acts, and whose checkpoint has Q-functions of squashed actions
(SAC, TD3, DDPG, TQC), it is, with a the float and a' the quantized action, e their error and Q the critic's value,

    0.3 e(a', a) + e(0.3) max(0, Q(s, a) - Q(s, a')) / (what a part moved by 0.3 costs on average, `critic.drops`)

for how much less a policy earns is the mean of such drops over the states that it visits itself (`quantkit.critic`):
few bits cannot imitate everywhere, so they are spent where it matters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantkit.batches import portion
from quantkit.critic import drops
from quantkit.losses import errors_of, loss_for
from quantkit.model import Model
from quantkit.policy import Policy

Label = Callable[[Tensor], Tensor]
"""States (n, ...) -> what the loss compares the outputs with, (n, numbers)."""
Aim = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(states, outputs, labels) -> loss per state (n,)."""


def aim(teacher: Model, inputs: Tensor, critic: nn.Module | None) -> tuple[Label, Aim, Tensor | None]:
    """What a state is labelled with, the loss of the outputs there, and the labels of `inputs`, the calibration set.

    Labels are the float outputs, and with a critic of squashed actions the value of the float action beside them; None
    where those of `inputs` are yet to be made.
    """
    module = teacher.module
    head = module.head if isinstance(module, Policy) else None
    outputs = torch.cat([module(x) for x in inputs.split(min(1024, portion(inputs)))])
    plain = loss_for(head, outputs)
    if critic is None or head is None or not head.squash:
        return module, lambda _x, y, t: plain(y, t), outputs
    judge = copy.deepcopy(critic).requires_grad_(False)
    parts = zip(inputs.split(1024), outputs.split(1024), strict=True)
    usual = torch.cat([drops(judge, x, torch.tanh(y)).clamp_min(0) for x, y in parts]).mean()
    if not bool(usual.isfinite() & (usual > 0)):
        return module, lambda _x, y, t: plain(y, t), outputs
    errors, n = errors_of(head), head.outputs
    moved = torch.atanh(torch.full((1, 1), 0.3))
    worth = float(errors(moved, torch.zeros(1, 1)).sum() / usual)

    def label(x: Tensor) -> Tensor:
        y = module(x)
        return torch.cat([y, judge(x, torch.tanh(y))[:, None]], dim=1)

    def loss(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        lost = (t[:, n] - judge(x, torch.tanh(y))).clamp_min(0)
        return 0.3 * errors(y, t[:, :n]).sum(dim=1) + worth * lost

    return label, loss, None
