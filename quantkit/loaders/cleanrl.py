"""Loader of CleanRL agents: the `.cleanrl_model` files of ppo, ppo_continuous_action, dqn, ddpg, td3 and sac scripts.

Such a file is a bare state dict (of an actor and its critics, a tuple of them). It tells neither the environment, which
is looked for in the run's folder name, nor the statistics of observations that ppo_continuous_action normalized: they
are estimated from rollouts (https://github.com/vwxyzjn/cleanrl/issues/310), and `meta["normalizer"]` says so.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import InputError, one_line
from quantkit.files import sha256_of
from quantkit.loaders import zoo
from quantkit.loaders.chain import Part, Parts, check_chain, fold, make_chain
from quantkit.model import EnvSpec, Model, Normalization
from quantkit.policy import Head, InputStage, Policy
from quantkit.simulate import compile_policy

SUFFIX = ".cleanrl_model"
ACCEPTED = "files that ppo, ppo_continuous_action, dqn, ddpg, td3 and sac scripts save, on vectors or stacked images"
NORMALIZER_STEPS = 20_000
NORMALIZER_SEED = 0
CLIP = 10.0
"""ppo_continuous_action clips normalized observations to it."""
_EPSILON = 1e-8  # of gymnasium's NormalizeObservation
_RUN = re.compile(r"(?P<id>[\w/.:-]+?-v\d+)(?:__|-)\w+.*")  # ENV__script__seed__time, or ENV-script-seedN on the Hub


def sniff(path: Path) -> bool:
    """Whether `path` is a .cleanrl_model file or a folder with one."""
    return path.suffix == SUFFIX if path.is_file() else path.is_dir() and any(path.glob(f"*{SUFFIX}"))


def load(path: Path, *, env: EnvSpec | str | None = None, normalize: Normalization = "stage") -> Model:
    """The actor of a CleanRL file, or of the only one in a folder, as a Model whose module is a `Policy`.

    env: where it acts, if the folder's name does not tell. normalize: estimated statistics of observations as an input
    stage, folded into the first layer, or "none" for an agent that was trained without; only ppo_continuous_action
    has any. Raises InputError, one line naming the file and the cause.
    """
    file = _file_in(path)
    tensors, critics = _read(file)
    where = str(file)
    checkpoint = zoo.Checkpoint(file, trained_on=_env_in_name(file))
    parts = Parts(tensors, where)
    if parts.has("actor_mean"):
        return _box(file, parts, "ppo", checkpoint, env, normalize)
    if parts.has("fc_mu") or parts.has("fc_mean"):
        algo = "sac" if parts.has("fc_mean") else {1: "ddpg", 2: "td3"}.get(critics, "td3")
        return _box(file, parts, algo, checkpoint, env, normalize)
    if parts.has("actor") or parts.has("network"):
        return _discrete(file, parts, checkpoint, env)
    raise InputError(f"{where}: its tensors ({', '.join(list(tensors)[:3])}, ...) are no actor of CleanRL's {ACCEPTED}")


def _file_in(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        raise InputError(f"{path}: holds {len(found)} {SUFFIX} files; name one: {', '.join(f.name for f in found)}")
    return found[0]


def _env_in_name(file: Path) -> str | None:
    """The environment in the name of a run's folder, of a Hub repository, or of the Hub's cache above a snapshot."""
    folder = file.absolute().parent
    names = (folder.name, folder.parent.parent.name.rpartition("--")[2], file.stem)
    return next((found["id"] for name in names if (found := _RUN.fullmatch(name))), None)


def _read(path: Path) -> tuple[dict[str, Tensor], int]:
    """The actor's state dict, and how many state dicts of critics lie behind it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on files that are none of its own, such as flax's
        raise InputError(
            f"{path}: cannot be read as torch tensors ({one_line(error)}); files of *_jax scripts are not read"
        ) from None
    if isinstance(saved, dict) and "model_weights" in saved:
        raise InputError(f"{path}: C51's expectation over a softmax is not read; accepted: {ACCEPTED}")
    actor, *critics = saved if isinstance(saved, tuple | list) and saved else (saved,)
    if not isinstance(actor, dict) or not all(isinstance(v, Tensor) for v in actor.values()):
        raise InputError(f"{path}: holds a {type(saved).__name__}; accepted: {ACCEPTED}")
    return {str(name): tensor for name, tensor in actor.items()}, len(critics)


def _discrete(file: Path, parts: Parts, checkpoint: zoo.Checkpoint, env: EnvSpec | str | None) -> Model:
    """dqn and ppo: an output for each action."""
    where, convs, dense = str(file), list[Part](), list[Part]()
    algo = "ppo" if parts.has("actor") else "dqn"
    if parts.has("network.7"):  # three convolutions, Flatten, Linear; ppo_atari's actor is one Linear behind
        convs = [parts.get(f"network.{2 * i}", 4) for i in range(3)]
        dense = [parts.get("network.7", 2)]
        trunk, last = [], parts.get("actor" if algo == "ppo" else "network.9", 2)
    else:
        *trunk, last = parts.stack("actor" if algo == "ppo" else "network", 1)
    chain = [*dense, *trunk, last]
    spec, problem = zoo.env_spec(checkpoint, chain[0].shape[1], False, env)
    shape = (convs[0].shape[1], 84, 84) if convs else _shape_of(spec, chain[0].shape[1])
    check_chain(convs, chain, shape, last.shape[0], where)
    act = "tanh" if algo == "ppo" else "relu"
    net = make_chain(convs, dense, trunk, last, act, flatten=len(shape) != 1, limit=None)
    stage = InputStage(std=255.0) if convs else InputStage()
    policy = Policy(stage, net, Head("discrete", nvec=(last.shape[0],)), shape).eval()
    facts = {"type": "Discrete", "n": last.shape[0]}
    return _model(file, policy, algo, act, spec, problem, facts, {"mode": "none"}, image=bool(convs))


def _box(
    file: Path,
    parts: Parts,
    algo: str,
    checkpoint: zoo.Checkpoint,
    env: EnvSpec | str | None,
    normalize: Normalization,
) -> Model:
    """ppo_continuous_action: a mean, clipped to the environment's bounds; ddpg, td3, sac: tanh, scaled by their own."""
    where, squash = str(file), algo != "ppo"
    if squash:
        trunk = [parts.get(f"fc{i}", 2) for i in (1, 2)]
        last = parts.get("fc_mean" if algo == "sac" else "fc_mu", 2)
    else:
        *trunk, last = parts.stack("actor_mean", 1)
    inputs, outputs = [*trunk, last][0].shape[1], last.shape[0]
    spec, problem = zoo.env_spec(checkpoint, inputs, True, env)
    if squash:
        low, high = _own_bounds(parts, outputs)
    else:
        low, high = _bounds(spec, outputs, problem, where)
    shape, act = _shape_of(spec, inputs), "relu" if squash else "tanh"
    check_chain([], [*trunk, last], shape, outputs, where)
    net = make_chain([], [], trunk, last, act, flatten=len(shape) != 1, limit=None)
    policy = Policy(InputStage(), net, Head("box", low=low, high=high, squash=squash), shape).eval()
    normalizer: dict[str, Any] = {"mode": "none"}
    if not squash and normalize != "none":
        assert spec is not None  # its bounds were asked for
        noise = parts.tensor("actor_logstd", 2).exp().reshape(-1).numpy()
        mean, std = estimate_statistics(policy, spec, noise)
        if normalize == "stage":
            policy.stage = InputStage(mean, std, np.full_like(mean, -CLIP), np.full_like(mean, CLIP))
        else:
            fold(net, mean, std)
            policy.stage = InputStage(0.0, 1.0, mean - CLIP * std, mean + CLIP * std)
        how = f"estimated from {NORMALIZER_STEPS:,} steps in {spec.id}, as CleanRL does not save it"
        normalizer = {"mode": normalize, "source": None, "clip": CLIP, "estimated": how}
    facts = {"type": "Box", "shape": [outputs], "low": list(low), "high": list(high)}
    return _model(file, policy.eval(), algo, act, spec, problem, facts, normalizer, image=False)


def estimate_statistics(
    policy: Policy, spec: EnvSpec, noise: np.ndarray, steps: int = NORMALIZER_STEPS
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of an observation, float64, as gymnasium's NormalizeObservation finds them.

    The policy acts on observations normalized by what was seen so far, with Gaussian `noise` (actions,) on its
    outputs, as in training; seeded. They are not those of training, whose early policies went elsewhere.
    """
    env = _made(spec)
    if env.observation_space.shape != policy.obs_shape:
        given = env.observation_space.shape
        raise InputError(f"{spec.id} gives observations of shape {given}, the policy takes {policy.obs_shape}")
    act, rng = compile_policy(policy), np.random.default_rng(NORMALIZER_SEED)
    mean, squares, count = np.zeros(policy.obs_shape), np.zeros(policy.obs_shape), 0
    obs, _ = env.reset(seed=NORMALIZER_SEED)
    for _ in range(steps):
        count += 1
        gap = obs - mean
        mean = mean + gap / count
        squares = squares + gap * (obs - mean)
        std = np.sqrt((squares if count > 1 else np.ones_like(squares)) / count + _EPSILON)
        seen = np.clip((obs - mean) / std, -CLIP, CLIP).astype(np.float32)
        out = act(seen[None]) + (noise * rng.standard_normal(noise.shape)).astype(np.float32)
        obs, _, terminated, truncated, _ = env.step(policy.head.actions(out)[0])
        if terminated or truncated:
            obs, _ = env.reset()
    env.close()
    return mean, np.sqrt(squares / count + _EPSILON)


def _own_bounds(parts: Parts, outputs: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Low and high of actions `tanh(x) * action_scale + action_bias`; older scripts have one number for all."""
    found = []
    for name in ("action_scale", "action_bias"):
        value = parts.tensors.get(name)
        if value is None or value.numel() not in (1, outputs):
            raise InputError(
                f"{parts.where}: tensor {name!r} is missing, or not one number for each of {outputs} actions"
            )
        found.append(value.reshape(-1).double().expand(outputs))
    scale, bias = found
    low, high = (tuple(v.tolist()) for v in (bias - scale, bias + scale))
    if not all(map(math.isfinite, low + high)):
        raise InputError(f"{parts.where}: tensors 'action_scale' and 'action_bias' must be finite")
    return low, high


def _bounds(
    spec: EnvSpec | None, outputs: int, problem: str | None, where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Low and high of the environment's actions, which ppo_continuous_action clips to."""
    if spec is None:
        raise InputError(f"{where}: the bounds of its actions and its normalization are the environment's: {problem}")
    env = _made(spec)
    space = env.action_space
    env.close()
    if getattr(space, "low", None) is None or space.shape != (outputs,):
        raise InputError(f"{where}: gives {outputs} numbers; the actions of {spec.id} are {space}")
    return tuple(space.low.tolist()), tuple(space.high.tolist())


def _shape_of(spec: EnvSpec | None, inputs: int) -> tuple[int, ...]:
    """The environment's shape of an observation where its numbers are the network's inputs, else a vector."""
    if spec is not None:
        try:
            env = _made(spec)
        except InputError:
            return (inputs,)
        shape = tuple(env.observation_space.shape or ())
        env.close()
        if math.prod(shape) == inputs and shape:
            return shape
    return (inputs,)


def _made(spec: EnvSpec) -> Any:
    """The environment; InputError in one line whatever making it raises."""
    try:
        import gymnasium

        return gymnasium.make(spec.id, **spec.kwargs)
    except Exception as error:
        raise InputError(f"environment {spec.id!r} cannot be made ({one_line(error)})") from None


def _model(
    file: Path,
    policy: Policy,
    algo: str,
    act: str,
    spec: EnvSpec | None,
    problem: str | None,
    actions: dict[str, Any],
    normalizer: dict[str, Any],
    *,
    image: bool,
) -> Model:
    example = torch.stack([torch.zeros(policy.obs_shape), torch.ones(policy.obs_shape)])
    meta = {
        "kind": "policy",
        "algo": algo,
        "library": "cleanrl",
        "source": file.name,
        "sha256": sha256_of(file),
        "activation": act,
        "action_space": actions,
        "channels_first": image,
        "normalizer": normalizer,
        "trained_on": spec.trained_on if spec else None,
        "env_problem": problem,
    }
    return Model(policy, example.to(torch.uint8) if image else example, spec, meta)
