"""Links: found where rescaling preserves the function, and nowhere else."""

from __future__ import annotations

import pytest
import test_capture
import torch
import torch.nn.functional as F
from tiny_models import MODELS, correlated
from torch import Tensor, nn

from quantkit.capture import captured
from quantkit.links import Link, column_range, find_links, ranges, rescale, row_range, scale_rows, scale_stage
from quantkit.model import Model
from quantkit.policy import Head, InputStage, Policy
from quantkit.qlayers import LayerPlan, QLayer


class Block(nn.Module):
    """A residual block with normalization; between two widths, the shortcut skips pixels and pads channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 1, self.more - 1))
        return F.relu(y + x)


class ResNet(nn.Module):
    """Two blocks of 4 channels and one of 7."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 4, 1), Block(4, 7, 2))
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class ViTBlock(nn.Module):
    """Attention with packed queries, keys and values on normalized inputs, and a feed-forward pair."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.ff1, self.ff2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-1, -2) * 0.5).softmax(-1)
        x = x + self.out((a @ v).transpose(1, 2).reshape(b, n, d))
        return x + self.ff2(F.gelu(self.ff1(self.norm2(x))))


class LlamaBlock(nn.Module):
    """Grouped queries with rotary positions, RMS normalization by hand, a gated feed-forward pair."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gain = nn.Embedding(13, 8), nn.Parameter(torch.rand(8) + 0.5)
        self.q, self.k, self.v, self.o = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8)
        self.norm = nn.RMSNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 11), nn.Linear(8, 11), nn.Linear(11, 8)
        angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotated(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-right, left], dim=-1) * self.sin

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        h = self.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))
        q, k, v = (m(h).unflatten(-1, (-1, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Shuffled(nn.Module):
    """Channels split, shuffled, stacked in space and joined; an embedding in front, a sequence behind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.line = nn.Embedding(9, 6), nn.Conv1d(6, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 12, 1, groups=2)
        self.up, self.head = nn.ConvTranspose2d(9, 6, 2, 2, groups=3), nn.Conv2d(6, 2, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.line(self.embed(tokens).transpose(1, 2))), 2).unsqueeze(2)
        a, b = x.split(4, dim=1)
        a = F.pixel_shuffle(self.left(a), 2)
        b = F.interpolate(self.right(b)[:, 1:8], scale_factor=2)
        return self.head(F.leaky_relu(self.up(F.pad(torch.cat([a, b], dim=1).flip(1), (1, 0, 0, 1)))))


GRAPHS = {
    **{name: (lambda name=name: test_capture.case(name)[:2]) for name in test_capture.CASES},
    "resnet": lambda: (Model(test_capture.trained(ResNet()), torch.randn(1, 3, 6, 6)), torch.randn(4, 3, 6, 6)),
    "vit": lambda: (Model(ViTBlock().eval(), torch.randn(1, 5, 8)), torch.randn(3, 5, 8)),
    "llama": lambda: (
        Model(LlamaBlock().eval(), torch.randint(0, 13, (1, 5))),
        torch.randint(0, 13, (3, 5)),
    ),
    "shuffled": lambda: (Model(Shuffled().eval(), torch.randint(0, 9, (1, 10))), torch.randint(0, 9, (3, 10))),
}


def graph(name: str) -> tuple[Model, Tensor]:
    """A captured network with random weights and biases, and inputs."""
    torch.manual_seed(7)
    if name in MODELS:
        model, calib = MODELS[name]()
        return captured(model), calib.inputs[:9]
    model, x = GRAPHS[name]()
    model = captured(model)
    for parameter in model.module.parameters():
        if parameter.dim() == 1:
            parameter.data = torch.randn_like(parameter) + 0.3
    return model, x


EXPECTED = {
    "mlp": [Link(("first",), ("middle",), "layer")],
    "cnn": [
        Link(("conv",), ("depthwise",), "layer"),
        Link(("depthwise",), ("grouped",), "layer"),
        Link(("grouped",), ("head",), "layer"),
    ],
    "policy": [
        Link((), ("net.0",), "input"),
        Link(("net.0",), ("net.2",), "layer"),
        Link(("net.2",), ("net.4",), "layer"),
    ],
    "tanh_policy": [Link((), ("net.0",), "input")],
    "image_policy": [
        Link((), ("net.0",), "input"),
        Link(("net.0",), ("net.3",), "layer"),
        Link(("net.3",), ("net.5",), "layer"),
    ],
    "upsample": [Link(("up",), ("line",), "layer")],
    "by hand": [Link(("norm",), ("qkv",), "norm"), Link(("qkv",), (), "qk")],
    "resnet": [
        Link(
            ("stem", "blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv2"),
            ("blocks.0.conv1", "blocks.1.conv1", "blocks.2.conv1", "head"),
            "layer",
        ),
        Link(("blocks.0.conv1",), ("blocks.0.conv2",), "layer"),
        Link(("blocks.1.conv1",), ("blocks.1.conv2",), "layer"),
        Link(("blocks.2.conv1",), ("blocks.2.conv2",), "layer"),
        Link(("blocks.2.conv2",), ("head",), "layer"),
    ],
    "vit": [
        Link(("norm1",), ("qkv",), "norm"),
        Link(("qkv",), (), "qk"),
        Link(("qkv",), ("out",), "layer"),
        Link(("norm2",), ("ff1",), "norm"),
    ],
    "llama": [
        Link(("gain",), ("q", "k", "v"), "norm"),
        Link(("q", "k"), (), "qk"),
        Link(("v",), ("o",), "layer"),
        Link(("norm",), ("gate", "up"), "norm"),
        Link(("up",), ("down",), "layer"),
    ],
    "shuffled": [
        Link(("embed",), ("line",), "layer"),
        Link(("line",), ("left",), "layer"),
        Link(("line",), ("right",), "layer"),
        Link(("left",), ("up",), "layer"),
        Link(("right",), ("up",), "layer"),
        Link(("up",), ("head",), "layer"),
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_expected_links(name):
    """The tiny networks have exactly the links one sees in their code."""
    assert find_links(graph(name)[0]) == EXPECTED[name]


def test_channels():
    """Links of a residual stream hold the channels that go through all; rotation pairs channels, heads share keys."""
    channels = {name: [link.channels for link in find_links(graph(name)[0])] for name in EXPECTED}
    assert channels["resnet"] == [4, 4, 4, 7, 3]
    assert channels["vit"] == [8, 8, 8, 8]
    assert channels["llama"] == [8, 4, 8, 8, 11]
    assert channels["shuffled"] == [6, 4, 4, 2, 7, 6]
    assert channels["image_policy"] == [2, 4, 5]
    stream, *_, last = find_links(graph("resnet")[0])
    assert stream.rows["blocks.2.conv2"].tolist() == stream.columns["head"].tolist() == [0, 1, 2, 3, 4, 0, 0]
    assert last.columns["head"].tolist() == [1, 0, 0, 0, 0, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("name", {**MODELS, **GRAPHS})
def test_scaling_a_link_preserves_the_function(name, wrap):
    """Any factors > 0 on any link change no output, of plain and of wrapped layers; powers of two not by a bit."""
    model, x = graph(name)
    for key, layer in list(model.layers().items()) if wrap else []:
        model.replace(key, QLayer(layer, LayerPlan()))
    before, g = model.module(x), torch.Generator().manual_seed(3)
    for link in find_links(model):
        f = torch.exp(torch.randn(link.channels, generator=g))
        up, down = ranges(model, link)
        other = model.copy()
        rescale(other, link, f)
        assert torch.allclose(other.module(x), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
        new_up, new_down = ranges(other, link)
        if not set(link.producers) & set(link.consumers):  # a layer on both sides keeps what it scales and unscales
            assert torch.allclose(new_up, up * f) and torch.allclose(new_down, down / f)
        changed = [n for n, v in other.module.state_dict().items() if not torch.equal(v, model.module.state_dict()[n])]
        assert changed
        other = model.copy()
        rescale(other, link, torch.exp2(torch.randint(-3, 4, (link.channels,), generator=g)))
        assert torch.equal(other.module(x), before)


def test_sabotage():
    """A producer that is scaled alone changes the function: the law above can fail."""
    model, x = graph("vit")
    link = find_links(model)[2]
    before = model.module(x)
    scale_rows(model.layers()["qkv"], torch.where(link.rows["qkv"] > 0, 2.0, 1.0))
    assert not torch.allclose(model.module(x), before, rtol=1e-2)


class Branches(nn.Module):
    """One producer with two consumers, and one whose output is also used bare."""

    def __init__(self, bare: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.bare = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3), bare

    def forward(self, x):
        h = F.relu(self.a(x))
        y = self.b(h) + self.c(h)
        return y + h[:, :3] if self.bare else y


def test_branches():
    """Two consumers share one link; of a producer that is read bare, the channels that are not, are a link."""
    x = torch.randn(1, 4)
    assert find_links(captured(Model(Branches(False), x))) == [Link(("a",), ("b", "c"), "layer")]
    (link,) = find_links(captured(Model(Branches(True), x)))
    assert link.rows["a"].tolist() == [0, 0, 0, 1, 2, 3]


class Twice(nn.Module):
    """The same layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(F.relu(self.a(F.relu(self.a(x)))))


class Untraceable(nn.Module):
    """Control flow on data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.b(x)


class Pooled(nn.Module):
    """Attention whose queries are fixed by tanh; its keys have nothing to cancel with."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.q, self.k, self.by_hand = nn.Linear(4, 4), nn.Linear(4, 4), by_hand

    def forward(self, x):
        q, k = torch.tanh(self.q(x)), self.k(x)
        if self.by_hand:
            return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ x
        return F.scaled_dot_product_attention(q, k, x)


class Nonlinear(nn.Module):
    """A layer, one function, a layer."""

    def __init__(self, f) -> None:
        super().__init__()
        self.a, self.f, self.b = nn.Linear(4, 4), f, nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.f(self.a(x)))


NONLINEAR = {
    "gelu": F.gelu,
    "relu6": F.relu6,
    "shifted": lambda h: h + 0.5,
    "square": lambda h: h * h,
    "reciprocal": lambda h: 1 / h,
    "quotient": lambda h: h / (h.abs() + 1),
    "ratio": lambda h: torch.div(h, 0.1, rounding_mode="floor"),
    "softmax": lambda h: h.softmax(-1),
    "mask": lambda h: torch.where(h > 0.1, h, 0.0),
    "padded": lambda h: F.pad(h[:, :3], (0, 1), value=1.0),
    "integer": lambda h: h.to(torch.int32).float(),
    "sorted": lambda h: h.sort(-1).values,
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_steps_that_keep_no_factor(name):
    """Behind a function that is not homogeneous by channel, there is no link."""
    assert find_links(captured(Model(Nonlinear(NONLINEAR[name]), torch.randn(2, 4)))) == []


def test_no_links():
    """Shared layers, tied weights, data-dependent control flow, mixed channels and half an attention give none."""
    x = torch.randn(1, 4)
    assert find_links(captured(Model(Twice(), x))) == []
    assert find_links(captured(Model(Untraceable(), x))) == []
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert find_links(captured(Model(tied, x))) == []
    for by_hand in (False, True):
        assert find_links(captured(Model(Pooled(by_hand), torch.randn(2, 5, 4)))) == []


def test_a_linear_layer_on_pixels_mixes_channels():
    """A linear layer along the width of an image reads every channel in every column: one factor for all of them."""
    net = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Linear(5, 3))
    model = captured(Model(net, torch.randn(1, 2, 5, 5)))
    (link,) = find_links(model)
    assert link.channels == 1 and link.rows["0"].tolist() == [1] * 5


def test_ranges_of_rows_and_columns():
    """Rows and columns of a transposed, grouped convolution are those of its QLayer; embeddings' are turned."""
    torch.manual_seed(2)
    for layer in (nn.ConvTranspose2d(6, 9, 3, groups=3), nn.Conv1d(6, 9, 3, groups=3), nn.Embedding(5, 3)):
        wrapped = QLayer(layer, LayerPlan())
        assert torch.equal(row_range(layer), row_range(wrapped))
        assert torch.equal(column_range(layer), column_range(wrapped))
    table = nn.Embedding(5, 3)
    assert torch.equal(row_range(table), table.weight.abs().amax(dim=0))


def test_stage_keeps_its_clip():
    """Scaling the input stage scales its clip bounds, so that clipped inputs stay clipped."""
    stage = InputStage(torch.zeros(3).numpy(), torch.ones(3).numpy(), -0.5, 0.8)
    net = nn.Sequential(nn.Linear(3, 2))
    policy = Policy(stage, net, Head("discrete", nvec=(2,)), (3,))
    x = correlated(40, 3, seed=6)
    before = policy.stage(x)
    f = torch.tensor([0.3, 1.7, 5.0])
    scale_stage(policy, f)
    assert torch.allclose(policy.stage(x), before * f, rtol=1e-6)
