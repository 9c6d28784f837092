"""SAQ: the older a cached key or value, the fewer bits it has (arXiv 2410.18441, page 17).

levels = (16, B_2, ..., B_q), block S. Of t tokens seen after the sink the newest t mod S are held in 16 bits, the S
before them in B_2, the S before those in B_3, ..., all older ones in B_q: whenever S tokens are complete they are
quantized to B_2 and every block above the floor B_q goes one level down, by exact integer division of its
codes (`quantkit.kvgrid`). Keys are in groups of `group` tokens of one channel, after rotary embedding, as transformers
hands them over; values in groups of `group` channels of one token.

Differs from the paper, which prints the decoding of keys only: values go down with the keys; codes are divided instead
of dequantized and quantized again, and the floor is never touched, with the same result; a prompt leaves the
cache as the same tokens one by one would; the first `sink` tokens may stay in 16 bits for ever. With two levels it is
KIVI for keys.

16 bits are the model's own where it computes in float16 or bfloat16; elsewhere float16, to which keys and values are
rounded on entry. Scale and minimum of a group are float16. Left padding enters the groups it shares with tokens.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from quantkit.errors import InputError
from quantkit.kvcontract import PackedCache, PackedLayer, attention_shape, packed_cache, value_width
from quantkit.kvgrid import BITS, Axis, Packed, concat, demote, dequantize, grouped, quantize, ungrouped


class Block(NamedTuple):
    """Quantized keys and values of the same tokens."""

    keys: Packed
    values: Packed


def make(
    config: PreTrainedConfig,
    *,
    levels: str = "16-8-4",
    block: int = 128,
    group: int = 32,
    sink: int = 0,
    values: Literal["token", "heads"] = "token",
) -> PackedCache:
    """An empty cache for a model of `config`; layers with a sliding window keep it in 16 bits.

    levels: bits by age, falling from 16, of 16, 8, 4, 2. block: tokens between two demotions, a
    multiple of group. group: keys, or values, that share a scale and a minimum: tokens of one channel, or channels of
    one token. values: "token" keeps groups of values within a head, of which a smaller head is one group;
    "heads" lays a token's heads side by side, which costs less where heads are smaller than groups.
    Raises InputError naming the option and what is accepted.
    """
    bits = parse_levels(levels)
    heads, dim = attention_shape(config)
    width = value_width(values, group, heads, dim, "saq")
    if block < 1 or block % group:
        raise InputError(f"saq: block={block} is not a multiple of group={group}")
    if sink < 0:
        raise InputError(f"saq: sink={sink} is negative")
    return packed_cache(config, "saq", lambda: SaqLayer(bits, block, group, sink, values, width))


def parse_levels(text: str) -> tuple[int, ...]:
    """`16-8-4` -> (16, 8, 4); InputError unless it starts at 16 and falls through 8, 4, 2."""
    parts = text.split("-")
    bits = tuple(int(p) for p in parts if p.isdecimal())
    falling = all(a > b for a, b in pairwise(bits))
    if len(bits) != len(parts) or bits[0] != 16 or not falling or not set(bits[1:]) <= set(BITS):
        raise InputError(
            f"saq: levels={text!r}; accepted: 16, then fewer and fewer of 8, 4, 2, such as 16-8-4 or 16-8-4-2"
            " (codes of other widths do not divide exactly)"
        )
    return bits


class SaqLayer(PackedLayer):
    """One layer's cache. Oldest first: sink, floor (any number of blocks at B_q), recent blocks, tail in 16 bits."""

    def __init__(self, levels: tuple[int, ...], block: int, group: int, sink: int, axis: Axis, width: int) -> None:
        super().__init__()
        self.levels, self.block, self.group, self.sink = levels, block, group, sink
        self.axis, self.width = axis, width
        self.floor: Block | None = None
        self.recent: list[Block] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty sink and tail for the batch, heads, dtype and device of the arguments."""
        super().lazy_initialization(key_states, value_states)
        self.sink_keys, self.sink_values = self.keys, self.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append tokens (batch, heads, tokens, dim); all keys and values in the model's dtype, the new ones in 16 bits.

        Raises InputError when a key or value to be quantized is NaN or beyond float16.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = key_states.to(self.half), value_states.to(self.half)
        old_keys, old_values = self.dequantized()
        seen = torch.cat([old_keys, keys.to(self.dtype)], 2), torch.cat([old_values, values.to(self.dtype)], 2)
        self._append(keys, values)
        return seen

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """All keys and values held, oldest first, in the model's dtype."""
        blocks = [b for b in (self.floor, *self.recent) if b is not None]
        keys = [ungrouped(dequantize(b.keys), "channel", self.heads).to(self.dtype) for b in blocks]
        values = [ungrouped(dequantize(b.values), self.axis, self.heads).to(self.dtype) for b in blocks]
        return (
            torch.cat([self.sink_keys.to(self.dtype), *keys, self.keys.to(self.dtype)], 2),
            torch.cat([self.sink_values.to(self.dtype), *values, self.values.to(self.dtype)], 2),
        )

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """New tokens into sink and tail; complete blocks leave the tail and the stair moves."""
        head = min(self.sink - self.sink_keys.shape[2], keys.shape[2])
        if head > 0:
            self.sink_keys = torch.cat([self.sink_keys, keys[:, :, :head]], 2)
            self.sink_values = torch.cat([self.sink_values, values[:, :, :head]], 2)
            keys, values = keys[:, :, head:], values[:, :, head:]
        keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        n = keys.shape[2] // self.block if len(self.levels) > 1 else 0
        if n:
            full = n * self.block
            self._descend(self._quantized(keys[:, :, :full], values[:, :, :full]), n)
            keys, values = keys[:, :, full:].clone(), values[:, :, full:].clone()
        self.keys, self.values = keys, values

    def _descend(self, new: Block, n: int) -> None:
        """n new blocks at B_2; of all recent ones the newest len(levels) - 2 stay above the floor, by age."""
        blocks = [*self.recent, *(self._cut(new, i, i + 1) for i in range(n))]
        above = max(len(blocks) - (len(self.levels) - 2), 0)
        floor = [_demoted(b, self.levels[-1]) for b in blocks[:above]]
        if floor:
            floor = [self.floor, *floor] if self.floor is not None else floor
            self.floor = Block(concat([b.keys for b in floor]), concat([b.values for b in floor]))
        recent = blocks[above:]
        self.recent = [_demoted(b, self.levels[len(recent) - i]) for i, b in enumerate(recent)]

    def _cut(self, block: Block, first: int, last: int) -> Block:
        """Blocks first, ..., last - 1 of several."""
        rows = self.block // self.group
        return Block(block.keys[first * rows : last * rows], block.values[first * self.block : last * self.block])

    def _quantized(self, keys: Tensor, values: Tensor) -> Block:
        bits = self.levels[1]
        return Block(
            quantize(grouped(keys, "channel", self.group), bits), quantize(grouped(values, self.axis, self.width), bits)
        )

    def get_seq_length(self) -> int:
        """Tokens held."""
        if not self.is_initialized:
            return 0
        rows = sum(b.keys.scale.shape[2] for b in (self.floor, *self.recent) if b is not None)
        return self.sink_keys.shape[2] + rows * self.group + self.keys.shape[2]

    def bits_held(self) -> list[int]:
        """Bits of every token held, oldest first."""
        if not self.is_initialized:
            return []
        bits = [16] * self.sink_keys.shape[2]
        for b in (self.floor, *self.recent):
            bits += [b.keys.bits] * (b.keys.scale.shape[2] * self.group) if b is not None else []
        return bits + [16] * self.keys.shape[2]

    def bytes_held(self) -> int:
        """Bytes of all tensors held."""
        if not self.is_initialized:
            return 0
        whole = (self.sink_keys, self.sink_values, self.keys, self.values)
        packed = [part for b in (self.floor, *self.recent) if b is not None for part in b]
        return sum(t.numel() * t.element_size() for t in whole) + sum(part.nbytes for part in packed)

    def room(self) -> int:
        """Tokens until the stair moves next."""
        if len(self.levels) == 1:
            return sys.maxsize
        if not self.is_initialized:
            return self.sink + self.block
        return self.sink - self.sink_keys.shape[2] + self.block - self.keys.shape[2]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -tokens_to_remove tokens (given negative, as transformers does).

        Blocks keep the bits they have. Of a block cut in two the older part goes back into the tail: its values
        stay as they are (but for rounding to 16 bits) until the tail is full again.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if not self.is_initialized or tokens_to_remove == 0:
            return
        keep = max(self.get_seq_length() + tokens_to_remove, 0)
        sink = self.sink_keys.shape[2]
        blocks = [b for b in (self.floor, *self.recent) if b is not None]
        counts = [b.keys.scale.shape[2] * self.group // self.block for b in blocks]
        if keep >= sink + sum(counts) * self.block:
            tail = keep - sink - sum(counts) * self.block
            self.keys, self.values = self.keys[:, :, :tail].clone(), self.values[:, :, :tail].clone()
            return
        old_keys, old_values = self.dequantized()
        self.sink_keys, self.sink_values = self.sink_keys[:, :, :keep].clone(), self.sink_values[:, :, :keep].clone()
        full = max(keep - sink, 0) // self.block
        first = min(sink + full * self.block, keep)
        self.keys, self.values = (x[:, :, first:keep].to(self.half, copy=True) for x in (old_keys, old_values))
        left = [min(n, max(full - sum(counts[:i]), 0)) for i, n in enumerate(counts)]
        has_floor = self.floor is not None
        kept = [self._cut(b, 0, n) if n else None for b, n in zip(blocks, left, strict=True)]
        self.floor = kept[0] if has_floor else None
        self.recent = [b for b in kept[has_floor:] if b is not None]

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.sink_keys = self.sink_values = torch.empty(0)
        self.floor, self.recent, self.is_initialized = None, [], False

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        if not self.is_initialized:
            return
        i = indices.to(self.device)
        self.keys, self.values = self.keys[i], self.values[i]
        self.sink_keys, self.sink_values = self.sink_keys[i], self.sink_values[i]
        self.floor = None if self.floor is None else Block(self.floor.keys.at(i), self.floor.values.at(i))
        self.recent = [Block(b.keys.at(i), b.values.at(i)) for b in self.recent]


def _demoted(block: Block, bits: int) -> Block:
    return Block(demote(block.keys, bits), demote(block.values, bits))
