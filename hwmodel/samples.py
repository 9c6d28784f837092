"""Seeded designs that no coefficient was fitted to: units, single layers and whole policies to synthesize.

Weights are rounded normal draws and thresholds those of a real quantizer (scale, bias and activation per
row), because memories in LUTs cost by what is in them. Scales are per row, powers of two, or one per tensor.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hwmodel.accumulator import exact_bits
from hwmodel.affine import solved_layer
from hwmodel.formats import BINARY, TERNARY, Format, Int, bits, encode, levels, minifloats, unit
from hwmodel.mac import product_bits, tree_levels
from hwmodel.network import Layer
from hwmodel.packing import WIDE_PORT, divisors
from hwmodel.reference import to_units
from hwmodel.spec import Activation, Granularity, LayerSpec, PerRow, PerTensor

FAMILIES = ("int", "minifloat", "mixed", "ternary", "binary")
_INTS = [Int(b) for b in range(2, 9)]
_UINTS = [Int(b, signed=False) for b in range(2, 9)]
_FLOATS = [f for b in range(3, 9) for f in minifloats(b) if f.exp <= 4]


@dataclass(frozen=True, slots=True)
class UnitSample:
    """One multiply-accumulate element: formats, lanes, accumulator bits."""

    family: str
    weight: Format
    act: Format
    lanes: int
    acc_bits: int


@dataclass(frozen=True, slots=True, eq=False)
class DesignSample:
    """Layers in order, the rows and columns (PE, SIMD) that each works on at once, the DSPs' port or None for LUTs."""

    family: str
    layers: tuple[Layer, ...]
    folds: tuple[tuple[int, int], ...]
    port: int | None


def _pair(family: str, rng: random.Random) -> tuple[Format, Format]:
    """A weight and an activation format of the family."""
    match family:
        case "int":
            return rng.choice(_INTS), rng.choice(_INTS + _UINTS)
        case "minifloat":
            return rng.choice(_FLOATS), rng.choice(_FLOATS)
        case "mixed":
            pair = rng.choice(_INTS), rng.choice(_FLOATS)
            return pair if rng.random() < 0.5 else pair[::-1]
        case "ternary":
            return TERNARY, rng.choice(_INTS + _UINTS + _FLOATS + [TERNARY])
        case _:
            return BINARY, rng.choice(_INTS + _UINTS + _FLOATS + [BINARY] * 6)


def unit_samples(count: int, seed: int) -> list[UnitSample]:
    """Elements of every family in turn, 1 to 16 lanes, accumulators of 2 to 10 bits beyond the tree."""
    rng = random.Random(f"units {seed}")
    found = []
    for i in range(count):
        weight, act = _pair(FAMILIES[i % len(FAMILIES)], rng)
        lanes = rng.choice((1, 2, 3, 4, 6, 8, 9, 12, 16))
        if product_bits(weight, act) > 30:
            lanes = min(lanes, 4)
        acc = product_bits(weight, act) + tree_levels(lanes) + rng.randint(2, 10)
        found.append(UnitSample(FAMILIES[i % len(FAMILIES)], weight, act, lanes, acc))
    return found


def layer_samples(count: int, seed: int) -> list[DesignSample]:
    """Single folded matrix-vector layers of every family in turn: 4 to 64 rows and columns."""
    rng = random.Random(f"layers {seed}")
    found = []
    for i in range(count):
        family = FAMILIES[i % len(FAMILIES)]
        weight, act = _pair(family, rng)
        rows, columns = rng.choice((4, 8, 12, 16, 24, 32, 64)), rng.choice((4, 8, 12, 16, 24, 32, 64))
        out = rng.choice([None, act, act, Int(rng.randint(2, 4), signed=False)])
        layers = random_layers([weight], [act], (columns, rows), rng, out)
        found.append(DesignSample(family, layers, _folds(layers, rng, 12), _port(family, rng)))
    return found


def policy_samples(count: int, seed: int) -> list[DesignSample]:
    """Folded perceptrons of two or three layers, 3 to 24 inputs, 16 to 64 hidden units, 1 to 6 outputs."""
    rng = random.Random(f"policies {seed}")
    found = []
    for i in range(count):
        family = FAMILIES[i % len(FAMILIES)]
        hidden = [rng.choice((16, 24, 32, 48, 64))] * rng.choice((1, 2))
        sizes = (rng.choice((3, 4, 8, 11, 17, 24)), *hidden, rng.choice((1, 2, 3, 4, 6)))
        weight, act = _pair(family, rng)
        if bits(act) > 6 and rng.random() < 0.5:
            weight, act = _pair(family, rng)
        first = Int(8) if rng.random() < 0.3 else act
        count_ = len(sizes) - 1
        layers = random_layers([weight] * count_, [first] + [act] * (count_ - 1), sizes, rng)
        found.append(DesignSample(family, layers, _folds(layers, rng, 8), _port(family, rng)))
    return found


def unrolled_samples(count: int, seed: int) -> list[tuple[str, tuple[Layer, ...]]]:
    """Family and layers of perceptrons with integer inputs, small enough to unroll: 3 to 8, 8 to 16, 1 to 4 features.

    Weights have 2 to 6 bits, of every family in turn.
    """
    rng = random.Random(f"unrolled {seed}")
    found = []
    for i in range(count):
        family = FAMILIES[i % len(FAMILIES)]
        weight: Format = Int(rng.randint(2, 6))
        if family in ("minifloat", "mixed"):
            weight = rng.choice([f for b in (3, 4, 5) for f in minifloats(b) if f.exp <= 2])
        elif family != "int":
            weight = TERNARY if family == "ternary" else BINARY
        acts = [Int(rng.randint(3, 8)), Int(rng.randint(2, 4), signed=rng.random() < 0.5)]
        sizes = (rng.choice((3, 4, 6, 8)), rng.choice((8, 12, 16)), rng.choice((1, 2, 4)))
        found.append((family, random_layers([weight] * 2, acts, sizes, rng)))
    return found


def _port(family: str, rng: random.Random) -> int | None:
    """Every second design of integers has its products in DSPs of 7-series parts."""
    return WIDE_PORT["xc7"] if family == "int" and rng.random() < 0.5 else None


def _folds(layers: Sequence[Layer], rng: random.Random, most: int) -> tuple[tuple[int, int], ...]:
    """PE and SIMD that divide each layer, at most `most` each and 64 products in all."""
    found = []
    for spec in (layer.spec for layer in layers):
        pairs = [
            (pe, simd)
            for pe in divisors(spec.out_features)
            for simd in divisors(spec.in_features)
            if pe <= most and simd <= most and pe * simd <= 64
        ]
        found.append(rng.choice(pairs))
    return tuple(found)


def random_layers(
    weights: Sequence[Format],
    acts: Sequence[Format],
    sizes: Sequence[int],
    rng: random.Random,
    out: Format | None = None,
) -> tuple[Layer, ...]:
    """A chain of linear layers; relu before unsigned inputs, tanh before signed ones. out: format behind the last."""
    draw = np.random.default_rng(rng.getrandbits(32))
    granularity: Granularity = rng.choice((PerRow(), PerRow(), PerTensor()))
    pow2 = rng.random() < 0.25
    layers = []
    for i, (weight, act) in enumerate(zip(weights, acts, strict=True)):
        after = acts[i + 1] if i + 1 < len(acts) else out
        codes = _codes(weight, (sizes[i + 1], sizes[i]), draw)
        width = int(exact_bits(to_units(codes, weight), act).max())
        signed = after is not None and levels(after)[0] < 0
        activation: Activation = "none" if after is None else "tanh" if signed else "relu"
        spec = LayerSpec(
            f"layer{i}", "linear", sizes[i + 1], sizes[i], weight=weight, act=act, activation=activation,
            granularity=granularity, scale_pow2=pow2, acc_bits=width,
        )  # fmt: skip
        bare = Layer(spec, codes, None)
        if after is None:
            layers.append(bare)
        else:
            line, thresholds = _behind(bare, after, draw)
            layers.append(solved_layer(Layer(replace(spec, out=after), codes, thresholds, line)))
    return tuple(layers)


def _codes(weight: Format, shape: tuple[int, int], draw: np.random.Generator) -> np.ndarray:
    """Normal draws scaled to each row's largest magnitude and rounded to the format's levels, as codes."""
    table = np.array(levels(weight))
    values = draw.normal(size=shape)
    if weight == TERNARY:
        values = values / 1.5
    else:
        values = values / np.abs(values).max(axis=1, keepdims=True) * max(abs(table))
    nearest = np.abs(values[..., None] - table).argmin(axis=-1)
    return np.array([encode(v, weight) for v in table])[nearest]


def _behind(layer: Layer, out: Format, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Line and thresholds (`network.Layer`) of tanh or relu behind random scales and biases."""
    table = np.array(levels(out), float)
    top, spec = max(abs(table)), layer.spec
    middles = (table[1:] + table[:-1]) / 2 / top
    with np.errstate(all="ignore"):
        wanted = np.arctanh(np.clip(middles, -0.999, 0.999)) if spec.activation == "tanh" else 2 * middles
    units = layer.units.astype(float)
    rows = len(units)
    scale = unit_spread(layer.formats[1]) * np.sqrt((units**2).sum(axis=1)) + 1e-9
    scale = np.full(rows, scale.mean()) if spec.granularity == PerTensor() else scale * draw.uniform(0.8, 1.2, rows)
    if spec.scale_pow2:
        scale = 2.0 ** np.rint(np.log2(scale))
        if spec.activation == "relu":  # so that the factor in steps of the output is a power of two
            scale *= top / unit(out) / 2.0 ** np.rint(np.log2(top / unit(out)))
    bias = draw.normal(0, 0.3, rows)
    low, high = (np.array(side, float) for side in layer.sum_range)
    found = np.clip(np.ceil((wanted - bias[:, None]) * scale[:, None]), low[:, None], high[:, None] + 1)
    step = unit(out) / top * (1 if spec.activation == "tanh" else 2)
    line = np.stack([1 / scale, bias, np.full(rows, step)], axis=1)
    return line, np.vectorize(int, otypes=[object])(np.sort(found, axis=1))


def unit_spread(fmt: Format) -> float:
    """Root mean square of uniformly drawn levels in units of the format's step."""
    return float(np.sqrt(np.mean(np.square(np.array(levels(fmt), float) / unit(fmt)))))
