"""Environments from specifications: inputs, limits, checks and errors."""

import dataclasses
import sys
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from torch import nn

from quantkit.errors import InputError
from quantkit.model import EnvSpec
from quantkit.policy import Head, InputStage, Policy
from quantkit.tasks.environments import bare_env, check_fits, input_shape, make_env


def policy(inputs, head):
    """A policy with the given number of inputs and this head."""
    return Policy(InputStage(), nn.Sequential(nn.Linear(inputs, head.outputs)), head, (inputs,))


def test_plain_environment_is_gymnasiums():
    """Without extras the environment gives what gymnasium.make gives."""
    ours, theirs = make_env(EnvSpec("Acrobot-v1")), gymnasium.make("Acrobot-v1")
    np.testing.assert_array_equal(ours.reset(seed=17)[0], theirs.reset(seed=17)[0])
    for action in (0, 2, 1, 2):
        a, b = ours.step(action), theirs.step(action)
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1:4] == b[1:4]


def test_zeros_then_time_are_appended():
    """Inputs are the observation, zeros up to pad_obs, then 1 - t / horizon, starting at 1 after every reset."""
    spec = EnvSpec("Pendulum-v1", time_feature=40, pad_obs=7)
    env, plain = make_env(spec), gymnasium.make("Pendulum-v1")
    assert env.observation_space.shape == (8,)
    for seed in (5, 6):
        obs, base = env.reset(seed=seed)[0], plain.reset(seed=seed)[0]
        for step in range(4):
            assert env.observation_space.contains(obs)
            np.testing.assert_array_equal(obs[:3], base)
            np.testing.assert_array_equal(obs[3:7], 0)
            assert obs[7] == np.float32(1 - step / 40)
            action = np.array([0.3], np.float32)
            obs, base = env.step(action)[0], plain.step(action)[0]


def test_time_feature_is_sb3s():
    """The time feature equals that of rl-zoo's TimeFeatureWrapper, as written there."""
    env = make_env(EnvSpec("CartPole-v1", time_feature=500))
    plain = gymnasium.make("CartPole-v1")
    theirs = np.append(plain.reset(seed=3)[0], 1 - 0 / 500).astype(np.float32)
    np.testing.assert_array_equal(env.reset(seed=3)[0], theirs)
    theirs = np.append(plain.step(1)[0], 1 - 1 / 500).astype(np.float32)
    np.testing.assert_array_equal(env.step(1)[0], theirs)


def test_known_wrappers_come_off_and_the_limit_is_kept():
    """bare_env removes gymnasium's three no-op wrappers and returns the smallest limit among them."""
    env, limit = bare_env(EnvSpec("CartPole-v1"))
    assert env is env.unwrapped and limit == 500
    assert bare_env(EnvSpec("CartPole-v1", kwargs={"max_episode_steps": 23}))[1] == 23
    assert bare_env(EnvSpec("LunarLander-v3", kwargs={"continuous": True}))[0].action_space.shape == (2,)


def test_other_wrappers_stay():
    """A wrapper that changes anything stays, with the limit below it."""

    class Halved(gymnasium.RewardWrapper):
        def reward(self, reward):
            return reward / 2

    def entry(**kwargs):
        return Halved(gymnasium.make("CartPole-v1", max_episode_steps=9))

    gymnasium.register("quantkit-test/Halved-v0", entry_point=entry)
    try:
        env, limit = bare_env(EnvSpec("quantkit-test/Halved-v0"))
        assert limit is None and isinstance(env, Halved)
        env.reset(seed=0)
        outcomes = [env.step(step % 2)[1:4] for step in range(9)]
        assert outcomes[0][0] == 0.5 and outcomes[-1][2]
    finally:
        del gymnasium.registry["quantkit-test/Halved-v0"]


@pytest.mark.parametrize(
    ("env_id", "word"),
    [
        ("LunarLander-v2", "LunarLander-v3"),
        ("lunarlander-v3", "LunarLander-v3"),
        ("CartPole-v7", "CartPole-v1"),
        ("Acrobat-v1", "Acrobot-v1"),
        ("HalfCheetah-v3", "HalfCheetah-v5"),
        ("no_such_module:Thing-v0", "no_such_module"),
        ("Quite-Different-v0", "unknown environment"),
    ],
)
def test_unknown_ids_name_the_nearest(env_id, word):
    """An id that cannot be made is an input error that names it and the nearest that can."""
    with pytest.raises(InputError, match=word) as caught:
        make_env(EnvSpec(env_id))
    assert env_id in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("env_id", "module", "word"),
    [
        ("CartPole-v1", "gymnasium", r"quantkit\[rl\]"),
        ("LunarLander-v3", "Box2D", r"quantkit\[rl\]"),
        ("Hopper-v4", "mujoco", r"quantkit\[rl\]"),
        ("ALE/Pong-v5", "ale_py", "ale-py"),
    ],
)
def test_missing_packages_are_named(monkeypatch, env_id, module, word):
    """A package that is not installed is an input error with the command that installs it."""
    for name in [name for name in sys.modules if name.startswith(("gymnasium.envs.box2d", "gymnasium.envs.mujoco"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=word):
        make_env(EnvSpec(env_id))


def test_refused_kwargs_are_named():
    """Kwargs that the environment does not know are an input error that shows them."""
    with pytest.raises(InputError, match="'wings': 2"):
        make_env(EnvSpec("CartPole-v1", kwargs={"wings": 2}))


def test_making_is_silent(tmp_path, monkeypatch, capfd):
    """Outdated MuJoCo ids neither warn nor print nor leave MUJOCO_LOG.TXT behind."""
    pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_env(EnvSpec("HalfCheetah-v4")).reset(seed=0)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_fitting_policies_pass():
    """Policies with the environment's inputs and actions pass the check, of every kind of action space."""
    check_fits(make_env(EnvSpec("CartPole-v1")), policy(4, Head("discrete", nvec=(2,))))
    check_fits(make_env(EnvSpec("Pendulum-v1")), policy(3, Head("box", low=(-2.0,), high=(2.0,), squash=True)))
    check_fits(make_env(EnvSpec("Pendulum-v1", time_feature=200)), policy(4, Head("box", low=(-2.0,), high=(2.0,))))


@pytest.mark.parametrize(
    ("inputs", "head", "word"),
    [
        (5, Head("discrete", nvec=(4,)), r"\(8,\).*\(5,\)"),
        (8, Head("discrete", nvec=(3,)), "4 discrete actions.*3 discrete"),
        (8, Head("discrete", nvec=(4,), start=1), "from 0.*from 1"),
        (8, Head("box", low=(-1.0, -1.0), high=(1.0, 1.0)), "4 discrete.*2 continuous"),
        (8, Head("multidiscrete", nvec=(2, 2)), r"4 discrete.*\(2, 2\)"),
        (8, Head("multibinary", nvec=(1, 1)), "4 discrete.*2 binary"),
    ],
)
def test_misfits_name_both_sides(inputs, head, word):
    """A policy of another input size or action space is refused with both named."""
    with pytest.raises(InputError, match=word):
        check_fits(make_env(EnvSpec("LunarLander-v3")), policy(inputs, head))


def test_wider_actions_than_the_environment_takes_are_refused():
    """A box policy that may leave the action range of the environment does not fit."""
    with pytest.raises(InputError, match=r"\[-2\.0, 2\.0\].*\[-3\.0, 3\.0\]"):
        check_fits(make_env(EnvSpec("Pendulum-v1")), policy(3, Head("box", low=(-3.0,), high=(3.0,))))


def test_impossible_inputs_are_refused():
    """Padding below the observation's size, and observations that become no vector, are input errors."""
    spec = EnvSpec("LunarLander-v3", pad_obs=5)
    with pytest.raises(InputError, match="pad_obs=5"):
        make_env(spec)
    with pytest.raises(InputError, match="accepted: Box, Discrete"):
        input_shape(gymnasium.make("Blackjack-v1"), EnvSpec("Blackjack-v1"))
    assert make_env(dataclasses.replace(spec, pad_obs=8)).observation_space.shape == (8,)


class _Picture(gymnasium.Env[Any, Any]):
    """Random images with their channels last; the reward is the action if the first pixel is odd."""

    observation_space = gymnasium.spaces.Box(0, 255, (12, 10, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.image = self.np_random.integers(0, 256, (12, 10, 3), np.uint8)
        return self.image, {}

    def step(self, action: Any) -> Any:
        return self.image, float(action), True, False, {}


def test_images_come_channels_first_and_predict_takes_either_order() -> None:
    """An environment of channels-last images gives the policy what stable-baselines3 would give it."""
    if "Picture-v0" not in gymnasium.registry:
        gymnasium.register("Picture-v0", entry_point=_Picture)
    env = make_env(EnvSpec("Picture-v0"))
    first, _ = env.reset(seed=3)
    last, _ = _Picture().reset(seed=3)
    assert first.shape == env.observation_space.shape == (3, 12, 10)
    assert np.array_equal(first, np.moveaxis(last, -1, 0))
    net = nn.Sequential(nn.Flatten(), nn.Linear(360, 2))
    agent = Policy(InputStage(std=255), net, Head("discrete", (2,)), (3, 12, 10))
    check_fits(env, agent)
    assert agent.predict(first)[0] == agent.predict(last)[0]
    assert agent.predict(last[None])[0].shape == (1,)
