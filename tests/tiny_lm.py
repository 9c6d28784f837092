"""The smallest language models with random weights; sizes are unequal on purpose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'quantkit[lm]'")

VOCABULARY = 61


def config(heads: int = 6, kv_heads: int = 2, dim: int = 8, layers: int = 2):
    """Llama with grouped queries: 6 query heads on 2 key-value heads of 8 channels."""
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=heads * dim,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int):
    """A random Llama whose attention is sharp enough that keys matter."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config(**sizes)).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 12
        layer.self_attn.v_proj.weight.data *= 12
    return model.to(dtype)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids, none of them padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def states(batch: int, length: int, seed: int = 0, heads: int = 2, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, heads, length, dim) whose channels differ in size and offset."""
    g = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.randn(2, heads, 1, dim, generator=g))
    offset = 3 * torch.randn(2, heads, 1, dim, generator=g)
    x = torch.randn(2, batch, heads, length, dim, generator=g) * size[:, None] + offset[:, None]
    return x[0], x[1]
