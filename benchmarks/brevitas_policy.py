"""A policy's MLP in Brevitas layers, as a user of Brevitas would build it: the peer of the speed benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from brevitas.nn import QuantIdentity, QuantLinear
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat
from brevitas.quant.experimental.float_quant_ocp import Fp8e4m3OCPActPerTensorFloat, Fp8e4m3OCPWeightPerChannelFloat
from torch import Tensor, nn

from quantkit.policy import Policy


def brevitas_network(policy: Policy, calibration: Tensor, *, bits: int = 4, minifloat: bool = False) -> nn.Sequential:
    """The policy's network with input and weight quantizers on every Linear, calibrated, in eval mode.

    Integers of `bits`, or E4M3 where `minifloat` (the format for which Brevitas has a ready class).
    """
    modules: list[nn.Module] = []
    for module in policy.net.children():
        if not isinstance(module, nn.Linear):
            modules.append(module)
            continue
        options: dict[str, Any] = {} if minifloat else {"bit_width": bits}
        act_quant = Fp8e4m3OCPActPerTensorFloat if minifloat else Int8ActPerTensorFloat
        weight_quant = Fp8e4m3OCPWeightPerChannelFloat if minifloat else Int8WeightPerChannelFloat
        modules.append(QuantIdentity(act_quant=act_quant, return_quant_tensor=False, **options))
        weight_options = {f"weight_{key}": v for key, v in options.items()}
        linear = QuantLinear(
            module.in_features, module.out_features, bias=True, weight_quant=weight_quant, **weight_options
        )
        linear.load_state_dict(module.state_dict(), strict=False)
        modules.append(linear)
    network = nn.Sequential(*modules)
    network.train()
    with torch.no_grad():
        for batch in policy.stage(calibration).split(256):
            network(batch)
    return network.eval()


class BrevitasPolicy:
    """Stable-Baselines3's `predict` around a Brevitas network, one forward a call."""

    def __init__(self, policy: Policy, network: nn.Module) -> None:
        self.policy, self.network = policy, network

    def outputs(self, obs: np.ndarray) -> np.ndarray:
        """Network outputs (batch, outputs)."""
        with torch.no_grad():
            return self.network(self.policy.stage(torch.as_tensor(obs))).numpy()

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions for a batch of observations."""
        return self.policy.head.actions(self.outputs(obs))

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """As `stable_baselines3.common.base_class.BaseAlgorithm.predict`."""
        return self.act(observation), state
