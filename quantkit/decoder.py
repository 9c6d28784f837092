"""`Decoder`: a quantized language model as its exports see it: configuration, layers by name, and what else there is.

Names are transformers' own, `model.layers.0.self_attn.q_proj` for instance, whether the module is its class or the
graph that was captured from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import InputError
from quantkit.qlayers import Plain, QLayer

FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
"""The families of language models that are read, by transformers' `model_type`."""


@dataclass(frozen=True)
class Decoder:
    """A causal language model.

    config: transformers' configuration. layers: linear layers and embeddings, quantized or not, by dotted name.
    tensors: every other parameter and buffer, by name. files: tokenizer.json and others to take along. meta:
    `Model.meta`.
    """

    config: Any
    layers: Mapping[str, Plain | QLayer]
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """transformers' `model_type`: llama, qwen3, ..."""
        return str(self.config.model_type)

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        found = getattr(self.config, "head_dim", None)
        return int(found or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    def tensor(self, name: str) -> Tensor:
        """A tensor that is no layer's, such as a norm's weight."""
        if name not in self.tensors:
            raise InputError(f"the network has no {name!r}; it is not built as transformers' {self.family}")
        return self.tensors[name].detach()

    def layer(self, name: str) -> Plain | QLayer:
        """A linear layer or embedding."""
        if name not in self.layers:
            raise InputError(f"the network has no layer {name!r}; it is not built as transformers' {self.family}")
        return self.layers[name]

    def quantized(self) -> dict[str, QLayer]:
        """The layers whose weights are quantized, by name."""
        return {n: x for n, x in self.layers.items() if isinstance(x, QLayer) and x.q is not None}

    def tied(self) -> bool:
        """Whether the output layer's weights are the embedding's, both in float: they are then stored once."""
        names = [name for name in self.layers if name == "lm_head" or name.endswith(("embed_tokens", "wte"))]
        if len(names) != 2 or any(name in self.quantized() for name in names):
            return False
        first, second = (self.layers[name].weight for name in names)
        return first.shape == second.shape and torch.equal(first, second)

    def accounted_bits(self) -> int:
        """Bits of all weights as this project counts them: quantized ones with their scales, the rest in float32."""
        total = 0
        for name, layer in self.layers.items():
            q = layer.q if isinstance(layer, QLayer) else None
            if q is not None:
                total += q.bits
            elif not (name == "lm_head" and self.tied()):
                total += 32 * layer.weight.numel()
            bias = bias_of(layer)
            total += 0 if bias is None else 32 * bias.numel()
        return total + sum(32 * tensor.numel() for name, tensor in self.tensors.items())


def decoder_of(
    module: nn.Module, config: Any, files: Sequence[Path] = (), meta: Mapping[str, Any] | None = None
) -> Decoder:
    """The decoder that a module is, transformers' class or a captured graph of it."""
    layers: dict[str, Plain | QLayer] = {}
    for name, part in module.named_modules():
        if isinstance(part, QLayer | nn.Linear | nn.Embedding):  # Gemma's embedding is a class of its own
            layers[name] = part
    rest = {
        name: tensor
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if name.rpartition(".")[0] not in layers
    }
    return Decoder(config, layers, rest, tuple(files), meta or {})


def config_record(config: Any) -> dict[str, Any]:
    """A configuration as config.json holds it, all of it, without the folder it was read from."""
    record: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    record.pop("_name_or_path", None)
    return record


def bias_of(layer: Plain | QLayer) -> Tensor | None:
    """A layer's bias, (outputs,), or None where it has none or it is all zero."""
    bias = getattr(layer, "bias", None)
    return None if bias is None or not bool(bias.any()) else bias.detach()


def weight_of(layer: Plain | QLayer) -> Tensor:
    """A layer's weight in real units, float32."""
    return (layer.effective_weight() if isinstance(layer, QLayer) else layer.weight).detach().float()


def refuse_inputs(decoder: Decoder, target: str) -> None:
    """InputError if a layer's input is quantized, which `target` has no place for."""
    for name, layer in decoder.layers.items():
        if isinstance(layer, QLayer) and layer.act is not None:
            raise InputError(
                f"layer {name!r}: its input is quantized to {layer.act.fmt}, which {target} does not carry; "
                "accepted: --acts float"
            )
