"""Laws of the numpy simulator: the module's numbers, bit for bit, at any batch size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_policies import calib, conv, mlp
from torch import nn

from hwmodel import formats
from quantkit.errors import InputError
from quantkit.model import Model
from quantkit.policy import Head, InputStage, Policy
from quantkit.qlayers import QLayer
from quantkit.recipe import Recipe, make_plan, quantize, uniform
from quantkit.simulate import compile_policy

SIGNED = [n for n in formats.all_names() if not n.startswith("u") and n not in ("int1", "binary", "int16", "int16n")]
WIDE = ["int16", "e5m2", "e5m2ieee", "e4m3", "e6m1"]
GRANULARITIES = ["tensor", "row", "group4"]


def observations(model: Model, n: int = 41, seed: int = 9) -> np.ndarray:
    """Raw observations: ordinary ones, zeros and huge ones."""
    obs = calib(model, n, seed).inputs.numpy().copy()
    obs[0] = 0
    if obs.dtype == np.float32:
        obs[1], obs[2] = 1e6, -1e-30
    return obs


def module_outputs(model: Model, obs: np.ndarray) -> np.ndarray:
    """What the torch module gives."""
    with torch.inference_mode():
        return model.module(torch.from_numpy(obs)).numpy()


def same_bits_law(model: Model, compile_: Any = compile_policy) -> None:
    """Simulator and module agree in every bit, for the whole batch, its parts, and single rows."""
    assert isinstance(model.module, Policy)
    obs = observations(model)
    expected = module_outputs(model, obs)
    step = compile_(model.module)
    before = obs.copy()
    for rows in (slice(None), slice(0, 1), slice(3, 10), slice(5, 37), slice(40, 41)):
        found = step(obs[rows])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[rows])
        np.testing.assert_array_equal(module_outputs(model, obs[rows]), expected[rows])
    np.testing.assert_array_equal(obs, before)


def quantized(
    model: Model, weight: str, act: str, granularity: str = "row", *steps: tuple[str, dict[str, Any]]
) -> Model:
    """The model quantized with one plan."""
    return quantize(model, uniform(weight, act, granularity, steps), calib(model))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(formats.all_names()),
    st.sampled_from(SIGNED),
    st.sampled_from(GRANULARITIES),
    st.sampled_from([nn.ReLU, nn.Tanh, nn.ELU, nn.Sigmoid, nn.SiLU, nn.GELU, nn.LeakyReLU]),
    st.integers(0, 5),
)
def test_any_formats_have_the_modules_bits(
    weight: str, act: str, granularity: str, activation: type[nn.Module], seed: int
) -> None:
    """MLPs of every weight format, input format, granularity and activation function."""
    if weight == "int1" or (weight.startswith("e7") and act.startswith("e7")):
        return
    same_bits_law(quantized(mlp((8, 20, 12, 3), act=activation, seed=seed), weight, act, granularity))


@pytest.mark.parametrize("weight", WIDE)
@pytest.mark.parametrize("act", WIDE)
def test_wide_sums_have_the_modules_bits(weight: str, act: str) -> None:
    """Formats whose sums pass 2^24 units, where float32 would round, are as exact as the others."""
    same_bits_law(quantized(mlp((64, 256, 3)), weight, act))


def test_formats_whose_sums_exceed_float32_are_refused() -> None:
    """Products of two e7m0 values reach 2^128, the end of float32: one line says so, naming the layer."""
    with pytest.raises(InputError, match=r"'net.fc1': sums of e7m0 x e7m0 products can exceed float32"):
        quantized(mlp((8, 20, 12, 3)), "e7m0", "e7m0")


@pytest.mark.parametrize("size", [16, 400])
def test_real_sizes_have_the_modules_bits(size: int) -> None:
    """Layers as wide as those of trained agents, which other BLAS kernels multiply."""
    same_bits_law(quantized(mlp((17, size, size, 6), act=nn.Tanh), "int4", "e3m2"))


def test_stage_and_input_factors_have_the_modules_bits() -> None:
    """A normalizing, clipping input stage, smoothing factors and corrected biases change nothing."""
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=8), rng.uniform(0.1, 3, 8)
    for limits in ({}, {"low": -1.5, "high": 1.5}):
        model = mlp((8, 20, 12, 3), act=nn.Tanh, stage=InputStage(mean, std, **limits))
        same_bits_law(quantized(model, "int4", "int5"))
        steps = ("smoothquant", {"explicit": True}), ("gptq", {}), ("bias_correction", {})
        done = quantized(model, "int4", "int5", "row", *steps)
        same_bits_law(done)
    assert any(layer.in_scale is not None for layer in done.qlayers().values())


def test_float_networks_agree_to_rounding_and_do_not_depend_on_the_batch() -> None:
    """Float layers are multiplied row by row: a row's bits are the same in any batch."""
    mixed = Recipe((("*", make_plan("int4", "int4")), ("last", make_plan("float", "int8"))))
    base = mlp((8, 40, 12, 3), act=nn.Tanh)
    for model in (base, quantized(base, "int4", "float"), quantize(base, mixed, calib(base))):
        obs = observations(model)
        step = compile_policy(model.module)  # type: ignore[arg-type]
        whole = step(obs)
        np.testing.assert_allclose(whole, module_outputs(model, obs), rtol=1e-4, atol=1e-4)
        for rows in (slice(0, 1), slice(3, 10), slice(40, 41)):
            np.testing.assert_array_equal(step(obs[rows]), whole[rows])


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_have_the_modules_bits(groups: int) -> None:
    """Images of bytes through convolutions, strides, padding and groups."""
    for weight, act in (("int4", "uint8"), ("e2m1", "e3m2"), ("ternary", "int4")):
        same_bits_law(quantized(conv(groups=groups), weight, act))


def test_actions_are_those_of_predict() -> None:
    """Through the head, the simulator takes the actions that `Policy.predict` takes."""
    head = Head("box", low=(-2.0, -1.0), high=(2.0, 3.0), squash=True)
    model = quantized(mlp((8, 20, 2), head=head), "int4", "int4")
    obs = observations(model)
    policy = model.module
    assert isinstance(policy, Policy)
    np.testing.assert_array_equal(policy.head.actions(compile_policy(policy)(obs)), policy.predict(obs)[0])


def test_a_compiled_policy_keeps_its_weights() -> None:
    """Changing the module afterwards does not change what was compiled."""
    model = quantized(mlp((8, 20, 3)), "int4", "int4")
    obs = observations(model)
    step = compile_policy(model.module)  # type: ignore[arg-type]
    before = step(obs)
    for layer in model.qlayers().values():
        layer.bias.data += 1
        layer.set_weight(None)
    np.testing.assert_array_equal(step(obs), before)
    float_model = mlp((8, 20, 3))
    step = compile_policy(float_model.module)  # type: ignore[arg-type]
    before = step(obs)
    for layer in float_model.layers().values():
        layer.weight.data += 1
        layer.bias.data += 1
    np.testing.assert_array_equal(step(obs), before)


def test_sabotage_a_float32_sum_is_caught() -> None:
    """If wide sums were taken in float32, the law would fail."""
    model = quantized(mlp((64, 256, 3)), "int16", "int16")

    def narrow(policy: Policy) -> Any:
        steps = []
        for module in policy.net.children():
            if isinstance(module, QLayer):
                kernel = module.kernel()
                weight, gain = kernel.weight.float().numpy().T.copy(), np.asarray(kernel.gain, np.float32)
                bias = module.bias.numpy()
                steps.append(
                    lambda x, m=module, w=weight, g=gain, b=bias: (
                        m.input_values(torch.from_numpy(x)).numpy() @ w * g + b
                    )
                )
            else:
                steps.append(lambda x, m=module: m(torch.from_numpy(x)).numpy())

        def run(x: np.ndarray) -> np.ndarray:
            for step in steps:
                x = step(x)
            return x.astype(np.float32)

        return run

    with pytest.raises(AssertionError), torch.inference_mode():
        same_bits_law(model, narrow)
