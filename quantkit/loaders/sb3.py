"""Loader of Stable-Baselines3 agents: zips and rl-zoo folders of what `ACCEPTED` names.

Only data is read: the zip's JSON fields, tensors with `weights_only=True`, vecnormalize.pkl by an
opcode reader, YAML without tags. Only the actor and its deterministic action are kept, and the Q-functions of an agent
that has them beside (SAC, TD3, DDPG, TQC).
"""

from __future__ import annotations

import copy
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit.critic import Critic
from quantkit.errors import InputError, one_line
from quantkit.loaders import zoo
from quantkit.loaders.chain import fold
from quantkit.loaders.sb3_actor import build_actor, build_critics
from quantkit.loaders.sb3_archive import Archive, read_archive
from quantkit.loaders.sb3_spaces import Space, read_space
from quantkit.loaders.vecnormalize import Normalizer, read_normalizer
from quantkit.model import EnvSpec, Model, Normalization
from quantkit.policy import Field, Head, InputStage, Policy

ACCEPTED = (
    "PPO, MaskablePPO, A2C, TRPO, DQN, QR-DQN, SAC, TD3, DDPG or TQC with MlpPolicy, CnnPolicy or MultiInputPolicy; "
    "RecurrentPPO with MlpLstmPolicy or MultiInputLstmPolicy; ARS or CrossQ with MlpPolicy"
)

# Module and class of a policy -> algorithm; on-policy ones share a class, and DDPG is TD3's.
_POLICIES = {
    "stable_baselines3.common.policies": (
        "on-policy",
        ("ActorCriticPolicy", "ActorCriticCnnPolicy", "MultiInputActorCriticPolicy"),
    ),
    "stable_baselines3.dqn.policies": ("dqn", ("DQNPolicy", "CnnPolicy", "MultiInputPolicy")),
    "stable_baselines3.sac.policies": ("sac", ("SACPolicy", "CnnPolicy", "MultiInputPolicy")),
    "stable_baselines3.td3.policies": ("td3", ("TD3Policy", "CnnPolicy", "MultiInputPolicy")),
    "sb3_contrib.qrdqn.policies": ("qrdqn", ("QRDQNPolicy", "CnnPolicy", "MultiInputPolicy")),
    "sb3_contrib.tqc.policies": ("tqc", ("TQCPolicy", "CnnPolicy", "MultiInputPolicy")),
    "sb3_contrib.ars.policies": ("ars", ("ARSPolicy", "ARSLinearPolicy")),
    "sb3_contrib.crossq.policies": ("crossq", ("CrossQPolicy",)),
    "sb3_contrib.common.maskable.policies": (
        "maskableppo",
        ("MaskableActorCriticPolicy", "MaskableActorCriticCnnPolicy", "MaskableMultiInputActorCriticPolicy"),
    ),
    "sb3_contrib.common.recurrent.policies": (
        "recurrentppo",
        ("RecurrentActorCriticPolicy", "RecurrentMultiInputActorCriticPolicy"),
    ),
}
_VECTORS = ("Dict", "Discrete", "MultiDiscrete", "MultiBinary")
_EXTRACTORS = ("FlattenExtractor", "NatureCNN", "CombinedExtractor")
SEQUENCE = 32
"""Steps in time of the sequences that a recurrent policy is calibrated on, or its episodes' limit if that is less."""


def sniff(path: Path) -> bool:
    """Whether `path` is an SB3 zip (by suffix or by members) or a folder with one."""
    if path.is_dir():
        return zoo.is_zoo_folder(path)
    if path.suffix == ".zip":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return {"data", "policy.pth"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError):
        return False


def load(path: Path, *, env: EnvSpec | str | None = None, normalize: Normalization = "stage") -> Model:
    """The actor of an SB3 zip or rl-zoo folder as a Model whose module is a `Policy`.

    env: overrides the environment's id (an EnvSpec: everything about it). normalize: VecNormalize as
    an input stage, or folded into the first layer with the clip on raw observations.
    `Model.env` is None where no environment of today fits; `meta["env_problem"]` then says why.
    Raises InputError, one line naming the file and the cause.
    """
    if normalize not in ("stage", "fold"):
        raise InputError(f"{path}: normalize={normalize!r}; expected 'stage' or 'fold'")
    checkpoint = zoo.locate(path)
    archive = read_archive(checkpoint.zip)
    where = str(checkpoint.zip)
    kwargs = _policy_kwargs(archive, where)
    algo, policy_class = _algorithm(archive, kwargs, checkpoint.algo, where)
    kwargs["linear"] = policy_class == "ARSLinearPolicy"
    obs, act = (read_space(archive.data, key, where) for key in ("observation_space", "action_space"))
    fields, obs_shape = _observed(obs, where)
    env_spec, problem = zoo.env_spec(checkpoint, math.prod(obs_shape), act.kind == "Box", env)

    outputs = _outputs(act, where)
    actor = build_actor(algo, archive.tensors, kwargs, obs_shape, outputs, act.kind == "Box", where)
    head = _head(act, actor.squash, env_spec, where)
    normalizer = read_normalizer(checkpoint.vecnormalize, fields) if checkpoint.vecnormalize else None
    stage = InputStage(std=255.0) if obs.is_image and kwargs.get("normalize_images", True) else InputStage()
    of_critic = stage
    if normalizer is not None:
        _check_normalizer(normalizer, obs_shape, stage, str(checkpoint.vecnormalize))
        of_critic = _normalized(normalizer, "stage", actor.net)
        stage = _normalized(normalizer, normalize, actor.net)
    if unseen := zoo.unseen(checkpoint):
        _hide(stage, unseen, obs_shape, where)
    policy = Policy(stage, actor.net, head, obs_shape, fields).eval()

    critics = build_critics(archive.tensors, actor.activation, math.prod(obs_shape) + outputs, where)

    example = torch.stack([torch.zeros(obs_shape), torch.ones(obs_shape)])
    if policy.recurrent:
        limit = zoo.episode_limit(env_spec.id) if env_spec else None
        example = example.unsqueeze(1).repeat_interleave(min(SEQUENCE, limit or SEQUENCE), dim=1)
    example = example.to(torch.uint8) if obs.is_image and normalizer is None else example
    return Model(
        policy,
        example,
        env_spec,
        {
            "kind": "policy",
            "algo": algo,
            "source": checkpoint.zip.name,
            "sha256": archive.sha256,
            "sb3_version": archive.version,
            "policy_class": policy_class,
            "activation": actor.activation,
            "use_sde": bool(archive.data.get("use_sde", False)),
            "observation_space": obs.facts(),
            "action_space": act.facts(),
            "channels_first": bool(obs.is_image and int(np.argmin(obs_shape)) == 0),
            "normalizer": {"mode": "none"}
            if normalizer is None or checkpoint.vecnormalize is None
            else {
                "mode": normalize,
                "source": checkpoint.vecnormalize.name,
                "sha256": normalizer.sha256,
                "clip": normalizer.clip if math.isfinite(normalizer.clip) else None,
            },
            "unseen": list(unseen),
            "time_feature": env_spec.time_feature if env_spec else None,
            "pad_obs": env_spec.pad_obs if env_spec else None,
            "trained_on": checkpoint.trained_on,
            "env_problem": problem,
        },
        Critic(copy.deepcopy(of_critic), critics).requires_grad_(False).eval() if critics else None,
    )


def _policy_kwargs(archive: Archive, where: str) -> dict[str, Any]:
    kwargs = archive.data.get("policy_kwargs")
    if not isinstance(kwargs, dict):
        raise InputError(f"{where}: member 'data' has no readable policy_kwargs, so the activation cannot be known")
    extractor = kwargs.get("features_extractor_class")
    if extractor is not None:
        match = re.fullmatch(r"<class 'stable_baselines3\.common\.torch_layers\.(\w+)'>", str(extractor))
        if not match or match[1] not in _EXTRACTORS:
            known = ", ".join(_EXTRACTORS)
            raise InputError(f"{where}: features extractor {str(extractor)[:80]!r} cannot be read; known: {known}")
    return dict(kwargs)


def _algorithm(archive: Archive, kwargs: dict[str, Any], folder: str | None, where: str) -> tuple[str, str]:
    """Algorithm and policy class, by the class's module and by the fields only one algorithm has."""
    fields = archive.data.get("policy_class")
    fields = fields if isinstance(fields, dict) else {}
    module = str(fields.get("__module__", "?"))
    match = re.match(r"<function (\w+)\.__init__ at", str(fields.get("__init__")))
    name = match[1] if match else "?"
    algo, classes = _POLICIES.get(module, ("", ()))
    if name not in classes:
        raise InputError(f"{where}: policy class {module[:80]}.{name[:80]} cannot be read; accepted: {ACCEPTED}")
    if algo == "on-policy":
        data = archive.data
        algo = "trpo" if "cg_max_steps" in data else "ppo" if "clip_range" in data else "a2c"
    if algo == "td3" and (folder == "ddpg" or (kwargs.get("n_critics") == 1 and archive.data.get("policy_delay") == 1)):
        algo = "ddpg"
    return algo, name


def _observed(space: Space, where: str) -> tuple[tuple[Field, ...], tuple[int, ...]]:
    """How an observation becomes a vector, () where it is an array already, and the policy's obs_shape."""
    if space.kind in ("Box", "MultiBinary") and space.shape:
        return (), space.shape
    parts = space.spaces if space.kind == "Dict" else (("", space),)
    images = [key for key, part in parts if part.is_image]
    if images:
        raise InputError(f"{where}: image {images[0]!r} in a Dict cannot be read; accepted under its keys: vectors")
    if not all(part.nvec or part.shape is not None for _, part in parts) or space.kind not in _VECTORS:
        raise InputError(
            f"{where}: observation space {space.kind} cannot be read; accepted: Box with a shape, {', '.join(_VECTORS)}"
        )
    fields = tuple(Field(key, part.shape or (), part.nvec) for key, part in parts)
    return fields, (sum(field.width for field in fields),)


def _outputs(space: Space, where: str) -> int:
    """How many numbers the actor gives for an action space; InputError for the spaces that are not read."""
    if space.kind == "Box" and space.shape is not None and len(space.shape) == 1:
        return space.shape[0]
    if space.nvec and not (space.kind == "MultiDiscrete" and space.shape is not None and len(space.shape) > 1):
        return sum(space.nvec)
    raise InputError(
        f"{where}: action space {space.kind} of shape {space.shape} cannot be read;"
        " accepted: Box of one dimension, Discrete, MultiDiscrete, MultiBinary"
    )


def _head(space: Space, squash: bool, env: EnvSpec | None, where: str) -> Head:
    """How the network's outputs become actions of `space`. Bounds numpy did not print come from the environment."""
    kinds = {"Discrete": "discrete", "MultiDiscrete": "multidiscrete", "MultiBinary": "multibinary"}
    if space.kind in kinds:
        return Head(kinds[space.kind], nvec=space.nvec)  # type: ignore[arg-type]  # SB3 never adds `start`
    low, high = space.low, space.high
    if low is None or high is None:
        low, high = _bounds_of(env, space.shape or (), where)
    if any(math.isnan(a) or math.isnan(b) or a > b for a, b in zip(low, high, strict=True)):
        raise InputError(f"{where}: action bounds low {low[:4]} and high {high[:4]} are no interval")
    if squash and not all(map(math.isfinite, low + high)):
        raise InputError(f"{where}: squashed actions need finite bounds, not low {low[:4]} and high {high[:4]}")
    return Head("box", low=low, high=high, squash=squash)


def _bounds_of(env: EnvSpec | None, shape: tuple[int, ...], where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    cause = "no environment is known"
    if env is not None:
        try:
            import gymnasium

            made = gymnasium.make(env.id, **env.kwargs)
            box = made.action_space
            made.close()
            if isinstance(box, gymnasium.spaces.Box) and box.shape == shape:
                return tuple(box.low.tolist()), tuple(box.high.tolist())
            cause = f"{env.id} has actions {box}"
        except Exception as error:  # whatever making an environment raises, the bounds stay unknown
            cause = f"{env.id}: {one_line(error, 80)}"
    raise InputError(f"{where}: the bounds of its {shape[0]} actions are not printed in full, and {cause}; give env=")


def _check_normalizer(normalizer: Normalizer, obs_shape: tuple[int, ...], stage: InputStage, where: str) -> None:
    if normalizer.mean.shape != obs_shape:
        raise InputError(
            f"{where}: normalizes observations of shape {normalizer.mean.shape}; the policy takes {obs_shape}"
        )
    if stage.scales:
        raise InputError(
            f"{where}: normalizes images that the policy divides by 255 as well; expected normalize_images=False"
        )


def _hide(stage: InputStage, unseen: tuple[int, ...], obs_shape: tuple[int, ...], where: str) -> None:
    """Make the stage give what it gives for zero, whatever these numbers of the observation are, in place."""
    if len(obs_shape) != 1 or max(unseen) >= obs_shape[0]:
        raise InputError(
            f"{where}: trained without the velocities {unseen}; observations of shape {obs_shape} are others"
        )
    rows = list(unseen)
    found = stage(torch.zeros(obs_shape))[rows]
    for name in ("low", "high"):
        bound = getattr(stage, name).expand(obs_shape).clone()
        bound[rows] = found
        setattr(stage, name, bound)


def _normalized(normalizer: Normalizer, mode: str, net: torch.nn.Sequential) -> InputStage:
    """The stage that normalizes; with "fold", the first layer of `net` does, and the stage clips raw observations."""
    mean, std = normalizer.mean, normalizer.std
    clip = np.where(normalizer.alone, np.inf, normalizer.clip)
    if mode == "stage":
        return InputStage(mean, std, np.full_like(mean, -clip), np.full_like(mean, clip))
    fold(net, mean, std)
    return InputStage(0.0, 1.0, mean - clip * std, mean + clip * std)
