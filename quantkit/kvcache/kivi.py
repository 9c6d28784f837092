"""KIVI: old keys and values in 2 or 4 bits, recent ones in 16 (ICML 2024, arXiv 2402.02750, Algorithm 1).

Keys in groups of `group` tokens of one channel, values in groups of `group` channels of one token, on the grid of
`quantkit.kvgrid`. Whenever `residual` keys have gathered in 16 bits all of them are quantized; of values the newest
`residual` stay in 16 bits and the oldest beyond them is quantized token by token. A token meets the keys and values of
its own step before they are quantized.

Differs from the released code (jy-yuan/KIVI): a constant group gives its value instead of NaN; 16 bits are
float16 where the model computes in float32; transformers' own attention takes dequantized keys and values, where
theirs is a fused kernel.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from quantkit.errors import InputError
from quantkit.kvcontract import PackedCache, PackedLayer, attention_shape, packed_cache, value_width
from quantkit.kvgrid import BITS, Axis, Packed, concat, dequantize, grouped, quantize, ungrouped


def make(
    config: PreTrainedConfig,
    *,
    bits: int = 2,
    residual: int = 128,
    group: int = 32,
    values: Literal["token", "heads"] = "token",
) -> PackedCache:
    """An empty cache for a model of `config`; layers with a sliding window keep it in 16 bits.

    bits: of old keys and values: 8, 4 or 2. residual: keys that gather before they are quantized, a
    multiple of group, and values kept in 16 bits. group, values: see `saq.make`.
    Raises InputError naming the option and what is accepted.
    """
    heads, dim = attention_shape(config)
    width = value_width(values, group, heads, dim, "kivi")
    if bits not in BITS:
        raise InputError(f"kivi: bits={bits}; accepted: {', '.join(map(str, BITS))}")
    if residual < 1 or residual % group:
        raise InputError(f"kivi: residual={residual} is not a multiple of group={group}")
    return packed_cache(config, "kivi", lambda: KiviLayer(bits, residual, group, values, width))


class KiviLayer(PackedLayer):
    """One layer's cache: packed old keys and values, and the newest of each in 16 bits."""

    def __init__(self, bits: int, residual: int, group: int, axis: Axis, width: int) -> None:
        super().__init__()
        self.bits, self.residual, self.group, self.axis, self.width = bits, residual, group, axis, width
        self.old_keys: Packed | None = None
        self.old_values: Packed | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append tokens (batch, heads, tokens, dim); all keys and values in the model's dtype, the new ones in 16 bits.

        Raises InputError when a key or value to be quantized is NaN or beyond float16.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states.to(self.half)], 2)
        self.values = torch.cat([self.values, value_states.to(self.half)], 2)
        seen = self.dequantized()
        full = self.keys.shape[2] // self.residual * self.residual
        if full:
            self.old_keys = self._joined(self.old_keys, grouped(self.keys[:, :, :full], "channel", self.group))
            self.keys = self.keys[:, :, full:].clone()
        over = self.values.shape[2] - self.residual
        if over > 0:
            self.old_values = self._joined(self.old_values, grouped(self.values[:, :, :over], self.axis, self.width))
            self.values = self.values[:, :, over:].clone()
        return seen

    def _joined(self, old: Packed | None, groups: Tensor) -> Packed:
        new = quantize(groups, self.bits)
        return new if old is None else concat([old, new])

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """All keys and values held, oldest first, in the model's dtype."""
        keys, values = [self.keys.to(self.dtype)], [self.values.to(self.dtype)]
        if self.old_keys is not None:
            keys.insert(0, ungrouped(dequantize(self.old_keys), "channel", self.heads).to(self.dtype))
        if self.old_values is not None:
            values.insert(0, ungrouped(dequantize(self.old_values), self.axis, self.heads).to(self.dtype))
        return torch.cat(keys, 2), torch.cat(values, 2)

    def get_seq_length(self) -> int:
        """Tokens held."""
        if not self.is_initialized:
            return 0
        return self.keys.shape[2] + (0 if self.old_keys is None else self.old_keys.scale.shape[2] * self.group)

    def bytes_held(self) -> int:
        """Bytes of all tensors held."""
        if not self.is_initialized:
            return 0
        packed = sum(p.nbytes for p in (self.old_keys, self.old_values) if p is not None)
        return packed + sum(t.numel() * t.element_size() for t in (self.keys, self.values))

    def room(self) -> int:
        """Tokens until a key or value is next quantized before another token can meet it."""
        if not self.is_initialized:
            return self.residual
        return max(1, min(self.residual - self.keys.shape[2], self.residual + 1 - self.values.shape[2]))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -tokens_to_remove tokens (given negative, as transformers does).

        What is quantized stays so, except that keys of a group cut in two go back into the residual as they are.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if not self.is_initialized or tokens_to_remove == 0:
            return
        length = self.get_seq_length()
        keep = max(length + tokens_to_remove, 0)
        first = length - self.keys.shape[2]
        if keep < first:
            whole = keep // self.group
            self.keys = self.dequantized()[0][:, :, whole * self.group : keep].to(self.half, copy=True)
            self.old_keys = self.old_keys[:whole] if self.old_keys is not None and whole else None
        else:
            self.keys = self.keys[:, :, : keep - first].clone()
        first = length - self.values.shape[2]
        self.values = self.values[:, :, : max(keep - first, 0)].clone()
        if self.old_values is not None and keep < first:
            self.old_values = self.old_values[:keep] if keep else None

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = torch.empty(0)
        self.old_keys = self.old_values = None
        self.is_initialized = False

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        if not self.is_initialized:
            return
        i = indices.to(self.device)
        self.keys, self.values = self.keys[i], self.values[i]
        self.old_keys = None if self.old_keys is None else self.old_keys.at(i)
        self.old_values = None if self.old_values is None else self.old_values.at(i)
