"""quantkit.verify: right files pass, wrong files do not, misfits are one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from quantkit.errors import InputError
from quantkit.export import export_onnx
from quantkit.model import Calib, EnvSpec, Model
from quantkit.onnx_run import Act, onnx_act
from quantkit.policy import Head, InputStage, Policy
from quantkit.recipe import quantize, uniform
from quantkit.verify import Agreement, verify

STEPS = (("act_scales", {"scale": "absmax"}), ("rtn", {"scale": "absmax"}))
STATES = torch.randn(600, 4, generator=torch.Generator().manual_seed(2)).numpy()


def policy_model(act: type[nn.Module] = nn.ReLU, head: Head | None = None, width: int = 24) -> Model:
    torch.manual_seed(13)
    head = head or Head("discrete", nvec=(2,))
    net = nn.Sequential(nn.Linear(4, width), act(), nn.Linear(width, width), act(), nn.Linear(width, head.outputs))
    policy = Policy(InputStage(0.05, 1.2, -5.0, 5.0), net, head, (4,)).eval()
    return Model(policy, torch.from_numpy(STATES[:2]), EnvSpec("CartPole-v1"), {"kind": "policy", "sha256": "12" * 32})


def quantized(model: Model, weights: str = "int4", acts: str = "int4") -> Model:
    return quantize(model, uniform(weights, acts, "row", STEPS), Calib(torch.from_numpy(STATES)))


def checked(model: Model, path: Path, **options: bool) -> Agreement:
    export_onnx(model, path, overwrite=True, **options)  # type: ignore[arg-type]
    return verify(model, path, states=STATES)


def corrupt(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change one stored constant of an exported file."""
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    old = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(old)).astype(old.dtype), name))
    onnx.save(proto, path)


def one_more(values: np.ndarray) -> np.ndarray:
    changed = values.astype(np.int64).copy()
    changed[0, 0] += 1 if changed[0, 0] < 7 else -1
    return changed


@pytest.mark.parametrize("formats", [("int4", "int4"), ("int8", "int8"), ("e2m1", "e4m3"), ("ternary", "int3")])
@pytest.mark.parametrize("postprocess", [False, True])
def test_a_good_file_agrees_exactly(formats: tuple[str, str], postprocess: bool, tmp_path: Path) -> None:
    """A network with exact sums has error 0, in LSBs too, and equal actions in every state."""
    found = checked(quantized(policy_model(), *formats), tmp_path / "m.onnx", postprocess=postprocess)
    assert (found.ok, found.reason, found.n) == (True, "", 600)
    assert (found.max_abs, found.action_agreement, found.first_mismatch, found.flips) == (0.0, 1.0, None, 0)
    assert found.max_lsb == (None if postprocess else 0.0)
    assert found.compared == ("actions" if postprocess else "outputs")


def test_float_rounding_is_not_a_mismatch(tmp_path: Path) -> None:
    """A float network agrees to rounding; it has no LSB."""
    found = checked(policy_model(nn.Tanh), tmp_path / "m.onnx")
    assert found.ok and found.max_lsb is None
    assert 0 < found.max_abs < 1e-6


def test_boundary_flips_are_found_and_explained(tmp_path: Path) -> None:
    """Tanh differs in its last bit; where that flips a quantized value, the state is a flip and the file is good."""
    model = quantized(policy_model(nn.Tanh, width=128), "int8", "int8")
    export_onnx(model, tmp_path / "m.onnx")
    many = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(3)).numpy()
    found = verify(model, tmp_path / "m.onnx", states=many)
    assert found.ok and found.unexplained == 0
    assert 0 < found.flips < 400
    assert found.first_mismatch is not None
    assert found.max_lsb is not None and found.max_lsb > 1


def test_real_scales_agree_but_for_flips(tmp_path: Path) -> None:
    """Target qdq-real passes as well: its differences are rounding and boundary flips."""
    model = quantized(policy_model(), "int8", "int8")
    export_onnx(model, tmp_path / "m.onnx", to="qdq-real")
    found = verify(model, tmp_path / "m.onnx", states=STATES)
    assert found.ok and found.unexplained == 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("net.2.input.scale", lambda v: v * 1.01),
        ("net.4.gain", lambda v: v * 1.0001),
        ("net.0.bias", lambda v: v + 0.01),
        ("net.2.weight.codes", one_more),
        ("stage.std", lambda v: v * 1.02),
        ("net.4.weight.scale", lambda v: v * 1.5),
    ],
)
def test_a_corrupt_constant_is_found(name: str, change: Callable[[np.ndarray], np.ndarray], tmp_path: Path) -> None:
    """Sabotage: one constant of the file changed a little, and verify says so."""
    model = quantized(policy_model(), "int4", "int8")
    assert checked(model, tmp_path / "m.onnx").ok
    corrupt(tmp_path / "m.onnx", name, change)
    found = verify(model, tmp_path / "m.onnx", states=STATES)
    assert not found.ok
    assert found.unexplained > 0
    assert found.first_mismatch is not None
    assert found.reason
    assert found.max_abs > 0 and found.max_lsb is not None and found.max_lsb > 0.01


def test_a_corrupt_scale_is_found_in_actions(tmp_path: Path) -> None:
    """Sabotage of a file that gives actions: discrete actions change, continuous ones move."""
    for head, gain in ((Head("discrete", nvec=(2,)), 0.3), (Head("box", low=(-2.0,), high=(1.5,), squash=True), 1.01)):
        model = quantized(policy_model(head=head))
        assert checked(model, tmp_path / "m.onnx", postprocess=True).ok
        corrupt(tmp_path / "m.onnx", "net.2.input.scale", lambda v, gain=gain: v * gain)
        found = verify(model, tmp_path / "m.onnx", states=STATES)
        assert not found.ok and found.compared == "actions"


def test_max_lsb_counts_steps_of_the_last_layer(tmp_path: Path) -> None:
    """A weight code of the last layer changed by one moves its output by whole LSBs: the input's grid value."""
    model = quantized(policy_model(), "int4", "int4")
    export_onnx(model, tmp_path / "m.onnx")
    corrupt(tmp_path / "m.onnx", "net.4.weight.codes", one_more)
    found = verify(model, tmp_path / "m.onnx", states=STATES)
    assert found.max_lsb is not None
    assert 1 <= round(found.max_lsb) <= 15
    assert found.max_lsb == pytest.approx(round(found.max_lsb), abs=1e-2)


def test_not_a_number_is_a_mismatch(tmp_path: Path) -> None:
    """NaN from onnxruntime does not pass unseen, and the report stays valid JSON."""
    model = quantized(policy_model())
    export_onnx(model, tmp_path / "m.onnx")
    corrupt(tmp_path / "m.onnx", "net.4.bias", lambda v: v * np.nan)
    found = verify(model, tmp_path / "m.onnx", states=STATES)
    assert not found.ok
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["max_abs"] is None


def test_whole_episodes_give_the_same_returns(tmp_path: Path) -> None:
    """In CartPole every episode returns the same through onnxruntime and torch, with and without post-processing."""
    model = quantized(policy_model())
    seen: set[str] = set()
    for postprocess in (False, True):
        export_onnx(model, tmp_path / "m.onnx", postprocess=postprocess, overwrite=True)
        found = verify(
            model,
            tmp_path / "m.onnx",
            states=STATES,
            episodes=4,
            seed=77,
            progress=lambda name, done, total: seen.add(name),
        )
        assert found.ok and found.equal_returns == found.episodes == 4
        assert found.mean == found.mean_torch and found.mean is not None and found.mean > 1
        assert seen == {"states", "episodes in onnxruntime", "episodes in torch"}
        assert found.to_json()["seed"] == 77


def test_unequal_returns_are_not_ok(tmp_path: Path) -> None:
    """Returns that differ systematically fail; scatter within 3 standard errors passes."""
    model = quantized(policy_model())
    export_onnx(model, tmp_path / "m.onnx")

    def evaluate_with(offsets: list[float]) -> Callable[..., np.ndarray]:
        calls = iter([np.array(offsets), np.zeros(len(offsets))])

        def evaluate(act: Act, *, episodes: int, seed: int) -> np.ndarray:
            assert act(STATES[:3]).shape == (3,)
            return 100.0 + np.arange(episodes) + seed + next(calls)

        return evaluate

    def ok(*offsets: float) -> bool:
        evaluate = evaluate_with(list(offsets))
        return verify(model, tmp_path / "m.onnx", states=STATES, episodes=len(offsets), seed=5, evaluate=evaluate).ok

    assert ok(0, 0, 0, 0)
    assert ok(3, -2, 0, 0)
    assert not ok(1, 1, 1, 1)
    assert not ok(-3, -4, -5, -3)
    assert not ok(2)


def test_onnx_act_gives_actions(tmp_path: Path) -> None:
    """`onnx_act` is the policy's action function, whichever of the two kinds of file it reads."""
    model = quantized(policy_model())
    expected, _ = model.module.predict(STATES)  # type: ignore[operator]
    for postprocess in (False, True):
        export_onnx(model, tmp_path / "m.onnx", postprocess=postprocess, overwrite=True)
        np.testing.assert_array_equal(onnx_act(tmp_path / "m.onnx", model.module.head)(STATES), expected)  # type: ignore[arg-type]


def test_misfits_are_refused(tmp_path: Path) -> None:
    """Files and states that do not belong to the model are InputErrors of one line."""
    model = quantized(policy_model())
    path = tmp_path / "m.onnx"

    def refused(match: str, model: Model = model, states: np.ndarray = STATES, **options: int) -> None:
        with pytest.raises(InputError, match=match) as caught:
            verify(model, path, states=states, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    refused("no such file")
    path.write_bytes(b"not an onnx file at all")
    refused("onnxruntime cannot load it")
    export_onnx(model, path, overwrite=True)
    path.write_bytes(path.read_bytes()[:-900])
    refused("onnxruntime cannot load it|no metadata")
    export_onnx(model, path, overwrite=True)
    other = model.copy()
    other.meta["sha256"] = "99" * 32
    refused("another checkpoint", other)
    refused("another recipe", quantized(policy_model(), "int3", "int4"))
    refused("another recipe", policy_model())
    refused(r"states of shape \(600, 3\)", states=STATES[:, :3])
    refused(r"states of shape \(0, 4\)", states=STATES[:0])
    endless = model.copy()
    endless.module.net[4].bias[1] = torch.inf  # type: ignore[index, union-attr]
    refused("state 0: the torch model's own output is not finite", endless)
    homeless = model.copy()
    homeless.env = None
    refused("names none", homeless, episodes=2)
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, path)
    refused("not exported by quantkit")


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Same provenance but other outputs or inputs: refused before anything is compared."""
    model, wide = policy_model(), policy_model(head=Head("discrete", nvec=(3,)))
    export_onnx(wide, tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"gives \(3,\) per state where the model gives \(2,\)"):
        verify(model, tmp_path / "m.onnx", states=STATES)
    net = nn.Sequential(nn.Linear(5, 2))
    longer = Policy(InputStage(), net, Head("discrete", nvec=(2,)), (5,)).eval()
    with pytest.raises(InputError, match=r"takes inputs \[4\], this model takes \[5\]"):
        verify(Model(longer, torch.zeros(2, 5), None, model.meta), tmp_path / "m.onnx", states=STATES)


def test_plain_modules_are_verified_too(tmp_path: Path) -> None:
    """A module without a head is compared by its outputs; episodes need a policy."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    model = quantized(Model(module, torch.from_numpy(STATES[:2]), meta={"kind": "module"}))
    found = checked(model, tmp_path / "m.onnx")
    assert (found.ok, found.max_lsb, found.action_agreement) == (True, 0.0, 1.0)
    with pytest.raises(InputError, match="need a policy"):
        verify(model, tmp_path / "m.onnx", states=STATES, episodes=1)


class Attending(nn.Module):
    """Convolution, attention by torch and by hand, normalization, GELU and a residual sum: images -> 4 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(1, 8, 2, 2), nn.LayerNorm(8)
        self.attention, self.qkv = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 24)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patch(x).flatten(2).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1) @ v
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


def attending(fmt: str) -> tuple[Model, np.ndarray]:
    torch.manual_seed(17)
    x = torch.randn(400, 1, 6, 6)
    model = Model(Attending().eval(), x[:2], None, {"kind": "module", "sha256": "34" * 32})
    return quantize(model, uniform(fmt, fmt, "row", STEPS), Calib(x[:100])), x.numpy()


@pytest.mark.parametrize("fmt", ["int8", "int4", "e4m3", "e2m1"])
@pytest.mark.parametrize("to", ["qdq", "qdq-real", "qonnx"])
def test_graphs_are_compared_node_by_node(fmt: str, to: str, tmp_path: Path) -> None:
    """Every module and operation of a network is compared on the file's own values; exact sums must be equal bits."""
    model, x = attending(fmt)
    export_onnx(model, tmp_path / "m.onnx", to=to)  # type: ignore[arg-type]
    found = verify(model, tmp_path / "m.onnx", states=x)
    assert found.ok and found.unexplained == 0, found
    assert found.nodes > 30
    if to == "qdq":  # all layers and the two products of each attention, but for a convolution summed beyond 2^24
        assert found.exact_nodes == len(model.qlayers()) + 4 - (1 if fmt == "e4m3" else 0), found
    if to == "qdq-real":
        assert found.exact_nodes == 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("down.weight.codes", one_more),
        ("qkv.gain", lambda v: v * 1.0001),
        ("attention.attention.scores.left.scale", lambda v: v * 1.01),
        ("matmul.gain", lambda v: v * 1.0001),
        ("patch.bias", lambda v: v + 0.01),
        ("norm.weight", lambda v: v * 1.001),
        ("head.bias", lambda v: v * 1.001),
    ],
)
def test_a_corrupt_node_is_named(name: str, change: Callable[[np.ndarray], np.ndarray], tmp_path: Path) -> None:
    """Sabotage: one constant of a graph changed a little is found at its node, though every input has values
    near a boundary that would have explained it."""
    model, x = attending("int8")
    export_onnx(model, tmp_path / "m.onnx")
    assert verify(model, tmp_path / "m.onnx", states=x[:20]).ok
    corrupt(tmp_path / "m.onnx", name, change)
    found = verify(model, tmp_path / "m.onnx", states=x[:20])
    assert not found.ok and found.reason
    layer = name.removesuffix(".weight.codes").rpartition(".")[0] if "codes" not in name else "down"
    assert layer.split(".")[0] in found.reason
