"""The actor inside an SB3 state dict: which tensors each algorithm makes it of, put together as a chain."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantkit.errors import InputError
from quantkit.loaders.chain import Part, Parts, check_chain, make_chain, make_linear
from quantkit.policy import Recurrent
from quantkit.recurrent import Cell, LSTMCell, Unrolled

_ON_POLICY = ("ppo", "a2c", "trpo", "maskableppo", "recurrentppo")
_ACTIVATIONS = {
    "ReLU": "relu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "ELU": "elu",
    "LeakyReLU": "leaky_relu",
    "GELU": "gelu",
    "SiLU": "silu",
}


@dataclass(frozen=True)
class Actor:
    """net: the chain from observation to outputs. squash: whether tanh follows. activation: its name in the trunk."""

    net: nn.Sequential
    squash: bool
    activation: str


def build_actor(
    algo: str,
    tensors: dict[str, Tensor],
    kwargs: dict[str, Any],
    obs_shape: tuple[int, ...],
    outputs: int,
    box: bool,
    where: str,
) -> Actor:
    """The actor of `algo` from a policy's state dict and its readable policy_kwargs.

    outputs: how many numbers the action space needs; box: whether its actions are continuous.
    Raises InputError naming the tensor that is missing, not finite or does not fit the layer before it.
    """
    parts = Parts(tensors, where)
    act = _activation_name(kwargs, "tanh" if algo in _ON_POLICY else "relu", where)
    features = next((p for p in _feature_prefixes(algo) if parts.has(f"{p}.cnn")), None)
    convs = [parts.get(f"{features}.cnn.{2 * i}", 4) for i in range(3)] if features else []
    dense = [parts.get(f"{features}.linear.0", 2)] if features else []
    linear_ars = algo == "ars" and kwargs.get("linear", False)
    bias = bool(kwargs.get("with_bias", not linear_ars)) if algo == "ars" else True
    depth = _depth(kwargs.get("net_arch"), linear_ars, features is not None)
    limit: float | None = None
    match algo:
        case _ if algo in _ON_POLICY:
            trunk = parts.stack("mlp_extractor.shared_net", 0) + parts.stack("mlp_extractor.policy_net", 0)
            parts.expect(trunk, depth, "mlp_extractor.policy_net")
            last, squash = parts.get("action_net", 2), bool(kwargs.get("squash_output", False))
        case "sac" | "tqc":
            trunk = parts.stack("actor.latent_pi", 0)
            parts.expect(trunk, depth, "actor.latent_pi")
            clipped = parts.has("actor.mu.0")  # gSDE with clip_mean: Sequential(Linear, Hardtanh)
            last, squash = parts.get("actor.mu.0" if clipped else "actor.mu", 2), True
            limit = _positive(kwargs.get("clip_mean", 2.0), where) if clipped else None
        case "crossq":
            clipped = parts.has("actor.mu.0")
            trunk, last = _renormalized(parts, "actor.mu.0" if clipped else "actor.mu", kwargs)
            parts.expect(trunk, depth, "actor.latent_pi")
            squash, limit = True, _positive(kwargs.get("clip_mean", 2.0), where) if clipped else None
        case _:
            stem = {"dqn": "q_net.q_net", "qrdqn": "quantile_net.quantile_net", "ars": "action_net"}.get(
                algo, "actor.mu"
            )
            # in older sb3-contrib, ARSLinearPolicy's network was one bare Linear
            bare = linear_ars and "action_net.weight" in tensors
            stack = [parts.get(stem, 2, bias)] if bare else parts.stack(stem, 1, bias)
            parts.expect(stack[:-1], depth, stem)
            trunk, last = stack[:-1], stack[-1]
            squash = algo in ("td3", "ddpg") or (algo == "ars" and bool(kwargs.get("squash_output", not linear_ars)))
    if algo == "qrdqn":
        last = _mean_over_quantiles(last, outputs, where)
    lstm = _lstm(parts, kwargs, where) if algo == "recurrentppo" else []
    if any(".extractors." in name for name in tensors):
        raise InputError(f"{where}: its features extractor has a CNN for a key of a Dict; accepted: keys with vectors")
    shape = obs_shape
    for ih, hh in lstm:
        check_chain([], [ih], shape, len(ih.weight), where)
        check_chain([], [hh], (hh.shape[1],), 4 * hh.shape[1], where)
        if ih.shape[0] != hh.shape[0]:
            raise InputError(f"{where}: {ih.name} {ih.shape} and {hh.name} {hh.shape} are not of one LSTM")
        shape = (hh.shape[1],)
    check_chain(convs, dense + trunk + [last], shape, outputs, where)
    net = make_chain(convs, dense, trunk, last, act, flatten=len(obs_shape) != 1, limit=limit)
    if lstm:
        net = _with_lstm(net, lstm)
    return Actor(net, squash and box, act)


def build_critics(tensors: dict[str, Tensor], act: str, inputs: int, where: str) -> list[nn.Module]:
    """The Q-functions critic.qf0, critic.qf1, ... of an actor whose activation is `act`, (n, inputs) -> (n, values).

    None of them where one is not a chain of finite Linear layers that takes `inputs` numbers, as beside a NatureCNN:
    a policy is one without.
    """
    parts, nets = Parts(tensors, where), list[nn.Module]()
    try:
        while parts.has(f"critic.qf{len(nets)}"):
            *trunk, last = parts.stack(f"critic.qf{len(nets)}", 1)
            check_chain([], [*trunk, last], (inputs,), len(last.weight), where)
            nets.append(make_chain([], [], trunk, last, act, flatten=False, limit=None))
    except InputError:
        return []
    return nets


def _lstm(parts: Parts, kwargs: dict[str, Any], where: str) -> list[tuple[Part, Part]]:
    """The products with the input and with the state of each layer of `lstm_actor`, one behind another."""
    options = kwargs.get("lstm_kwargs") or {}
    odd = [
        key for key in ("batch_first", "bidirectional", "proj_size") if isinstance(options, dict) and options.get(key)
    ]
    names = {name.removeprefix("lstm_actor.") for name in parts.tensors if name.startswith("lstm_actor.")}
    known = {f"{kind}_{side}_l{k}" for kind in ("weight", "bias") for side in ("ih", "hh") for k in range(len(names))}
    odd += sorted(names - known)
    if odd:
        raise InputError(f"{where}: an LSTM with {odd[0]} cannot be read; accepted: layers forwards in time")
    found = []
    for k in range(max(1, sum(name.startswith("weight_ih") for name in names))):
        sides = []
        for side in ("ih", "hh"):
            bias = parts.tensor(f"lstm_actor.bias_{side}_l{k}", 1) if f"bias_{side}_l{k}" in names else None
            name = f"lstm_actor.weight_{side}_l{k}"
            sides.append(Part(name, parts.tensor(name, 2), bias))
        found.append((sides[0], sides[1]))
    return found


def _with_lstm(net: nn.Sequential, lstm: list[tuple[Part, Part]]) -> nn.Sequential:
    """The network over sequences (batch, time, ...), its LSTM where the features are."""
    cells: list[Cell] = [LSTMCell(make_linear(ih), make_linear(hh)) for ih, hh in lstm]
    modules = OrderedDict(net.named_children())
    flat = modules.pop("flatten", None)
    first = {} if flat is None else {"flatten": nn.Flatten(2)}
    return nn.Sequential(OrderedDict({**first, "lstm": Recurrent(Unrolled(cells, False, True)), **modules}))


def _renormalized(parts: Parts, last: str, kwargs: dict[str, Any]) -> tuple[list[Part], Part]:
    """Trunk and last layer of CrossQ's actor, the BatchRenorm before each folded into it, as it is in evaluation."""
    indices = sorted({int(m[1]) for name in parts.tensors if (m := re.match(r"actor\.latent_pi\.(\d+)\.", name))})
    epsilon = _positive(kwargs.get("batch_norm_eps", 0.001), parts.where, "batch_norm_eps")
    trunk: list[Part] = []
    norm: str | None = None
    for name in [*(f"actor.latent_pi.{i}" for i in indices), last]:
        if f"{name}.ra_mean" in parts.tensors:
            norm = name
            continue
        part = parts.get(name, 2)
        if norm is not None:
            mean, var, scale, bias = (parts.tensor(f"{norm}.{t}", 1) for t in ("ra_mean", "ra_var", "scale", "bias"))
            if {len(t) for t in (mean, var, scale, bias)} != {part.shape[1]} or bool((var < 0).any()):
                raise InputError(f"{parts.where}: {norm} does not fit {name}.weight {part.shape}")
            gain = scale.double() / (var.double() + epsilon).sqrt()
            weight, shift = part.weight.double(), bias.double() - mean.double() * gain
            assert part.bias is not None
            part = Part(name, weight * gain, part.bias.double() + weight @ shift)
        trunk.append(part)
        norm = None
    return trunk[:-1], trunk[-1]


def _feature_prefixes(algo: str) -> tuple[str, ...]:
    own = {"dqn": "q_net", "qrdqn": "quantile_net"}.get(algo, "actor")
    first = "pi_features_extractor" if algo in _ON_POLICY else f"{own}.features_extractor"
    return first, "features_extractor"


def _activation_name(kwargs: dict[str, Any], default: str, where: str) -> str:
    """The trunk's activation from text such as "<class 'torch.nn.modules.activation.ReLU'>"."""
    text = kwargs.get("activation_fn")
    if text is None:
        return default
    match = re.fullmatch(r"<class 'torch\.nn\.modules\.activation\.(\w+)'>", str(text))
    if not match or match[1] not in _ACTIVATIONS:
        raise InputError(f"{where}: activation_fn {str(text)[:80]!r} is not known; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[match[1]]


def _depth(net_arch: Any, linear: bool, cnn: bool) -> tuple[int, ...]:
    """How many hidden layers the actor may have by net_arch; () where that cannot be told."""
    if linear:
        return (0,)
    if net_arch is None:
        return (0, 2) if cnn else (2,)  # SB3's defaults differ between versions in width only
    if isinstance(net_arch, dict):
        net_arch = [net_arch]
    if not isinstance(net_arch, list):
        return ()
    widths = 0
    for entry in net_arch:
        own = entry.get("pi") or [] if isinstance(entry, dict) else [entry]
        widths += len(own) if isinstance(own, list) else 1
    return (widths,)


def _positive(value: Any, where: str, name: str = "clip_mean") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{where}: {name} {str(value)[:40]!r} is not a positive number")
    return float(value)


def _mean_over_quantiles(part: Part, actions: int, where: str) -> Part:
    """The mean over quantiles is linear, so it goes into the last layer: (quantiles * actions, in) -> (actions, in)."""
    if len(part.weight) % actions or part.bias is None:
        raise InputError(f"{where}: {part.name}.weight {part.shape} does not give quantiles of {actions} actions")
    weight = part.weight.double().reshape(-1, actions, part.shape[1]).mean(dim=0)
    return Part(part.name, weight, part.bias.double().reshape(-1, actions).mean(dim=0))
