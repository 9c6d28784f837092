"""Small random networks of every decoder family, with quantized layers and with the same weights dequantized."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hwmodel import formats
from hwmodel.spec import PerRow
from quantkit.qlayers import LayerPlan, QLayer
from quantkit.qtensor import dequantize, fit_scale, quantize

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'quantkit[lm]'")

from transformers.pytorch_utils import Conv1D  # noqa: E402

VOCABULARY = 61
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GLOBAL_FIRST = ["full_attention", "sliding_attention"]
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
}
FAMILIES = {
    "llama": {},
    "llama3": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "llama_yarn": {"rope_parameters": YARN, "num_key_value_heads": 1, "head_dim": 16},
    "llama_dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 3.0},
    "gemma3": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 9, "layer_types": GLOBAL_FIRST},
    "gemma3_linear": {
        "head_dim": 16,
        "sliding_window": 5,
        "rope_parameters": TWO_ROPES,
        "final_logit_softcapping": 2.0,
    },
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
    },
    "olmo2": {},
    "phi3": {"sliding_window": 5},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 5},
    "gpt2": {},
}
TYPES = {
    "llama3": "llama",
    "llama_yarn": "llama",
    "llama_dynamic": "llama",
    "gemma3": "gemma3_text",
    "gemma3_linear": "gemma3_text",
}


def network(family: str = "llama", layers: int = 2, hidden: int = 48, **options):
    """A small random network of a family, its linear layers as nn.Linear; 6 query heads on 2 key-value heads."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=hidden, n_layer=layers, n_head=6, n_positions=64, **sizes)
    else:
        sizes |= {"hidden_size": hidden, "intermediate_size": hidden - 8, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
        config = transformers.AutoConfig.for_model(TYPES.get(family, family), **(sizes | FAMILIES[family] | options))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # biases, norms and sharp attention that a fresh network has not
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 5 * parameter
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, Conv1D):
            made = torch.nn.Linear(*layer.weight.shape)
            made.weight, made.bias = torch.nn.Parameter(layer.weight.data.T.contiguous()), layer.bias
            put(model, name, made)
    return model


def put(model, name: str, layer) -> None:
    """Replace a submodule."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def rounded(model, name: str, granularity=PerRow(), where: str = ""):  # noqa: B008
    """(the network with QLayers, transformers' with dequantized weights), of layers with `where` in their names."""
    with_layers, plain, fmt = copy.deepcopy(model), copy.deepcopy(model), formats.parse(name)
    fmt = formats.element(fmt)
    for at, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and where in at and (at != "lm_head" or where == at):
            made = QLayer(layer, LayerPlan(fmt, None, granularity))
            scale = fit_scale(layer.weight, fmt, granularity, "absmax")
            made.set_weight(quantize(layer.weight, scale, fmt, granularity))
            put(with_layers, at, made)
            plain.get_submodule(at).weight = torch.nn.Parameter(dequantize(made.q))
    return with_layers, plain


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, x: torch.Tensor, **options) -> np.ndarray:
    with torch.no_grad():
        return model(x, **options).logits.numpy()


def apart(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference relative to the largest logit."""
    return float(np.abs(got - want).max() / np.abs(want).max())
