"""Rollouts against plain gymnasium loops, their laws, and what is derived from them."""

import json
import math

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from quantkit.errors import InputError
from quantkit.model import EnvSpec
from quantkit.policy import Head, InputStage, Policy
from quantkit.seeds import CALIBRATION
from quantkit.tasks.episodes import act_of, compare_scores, evaluate, evaluate_policy, random_score, rollout
from quantkit.tasks.states import collect_visits

CARTPOLE = Head("discrete", nvec=(2,))
LANDER = Head("discrete", nvec=(4,))
PENDULUM = Head("box", low=(-2.0,), high=(2.0,), squash=True)


def small_policy(inputs, head, seed=0):
    """A random policy with one hidden layer."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, head.outputs))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return Policy(InputStage(), net, head, (inputs,)).eval()


def linear_act(inputs, head, seed=0):
    """A linear policy summed element by element: no row depends on the other rows of its batch."""
    weight = np.random.default_rng(seed).normal(size=(inputs, head.outputs)).astype(np.float32)
    return lambda obs: head.actions((obs[:, :, None] * weight).sum(axis=1, dtype=np.float32))


def plain_loop(act, env_id, seeds, **kwargs):
    """Returns and lengths as anyone would measure them: a new environment, one step at a time."""
    returns, lengths = [], []
    for seed in seeds:
        env = gymnasium.make(env_id, **kwargs)
        obs, _ = env.reset(seed=seed)
        total, steps, over = 0.0, 0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(act(np.asarray(obs, np.float32)[None])[0])
            total, steps, over = total + float(reward), steps + 1, terminated or truncated
        returns.append(total)
        lengths.append(steps)
    return returns, lengths


CASES = [
    ("CartPole-v1", {}, 4, CARTPOLE, 9),
    ("LunarLander-v3", {}, 8, LANDER, 7),
    ("LunarLander-v3", {"continuous": True, "enable_wind": True}, 8, Head("box", (), (-1.0,) * 2, (1.0,) * 2), 3),
    ("Pendulum-v1", {}, 3, PENDULUM, 5),
    ("Acrobot-v1", {"max_episode_steps": 130}, 6, Head("discrete", nvec=(3,)), 3),
    ("BipedalWalker-v3", {"max_episode_steps": 250}, 24, Head("box", (), (-1.0,) * 4, (1.0,) * 4), 4),
]


@pytest.mark.parametrize(("env_id", "kwargs", "inputs", "head", "episodes"), CASES)
def test_returns_are_those_of_a_plain_loop(env_id, kwargs, inputs, head, episodes):
    """Every return and length equals, to the last bit, the plain loop's over gymnasium.make and env.step."""
    act = linear_act(inputs, head)
    result = rollout(act, EnvSpec(env_id, kwargs), episodes=episodes, seed=71)
    returns, lengths = plain_loop(act, env_id, range(71, 71 + episodes), **kwargs)
    assert result.returns.tolist() == returns
    assert result.lengths.tolist() == lengths


def independent_of_the_batch(act, spec, episodes):
    """The law: neither n_envs nor the set of neighbouring episodes changes an episode."""
    reference = rollout(act, spec, episodes=episodes, seed=300)
    for n_envs in (1, 2, 5):
        result = rollout(act, spec, episodes=episodes, seed=300, n_envs=n_envs)
        if result.returns.tolist() != reference.returns.tolist():
            return False
    tail = rollout(act, spec, episodes=episodes - 2, seed=302, n_envs=3)
    return tail.returns.tolist() == reference.returns[2:].tolist()


@pytest.mark.parametrize(("env_id", "kwargs", "inputs", "head", "episodes"), CASES)
def test_an_episode_does_not_depend_on_its_batch(env_id, kwargs, inputs, head, episodes):
    """Episodes are the same for any n_envs, in any company, also where environments remember the last one."""
    assert independent_of_the_batch(linear_act(inputs, head), EnvSpec(env_id, kwargs), max(episodes, 4))


def test_the_batch_law_catches_a_policy_that_looks_at_its_neighbours():
    """Sabotage: a policy that normalizes over the batch breaks the law."""
    honest = linear_act(4, CARTPOLE)
    assert not independent_of_the_batch(lambda obs: honest(obs - obs.mean(axis=0)), EnvSpec("CartPole-v1"), 9)


def test_more_episodes_than_environments_fill_the_freed_places():
    """No batch is wider than n_envs, none holds a finished episode, and every step of every episode is shown once."""
    shown, widths = [], []

    def record(obs, numbers, steps):
        widths.append(len(obs))
        shown.extend(zip(numbers, steps, strict=True))

    act = linear_act(4, CARTPOLE)
    result = rollout(act, EnvSpec("CartPole-v1"), episodes=13, seed=4, n_envs=5, record=record)
    assert max(widths) == 5 and widths == sorted(widths, reverse=True)
    assert sorted(shown) == [(i, t) for i, length in enumerate(result.lengths) for t in range(length)]


def test_progress_counts_every_episode():
    """Progress is called once for each finished episode, with the total."""
    calls = []
    evaluate(
        linear_act(4, CARTPOLE),
        EnvSpec("CartPole-v1"),
        episodes=7,
        n_envs=3,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(i, 7) for i in range(1, 8)]


def test_policies_see_padding_and_time():
    """A rollout shows the policy exactly what make_env shows, zeros and time feature included."""
    from quantkit.tasks.environments import make_env

    spec = EnvSpec("Pendulum-v1", time_feature=200, pad_obs=6)
    act = linear_act(7, PENDULUM)
    seen = []
    result = rollout(act, spec, episodes=2, seed=8, n_envs=1, record=lambda obs, *_: seen.append(obs[0].copy()))
    env, expected = make_env(spec), []
    for seed in (8, 9):
        obs, over = env.reset(seed=seed)[0], False
        while not over:
            expected.append(obs)
            obs, _, terminated, truncated, _ = env.step(act(obs[None])[0])
            over = terminated or truncated
    np.testing.assert_array_equal(seen, expected)
    assert result.lengths.tolist() == [200, 200]


def test_images_reach_the_policy_as_bytes():
    """Image observations keep their shape and stay uint8."""

    class Screen(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 255, (3, 5, 4), np.uint8)
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.left = 3
            return np.full((3, 5, 4), 200, np.uint8), {}

        def step(self, action):
            self.left -= 1
            return np.full((3, 5, 4), self.left, np.uint8), float(action), self.left == 0, False, {}

    gymnasium.register("quantkit-test/Screen-v0", entry_point=Screen)
    try:
        states = collect_visits(
            lambda obs: np.ones(len(obs), np.int64), EnvSpec("quantkit-test/Screen-v0"), 6, episodes=2
        )[0]
    finally:
        del gymnasium.registry["quantkit-test/Screen-v0"]
    assert states.dtype == np.uint8 and states.shape == (6, 3, 5, 4)
    assert sorted(states[:, 0, 0, 0].tolist()) == [1, 1, 2, 2, 200, 200]


def test_score_summarizes_the_returns():
    """A score holds mean, deviation, standard error, robust mean and every return, and survives JSON."""
    score = evaluate(linear_act(4, CARTPOLE), EnvSpec("CartPole-v1"), episodes=12, seed=40)
    returns = np.array(score.returns)
    assert (score.metric, score.n, score.seed) == ("return", 12, 40)
    assert score.mean == pytest.approx(returns.mean())
    assert score.stderr == pytest.approx(returns.std(ddof=1) / math.sqrt(12))
    assert score.iqm == pytest.approx(np.sort(returns)[3:9].mean())
    assert score.iqm_low <= score.iqm <= score.iqm_high
    assert list(score.lengths) == [int(r) for r in returns] and score.seconds > 0
    loaded = json.loads(json.dumps(score.to_json(), allow_nan=False))
    assert loaded["returns"] == list(score.returns) and loaded["mean"] == score.mean


def test_one_episode_has_no_standard_error():
    """The standard error of one episode is unknown: NaN, and null in JSON."""
    score = evaluate(linear_act(4, CARTPOLE), EnvSpec("CartPole-v1"), episodes=1)
    assert math.isnan(score.stderr) and score.to_json()["stderr"] is None


def test_compiled_policies_act_as_their_predict():
    """act_of gives the actions of Policy.predict."""
    states = collect_visits(linear_act(8, LANDER), EnvSpec("LunarLander-v3"), 200, episodes=3)[0]
    policy = small_policy(8, LANDER)
    np.testing.assert_array_equal(act_of(policy)(states), policy.predict(states)[0])


def test_evaluating_a_policy_checks_that_it_fits():
    """evaluate_policy scores a module that fits the environment and refuses another."""
    spec = EnvSpec("CartPole-v1")
    assert evaluate_policy(small_policy(4, CARTPOLE), spec, episodes=3).n == 3
    with pytest.raises(InputError, match=r"\(4,\).*\(8,\)"):
        evaluate_policy(small_policy(8, LANDER), spec, episodes=3)


def test_random_scores_are_seeded_and_random():
    """The random policy's score repeats with the seed, does not depend on n_envs, and uses all actions."""
    spec = EnvSpec("LunarLander-v3")
    score = random_score(spec, episodes=6, seed=3)
    assert score.returns == random_score(spec, episodes=6, seed=3, n_envs=2).returns
    assert score.returns != random_score(spec, episodes=6, seed=4).returns
    assert -400 < score.mean < -50
    pendulum = random_score(EnvSpec("Pendulum-v1"), episodes=8)
    assert -1700 < pendulum.mean < -900


def test_random_actions_are_uniform_and_differ_between_episodes():
    """Each random episode draws its own actions, uniformly over the action space."""

    class Echo(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        action_space = gymnasium.spaces.Box(1.0, 3.0, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), action[0], False, False, {}

    gymnasium.register("quantkit-test/Echo-v0", entry_point=Echo, max_episode_steps=50)
    try:
        returns = np.array(random_score(EnvSpec("quantkit-test/Echo-v0"), episodes=40).returns) / 50
    finally:
        del gymnasium.registry["quantkit-test/Echo-v0"]
    assert len(set(returns)) == 40
    assert returns.mean() == pytest.approx(2.0, abs=0.06)  # deviation of the mean: 0.013
    assert returns.std() == pytest.approx(2 / math.sqrt(12 * 50), rel=0.4)


def test_calibration_states_are_a_uniform_sample_of_the_rollout():
    """Collected states are distinct states of the episodes, all when asked for all, and do not depend on n_envs."""
    act, spec = linear_act(4, CARTPOLE), EnvSpec("CartPole-v1")
    seen = []
    rollout(act, spec, episodes=20, seed=CALIBRATION.start, record=lambda obs, *_: seen.extend(map(tuple, obs)))
    states = collect_visits(act, spec, 100)[0]
    assert states.shape == (100, 4) and states.dtype == np.float32
    assert len({tuple(s) for s in states}) == 100 and {tuple(s) for s in states} <= set(seen)
    np.testing.assert_array_equal(collect_visits(act, spec, 100, n_envs=3)[0], states)
    np.testing.assert_array_equal(collect_visits(act, spec, 40)[0], states[:40])
    assert {tuple(s) for s in collect_visits(act, spec, len(seen))[0]} == set(seen)
    assert not np.array_equal(collect_visits(act, spec, 100, seed=77)[0], states)
    found, returns, lengths = collect_visits(act, spec, 100)
    np.testing.assert_array_equal(found, states)
    same = rollout(act, spec, episodes=20, seed=CALIBRATION.start)
    assert np.array_equal(returns, same.returns) and np.array_equal(lengths, same.lengths)
    more = collect_visits(act, spec, len(seen) + 1)[1]
    assert len(more) == 40 and np.array_equal(more[:20], returns)


def test_every_step_is_equally_likely_to_calibrate():
    """Early, middle and late steps are drawn in proportion to how often they occur."""
    spec, horizon = EnvSpec("Pendulum-v1", time_feature=200), 200
    states = collect_visits(linear_act(4, PENDULUM), spec, 2000, episodes=50)[0]
    steps = np.rint((1 - states[:, 3]) * horizon).astype(int)
    counts, _ = np.histogram(steps, bins=10, range=(0, 200))
    assert ((counts > 140) & (counts < 260)).all()  # 200 expected, deviation about 12


def test_more_states_than_twenty_episodes_have_need_more_episodes():
    """Rounds of further episodes are run until enough states were seen."""
    states = collect_visits(linear_act(4, CARTPOLE), EnvSpec("CartPole-v1"), 1000, episodes=3)[0]
    assert len({tuple(s) for s in states}) == 1000


def test_scores_are_compared_in_pairs():
    """The difference is the mean over pairs, nothing against itself, and pairs must share seeds."""
    spec = EnvSpec("Pendulum-v1")
    act = linear_act(3, PENDULUM)
    reference = evaluate(act, spec, episodes=6)
    verdict = compare_scores(reference, evaluate(act, spec, episodes=6), 1.0)
    assert verdict.verdict == "non-inferior" and verdict.diff_mean == 0 and verdict.margin == 1.0
    other = evaluate(lambda obs: -act(obs), spec, episodes=6)
    assert compare_scores(reference, other, 1.0).diff_mean == pytest.approx(other.mean - reference.mean)
    with pytest.raises(InputError, match="not paired"):
        compare_scores(reference, evaluate(act, spec, episodes=6, seed=9), 1.0)


def test_actions_that_are_not_finite_are_refused():
    """A policy that produces NaN actions is stopped with an input error, not fed to the physics."""
    with pytest.raises(InputError, match="not finite"):
        evaluate(lambda obs: np.full((len(obs), 1), np.nan, np.float32), EnvSpec("Pendulum-v1"), episodes=2)


def test_episodes_without_an_end_are_refused(monkeypatch):
    """An environment without a time limit cannot run for ever."""
    monkeypatch.setattr("quantkit.tasks.episodes._NEVER", 500)
    spec = EnvSpec("MountainCar-v0", kwargs={"max_episode_steps": -1})
    with pytest.raises(InputError, match="max_episode_steps"):
        evaluate(lambda obs: np.ones(len(obs), np.int64), spec, episodes=2)


@pytest.mark.parametrize("options", [{"episodes": 0}, {"episodes": 3, "n_envs": 0}, {"episodes": 3, "seed": -4}])
def test_senseless_numbers_are_refused(options):
    """No episodes, no environments and negative seeds are input errors."""
    with pytest.raises(InputError):
        evaluate(linear_act(4, CARTPOLE), EnvSpec("CartPole-v1"), **options)


@pytest.mark.parametrize(("env_id", "inputs", "head"), [("CartPole-v1", 4, CARTPOLE), ("Pendulum-v1", 3, PENDULUM)])
def test_sb3_evaluates_our_policies(env_id, inputs, head):
    """Stable-Baselines3's evaluate_policy takes a Policy and measures the returns we measure."""
    sb3 = pytest.importorskip("stable_baselines3.common.evaluation")
    from stable_baselines3.common.vec_env import DummyVecEnv

    policy = small_policy(inputs, head)
    theirs = []
    vec = DummyVecEnv([lambda: gymnasium.make(env_id)])
    for seed in (1000, 1001, 1002):
        vec.seed(seed)
        theirs.append(sb3.evaluate_policy(policy, vec, n_eval_episodes=1, warn=False)[0])
    ours = evaluate_policy(policy, EnvSpec(env_id), episodes=3, seed=1000)
    assert ours.returns == pytest.approx(theirs, rel=1e-3)
    two = DummyVecEnv([lambda: gymnasium.make(env_id)] * 2)
    assert len(sb3.evaluate_policy(policy, two, n_eval_episodes=4, warn=False, return_episode_rewards=True)[0]) == 4
