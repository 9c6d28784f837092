"""quantkit.export_graph: onnxruntime computes what torch computes, for every operation and for whole networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_capture
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit import export_ops
from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.export import build_onnx, export_onnx, open_session
from quantkit.model import Calib, Model
from quantkit.recipe import quantize, uniform

STEPS: tuple = (("act_scales", {"scale": "absmax"}), ("rtn", {"scale": "absmax"}))


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(model: Model, path: Path, x: Tensor, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """(onnxruntime, torch) outputs of an exported model."""
    export_onnx(model, path, overwrite=True, **options)
    session = open_session(path)
    single = session.get_inputs()[0].shape[0] == 1
    parts = x.split(1) if single else (x,)
    found = np.concatenate([session.run(None, {session.get_inputs()[0].name: p.numpy()})[0] for p in parts])
    with torch.no_grad():
        return found, model.module(x).numpy()


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * float(np.abs(expected).max(initial=1)))


class InPlace(nn.Module):
    """A batch norm whose output a function overwrites: export decomposes it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = test_capture.trained(nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.bn(x))


IMAGE, ROWS, FLAT = (3, 8, 6), (5, 4), (6,)
BIG = torch.tensor([[0.5], [-0.25], [2.0]])

# name: (function, shape of one input)
OPERATIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "add": (lambda x: x + torch.relu(x), ROWS),
    "add alpha": (lambda x: torch.add(x, x.abs(), alpha=3), ROWS),
    "add number": (lambda x: x + 1.7, ROWS),
    "sub": (lambda x: x - x.tanh(), ROWS),
    "rsub": (lambda x: 1 - x, ROWS),
    "mul": (lambda x: x * x.sigmoid(), ROWS),
    "div": (lambda x: x / (1 + x.abs()), ROWS),
    "div number": (lambda x: x / 8**0.5, ROWS),
    "neg": (lambda x: -x, ROWS),
    "relu": (torch.relu, ROWS),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.23), ROWS),
    "hardtanh": (lambda x: F.hardtanh(x, -0.4, 0.9), ROWS),
    "relu6": (lambda x: F.relu6(3 * x), ROWS),
    "clamp": (lambda x: x.clamp(-1, 0.5), ROWS),
    "clamp low": (lambda x: x.clamp(min=0.3), ROWS),
    "clamp high": (lambda x: x.clamp(max=0.3), ROWS),
    "tanh": (torch.tanh, ROWS),
    "sigmoid": (torch.sigmoid, ROWS),
    "gelu": (F.gelu, ROWS),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), ROWS),
    "silu": (F.silu, ROWS),
    "mish": (F.mish, ROWS),
    "elu": (lambda x: F.elu(x, 0.7), ROWS),
    "hardswish": (lambda x: F.hardswish(2 * x), ROWS),
    "hardsigmoid": (lambda x: F.hardsigmoid(2 * x), ROWS),
    "softplus": (F.softplus, ROWS),
    "prelu": (nn.PReLU(3, 0.2), IMAGE),
    "softmax": (lambda x: torch.softmax(x, 1), ROWS),
    "log_softmax": (lambda x: F.log_softmax(x, -1), ROWS),
    "layer_norm": (lambda x: F.layer_norm(x, (5, 4)), ROWS),
    "layer norm": (nn.LayerNorm((5, 4)), ROWS),
    "rms norm": (nn.RMSNorm(4, 1e-3), ROWS),
    "group_norm": (nn.GroupNorm(2, 4), (4, 3, 5)),
    "batch_norm": (test_capture.trained(nn.BatchNorm2d(3)), IMAGE),
    "batch_norm inplace": (InPlace(), IMAGE),
    "mean": (lambda x: x.mean((2, 3)), IMAGE),
    "mean keepdim": (lambda x: x.mean(-1, keepdim=True), IMAGE),
    "sum": (lambda x: x.sum(1), ROWS),
    "amax": (lambda x: x.amax((1, 2)), IMAGE),
    "amin": (lambda x: x.amin(1), IMAGE),
    "max": (lambda x: x.max(1).values, IMAGE),
    "argmax": (lambda x: x.argmax(1), IMAGE),
    "normalize": (lambda x: F.normalize(x, dim=-1), ROWS),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE),
    "max_pool2d ceil": (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), IMAGE),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), ROWS),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), IMAGE),
    "avg_pool2d padded": (lambda x: F.avg_pool2d(x, 3, 2, 1), IMAGE),
    "avg_pool2d excluded": (lambda x: F.avg_pool2d(x, (3, 2), 1, 1, count_include_pad=False), IMAGE),
    "adaptive 1": (lambda x: F.adaptive_avg_pool2d(x, 1), IMAGE),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (4, 2)), IMAGE),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 3), value=0.5), IMAGE),
    "pad channels": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)), IMAGE),
    "pad negative": (lambda x: F.pad(x, (-1, 2)), IMAGE),
    "pad reflect": (lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), IMAGE),
    "pad replicate": (lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate"), IMAGE),
    "pad circular": (lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"), IMAGE),
    "cat": (lambda x: torch.cat([x, x.relu()], 1), ROWS),
    "stack": (lambda x: torch.stack([x, x.relu()], -1), ROWS),
    "slice": (lambda x: x[:, 1:-1:2, :3], ROWS),
    "select": (lambda x: x[:, -2], ROWS),
    "unbind": (lambda x: torch.add(*x[:, :2].unbind(1)), ROWS),
    "chunk": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), ROWS),
    "split": (lambda x: x.split(2, 1)[2], ROWS),
    "split sizes": (lambda x: x.split([1, 3], -1)[1], ROWS),
    "reshape": (lambda x: x.reshape(-1, 2, 10), ROWS),
    "reshape batch": (lambda x: x.reshape(x.shape[0] * 5, 4), ROWS),
    "flatten": (lambda x: x.flatten(1), IMAGE),
    "flatten batch": (lambda x: x.flatten(0, 1), IMAGE),
    "unflatten": (lambda x: x.unflatten(1, (2, 3)), FLAT),
    "permute": (lambda x: x.permute(0, 3, 1, 2), IMAGE),
    "permute batch": (lambda x: x.permute(1, 0, 2) * 2, ROWS),
    "transpose": (lambda x: x.transpose(-1, -2), IMAGE),
    "unsqueeze": (lambda x: x.unsqueeze(-1) + x.unsqueeze(1), FLAT),
    "squeeze": (lambda x: x[:, :1].squeeze(1), ROWS),
    "expand": (lambda x: x.unsqueeze(1).expand(-1, 4, -1), FLAT),
    "expand to batch": (lambda x: torch.cat([BIG[0].expand(x.shape[0], -1), x], 1), FLAT),
    "zeros of the batch": (lambda x: torch.cat([x, x.new_zeros(x.shape[0], 2) + 1], 1), FLAT),
    "repeat": (lambda x: x.repeat(1, 2, 3), ROWS),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), ROWS),
    "size arithmetic": (lambda x: x.reshape((x.shape[0] * 6) // 3, 3)[: x.shape[0] + 1], FLAT),
    "size as a number": (lambda x: x * x.shape[0], FLAT),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2), IMAGE),
    "upsample to": (lambda x: F.interpolate(x, size=(16, 18), mode="nearest"), IMAGE),
    "rsqrt": (lambda x: torch.rsqrt(x.abs() + 0.1), ROWS),
    "pow": (lambda x: x**2 + x.abs() ** 1.5, ROWS),
    "power of": (lambda x: 2.0**x, ROWS),
    "sqrt": (lambda x: x.abs().sqrt(), ROWS),
    "exp": (torch.exp, ROWS),
    "log": (lambda x: torch.log(x.abs() + 1), ROWS),
    "sin": (lambda x: x.sin() + x.cos(), ROWS),
    "erf": (torch.erf, ROWS),
    "rounding": (lambda x: x.floor() + x.ceil() + x.round(), ROWS),
    "reciprocal": (lambda x: torch.reciprocal(x.abs() + 1), ROWS),
    "where": (lambda x: torch.where(x > 0.1, x, x.exp()), ROWS),
    "masked_fill": (lambda x: x.masked_fill(x <= 0, -7.0), ROWS),
    "comparisons": (lambda x: ((x < 1) & (x >= -1) | ~(x != x.relu())).float() + (x == 0).float(), ROWS),
    "maximum": (lambda x: torch.maximum(x, -x) + torch.minimum(x, BIG[0]), ROWS),
    "embedding": (lambda x: F.embedding(x.abs().long().clamp(max=2), BIG.clone()), FLAT),
    "kinds of zero": (lambda x: x.new_full((x.shape[0], 1), 2.5) + torch.zeros_like(x) - torch.ones_like(x), FLAT),
    "kinds of one": (lambda x: torch.full((x.shape[0], 1), 3.0) * torch.ones(x.shape[0], 1) * x.new_ones(1), FLAT),
    "and zeros": (lambda x: torch.zeros(x.shape[0], 6) + torch.full_like(x, 0.3) + x, FLAT),
    "sum of all": (lambda x: x - x[:1].mean() + x[:1].sum(), ROWS),
    "power": (lambda x: x.abs() ** x, ROWS),
    "squeeze all": (lambda x: torch.relu(x[:, :1, :1]).squeeze((1, 2)), ROWS),
    "squeeze any": (lambda x: x.mean((1, 2), keepdim=True).expand(-1, 2, -1).squeeze(), ROWS),
    "logic": (lambda x: torch.where(torch.logical_not(x > 1) & (x >= x.relu()), x, -x), ROWS),
    "more logic": (lambda x: torch.where(torch.logical_or(x.eq(0), torch.logical_and(x < 1, x.lt(-x))), x, 9), ROWS),
    "other logic": (lambda x: (~((x > x.tanh()) | (x <= x.sin()))).float(), ROWS),
    "where number": (lambda x: torch.where(x > 0, 1.5, x), ROWS),
    "unequal": (lambda x: x.ne(0.5).float() + x.ne(x.relu()).float() + x.eq(x.relu()).float(), ROWS),
    "masked by a tensor": (lambda x: x.masked_fill(x.lt(0), torch.tensor(3.0)), ROWS),
    "pool a line": (lambda x: F.avg_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 1), ROWS),
    "upsample a line": (lambda x: F.interpolate(x, scale_factor=3), ROWS),
    "double": (lambda x: (x.double() / 3).float(), ROWS),
    "double inplace": (lambda x: (x.clone().relu_().double() / 3).float(), ROWS),
    "sizes": (lambda x: x.reshape(x.shape[0] * 6)[x.shape[0] % 2 : x.shape[0] * 6 - x.shape[0]], FLAT),
    "at most": (lambda x: torch.clamp_max(torch.clamp_min(x, -0.5), 0.5), ROWS),
    "index range": (lambda x: x + torch.arange(4), ROWS),
    "inplace": (lambda x: x.clone().add_(1).relu_(), ROWS),
    "silu gate": (lambda x: F.silu(x[..., :2]) * x[..., 2:], ROWS),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation(name: str, tmp_path: Path) -> None:
    """One operation on random inputs, for batches of other sizes than the example's."""
    function, shape = OPERATIONS[name]
    module = function if isinstance(function, nn.Module) else Of(function)
    model = Model(module.eval().requires_grad_(False), drawn(1, *shape), meta={"kind": "module"})
    assert "untraced" not in captured(model).meta
    for batch in (4, 7):
        assert_near(*both(model, tmp_path / "m.onnx", drawn(batch, *shape)))


def test_the_table_is_covered() -> None:
    """Every operation in the table stands in one of the graphs of this file."""
    models = [network(name)[0] for name in NETWORKS]
    for function, shape in OPERATIONS.values():
        module = function if isinstance(function, nn.Module) else Of(function)
        models.append(Model(module.eval(), drawn(1, *shape)))
    seen = {n.target for model in models for n in captured(model).module.graph.nodes}  # type: ignore[union-attr]
    assert {str(target) for target in export_ops.TABLE if target not in seen} == set()


class Layers(nn.Module):
    """Every kind of layer, quantized on the way: tokens (batch, 6) -> images -> sequences -> one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.line = nn.Conv1d(6, 6, 3, padding="same", groups=2)
        self.image = nn.Conv2d(1, 4, (2, 3), padding=(0, 1))
        self.up = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)
        self.plain_up = nn.ConvTranspose2d(6, 2, 2, bias=False)
        self.norm, self.rms = nn.LayerNorm(17), nn.RMSNorm(17)
        self.head = nn.Linear(17, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.relu(self.line(self.embed(tokens)))
        x = F.relu(self.image(x.unsqueeze(1)))
        x = F.relu(self.plain_up(F.relu(self.up(x))))
        return self.head(self.rms(self.norm(x))).mean((1, 2))


class Heads(nn.Module):
    """Fused attention with fewer heads of keys than queries, causal, with a float and with a Boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        q = self.q(x).view(batch, 5, 4, 2).transpose(1, 2)
        k, v = (t.view(batch, 5, 2, 2).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        bias = (x.mean(-1)[:, None, None] - x.mean(-1)[:, None, :, None]).abs()
        biased = F.scaled_dot_product_attention(q, q, causal, attn_mask=-bias, scale=0.3)
        masked = F.scaled_dot_product_attention(biased, q, q, attn_mask=bias < 2)
        return self.out(masked.transpose(1, 2).flatten(2))


NETWORKS: dict[str, Any] = {
    **test_capture.CASES,
    "layers": (Layers, lambda n: torch.randint(0, 9, (n, 6)), None),
    "heads": (Heads, lambda n: torch.randn(n, 5, 8), None),
}


def network(name: str) -> tuple[Model, Tensor]:
    torch.manual_seed(5)
    build, inputs, _ = NETWORKS[name]
    return Model(test_capture.trained(build()), inputs(1), None, {"kind": "module"}), inputs(40)


def share_off(found: np.ndarray, expected: np.ndarray) -> float:
    """The share of outputs that deviate beyond float rounding."""
    assert found.shape == expected.shape
    return float((np.abs(found - expected) > 1e-5 * np.abs(expected).max()).mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_float_networks(name: str, tmp_path: Path) -> None:
    """Whole networks agree to float rounding in every target that takes float layers."""
    model, x = network(name)
    for to in ("qdq", "qdq-real", "qcdq", "qonnx"):
        assert_near(*both(model, tmp_path / "m.onnx", x[:5], to=to))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("fmt", ["int8", "int4", "e4m3", "e2m1"])
def test_quantized_networks(name: str, fmt: str, tmp_path: Path) -> None:
    """Quantized to one format throughout: equal but for float rounding, and values that it moves over a boundary."""
    model, x = network(name)
    done = quantize(model, uniform(fmt, fmt, steps=STEPS), Calib(x))
    for to in ("qdq", "qdq-real"):
        assert share_off(*both(done, tmp_path / "m.onnx", x, to=to)) <= 0.05


@pytest.mark.parametrize("name", ["by hand", "encoder", "heads", "residual", "upsample"])
@pytest.mark.parametrize("fmt", ["int8", "ternary"])
def test_quantized_networks_for_other_tools(name: str, fmt: str, tmp_path: Path) -> None:
    """qcdq takes every kind of layer, qonnx all but embeddings and transposed convolutions, which it names."""
    model, x = network(name)
    done = quantize(model, uniform(fmt, fmt, steps=STEPS), Calib(x))
    assert share_off(*both(done, tmp_path / "m.onnx", x, to="qcdq")) <= 0.05
    unknown = {"by hand": r"layer 'embed': target qonnx has no embedding", "upsample": "'up': .*conv_transpose2d"}
    if name in unknown:
        with pytest.raises(InputError, match=unknown[name]):
            export_onnx(done, tmp_path / "other.onnx", to="qonnx")
        assert not (tmp_path / "other.onnx").exists()
    else:
        assert share_off(*both(done, tmp_path / "m.onnx", x, to="qonnx")) <= 0.05


class Convolutions(nn.Module):
    """Residual convolutions and a classifier, with nothing in float that could be rounded differently."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(x + self.b(x))
        return self.c(F.max_pool2d(x, 8).flatten(1))


@pytest.mark.parametrize("fmt", ["int8", "int4", "ternary", "e2m1"])
def test_exact_sums_are_exact(fmt: str, tmp_path: Path) -> None:
    """A quantized residual network with sums below 2^24 gives torch's bits."""
    torch.manual_seed(2)
    x = torch.randn(30, 3, 8, 8)
    done = quantize(Model(Convolutions().eval(), x[:1], meta={"kind": "module"}), uniform(fmt, fmt), Calib(x))
    np.testing.assert_array_equal(*both(done, tmp_path / "m.onnx", x))
    np.testing.assert_array_equal(*both(done, tmp_path / "m.onnx", x[:3], to="qonnx"))


def operators(model: Model) -> list[str]:
    return [node.op_type for node in build_onnx(model).graph.node]


def test_a_product_of_activations_is_summed_in_float64() -> None:
    """Both operands have their quantizer, and onnxruntime's default optimizations put in no integer kernel."""
    model, x = network("by hand")
    done = quantize(model, uniform("int8", "int8", steps=STEPS), Calib(x))
    kinds = operators(done)
    layers, products = len(done.qlayers()), 2
    assert kinds.count("MatMul") == products and kinds.count("Cast") == 3 * products
    assert kinds.count("QuantizeLinear") == layers - 1 + 2 * products  # an embedding's input is not quantized


def test_what_reaches_no_output_is_left_out() -> None:
    """Sizes that the graph computes for its reshapes are not in the file: shapes are constants with one -1."""
    assert not {"Shape", "Concat", "Mul"} & set(operators(network("encoder")[0])) - {"Mul"}
    assert "Shape" in operators(Model(Of(OPERATIONS["expand to batch"][0]).eval(), drawn(1, 6)))


def test_constants_are_folded() -> None:
    """What no input reaches is one constant: here a causal mask made of ones."""

    def masked(x: Tensor) -> Tensor:
        return x.masked_fill(torch.ones(4, 4).tril().logical_not(), -1.0)

    model = Model(Of(masked).eval(), drawn(1, 4, 4))
    assert operators(model) == ["Where", "Identity"]


def test_input_types(tmp_path: Path) -> None:
    """Tokens stay int64 and images uint8; the first dimension is called batch, in the output wherever it is."""
    model, _ = network("by hand")
    export_onnx(model, tmp_path / "m.onnx")
    (entry,) = open_session(tmp_path / "m.onnx").get_inputs()
    assert (entry.type, entry.shape) == ("tensor(int64)", ["batch", 5])
    images = torch.randint(0, 256, (3, 2, 4), dtype=torch.uint8)
    model = Model(Of(lambda x: (x.float() / 255).permute(1, 0, 2)).eval(), images[:1])
    export_onnx(model, tmp_path / "m.onnx", overwrite=True)
    session = open_session(tmp_path / "m.onnx")
    assert session.get_inputs()[0].type == "tensor(uint8)"
    assert session.get_outputs()[0].shape == [2, "batch", 4]


def refusal(function: Any, *shape: int, to: Any = "qdq") -> str:
    module = function if isinstance(function, nn.Module) else Of(function)
    with pytest.raises(InputError) as caught:
        build_onnx(Model(module.eval(), drawn(1, *shape)), to=to)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals() -> None:
    """What has no translation is one line that names the node, the operation or option, and what is accepted."""
    assert "node 'cumsum': aten.cumsum.default has no translation to ONNX; accepted: " in refusal(
        lambda x: x.cumsum(1), *ROWS
    )
    assert "node 'avg_pool2d'" in refusal(lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True), *IMAGE)
    assert "from [8, 6] to [3, 5]; accepted: a divisor" in refusal(lambda x: F.adaptive_avg_pool2d(x, (3, 5)), *IMAGE)
    assert "accepted: whole factors" in refusal(lambda x: F.interpolate(x, size=(9, 9)), *IMAGE)
    assert "beta 2" in refusal(lambda x: F.softplus(x, 2), *ROWS)
    assert "order 1" in refusal(lambda x: F.normalize(x, 1, -1), *ROWS)
    assert "one dimension" in refusal(lambda x: x.argmax(), *ROWS)
    assert "circular" in refusal(lambda x: F.pad(x, (1, 1), mode="circular"), *ROWS, to="qonnx")
    assert "of integers" in refusal(lambda x: x.long() & x.relu().long(), *ROWS)
    assert "several values" in refusal(lambda x: (x, x + 1), *ROWS)
    assert "depends on the batch" in refusal(lambda x: x.repeat_interleave(2, 0), *ROWS)
    assert "loops over time" in refusal(nn.RNN(4, 3), *ROWS)
    chain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    assert "node 'tanh': aten.tanh.default has no place in a chain" in refusal(chain, 4, to="finn")
