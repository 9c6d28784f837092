"""quantkit.export and quantkit.onnx_formats: an ONNX file computes what the torch module computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from hwmodel import formats
from hwmodel.formats import BINARY, Float
from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.export import IR_VERSION, build_onnx, canonical, export_onnx, open_session
from quantkit.model import Calib, EnvSpec, Model
from quantkit.onnx_formats import DOMAIN, OPSET, quantize_function
from quantkit.policy import Head, InputStage, Policy
from quantkit.presets import preset_steps
from quantkit.recipe import Recipe, make_plan, quantize, uniform
from quantkit.rounding import round_to

# Cheap rules; the percentile lets some inputs saturate.
STEPS = (("act_scales", {"scale": "percentile", "percentile": 99.0}), ("rtn", {"scale": "absmax"}))
INPUTS, HIDDEN, OUTPUTS = 16, 24, 6
NAMES = formats.all_names()
FUNCTION_FORMATS = [name for name in NAMES if isinstance(formats.parse(name), Float) or formats.parse(name) == BINARY]


def states(n: int, seed: int = 3) -> Tensor:
    return 2 * torch.randn(n, INPUTS, generator=torch.Generator().manual_seed(seed))


def mlp(act: type[nn.Module] = nn.ReLU, head: Head | None = None) -> Model:
    torch.manual_seed(7)
    head = head or Head("discrete", nvec=(OUTPUTS,))
    net = nn.Sequential(
        nn.Linear(INPUTS, HIDDEN), act(), nn.Linear(HIDDEN, HIDDEN), act(), nn.Linear(HIDDEN, head.outputs)
    )
    mean, std = np.linspace(-0.3, 0.4, INPUTS), np.linspace(0.6, 1.7, INPUTS)
    policy = Policy(InputStage(mean, std, -2.7, 2.9), net, head, (INPUTS,)).eval()
    spaces = {"observation_space": {"kind": "Box", "shape": [INPUTS]}, "action_space": {"kind": "Discrete"}}
    meta = {"kind": "policy", "algo": "ppo", "source": "tiny.zip", "sha256": "ab" * 32, **spaces}
    return Model(policy, states(2), EnvSpec("CartPole-v1"), meta)


def cnn() -> Model:
    torch.manual_seed(11)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, (1, 0), groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(192, 5),
    )
    policy = Policy(InputStage(std=255.0), net, Head("discrete", nvec=(5,)), (3, 11, 12)).eval()
    return Model(policy, images(2), None, {"kind": "policy", "sha256": "cd" * 32})


def images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 11, 12), generator=torch.Generator().manual_seed(5)).to(torch.uint8)


def quantized(model: Model, weights: str, acts: str, granularity: str = "row") -> Model:
    inputs = images(32) if model.example.dim() == 4 else states(256)
    return quantize(model, uniform(weights, acts, granularity, STEPS), Calib(inputs))


def run(path: Path, x: Tensor) -> np.ndarray:
    session = open_session(path)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def both(model: Model, path: Path, x: Tensor, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """(onnxruntime, torch) outputs of an exported model."""
    export_onnx(model, path, overwrite=True, **options)  # type: ignore[arg-type]
    with torch.inference_mode():
        return run(path, x), model.module(x).numpy()


def worst(pair: tuple[np.ndarray, np.ndarray]) -> float:
    """Largest difference, in parts of the largest torch output."""
    return float(np.abs(pair[0] - pair[1]).max() / np.abs(pair[1]).max())


def optimized(model: Model, tmp_path: Path, **options: object) -> onnx.ModelProto:
    """What onnxruntime's default optimizations make of the exported graph."""
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 4
    session_options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    data = build_onnx(model, **options).SerializeToString()  # type: ignore[arg-type]
    onnxruntime.InferenceSession(data, session_options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "optimized.onnx")


def awkward(fmt: formats.Format) -> np.ndarray:
    """Levels, ties, powers of two, each with its neighbors; specials; random bit patterns of every binade."""
    levels = np.array(formats.levels(fmt), np.float32)
    base = np.concatenate([levels, (levels[1:] + levels[:-1]) / 2, np.ldexp(np.float32(1), np.arange(-149, 128))])
    base = base.astype(np.float32)
    near = np.concatenate([base, np.nextafter(base, np.float32(np.inf)), np.nextafter(base, np.float32(-np.inf))])
    bits = np.random.default_rng(1).integers(0, 2**32, 20_000, dtype=np.uint32)
    return np.concatenate([near, -near, np.float32([np.inf, -np.inf, 0.0, -0.0, np.nan]), bits.view(np.float32)])


@pytest.mark.parametrize("name", FUNCTION_FORMATS)
def test_minifloat_function_equals_round_to_on_every_awkward_float(name: str) -> None:
    """The model-local function rounds every float as `round_to` does: ties, ulps around binades, NaN, infinity."""
    fmt = formats.parse(name)
    function = quantize_function(fmt)  # type: ignore[arg-type]
    graph = helper.make_graph(
        [helper.make_node(function.name, ["x", "scale"], ["y"], domain=DOMAIN)],
        "rounding",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = awkward(fmt)
    for scale in (1.0, 0.37):
        found = session.run(None, {"x": x, "scale": np.array(scale, np.float32)})[0]
        np.testing.assert_array_equal(found, round_to(torch.from_numpy(x) / scale, fmt).numpy())


# No positive value, tested below; products of e7m0 overflow float32.
ALONE = (
    "int1",
    "ternary",
    "binary",
    "e7m0",
    "e7m0fn",
)
BOTH = [n for n in NAMES if n not in ALONE and "16" not in n]


@pytest.mark.parametrize("name", BOTH)
def test_every_format_is_exact_in_a_relu_network(name: str, tmp_path: Path) -> None:
    """Weights and inputs in the same format: onnxruntime and torch agree bit for bit, where sums fit 53 bits."""
    fmt = formats.parse(name)
    found, expected = both(quantized(mlp(), name, name), tmp_path / "m.onnx", states(200))
    if HIDDEN * formats.int_max(fmt) ** 2 < 2**53:
        np.testing.assert_array_equal(found, expected)
    else:
        assert worst((found, expected)) < 1e-6


@pytest.mark.parametrize("weights", ["int1", "int4", "ternary", "binary", "e2m1"])
@pytest.mark.parametrize("acts", ["uint1", "int2", "ternary", "binary", "uint8n", "e3m0"])
def test_few_levels_are_exact(weights: str, acts: str, tmp_path: Path) -> None:
    """Ternary, binary and 1-bit numbers combine with everything, exactly."""
    np.testing.assert_array_equal(*both(quantized(mlp(), weights, acts), tmp_path / "m.onnx", states(100)))


@pytest.mark.parametrize("name", ["int16", "int16n", "uint16", "uint16n"])
def test_sixteen_bits_are_exact(name: str, tmp_path: Path) -> None:
    """Sums of 16-bit products do not fit 24 bits and are taken in float64, exactly."""
    np.testing.assert_array_equal(*both(quantized(mlp(), "int8", name), tmp_path / "m.onnx", states(200)))
    np.testing.assert_array_equal(*both(quantized(mlp(), name, "int16"), tmp_path / "m.onnx", states(200)))


@pytest.mark.parametrize("granularity", ["tensor", "row", "group8"])
@pytest.mark.parametrize(
    ("weights", "acts"),
    [("int8", "int8"), ("int3n", "int5"), ("e2m3", "e4m3"), ("e7m0", "int4"), ("int16", "float"), ("float", "int6")],
)
def test_granularities(weights: str, acts: str, granularity: str, tmp_path: Path) -> None:
    """Scales per tensor, row and group: exact where both sides are quantized, else float rounding."""
    pair = both(quantized(mlp(), weights, acts, granularity), tmp_path / "m.onnx", states(200))
    if "float" in (weights, acts):
        assert (np.abs(pair[0] - pair[1]).max(axis=1) > 1e-5 * np.abs(pair[1]).max()).mean() <= 0.01
    else:
        np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize("layer", [nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardtanh])
def test_activations(layer: type[nn.Module], tmp_path: Path) -> None:
    """Every activation agrees in a float network to rounding, and in a quantized one but for boundary flips."""
    assert worst(both(mlp(layer), tmp_path / "m.onnx", states(200))) < 1e-6
    found, expected = both(quantized(mlp(layer), "int4", "int6"), tmp_path / "m.onnx", states(200))
    assert (np.abs(found - expected).max(axis=1) > 1e-5).mean() <= 0.01


def test_activation_options_are_exported(tmp_path: Path) -> None:
    """Slopes, alphas, bounds and the tanh approximation of GELU arrive in the file."""
    model = mlp()
    for layer in (nn.ELU(0.3), nn.LeakyReLU(0.23), nn.GELU("tanh"), nn.Hardtanh(-0.2, 0.35)):
        model.module.net[1] = layer  # type: ignore[index, union-attr]
        assert worst(both(model, tmp_path / "m.onnx", states(50))) < 1e-6


@pytest.mark.parametrize(
    ("weights", "acts", "granularity"),
    [
        ("int8", "int8", "row"),
        ("int4", "uint4", "tensor"),
        ("int4", "int8", "group9"),
        ("e2m1", "e4m3", "row"),
        ("ternary", "int2", "row"),
        ("float", "int4", "row"),
    ],
)
def test_convolutions(weights: str, acts: str, granularity: str, tmp_path: Path) -> None:
    """Strided, padded and grouped convolutions on raw uint8 images, per row and tensor exact."""
    model = cnn()
    if granularity == "group9":  # one group per kernel of 3 x 3; 192 inputs of the last layer do not split so
        plan = (*uniform(weights, acts, "group9").plan, ("last", make_plan(weights, acts)))
        model = quantize(model, Recipe(plan, STEPS), Calib(images(32)))
    else:
        model = quantized(model, weights, acts, granularity)
    pair = both(model, tmp_path / "m.onnx", images(20))
    assert worst(pair) < 1e-6
    assert "float" in (weights, acts) or granularity == "group9" or np.array_equal(*pair)
    assert open_session(tmp_path / "m.onnx").get_inputs()[0].type == "tensor(uint8)"


def test_wide_convolutions_are_rounded(tmp_path: Path) -> None:
    """Sums beyond 2^24 units are float64 in torch's convolutions and float32 in onnxruntime's: boundary flips only."""
    model = quantized(cnn(), "e4m3", "e4m3")
    assert model.qlayers()["net.0"].kernel().weight.dtype == torch.float64
    found, expected = both(model, tmp_path / "m.onnx", images(100))
    assert (np.abs(found - expected).max(axis=1) > 1e-5 * np.abs(expected).max()).mean() <= 0.02


@pytest.mark.parametrize(
    ("weights", "acts"), [("int8", "int8"), ("int4", "int4"), ("int4", "float"), ("int8", "float"), ("e2m1", "int8")]
)
@pytest.mark.parametrize("target", ["qdq", "qdq-real"])
@pytest.mark.parametrize("granularity", ["row", "group8"])
def test_onnxruntime_keeps_the_arithmetic(
    weights: str, acts: str, target: str, granularity: str, tmp_path: Path
) -> None:
    """Default optimizations put in no integer kernel, no second quantization and no rounded bias."""
    model = quantized(mlp(), weights, acts, granularity)
    graph = optimized(model, tmp_path, to=target).graph
    kinds = [node.op_type for node in graph.node]
    assert {k for k in kinds if "MatMul" in k or "QGemm" in k or "QLinear" in k} == set()
    assert kinds.count("Gemm") == 3
    dequantizers = (3 if weights.startswith("int") else 0) + (3 if acts != "float" else 0)
    assert kinds.count("DequantizeLinear") == dequantizers


def test_onnxruntime_keeps_the_arithmetic_of_convolutions(tmp_path: Path) -> None:
    """Factors are not folded into convolution weights: the weights stay whole numbers."""
    graph = optimized(quantized(cnn(), "e3m0", "int4"), tmp_path).graph
    dense = [t for t in graph.initializer if len(t.dims) == 4 and np.prod(t.dims[1:]) > 1]
    assert dense
    unit = formats.unit(formats.parse("e3m0"))
    for tensor in dense:
        units = onnx.numpy_helper.to_array(tensor) / unit
        np.testing.assert_array_equal(units, np.rint(units))


def test_real_scales_inside(tmp_path: Path) -> None:
    """Target qdq-real has both scales in DequantizeLinear and agrees but for boundary flips."""
    model = quantized(mlp(), "int8", "int8")
    found, expected = both(model, tmp_path / "m.onnx", states(500), to="qdq-real")
    assert (np.abs(found - expected).max(axis=1) > 1e-5 * np.abs(expected).max()).mean() <= 0.01
    graph = onnx.load(tmp_path / "m.onnx").graph
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    layer = model.qlayers()["net.0"]
    nodes = {node.name: node for node in graph.node}
    assert scales[nodes["net.0.input.values"].input[1]] == np.float32(layer.act.scale)  # type: ignore[union-attr]
    np.testing.assert_array_equal(scales[nodes["net.0.weight.values"].input[1]], layer.q.scale[:, 0].numpy())  # type: ignore[union-attr]


def test_storage_types(tmp_path: Path) -> None:
    """Weights of at most 4 bits take 4 bits in the file, minifloat weights their bit patterns."""
    kinds = {}
    for weights in ("ternary", "int3", "int4", "int6", "e2m1", "e4m3", "int16"):
        graph = build_onnx(quantized(mlp(), weights, "int8")).graph
        tensor = next(t for t in graph.initializer if t.name == "net.0.weight.codes")
        kinds[weights] = (TensorProto.DataType.Name(tensor.data_type), tensor.ByteSize() < HIDDEN * INPUTS * 3 // 4)
    expected = {
        "ternary": "INT4",
        "int3": "INT4",
        "int4": "INT4",
        "int6": "INT8",
        "e2m1": "UINT4",
        "e4m3": "UINT8",
        "int16": "INT16",
    }
    assert {k: v[0] for k, v in kinds.items()} == expected
    assert {k for k, v in kinds.items() if v[1]} == {"ternary", "int3", "int4", "e2m1"}


def test_input_factor_is_exported(tmp_path: Path) -> None:
    """A per-channel input factor precedes the quantizer, for linear layers and convolutions."""
    for model, name, x in ((mlp(), "net.2", states(100)), (cnn(), "net.0", images(10))):
        q = quantized(model, "int8", "int8")
        layer = q.qlayers()[name]
        layer.in_scale = torch.linspace(0.7, 1.3, layer.weight.shape[1])
        np.testing.assert_array_equal(*both(q, tmp_path / "m.onnx", x))


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_is_dynamic(batch: int, tmp_path: Path) -> None:
    """One file serves every batch size, native 4-bit inputs of odd length included."""
    model = quantized(mlp(head=Head("discrete", nvec=(5,))), "int4", "int4")
    found, expected = both(model, tmp_path / "m.onnx", states(batch))
    assert found.shape == (batch, 5)
    np.testing.assert_array_equal(found, expected)
    entry = open_session(tmp_path / "m.onnx").get_inputs()[0]
    assert (entry.name, entry.shape) == ("obs", ["batch", INPUTS])


@pytest.mark.parametrize(
    "head",
    [
        Head("discrete", nvec=(5,)),
        Head("discrete", nvec=(4,), start=3),
        Head("multidiscrete", nvec=(3, 2, 4)),
        Head("multibinary", nvec=(1, 1, 1)),
        Head("box", low=(-0.3, -0.1), high=(0.2, np.inf)),
        Head("box", low=(-2.0, -0.7, 0.0), high=(3.0, 0.9, 0.3), squash=True),
    ],
    ids=lambda head: head.kind + ("-squash" if head.squash else ""),
)
def test_postprocess_equals_head_actions(head: Head, tmp_path: Path) -> None:
    """With postprocess the file gives the actions of `Head.actions`, with their type and shape."""
    model = quantized(mlp(head=head), "int8", "int8")
    found, out = both(model, tmp_path / "m.onnx", states(300), postprocess=True)
    expected = model.module.head.actions(out)  # type: ignore[union-attr]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if head.squash:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    else:
        np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 1


def test_ties_go_to_the_first_action(tmp_path: Path) -> None:
    """Equal outputs give the first action, as numpy's argmax does."""
    model = mlp()
    with torch.no_grad():
        model.module.net[4].weight.zero_()  # type: ignore[index, union-attr]
        model.module.net[4].bias.copy_(torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0, 0.0]))  # type: ignore[index, union-attr]
    assert both(model, tmp_path / "m.onnx", states(4), postprocess=True)[0].tolist() == [1, 1, 1, 1]


def test_metadata_tells_everything(tmp_path: Path) -> None:
    """Recipe, environment, spaces, normalizer, source and flags come back from the file."""
    model = quantized(mlp(), "int4", "e4m3", "group8")
    export_onnx(model, tmp_path / "m.onnx", postprocess=True)
    proto = onnx.load(tmp_path / "m.onnx")
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert facts["recipe"] == canonical(model.meta["recipe"])
    assert json.loads(facts["env"])["id"] == "CartPole-v1"
    assert json.loads(facts["observation_space"]) == model.meta["observation_space"]
    assert json.loads(facts["action_space"]) == {"kind": "Discrete"}
    normalizer = json.loads(facts["normalizer"])
    np.testing.assert_array_equal(np.float32(normalizer["mean"]), model.module.stage.mean.numpy())  # type: ignore[union-attr]
    assert normalizer["high"] == [pytest.approx(2.9)]
    assert facts["source_sha256"] == "ab" * 32
    assert (facts["postprocess"], facts["opset"], facts["target"]) == ("true", "21", "qdq")
    assert (proto.producer_name, proto.producer_version) == ("quantkit", facts["quantkit_version"])
    assert "tiny.zip" in proto.doc_string


def test_existing_files_are_kept(tmp_path: Path) -> None:
    """An existing output is refused, and a failed export leaves neither it nor a temporary file changed."""
    path = tmp_path / "m.onnx"
    path.write_bytes(b"precious")
    with pytest.raises(InputError, match="exists already"):
        export_onnx(mlp(), path)
    broken = mlp()
    broken.module.net[1] = nn.Softsign()  # type: ignore[index, union-attr]
    with pytest.raises(InputError, match=r"layer 'net\.1' \(Softsign\)"):
        export_onnx(broken, path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"precious"
    export_onnx(mlp(), path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    with pytest.raises(InputError, match="does not exist"):
        export_onnx(mlp(), tmp_path / "nowhere" / "m.onnx")


class Chain(nn.Module):
    """Layers in a chain, not in the order of definition, with a nested Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.body = nn.Sequential(nn.Linear(INPUTS, 8), nn.Dropout(), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))


class Branches(Chain):
    """The same with a functional activation, a second path and something after the layers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return 2 * self.last(torch.relu(y) + y)


def test_plain_modules(tmp_path: Path) -> None:
    """Any module that can be followed is exported, with the names of its layers."""
    for module in (Chain(), Branches(), nn.Sequential(nn.Linear(INPUTS, 8), nn.Sequential(nn.SiLU(), nn.Linear(8, 3)))):
        model = Model(module.eval().requires_grad_(False), states(2), meta={"kind": "module"})
        assert worst(both(model, tmp_path / "m.onnx", states(50))) < 1e-6
        q = quantized(model, "int8", "int8")
        found, expected = both(q, tmp_path / "m.onnx", states(50))
        assert (np.abs(found - expected).max(axis=1) > 1e-5).mean() <= 0.1
        names = {tensor.name for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
        assert {f"{name}.weight.codes" for name in q.qlayers()} <= names
    session = open_session(tmp_path / "m.onnx")
    assert (session.get_inputs()[0].name, session.get_outputs()[0].name) == ("input", "output")


def test_finn_takes_modules_that_are_chains(tmp_path: Path) -> None:
    """A captured chain of linear layers and ReLU is exported for FINN with the rules of policies; a branch is not."""
    net = nn.Sequential(nn.Linear(INPUTS, 8), nn.ReLU(), nn.Linear(8, 3))
    model = quantized(Model(net.eval(), states(2), meta={"kind": "module"}), "int4", "int4")
    found, expected = both(model, tmp_path / "m.onnx", states(1), to="finn")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    steps = preset_steps("fast", "controller")  # with a factor per feature in front of the network
    scaled = quantize(captured(Model(net, states(2))), uniform("int4", "int4", steps=steps), Calib(states(64)))
    found, expected = both(scaled, tmp_path / "scaled.onnx", states(1), to="finn")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(InputError, match=r"layer '0': FINN does not take weights e2m1"):
        build_onnx(quantized(Model(net, states(2)), "e2m1", "int4"), to="finn")
    with pytest.raises(InputError, match=r"node 'tanh': aten\.tanh\.default has no place in a chain"):
        build_onnx(quantized(Model(Branches().eval(), states(2)), "int4", "int4"), to="finn")


def test_gelu_is_exported_quantized_for_fpga_tools(tmp_path: Path) -> None:
    """GELU needs opset 20, and the quantizers' functions then use it, too."""
    model = quantized(mlp(nn.GELU), "int4", "int6")
    export_onnx(model, tmp_path / "m.onnx", to="qonnx")
    one = states(1)
    with torch.inference_mode():
        np.testing.assert_allclose(run(tmp_path / "m.onnx", one), model.module(one).numpy(), rtol=1e-4)


def test_what_cannot_be_exported_is_refused_by_name() -> None:
    """Networks that cannot be followed and misfits are InputErrors that name the place."""

    class Undecided(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(InputError, match="its graph is not known: "):
        build_onnx(Model(Undecided().eval(), states(2)))
    with pytest.raises(InputError, match="postprocess needs a policy"):
        build_onnx(Model(Chain().eval(), states(2)), postprocess=True)
    with pytest.raises(InputError, match="unknown export target 'tflite'"):
        build_onnx(mlp(), to="tflite")  # type: ignore[arg-type]
    circular = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"))
    policy = Policy(InputStage(), circular, Head("discrete", nvec=(25,)), (1, 5, 5)).eval()
    with pytest.raises(InputError, match=r"layer 'net\.0'.*circular"):
        build_onnx(Model(policy, torch.zeros(2, 1, 5, 5)))
