"""From a quantized model to the `LayerSpec`s that the cost model reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hwmodel import accumulator
from hwmodel.formats import BINARY, Format, Int
from hwmodel.spec import LayerSpec, PerGroup, Window
from quantkit.bands import BANDS, Bands, signed
from quantkit.model import Model
from quantkit.policy import ACTIVATION_NAMES, Policy
from quantkit.qlayers import ActQuant, Plain, QLayer, shape_of
from quantkit.qtensor import QTensor, units_of, values_of
from quantkit.recurrent import has_loop
from quantkit.rounding import is_pow2


def layer_shapes(model: Model) -> list[dict[str, Any]]:
    """Name, inputs, outputs and kernel (None of a linear layer) of each layer with a weight, as JSON values."""
    shapes = {name: shape_of(layer) for name, layer in model.layers().items()}
    return [
        {"name": name, "inputs": s.inputs, "outputs": s.outputs, "kernel": list(s.kernel) or None}
        for name, s in shapes.items()
    ]


def may_have_design(model: Model) -> bool:
    """Whether `quantkit rtl` may write the network, so that `rtl_export.hardware_specs` knows more than `layer_specs`.

    Policies, networks that loop over time, and those of images or signals; of others that code need not be loaded.
    """
    windows = any(layer.op in ("conv1d", "conv2d") for layer in model.qlayers().values())
    return windows or isinstance(model.module, Policy) or has_loop(model.module)


def layer_specs(model: Model) -> tuple[LayerSpec, ...]:
    """One spec per product with a weight, two of one in bands, in the order in which they run (`run_order`).

    The accumulator is exact for the actual weights. Of a network of linear layers and convolutions of images or signals
    all have windows, if every one of them has hardware: what a map's lines take is priced.

    Embeddings multiply nothing and have none; a transposed convolution counts all products of its kernel.
    """
    every = model.layers()
    shapes = flows(model, every)
    layers = {name: every[name] for name in _ordered(every, shapes) if shape_of(every[name]).op != "embedding"}
    positions = {name: _positions(layer, shapes.get(name)) for name, layer in layers.items()}
    windows: dict[str, Window | None] = {}
    for before, name in itertools.pairwise(["", *layers]):
        windows[name] = _window(layers[name], shapes.get(name), shapes[before][1] if before in shapes else None)
    if any(window is None for window in windows.values()) or all(shape_of(x).op == "linear" for x in layers.values()):
        windows = dict.fromkeys(layers)
    followers = _activations(model)
    names = list(layers)
    specs: list[LayerSpec] = []
    for index, (name, layer) in enumerate(layers.items()):
        nxt = layers[names[index + 1]] if index + 1 < len(names) else None
        found = specs_of(name, layer, nxt, positions[name], followers.get(name, "none"))
        specs.extend(replace(spec, window=windows[name]) if len(found) == 1 else spec for spec in found)
    return tuple(specs)


def specs_of(
    name: str, layer: Plain | QLayer, nxt: Plain | QLayer | None, positions: int, follower: str = "none"
) -> tuple[LayerSpec, ...]:
    """The specs of one layer; nxt: the layer behind it, positions: outputs per input, follower: activation behind."""
    weight, shape = layer.weight, shape_of(layer)
    common: dict[str, Any] = {
        "name": name,
        "op": "conv2d" if shape.kernel else "linear",
        "out_features": shape.outputs,
        "in_features": shape.inputs // shape.groups * math.prod(shape.kernel),
        "positions": positions,
        "activation": follower,
        "groups": shape.groups,
    }
    act = layer.act if isinstance(layer, QLayer) else None
    out = nxt.act if isinstance(nxt, QLayer) else None
    if not isinstance(layer, QLayer) or layer.q is None:
        return (LayerSpec(**common, act=_fmt(act), out=_fmt(out), zeros=_zeros(weight)),)
    if isinstance(layer.q, Bands):
        return _bands(layer.q, common, act, _fmt(out))
    acc_bits = None if not isinstance(act, ActQuant) else int(accumulator.exact_bits(units_of(layer.q), act.fmt).max())
    pow2 = (
        isinstance(act, ActQuant)
        and isinstance(out, ActQuant)
        and all(is_pow2(float(s)) for s in np.unique(layer.q.scale.numpy()))
        and is_pow2(act.scale)
        and is_pow2(out.scale)
    )
    spec = LayerSpec(
        **common,
        weight=layer.q.fmt,
        act=_fmt(act),
        out=_fmt(out),
        granularity=layer.q.granularity,
        acc_bits=acc_bits,
        zeros=_zeros(values_of(layer.q)),
        scale_pow2=pow2,
        out_factors=isinstance(nxt, QLayer) and nxt.in_scale is not None,
    )
    return (spec,)


def _bands(q: Bands, common: dict[str, Any], act: Any, out: Format | None) -> tuple[LayerSpec, ...]:
    """One spec per band of columns that there is: the products of codes alone, without zeros, b and c."""
    bands: dict[str, tuple[Format, Tensor]] = {
        "salient": (Int(4, signed=False), q.codes.long()),
        "rest": (BINARY, signed(q.signs).long()),
    }
    specs = []
    for band, (fmt, units) in bands.items():
        if units.shape[1]:
            acc = int(accumulator.exact_bits(units.numpy(), act.fmt).max()) if isinstance(act, ActQuant) else None
            own = {**common, "name": f"{common['name']}.{band}", "in_features": units.shape[1]}
            specs.append(LayerSpec(**own, weight=fmt, act=_fmt(act), out=out, acc_bits=acc, zeros=_zeros(units)))
    return tuple(specs)


def _zeros(weight: Tensor) -> float:
    """The share of zeros, counted without a copy in memory: a head is among the largest tensors there are."""
    return 1 - int(torch.count_nonzero(weight)) / weight.numel()


def weight_name(layer: Plain | QLayer) -> str:
    """The name of a layer's weight format, "float" if it has none."""
    q = layer.q if isinstance(layer, QLayer) else None
    return "float" if q is None else BANDS if isinstance(q, Bands) else str(q.fmt)


def _fmt(act: Any) -> Format | None:
    return None if act is None else act.fmt


def flows(model: Model, layers: Mapping[str, nn.Module]) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Shapes of what goes into and comes out of each of the layers as the example runs through; those that ran only."""
    found: dict[str, tuple[torch.Size, torch.Size]] = {}

    def note(name: str) -> Any:
        return lambda _, inputs, output: found.update({name: (inputs[0].shape, output.shape)})

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            model.module(model.example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def run_order(model: Model) -> list[str]:
    """The names of the layers in the order in which they first run on the example; behind them those that do not."""
    layers = model.layers()
    return _ordered(layers, flows(model, layers))


def _ordered(layers: Iterable[str], shapes: Mapping[str, Any]) -> list[str]:
    return [*shapes, *(name for name in layers if name not in shapes)]


def _positions(layer: Plain | QLayer, shapes: tuple[torch.Size, torch.Size] | None) -> int:
    """Output positions of one inference, by the shapes of `flows`."""
    return 1 if shapes is None else max(1, shapes[1][1:].numel() // shape_of(layer).outputs)


def _window(
    layer: Plain | QLayer, shapes: tuple[torch.Size, torch.Size] | None, before: torch.Size | None
) -> Window | None:
    """The map that a layer reads, a signal as one of width 1; None where it is neither or no hardware here follows it.

    Zeros that the network pads before the layer are part of the map. A linear layer reads one vector: the map that the
    layer before it gives (shape `before`), if that is as long.
    """
    shape = shape_of(layer)
    grouped = isinstance(layer, QLayer) and isinstance(layer.plan.granularity, PerGroup)
    if shapes is None or grouped or shape.op not in ("linear", "conv1d", "conv2d"):
        return None
    read = shapes[0][1:]
    if shape.op == "linear":
        if len(read) != 1:
            return None
        if before is not None and len(before) in (3, 4) and math.prod(before[1:]) == read[0]:
            channels, height, width = (*before[1:], 1)[:3]
            return Window(channels, height, width, (height, width))
        return Window(read[0])
    padding = getattr(layer, "padding", 0)
    own = (0,) * len(shape.kernel) if padding == "valid" else padding
    if isinstance(own, str) or len(read) != 1 + len(shape.kernel) or any(d != 1 for d in layer.dilation):  # type: ignore[union-attr]
        return None
    above, left = (*own, 0)[:2]  # type: ignore[misc]
    stride, kernel = (*layer.stride, 1)[:2], (*shape.kernel, 1)[:2]  # type: ignore[misc, union-attr]
    if above >= kernel[0] or left >= kernel[1]:
        return None
    channels, height, width = (*read, 1)[:3]
    return Window(channels, height, width, kernel, stride, (above, above, left, left))  # type: ignore[arg-type]


def _activations(model: Model) -> dict[str, str]:
    """The activation right behind each layer of a policy's chain."""
    if not isinstance(model.module, Policy):
        return {}
    chain = [(f"net.{name}", module) for name, module in model.module.net.named_children()]
    result = {}
    for (name, _), (_, follower) in itertools.pairwise(chain):
        if isinstance(follower, nn.Hardtanh):
            result[name] = "hardtanh"
        elif type(follower) in ACTIVATION_NAMES:
            result[name] = ACTIVATION_NAMES[type(follower)]
    return result


def bits_per_weight(model: Model) -> float:
    """Bits stored for weights, scales included (float32 ones where a layer stayed float), per weight.

    A weight that two layers share (`meta["tied"]`) is one weight: stored once if both hold the same, and twice if they
    are quantized differently.
    """
    stored = weights = 0
    tied, same = _tied(model), repeated(model)
    for name, layer in model.layers().items():
        weights += 0 if name in tied else layer.weight.numel()
        q = layer.q if isinstance(layer, QLayer) else None
        stored += 0 if name in same else q.bits if q is not None else 32 * layer.weight.numel()
    return stored / max(1, weights)


def _tied(model: Model) -> dict[str, str]:
    """The layers that shared the weight of another in the checkpoint: name -> name of that."""
    layers = model.layers()
    tied: dict[str, str] = model.meta.get("tied", {})
    return {name: other for name, other in tied.items() if name in layers and other in layers}


def repeated(model: Model) -> dict[str, str]:
    """Those of the tied layers whose weight is still that of the other, code for code: name -> name of that."""
    layers = model.layers()
    return {name: other for name, other in _tied(model).items() if same_weight(layers[name], layers[other])}


def same_weight(a: Plain | QLayer, b: Plain | QLayer) -> bool:
    """Whether two layers store the same weight, code for code."""
    p, q = (layer.q if isinstance(layer, QLayer) else None for layer in (a, b))
    if p is None and q is None:
        return torch.equal(a.weight, b.weight)
    if isinstance(p, QTensor) and isinstance(q, QTensor):
        alike = (p.fmt, p.granularity, p.shape, p.base) == (q.fmt, q.granularity, q.shape, q.base)
        return alike and torch.equal(p.codes, q.codes) and torch.equal(p.scale, q.scale)
    return False


def parameter_count(model: Model) -> int:
    """Parameters of the network; a weight that two layers share counts once."""
    layers = model.layers()
    twice = [n for n, other in _tied(model).items() if layers[n].weight is not layers[other].weight]
    return sum(p.numel() for p in model.module.parameters()) - sum(layers[n].weight.numel() for n in twice)


def sqnr_db(layer: QLayer) -> float | None:
    """Signal to quantization noise of a layer's weight in dB; None if float, inf if exact."""
    if layer.q is None:
        return None
    weight = layer.weight.detach()
    signal, noise = (
        torch.linalg.vector_norm(x, dtype=torch.float64) for x in (weight, layer.effective_weight() - weight)
    )
    return float("inf") if noise == 0 else float(20 * torch.log10(signal / noise))
