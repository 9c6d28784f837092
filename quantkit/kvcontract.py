"""What every cache of `quantkit.kvcache` needs of transformers: the `Cache` it is, the shape of a model's attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, get_layer_types_and_kwargs

from quantkit.errors import InputError
from quantkit.kvgrid import Axis


def half_of(dtype: torch.dtype) -> torch.dtype:
    """What a model's keys and values of this dtype are held in: 16 bits."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


class PackedLayer(CacheLayerMixin):
    """A layer's cache of any packing: how it begins, and what follows from `get_seq_length` and `batch_select_indices`.

    keys, values: the newest tokens in 16 bits, `half`, (batch, heads, tokens, dim).
    """

    keys: Tensor
    values: Tensor
    is_sliding = False
    is_croppable = False  # what was quantized stays so when tokens are taken back

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing held yet, for the batch, heads, dtype and device of the arguments."""
        self.dtype, self.device, self.heads = key_states.dtype, key_states.device, key_states.shape[1]
        self.half = half_of(self.dtype)
        self.keys, self.values = (
            x.new_empty((*x.shape[:2], 0, x.shape[3]), dtype=self.half) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length that `update` with `query_length` more tokens returns, and offset 0."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no bound."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, side by side."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))


class WindowLayer(DynamicSlidingWindowLayer):
    """The last tokens of a layer with a sliding window, in 16 bits: they are few, and never grow old."""

    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append tokens (batch, heads, tokens, dim); what they look at in the model's dtype, rounded to 16 bits."""
        dtype = key_states.dtype
        half = half_of(dtype)
        keys, values = super().update(key_states.to(half), value_states.to(half), *args, **kwargs)
        self.keys, self.values = self.keys.clone(), self.values.clone()  # not views of all there was
        return keys.to(dtype), values.to(dtype)

    def bytes_held(self) -> int:
        """Bytes of the keys and values in the window."""
        if not self.is_initialized:
            return 0
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))

    def room(self) -> int:
        """No bound: nothing is rounded later than on entry."""
        return sys.maxsize


class PackedCache(Cache):
    """A transformers cache of packed layers, to be given as `past_key_values`."""

    layers: list[Any]

    def bytes_held(self) -> int:
        """Bytes of all tensors of all layers: codes, metadata and tokens in 16 bits."""
        return sum(layer.bytes_held() for layer in self.layers)

    def room(self) -> int:
        """How many tokens may be fed at once such that each still meets what it would meet one by one; at least 1."""
        return min(layer.room() for layer in self.layers)


def attention_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """(key-value heads, channels of a head)."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, dim


def packed_cache(config: PreTrainedConfig, cache: str, packed: Callable[[], PackedLayer]) -> PackedCache:
    """A layer of `packed` for each that looks at all tokens, a `WindowLayer` for each with a sliding window.

    Raises InputError for layers of other kinds, and where every layer slides, so that there is nothing to pack.
    """
    kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    odd = set(kinds) - {"full_attention", "sliding_attention"}
    if odd or "full_attention" not in kinds:
        named = ", ".join(sorted(odd)) if odd else "sliding_attention alone"
        raise InputError(f"{cache}: cannot cache layers of type {named}; accepted: some of full_attention")
    windows = [option.get("sliding_window") for option in options]
    return PackedCache(layers=[packed() if w is None else WindowLayer(w) for w in windows])


def value_width(axis: Axis, group: int, heads: int, dim: int, cache: str) -> int:
    """Channels of a token in one group of values: `group`, or with axis "token" the whole head where that is less.

    Raises InputError when groups do not divide the channels or do not fill bytes.
    """
    if group < 8 or group % 8:
        raise InputError(f"{cache}: group={group} does not fill bytes; accepted: multiples of 8")
    width, channels = (group, heads * dim) if axis == "heads" else (min(group, dim), dim)
    if channels % width or width % 8:
        raise InputError(
            f"{cache}: {channels} channels ({heads} heads of {dim}) are not whole groups of {width}, a multiple of 8;"
            " choose another group or values="
        )
    return width
