"""Targets qonnx, finn and qcdq: the consumers' own code computes what the torch module computes."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from hwmodel import formats
from quantkit.errors import InputError
from quantkit.export import export_onnx, open_session
from quantkit.export_qonnx import QONNX, clips_before
from quantkit.model import Calib, Model
from quantkit.policy import Head, InputStage, Policy
from quantkit.qtensor import values_of
from quantkit.recipe import Recipe, make_plan, quantize, uniform
from quantkit.rounding import round_to
from quantkit.verify import verify

INPUTS, HIDDEN, OUTPUTS = 8, 16, 4
STEPS: tuple = (("act_scales", {"scale": "percentile", "percentile": 99.0}), ("rtn", {"scale": "absmax"}))
POW2: tuple = (("act_scales", {"pow2": True}), ("rtn", {"pow2": True}))
CARRIED = [n for n in formats.all_names() if n != "int1"]
# uint1 and int16 are not here: 1 bit as weights has no negative value, 16 bits have a test of their own below
BOTH = [n for n in CARRIED if "16" not in n and not n.startswith(("uint", "e7m0"))]


def states(n: int, seed: int = 3) -> Tensor:
    return 2 * torch.randn(n, INPUTS, generator=torch.Generator().manual_seed(seed))


def mlp(act: type[nn.Module] = nn.ReLU, stage: InputStage | None = None, clip: float = np.inf) -> Model:
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), act(), nn.Linear(HIDDEN, HIDDEN), act(), nn.Linear(HIDDEN, OUTPUTS))
    stage = stage or InputStage(np.linspace(-0.3, 0.4, INPUTS), np.linspace(0.6, 1.7, INPUTS), -clip, clip)
    policy = Policy(stage, net, Head("discrete", nvec=(OUTPUTS,)), (INPUTS,)).eval()
    return Model(policy, states(2), None, {"kind": "policy", "algo": "ppo", "source": "tiny.zip", "sha256": "ab" * 32})


def cnn() -> Model:
    torch.manual_seed(11)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, 1, (1, 0), groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(80, OUTPUTS),
    )  # fmt: skip
    policy = Policy(InputStage(std=255.0), net, Head("discrete", nvec=(OUTPUTS,)), (2, 9, 11)).eval()
    return Model(policy, images(2), None, {"kind": "policy", "sha256": "cd" * 32})


def images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 2, 9, 11), generator=torch.Generator().manual_seed(5)).to(torch.uint8)


def quantized(model: Model, weights: str, acts: str, granularity: str = "row", steps: tuple = STEPS) -> Model:
    inputs = images(32) if model.example.dim() == 4 else states(256)
    return quantize(model, uniform(weights, acts, granularity, steps), Calib(inputs))


def exported(model: Model, tmp_path: Path, to: str = "qonnx", **options: Any) -> Path:
    export_onnx(model, tmp_path / "m.onnx", to=to, overwrite=True, **options)  # type: ignore[arg-type]
    return tmp_path / "m.onnx"


def torch_outputs(model: Model, x: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model.module(x).numpy()


@pytest.fixture
def qonnx_run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """qonnx's executor as a function of a file and inputs; returns every tensor of the graph by name."""
    pytest.importorskip("qonnx", reason="needs the fpga extra")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.change_batchsize import ChangeBatchSize
    from qonnx.transformation.infer_shapes import InferShapes

    # qonnx runs standard nodes in onnxruntime as models of onnx's newest IR version, which onnxruntime may not know
    monkeypatch.setattr(onnx, "IR_VERSION", 10)

    def run(path: Path, x: Tensor) -> dict[str, np.ndarray]:
        model = ModelWrapper(str(path)).transform(ChangeBatchSize(len(x))).transform(InferShapes())
        return execute_onnx(model, {model.graph.input[0].name: x.numpy()}, return_full_exec_context=True)

    return run


def codes_of(model: Model, x: Tensor) -> dict[str, np.ndarray]:
    """Grid values of every quantized input, by layer name, as our layers compute them."""
    found: dict[str, np.ndarray] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, inputs, name=name: found.update({name: module.input_values(inputs[0]).numpy()})
        )
        for name, layer in model.qlayers().items()
    ]
    torch_outputs(model, x)
    for hook in hooks:
        hook.remove()
    return found


def assert_same_integers(model: Model, path: Path, tensors: dict[str, np.ndarray], x: Tensor) -> None:
    """Weights and quantized inputs of all layers are our grid values, outputs are equal bit for bit."""
    graph = onnx.load(path).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    scale_of = {n.output[0]: constants[n.input[1]] for n in graph.node if n.domain == QONNX}
    ours = codes_of(model, x)
    for name, layer in model.qlayers().items():
        flat = name.replace(".", "_")
        act, weight = f"{flat}_input_values", f"{flat}_weight_quant_values"
        np.testing.assert_array_equal(tensors[act] / scale_of[act], ours[name])
        assert layer.q is not None
        values = values_of(layer.q).reshape(layer.q.shape).numpy()
        np.testing.assert_array_equal(tensors[weight] / scale_of[weight], values.T if values.ndim == 2 else values)
    np.testing.assert_array_equal(tensors["actions"], torch_outputs(model, x))


@pytest.mark.parametrize("name", BOTH)
def test_qonnx_reproduces_our_integers_in_every_format(name: str, tmp_path: Path, qonnx_run: Any) -> None:
    """Integers, minifloats, ternary and binary on both sides: codes and outputs in qonnx's executor are ours, exactly.

    Of formats whose sums do not fit 53 bits the outputs are compared to float rounding.
    """
    model, x = quantized(mlp(), name, name), states(100)
    path = exported(model, tmp_path)
    if HIDDEN * formats.int_max(formats.parse(name)) ** 2 < 2**53:
        assert_same_integers(model, path, qonnx_run(path, x), x)
    else:
        found, expected = qonnx_run(path, x)["actions"], torch_outputs(model, x)
        assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("steps", [STEPS, POW2], ids=["real", "pow2"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize(
    ("weights", "acts"),
    [("int4", "int8"), ("int3n", "uint4n"), ("ternary", "int2"), ("binary", "ternary"), ("int8", "binary"),
     ("e2m1", "int4"), ("int5", "e3m2"), ("int8", "int16")],
)  # fmt: skip
def test_qonnx_reproduces_our_integers(
    weights: str, acts: str, granularity: str, steps: tuple, tmp_path: Path, qonnx_run: Any
) -> None:
    """Every pair of families, scales of any value and powers of two, per tensor and row.

    Sums of 16-bit inputs exceed 2^24 and are rounded in qonnx's float32: equal but for boundary flips there.
    """
    model, x = quantized(mlp(), weights, acts, granularity, steps), states(200)
    path = exported(model, tmp_path)
    tensors = qonnx_run(path, x)
    if acts != "int16":
        assert_same_integers(model, path, tensors, x)
    else:
        assert np.abs(tensors["actions"] - torch_outputs(model, x)).max() < 1e-4


def test_groups_and_float_sides(tmp_path: Path, qonnx_run: Any) -> None:
    """Scales per group are carried as a tensor; a float side has no quantizer; a factor per input channel precedes."""
    x = states(100)
    for model in (
        quantized(mlp(), "int4", "int8", "group4"),
        quantized(mlp(), "e2m1", "e3m2", "group8"),
        quantized(mlp(), "int4", "float"),
        quantized(mlp(nn.Tanh), "float", "int8"),
        mlp(nn.GELU),
    ):
        found, expected = qonnx_run(exported(model, tmp_path), x)["actions"], torch_outputs(model, x)
        assert (np.abs(found - expected).max(axis=1) > 1e-5 * np.abs(expected).max()).mean() <= 0.01
    model = quantized(mlp(), "int4", "int8")
    model.qlayers()["net.2"].in_scale = torch.linspace(0.7, 1.3, HIDDEN)
    np.testing.assert_array_equal(qonnx_run(exported(model, tmp_path), x)["actions"], torch_outputs(model, x))


@pytest.mark.parametrize(("weights", "acts"), [("int8", "int8"), ("ternary", "int4"), ("e2m1", "int6")])
def test_convolutions(weights: str, acts: str, tmp_path: Path, qonnx_run: Any) -> None:
    """Strided, padded and grouped convolutions on raw uint8 images give our integers."""
    model, x = quantized(cnn(), weights, acts), images(10)
    path = exported(model, tmp_path)
    assert_same_integers(model, path, qonnx_run(path, x), x)


def test_cleaned_model_runs_the_same(tmp_path: Path, qonnx_run: Any) -> None:
    """qonnx's cleanup, the first step of every tool after it, keeps quantizers and results."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.cleanup import cleanup_model

    model = quantized(mlp(), "int4", "int8", steps=POW2)
    clean = cleanup_model(ModelWrapper(str(exported(model, tmp_path))))
    assert len(clean.get_nodes_by_op_type("Quant")) == 6
    x = states(1)
    found = execute_onnx(clean, {clean.graph.input[0].name: x.numpy()})[clean.graph.output[0].name]
    np.testing.assert_array_equal(found, torch_outputs(model, x))


@pytest.mark.parametrize("name", CARRIED)
def test_quantizers_round_as_ours(name: str, tmp_path: Path, qonnx_run: Any) -> None:
    """Ties, steps, saturation and their neighbors: qonnx's quantizer, the file's function and `round_to` are one."""
    fmt = formats.parse(name)
    levels = np.array(formats.levels(fmt)[:600], np.float32)
    base = np.concatenate([levels, (levels[1:] + levels[:-1]) / 2, [0.0, 2 * formats.max_value(fmt)]])
    base = base.astype(np.float32)
    near = np.concatenate([base, np.nextafter(base, np.float32(np.inf)), np.nextafter(base, np.float32(-np.inf))])
    x = np.concatenate([near, -near]).astype(np.float32)
    x = x[np.isfinite(x)]
    layer = nn.Linear(len(x), 1)
    model = quantize(
        Model(Policy(InputStage(), nn.Sequential(layer), Head("multibinary", nvec=(1,)), (len(x),)).eval(),
              torch.zeros(1, len(x)), None, {"kind": "policy"}),
        uniform("float", "int8"), Calib(torch.ones(4, len(x))),
    )  # fmt: skip
    from quantkit.qlayers import ActQuant

    model.qlayers()["net.0"].set_act(ActQuant(fmt, 1.0))
    inputs = torch.from_numpy(x[None])
    path = exported(model, tmp_path)
    tensors = qonnx_run(path, inputs)
    expected = round_to(inputs, fmt).numpy()
    np.testing.assert_array_equal(tensors["net_0_input_values"], expected)
    file = onnx.load(path)
    file.graph.output.append(onnx.helper.make_tensor_value_info("net_0_input_values", 1, None))
    onnx.save(file, tmp_path / "all.onnx")
    np.testing.assert_array_equal(
        open_session(tmp_path / "all.onnx").run(["net_0_input_values"], {"obs": x[None]})[0], expected
    )


def test_plain_onnxruntime_and_verify_take_the_file(tmp_path: Path) -> None:
    """The quantizers are functions inside the file, so that `quantkit verify` proves it without qonnx."""
    x = states(50)
    for weights, acts in (("int4", "int8"), ("e2m1", "e4m3"), ("binary", "ternary")):
        model = quantized(mlp(clip=2.5), weights, acts)
        result = verify(model, exported(model, tmp_path, postprocess=True), states=x.numpy())
        assert result.ok and result.action_agreement == 1.0, result
        result = verify(model, exported(model, tmp_path), states=x.numpy())
        assert result.ok and result.max_abs < 1e-6, result


def test_structure_and_metadata(tmp_path: Path) -> None:
    """Powers of two stay in Quant, other scales leave it; batch 1, shapes everywhere, opset 13, facts in the file."""
    for steps, inside in ((POW2, True), (STEPS, False)):
        model = quantized(mlp(), "int4", "int8", "tensor", steps)
        file = onnx.load(exported(model, tmp_path))
        kinds = [node.op_type for node in file.graph.node]
        assert kinds.count("Quant") == 6 and kinds.count("MatMul") == 3 and "Identity" not in kinds
        assert kinds.count("Mul") == (0 if inside else 3)
        constants = {t.name: numpy_helper.to_array(t) for t in file.graph.initializer}
        layer = model.qlayers()["net.0"]
        assert layer.act is not None
        assert constants["net_0_input_scale"] == (np.float32(layer.act.scale) if inside else 1)
        first = next(n for n in file.graph.node if n.output[0] == "net_0_input_values")
        assert {a.name: onnx.helper.get_attribute_value(a) for a in first.attribute} == {
            "signed": 1, "narrow": 0, "rounding_mode": b"ROUND",
        }  # fmt: skip
        assert [constants[name] for name in first.input[2:]] == [0, 8]
        named = {v.name for v in file.graph.value_info} | {"obs", "actions"}
        assert {o for n in file.graph.node for o in n.output} <= named
        assert [d.dim_value for d in file.graph.input[0].type.tensor_type.shape.dim] == [1, INPUTS]
        facts = {p.key: p.value for p in file.metadata_props}
        assert facts["target"] == "qonnx" and facts["opset"] == "13" and facts["source_sha256"] == "ab" * 32
        assert json.loads(facts["recipe"])["plan"][0]["weight"] == "int4"
        assert {(o.domain, o.version) for o in file.opset_import} == {("", 13), (QONNX, 1)}


def test_clip_that_the_quantizer_makes_superfluous_is_left_out(tmp_path: Path, qonnx_run: Any) -> None:
    """A saturating first quantizer within the observation clip needs no Max and Min; a wider one keeps them."""
    x = 20 * states(100)
    for clip, kept in ((100.0, False), (0.5, True)):
        model = quantized(mlp(clip=clip), "int4", "int8")
        assert clips_before(model.module) is kept  # type: ignore[arg-type]
        path = exported(model, tmp_path)
        assert ("Min" in [n.op_type for n in onnx.load(path).graph.node]) is kept
        np.testing.assert_array_equal(qonnx_run(path, x)["actions"], torch_outputs(model, x))


def test_clip_at_the_edge_of_the_range() -> None:
    """The clip counts as soon as it keeps one value of the quantizer from being reached, on either side."""
    model = quantized(mlp(clip=100.0), "int4", "int8")
    policy, act = model.module, model.qlayers()["net.0"].act
    assert isinstance(policy, Policy) and act is not None
    for low, high, counts in ((-128, 127, False), (-128, 126, True), (-127, 127, True)):
        policy.stage.low, policy.stage.high = torch.tensor(low * act.scale), torch.tensor(high * act.scale)
        assert clips_before(policy) is counts


def test_finn_keeps_scales_inside(tmp_path: Path, qonnx_run: Any) -> None:
    """Target finn: Relu right before its Quant, real scales inside, no node between; equal but for boundary flips."""
    for weights, acts, granularity in (("int4", "int4", "row"), ("ternary", "int8", "tensor"), ("int8", "int6", "row")):
        model, x = quantized(mlp(), weights, acts, granularity), states(300)
        path = exported(model, tmp_path, "finn")
        kinds = [node.op_type for node in onnx.load(path).graph.node]
        assert not {"Mul", "Clip", "Cast"} & set(kinds)
        assert [after for before, after in pairwise(kinds) if before == "Relu"] == ["Quant", "Quant"]
        found, expected = qonnx_run(path, x)["actions"], torch_outputs(model, x)
        assert (np.abs(found - expected).max(axis=1) > 1e-5 * np.abs(expected).max()).mean() <= 0.01


def test_finn_convolutions(tmp_path: Path, qonnx_run: Any) -> None:
    """A Flatten between ReLU and a linear layer moves behind the quantizer; the first input is signed on request."""
    plan = (*uniform("int4", "uint4").plan, ("first", make_plan("int8", "int8")))
    steps: tuple = (("act_scales", {"unsigned": False}), ("rtn", {}))
    model, x = quantize(cnn(), Recipe(plan, steps), Calib(images(32))), images(20)
    path = exported(model, tmp_path, "finn")
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert [after for before, after in pairwise(kinds) if before == "Relu"] == ["Quant", "Quant"]
    assert "Flatten" in kinds
    found, expected = qonnx_run(path, x)["actions"], torch_outputs(model, x)
    assert (np.abs(found - expected).max(axis=1) > 1e-5 * np.abs(expected).max()).mean() <= 0.1


def relu_less() -> Model:
    model = mlp()
    model.module.net[1] = nn.Identity()  # type: ignore[union-attr, index]
    return model


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: quantized(mlp(), "e2m1", "int4"), {}, ["net.0", "e2m1", "int2..int8"]),
        (lambda: quantized(mlp(), "int4", "e3m2"), {}, ["net.0", "inputs e3m2", "at most 8 bits"]),
        (lambda: quantized(mlp(), "int4", "int16"), {}, ["net.0", "int16", "at most 8 bits"]),
        (lambda: quantized(mlp(), "int16", "int8"), {}, ["net.0", "weights int16", "int2..int8"]),
        (lambda: quantized(mlp(), "int4", "float"), {}, ["net.0", "float inputs", "8 bits"]),
        (lambda: mlp(), {}, ["net.0", "float weights"]),
        (lambda: quantized(mlp(), "int4", "int4", "group4"), {}, ["net.0", "per group4", "tensor or row"]),
        (lambda: quantized(mlp(nn.Tanh), "int4", "int4"), {}, ["net.1", "Tanh", "ReLU"]),
        (lambda: quantized(mlp(), "int4", "ternary"), {}, ["net.2", "after ReLU", "ternary", "uint2"]),
        (lambda: quantized(relu_less(), "int4", "uint4"), {}, ["net.0", "signed", "unsigned=false"]),
        (lambda: quantized(mlp(clip=0.5), "int4", "int4"), {}, ["clipping", "within the clip"]),
        (lambda: quantized(mlp(), "int4", "int4"), {"postprocess": True}, ["--raw"]),
    ],
)
def test_finn_rules(make: Any, options: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    """What FINN does not take is refused with the layer, the reason and what it accepts; nothing is written."""
    with pytest.raises(InputError) as caught:
        exported(make(), tmp_path, "finn", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not list(tmp_path.iterdir())


def test_finn_refuses_a_factor_per_channel(tmp_path: Path) -> None:
    """SmoothQuant's factors would be a scale per channel of the activation."""
    model = quantized(mlp(), "int4", "int4")
    model.qlayers()["net.2"].in_scale = torch.ones(HIDDEN)
    with pytest.raises(InputError, match=r"net\.2.*smoothquant"):
        exported(model, tmp_path, "finn")


@pytest.mark.parametrize(
    ("target", "weights", "acts", "granularity", "words"),
    [
        ("qonnx", "int1", "int4", "row", ["net.0", "int1", "binary", "accepted"]),
        ("qcdq", "e2m1", "int8", "row", ["net.0", "weights e2m1", "int2..int8"]),
        ("qcdq", "int4", "e4m3", "row", ["net.0", "inputs e4m3", "int2..int8"]),
        ("qcdq", "binary", "int8", "row", ["net.0", "binary", "qonnx"]),
        ("qcdq", "int8", "int16", "row", ["net.0", "int16"]),
        ("qcdq", "int4", "int8", "group4", ["net.0", "group4", "tensor or row"]),
    ],
)
def test_refusals(target: str, weights: str, acts: str, granularity: str, words: list[str], tmp_path: Path) -> None:
    """A format that the target cannot carry is refused before any work, with what it accepts."""
    with pytest.raises(InputError) as caught:
        exported(quantized(mlp(), weights, acts, granularity), tmp_path, target)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize(
    ("weights", "acts"), [("int2", "int2"), ("int3n", "uint5n"), ("ternary", "int8"), ("int8", "int4")]
)
def test_qcdq(weights: str, acts: str, granularity: str, tmp_path: Path, qonnx_run: Any) -> None:
    """QCDQ in onnxruntime agrees but for boundary flips, is of opset 13, and qonnx reads our widths from its Clips."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.qcdq_to_qonnx import QCDQToQuant

    model, x = quantized(mlp(), weights, acts, granularity), states(300)
    path = exported(model, tmp_path, "qcdq")
    expected = torch_outputs(model, x)
    found = open_session(path).run(None, {"obs": x.numpy()})[0]
    assert (np.abs(found - expected).max(axis=1) > 1e-5 * np.abs(expected).max()).mean() <= 0.01
    file = onnx.load(path)
    assert [(o.domain, o.version) for o in file.opset_import] == [("", 13)]
    assert {t.data_type for t in file.graph.initializer} <= {1, 2, 3}
    read = ModelWrapper(str(path)).transform(QCDQToQuant())
    nodes = read.get_nodes_by_op_type("Quant")
    widths = [int(read.get_initializer(n.input[3])) for n in nodes]
    assert widths == [formats.bits(layer.act.fmt) for layer in model.qlayers().values() if layer.act]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Failed to propagate quantization bias")  # it then keeps the Add, and is right
@pytest.mark.parametrize(("weights", "acts", "granularity"), [("int6", "int8", "tensor"), ("int4", "int6", "row")])
def test_hls4ml_compiles_the_power_of_two_export(
    weights: str, acts: str, granularity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hls4ml's ONNX front end converts the file and the C++ it writes computes our outputs bit for bit.

    Scales are powers of two, one per tensor or row. Inputs and biases are multiples of 2^-12 here,
    which hls4ml's fixed<40,16> holds; other values it truncates.
    """
    hls4ml = pytest.importorskip("hls4ml", reason="needs the fpga extra")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    from qonnx.core.modelwrapper import ModelWrapper

    monkeypatch.setattr(onnx, "IR_VERSION", 10)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    for layer in (net[0], net[2]):
        layer.bias.data = torch.round(layer.bias.data * 2**12) / 2**12  # type: ignore[union-attr, operator]
    policy = Policy(InputStage(), net, Head("discrete", nvec=(4,)), (8,)).eval()
    x = torch.round(states(2000) * 2**12) / 2**12
    model = quantize(
        Model(policy, x[:2], None, {"kind": "policy"}), uniform(weights, acts, granularity, POW2), Calib(x)
    )
    file = ModelWrapper(str(exported(model, tmp_path)))
    config = hls4ml.utils.config_from_onnx_model(
        file, granularity="name", backend="Vitis", default_precision="fixed<40,16>"
    )
    project = hls4ml.converters.convert_from_onnx_model(
        file, output_dir=str(tmp_path / "hls"), backend="Vitis", hls_config=config, io_type="io_parallel"
    )
    project.compile()
    found = project.predict(np.ascontiguousarray(x.numpy()))
    np.testing.assert_array_equal(found, torch_outputs(model, x))
