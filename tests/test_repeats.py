"""Tracing two blocks for all: the same graph and the same logits as tracing all, or none where blocks differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from test_language import ids
from test_loader_hf import made
from torch import fx, nn

from quantkit import capture
from quantkit.decoder import FAMILIES
from quantkit.loaders import hf
from quantkit.model import Model
from quantkit.repeats import blocks_of, traced_by_two

BLOCKS = 4
ALTERNATING = ("gemma2", "smollm3")
"""Kinds whose blocks take turns: every other one looks at a window, every fourth has no rotations."""


def deep(kind: str, **config: Any) -> nn.Module:
    """A random model of four blocks, with norms that are not the trivial ones."""
    record = made(kind).config.to_dict() | {"num_hidden_layers": BLOCKS, "n_layer": BLOCKS}
    for each in ("layer_types", "no_rope_layers"):  # one entry a block: those of four are made anew
        record.pop(each, None)
    torch.manual_seed(3)
    module = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind].from_dict(record | config))
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5) if name.endswith("weight") else nn.init.normal_(parameter)
    hf._linearize(module)
    return module.eval()


def graph_of(module: nn.Module) -> fx.GraphModule:
    """The captured module."""
    found = capture.captured(Model(module, ids(1, 8), None, {"kind": "module"}))
    assert "untraced" not in found.meta and isinstance(found.module, fx.GraphModule)
    return found.module


def calls(graph: fx.GraphModule) -> list[tuple[Any, ...]]:
    """What every node does, and with which."""
    at = {node: i for i, node in enumerate(graph.graph.nodes)}
    return [
        (n.op, str(n.target) if n.op != "placeholder" else "", str(fx.map_arg((n.args, n.kwargs), at.__getitem__)))
        for n in at
    ]


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in ALTERNATING])
def test_two_blocks_give_the_graph_of_all(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node for node, weight for weight, and the logits are the module's own for another batch and length."""
    module = deep(kind)
    assert blocks_of(module) is not None
    lengths = []
    original = capture.exported
    monkeypatch.setattr(
        capture,
        "exported",
        lambda m, x: lengths.append(len(m.get_submodule(blocks_of(module) or ""))) or original(m, x),
    )
    short = graph_of(module)
    assert lengths == [2]
    monkeypatch.setattr(capture, "traced_by_two", lambda module, trace: None)
    whole = graph_of(module)
    assert calls(short) == calls(whole)
    assert all(torch.equal(a, b) for a, b in zip(short.parameters(), whole.parameters(), strict=True))
    assert [n for n, _ in short.named_parameters()] == [n for n, _ in whole.named_parameters()]
    with torch.inference_mode():
        x = ids(3, 11)
        torch.testing.assert_close(short(x), module(x, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_blocks_that_differ_are_all_traced() -> None:
    """Another width, another constant, another kind of attention, GPT-2's scores divided by the block's number."""
    assert blocks_of(deep("llama")) == "model.layers"
    assert [blocks_of(deep(kind)) for kind in ALTERNATING] == [None, None]
    wide = deep("llama")
    wide.model.layers[3].mlp.up_proj = nn.Linear(wide.config.hidden_size, 7)  # type: ignore[union-attr, index]
    other = deep("llama")
    other.model.layers[2].input_layernorm.variance_epsilon = 0.5  # type: ignore[union-attr, index]
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 2
    sliding = deep("qwen2", use_sliding_window=True, sliding_window=4, layer_types=kinds)
    scaled = deep("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert all(blocks_of(module) is None for module in (wide, other, sliding, scaled, nn.Linear(2, 2)))
    for module in (other, sliding, scaled):
        with torch.inference_mode():
            x = ids(2, 9)
            torch.testing.assert_close(graph_of(module)(x), module(x, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_a_trace_that_does_not_repeat_is_refused() -> None:
    """Where the second block's graph is not the first's, nothing is extended, and the module is as it was."""

    class Block(nn.Module):
        """A sum that the first of all blocks leaves out."""

        def __init__(self, number: int) -> None:
            super().__init__()
            self.layer_idx, self.linear = number, nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if self.layer_idx == 0 else x + self.linear(x)

    class Odd(nn.Module):
        """Blocks that behave by their number."""

        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.LlamaConfig(num_hidden_layers=3)
            self.layers = nn.ModuleList(Block(i) for i in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.layers:
                x = block(x)
            return x

    module, x = Odd().eval(), torch.randn(5, 4)
    assert blocks_of(module) == "layers"
    assert traced_by_two(module, lambda short: capture.exported(short, (x,))) is None
    assert len(module.layers) == 3
    graph = capture.captured(Model(module, x, None, {"kind": "module"})).module
    torch.testing.assert_close(graph(x), module(x))
