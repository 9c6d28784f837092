"""Gymnasium environments from an `EnvSpec`, with the inputs the policy was trained on.

gymnasium is imported inside the functions: a session without it can use the rest of the toolkit.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from quantkit.errors import InputError
from quantkit.model import EnvSpec
from quantkit.policy import Field, Head, Policy, to_vectors

if TYPE_CHECKING:
    import gymnasium

_INSTALL = 'pip install "quantkit[rl]"'
_NO_OPS = ("TimeLimit", "OrderEnforcing", "PassiveEnvChecker")


def make_env(spec: EnvSpec) -> gymnasium.Env[Any, Any]:
    """The environment as the policy sees it: `gymnasium.make`, zeros appended, time feature appended.

    `pad_obs` counts the numbers before the time feature: an environment of 27 numbers with
    `pad_obs=111` and a time feature gives 27 numbers, 84 zeros and `1 - t / time_feature`
    (1.0 after reset, as SB3-contrib's and the zoo's TimeFeatureWrapper). Raises InputError when
    the id is unknown, a package is missing or the environment refuses its kwargs.
    """
    env = open_env(spec)
    if spec.pad_obs is None and spec.time_feature is None:
        return env
    import gymnasium

    size = input_shape(env, spec)[0]
    space = cast(Any, env.observation_space)
    bounds = np.zeros((2, size), np.float32)
    bounds[:, : space.shape[0]] = space.low, space.high
    if spec.time_feature is not None:
        bounds[1, -1] = 1.0

    class Inputs(gymnasium.Wrapper[Any, Any, Any, Any]):
        """Appends what `EnvSpec` asks for."""

        def __init__(self) -> None:
            super().__init__(env)
            self.observation_space = gymnasium.spaces.Box(bounds[0], bounds[1], dtype=np.float32)
            self.elapsed = 0

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            self.elapsed = 0
            obs, info = self.env.reset(seed=seed, options=options)
            return self.extended(obs), info

        def step(self, action: Any) -> Any:
            self.elapsed += 1
            obs, *rest = self.env.step(action)
            return self.extended(obs), *rest

        def extended(self, obs: np.ndarray) -> np.ndarray:
            out = np.zeros(size, np.float32)
            out[: obs.size] = obs
            if spec.time_feature is not None:
                out[-1] = 1 - self.elapsed / spec.time_feature
            return out

    return Inputs()


def open_env(spec: EnvSpec) -> gymnasium.Env[Any, Any]:
    """`gymnasium.make` without the passive checker and without warnings; raises InputError as `make_env`.

    Images come channels first, and dictionaries, integers and bits as vectors, as Stable-Baselines3 gives them to its
    policies.
    """
    try:
        import gymnasium
    except ImportError:
        raise InputError(f"environments need gymnasium: {_INSTALL}") from None
    if spec.id.startswith("ALE/") or "NoFrameskip" in spec.id:
        _register_atari(spec.id)
    with _quiet(spec.id):
        try:
            return _as_vectors(_channels_first(gymnasium.make(spec.id, **{**spec.kwargs, "disable_env_checker": True})))
        except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv) as error:
            raise InputError(f"unknown environment {spec.id!r}{_nearest(spec.id)}: {_line(error)}") from None
        except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
            message = f"environment {spec.id!r} cannot be imported ({_line(error)}){_nearest(spec.id)}; {_INSTALL}"
            raise InputError(message) from None
        except (gymnasium.error.Error, TypeError, ValueError, AssertionError) as error:
            raise InputError(f"environment {spec.id!r} refuses {spec.kwargs or 'its id'}: {_line(error)}") from None


def _channels_first(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """The environment, with uint8 images of (height, width, channels) turned to (channels, height, width)."""
    from gymnasium import spaces, wrappers

    space = env.observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 3 or space.dtype != np.uint8:
        return env
    if int(np.argmin(space.shape)) != 2:  # the rule of stable_baselines3's is_image_space_channels_first
        return env
    turned = spaces.Box(space.low.transpose(2, 0, 1), space.high.transpose(2, 0, 1), dtype=np.uint8)
    return wrappers.TransformObservation(env, lambda image: np.transpose(image, (2, 0, 1)), turned)


def refuse_masks(spec: EnvSpec) -> None:
    """InputError if the environment masks actions, as agents of MaskablePPO were trained with."""
    env: Any = open_env(spec)
    masked = env.has_wrapper_attr("action_masks")
    env.close()
    if masked:
        raise InputError(
            f"environment {spec.id!r} masks actions (action_masks), which is not done in episodes here; accepted for "
            "MaskablePPO: environments without masks"
        )


def fields_of(space: Any) -> tuple[Field, ...]:
    """How observations of a gymnasium space become vectors; () of arrays, and of spaces that do not.

    >>> import gymnasium
    >>> fields_of(gymnasium.spaces.Discrete(4))
    (Field(key='', shape=(), sizes=(4,)),)
    """
    from gymnasium import spaces

    match space:
        case spaces.Discrete():
            return (Field("", (), (int(space.n),)),)
        case spaces.MultiDiscrete() if space.nvec.ndim == 1:
            return (Field("", (len(space.nvec),), tuple(int(n) for n in space.nvec)),)
        case spaces.Dict():
            parts = [(key, fields_of(part) or _numbers(part)) for key, part in space.spaces.items()]
            if all(len(found) == 1 and not found[0].key for _, found in parts):
                return tuple(Field(key, found[0].shape, found[0].sizes) for key, found in parts)
    return ()


def _numbers(space: Any) -> tuple[Field, ...]:
    from gymnasium import spaces

    return (Field("", tuple(space.shape)),) if isinstance(space, spaces.Box | spaces.MultiBinary) else ()


def _as_vectors(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """The environment with float32 vectors where it gives dictionaries, integers or bits; `fields` says of what."""
    from gymnasium import spaces, wrappers

    space: Any = env.observation_space
    if isinstance(space, spaces.MultiBinary):
        bits = spaces.Box(0, 1, space.shape, np.float32)
        return wrappers.TransformObservation(env, lambda x: np.asarray(x, np.float32), bits)
    fields = fields_of(space)
    if not fields:
        return env

    def vector(observation: Any) -> np.ndarray:
        given = {f.key: np.asarray(observation[f.key] if f.key else observation)[None] for f in fields}
        found: np.ndarray = to_vectors(fields, given)[0]
        return found

    vectors = spaces.Box(-np.inf, np.inf, (sum(f.width for f in fields),), np.float32)
    found = wrappers.TransformObservation(env, vector, vectors)
    found.fields = fields  # type: ignore[attr-defined]
    return found


def bare_env(spec: EnvSpec) -> tuple[gymnasium.Env[Any, Any], int | None]:
    """A fresh environment without the wrappers that do nothing to a correct caller, and its time limit.

    TimeLimit, OrderEnforcing and PassiveEnvChecker are taken off from the outside inwards; the
    first wrapper of another kind stays, with everything below it. The caller truncates after the
    returned number of steps (None: no limit was taken off).
    """
    env: Any = open_env(spec)
    from gymnasium import wrappers

    known = tuple(getattr(wrappers, name) for name in _NO_OPS)
    limit: int | None = None
    while type(env) in known:
        if isinstance(env, wrappers.TimeLimit):
            steps = int(env._max_episode_steps)
            limit = steps if limit is None else min(limit, steps)
        env = env.env
    return env, limit


def input_shape(env: gymnasium.Env[Any, Any], spec: EnvSpec) -> tuple[int, ...]:
    """Shape of one policy input: the observation of `env` plus what `spec` appends to it."""
    from gymnasium import spaces

    space = env.observation_space
    if not isinstance(space, spaces.Box):
        wanted = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict of these"
        raise InputError(f"environment {spec.id!r} has observations {space}; accepted: {wanted}")
    shape = tuple(space.shape)
    if spec.pad_obs is None and spec.time_feature is None:
        return shape
    if len(shape) != 1:
        raise InputError(f"environment {spec.id!r}: pad_obs and time_feature need flat observations, got shape {shape}")
    if spec.pad_obs is not None and spec.pad_obs < shape[0]:
        raise InputError(f"environment {spec.id!r} gives {shape[0]} numbers, more than pad_obs={spec.pad_obs}")
    return ((spec.pad_obs or shape[0]) + (spec.time_feature is not None),)


def check_fits(env: gymnasium.Env[Any, Any], policy: Policy) -> None:
    """Raise InputError unless observations of `env` (from `make_env`) and its actions are the policy's."""
    name = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
    given, wanted = env.observation_space.shape, policy.obs_shape
    parts = _fields_under(env)
    if policy.fields and parts and parts != policy.fields:
        raise InputError(f"environment {name!r} gives {_said(parts)}, the policy takes {_said(policy.fields)}")
    if given != wanted:
        raise InputError(f"environment {name!r} gives observations of shape {given}, the policy takes {wanted}")
    given_actions, wanted_actions = _describe_space(env.action_space), _describe_head(policy.head)
    if given_actions != wanted_actions:
        raise InputError(f"environment {name!r} takes {given_actions}, the policy gives {wanted_actions}")
    if policy.head.kind == "box":
        space = cast(Any, env.action_space)
        low, high = np.asarray(policy.head.low, np.float32), np.asarray(policy.head.high, np.float32)
        if (low < space.low.ravel()).any() or (high > space.high.ravel()).any():
            raise InputError(
                f"environment {name!r} takes actions in [{space.low.min()}, {space.high.max()}], "
                f"the policy gives [{low.min()}, {high.max()}]"
            )


def _fields_under(env: Any) -> tuple[Field, ...]:
    """What the vectors of a made environment are made of, () where it gave arrays."""
    while env is not env.unwrapped:
        if "fields" in vars(env):
            found: tuple[Field, ...] = env.fields
            return found
        env = env.env
    return ()


def _said(fields: tuple[Field, ...]) -> str:
    return ", ".join(f"{f.key or 'integers'} {f.sizes or f.shape}" for f in fields)


def _describe_space(space: Any) -> str:
    from gymnasium import spaces

    match space:
        case spaces.Discrete():
            return f"{space.n} discrete actions from {space.start}"
        case spaces.MultiDiscrete():
            return f"discrete actions {tuple(int(n) for n in space.nvec.ravel())}"
        case spaces.MultiBinary():
            return f"{int(np.prod(space.shape))} binary actions"
        case spaces.Box():
            return f"{int(np.prod(space.shape))} continuous actions"
    return str(space)


def _describe_head(head: Head) -> str:
    match head.kind:
        case "discrete":
            return f"{head.outputs} discrete actions from {head.start}"
        case "multidiscrete":
            return f"discrete actions {tuple(int(n) for n in head.nvec)}"
        case "multibinary":
            return f"{head.outputs} binary actions"
        case "box":
            return f"{head.outputs} continuous actions"


def _nearest(env_id: str) -> str:
    """'; nearest: ...' among the ids that can be made here: other versions first, then similar names."""
    from gymnasium.envs.registration import registry

    usable = [name for name, spec in registry.items() if isinstance(spec.entry_point, str)]
    stem = env_id.rpartition("-v")[0] or env_id
    names = sorted((name for name in usable if name.rpartition("-v")[0].lower() == stem.lower()), reverse=True)
    if not names:
        lower = {name.lower(): name for name in usable}
        names = [lower[name] for name in difflib.get_close_matches(env_id.lower(), lower, n=3, cutoff=0.6)]
    return f"; nearest: {', '.join(names)}" if names else ""


def _register_atari(env_id: str) -> None:
    import gymnasium

    try:
        gymnasium.register_envs(importlib.import_module("ale_py"))
    except ImportError:
        raise InputError(f'environment {env_id!r} needs the Atari emulator: pip install "ale-py"') from None


@contextlib.contextmanager
def _quiet(env_id: str) -> Iterator[None]:
    """No notes about newer versions, and none of MuJoCo's, which also writes MUJOCO_LOG.TXT, while making."""
    import gymnasium

    known = gymnasium.registry.get(env_id)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if known is not None and "mujoco" in str(known.entry_point):
            with contextlib.suppress(ImportError, AttributeError):  # `make` reports what is missing
                mujoco = importlib.import_module("mujoco")
                stack.callback(mujoco.set_mju_user_warning, mujoco.get_mju_user_warning())
                mujoco.set_mju_user_warning(lambda message: None)
        yield


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
