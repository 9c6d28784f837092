"""An exported ONNX file costs what the artifact's own specifications cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import tiny_models
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from typer.testing import CliRunner

from hwmodel.cli import app
from hwmodel.cost import HwError
from hwmodel.devices import find_device
from hwmodel.estimate import estimate
from hwmodel.onnx_specs import read_onnx
from hwmodel.spec import LayerSpec
from quantkit.export import build_onnx, export_onnx
from quantkit.model import Calib, Model
from quantkit.policy import Head, InputStage, Policy
from quantkit.recipe import quantize, uniform
from quantkit.rtl_export import hardware_specs
from quantkit.specs import layer_specs

DEVICE = find_device("xc7a35t")
INTEGERS = [("int4", "int4"), ("int8", "int5"), ("ternary", "int3"), ("int3", "int8n")]
PAIRS = [(w, a, to) for w, a in INTEGERS for to in ("qdq", "qdq-real", "qcdq", "qonnx")]
PAIRS += [
    (w, a, to)
    for w, a in (("e2m1", "e3m2"), ("binary", "int4"), ("int4", "e4m3fn"), ("int6", "binary"))
    for to in ("qdq", "qdq-real", "qonnx")
]
PAIRS += [("int8", "int16n", to) for to in ("qdq", "qdq-real")]  # fmt: skip


def quantized(weights: str, acts: str, granularity: str = "row") -> Model:
    """A tiny policy of linear layers with tanh, of sizes that groups of 4 divide."""
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    policy = Policy(InputStage(), net, Head("box", low=(-1.0,) * 3, high=(1.0,) * 3), (8,))
    inputs = tiny_models.correlated(150, 8, seed=5)
    model = Model(policy.eval(), inputs[:1].clone(), meta={"kind": "policy"})
    return quantize(model, uniform(weights, acts, granularity=granularity), Calib(inputs, batch=53))


def nameless(specs: list[LayerSpec] | tuple[LayerSpec, ...]) -> list[LayerSpec]:
    """Specs without their names, which QONNX writes with other dots."""
    return [replace(spec, name=str(i)) for i, spec in enumerate(specs)]


def silent(path: Path) -> None:
    """Take from a file what it says of its hardware."""
    proto = onnx.load(str(path))
    kept = [entry for entry in proto.metadata_props if entry.key != "hardware"]
    assert len(kept) + 1 == len(proto.metadata_props)
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    onnx.save(proto, str(path))


@pytest.mark.parametrize(("weights", "acts", "to"), PAIRS)
def test_a_file_costs_what_its_artifact_costs(weights: str, acts: str, to: str, tmp_path: Path) -> None:
    """Every number of the estimate is the artifact's, exact arithmetic included.

    Read from the nodes alone, formats, accumulators and activations are those of the artifact's layers.
    """
    model = quantized(weights, acts)
    export_onnx(model, tmp_path / "x.onnx", to=to)  # type: ignore[arg-type]
    assert tuple(read_onnx(tmp_path / "x.onnx")) == hardware_specs(model)
    silent(tmp_path / "x.onnx")
    found, want = nameless(read_onnx(tmp_path / "x.onnx")), nameless(layer_specs(model))
    for one, other in zip(found, want, strict=True):
        assert (one.weight, one.act, one.out, one.acc_bits) == (other.weight, other.act, other.out, other.acc_bits)
        assert (one.activation, one.granularity) == (other.activation, other.granularity)
    assert estimate(found, DEVICE) == estimate(want, DEVICE)


@pytest.mark.parametrize("granularity", ["tensor", "group4"])
@pytest.mark.parametrize("to", ["qdq", "qdq-real", "qonnx"])
def test_granularities_are_read(granularity: str, to: str, tmp_path: Path) -> None:
    """One scale per tensor or per group is found from the scales in the file."""
    model = quantized("int4", "int5", granularity)
    export_onnx(model, tmp_path / "x.onnx", to=to)  # type: ignore[arg-type]
    found, want = nameless(read_onnx(tmp_path / "x.onnx")), nameless(layer_specs(model))
    assert [one.granularity for one in found] == [other.granularity for other in want]
    assert estimate(found, DEVICE, luts=10**6) == estimate(want, DEVICE, luts=10**6)


@pytest.mark.parametrize("to", ["qdq", "qcdq", "qonnx"])
def test_convolutions_have_their_positions(to: str, tmp_path: Path) -> None:
    """A convolution's matrix, positions, groups and window are those of the artifact, and of the layer on its map."""
    model, calib = tiny_models.image_policy()
    model = quantize(model, uniform("int4", "int5"), calib)
    export_onnx(model, tmp_path / "x.onnx", to=to)  # type: ignore[arg-type]
    silent(tmp_path / "x.onnx")
    found, want = read_onnx(tmp_path / "x.onnx"), layer_specs(model)
    keys = ("op", "out_features", "in_features", "positions", "groups", "weight", "act", "acc_bits", "window")
    assert [[getattr(s, k) for k in keys] for s in found] == [[getattr(s, k) for k in keys] for s in want]


def test_metadata_of_other_weights_are_not_believed(tmp_path: Path) -> None:
    """Where the products are not those that the file tells of, its nodes are read."""
    export_onnx(quantized("int4", "int5"), tmp_path / "x.onnx")
    proto = onnx.load(str(tmp_path / "x.onnx"))
    entry = next(entry for entry in proto.metadata_props if entry.key == "hardware")
    told = json.loads(entry.value)
    told[0]["acc_bits"] += 1
    entry.value = json.dumps(told)
    onnx.save(proto, str(tmp_path / "x.onnx"))
    assert all(spec.rescale is None for spec in read_onnx(tmp_path / "x.onnx"))


def test_the_command_reads_the_file(tmp_path: Path) -> None:
    """`hwmodel estimate x.onnx` prints the estimate of its layers."""
    export_onnx(quantized("int4", "int4"), tmp_path / "x.onnx")
    result = CliRunner().invoke(app, ["estimate", str(tmp_path / "x.onnx"), "--device", "xc7a35t", "--json"])
    assert json.loads(result.stdout)["luts"] == estimate(read_onnx(tmp_path / "x.onnx"), DEVICE).luts


def test_other_files_are_one_line(tmp_path: Path) -> None:
    """No ONNX at all, no layers, a zero point and a float layer are refused or named."""
    (tmp_path / "a.onnx").write_text("x")
    (tmp_path / "b.onnx").write_bytes(onnx.ModelProto(ir_version=9).SerializeToString())
    for name in ("a.onnx", "b.onnx"):
        result = CliRunner().invoke(app, ["estimate", str(tmp_path / name), "--device", "xc7a35t"])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and name in result.stderr
    proto = build_onnx(quantized("int4", "int5"), to="qcdq")
    zero = next(t for t in proto.graph.initializer if t.name.endswith("input.zero"))
    zero.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(zero) + 1, zero.name))
    onnx.save(proto, tmp_path / "c.onnx")
    with pytest.raises(HwError, match="zero point"):
        read_onnx(tmp_path / "c.onnx")


def test_a_float_layer_is_named_by_the_estimate(tmp_path: Path) -> None:
    """A plain Gemm has specs without formats, which the estimate refuses by the layer's name."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 2], [1.0] * 6)
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="fc", transB=1)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, size]) for n, size in (("x", 2), ("y", 3))]
    onnx.save(helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [weight])), tmp_path / "x.onnx")
    with pytest.raises(HwError, match=r"'fc'.* floating point.*accepted: int1"):
        estimate(read_onnx(tmp_path / "x.onnx"), DEVICE)


class Pooled(nn.Module):
    """A convolution with a maximum behind its activation, another one, and a dense layer on the map of a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(6 * 2 * 1, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.first(x)))
        return self.head(self.pool(torch.relu(self.second(x))).flatten(1))


@pytest.mark.parametrize("to", ["qdq", "qcdq", "qonnx"])
def test_maxima_are_layers(to: str, tmp_path: Path) -> None:
    """Read from the nodes alone, maxima between products have the windows, formats and places of the design's."""
    torch.manual_seed(3)
    images = torch.randn(20, 1, 12, 8)
    model = quantize(
        Model(Pooled().eval(), images[:1], meta={"kind": "module"}), uniform("int4", "int5"), Calib(images)
    )
    export_onnx(model, tmp_path / "x.onnx", to=to)  # type: ignore[arg-type]
    silent(tmp_path / "x.onnx")
    found, want = read_onnx(tmp_path / "x.onnx"), hardware_specs(model)
    keys = ("op", "out_features", "in_features", "positions", "groups", "weight", "act", "out", "acc_bits", "window")
    assert [spec.op for spec in found] == ["conv2d", "max", "conv2d", "max", "linear"]
    assert [[getattr(s, k) for k in keys] for s in found] == [[getattr(s, k) for k in keys] for s in want]
