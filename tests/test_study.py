"""Laws of one design: a row is a function of study and recipe, and says everything."""

from __future__ import annotations

import fnmatch
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_policies import CARTPOLE, calib, cartpole, conv, mlp

from hwmodel.devices import find_device
from hwmodel.estimate import estimate
from quantkit.errors import InputError
from quantkit.model import EnvSpec, Model
from quantkit.pareto import COLUMNS, value
from quantkit.recipe import Recipe, make_plan, quantize, uniform
from quantkit.results import Row
from quantkit.specs import bits_per_weight, layer_specs
from quantkit.study import (
    Settings,
    Study,
    calib_for,
    calibration_states,
    describe_recipe,
    design_id,
    evaluate_design,
    family,
    hardware_costs,
    policy_of,
    prepare,
)

DEVICE = find_device("xc7a35t")
TIMINGS = ("seconds", "quantize_seconds")


def without_timings(row: Row) -> Row:
    """A row as two runs must agree on it."""
    kept = {k: v for k, v in row.items() if k not in TIMINGS}
    return kept | {"score": {k: v for k, v in row["score"].items() if k != "seconds"}} if "score" in row else kept


@pytest.fixture(scope="module")
def study() -> Study:
    """A study of a small CartPole policy, 4 episodes per design."""
    torch.set_num_threads(1)
    return prepare(cartpole(), Settings(episodes=4, device=DEVICE))


def test_the_same_design_gives_the_same_row(study: Study) -> None:
    """Apart from timings a row is reproduced bit for bit."""
    recipe = uniform("int3", "e2m1", steps=(("gptq", {}),))
    first, second = evaluate_design(study, recipe), evaluate_design(study, recipe)
    assert without_timings(first) == without_timings(second)


def test_a_row_is_strict_json_and_has_every_number(study: Study) -> None:
    """A row survives JSON, and each column is found in it unless the kind of policy lacks it."""
    row = evaluate_design(study, uniform("int4", "int4"))
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert {name for name in COLUMNS if value(row, name) is None} == {"action_error", "q_error", "q_regret"}


def test_a_row_agrees_with_its_parts(study: Study) -> None:
    """Costs and sizes are those of quantizing by hand with the same states; the recipe is in the row."""
    recipe = uniform("ternary", "int5", "tensor")
    row = evaluate_design(study, recipe)
    from quantkit.model import Calib

    model = quantize(study.model, recipe, Calib(torch.from_numpy(study.states)))
    assert row["bits_per_weight"] == bits_per_weight(model)
    assert row["weight_kib"] == pytest.approx(
        row["bits_per_weight"] * sum(s.out_features * s.in_features for s in layer_specs(model)) / 8192
    )
    assert row["cost"]["luts"] == estimate(layer_specs(model), DEVICE).luts
    assert Recipe.from_json(row["recipe"]) == recipe and row["id"] == design_id(recipe)
    assert row["score"]["n"] == 4 and row["seeds"] == [1000, 1003]


def test_what_a_design_makes_impossible_is_recorded(study: Study) -> None:
    """Inputs of a format without positive values, and an unknown step, give a row with `error` and no score."""
    for recipe in (uniform("int4", "int1"), uniform("int4", "int4", steps=(("gptk", {}),))):
        row = evaluate_design(study, recipe)
        assert row["error"] and "score" not in row
        json.dumps(row, allow_nan=False)


def test_designs_do_not_influence_each_other(study: Study) -> None:
    """A row is the same whatever was evaluated before it."""
    recipe, other = uniform("int4", "int4"), uniform("binary", "e3m2", steps=(("bias_correction", {}),))
    alone = evaluate_design(study, recipe)
    evaluate_design(study, other)
    assert without_timings(evaluate_design(study, recipe)) == without_timings(alone)


def test_float_is_its_own_reference(study: Study) -> None:
    """16-bit weights and inputs take the float policy's actions in nearly every state and its returns."""
    row = evaluate_design(study, uniform("int16", "int16"))
    assert row["fidelity"]["agreement"] > 0.99
    assert row["score"]["returns"] == pytest.approx(study.reference.returns, abs=5)


def test_one_episode_is_enough_for_a_row() -> None:
    """With one episode there is no standard error, and the row is still strict JSON."""
    small = prepare(cartpole(), Settings(episodes=1, device=DEVICE))
    row = evaluate_design(small, uniform("int4", "int4"))
    json.dumps(row, allow_nan=False)
    assert row["score"]["stderr"] is None and row["score"]["n"] == 1


def test_calibration_never_meets_an_evaluation_episode(study: Study) -> None:
    """No calibration state is the first state of an evaluation episode, and the states are reproducible."""
    import gymnasium

    env = gymnasium.make(CARTPOLE.id)
    starts = {env.reset(seed=study.settings.seed + i)[0].tobytes() for i in range(study.settings.episodes)}
    env.close()
    assert not starts & {row.tobytes() for row in study.states}
    np.testing.assert_array_equal(calibration_states(cartpole()), study.states)


def test_the_margin_is_a_fraction_of_float_minus_random(study: Study) -> None:
    """Five percent of the distance of the means."""
    distance = abs(study.reference.mean - study.random.mean)
    assert study.margin == pytest.approx(0.05 * distance)


def test_hardware_cost_is_an_estimate_an_error_or_nothing(study: Study) -> None:
    """No device: None. Float activations or an impossible target: a reason. Else the estimate's numbers."""
    model = cartpole()
    done = quantize(model, uniform("int4", "int4"), calib(model))
    assert hardware_costs(done, Settings()) == {"cost": None}
    floats = quantize(model, uniform("int4", "float"), calib(model))
    assert "error" in hardware_costs(floats, Settings(device=DEVICE))["cost"]
    assert "error" in hardware_costs(done, Settings(device=DEVICE, latency_us=1e-6))["cost"]
    cost = hardware_costs(done, Settings(device=DEVICE))["cost"]
    assert {"luts", "ffs", "dsps", "bram18", "cycles", "latency_us", "fits", "model"} <= set(cost)
    json.dumps(cost, allow_nan=False)


def test_ids_name_the_content() -> None:
    """Equal recipes have equal ids, any difference another one; spelling does not count."""
    recipes = [
        uniform("int4", "int4"), uniform("int4", "int5"), uniform("int4", "int4", "tensor"),
        uniform("int4", "int4", seed=1), uniform("int4", "int4", steps=(("rtn", {}),)),
        uniform("int4", "int4", steps=(("rtn", {"scale": "absmax"}),)),
    ]  # fmt: skip
    assert len({design_id(r) for r in recipes}) == len(recipes)
    assert design_id(uniform("INT4 ", "int4", "channel")) == design_id(recipes[0])
    assert design_id(Recipe.from_json(recipes[5].to_json())) == design_id(recipes[5])


def test_the_texts_of_a_row_say_every_layers_formats() -> None:
    """Read from the left, the last that fits a layer counts: as in the recipe, whose redundant exceptions are left
    out."""
    rng, layers = random.Random(4), ("net.fc1", "net.fc2", "net.head")
    patterns, names = ("first", "last", "net.fc*", *layers), ("int2", "int3", "int4")
    for _ in range(500):
        chosen = [
            (p, make_plan(rng.choice(names), rng.choice(names))) for p in rng.choices(patterns, k=rng.randint(0, 4))
        ]
        recipe = Recipe((("*", make_plan("int2", "int4")), *chosen), ())
        told = describe_recipe(recipe)
        for side, key in (("weight", "weights"), ("act", "acts")):
            base, *others = told[key].split()
            pairs = [("*", base), *(text.split("=") for text in others)]
            for i, layer in enumerate(layers):
                plan = recipe.plan_for(layer, i, len(layers))
                places = (layer, {0: "first", 2: "last"}.get(i, "-"))
                fits = [f for p, f in pairs if any(fnmatch.fnmatchcase(place, p) for place in places)]
                assert plan is not None and fits[-1] == str(getattr(plan, side)), (recipe, told)
    one = Recipe((("*", make_plan("int2", "int2")), ("net.fc1", make_plan("int2", "int4"))), ())
    assert (describe_recipe(one)["weights"], describe_recipe(one)["acts"]) == ("int2", "int2 net.fc1=int4")


def test_families_by_the_formats_used() -> None:
    """Integers (ternary and binary too), minifloats, or both."""
    assert family(uniform("int4", "uint4")) == family(uniform("ternary", "int4")) == "integer"
    assert family(uniform("e2m1", "e4m3fn")) == "minifloat"
    assert family(uniform("int4", "e2m1")) == family(uniform("e2m1", "int8")) == "mixed"
    first = Recipe((("*", make_plan("int4", "int4")), ("first", make_plan("e4m3", "e4m3"))))
    assert family(first) == "mixed"


def test_a_network_without_episodes_is_told_what_is_missing() -> None:
    """No policy, or no environment: one line with the option that helps."""
    with pytest.raises(InputError, match="not a policy"):
        policy_of(Model(torch.nn.Linear(2, 2), torch.zeros(1, 2)))
    with pytest.raises(InputError, match="--env"):
        policy_of(mlp((4, 8, 2)))
    with pytest.raises(InputError):
        prepare(mlp((4, 8, 2), env=EnvSpec("NoSuchEnv-v0")), Settings(episodes=1))
    with pytest.raises(InputError):
        prepare(mlp((5, 8, 2), env=CARTPOLE), Settings(episodes=1))


def test_calibration_inputs_come_from_files(tmp_path: Path) -> None:
    """The first n rows of an .npy or .npz, in the type of the network's input."""
    model = mlp((4, 8, 2))
    array = np.random.default_rng(0).normal(size=(20, 4))
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", array)
    for name in ("a.npy", "a.npz"):
        found = calib_for(model, 7, inputs=tmp_path / name).inputs
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), array[:7].astype(np.float32))


def bad_inputs() -> dict[str, Any]:
    """Files that are no calibration inputs for four numbers."""
    return {
        "wrong shape": np.zeros((3, 5)),
        "no rows": np.zeros((0, 4)),
        "a scalar": np.float64(1),
        "objects": np.array([{"a": 1}], dtype=object),
        "text": np.array([list("abcd")]),
        "complex": np.zeros((3, 4), complex),
    }


@pytest.mark.parametrize("kind", [*bad_inputs(), "garbage", "empty", "empty npz"])
def test_bad_calibration_inputs_are_one_line(kind: str, tmp_path: Path) -> None:
    """Whatever the file holds instead of numbers of the right shape is an InputError that names it."""
    path = tmp_path / "x.npy"
    if kind == "garbage":
        path.write_bytes(b"\0\1garbage")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "empty npz":
        path = tmp_path / "x.npz"
        np.savez(path)
    else:
        np.save(path, bad_inputs()[kind], allow_pickle=True)
    with pytest.raises(InputError, match=r"x\.np") as caught:
        calib_for(mlp((4, 8, 2)), 7, inputs=path)
    assert "\n" not in str(caught.value)


def test_a_network_that_is_no_policy_needs_inputs() -> None:
    """Without a policy there are no rollouts: the message names --inputs."""
    with pytest.raises(InputError, match="--inputs"):
        calib_for(Model(torch.nn.Linear(2, 2), torch.zeros(1, 2)), 7)


def test_images_are_calibrated_in_their_own_type(tmp_path: Path) -> None:
    """Bytes stay bytes."""
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 9, 9), np.uint8))
    assert calib_for(conv(), 2, inputs=tmp_path / "x.npy").inputs.dtype == torch.uint8


def test_tokens_are_whole_and_have_an_embedding(tmp_path: Path) -> None:
    """Ids that the embedding lacks, and numbers between two ids, are refused with the file and the range."""
    net = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    model = Model(net, torch.zeros(1, 3, dtype=torch.int64))
    for token, words in (
        (9, "holds 0..9; the network's embedding has 0..8"),
        (-1, "holds -1..0"),
        (0.5, "such as 0.5"),
    ):
        ids = np.zeros((4, 3), type(token))
        ids[2, 1] = token
        np.save(tmp_path / "ids.npy", ids)
        with pytest.raises(InputError, match=words) as caught:
            calib_for(model, None, inputs=tmp_path / "ids.npy")
        assert "ids.npy" in str(caught.value)
    np.save(tmp_path / "ids.npy", np.full((4, 3), 8.0))
    assert calib_for(model, None, inputs=tmp_path / "ids.npy").inputs.dtype == torch.int64


def test_sabotage_a_random_step_is_caught(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a method drew from an unseeded generator, the reproducibility law would fail."""
    from quantkit import shelves

    rtn = shelves.methods()["rtn"]
    real = rtn.apply

    def noisy(model: Model, calib: Any, **options: Any) -> dict[str, float]:
        for layer in model.qlayers().values():
            layer.bias.data += torch.rand(1).item()
        return real(model, calib, **options)

    monkeypatch.setattr(rtn, "apply", noisy)
    with pytest.raises(AssertionError):
        rows = [without_timings(evaluate_design(study, uniform("int4", "int4"))) for _ in range(2)]
        assert rows[0] == rows[1] and not math.isnan(rows[0]["score"]["mean"])
