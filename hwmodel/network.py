"""A whole quantized network in integers: what `emit` turns into hardware, and its exact reference.

Plain numpy and JSON, so that a network can be emitted and simulated without torch. A layer is a product (`Layer`) or
a GRU or an LSTM with a state (`hwmodel.cell`); of a network with states, inference follows inference in time. Behind a
product stand thresholds: `thresholds[r][k]` is the smallest sum of row r whose next code is
above the k-th level of the output format. They hold scale, bias, activation and rounding of
whatever float pipeline they were searched in, so the integers say exactly what it says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel import gru, lstm
from hwmodel.accumulator import signed_bits, sum_range, unit_range
from hwmodel.cell import NOUNS, Cell, codes_of
from hwmodel.cost import HwError
from hwmodel.formats import Block, Format, bits, decode, encode, levels
from hwmodel.reference import to_units
from hwmodel.spec import CELL_GATES, LayerSpec, PerGroup, Window, links

FORMAT_VERSION = 1
MAX_ACC_BITS = 53


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One matrix product and what follows it.

    spec: formats, accumulator bits, activation. codes: weights as bit patterns (rows, columns); columns of a window
    are channels, then lines, then columns of the kernel, the last fastest.
    thresholds: Python integers (rows, levels of `spec.out` - 1), ascending in each row; None of op max, and in the last
    layer, whose sums leave. A level that no sum reaches has a threshold above the row's largest sum.
    line: float64 (rows, 3), gain and bias that turn a sum into the activation's input, and the real value of one step
    of the output format behind it: a hint to `affine`, which proves what it makes of it by the thresholds;
    None if unknown.
    """

    spec: LayerSpec
    codes: np.ndarray
    thresholds: np.ndarray | None
    line: np.ndarray | None = None

    def __post_init__(self) -> None:
        name, shape = self.spec.name, (self.spec.out_features, self.spec.in_features)
        weight, act = self.formats
        if self.spec.window is None and (self.spec.op != "linear" or self.spec.positions != 1):
            raise HwError(f"layer {name!r}: a convolution becomes hardware with its window, which is not known")
        check_window(self.spec)
        if isinstance(self.spec.granularity, PerGroup):
            raise HwError(f"layer {name!r}: scales per group have no hardware here; accepted: tensor, row")
        if (self.spec.second is None) == (self.spec.op == "add"):
            raise HwError(f"layer {name!r}: a second input goes with op add")
        if self.codes.shape != shape:
            raise HwError(f"layer {name!r}: weight codes of shape {self.codes.shape}, not {shape}")
        low, high = self.sum_range
        need = signed_bits(int(min(low)), int(max(high)))
        if need > self.acc_bits:
            row = next(r for r in range(shape[0]) if signed_bits(int(low[r]), int(high[r])) == need)
            raise HwError(
                f"layer {name!r}: the accumulator has {self.acc_bits} bits, but row {row} reaches "
                f"{int(low[row])} .. {int(high[row])} and needs {need}"
            )
        if self.acc_bits > MAX_ACC_BITS:
            raise HwError(
                f"layer {name!r}: sums of {weight} x {act} need {self.acc_bits} bits; beyond {MAX_ACC_BITS} the float "
                "simulation is not exact and there is nothing to equal"
            )
        if self.spec.op == "max":
            if self.thresholds is not None or self.spec.out != act:
                raise HwError(f"layer {name!r}: op max gives codes that it read, {act}, without thresholds")
        elif (self.thresholds is None) != (self.spec.out is None):
            raise HwError(f"layer {name!r}: thresholds go with an output format")
        if self.line is not None and (self.line.shape != (shape[0], 3) or not np.isfinite(self.line).all()):
            raise HwError(f"layer {name!r}: gain, bias and step are finite numbers of shape {(shape[0], 3)}")
        if self.thresholds is not None:
            want = (shape[0], len(levels(self.spec.out)) - 1)  # type: ignore[arg-type]
            if self.thresholds.shape != want:
                raise HwError(f"layer {name!r}: thresholds of shape {self.thresholds.shape}, not {want}")
            if (self.thresholds[:, 1:] < self.thresholds[:, :-1]).any():
                raise HwError(f"layer {name!r}: thresholds of a row must ascend")

    @property
    def formats(self) -> tuple[Format, Format]:
        """Formats of weight and input; `HwError` if either is float."""
        if self.spec.weight is None or self.spec.act is None:
            side = "weights" if self.spec.weight is None else "input"
            raise HwError(f"layer {self.spec.name!r}: its {side} stayed in float; only integers become hardware")
        for fmt in (self.spec.act, self.spec.out):
            if isinstance(fmt, Block):
                raise HwError(f"layer {self.spec.name!r}: no hardware here scales blocks at run time, as {fmt} needs")
        return self.spec.weight, self.spec.act

    @property
    def acc_bits(self) -> int:
        """Bits of the accumulator."""
        assert self.spec.acc_bits is not None
        return self.spec.acc_bits

    @property
    def units(self) -> np.ndarray:
        """Weights as integers in units of their format's step."""
        return to_units(self.codes, self.formats[0])

    @property
    def sum_range(self) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest sum of each row, whatever the input: Python integers (rows,)."""
        acts = [self.formats[1], *([] if self.spec.second is None else [self.spec.second])]
        low, high = (np.array(ends, object) for ends in zip(*map(unit_range, acts), strict=True))
        if self.spec.op == "max":
            return np.repeat(low, len(self.codes)), np.repeat(high, len(self.codes))
        return sum_range(self.units, low, high)


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """Layers in order, each reading the one before it or those that its spec names; only the last one's results leave.

    host: in JSON what is done in float before the first and after the last.
    """

    layers: tuple[Layer | Cell, ...]
    host: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise HwError("a network has at least one layer")
        try:
            links = self.links
        except ValueError as error:
            raise HwError(str(error)) from None
        for layer, sources in zip(self.layers, links, strict=True):
            spec = layer.spec
            if len(sources) != 1 + (spec.op == "add"):
                raise HwError(f"layer {spec.name!r} reads {len(sources)} layers; an add reads two, any other one")
            for source, reads in zip(sources, (spec.act, spec.second), strict=False):
                gives = self.layers[0].spec.act if source < 0 else self.layers[source].spec.out
                if gives is None or gives != reads:
                    raise HwError(f"layer {spec.name!r} reads {reads}, but gets {gives}")
                size = inputs_of(self.layers[0].spec) if source < 0 else outputs_of(self.layers[source].spec)
                if size != inputs_of(spec):
                    raise HwError(f"layer {spec.name!r} has {inputs_of(spec)} inputs, but gets {size}")
        if unread := sorted(set(range(len(self.layers) - 1)) - {s for sources in links for s in sources}):
            raise HwError(f"layer {self.layers[unread[0]].spec.name!r} is read by none")
        windows = [layer.spec.window is not None for layer in self.layers]
        if any(windows) != all(windows):
            raise HwError("either every layer of a network has a window or none")
        if self.layers[-1].spec.out is not None and not windows[0]:
            raise HwError(f"layer {self.layers[-1].spec.name!r} is the last; its sums leave, without an output format")

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """What the cost model reads."""
        return tuple(layer.spec for layer in self.layers)

    @property
    def links(self) -> tuple[tuple[int, ...], ...]:
        """`spec.links` of the layers."""
        return links(self.specs)

    @property
    def inputs(self) -> int:
        """Codes of one inference; of a map line by line, column by column, its channels together."""
        return inputs_of(self.specs[0])

    @property
    def outputs(self) -> int:
        """Sums that leave (codes, where the last layer has an output format), a map in the order of `inputs`."""
        return outputs_of(self.specs[-1])

    @property
    def products(self) -> tuple[Layer, ...]:
        """The layers, `HwError` if one of them is recurrent."""
        found = tuple(layer for layer in self.layers if isinstance(layer, Layer))
        if len(found) < len(self.layers):
            cell = next(layer for layer in self.layers if isinstance(layer, Cell))
            raise HwError(
                f"layer {cell.name!r} is {NOUNS[cell.kind]}, whose weights stay in memories: it is neither "
                "unrolled nor streamed"
            )
        return found

    @property
    def recurrent(self) -> bool:
        """Whether a layer keeps a state."""
        return any(isinstance(layer, Cell) for layer in self.layers)

    @property
    def cells(self) -> frozenset[str]:
        """Kinds of recurrent cells among the layers: "gru", "lstm"."""
        return frozenset(layer.kind for layer in self.layers if isinstance(layer, Cell))

    def states(self, n: int) -> list[np.ndarray]:
        """The states (n, numbers) before a first step, all zero, of every recurrent cell."""
        return [np.zeros((n, layer.numbers), np.int64) for layer in self.layers if isinstance(layer, Cell)]

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values; `from_json` is its inverse."""
        layers = [
            {layer.kind: layer.to_json()}
            if isinstance(layer, Cell)
            else {
                "spec": layer.spec.to_json(),
                "codes": layer.codes.tolist(),
                "thresholds": None if layer.thresholds is None else layer.thresholds.tolist(),
                "line": None if layer.line is None else layer.line.tolist(),
            }
            for layer in self.layers
        ]
        return {"format_version": FORMAT_VERSION, "layers": layers, "host": self.host}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Network:
        """Inverse of `to_json`."""
        layers = tuple(
            Cell.from_json({"kind": kind} | entry[kind])
            if (kind := next(iter(entry.keys() & CELL_GATES.keys()), None))
            else Layer(
                LayerSpec.from_json(entry["spec"]),
                np.array(entry["codes"], dtype=np.int64),
                None if entry["thresholds"] is None else np.array(entry["thresholds"], dtype=object),
                None if entry.get("line") is None else np.array(entry["line"], dtype=np.float64),
            )
            for entry in record["layers"]
        )
        return cls(layers, record["host"])


def inputs_of(spec: LayerSpec) -> int:
    """Codes that a layer reads in one inference."""
    window = spec.window
    return spec.in_features if window is None else window.channels * window.height * window.width


def outputs_of(spec: LayerSpec) -> int:
    """Results of a layer in one inference."""
    return spec.out_features * spec.positions


def check_window(spec: LayerSpec) -> None:
    """`HwError` where a layer's window contradicts its matrix or no hardware here follows it."""
    window = spec.window
    if window is None:
        return
    (kh, kw), (sh, sw), (top, bottom, left, right) = window.kernel, window.stride, window.padding
    name = f"layer {spec.name!r}"
    if min(window.channels, window.height, window.width, kh, kw, sh, sw) < 1 or min(top, bottom, left, right) < 0:
        raise HwError(f"{name}: sizes, kernel and stride are 1 at least and padding 0, not {window}")
    if max(top, bottom) >= kh or max(left, right) >= kw:
        raise HwError(f"{name}: padding {window.padding} with a kernel of {kh} x {kw} has positions that see no input")
    if window.height + top + bottom < kh or window.width + left + right < kw:
        raise HwError(f"{name}: a kernel of {kh} x {kw} does not fit a map of {window.height} x {window.width}")
    if window.channels % spec.groups or spec.out_features % spec.groups:
        raise HwError(f"{name}: {spec.groups} groups do not divide {window.channels} and {spec.out_features} channels")
    columns, positions = window.channels // spec.groups * kh * kw, window.out_height * window.out_width
    columns *= 1 + (spec.op == "add")
    if (spec.in_features, spec.positions) != (columns, positions):
        raise HwError(
            f"{name}: the window has {columns} columns and {positions} positions, "
            f"not {spec.in_features} and {spec.positions}"
        )
    if any(window.padding) and spec.op != "max" and spec.act is not None and not _has_zero(spec.act):
        raise HwError(f"{name}: padding needs an input format with a zero, which {spec.act} has not")


def _has_zero(fmt: Format) -> bool:
    return any(value == 0 and encode(value, fmt) == 0 for value in levels(fmt))


def read_network(folder: Path) -> Network:
    """The network that was emitted into `folder`; `HwError` names what is missing or damaged."""
    path = folder / "network.json"
    try:
        document = json.loads(path.read_text())
        if "parts" in document:
            names = ", ".join(part["folder"] for part in document["parts"])
            raise HwError(f"{folder} holds several designs; give one of its folders: {names}")
        if document["format_version"] != FORMAT_VERSION:
            raise HwError(f"{path} has format_version {document['format_version']!r}; this version reads 1")
        return Network.from_json(document)
    except OSError:
        raise HwError(f"{folder} has no network.json; expected a directory written by quantkit rtl") from None
    except HwError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise HwError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None


def design_folders(folder: Path) -> list[Path]:
    """The designs in a directory of `quantkit rtl`: itself, or the folders that its network.json lists."""
    try:
        parts = json.loads((folder / "network.json").read_text())["parts"]
        return [folder / part["folder"] for part in parts]
    except (OSError, KeyError, TypeError, ValueError):
        return [folder]


def reference(network: Network, codes: np.ndarray, first: np.ndarray | None = None) -> np.ndarray:
    """What leaves the last layer for input codes (n, inputs): int64 (n, outputs), exact.

    Sums, or codes where it has an output format. Of a recurrent network the rows are steps in time from state zero, and
    where `first` (n,) is true states are cleared before the step.
    """
    if not network.recurrent:
        return trace(network, codes)[-1]
    codes, states, found = check_codes(network, codes), network.states(1), []
    for i, row in enumerate(codes):
        states = network.states(1) if first is not None and first[i] else states
        found.append(trace(network, row[None], states)[-1][0])
    return np.array(found, np.int64).reshape(len(codes), network.outputs)


def trace(network: Network, codes: np.ndarray, states: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """What every layer gives, codes or sums, the last one's last: one step from `states`.

    states: one (n, numbers) a recurrent cell, replaced by those after the step; None: all zero.
    """
    given = check_codes(network, codes)
    kept, at = network.states(len(given)) if states is None else states, 0
    found: list[np.ndarray] = []
    for layer, sources in zip(network.layers, network.links, strict=True):
        read = [given if source < 0 else found[source] for source in sources]
        if isinstance(layer, Cell):
            kept[at] = (lstm if layer.kind == "lstm" else gru).step(layer, to_units(read[0], layer.act), kept[at])
            found.append(codes_of(layer, kept[at]))
            at += 1
            continue
        if layer.spec.op == "max":
            found.append(greatest(layer.spec, read[0]))
            continue
        acts = (layer.formats[1], layer.spec.second)
        sums = layer_sums(layer, *(to_units(x, act) for x, act in zip(read, acts, strict=False) if act is not None))
        if layer.thresholds is None:
            found.append(sums)
        else:
            assert layer.spec.out is not None
            table = np.array([encode(v, layer.spec.out) for v in levels(layer.spec.out)])
            bounds = layer.thresholds.astype(np.int64)
            columns = sums.reshape(-1, layer.spec.out_features).T
            ranks = [np.searchsorted(row, column, side="right") for row, column in zip(bounds, columns, strict=True)]
            found.append(table[np.stack(ranks, axis=1)].reshape(len(given), -1))
    return found


def layer_sums(layer: Layer, units: np.ndarray, second: np.ndarray | None = None) -> np.ndarray:
    """Exact sums of one layer for inputs in units of their step: (n, inputs) -> (n, outputs), in the stream's order.

    second: what else an "add" reads, (n, inputs).
    """
    spec, window = layer.spec, layer.spec.window
    if second is not None:
        maps = np.stack([units, second], axis=-1).reshape(len(units), -1, *layer.units.shape)
        return (maps * layer.units).sum(axis=-1).reshape(len(units), -1)
    if window is None:
        return units @ layer.units.T
    patches = _patches(window, units, 0)
    shape = (*patches.shape[:3], spec.groups, spec.in_features)
    weights = layer.units.reshape(spec.groups, -1, spec.in_features)
    sums = np.einsum("nyxgc,grc->nyxgr", patches.reshape(shape), weights, optimize=True)
    return sums.reshape(len(units), -1)


def greatest(spec: LayerSpec, codes: np.ndarray) -> np.ndarray:
    """What "max" gives for codes (n, inputs): int64 (n, outputs), what is outside the map left out; +0 is above -0."""
    window, fmt = spec.window, spec.act
    assert window is not None and fmt is not None
    order = sorted(legal_codes(fmt).tolist(), key=lambda c: (decode(c, fmt), math.copysign(1, decode(c, fmt))))
    rank = np.full(2 ** bits(fmt), -1)
    rank[order] = np.arange(len(order))
    top = _patches(window, rank[codes], -1).max(axis=(-2, -1))
    return np.array(order)[top].reshape(len(codes), -1)


def _patches(window: Window, values: np.ndarray, outside: int) -> np.ndarray:
    """What each position reads: (n, lines, columns, channels, kernel lines, kernel columns)."""
    (kh, kw), (sh, sw), (top, bottom, left, right) = window.kernel, window.stride, window.padding
    maps = values.reshape(len(values), window.height, window.width, window.channels)
    maps = np.pad(maps, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=outside)
    return np.lib.stride_tricks.sliding_window_view(maps, (kh, kw), axis=(1, 2))[:, ::sh, ::sw]


def check_codes(network: Network, codes: np.ndarray) -> np.ndarray:
    """The codes as int64 (n, inputs), or `HwError`: wrong shape, or a pattern that is no number of the format."""
    act = network.layers[0].formats[1]
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] != network.inputs:
        raise HwError(f"vectors of shape {codes.shape} do not fit (n, {network.inputs}) input codes")
    if codes.dtype.kind not in "iu":
        raise HwError(f"vectors are codes of {act}, integers 0 .. {2 ** bits(act) - 1}, not {codes.dtype}")
    bad = ~np.isin(codes, legal_codes(act))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise HwError(f"vector {row}, input {column}: {codes[row, column]} is no code of {act}")
    return codes.astype(np.int64)


def legal_codes(fmt: Format) -> np.ndarray:
    """Every bit pattern that is a number of the format, ascending."""
    low, high = levels(fmt)[0], levels(fmt)[-1]
    return np.array([c for c in range(2 ** bits(fmt)) if low <= decode(c, fmt) <= high])


def sample_codes(network: Network, n: int, seed: int = 0) -> np.ndarray:
    """Input codes to try: all smallest, all largest, all zero where there is one, then random ones."""
    act = network.layers[0].formats[1]
    columns = network.inputs
    ends: Sequence[float] = (levels(act)[0], levels(act)[-1], min(levels(act), key=abs))
    corners = np.array([[encode(v, act)] * columns for v in ends])
    random = np.random.default_rng(seed).choice(legal_codes(act), size=(max(0, n - len(corners)), columns))
    return np.concatenate([corners, random])[:n]
