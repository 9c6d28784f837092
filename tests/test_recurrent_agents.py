"""Agents of RecurrentPPO, with a memory of the episode, from SB3's zip to episodes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_agents as tiny
import torch

from hwmodel import emit
from hwmodel.devices import find_device
from hwmodel.plan import plan_network
from quantkit.artifact import load_artifact, save_artifact
from quantkit.export import export_onnx, open_session
from quantkit.loading import describe_checkpoint, load_checkpoint
from quantkit.model import Calib, EnvSpec, Model
from quantkit.policy import Policy
from quantkit.presets import PRESETS, kind_of, preset_steps
from quantkit.recipe import quantize, uniform
from quantkit.rtl_episodes import fly
from quantkit.rtl_export import network_of
from quantkit.sensitivity import errors_of
from quantkit.simulate import compile_step
from quantkit.study import Settings, calib_for, evaluate_design, fresh_states, outputs_of, prepare
from quantkit.tasks.episodes import act_of, evaluate_policy, rollout
from quantkit.tasks.states import collect_sequences
from quantkit.verify import verify

pytest.importorskip("stable_baselines3")
pytest.importorskip("sb3_contrib")

ENVS = ("CartPole-v1", "Pendulum-v1")


def make_agent(env_id: str, folder: Path) -> tuple[Any, Path]:
    """A RecurrentPPO agent with an LSTM of 8 cells, noise on its weights, and its zip."""
    import gymnasium
    from stable_baselines3.common.vec_env import DummyVecEnv

    kwargs = {"policy_kwargs": {"lstm_hidden_size": 8, "net_arch": [8]}}
    venv = DummyVecEnv([lambda: gymnasium.make(env_id)])
    agent = tiny.make_agent("RecurrentPPO", "MlpLstmPolicy", ("box",), ("box",), kwargs, venv)
    path = folder / f"{env_id}.zip"
    agent.save(path)
    return agent, path


@pytest.fixture(scope="module", params=ENVS)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    """SB3's agent, and what we load of it."""
    agent, path = make_agent(request.param, tmp_path_factory.mktemp("agent"))
    return agent, load_checkpoint(path)


def policy_of(model: Model) -> Policy:
    assert isinstance(model.module, Policy)
    return model.module


def test_returns_equal_sb3s_own(pair: tuple[Any, Model]) -> None:
    """Episodes side by side, each with a memory of its own, have the returns of SB3's evaluate_policy."""
    from stable_baselines3.common.evaluation import evaluate_policy as theirs
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv

    agent, model = pair
    import gymnasium

    assert model.env is not None
    env_id = model.env.id
    venv = DummyVecEnv([lambda: Monitor(gymnasium.make(env_id))] * 6)
    venv.seed(1000)
    expected, lengths = theirs(agent, venv, n_eval_episodes=6, return_episode_rewards=True, deterministic=True)
    found = evaluate_policy(policy_of(model), model.env, episodes=6, seed=1000)
    assert sorted(found.lengths) == sorted(lengths)
    np.testing.assert_allclose(sorted(found.returns), sorted(expected), rtol=1e-3)


def test_the_policy_itself_passes_sb3s_evaluation(pair: tuple[Any, Model]) -> None:
    """`evaluate_policy` of SB3 takes the loaded policy with its states, and finds the agent's returns."""
    import gymnasium
    from stable_baselines3.common.evaluation import evaluate_policy as theirs
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv

    agent, model = pair
    assert model.env is not None
    env_id, found = model.env.id, []
    for one in (agent, policy_of(model)):
        venv = DummyVecEnv([lambda: Monitor(gymnasium.make(env_id))] * 2)
        venv.seed(7)
        found.append(theirs(one, venv, n_eval_episodes=4, return_episode_rewards=True)[0])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)


def test_episodes_do_not_meet(pair: tuple[Any, Model]) -> None:
    """Returns are the same however many episodes run side by side: no memory reaches another episode."""
    _, model = pair
    assert model.env is not None
    act = act_of(policy_of(model))
    alone, together = (rollout(act, model.env, episodes=7, seed=50, n_envs=n).returns for n in (1, 3))
    assert np.array_equal(alone, together)
    assert np.array_equal(rollout(act, model.env, episodes=7, seed=50).returns, alone)


def test_steps_are_the_sequence(pair: tuple[Any, Model]) -> None:
    """Taken step by step, in numpy or in torch, a sequence gives what the policy gives of the whole of it."""
    policy = policy_of(pair[1])
    x = torch.randn(5, 9, *policy.obs_shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = policy(x)
        states, step = policy.start(5), compile_step(policy)
        ours = tuple(s.numpy() for s in states)
        for t in range(x.shape[1]):
            y, states = policy.step(x[:, t], states)
            z, ours = step(x[:, t].numpy(), (ours[0], ours[1]))
            torch.testing.assert_close(y, whole[:, t], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(z, y, rtol=1e-5, atol=1e-5)


def quantized(model: Model, weights: str = "int8", acts: str = "int8", *steps: str) -> Model:
    recipe = uniform(weights, acts, steps=tuple((step, {}) for step in steps))
    return quantize(model, recipe, calib_for(model, 256))


def test_calibration_is_on_pieces_of_episodes(pair: tuple[Any, Model]) -> None:
    """Sequences are pieces of the episodes that the policy plays; a short episode stays at its last observation."""
    model = pair[1]
    assert model.env is not None
    act, met = act_of(policy_of(model)), dict[int, list[np.ndarray]]()

    def note(obs: np.ndarray, numbers: Any, steps: Any) -> None:
        for row, number in zip(obs.copy(), numbers, strict=True):
            met.setdefault(number, []).append(row)

    played = rollout(act, model.env, episodes=3, seed=77, record=note)
    for time in (7, max(map(len, met.values())) + 4):
        pieces, returns, _ = collect_sequences(act, model.env, 3, time, seed=77, episodes=3)
        assert pieces.shape == (3, time, *policy_of(model).obs_shape) and np.array_equal(returns, played.returns)
        known = [np.stack(e[i : i + time]) for e in met.values() for i in range(len(e))]
        full = [e if len(e) == time else np.concatenate([e, [e[-1]] * (time - len(e))]) for e in known]
        assert all(any(np.array_equal(piece, e) for e in full) for piece in pieces)


def test_calibration_reaches_the_end_of_episodes(pair: tuple[Any, Model]) -> None:
    """All pieces of an episode together hold every observation of it."""
    model = pair[1]
    assert model.env is not None
    act, met = act_of(policy_of(model)), list[np.ndarray]()
    rollout(act, model.env, episodes=1, seed=77, record=lambda obs, _n, _s: met.append(obs[0].copy()))
    time = len(met) // 2 + 1
    pieces, *_ = collect_sequences(act, model.env, 2, time, seed=77, episodes=1)
    first, second = sorted(pieces, key=lambda piece: not np.array_equal(piece[0], met[0]))
    assert np.array_equal(first, met[:time]) and np.array_equal(second, met[-time:])


@pytest.mark.parametrize("steps", [("gptq",), ("adaround",), ("center", "smoothquant", "gptq", "bias_correction")])
def test_eight_bits_keep_the_actions(steps: tuple[str, ...], pair: tuple[Any, Model]) -> None:
    """With 8 bits the quantized policy's outputs over episodes are within a few percent of the float one's."""
    model = pair[1]
    small = quantized(model, "int8", "int8", *steps)
    states = fresh_states(model, 200).numpy()
    ours, theirs = outputs_of(small, states), outputs_of(model, states)
    if policy_of(model).head.kind == "discrete" and "center" in steps:  # what all logits have in common is taken out
        ours, theirs = (y - y.mean(axis=1, keepdims=True) for y in (ours, theirs))
    assert np.abs(ours - theirs).max() < 0.05 * np.ptp(theirs)
    assert {name for name, p in small.points().items() if p.act is not None} == set(small.points())
    assert all(layer.q is not None for layer in small.qlayers().values())


def test_distilled_policies_err_less(pair: tuple[Any, Model]) -> None:
    """Training through time lowers the loss of a 3-bit policy on sequences that it was not trained on."""
    model = pair[1]
    for rounds in (1, 2):  # of two, the policy that earns most is kept, be it that at the start
        options = {"steps": 40, "rounds": rounds, "batch": 8, "states": 64}
        recipe = uniform("int3", "int4", steps=(("gptq", {}), ("distill", options)))
        report = quantize(model, recipe, calib_for(model, 256)).meta["steps"][-1]["diagnostics"]
        assert report["loss_after"] < report["loss_before"] or (rounds == 2 and report["round"] == 0)


def test_artifact_keeps_the_policy(pair: tuple[Any, Model], tmp_path: Path) -> None:
    """A saved policy acts bit for bit as before, its states quantized."""
    model = pair[1]
    small = quantized(model, "int4", "int6", "gptq")
    save_artifact(small, tmp_path / "a.q")
    again = load_artifact(tmp_path / "a.q")
    states = fresh_states(model, 200).numpy()
    assert np.array_equal(outputs_of(again, states), outputs_of(small, states))
    assert model.env is not None and again.env == model.env
    returns = [rollout(act_of(policy_of(m)), model.env, episodes=3).returns for m in (small, again)]
    assert np.array_equal(*returns)


@pytest.mark.parametrize("postprocess", [False, True])
def test_exported_step_plays_the_same_episodes(postprocess: bool, pair: tuple[Any, Model], tmp_path: Path) -> None:
    """The ONNX file of one step, its states carried along, gives the returns of the quantized policy."""
    small = quantized(pair[1], "int4", "int6", "gptq")
    export_onnx(small, tmp_path / "a.onnx", postprocess=postprocess)
    states = fresh_states(small, 128).numpy()
    found = verify(small, tmp_path / "a.onnx", states=states, episodes=4)
    assert found.ok and found.equal_returns == 4 and found.action_agreement == 1.0, found
    entry, *held = open_session(tmp_path / "a.onnx").get_inputs()
    assert entry.name == "obs" and [state.shape for state in held] == [["batch", 8]] * 2


def test_a_file_that_forgets_is_found_out(pair: tuple[Any, Model], tmp_path: Path) -> None:
    """A file whose next state is its old one is not verified."""
    small = quantized(pair[1])
    export_onnx(small, tmp_path / "a.onnx")
    file = onnx.load(tmp_path / "a.onnx")
    for node in file.graph.node:
        if list(node.output) == ["next_state_0"]:
            node.input[0] = "state_0"
    onnx.save(file, tmp_path / "b.onnx")
    found = verify(small, tmp_path / "b.onnx", states=fresh_states(small, 128).numpy(), episodes=2)
    assert not found.ok and found.unexplained > 0 and "next_state_0" in found.reason


@pytest.mark.sim
@pytest.mark.skipif(shutil.which("iverilog") is None, reason="iverilog is not installed")
def test_hardware_flies_episodes(pair: tuple[Any, Model], tmp_path: Path) -> None:
    """The Verilog takes the actions of its integers over whole episodes, its state clear where each begins."""
    model = pair[1]
    assert model.env is not None
    small = quantized(model, "int6", "int6", "gptq")
    network = network_of(small)[0]
    assert [spec.name for spec in network.specs] == ["net.lstm.loop.cells.0", "net.fc1", "net.head"]
    device = find_device("xc7a35t")
    plans = plan_network(network, device, latency_us=20.0)
    emit.write(network, plans, tmp_path, device)
    env = EnvSpec(model.env.id, {"max_episode_steps": 15})
    flight = fly(small, tmp_path, env, episodes=2, seed=4, tool="iverilog")
    assert flight.difference is None and flight.decisions == sum(flight.lengths)


def test_designs_are_measured_on_every_step(pair: tuple[Any, Model]) -> None:
    """A study of a recurrent policy scores and prices designs, and compares outputs at every step of its sequences."""
    model = pair[1]
    study = prepare(model, Settings(episodes=3, device=find_device("xc7a35t")))
    row = evaluate_design(study, uniform("int6", "int6", steps=(("gptq", {}),)))
    assert "error" not in row and row["cost"]["luts"] > 0 and row["score"]["n"] == 3
    assert study.float_outputs.shape == (study.states.shape[0] * study.states.shape[1], policy_of(model).head.outputs)
    states = torch.from_numpy(study.states)
    small = quantize(model, uniform("int6", "int6"), Calib(states))
    with torch.inference_mode():
        ours, theirs = small.module(states).double(), model.module(states).double()
    error = ((ours - theirs).square().sum() / theirs.square().sum()).sqrt()
    assert errors_of(study, small)["output_error"] == pytest.approx(float(error), rel=1e-4)
    assert describe_checkpoint(model)["memory"] == 16


def test_presets_train_through_time(pair: tuple[Any, Model]) -> None:
    """A preset means other steps for a policy with a memory: fewer sequences at once than states of others."""
    assert kind_of(pair[1]) == "recurrent"
    for name in PRESETS:
        own = dict(preset_steps(name, "recurrent"))
        assert own.keys() <= dict(preset_steps(name)).keys()
        assert "distill" not in own or own["distill"]["batch"] <= 16


@pytest.mark.parametrize("normalize", ["stage", "fold"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_velocities_stay_hidden(wrapped: bool, normalize: Any, tmp_path: Path) -> None:
    """Of rl-zoo's agents without velocities the policy takes the whole observation and sees what SB3's agent saw."""
    import gymnasium
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    name = "Pendulum-v1" if wrapped else "PendulumNoVel-v1"
    folder = tmp_path / "ppo_lstm" / f"{name}_1"
    (folder / name).mkdir(parents=True)
    venv = VecNormalize(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")]), clip_obs=1.5)
    venv.obs_rms.mean, venv.obs_rms.var = np.array([0.1, -0.2, 0.3]), np.array([0.5, 0.6, 0.2])
    kwargs = {"policy_kwargs": {"lstm_hidden_size": 8, "net_arch": [8]}}
    agent = tiny.make_agent("RecurrentPPO", "MlpLstmPolicy", ("box",), ("box",), kwargs, venv)
    agent.save(folder / f"{name}.zip")
    venv.save(str(folder / name / "vecnormalize.pkl"))
    config = "normalize: true\n" + ("env_wrapper: rl_zoo3.wrappers.MaskVelocityWrapper\n" if wrapped else "")
    (folder / name / "config.yml").write_text(config)
    (folder / name / "args.yml").write_text(f"algo: ppo_lstm\nenv: {name}\n")
    model = load_checkpoint(folder, normalize=normalize)
    assert model.env is not None and model.env.id == "Pendulum-v1" and model.meta["unseen"] == [2]
    raw = np.random.default_rng(1).normal(0, 2, (30, 3)).astype(np.float32)
    seen = venv.normalize_obs(raw * np.array([1, 1, 0], np.float32))
    expected = agent.predict(seen, deterministic=True)[0]
    np.testing.assert_allclose(policy_of(model).predict(raw)[0], expected, rtol=1e-4, atol=1e-4)
    assert len(np.unique(expected)) > 20
