"""Weights that a module computes anew in every forward: made plain once, as they never change again."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm


def copied(module: nn.Module) -> nn.Module:
    """A deep copy, also after a forward that left an old norm's tensor with its gradient."""
    for part, hook in _hooks(module):
        setattr(part, hook.name, getattr(part, hook.name).detach())
    return copy.deepcopy(module)


def merge(module: nn.Module) -> nn.Module:
    """Put plain tensors in the place of weight norms, spectral norms and other parametrizations; returns the module.

    Those of `torch.nn.utils.parametrize`, and the older hooks of `weight_norm` and `spectral_norm`. The module is in
    evaluation mode and gives the same outputs afterwards.
    """
    for part in list(module.modules()):
        if parametrize.is_parametrized(part):
            values = {name: getattr(part, name).detach() for name in part.parametrizations}  # type: ignore[union-attr]
            # not remove_parametrizations: it takes the names from a class that copies of the module share
            part.__class__ = parametrize.type_before_parametrizations(part)
            del part.parametrizations
            for name, value in values.items():
                part.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for part, hook in _hooks(module):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(part, hook.name)
        else:
            remove_spectral_norm(part, hook.name)
    return module


def _hooks(module: nn.Module) -> list[tuple[nn.Module, WeightNorm | SpectralNorm]]:
    return [
        (part, hook)
        for part in module.modules()
        for hook in part._forward_pre_hooks.values()
        if isinstance(hook, WeightNorm | SpectralNorm)
    ]
