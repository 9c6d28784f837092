"""The SB3 loader gives the same actions as SB3, for every algorithm, and says clearly what it cannot read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_agents as tiny
import torch
from torch import nn

from quantkit.errors import InputError
from quantkit.loaders import sb3
from quantkit.loading import load_checkpoint
from quantkit.model import EnvSpec
from quantkit.policy import Policy, build, describe


def real(name: str, tmp_path: Path) -> tuple[Any, Path]:
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("sb3_contrib")
    agent = tiny.make_agent(*tiny.AGENTS[name])
    path = tmp_path / f"{name}.zip"
    agent.save(path)
    return agent, path


def assert_same_actions(agent: Any, policy: Policy, seen: np.ndarray, raw: np.ndarray | None = None) -> None:
    """SB3 on `seen` acts as `policy` on `raw` (default: the same observations), in a batch and singly."""
    expected = agent.predict(seen, deterministic=True)[0]
    raw = seen if raw is None else raw
    actual = policy.predict(raw)[0]
    assert actual.shape == expected.shape
    if policy.head.kind == "box":
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
        assert np.ptp(expected, axis=0).min() > 0.01, "every action must vary, else the comparison is empty"
    else:
        np.testing.assert_array_equal(actual, expected)
        assert len(np.unique(expected)) > 1, "the action must vary, else the comparison is empty"
    first = {key: value[0] for key, value in raw.items()} if isinstance(raw, dict) else raw[0]
    np.testing.assert_allclose(policy.predict(first)[0], actual[0], rtol=1e-5, atol=1e-5)


def assert_same_memory(agent: Any, policy: Policy, steps: int = 5) -> None:
    """With the states that each leaves, SB3 and `policy` go on alike, also where episodes start again."""
    theirs = ours = None
    starts = np.random.default_rng(1).random((steps, 64)) < 0.3
    for t in range(steps):
        seen = tiny.observations(agent.observation_space, seed=3 + 10 * t)
        options = {"episode_start": starts[t], "deterministic": True}
        expected, theirs = agent.predict(seen, state=theirs, **options)
        actual, ours = policy.predict(seen, state=ours, **options)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
        assert ours is not None and theirs is not None
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
            assert np.ptp(a) > 0.1


@pytest.mark.parametrize("name", tiny.AGENTS)
def test_actions_equal_sb3(name: str, tmp_path: Path) -> None:
    """A loaded agent acts as SB3's own, and its structure can be described and rebuilt."""
    agent, path = real(name, tmp_path)
    model = load_checkpoint(path)
    assert isinstance(model.module, Policy)
    assert_same_actions(agent, model.module, tiny.observations(agent.observation_space))
    assert model.meta["algo"] == tiny.AGENTS[name][0].lower()
    assert model.meta["kind"] == "policy" and len(model.meta["sha256"]) == 64 and model.meta["source"] == path.name
    time = (sb3.SEQUENCE,) if model.module.recurrent else ()
    if model.module.recurrent:
        assert_same_memory(agent, model.module)
    assert model.example.shape == (2, *time, *model.module.obs_shape)
    if not model.module.fields:
        assert model.module.obs_shape == agent.observation_space.shape
    json.dumps(model.meta)
    rebuilt = build(json.loads(json.dumps(describe(model.module))))
    rebuilt.load_state_dict(model.module.state_dict())
    assert torch.equal(rebuilt(model.example), model.module(model.example))


@pytest.mark.parametrize("fn", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.GELU, nn.SiLU])
@pytest.mark.parametrize("base", ["ppo-box", "sac"])
def test_activation_is_read_from_json(base: str, fn: type[nn.Module], tmp_path: Path) -> None:
    """The activation named in policy_kwargs is used."""
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("sb3_contrib")
    algorithm, policy, observation, action, kwargs = tiny.AGENTS[base]
    agent = tiny.make_agent(
        algorithm, policy, observation, action, {"policy_kwargs": {**kwargs["policy_kwargs"], "activation_fn": fn}}
    )
    agent.save(tmp_path / "a.zip")
    assert_same_actions(agent, load_checkpoint(tmp_path / "a.zip").module, tiny.observations(agent.observation_space))


@pytest.mark.parametrize("mode", ["stage", "fold"])
@pytest.mark.parametrize("name", ["ppo-box", "ars-linear", "td3", "dqn", "ppo-matrix-observation"])
def test_normalizer_with_clip(name: str, mode: Any, tmp_path: Path) -> None:
    """VecNormalize as a stage or folded gives SB3's actions, also where the clip bites, with and without biases."""
    agent, venv = normalized_agent(name, tmp_path)
    model = load_checkpoint(tmp_path / "agent.zip", normalize=mode)
    raw = 2 * tiny.observations(agent.observation_space)
    seen = venv.normalize_obs(raw)
    assert (np.abs(seen) == venv.clip_obs).mean() > 0.1
    assert_same_actions(agent, model.module, seen, raw)
    assert model.meta["normalizer"]["mode"] == mode and model.module.stage.scales is (mode == "stage")


@pytest.mark.parametrize("mode", ["stage", "fold"])
@pytest.mark.parametrize("keys", [None, ["observation", "desired_goal"]])
def test_normalizer_by_key(keys: list[str] | None, mode: Any, tmp_path: Path) -> None:
    """Of a dictionary VecNormalize has statistics by key; keys that it leaves alone are not clipped either."""
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.vec_env import VecNormalize

    algorithm, policy, observation, action, kwargs = tiny.AGENTS["ppo-goal"]
    venv = VecNormalize(tiny.make_venv(observation, action), clip_obs=1.25, norm_obs_keys=keys)
    rng = np.random.default_rng(2)
    for rms in venv.obs_rms.values():
        rms.mean, rms.var = rng.normal(0.4, 0.6, rms.mean.shape), rng.uniform(0.1, 3.0, rms.mean.shape)
    agent = tiny.make_agent(algorithm, policy, observation, action, kwargs, venv)
    agent.save(tmp_path / "agent.zip")
    venv.save(str(tmp_path / "vecnormalize.pkl"))
    raw = {key: 2 * value for key, value in tiny.observations(agent.observation_space).items()}
    seen = venv.normalize_obs(raw)
    assert (np.abs(seen["observation"]) == 1.25).mean() > 0.1
    assert (np.abs(seen["achieved_goal"]) > 1.25).any() == (keys is not None)
    assert_same_actions(agent, load_checkpoint(tmp_path / "agent.zip", normalize=mode).module, seen, raw)


def test_normalizer_of_other_keys_is_refused(tmp_path: Path) -> None:
    """Statistics of a key that the policy does not take are named."""
    _, path = real("ppo-mixed", tmp_path)
    from stable_baselines3.common.vec_env import VecNormalize

    _, _, observation, action, _ = tiny.AGENTS["ppo-goal"]
    VecNormalize(tiny.make_venv(observation, action)).save(str(tmp_path / "vecnormalize.pkl"))
    with pytest.raises(
        InputError, match=r"vecnormalize\.pkl: normalizes the key 'achieved_goal'; the policy's keys: bits"
    ):
        load_checkpoint(path)


def normalized_agent(name: str, tmp_path: Path) -> tuple[Any, Any]:
    """An agent.zip with its vecnormalize.pkl beside it."""
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("sb3_contrib")
    from stable_baselines3.common.vec_env import VecNormalize

    algorithm, policy, observation, action, kwargs = tiny.AGENTS[name]
    venv = VecNormalize(tiny.make_venv(observation, action), clip_obs=1.25)
    rng = np.random.default_rng(2)
    venv.obs_rms.mean = rng.normal(0.4, 0.6, venv.observation_space.shape)
    venv.obs_rms.var = rng.uniform(0.1, 3.0, venv.observation_space.shape)
    venv.training = False
    agent = tiny.make_agent(algorithm, policy, observation, action, kwargs, venv)
    agent.save(tmp_path / "agent.zip")
    venv.save(str(tmp_path / "vecnormalize.pkl"))
    return agent, venv


def test_normalizer_that_does_nothing(tmp_path: Path) -> None:
    """norm_obs=False leaves observations alone."""
    agent, venv = normalized_agent("ppo-box", tmp_path)
    venv.norm_obs = False
    venv.save(str(tmp_path / "vecnormalize.pkl"))
    model = load_checkpoint(tmp_path / "agent.zip")
    assert model.meta["normalizer"] == {"mode": "none"} and model.module.stage.is_identity
    assert_same_actions(agent, model.module, tiny.observations(agent.observation_space))


def test_fold_needs_a_linear_first_layer(tmp_path: Path) -> None:
    """Folding into a convolution is refused."""
    pytest.importorskip("stable_baselines3")
    agent, _ = real("ppo-cnn-raw", tmp_path)
    from stable_baselines3.common.vec_env import VecNormalize

    venv = VecNormalize(tiny.make_venv(("box", (3, 36, 36), 0.0, 1.0), ("discrete", 4)))
    venv.save(str(tmp_path / "vecnormalize.pkl"))
    path = tmp_path / "ppo-cnn-raw.zip"
    with pytest.raises(InputError, match="use normalize='stage'"):
        load_checkpoint(path, normalize="fold")
    raw = tiny.observations(agent.observation_space)
    assert load_checkpoint(path).module.predict(raw)[0].shape == (64,)


def test_shared_layers_of_old_versions(tmp_path: Path) -> None:
    """`shared_net` layers of SB3 before 1.8 come first in the actor."""
    agent, path = real("ppo-box", tmp_path)
    content = tiny.read_zip(path)
    tensors = torch.load(io.BytesIO(content["policy.pth"]), weights_only=True)
    renamed = {
        name.replace("policy_net.0", "shared_net.0").replace("policy_net.2", "policy_net.0"): value
        for name, value in tensors.items()
        if "value_net" not in name
    }
    data = json.loads(content["data"])
    data["policy_kwargs"] = {"net_arch": [7, {"pi": [9], "vf": [6]}]}
    old = tiny.write_zip(
        tmp_path / "old.zip", content | {"policy.pth": tiny.torch_bytes(renamed), "data": json.dumps(data).encode()}
    )
    assert_same_actions(agent, load_checkpoint(old).module, tiny.observations(agent.observation_space))


def test_bare_linear_of_old_ars(tmp_path: Path) -> None:
    """Older ARSLinearPolicy called its only layer action_net."""
    agent, path = real("ars-linear", tmp_path)
    content = tiny.read_zip(path)
    tensors = torch.load(io.BytesIO(content["policy.pth"]), weights_only=True)
    renamed = {"action_net.weight": tensors["action_net.0.weight"]}
    old = tiny.write_zip(tmp_path / "old.zip", content | {"policy.pth": tiny.torch_bytes(renamed)})
    assert_same_actions(agent, load_checkpoint(old).module, tiny.observations(agent.observation_space))


@pytest.mark.parametrize(
    ("algorithm", "policy", "observation", "action", "words"),
    [
        ("PPO", "MultiInputPolicy", ("dict", {"x": ("image", (36, 36, 3))}), ("discrete", 2), "image 'x' in a Dict"),
        ("RecurrentPPO", "CnnLstmPolicy", ("image", (36, 36, 3)), ("discrete", 2), "RecurrentActorCriticCnnPolicy"),
        ("PPO", "MlpPolicy", ("box", (3,), -1.0, 1.0), ("box", (2, 2), -1.0, 1.0), "action space Box of shape"),
    ],
)
def test_what_cannot_be_read_is_refused(
    algorithm: str, policy: str, observation: Any, action: Any, words: str, tmp_path: Path
) -> None:
    """Images in dictionaries, recurrent policies with images and matrix actions are refused by name."""
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("sb3_contrib")
    tiny.make_agent(algorithm, policy, observation, action, {}).save(tmp_path / "a.zip")
    with pytest.raises(InputError, match=words) as caught:
        load_checkpoint(tmp_path / "a.zip")
    assert "a.zip" in str(caught.value) and "accepted" in str(caught.value) and "\n" not in str(caught.value)


def test_module_names_tell_the_layers(tmp_path: Path) -> None:
    """Names read conv1, relu1, ..., flatten, fc1, ..., head; gSDE's clip of the mean is kept."""
    names = list(load_checkpoint(real("ppo-cnn-separate", tmp_path)[1]).module.net._modules)
    convs = ["conv1", "relu1", "conv2", "relu2", "conv3", "relu3"]
    assert names == [*convs, "flatten", "fc1", "relu4", "fc2", "tanh5", "head"]
    net = load_checkpoint(real("sac-sde", tmp_path)[1]).module.net
    assert list(net._modules) == ["fc1", "relu1", "head", "clip_mean"] and net.clip_mean.max_val == 0.75


def test_images_are_marked_channels_first(tmp_path: Path) -> None:
    """Image agents take uint8 channels-first observations, divided by 255 in the stage."""
    model = load_checkpoint(real("ppo-cnn", tmp_path)[1])
    assert model.meta["channels_first"] and model.example.dtype == torch.uint8 and float(model.module.stage.std) == 255
    assert not load_checkpoint(real("ppo-discrete", tmp_path)[1]).meta["channels_first"]


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    """Loading leaves torch's generator as it was."""
    path = tiny.write_zip(tmp_path / "a.zip", tiny.members())
    before = torch.get_rng_state()
    load_checkpoint(path)
    assert torch.equal(before, torch.get_rng_state())


# --- environments and folders (hand-made zips) --------------------------------------------------


def zoo_folder(root: Path, env: str, *, algo: str = "ppo", config: str = "", args: str = "", **kwargs: Any) -> Path:
    folder = root / algo / f"{env}_1"
    tiny.write_zip(folder / f"{env}.zip", tiny.members(**kwargs))
    settings = folder / env
    settings.mkdir()
    lines = args or f"!!python/object/apply:collections.OrderedDict\n- - - algo\n    - {algo}\n  - - env\n    - {env}\n"
    (settings / "args.yml").write_text(lines)
    (settings / "config.yml").write_text(
        config or "!!python/object/apply:collections.OrderedDict\n- - - policy\n    - MlpPolicy\n"
    )
    return folder


def test_zoo_folder_and_its_zip_and_its_settings_are_one_agent(tmp_path: Path) -> None:
    """The outer folder, the inner one, the zip and the zip without suffix load the same agent."""
    folder = zoo_folder(tmp_path, "LunarLander-v2")
    paths = [folder, folder / "LunarLander-v2", folder / "LunarLander-v2.zip"]
    models = [load_checkpoint(p) for p in paths]
    assert {m.meta["sha256"] for m in models} == {models[0].meta["sha256"]}
    assert all(m.env == EnvSpec("LunarLander-v3", trained_on="LunarLander-v2") for m in models)


def test_own_zip_is_preferred_to_best_model(tmp_path: Path) -> None:
    """A folder means <Env>.zip; best_model.zip loads by name with the same settings, or when it is alone."""
    folder = zoo_folder(tmp_path, "CartPole-v1")
    tiny.write_zip(folder / "best_model.zip", tiny.members())
    assert load_checkpoint(folder).meta["source"] == "CartPole-v1.zip"
    best = load_checkpoint(folder / "best_model.zip")
    assert best.env is not None and best.env.id == "CartPole-v1"
    (folder / "CartPole-v1.zip").unlink()
    assert load_checkpoint(folder).meta["source"] == "best_model.zip"


def test_folder_with_several_zips_must_be_told_which(tmp_path: Path) -> None:
    """An ambiguous folder is refused with the names of its zips; one without zips too."""
    for name in ("one.zip", "two.zip"):
        tiny.write_zip(tmp_path / name, tiny.members())
    with pytest.raises(InputError, match=r"one\.zip, two\.zip; name one"):
        load_checkpoint(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="not a checkpoint; accepted"):
        load_checkpoint(empty)


@pytest.mark.parametrize(
    ("stem", "id_", "kwargs"),
    [
        ("CartPole-v1", "CartPole-v1", {}),
        ("ppo-LunarLander-v2", "LunarLander-v3", {}),
        ("Walker2d-v3_1", "Walker2d-v4", {}),
        ("Reacher-v2", "Reacher-v4", {}),
        ("Pendulum-v0", "Pendulum-v1", {}),
        ("LunarLanderContinuous-v2", "LunarLander-v3", {"continuous": True}),
    ],
)
def test_environment_of_a_bare_zip(stem: str, id_: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    """The file name gives the environment, in today's name."""
    model = load_checkpoint(tiny.write_zip(tmp_path / f"{stem}.zip", tiny.members()))
    assert model.env is not None and (model.env.id, model.env.kwargs) == (id_, kwargs)


@pytest.mark.parametrize("env", ["HalfCheetahBulletEnv-v0", "MiniGrid-DoorKey-5x5-v0", "PandaReach-v1"])
def test_environment_without_a_successor(env: str, tmp_path: Path) -> None:
    """What cannot be mapped loads without an environment and says why; env= names one."""
    pytest.importorskip("gymnasium")
    path = tiny.write_zip(tmp_path / f"{env}.zip", tiny.members())
    model = load_checkpoint(path)
    assert model.env is None and env in model.meta["env_problem"] and "env=" in model.meta["env_problem"]
    chosen = load_checkpoint(path, env="CartPole-v1")
    assert chosen.env == EnvSpec("CartPole-v1", trained_on=env) and chosen.meta["env_problem"] is None


def test_env_overrides(tmp_path: Path) -> None:
    """env= takes an id, an old id or a whole EnvSpec; nothing else is left of the recorded one."""
    path = tiny.write_zip(tmp_path / "Swimmer-v3.zip", tiny.members())
    assert load_checkpoint(path, env="Swimmer-v5").env == EnvSpec("Swimmer-v5", trained_on="Swimmer-v3")
    assert load_checkpoint(path, env="Hopper-v3").env == EnvSpec("Hopper-v4", trained_on="Swimmer-v3")
    spec = EnvSpec("Mine-v0", {"a": 1})
    assert load_checkpoint(path, env=spec).env == spec


def test_time_feature_is_recorded(tmp_path: Path) -> None:
    """TimeFeatureWrapper becomes the horizon of the appended input, in each way config.yml writes it."""
    pytest.importorskip("gymnasium")
    for i, text in enumerate(
        (
            "env_wrapper: sb3_contrib.common.wrappers.TimeFeatureWrapper",
            "env_wrapper:\n- utils.wrappers.TimeFeatureWrapper:\n    max_steps: 250",
            "env_wrapper:\n  sb3_contrib.common.wrappers.TimeFeatureWrapper: {max_steps: 250}",
        )
    ):
        model = load_checkpoint(zoo_folder(tmp_path / str(i), "Swimmer-v3", config=text))
        assert model.env is not None and model.env.time_feature == 1000  # the environment's own limit wins, as in SB3
        assert model.meta["time_feature"] == 1000
    model = load_checkpoint(zoo_folder(tmp_path / "own", "Mine-v7", config=text), env="Mine-v7")
    assert model.env is not None and model.env.time_feature == 250


def test_other_wrappers_leave_no_environment(tmp_path: Path) -> None:
    """Wrappers that are not rebuilt are named, and env= still gives an environment."""
    folder = zoo_folder(tmp_path, "CartPole-v1", config="env_wrapper: utils.wrappers.HistoryWrapper\nframe_stack: 4")
    model = load_checkpoint(folder)
    assert model.env is None and "HistoryWrapper, 4 stacked frames" in model.meta["env_problem"]
    assert load_checkpoint(folder, env="CartPole-v1").env is not None


def test_zero_padded_ant(tmp_path: Path) -> None:
    """Ant agents with 111 inputs get 84 zeros after the 27 of today; a time feature comes after those."""
    for extra, config in ((0, "policy: MlpPolicy"), (1, "env_wrapper: x.TimeFeatureWrapper")):
        data = tiny.ppo_data(
            observation_space=tiny.box_fields(np.full(111 + extra, -np.inf), np.full(111 + extra, np.inf))
        )
        tensors = tiny.ppo_tensors(mlp_extractor__policy_net__0__weight=torch.ones(4, 111 + extra))
        folder = zoo_folder(tmp_path / str(extra), "Ant-v3", config=config, data=data, tensors=tensors)
        model = load_checkpoint(folder)
        assert model.env is not None and (model.env.id, model.env.pad_obs) == ("Ant-v4", 111)
        assert (model.env.time_feature is not None) == bool(extra)
        five = load_checkpoint(folder, env="Ant-v5").env
        assert five is not None and five.kwargs == {"include_cfrc_ext_in_observation": False} and five.pad_obs == 111


def test_env_kwargs_are_kept(tmp_path: Path) -> None:
    """env_kwargs of args.yml and config.yml reach the EnvSpec, as a dictionary or as text."""
    args = "env: CartPole-v1\nenv_kwargs: {sutton_barto_reward: true}"
    folder = zoo_folder(tmp_path, "CartPole-v1", args=args, config="env_kwargs: dict(render_mode=None)")
    model = load_checkpoint(folder)
    assert model.env is not None and model.env.kwargs == {"render_mode": None, "sutton_barto_reward": True}


def test_bounds_that_were_not_printed(tmp_path: Path) -> None:
    """Bounds left out of the print come from its single number, else from the environment, else are asked for."""
    fields = tiny.box_fields([-2.0], [2.0]) | {"low": "[... elided ...]", "high": "[...]"}
    tensors = tiny.ppo_tensors(action_net__weight=torch.ones(1, 5), action_net__bias=torch.ones(1))
    single = tiny.members(tiny.ppo_data(action_space=fields | {"low_repr": "-3.0", "high_repr": "4.5"}), tensors)
    head = load_checkpoint(tiny.write_zip(tmp_path / "single.zip", single)).module.head
    assert (head.low, head.high) == ((-3.0,), (4.5,))
    content = tiny.members(tiny.ppo_data(action_space=fields), tensors)
    with pytest.raises(InputError, match=r"not printed in full.*give env="):
        load_checkpoint(tiny.write_zip(tmp_path / "mystery.zip", content))
    pytest.importorskip("gymnasium")
    assert load_checkpoint(tiny.write_zip(tmp_path / "Pendulum-v1.zip", content)).module.head.high == (2.0,)


def test_missing_normalizer_is_named(tmp_path: Path) -> None:
    """config.yml says normalized, the file is not there: refused with the place it belongs."""
    for i, text in enumerate(
        ("normalize: true", "normalize: \"{'norm_obs': True}\"", "normalize: dict(norm_reward=False)")
    ):
        with pytest.raises(InputError, match=r"vecnormalize\.pkl: not found, but config\.yml"):
            load_checkpoint(zoo_folder(tmp_path / str(i), "CartPole-v1", config=text))
    quiet = zoo_folder(tmp_path / "off", "CartPole-v1", config="normalize: dict(norm_obs=False, norm_reward=True)")
    assert load_checkpoint(quiet).meta["normalizer"] == {"mode": "none"}


def test_sniff_is_about_sb3_only(tmp_path: Path) -> None:
    """Zips and zoo folders are SB3's; tensors, texts and other folders are not."""
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    (tmp_path / "a.txt").write_text("hello")
    assert not any(map(sb3.sniff, (tmp_path / "a.pt", tmp_path / "a.txt", tmp_path)))
    bare = tiny.write_zip(tmp_path / "agent", tiny.members())
    assert sb3.sniff(bare) and sb3.sniff(zoo_folder(tmp_path, "CartPole-v1"))


def test_suffix_may_be_left_out(tmp_path: Path) -> None:
    """As SB3's own load, `agent` means agent.zip."""
    tiny.write_zip(tmp_path / "agent.zip", tiny.members())
    assert load_checkpoint(tmp_path / "agent").meta["source"] == "agent.zip"
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(tmp_path / "nothing")


def test_options_are_checked(tmp_path: Path) -> None:
    """An unknown way to normalize is refused."""
    path = tiny.write_zip(tmp_path / "agent.zip", tiny.members())
    with pytest.raises(InputError, match="expected 'stage' or 'fold'"):
        load_checkpoint(path, normalize="other")  # type: ignore[arg-type]
