"""Laws of recipes: plain data that says everything, and a copy that is quantized as it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_policies import calib, cartpole, conv, mlp
from torch import nn

from hwmodel import formats
from quantkit import shelves
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.recipe import (
    Recipe,
    format_name,
    full_steps,
    make_plan,
    parse_format,
    parse_step,
    quantize,
    step_options,
    uniform,
)

NAMES = ["float", *formats.all_names()]
PLANS = st.builds(
    make_plan, st.sampled_from(NAMES), st.sampled_from(NAMES), st.sampled_from(["tensor", "row", "group8"])
)
STEPS = st.sampled_from(["rtn", "gptq:damp=0.05", "equalize", "act_scales:pow2=true", "rtn:scale=absmax"]).map(
    parse_step
)
RECIPES = st.builds(
    lambda plan, steps, seed: Recipe(tuple(plan), tuple(steps), seed),
    st.lists(st.tuples(st.sampled_from(["*", "first", "last", "net.fc?", "net.head"]), PLANS), min_size=1, max_size=4),
    st.lists(STEPS, max_size=4),
    st.integers(0, 2**32),
)


@settings(max_examples=100, deadline=None)
@given(RECIPES)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    """Through JSON text and back it is the same recipe."""
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_recorded_recipe_means_what_it_meant():
    """Of an option whose default has changed since, a record holds what it is, and one without it means what it was."""
    plan = (("*", make_plan("ternary", "float")),)
    record = Recipe(plan, (("tequila", {"steps": 5}),)).to_json()
    assert record["steps"] == [["tequila", {"constant": "mean", "steps": 5}]]
    assert Recipe.from_json(record).steps == (("tequila", {"constant": "mean", "steps": 5}),)
    record["steps"] = [["tequila", {"steps": 5}]]
    assert Recipe.from_json(record).steps == (("tequila", {"constant": "lambda", "steps": 5}),)


@pytest.mark.parametrize("name", NAMES)
def test_format_names_are_read_back(name: str) -> None:
    """parse_format inverts format_name, "float" included, in any case and with spaces around."""
    assert format_name(parse_format(f" {name.upper()} ")) == name


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("gptk", "gptq"), ("equalise", "equalize"), ("RTN", "rtn"), ("smooth", "smoothquant"), ("", "rtn")],
)
def test_an_unknown_step_is_answered_with_the_nearest(text: str, nearest: str) -> None:
    """The message suggests one step and lists them all."""
    with pytest.raises(InputError) as caught:
        parse_step(text)
    assert "did you mean" in str(caught.value) and "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in shelves.method_names())
    if text not in ("", "RTN"):
        assert f"did you mean {nearest!r}" in str(caught.value)


@pytest.mark.parametrize("name", shelves.method_names())
def test_every_default_can_be_written_as_an_option(name: str) -> None:
    """For each method, each option given with its default as text is parsed to that default."""
    for key, parameter in step_options(name).items():
        assert parse_step(f"{name}:{key}={parameter.default}") == (name, {key: parameter.default}), key


@pytest.mark.parametrize("name", shelves.method_names())
def test_an_unknown_option_is_answered_with_the_known(name: str) -> None:
    """The message lists the options of that step."""
    with pytest.raises(InputError) as caught:
        parse_step(f"{name}:no_such=1")
    assert all(key in str(caught.value) for key in step_options(name))


def test_an_option_beyond_its_limits_is_refused_before_any_work() -> None:
    """As text and as data, with what is accepted; each of these would end in nonsense, a hang or a traceback."""
    beyond = {
        "act_scales": {"percentile": 200.0, "samples": 0},
        "adaround": {"batch": 0, "steps": -5, "warmup": 2.0, "samples": 0, "beta_end": -1.0},
        "distill": {"rounds": 0, "states": 0, "slow": -1.0},
        "equalize": {"alpha": 7.0, "sweeps": 0, "tolerance": -1.0},
        "gptq": {"damp": -1.0, "block": 0, "ridge": -0.5, "samples": -1},
        "smoothquant": {"alpha": -0.1},
    }
    for name, options in beyond.items():
        for key, value in options.items():
            for attempt in (
                lambda name=name, key=key, value=value: parse_step(f"{name}:{key}={value}"),
                lambda name=name, key=key, value=value: full_steps(
                    uniform("int4", "int4", steps=((name, {key: value}),))
                ),
            ):
                with pytest.raises(InputError, match=f"{key}={value}; accepted: "):
                    attempt()
    with pytest.raises(InputError, match="did you mean 'act_order'"):
        parse_step("gptq:actorder=true")
    with pytest.raises(InputError, match="no option 'dampen'; did you mean 'damp'"):
        full_steps(uniform("int4", "int4", steps=(("gptq", {"dampen": 0.1}),)))
    assert parse_step("gptq:samples=0") == ("gptq", {"samples": 0})


@pytest.mark.parametrize(
    "text",
    [
        "gptq:damp=much",
        "gptq:act_order=maybe",
        "gptq:scale=best",
        "gptq:damp",
        "gptq:block=1.5",
        "gptq:damp=nan",
        "gptq:damp=inf",
    ],
)
def test_an_option_of_the_wrong_kind_is_named(text: str) -> None:
    """The message is one line that names the step; numbers must be finite."""
    with pytest.raises(InputError, match="gptq") as caught:
        parse_step(text)
    assert "\n" not in str(caught.value)


def test_implied_steps_are_added_once_and_in_order() -> None:
    """Activation scales come before the first step that sets weights, rounding after the last that prepares."""
    assert names("") == ["act_scales", "rtn"]
    assert names("gptq") == ["act_scales", "gptq"]
    assert names("equalize") == ["equalize", "act_scales", "rtn"]
    assert names("equalize gptq bias_correction") == ["equalize", "act_scales", "gptq", "bias_correction"]
    assert names("act_scales") == ["act_scales", "rtn"]
    assert names("bias_correction") == ["act_scales", "rtn", "bias_correction"]
    assert names("act_scales bias_correction") == ["act_scales", "rtn", "bias_correction"]
    assert names("rtn act_scales") == ["rtn", "act_scales"]


def names(steps: str) -> list[str]:
    """The full steps of a pipeline."""
    return [name for name, _ in full_steps(uniform("int4", "int4", steps=tuple((s, {}) for s in steps.split())))]


def test_full_steps_are_complete() -> None:
    """Adding the implied steps twice changes nothing."""
    for pipeline in ((), (("gptq", {}),), (("equalize", {}), ("bias_correction", {}))):
        once = full_steps(uniform("int4", "int4", steps=pipeline))
        assert full_steps(uniform("int4", "int4", steps=once)) == once


def test_later_patterns_win_and_first_and_last_are_positions() -> None:
    """Each layer gets the plan of the last entry that matches it."""
    model = cartpole()
    entries = [("*", "int4"), ("first", "int8"), ("last", "e4m3"), ("net.fc2", "ternary")]
    recipe = Recipe(tuple((pattern, make_plan(weight, "float")) for pattern, weight in entries))
    done = quantize(model, recipe, calib(model))
    assert [str(layer.q.fmt) for layer in done.qlayers().values() if layer.q] == ["int8", "ternary", "e4m3"]
    swapped = Recipe(tuple(reversed(recipe.plan)))
    done = quantize(model, swapped, calib(model))
    assert [str(layer.q.fmt) for layer in done.qlayers().values() if layer.q] == ["int4", "int4", "int4"]


def test_float_layers_stay_untouched() -> None:
    """A layer planned as float/float is not wrapped and keeps its tensors."""
    model = cartpole()
    recipe = Recipe((("*", make_plan("int4", "int8")), ("last", make_plan("float", "float"))))
    done = quantize(model, recipe, calib(model))
    kept = done.layers()["net.head"]
    assert type(kept) is nn.Linear and torch.equal(kept.weight, model.layers()["net.head"].weight)


def weights_of(method: str) -> str:
    """A weight format that the method takes: those that train are for ternary weights, bands for binary ones."""
    changes = shelves.methods()[method].CHANGES
    return "ternary" if "trained" in changes else "binary" if "bands" in changes else "int3"


@pytest.mark.parametrize("method", [m for m in shelves.method_names() if m != "rotate"])  # it refuses such a network
def test_quantize_does_not_change_its_input(method: str) -> None:
    """Module, metadata and calibration inputs are the same afterwards, bit for bit, hooks included."""
    model, recipe = cartpole(act=nn.ReLU), uniform(weights_of(method), "int4", steps=((method, {}),))
    data = calib(model)
    state = {k: v.clone() for k, v in model.module.state_dict().items()}
    meta, inputs = json.dumps(model.meta), data.inputs.clone()
    flags = [p.requires_grad for p in model.module.parameters()]
    done = quantize(model, recipe, data)
    assert not model.qlayers() and done.qlayers()
    assert all(torch.equal(state[k], v) for k, v in model.module.state_dict().items())
    assert json.dumps(model.meta) == meta and torch.equal(data.inputs, inputs)
    assert [p.requires_grad for p in model.module.parameters()] == flags
    for module in [*model.module.modules(), *done.module.modules()]:
        assert not module._forward_hooks and not module._forward_pre_hooks
    json.dumps(done.meta, allow_nan=False)


@pytest.mark.parametrize("method", [m for m in shelves.method_names() if m != "rotate"])  # it refuses such a network
def test_the_same_recipe_gives_the_same_bits(method: str) -> None:
    """Two runs agree bit for bit, even with the same calibration set used twice."""
    model, recipe = cartpole(act=nn.ReLU), uniform(weights_of(method), "e2m1", steps=((method, {}),), seed=3)
    data = calib(model)
    first, second = quantize(model, recipe, data), quantize(model, recipe, data)
    for a, b in zip(first.qlayers().values(), second.qlayers().values(), strict=True):
        assert a.q is not None and b.q is not None and a.act == b.act
        assert torch.equal(a.effective_weight(), b.effective_weight()) and torch.equal(a.bias, b.bias)


def test_every_planned_format_is_what_the_layers_hold() -> None:
    """The formats in use are those of the plan; a signed integer input that is never negative may be unsigned."""
    model = mlp((6, 16, 8, 3))
    for weight, act in [
        ("int4", "int4"),
        ("e2m1", "e4m3fn"),
        ("ternary", "uint8"),
        ("float", "int8"),
        ("int8n", "float"),
    ]:
        for layer in quantize(model, uniform(weight, act), calib(model)).qlayers().values():
            assert format_name(layer.q.fmt if layer.q else None) == weight
            assert format_name(layer.act.fmt if layer.act else None) in (act, f"u{act}")


def test_a_pattern_that_matches_nothing_lists_the_layers() -> None:
    """The message names the pattern and every layer."""
    model = cartpole()
    recipe = Recipe((("*", make_plan("int4", "int4")), ("fc9", make_plan("int8", "int8"))))
    with pytest.raises(InputError) as caught:
        quantize(model, recipe, calib(model))
    assert all(text in str(caught.value) for text in ("fc9", *model.layers()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_weight_that_is_not_finite_is_located(bad: float, kind: str) -> None:
    """The message names layer, tensor and index."""
    model = cartpole()
    tensor = getattr(model.layers()["net.fc2"], kind).data
    tensor[(2,) * tensor.dim()] = bad
    with pytest.raises(InputError) as caught:
        quantize(model, uniform("int4", "int4"), calib(model))
    assert "net.fc2" in str(caught.value) and kind in str(caught.value)
    assert str((2,) * tensor.dim()) in str(caught.value)


def test_calibration_that_is_not_finite_is_located() -> None:
    """The message gives the index of the first bad number."""
    model = cartpole()
    inputs = torch.zeros(5, 4)
    inputs[3, 1] = float("nan")
    with pytest.raises(InputError, match=r"\(3, 1\)"):
        quantize(model, uniform("int4", "int4"), Calib(inputs))


def test_what_cannot_be_quantized_is_an_input_error() -> None:
    """No layers and unknown steps are told in one line."""
    empty = Model(nn.Sequential(nn.ReLU()), torch.zeros(1, 4))
    with pytest.raises(InputError, match="no linear layer, convolution or embedding"):
        quantize(empty, uniform("int4", "int4"), Calib(torch.zeros(3, 4)))
    model = cartpole()
    with pytest.raises(InputError):
        quantize(model, uniform("int4", "int4", steps=(("gptk", {}),)), calib(model))


def test_what_no_method_handles_stays_float_and_says_so() -> None:
    """A convolution with circular padding keeps its float weight, with the reason in the facts."""
    image = conv(padding=1, padding_mode="circular")
    done = quantize(image, uniform("int4", "int4"), calib(image))
    assert done.meta["float_layers"] == {"net.conv2": "padding mode 'circular' cannot be quantized; accepted: zeros"}
    assert isinstance(done.layers()["net.conv2"], nn.Conv2d)


def test_an_already_quantized_model_is_refused() -> None:
    """Formats asked for a second time would be recorded but not used."""
    model = cartpole()
    done = quantize(model, uniform("int4", "int4"), calib(model))
    with pytest.raises(InputError, match="already quantized"):
        quantize(done, uniform("int8", "int8"), calib(model))


def test_progress_names_every_step_and_ends_complete() -> None:
    """The calls count from 0 to the number of steps."""
    calls: list[tuple[Any, ...]] = []
    model = cartpole()
    quantize(model, uniform("int4", "int4"), calib(model), lambda *call: calls.append(call))
    assert calls == [("act_scales", 0, 2), ("rtn", 1, 2), ("done", 2, 2)]


def test_sabotage_a_quantize_without_its_copy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """If `copy` gave the model itself, the law of the unchanged input would fail."""
    monkeypatch.setattr(Model, "copy", lambda self: self)
    with pytest.raises(AssertionError):
        test_quantize_does_not_change_its_input("rtn")
