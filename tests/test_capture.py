"""Capturing a module as a graph: the function stays, every product gets a name and a module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils as U
from torch import Tensor, fx, nn

from quantkit.attention import Attention, MatMul
from quantkit.capture import captured
from quantkit.model import Calib, Model
from quantkit.qlayers import QLayer
from quantkit.recipe import quantize, uniform
from quantkit.walk import Site, Visit, visit, walk


class Padded(nn.Conv2d):
    """A convolution that pads one side more than the other, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Residual(nn.Module):
    """Convolutions with batch normalization, a depthwise one, a residual sum, pooling and a classifier."""

    def __init__(self, whole: bool = True) -> None:
        """whole: no function writes in place."""
        super().__init__()
        self.whole = whole
        self.first, self.bn = Padded(3, 6, 2), nn.BatchNorm2d(6)
        self.depth, self.depth_bn = nn.Conv2d(6, 6, 3, padding="same", groups=6, bias=False), nn.BatchNorm2d(6)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.first(x))) if self.whole else F.relu_(self.bn(self.first(x)))
        x = self.relu(x + self.depth_bn(self.depth(x)))
        return self.fc(self.drop(F.avg_pool2d(x, 2).mean((2, 3))))


class Upsample(nn.Module):
    """A grouped transposed convolution with normalization, and one along a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bn = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), nn.BatchNorm2d(6)
        self.line = nn.Conv1d(6, 5, 3, padding=1, dilation=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(F.leaky_relu(self.bn(self.up(x))).flatten(2))


class ByHand(nn.Module):
    """Attention written out, a product with a bare parameter, RMS normalization, and tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.RMSNorm(8)
        self.qkv = nn.Parameter(torch.randn(8, 24) / 3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (self.norm(x) @ self.qkv).chunk(3, dim=-1)
        x = x + torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1) @ v
        return self.head(x)


def trained(module: nn.Module) -> nn.Module:
    """The module with normalization statistics that are not the trivial ones."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 2.0)
            nn.init.normal_(part.bias)
    return module.eval()


def encoder() -> nn.Module:
    """Two of torch's transformer layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


CASES = {
    "residual": (Residual, lambda n: torch.randn(n, 3, 9, 9), ["depth", "fc", "first"]),
    "in place": (lambda: Residual(False), lambda n: torch.randn(n, 3, 9, 9), ["depth", "fc", "first"]),
    "upsample": (Upsample, lambda n: torch.randn(n, 4, 3, 5), ["line", "up"]),
    "by hand": (ByHand, lambda n: torch.randint(0, 11, (n, 5)), ["embed", "head", "qkv"]),
    "encoder": (
        encoder,
        lambda n: torch.randn(n, 5, 8),
        [f"layers.{i}.{x}" for i in (0, 1) for x in ("linear1", "linear2", "self_attn.in_proj", "self_attn.out_proj")],
    ),
}


def case(name: str) -> tuple[Model, Tensor, list[str]]:
    """A model, inputs of another batch size, and the names its layers should have."""
    torch.manual_seed(5)
    build, inputs, names = CASES[name]
    return Model(trained(build()), inputs(1), None, {"kind": "module"}), inputs(7), names


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays(name: str) -> None:
    """A captured module gives the outputs of the original, for another batch size than the example's."""
    model, x, _ = case(name)
    graph = captured(model)
    assert isinstance(graph.module, fx.GraphModule) and "untraced" not in graph.meta
    with torch.no_grad():
        assert torch.allclose(graph.module(x), model.module(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_product_has_its_name(name: str) -> None:
    """Layers are named after the module that owned the weight; nothing with a weight is left over."""
    model, _, names = case(name)
    graph = captured(model)
    assert sorted(graph.layers()) == names
    assert "float_layers" not in graph.meta
    assert not any("batch_norm" in str(node.target) for node in graph.module.graph.nodes)
    assert {p.shape for p in graph.module.parameters()} <= {p.shape for p in model.module.parameters()} | {(24, 8)}


def test_attention_products_are_modules() -> None:
    """Products by hand become `MatMul`, fused attention becomes `Attention`; both have points."""
    by_hand, fused = captured(case("by hand")[0]), captured(case("encoder")[0])
    assert sum(isinstance(m, MatMul) for m in by_hand.module.modules()) == 2
    assert sum(isinstance(m, Attention) for m in fused.module.modules()) == 2
    assert list(by_hand.points()) == ["matmul.left", "matmul.right", "matmul_1.left", "matmul_1.right"]


@pytest.mark.parametrize("name", CASES)
def test_quantized_graphs_are_near_and_repeatable(name: str) -> None:
    """At 8 bits the output is near the float one, and two copies give the same bits; deepcopy and pickle work."""
    model, x, names = case(name)
    done = quantize(model, uniform("int8", "int8"), Calib(x))
    assert sorted(done.qlayers()) == names
    assert all(point.act is not None for point in done.points().values())
    with torch.no_grad():
        y, exact = done.module(x), model.module(x)
        assert 0 < (y - exact).square().mean() < 2e-2 * exact.square().mean()
        assert torch.equal(y, copy.deepcopy(done.module)(x))
        assert torch.equal(y, pickle.loads(pickle.dumps(done.module))(x))


def test_what_cannot_be_traced_is_quantized_by_layers() -> None:
    """Control flow that depends on data keeps the module; its layers are found, the others are named with a reason."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.odd = nn.Linear(4, 4), nn.Linear(4, 2), nn.Bilinear(4, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if x.sum() > 0 else self.b(self.odd(x, x))

    model = captured(Model(Branching(), torch.ones(2, 4)))
    assert list(model.layers()) == ["a", "b"]
    assert model.meta["untraced"] and model.meta["float_layers"] == {
        "odd": "Bilinear has code of its own around its weight"
    }
    done = quantize(model, uniform("int4", "int8"), Calib(torch.ones(5, 4)))
    assert list(done.qlayers()) == ["a", "b"] and "odd" in done.meta["float_layers"]


def test_a_shared_layer_stays_one() -> None:
    """A layer that runs twice is one layer, and both calls see its quantized weight."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.relu(self.a(x)))

    model, x = Model(Twice(), torch.randn(2, 4)), torch.randn(9, 4)
    done = quantize(model, uniform("int4", "float"), Calib(x))
    twin = copy.deepcopy(model.module)
    twin.a.weight.data = done.qlayers()["a"].effective_weight()
    with torch.no_grad():
        assert torch.allclose(done.module(x), twin(x), atol=1e-6)


def test_a_network_that_pads_by_itself_keeps_its_padding() -> None:
    """A subclass of Conv2d with code of its own is captured by its product: the pad stays in the graph."""
    model = Model(Padded(3, 6, 2).eval(), torch.randn(2, 3, 9, 9))
    done = quantize(model, uniform("int8", "float"), Calib(torch.randn(4, 3, 9, 9)))
    assert done.module(model.example).shape == (2, 6, 9, 9)
    assert [type(m) for m in done.layers().values()] == [QLayer]


def test_an_abandoned_walk_leaves_the_gradient_mode() -> None:
    """A walk that is given up inside `no_grad` and dies later does not switch gradients off for its caller."""
    model, x, _ = case("residual")
    done = quantize(model, uniform("int8", "int8"), Calib(x))
    with torch.no_grad():
        sites = walk(done, Calib(x), done.qlayers())
        next(sites)
    del sites
    assert torch.is_grad_enabled()


def test_outputs_of_a_step_do_not_outlive_the_next_step() -> None:
    """What a step hands on as a layer's output counts only if no later step has its turn at this layer."""
    model, x, _ = case("residual")
    done = quantize(model, uniform("int8", "int8"), Calib(x))
    seen = []

    def hand_on(site: Site) -> None:
        site.outputs = [torch.zeros_like(site.layer(batch)) for batch in site.inputs]

    def look(site: Site) -> None:
        seen.append(torch.cat(site.inputs))

    names = set(done.qlayers())
    visit(done, Calib(x), [Visit(names, hand_on, {}), Visit(names, look, {})])
    expected = [torch.cat(site.inputs) for site in walk(done, Calib(x), names)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_attention_without_formats_is_the_explicit_one() -> None:
    """The fused kernel gives what the two products give; an observer, a plan or a stand-in brings the products back."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    seen: list[Tensor] = []
    for causal in (False, True):
        plain = Attention(causal=causal)
        looked_at = Attention(causal=causal)
        looked_at.scores.register_forward_hook(lambda _m, _x, y: seen.append(y))
        assert torch.allclose(plain(q, k, v), looked_at(q, k, v), atol=1e-6)
        stood_in = Attention(causal=causal)
        stood_in.values.right = Doubled()
        assert torch.allclose(stood_in(q, k, v), 2 * plain(q, k, v), atol=1e-5)
    assert len(seen) == 2


class Doubled(nn.Module):
    """Stands where a point stood, as a trained one does."""

    act = None

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Normalized(nn.Module):
    """Two layers wrapped by `wrap`; loop: a branch on values, which cannot be followed."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module], loop: bool) -> None:
        super().__init__()
        self.conv, self.fc, self.loop = wrap(nn.Conv1d(4, 8, 3)), wrap(nn.Linear(8, 3)), loop

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu().amax(-1)
        return self.fc(y if not self.loop or y.sum() > 0 else -y)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "wrap", [U.parametrizations.weight_norm, U.parametrizations.spectral_norm, U.weight_norm, U.spectral_norm]
)
@pytest.mark.parametrize("loop", [False, True], ids=["followed", "by type"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_normalized_weights_are_plain(wrap: Callable[[nn.Module], nn.Module], loop: bool) -> None:
    """Weight and spectral norms are merged: the function stays, and every layer is quantized under its own name."""
    torch.manual_seed(0)
    module = Normalized(wrap, loop)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    module.train()(torch.randn(16, 4, 12))  # a step of the power iteration
    x = torch.randn(5, 4, 12)
    expected = module.eval()(x)
    model = captured(Model(module, x[:2]))
    torch.testing.assert_close(model.module(x), expected)
    torch.testing.assert_close(module(x), expected)
    assert set(model.layers()) == {"conv", "fc"} and "float_layers" not in model.meta
    assert ("untraced" in model.meta) == loop
    assert set(quantize(model, uniform("int4", "int8"), Calib(x)).qlayers()) == {"conv", "fc"}


def test_a_causal_mask_is_known_again_until_it_changes() -> None:
    """What attention has found out of a mask holds for that tensor and its numbers, not for others."""
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    q, k, v = torch.randn(3, 2, 4, 6, 8).unbind()
    attention = Attention()

    def agrees() -> bool:
        wanted = F.scaled_dot_product_attention(q, k, v, mask)
        return all(torch.allclose(attention(q, k, v, mask), wanted, atol=1e-6) for _ in range(2))

    assert agrees()
    mask[1, 0, 3, 1] = False
    assert agrees()
    mask[1, 0, 3, 1] = True
    assert agrees()
    with torch.inference_mode():
        assert torch.allclose(attention(q, k, v, mask.clone()), attention(q, k, v, mask), atol=1e-6)
