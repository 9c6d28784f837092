"""What the cost model learns about a network: one `LayerSpec` per matrix product.

Plain facts with JSON both ways, so that a quantized network can be costed in another
process, or years later, without torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hwmodel.formats import Format, FormatError, Int, ScaleFormat, parse, parse_scale


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole weight tensor."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True, slots=True)
class PerRow:
    """One scale per output channel: shape (out, 1)."""

    def __str__(self) -> str:
        return "row"


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale per `size` consecutive inputs of each output channel, or for all if they are fewer: (out, in / size
    rounded up), as the last group may be shorter.

    scale: None for float32 scales; "e8m0" for powers of two; a minifloat for its values times one float32 of the
    whole tensor. With the weight's format this is a block format: `formats.Block`.
    """

    size: int
    scale: ScaleFormat | None = None

    def __str__(self) -> str:
        return f"group{self.size}" + ("" if self.scale is None else f":{self.scale}")


Granularity = PerTensor | PerRow | PerGroup


def parse_granularity(text: str) -> Granularity:
    """The granularity that `text` names: "tensor", "row" (or "channel"), "group32", "group32:e8m0".

    >>> parse_granularity("group32:e8m0")
    PerGroup(size=32, scale='e8m0')
    """
    name = text.strip().lower()
    if name == "tensor":
        return PerTensor()
    if name in ("row", "channel"):
        return PerRow()
    reason = ""
    if (m := re.fullmatch(r"group(\d+)(?::(\w+))?", name)) and int(m[1]) > 0:
        try:
            return PerGroup(int(m[1]), None if m[2] is None else parse_scale(m[2]))
        except FormatError as error:
            reason = f" ({error})"
    raise ValueError(
        f"unknown granularity {text!r}{reason}; accepted: tensor, row, group<size> such as group32, "
        "and with the format of the scales group32:e8m0"
    )


Activation = Literal["none", "relu", "tanh", "sigmoid", "elu", "leaky_relu", "gelu", "silu", "hardtanh", "other"]
CURVED = ("tanh", "sigmoid", "elu", "leaky_relu", "gelu", "silu", "other")
"""Activations that are not one straight line between two clips; "other" is a function of the caller's own."""


@dataclass(frozen=True, slots=True)
class Rescale:
    """What hardware needs to know of the exact arithmetic behind a layer's sums (`hwmodel.affine`).

    kind: "plain" (a constant power of two), "constant", "shift", "runtime", or "none" if only thresholds do.
    factor_bits: of the factor; of a shift, of its amount. adds: adders that make the constant's product.
    bits: of the sum times the factor plus the offset. shift: of these, the bits below one step of the output, 0 where
    levels are searched. patches: listed sums per row.
    """

    kind: str
    factor_bits: int = 0
    adds: int = 0
    bits: int = 0
    shift: int = 0
    patches: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """The map that a convolution reads and how its kernel moves over it; (height, width) pairs.

    channels, height, width: of the input, groups together. padding: zeros before and after the lines, before and after
    the columns. A linear layer is a kernel as large as its map, a signal a map of width 1.
    """

    channels: int
    height: int = 1
    width: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def out_height(self) -> int:
        """Lines of the output map.

        >>> Window(3, 32, 32, (3, 3), (2, 2), (0, 1, 0, 1)).out_height
        16
        """
        return (self.height + self.padding[0] + self.padding[1] - self.kernel[0]) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        """Columns of the output map."""
        return (self.width + self.padding[2] + self.padding[3] - self.kernel[1]) // self.stride[1] + 1


@dataclass(frozen=True, slots=True)
class Recurrence:
    """What hardware needs to know of a GRU or an LSTM beside the product with its input (`hwmodel.cell`).

    state: format of h, whose products with the weights take sums of `acc_bits` bits and whose steps are
    2^-state_fraction. factor_bits: of what a unit of a sum counts. bits: of a gate's input, which counts 2^-fraction.
    columns: bits of the units' constants that differ from each other. coded: a table makes the output's codes.
    memory: format of an LSTM's c, whose steps are 2^-memory_fraction; None of a GRU.
    """

    state: Int
    acc_bits: int
    factor_bits: int
    bits: int
    fraction: int
    state_fraction: int
    columns: int
    coded: bool
    memory: Int | None = None
    memory_fraction: int = 0


CELL_GATES = {"gru": 3, "lstm": 4}
"""Rows that each product of a recurrent cell has for one number of its state."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One matrix product of a network and what follows it, in the terms of hardware.

    name: dotted name of the layer.
    op: "linear", "conv2d", or "gru" or "lstm", which has both its products in one spec: `out_features` are the numbers
        of its state h, each with a row for every gate, and `acc_bits` those of the product with the input. Without
        weights: "add", the sum of two maps, each times a power of two, and "mean", of every channel of a map; "max" and
        "average", of every channel of a window, whose columns count its elements. What leaves "max" are codes it read.
    out_features, in_features: rows and columns of the matrix one output position needs; for a
        convolution the columns are `in_channels / groups * kernel_height * kernel_width`.
    positions: output positions per inference (1 for a linear layer, height * width for a convolution).
    weight, act: formats of weights and of the layer's input; None where they stay in float. A weight's format is
        never a block: its scales are the granularity's.
    out: format of the next layer's input, None after the last layer (the sum itself leaves).
    granularity: how many weight scales there are.
    activation: function applied to each output before requantization.
    acc_bits: two's complement bits that hold every partial sum exactly; None = derive from the types.
    zeros: fraction of weights that are exactly zero, 0..1.
    scale_pow2: every requantization factor is a power of two (a shift is enough).
    groups: convolution groups (depthwise: equal to out_features).
    out_factors: each output is multiplied by a factor of its own behind the activation (SmoothQuant
        factors of the next layer that could not be absorbed).
    rescale: the arithmetic that reproduces what follows the sums exactly; None: not known, `hwmodel.convert`
        assumes what is usual.
    window: the map that the layer reads position by position; None: the whole input at once, or not known.
    recurrence: of a GRU or an LSTM, and only of them.
    second: format of the second map of an "add", and only of it.
    sources: names of the layers it reads, "" for the network's input; empty: the layer before.
    """

    name: str
    op: Literal["linear", "conv2d", "gru", "lstm", "add", "mean", "max", "average"]
    out_features: int
    in_features: int
    positions: int = 1
    weight: Format | None = None
    act: Format | None = None
    out: Format | None = None
    granularity: Granularity = field(default_factory=PerRow)
    activation: Activation = "none"
    acc_bits: int | None = None
    zeros: float = 0.0
    scale_pow2: bool = False
    groups: int = 1
    out_factors: bool = False
    rescale: Rescale | None = None
    window: Window | None = None
    recurrence: Recurrence | None = None
    second: Format | None = None
    sources: tuple[str, ...] = ()

    @property
    def joint(self) -> bool:
        """Whether it has neither weights nor lines of its input: "add" or "mean"."""
        return self.op in ("add", "mean")

    @property
    def pool(self) -> bool:
        """Whether it has lines, but no weights: "max" or "average"."""
        return self.op in ("max", "average")

    @property
    def macs(self) -> int:
        """Multiply-accumulates per inference."""
        if self.joint or self.pool:
            return 0
        if self.op in CELL_GATES:
            return CELL_GATES[self.op] * self.out_features * (self.in_features + self.out_features)
        return self.out_features * self.in_features * self.positions

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values; `from_json` is its inverse."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for key in ("weight", "act", "out"):
            record[key] = None if record[key] is None else str(record[key])
        record["granularity"] = str(self.granularity)
        for key in ("rescale", "window"):
            record[key] = None if record[key] is None else asdict(record[key])
        if self.recurrence is None:
            del record["recurrence"]
        else:
            formats = {"state": str(self.recurrence.state)}
            if self.recurrence.memory is not None:
                formats["memory"] = str(self.recurrence.memory)
            record["recurrence"] = asdict(self.recurrence) | formats
        if self.second is None:
            del record["second"]
        else:
            record["second"] = str(self.second)
        if self.sources:
            record["sources"] = list(self.sources)
        else:
            del record["sources"]
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> LayerSpec:
        """Inverse of `to_json`."""
        values = dict(record)
        for key in ("weight", "act", "out"):
            values[key] = None if values[key] is None else parse(values[key])
        values["granularity"] = parse_granularity(values["granularity"])
        if values.get("rescale") is not None:
            values["rescale"] = Rescale(**values["rescale"])
        if values.get("window") is not None:
            entries: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in values["window"].items()
            }
            values["window"] = Window(**entries)
        if (values.get("recurrence") is not None) != (values["op"] in CELL_GATES):
            raise ValueError(f"layer {values['name']!r}: a recurrence goes with op gru or lstm")
        if values.get("recurrence") is not None:
            record = values["recurrence"]
            found = {k: parse(record[k]) for k in ("state", "memory") if record.get(k) is not None}
            for fmt in found.values():
                if not isinstance(fmt, Int):
                    raise ValueError(f"layer {values['name']!r}: a cell's state is an integer, not {fmt}")
            if ("memory" in found) != (values["op"] == "lstm"):
                raise ValueError(f"layer {values['name']!r}: a format of c goes with op lstm")
            values["recurrence"] = Recurrence(**record | found)
        if values.get("second") is not None:
            values["second"] = parse(values["second"])
        values["sources"] = tuple(values.get("sources", ()))
        return cls(**values)


def links(specs: Sequence[LayerSpec]) -> tuple[tuple[int, ...], ...]:
    """For each layer the places of those it reads, -1 for the network's input; ValueError for a name not before it.

    >>> first, second = LayerSpec("a", "linear", 2, 2), LayerSpec("b", "linear", 2, 2, sources=("", "a"))
    >>> links((first, second))
    ((-1,), (-1, 0))
    """
    places: dict[str, int] = {"": -1}
    found: list[tuple[int, ...]] = []
    for i, spec in enumerate(specs):
        if unknown := [name for name in spec.sources if name not in places]:
            raise ValueError(f"layer {spec.name!r} reads {unknown[0]!r}, which is no layer before it")
        found.append(tuple(places[name] for name in spec.sources) or (i - 1,))
        places[spec.name] = i
    return tuple(found)
