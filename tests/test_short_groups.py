"""Groups that do not divide a row: the last of it is shorter, and everything is as if zeros filled it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_policies import calib as policy_calib
from small_policies import conv as conv_policy
from small_policies import mlp as mlp_policy
from torch import nn

from hwmodel import formats
from hwmodel.convert import group_cost
from hwmodel.folding import folds, layer_fold
from hwmodel.formats import Float, Int, parse
from hwmodel.onnx_specs import read_onnx
from hwmodel.spec import LayerSpec, PerGroup, parse_granularity
from quantkit.artifact import load_artifact, save_artifact
from quantkit.errors import InputError
from quantkit.export import export_onnx, open_session
from quantkit.methods.tequila import ternary
from quantkit.qlayers import QLayer
from quantkit.qtensor import dequantize, expand_scale, fit_scale, quantize
from quantkit.recipe import Recipe, make_plan, parse_step
from quantkit.recipe import quantize as run
from quantkit.simulate import compile_policy
from quantkit.specs import bits_per_weight, layer_specs

GROUPS = [("int4", "group16"), ("e2m1", "group32:e8m0"), ("e2m1", "group16:e4m3fn"), ("int3", "group8:e2m3")]
STEPS = ["rtn", "gptq", "gptq:act_order=true,drift=true", "qronos", "adaround:steps=20", "distill:steps=20,rounds=1"]


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g) * torch.exp(torch.randn(rows, 1, generator=g))


def policy_of(weights: str, granularity: str, step: str = "rtn", sizes: tuple[int, ...] = (17, 41, 3)):
    model = mlp_policy(sizes)
    plan = (("*", make_plan(weights, "int8", granularity)),)
    return run(model, Recipe(plan, (parse_step(step),), 0), policy_calib(model))


def groups_of(spec: LayerSpec) -> int:
    """Scales of a row."""
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else spec.in_features
    return -(-spec.in_features // size)


@pytest.mark.parametrize("columns", [17, 31, 33, 47])
@pytest.mark.parametrize("rule", ["absmax", "mse", "importance", "floor", "even"])
@pytest.mark.parametrize(("name", "granularity"), GROUPS)
def test_zeros_fill_the_last_group(name, granularity, rule, columns):
    """Codes and scales are those of the row with zeros behind it, whose codes are those of zero."""
    scales, fmt = parse_granularity(granularity), parse(name)
    if rule in ("floor", "even") and isinstance(scales.scale, Float):
        pytest.skip("such a rule gives powers of two")
    w = weight(7, columns)
    size = scales.size
    full = F.pad(w, (0, -columns % size))
    heavy = torch.rand(columns, generator=torch.Generator().manual_seed(1)) + 0.1
    options = {"importance": heavy} if rule == "importance" else {}
    more = {"importance": F.pad(heavy, (0, -columns % size))} if rule == "importance" else {}
    short = quantize(w, fit_scale(w, fmt, scales, rule, **options), fmt, scales)
    whole = quantize(full, fit_scale(full, fmt, scales, rule, **more), fmt, scales)
    assert torch.equal(short.scale, whole.scale) and short.base == whole.base
    assert torch.equal(short.codes, whole.codes[:, :columns]) and not whole.codes[:, columns:].any()
    assert torch.equal(dequantize(short), dequantize(whole)[:, :columns])
    width = 32 if scales.scale is None else formats.scale_bits(scales.scale)
    counted = 7 * (columns * formats.bits(fmt) + -(-columns // size) * width) + (0 if short.base is None else 32)
    assert short.bits == counted


def test_what_fills_a_group_is_no_sample():
    """Where zeros would count, in means and quantiles of magnitudes and for a format without zero, they do not."""
    w = weight(5, 19)
    for name, rule in (("binary", "mse"), ("int4", "percentile")):
        scale = fit_scale(w, parse(name), PerGroup(16), rule, percentile=50)
        alone = fit_scale(w[:, 16:], parse(name), PerGroup(3), rule, percentile=50)
        assert torch.equal(scale[:, 1:], alone)
    for quantizer in ("absmean", "absmedian", "twn", "lsq"):
        t, a = ternary(w, PerGroup(16), quantizer)
        for part, at in ((slice(0, 16), 0), (slice(16, 19), 1)):
            alone_t, alone_a = ternary(w[:, part], PerGroup(32), quantizer)
            assert torch.equal(t[:, part], alone_t) and torch.equal(a[:, at : at + 1], alone_a)


def test_scales_meet_their_columns():
    """Column j is multiplied by scale j // size."""
    scale = torch.arange(6.0).reshape(2, 3)
    spread = expand_scale(scale, 11, PerGroup(4))
    assert all(spread[i, j] == scale[i, j // 4] for i in range(2) for j in range(11))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("name", "granularity"), GROUPS)
def test_every_method_and_the_artifact(tmp_path, name, granularity, step):
    """All methods give a layer such scales; saved and loaded it is the same, in simulation, too."""
    done = policy_of(name, granularity, step)
    size = parse_granularity(granularity).size
    for layer in done.qlayers().values():
        rows, columns = layer.q.codes.shape
        assert layer.q.scale.shape == (rows, -(-columns // min(size, columns)))
    save_artifact(done, tmp_path / "q")
    loaded = load_artifact(tmp_path / "q")
    assert layer_specs(loaded) == layer_specs(done) and bits_per_weight(loaded) == bits_per_weight(done)
    x = policy_calib(mlp_policy((17, 41, 3)), 50, seed=8).inputs
    with torch.inference_mode():
        y = done.module(x)
        assert torch.equal(loaded.module(x), y)
        assert np.array_equal(compile_policy(loaded.module)(x.numpy()), y.numpy())


@pytest.mark.parametrize("step", ["gptq:act_order=true", "adaround:steps=60"])
@pytest.mark.parametrize(("name", "granularity"), GROUPS)
def test_methods_beat_rounding_to_nearest(name, granularity, step):
    """On the calibration set the first layer's output is nearer to the float one than rounded to nearest."""
    model = mlp_policy((17, 41, 3))
    calib = policy_calib(model)
    errors = []
    for text in ("rtn", step):
        recipe = Recipe((("net.fc1", make_plan(name, "float", granularity)),), (parse_step(text),), 0)
        layer = run(model, recipe, calib).qlayers()["net.fc1"]
        x = model.module.stage(calib.inputs)
        with torch.no_grad():
            errors.append(float((layer(x) - model.layers()["net.fc1"](x)).square().mean()))
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("target", ["qdq", "qdq-real", "qonnx"])
@pytest.mark.parametrize(("name", "granularity"), GROUPS)
@pytest.mark.parametrize("build", ["mlp", "conv"])
def test_exports(tmp_path, build, name, granularity, target):
    """In onnxruntime, or in qonnx's own executor, the outputs are the module's; hwmodel reads the same layers;
    of QONNX, which has a scale for every weight, fewer groups where neighbours happen to be alike.
    """
    if build == "mlp":
        done = policy_of(name, granularity)
        x = policy_calib(mlp_policy((17, 41, 3)), 20, seed=8).inputs
    else:
        model = conv_policy()
        plan = (("*", make_plan(name, "int8", granularity)),)
        done = run(model, Recipe(plan, (), 0), policy_calib(model))
        x = policy_calib(model, 20, seed=8).inputs
    columns = [layer.q.codes.shape[1] for layer in done.qlayers().values()]
    assert any(n % parse_granularity(granularity).size for n in columns)
    export_onnx(done, tmp_path / "x.onnx", to=target)
    if target != "qonnx":
        session = open_session(tmp_path / "x.onnx")
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.inference_mode():
            wanted = done.module(x).numpy()
        exact = target == "qdq" and build == "mlp"
        assert np.array_equal(y, wanted) if exact else np.allclose(y, wanted, rtol=1e-4, atol=1e-5)
    for found, made in zip(read_onnx(tmp_path / "x.onnx"), layer_specs(done), strict=True):
        facts = [(s.in_features, s.out_features, s.weight) for s in (found, made)]
        assert facts[0] == facts[1]
        assert groups_of(found) == groups_of(made) or (target == "qonnx" and groups_of(found) < groups_of(made))


@pytest.mark.parametrize("fmt", ["int4", "int8", "e2m1"])
def test_matmul_nbits(fmt: str, tmp_path: Path) -> None:
    """onnxruntime's MatMulNBits has the same last block: the logits are those of the dense weights."""
    pytest.importorskip("transformers")
    from tiny_decoders import ids, logits_of, network, rounded

    from quantkit import export_nbits
    from quantkit.decoder import decoder_of
    from quantkit.onnx_generate import OnnxDecoder

    model, plain = rounded(network(layers=1), fmt, PerGroup(32))
    assert any(m.q.codes.shape[1] % 32 for m in model.modules() if isinstance(m, QLayer))
    export_nbits.export(decoder_of(model, model.config), tmp_path / "out", level=1)
    y = OnnxDecoder(tmp_path / "out" / "model.onnx").step(ids(2, 7).numpy())
    assert np.abs(y - logits_of(plain, ids(2, 7))).max() < 3e-6


def test_gguf() -> None:
    """A GGUF's blocks of 32 take the scale of the group that they lie in, the last of a row, too."""
    pytest.importorskip("gguf")
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as read

    from quantkit import export_gguf

    layer = nn.Linear(160, 6, bias=False)
    made = QLayer(layer, make_plan("int4", "float", "group64"))
    made.set_weight(quantize(layer.weight, fit_scale(layer.weight, Int(4), PerGroup(64)), Int(4), PerGroup(64)))
    stored = export_gguf.stored(made)
    assert stored.kind == "Q4_0"
    found = read(stored.data, GGMLQuantizationType.Q4_0)
    assert np.allclose(found, dequantize(made.q).numpy(), rtol=2**-10)


def test_compressed_tensors_refuses(tmp_path: Path) -> None:
    """compressed-tensors demands whole groups: one line names the layer, the size and the inputs."""
    pytest.importorskip("transformers")
    from tiny_decoders import network, rounded

    from quantkit import export_compressed
    from quantkit.decoder import decoder_of

    model, _ = rounded(network(layers=1), "int4", PerGroup(32), where="q_proj")
    with pytest.raises(InputError, match=r"q_proj': groups of 32 do not divide its 48 inputs.*accepted") as caught:
        export_compressed.export(decoder_of(model, model.config), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_hardware() -> None:
    """No beat holds inputs of two groups, and sums are as wide as with a last group of full length."""

    def spec(columns: int) -> LayerSpec:
        return LayerSpec("l", "linear", 8, columns, weight=Int(4), act=Int(8), out=Int(8), granularity=PerGroup(16))

    for columns, steps in ((17, {1}), (24, {1, 2, 4, 8}), (32, {1, 2, 4, 8, 16})):
        assert {fold.simd for fold in folds(spec(columns))} == steps
    assert group_cost(spec(17), 12) == group_cost(spec(32), 12) != group_cost(spec(65), 12)
    assert layer_fold(spec(17), 1, 1).cost.luts > 0


def test_sabotage() -> None:
    """The law of zeros can fail: a scale that belongs to another column is seen."""
    w = weight(7, 17)
    scale = fit_scale(w, Int(4), PerGroup(16))
    wrong = scale.repeat_interleave(17 // scale.shape[1] + 1, dim=1)[:, :17]  # as if groups were of equal length
    assert not torch.equal(wrong, expand_scale(scale, 17, PerGroup(16)))
