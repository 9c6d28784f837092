"""quantkit.export_graph: onnxruntime computes what torch computes, for every operation and for whole networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import test_capture
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit import export_graph
from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.export import build_onnx, export_onnx, open_session
from quantkit.model import Calib, Model
from quantkit.qlayers import ActQuant, Attention, MatMul
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
    "batch_norm inplace": (nn.Sequential(nn.BatchNorm2d(3).eval(), nn.ReLU(inplace=True)), IMAGE),
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
    "comparisons": (lambda x: ((x < 1) & (x >= -1) | ~(x != x.relu())).float() + (x == 0), ROWS),
    "maximum": (lambda x: torch.maximum(x, -x) + torch.minimum(x, BIG[0]), ROWS),
    "embedding": (lambda x: F.embedding(x.abs().long().clamp(max=2), BIG.clone()), FLAT),
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
    for batch in (1, 7):
        assert_near(*both(model, tmp_path / "m.onnx", drawn(batch, *shape)))


def test_the_table_is_covered() -> None:
    """Every operation in the table stands in one of the graphs above or of the networks below, but for other spellings."""
    seen = set()
    modules = [f if isinstance(f, nn.Module) else Of(f) for f, _ in OPERATIONS.values()]
    examples = [drawn(1, *shape) for _, shape in OPERATIONS.values()]
    for module, example in zip(modules, examples, strict=True):
        seen |= {str(n.target) for n in captured(Model(module.eval(), example)).module.graph.nodes}  # type: ignore
    for name in test_capture.CASES:
        seen |= {str(n.target) for n in captured(test_capture.case(name)[0]).module.graph.nodes}  # type: ignore
    missing = {str(f) for f in export_graph._TABLE} - seen
    print(sorted(missing))


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
        path = tmp_path / "m.onnx"
        if to == "qonnx" and name == "encoder":  # its output has the batch first; one input at a time there
            x = x[:2]
        assert_near(*both(model, path, x, to=to))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("fmt", ["int8", "int4", "e4m3", "e2m1"])
def test_quantized_networks(name: str, fmt: str, tmp_path: Path) -> None:
    """Quantized to one format throughout: equal, but for values on a rounding boundary behind float operations."""
    model, x = network(name)
    done = quantize(model, uniform(fmt, fmt, steps=STEPS), Calib(x))
    found, expected = both(done, tmp_path / "m.onnx", x)
    print(name, fmt, share_off(found, expected))
    found, expected = both(done, tmp_path / "m.onnx", x, to="qdq-real")
    print(name, fmt, "real", share_off(found, expected))
