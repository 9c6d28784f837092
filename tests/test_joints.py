"""Operands of residual sums and means on grids: exact sums, the same in every runtime, and one design in hardware."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_policies
import torch
from torch import nn
from typer.testing import CliRunner

from hwmodel import simulate
from hwmodel.network import read_network, reference, sample_codes
from quantkit.artifact import load_artifact, save_artifact
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.export import export_onnx, open_session
from quantkit.model import Calib, Model
from quantkit.recipe import Recipe, Step, make_plan, quantize
from quantkit.rounding import is_pow2
from quantkit.rtl_conv import designs_of, input_codes, outputs, seen, whole

icarus = pytest.mark.skipif(not shutil.which("iverilog"), reason="iverilog is not installed (apt-get install iverilog)")
FACTORY = "test_joints:built"


class Residual(nn.Module):
    """A map beside two convolutions, a halving block with a convolution beside two, a mean over 12 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.right = nn.Conv2d(6, 6, 1)
        self.down = nn.Conv2d(6, 8, 3, stride=2)
        self.same = nn.Conv2d(8, 8, 3, padding=1)
        self.short = nn.Conv2d(6, 8, 1, stride=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.right(torch.relu(self.left(x))))
        inner = torch.relu(self.down(nn.functional.pad(x, (0, 1, 0, 1))))
        x = torch.relu(self.short(x) + self.same(inner))
        return self.head(x.mean((2, 3)))


class Plain(nn.Module):
    """No sums: a mean before the last layer, of values of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.adaptive_avg_pool2d(self.own(torch.relu(self.first(x))), 1).flatten(1))


def built() -> nn.Module:
    """What the artifact's factory makes."""
    torch.manual_seed(3)
    return Residual().eval()


STEP: tuple[Step, ...] = (("joints", {}),)


def made(
    weights: str = "int4", acts: str = "int6", steps: tuple[Step, ...] = STEP, kind: type[nn.Module] = Residual
) -> tuple[Model, torch.Tensor]:
    """A network quantized with the step, and inputs for it."""
    torch.manual_seed(3)
    module, images = kind().eval(), torch.randn(40, 2, 6, 8)
    model = Model(module, images[:1], meta={"kind": "module", "factory": FACTORY})
    return quantize(model, Recipe((("*", make_plan(weights, acts, "row")),), steps, 0), Calib(images)), images


@pytest.mark.parametrize("kind", [Residual, Plain])
@pytest.mark.parametrize(
    ("weights", "acts"), [("int4", "int6"), ("e2m1", "int4"), ("int8", "int8"), ("ternary", "uint5")]
)
def test_one_design_says_what_the_network_says(weights: str, acts: str, kind: type[nn.Module]) -> None:
    """From input codes to float outputs the integers of the one design are the simulator's, bit for bit."""
    steps: tuple[Step, ...] = (("act_scales", {"unsigned": False}), *STEP) if acts == "int4" else STEP
    model, images = made(weights, acts, steps, kind)
    ((design,), after), layers = designs_of(model), model.qlayers()
    assert design.before == after == ()
    assert [s.name for s in design.network.specs if not s.joint] == list(layers)
    first, last = design.parts[0], design.parts[-1]
    codes = input_codes(first, layers[first.name], seen(model, images)[first.name][0])
    with torch.inference_mode():
        want = model.module(images).numpy()
    assert np.array_equal(outputs(last, layers[last.name], reference(design.network, codes)), want)


def test_operands_are_integers_at_powers_of_two() -> None:
    """Layers that read an operand, or one map, read the same codes; a sum in float32 is the sum of the integers."""
    model, images = made()
    points, layers = model.points(), model.qlayers()
    assert list(points) == ["relu_grid", "right_grid", "short_grid", "same_grid", "relu_4_grid"]
    assert all(is_pow2(point.act.scale) for point in points.values() if point.act is not None)
    assert layers["left"].act == points["relu_grid"].act
    assert layers["down"].act == layers["short"].act
    values: dict[str, torch.Tensor] = {}
    for name, point in points.items():
        point.register_forward_hook(lambda _, x, y, name=name: values.update({name: y}))  # type: ignore[misc]
    model.module(images)
    for name, y in values.items():
        codes = y.double() / points[name].act.scale  # type: ignore[union-attr]
        assert torch.equal(codes, codes.round())


def test_an_artifact_keeps_them(tmp_path: Path) -> None:
    """Saved and loaded, the network computes the same, and is the same design."""
    model, images = made()
    save_artifact(model, tmp_path / "q")
    again = load_artifact(tmp_path / "q", factory=FACTORY)
    with torch.inference_mode():
        assert torch.equal(again.module(images), model.module(images))
    one, other = whole(model), whole(again)
    assert one is not None and other is not None
    assert one.network.to_json() == other.network.to_json()


def test_onnxruntime_adds_the_same(tmp_path: Path) -> None:
    """The exported network's outputs are the simulator's, bit for bit."""
    model, images = made("int8", "int8")
    export_onnx(model, tmp_path / "x.onnx")
    session = open_session(tmp_path / "x.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        assert np.array_equal(found, model.module(images).numpy())


class Gated(nn.Module):
    """A mean that is added to every position of its map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(x + x.mean((2, 3), keepdim=True))).flatten(1)


def test_a_mean_that_all_positions_share_is_the_hosts() -> None:
    """Hardware adds maps of one shape; other sums leave the network in several designs, as without the step."""
    model, _ = made(kind=Gated)
    assert whole(model) is None
    assert [[part.name for part in design.parts] for design in designs_of(model)[0]] == [["first"], ["last"]]


def test_without_the_step_sums_are_the_hosts() -> None:
    """Float operands have no design; nor do minifloats, which no adder of integers adds."""
    assert whole(made(steps=())[0]) is None
    assert whole(made("int4", "e3m2")[0]) is None


def test_a_chain_has_no_operands() -> None:
    """A policy stays as it is."""
    policy = small_policies.conv(groups=2)
    recipe = Recipe((("*", make_plan("int4", "int6", "row")),), STEP, 0)
    done = quantize(policy, recipe, small_policies.calib(policy))
    assert done.points() == {}
    assert done.meta["steps"][-1]["diagnostics"] == {"operands": 0.0, "other_scales": 0.0}


def test_what_cannot_be_done_is_named() -> None:
    """Scales of inputs come first, and operands are integers."""
    with pytest.raises(InputError, match="step 'joints' comes behind act_scales: layer 'stem' has no scale"):
        made(steps=(*STEP, ("act_scales", {}), ("rtn", {})))
    with pytest.raises(InputError, match="step 'joints': format 'e2m1' is not accepted; accepted: int2"):
        made(steps=(("joints", {"act": "e2m1"}),))


@pytest.mark.sim
@icarus
def test_the_command_writes_one_design(tmp_path: Path) -> None:
    """`quantkit rtl` of a residual network is one folder whose simulation is exact and takes the planned cycles."""
    save_artifact(made()[0], tmp_path / "q")
    command = ["rtl", str(tmp_path / "q"), "--factory", FACTORY, "-o", str(tmp_path / "rtl"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    assert [entry["folder"] for entry in facts["designs"]] == ["."]
    found = simulate.check(tmp_path / "rtl", sample_codes(read_network(tmp_path / "rtl"), 3), "iverilog")
    assert found.mismatch is None
    assert found.cycles_min == found.cycles_max == facts["cycles"]
    text = (tmp_path / "rtl" / "README.md").read_text()
    assert "| add, queue " in text and "| mean |" in text


class Looked(nn.Module):
    """A residual stream of rows that an embedding looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.rows(ids)
        return self.head(torch.relu(x + self.mix(x)).mean(1))


def test_an_embedding_has_no_input_to_wait_for() -> None:
    """Behind an embedding sums and means become integers as anywhere, in the order of steps that is accepted."""
    torch.manual_seed(5)
    ids = torch.randint(0, 9, (64, 5))
    done = quantize(Model(Looked().eval(), ids[:2]), Recipe((("*", make_plan("int8", "int8")),), STEP, 0), Calib(ids))
    assert done.points()
    assert all(point.act is not None and is_pow2(point.act.scale) for point in done.points().values())
