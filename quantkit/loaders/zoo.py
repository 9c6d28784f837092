"""The rl-zoo folder layout, its YAML files, and old environment ids in today's names.

    <algo>/<Env>_<n>/<Env>.zip, best_model.zip, <Env>/{args.yml, config.yml, vecnormalize.pkl}

The YAML carries Python tags and texts that the zoo evaluates; here tags are ignored and texts
are parsed as literals, so nothing in them runs.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from quantkit.errors import InputError, one_line
from quantkit.model import EnvSpec

_SETTINGS = ("args.yml", "config.yml", "vecnormalize.pkl")
_ALGOS = "a2c|ppo_lstm|ppo_mask|ppo|crossq|trpo|dqn|qrdqn|ars|sac|td3|ddpg|tqc"
_ENV_IN_NAME = re.compile(rf"(?:(?:{_ALGOS})[-_])?(?P<id>(?:[A-Za-z0-9.]+[/:-])*[A-Za-z0-9.]+-v\d+)(?:[_-].*)?", re.I)

# Old id -> today's id and arguments. Same observations, actions and (nearly) dynamics.
_MUJOCO = (
    "Ant HalfCheetah Hopper Humanoid HumanoidStandup InvertedDoublePendulum InvertedPendulum Reacher Swimmer Walker2d"
)
RENAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "LunarLander-v2": ("LunarLander-v3", {}),
    "LunarLanderContinuous-v2": ("LunarLander-v3", {"continuous": True}),
    "LunarLanderContinuous-v3": ("LunarLander-v3", {"continuous": True}),
    "BipedalWalker-v2": ("BipedalWalker-v3", {}),
    "BipedalWalkerHardcore-v2": ("BipedalWalkerHardcore-v3", {}),
    "CarRacing-v0": ("CarRacing-v3", {}),
    "CarRacing-v1": ("CarRacing-v3", {}),
    "CarRacing-v2": ("CarRacing-v3", {}),
    "Pendulum-v0": ("Pendulum-v1", {}),
    "Taxi-v2": ("Taxi-v4", {}),
    "Taxi-v3": ("Taxi-v4", {}),
    "CliffWalking-v0": ("CliffWalking-v1", {}),
    "Pusher-v2": ("Pusher-v5", {}),
    "Pusher-v4": ("Pusher-v5", {}),
    **{f"{name}-v{n}": (f"{name}-v4", {}) for name in _MUJOCO.split() for n in (2, 3)},
}
_NO_MAP = (
    (r".*BulletEnv-v\d+|Minitaur.*|Racecar.*|Kuka.*", "a PyBullet environment, which gymnasium has no counterpart of"),
    (r"MiniGrid-.*|BabyAI-.*", "a MiniGrid environment, which needs the minigrid package and its observation wrapper"),
    (r".*NoFrameskip-v\d+|ALE[/-].*|.*Deterministic-v\d+", "an Atari environment, which needs the ale-py package"),
    (r"Panda.*", "a panda-gym environment, which needs the panda-gym package"),
    (r"Fetch.*|Hand.*|AntMaze.*|PointMaze.*", "a robotics environment, which needs the gymnasium-robotics package"),
    (r"(parking|highway|merge|roundabout|intersection|racetrack|neck)-.*", "an environment of the highway-env package"),
)
_ANT_INPUTS = 111  # 27 and 84 contact forces, which were always zero before Ant-v4
_HARMLESS = ("DelayedRewardWrapper", "Monitor", "DoneOnSuccessWrapper")
_VELOCITIES = {
    "CartPole-v1": (1, 3),
    "MountainCar-v0": (1,),
    "MountainCarContinuous-v0": (1,),
    "Pendulum-v1": (2,),
    "LunarLander-v2": (2, 3, 5),
    "LunarLander-v3": (2, 3, 5),
    "LunarLanderContinuous-v2": (2, 3, 5),
    "LunarLanderContinuous-v3": (2, 3, 5),
}
"""Which numbers rl-zoo's MaskVelocityWrapper sets to zero; its environments are named CartPoleNoVel-v1 and so on."""


@dataclass(frozen=True)
class Checkpoint:
    """Where an agent's files are: the zip, its normalizer, the zoo's settings, the environment's old id if known."""

    zip: Path
    vecnormalize: Path | None = None
    args: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    trained_on: str | None = None
    algo: str | None = None


def is_zoo_folder(path: Path) -> bool:
    """Whether a folder has an agent's zip, or the settings of a zip beside it."""
    return path.is_dir() and (any(path.glob("*.zip")) or any((path / name).is_file() for name in _SETTINGS[:2]))


def locate(path: Path) -> Checkpoint:
    """The files that belong to a zip, to a zoo folder, or to the settings folder inside one.

    Of a folder `<Env>_<n>`, `<Env>.zip` is taken, else best_model.zip, else the only zip there is.
    Raises InputError when there is none, or several to choose from.
    """
    archive = _zip_in(path) if path.is_dir() else path
    settings = _settings_of(archive)
    args = read_yaml(settings / "args.yml") if settings else {}
    config = read_yaml(settings / "config.yml") if settings else {}
    named = args.get("env") if isinstance(args.get("env"), str) else None
    parents = [p.name for p in (archive.absolute().parent, archive.absolute().parent.parent)]
    trained_on = named or next((i for i in map(id_in_name, (archive.stem, parents[0])) if i), None)
    algo = (
        args.get("algo")
        if isinstance(args.get("algo"), str)
        else next((p for p in parents if p in _ALGOS.split("|")), None)
    )
    return Checkpoint(archive, _normalizer_of(archive, settings, config), args, config, trained_on, algo)


def _zip_in(folder: Path) -> Path:
    inner = folder.parent / f"{folder.name}.zip"
    if inner.is_file() and not any(folder.glob("*.zip")):
        return inner
    zips = sorted(folder.glob("*.zip"))
    by_stem = {file.stem: file for file in zips}
    with_settings = [file.stem for file in zips if (folder / file.stem).is_dir()]
    for stem in (re.sub(r"_\d+$", "", folder.absolute().name), *with_settings, "best_model"):
        if stem in by_stem:
            return by_stem[stem]
    if len(zips) == 1:
        return zips[0]
    found = f"has {', '.join(file.name for file in zips[:6])}; name one of them" if zips else "has no zip"
    raise InputError(f"{folder}: {found}; an rl-zoo folder holds <Env>.zip beside <Env>/config.yml")


def _settings_of(archive: Path) -> Path | None:
    """The folder with the zoo's settings for a zip: of the same name, else the only one beside it, else none."""
    own = archive.with_suffix("")
    if any((own / name).is_file() for name in _SETTINGS):
        return own
    beside = [f for f in archive.parent.glob("*/") if any((f / name).is_file() for name in _SETTINGS[:2])]
    return beside[0] if len(beside) == 1 else None


def _normalizer_of(archive: Path, settings: Path | None, config: dict[str, Any]) -> Path | None:
    """The vecnormalize.pkl to use; as in the zoo, `normalize` in config.yml decides where there is one."""
    candidates = [archive.parent / name for name in ("vecnormalize.pkl", "vec_normalize.pkl")]
    if settings:
        candidates.insert(0, settings / "vecnormalize.pkl")
    found = next((file for file in candidates if file.is_file()), None)
    if not config:
        return found
    wanted = config.get("normalize", False)
    if isinstance(wanted, str):
        wanted = literal(wanted, f"{settings}/config.yml: normalize")
    if isinstance(wanted, dict):
        wanted = wanted.get("norm_obs", True)
    if wanted and found is None:
        raise InputError(
            f"{candidates[0]}: not found, but config.yml says that observations were normalized; add the file"
        )
    return found if wanted else None


def id_in_name(name: str) -> str | None:
    """The environment id in a file or folder name such as `ppo-LunarLander-v2_1`, if one is known by that name."""
    match = _ENV_IN_NAME.fullmatch(name)
    if not match:
        return None
    env_id = match["id"]
    plain = with_velocities(env_id)
    known = plain in RENAMED or any(re.fullmatch(pattern, plain) for pattern, _ in _NO_MAP)
    return env_id if known or _registered(plain) is not False else None


def with_velocities(env_id: str) -> str:
    """The id of the environment of which rl-zoo's hides velocities; any other id itself.

    >>> with_velocities("PendulumNoVel-v1")
    'Pendulum-v1'
    """
    plain = env_id.replace("NoVel-v", "-v")
    return plain if plain in _VELOCITIES else env_id


def unseen(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Which numbers of its observation an agent saw as zero, as it was trained without velocities."""
    trained_on = checkpoint.trained_on or ""
    plain = with_velocities(trained_on)
    if plain == trained_on and "MaskVelocityWrapper" not in _wrappers(checkpoint.config):
        return ()
    return _VELOCITIES.get(plain, ())


def _registered(env_id: str) -> bool | None:
    """Whether gymnasium knows an id; None without gymnasium."""
    try:
        from gymnasium.envs.registration import registry
    except ImportError:
        return None
    return env_id in registry


def episode_limit(env_id: str) -> int | None:
    """After how many steps gymnasium ends an episode; None where it does not, or does not know the id."""
    try:
        from gymnasium.envs.registration import registry
    except ImportError:
        return None
    return registry[env_id].max_episode_steps if env_id in registry else None


def today(env_id: str) -> tuple[EnvSpec | None, str | None]:
    """An id in today's names, or None and one line saying why there is none."""
    plain = with_velocities(env_id)
    if plain != env_id:
        found, problem = today(plain)
        return None if found is None else replace(found, trained_on=env_id), problem
    if env_id in RENAMED:
        name, kwargs = RENAMED[env_id]
        return EnvSpec(name, dict(kwargs), trained_on=env_id), None
    if _registered(env_id) is not False:
        return EnvSpec(env_id, trained_on=env_id), None
    for pattern, why in _NO_MAP:
        if re.fullmatch(pattern, env_id):
            return None, f"{env_id} is {why}; name an environment with env="
    return (
        None,
        f"gymnasium does not know {env_id} and no newer name for it is known here; name an environment with env=",
    )


def env_spec(
    checkpoint: Checkpoint, inputs: int, continuous: bool, env: EnvSpec | str | None
) -> tuple[EnvSpec | None, str | None]:
    """The environment of an agent with `inputs` numbers per observation; None and the reason where there is none.

    `env` overrides id and arguments (an EnvSpec: everything). The time feature and the zeros that
    the agent saw come from config.yml and from `inputs`.
    """
    if isinstance(env, EnvSpec):
        return env, None
    trained_on = checkpoint.trained_on
    wanted = env or trained_on
    if wanted is None:
        return None, f"neither {checkpoint.zip.name} nor its folder names an environment; name one with env="
    spec, problem = today(wanted)
    if spec is None:
        if env is None:
            return None, problem
        spec = EnvSpec(env)  # a package that registers it may be imported later
    wrappers = _wrappers(checkpoint.config)
    kwargs = spec.kwargs | ({} if env else _env_kwargs(checkpoint))
    if spec.id.startswith("LunarLander") and continuous:
        kwargs = kwargs | {"continuous": True}
    horizon = None
    if "TimeFeatureWrapper" in wrappers:
        steps = wrappers["TimeFeatureWrapper"].get("max_steps", 1000)
        horizon = episode_limit(spec.id) or (steps if isinstance(steps, int) and steps > 0 else 1000)
    padded = inputs - (horizon is not None)
    pad_obs = padded if re.fullmatch(r"Ant-v[45]", spec.id) and padded == _ANT_INPUTS else None
    rebuilt = ["TimeFeatureWrapper", *_HARMLESS, *(["MaskVelocityWrapper"] if unseen(checkpoint) else [])]
    other = [name for name in wrappers if name not in rebuilt]
    if env is None and other:
        return (
            None,
            f"{trained_on} was trained through {', '.join(other)}, not rebuilt here; name an environment with env=",
        )
    if pad_obs and spec.id == "Ant-v5":
        kwargs = {"include_cfrc_ext_in_observation": False} | kwargs
    return EnvSpec(spec.id, kwargs, horizon, pad_obs, trained_on), None


def _env_kwargs(checkpoint: Checkpoint) -> dict[str, Any]:
    """`env_kwargs` of args.yml and config.yml; a text or a dictionary."""
    merged: dict[str, Any] = {}
    for source in (checkpoint.config, checkpoint.args):
        value = source.get("env_kwargs")
        if isinstance(value, str) and value.strip():
            value = literal(value, f"{checkpoint.zip}: env_kwargs")
        if isinstance(value, dict):
            merged |= {str(k): v for k, v in value.items()}
    return merged


def _wrappers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Wrapper class name -> arguments, of env_wrapper, vec_env_wrapper and frame_stack."""
    found: dict[str, dict[str, Any]] = {}
    for key in ("env_wrapper", "vec_env_wrapper"):
        value = config.get(key)
        for entry in value if isinstance(value, list) else [value]:
            named = (
                entry if isinstance(entry, dict) else {entry: {}} if isinstance(entry, str) and entry.strip() else {}
            )
            for name, kwargs in named.items():
                found[str(name).rsplit(".", 1)[-1]] = kwargs if isinstance(kwargs, dict) else {}
    if isinstance(config.get("frame_stack"), int) and config["frame_stack"] > 1:
        found[f"{config['frame_stack']} stacked frames"] = {}
    return found


class _TaglessLoader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """SafeLoader that reads a Python-tagged node as the plain list, dictionary or text that it is written as."""


def _plain(loader: _TaglessLoader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node) or tag if isinstance(node, yaml.ScalarNode) else None


_TaglessLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)  # type: ignore[no-untyped-call, unused-ignore]
_TaglessLoader.add_multi_constructor("!", _plain)  # type: ignore[no-untyped-call, unused-ignore]


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a zoo YAML file; {} when there is no such file. An ordered dictionary may be tagged or plain.

    Raises InputError naming the file when it is not YAML or holds no settings.
    """
    if not path.is_file():
        return {}
    if path.stat().st_size > 2**20:
        raise InputError(f"{path}: larger than 1 MiB; no settings file of the zoo is")
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaglessLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, AttributeError) as error:
        raise InputError(f"{path}: not readable YAML ({one_line(error)})") from None
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]  # OrderedDict's arguments: one list of pairs
    if isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in value):
        value = dict(value)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}; expected settings by name")
    return value


def literal(text: str, where: str) -> Any:
    """The value of a Python literal in which `dict(a=1)` may stand for a dictionary; names become texts.

    >>> literal("dict(norm_obs=True, clip_obs=-5.0)", "example")
    {'norm_obs': True, 'clip_obs': -5.0}
    """
    try:
        if len(text) > 10_000:
            raise ValueError("too long")
        return _literal(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        cause = one_line(error, 80)
        raise InputError(
            f"{where}: cannot read {text[:60]!r} as a literal ({cause}); e.g. dict(norm_obs=True)"
        ) from None


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
        case ast.List(items) | ast.Tuple(items):
            return [_literal(item) for item in items]
        case ast.Dict(keys, values):
            return {str(_literal(k)): _literal(v) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.Call(ast.Name("dict"), [], keywords):
            return {k.arg: _literal(k.value) for k in keywords if k.arg is not None}
        case ast.Name() | ast.Attribute():
            return ast.unparse(node)
    raise ValueError(f"{type(node).__name__} is not a literal")
