"""What every cache of `quantkit.kvcache` needs of transformers: the `Cache` it is, the shape of a model's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, get_layer_types_and_kwargs

from quantkit.errors import InputError
from quantkit.kvgrid import Axis


class PackedLayer(CacheLayerMixin):
    """What follows from `get_seq_length` and `batch_select_indices` for a layer's cache of any packing."""

    keys: Tensor

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


class PackedCache(Cache):
    """A transformers cache of packed layers, to be given as `past_key_values`."""

    layers: list[Any]

    def bytes_held(self) -> int:
        """Bytes of all tensors of all layers: codes, metadata and tokens in 16 bits."""
        return sum(layer.bytes_held() for layer in self.layers)

    def room(self) -> int:
        """How many tokens may be fed at once such that each still meets what it would meet one by one; at least 1."""
        return min(layer.room() for layer in self.layers)


def attention_shape(config: PreTrainedConfig, cache: str) -> tuple[int, int, int]:
    """(layers, key-value heads, channels of a head); InputError when a layer is not plain full attention."""
    config = config.get_text_config(decoder=True)
    odd = set(get_layer_types_and_kwargs(config)[0]) - {"full_attention"}
    if odd:
        raise InputError(f"{cache}: cannot cache layers of type {', '.join(sorted(odd))}; accepted: full_attention")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, dim


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
