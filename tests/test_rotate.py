"""Rotation: Hadamard matrices, what can be turned in which network, and that it helps against outliers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from laws_methods import error_of
from tiny_models import MODELS, attention, generator, stream
from torch import Tensor, nn

from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.methods import rotate
from quantkit.methods.rotate import hadamard, rotation
from quantkit.model import Calib, Model
from quantkit.qlayers import QLayer
from quantkit.recipe import make_plan, quantize, uniform
from quantkit.rotations import find_blocks, turn


@pytest.mark.parametrize("n", [1, 2, *range(4, 201, 4)])
def test_hadamard_matrices(n):
    """Rows are orthogonal and entries 1 or -1; every power of two and every p + 1 and 2 (p + 1) is there."""
    H = hadamard(n)
    primes = [p for p in range(3, 200) if all(p % d for d in range(2, p))]
    orders = {1, 2, *(p + 1 for p in primes if p % 4 == 3), *(2 * p + 2 for p in primes if p % 4 == 1)}
    orders |= {o * 2**k for o in orders for k in range(8)}
    assert (H is not None) == (n in orders)
    if H is not None:
        assert torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64)) and bool((H.abs() == 1).all())


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n", [2, 3, 6, 8, 12, 48, 64, 90, 172])
def test_rotations(n, centred):
    """Q is orthogonal, keeps the vector of ones if asked to, and spreads a unit vector over all channels."""
    Q = rotation(n, generator(3), centred)
    assert torch.allclose(Q @ Q.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    if centred:
        assert torch.allclose(Q.sum(dim=1), torch.ones(n, dtype=torch.float64), atol=1e-12)
    if n >= 48:
        assert Q.abs().max() <= (4 if hadamard(n) is not None else 5) / n**0.5
    assert n < 6 or not torch.equal(Q, rotation(n, generator(4), centred))


class Bottlenecks(nn.Module):
    """The linear bottlenecks of MobileNetV2: a stream of images without a nonlinearity, padded and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.up, self.deep = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.down, self.head = nn.Conv2d(24, 8, 1, bias=False), nn.Linear(8, 5)
        self.pool, self.grouped = nn.AvgPool2d(2), nn.Conv2d(8, 6, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool(x + self.down(F.relu(self.deep(F.relu(self.up(x))))))
        return self.head(x.mean(dim=(2, 3))) + F.relu(self.grouped(x)).mean(dim=(1, 2, 3))[:, None]


class Tokens(nn.Module):
    """Positions and a class token as parameters, queries and keys without rotary positions, one reader of a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.positions, self.token = nn.Parameter(torch.zeros(1, 7, 12)), nn.Parameter(torch.zeros(1, 1, 12))
        self.norm, self.last = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = torch.cat([self.token.expand(n, -1, -1), self.embed(x)], dim=1) + self.positions
        q, k, v = self.qkv(self.norm(x)).view(n, 7, 3, 2, 6).permute(2, 0, 3, 1, 4)
        x = x + self.out((torch.softmax(q @ k.transpose(-1, -2) * 0.4, dim=-1) @ v).transpose(1, 2).reshape(n, 7, 12))
        return self.head(self.last(x)[:, 0])


class Pair(nn.Module):
    """Two layers with nothing between them, and what may not be turned: a ReLU, a gate, a shared layer, the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 4)
        self.gate = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(self.a(x)))
        y = self.c(self.c(y) * self.gate(y))
        return y


def network(module: nn.Module, *shape: int) -> tuple[Model, Calib]:
    g = generator(61)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) / max(1, parameter[0].numel()) ** 0.5
    inputs = torch.randn(40, *shape, generator=g)
    return captured(Model(module.eval(), inputs[:1])), Calib(inputs)


def llama() -> tuple[Model, Calib]:
    """Transformers' own, with gains that are not ones: 6 query heads share 2 of values."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'quantkit[lm]'")
    import tiny_lm

    module, ids = tiny_lm.llama(), tiny_lm.tokens(9, 8)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand(parameter.shape, generator=generator(8)) + 0.5
    return captured(Model(module, ids[:1])), Calib(ids)


NETWORKS = {
    "stream": (stream, [(12, True)]),
    "bottlenecks": (lambda: network(Bottlenecks(), 3, 6, 6), [(4, False), (4, False)]),
    "tokens": (lambda: network(Tokens(), 6, 5), [(12, True), *[(6, False)] * 4]),
    "pair": (lambda: network(Pair(), 5), [(6, False)]),
    "attention": (lambda: (captured(attention()[0]), attention()[1]), [(8, False)] * 4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks(name):
    """Sizes of what can be turned, by hand: a group of channels that a grouped convolution reads stays together."""
    build, expected = NETWORKS[name]
    assert [(block.size, block.centred) for block in find_blocks(build()[0])] == expected


def test_blocks_of_llama():
    """The stream with embedding, head and all gains, and the values of every head where several queries share them."""
    model, _ = llama()
    stream, *heads = find_blocks(model)

    def ends(names) -> set[str]:
        return {name.rpartition(".")[2] for name in names}

    assert stream.size == 48 and not stream.centred and len(stream.norms) == 5
    assert ends(stream.rows) == {"embed_tokens", "o_proj", "down_proj"}
    assert ends(stream.columns) == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}
    assert [block.size for block in heads] == [8] * 4
    assert all(ends(block.rows) | ends(block.columns) == {"v_proj", "o_proj"} for block in heads)
    assert all(len(copies) == 3 for block in heads for copies in block.columns.values())


@pytest.mark.parametrize("name", [*NETWORKS, "llama"])
def test_function_is_preserved(name):
    """Outputs on the whole calibration set stay within rounding, though every turned weight is another."""
    model, calib = llama() if name == "llama" else NETWORKS[name][0]()
    blocks = find_blocks(model)
    for key, layer in list(model.layers().items()):
        model.replace(key, QLayer(layer, make_plan("int4", "int4")).eval())
    for point in model.points().values():
        point.plan = make_plan("float", "int8")
    weights = {key: layer.weight.clone() for key, layer in model.layers().items()}
    with torch.no_grad():
        before = model.module(calib.inputs)
        report = rotate.apply(model, calib)
        after = model.module(calib.inputs)
    assert (after - before).abs().max() <= 2e-5 * before.abs().max()
    assert report["blocks"] == len(blocks)
    touched = {n for b in blocks for n in (*b.rows, *b.columns)} & model.layers().keys()
    assert touched and all(not torch.allclose(weights[n], model.layers()[n].weight, atol=1e-3) for n in touched)
    assert all(torch.equal(weights[n], model.layers()[n].weight) for n in weights.keys() - touched)


def test_shared_weights_part():
    """An embedding that is also the head is turned in both places, each once."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.norm, self.mix = nn.RMSNorm(8), nn.Linear(8, 8)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.head(self.norm(x + self.mix(x)))

    module = Tied()
    module.norm.weight.data = torch.rand(8, generator=generator(5)) + 0.5
    ids = torch.randint(0, 11, (9, 4), generator=generator(6))
    model = captured(Model(module.eval(), ids[:1]))
    done = quantize(model, uniform("float", "int8", steps=(("rotate", {}),)), Calib(ids))
    exact = model.module(ids)
    assert (done.module(ids) - exact).abs().max() <= 0.05 * exact.abs().max()
    assert [s["diagnostics"]["blocks"] for s in done.meta["steps"] if s["name"] == "rotate"] == [1.0]


def test_sabotage():
    """A matrix that is not orthogonal, and one that moves the ones under a LayerNorm, change the outputs."""
    for Q in (1.01 * torch.eye(12), rotation(12, generator(1))):
        model, calib = stream()
        (block,) = find_blocks(model)
        before = model.module(calib.inputs)
        turn(model, block, Q)
        assert (model.module(calib.inputs) - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("acts", ["int4", "e2m1"])
def test_helps_against_outliers(acts):
    """Where one channel of a stream is 20 times the others, the error with 4-bit inputs falls by half at least."""

    class Outlier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Linear(16, 64), nn.RMSNorm(64)
            self.up, self.down, self.head = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(x + self.down(F.relu(self.up(self.norm(x)))))

    model, calib = network(Outlier(), 16)
    model.module.embed.weight.data[7] *= 20
    model.module.embed.bias.data[7] *= 20
    plain, turned = (
        quantize(model, uniform("int8", acts, steps=steps), calib)
        for steps in ((), (("rotate", {}), ("act_scales", {})))
    )
    assert error_of(turned, model, calib) <= 0.5 * error_of(plain, model, calib)


def test_refuses():
    """Networks in which nothing is free, and layers that are quantized already."""
    model, calib = MODELS["cnn"]()
    with pytest.raises(InputError, match="nothing in this network can be rotated: no layers are joined by linear"):
        quantize(model, uniform("int4", "int4", steps=(("rotate", {}),)), calib)
    model, calib = stream()
    with pytest.raises(InputError, match="already quantized; put this step first"):
        quantize(model, uniform("int4", "int4", steps=(("rtn", {}), ("rotate", {}))), calib)
