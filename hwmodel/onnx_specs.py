"""Layer specifications of a quantized ONNX file: QDQ, QCDQ or QONNX, a chain of Gemm, MatMul and Conv.

A file of `quantkit export` says in its metadata (`hardware`) what its layers are in Verilog: exact arithmetic, steps
without weights, the gates of recurrent cells. That is believed where its products are those of the file. Of any other
file a layer's formats are read from the quantizers before its input and its weight (`onnx_quantizers`), and the
accumulator is exact for the weights in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel.accumulator import exact_bits, signed_bits, unit_range
from hwmodel.cost import HwError
from hwmodel.formats import Int, unit
from hwmodel.onnx_graph import PRODUCTS, SHAPING, Graph, Node, ascent, constant_of, layer_name, load, value_above
from hwmodel.onnx_quantizers import Quantized, input_quantizer, quantizer_of
from hwmodel.spec import CELL_GATES, Activation, Granularity, LayerSpec, PerGroup, PerRow, PerTensor, Window

ACTIVATIONS: dict[str, Activation] = {
    "Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid", "Elu": "elu", "LeakyRelu": "leaky_relu", "Gelu": "gelu",
    "Clip": "hardtanh",
}  # fmt: skip


def read_onnx(path: Path) -> list[LayerSpec]:
    """One spec per product, in order; `HwError` names the file, and the layer, that is no such chain.

    All have windows where there are convolutions and the file tells every map.
    """
    graph = load(path)
    products = [node for node in graph.nodes if node.op in PRODUCTS]
    if not products:
        raise HwError(f"{path} has no layers; expected a chain of {', '.join(PRODUCTS)} with quantizers")
    inputs = [input_quantizer(graph, node) for node in products]
    if (told := _told(graph, products, inputs)) is not None:
        return told
    specs = []
    for i, node in enumerate(products):
        follower, end = _behind(graph, node)
        spec = _spec(graph, node, inputs[i], follower)
        if i + 1 < len(products):
            quantizer, factors = inputs[i + 1]
            if quantizer is None:
                raise graph.fail(products[i + 1], "its input is not quantized; expected a quantizer before it")
            if value_above(graph, quantizer.source)[0] != end:
                raise graph.fail(products[i + 1], f"it does not follow {layer_name(node)!r} alone; expected a chain")
            pow2 = spec.scale_pow2 and _pow2(quantizer.scale)
            spec = replace(spec, out=quantizer.fmt, out_factors=factors, scale_pow2=pow2)
        else:
            spec = replace(spec, scale_pow2=False)
        specs.append(spec)
    windows = [_window(graph, node, spec) for node, spec in zip(products, specs, strict=True)]
    pools = [_pools(graph, node, spec) for node, spec in zip(products, specs, strict=True)]
    if None in windows or None in pools or all(node.op != "Conv" for node in products):
        return specs
    found: list[LayerSpec] = []
    for spec, window, before in zip(specs, windows, pools, strict=True):
        found += [*(before or ()), replace(spec, window=window)]
    return found


def _pools(graph: Graph, node: Node, spec: LayerSpec) -> list[LayerSpec] | None:
    """The maxima over windows between a product and the one before it, as layers that give its input's codes.

    None where no hardware here follows one.
    """
    found: list[LayerSpec] = []
    for above in ascent(graph, node):
        if above.op != "MaxPool":
            continue
        dims, facts = graph.shapes.get(above.inputs[0], ()), above.facts
        window = None if facts.get("ceil_mode") else _moving(dims, facts)
        if window is None or spec.act is None:
            return None
        acc_bits = signed_bits(*unit_range(spec.act))
        found.append(LayerSpec(
            layer_name(above), "max", window.channels, math.prod(window.kernel), window.out_height * window.out_width,
            Int(1, signed=False), spec.act, spec.act, PerTensor(), acc_bits=acc_bits, groups=window.channels,
            window=window,
        ))  # fmt: skip
    return found[::-1]


def _moving(dims: Sequence[int | None], facts: dict[str, Any]) -> Window | None:
    """The window of a node's attributes over a map of these sizes, batch first; a signal is a map of width 1.

    None where the file does not tell it, or no hardware here follows it.
    """
    kernel = tuple(facts.get("kernel_shape", ()))
    axes = len(kernel)
    sizes = [size for size in dims[1:] if size is not None]
    gaps = any(d != 1 for d in facts.get("dilations", ()))
    if axes not in (1, 2) or len(dims) != axes + 2 or len(sizes) != axes + 1 or gaps:
        return None
    if facts.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    pads, strides = facts.get("pads", (0,) * 2 * axes), facts.get("strides", (1,) * axes)
    (top, *left), (bottom, *right) = pads[:axes], pads[axes:]
    channels, height, width = (*sizes, 1)[:3]
    window = Window(
        channels, height, width, (*kernel, 1)[:2], (*strides, 1)[:2], (top, bottom, *(left or [0]), *(right or [0]))
    )  # type: ignore[arg-type]
    fits = all(pad < kernel[axis] for axis in range(axes) for pad in (pads[axis], pads[axes + axis]))
    return window if fits else None


def _told(
    graph: Graph, products: Sequence[Node], inputs: Sequence[tuple[Quantized | None, bool]]
) -> list[LayerSpec] | None:
    """The layers that the file says it is in hardware, sums, means and pools among them; None where it says nothing, or
    its products are others."""
    try:
        specs = [LayerSpec.from_json(record) for record in json.loads(graph.facts["hardware"])]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    weighted = [one for spec in specs if not spec.joint and not spec.pool for one in _products(spec)]
    if len(weighted) != len(products):
        return None
    found = [_spec(graph, node, entry, "none") for node, entry in zip(products, inputs, strict=True)]
    keys = ("op", "out_features", "in_features", "positions", "groups", "weight", "act", "acc_bits")
    alike = all(getattr(a, key) == getattr(b, key) for a, b in zip(weighted, found, strict=True) for key in keys)
    return specs if alike else None


def _products(spec: LayerSpec) -> list[LayerSpec]:
    """A layer's products as linear layers: of a recurrent cell those of all gates with its input and with its state."""
    if spec.recurrence is None:
        return [spec]
    rows, state = CELL_GATES[spec.op] * spec.out_features, spec.recurrence
    inputs = replace(spec, op="linear", out_features=rows, recurrence=None)
    return [inputs, replace(inputs, in_features=spec.out_features, act=state.state, acc_bits=state.acc_bits)]


def _behind(graph: Graph, node: Node) -> tuple[Activation, str]:
    """The activation behind a product with its gain and bias, and the value that leaves it."""
    name, activation, biased = node.output, "none", node.op == "Gemm" and len(node.inputs) > 2
    while True:
        users = graph.used.get(name, [])
        kinds = {user.op for user in users}
        if len(users) == 2 and kinds == {"Mul", "Sigmoid"}:
            user = next(u for u in users if u.op == "Mul")
            activation, name = "silu", user.output
            continue
        if len(users) != 1:
            break
        (user,) = users
        sides = [constant_of(graph, side) for side in user.inputs]
        if user.op in SHAPING or (
            user.op in ("Mul", "Add")
            and activation == "none"
            and not biased
            and any(side is not None for side in sides)
        ):
            biased = biased or user.op == "Add"
            name = user.output
        elif user.op in ACTIVATIONS and activation == "none":
            activation, name = ACTIVATIONS[user.op], user.output
        elif user.op == "MaxPool":
            name = user.output
        else:
            break
    return activation, value_above(graph, name)[0] if graph.made[name].op in SHAPING else name  # type: ignore[return-value]


def _gain(graph: Graph, node: Node) -> np.ndarray:
    """What the sum is multiplied by: 1 where nothing is."""
    name = node.output
    for user in graph.used.get(name, []):
        if user.op == "Cast":
            return _gain(graph, user)
        if user.op == "Mul":
            for side in user.inputs:
                if side != name and (constant := constant_of(graph, side)) is not None:
                    return constant.astype(np.float64)
    return np.ones(1)


def _spec(graph: Graph, node: Node, entry: tuple[Quantized | None, bool], follower: Activation) -> LayerSpec:
    conv = node.op == "Conv"
    quantized = quantizer_of(graph, node, node.inputs[1])
    stored = quantized.values if quantized is not None else constant_of(graph, node.inputs[1])
    if stored is None:
        raise graph.fail(node, "its weight is computed; expected a constant")
    across = node.op == "MatMul" or (node.op == "Gemm" and not node.facts.get("transB"))
    matrix = stored.T if across else stored.reshape(len(stored), -1)
    positions = _positions(graph, node) if conv else 1
    act = None if entry[0] is None else entry[0].fmt
    common = LayerSpec(
        layer_name(node), "conv2d" if conv else "linear", len(matrix), matrix.shape[1], positions, act=act,
        activation=follower, groups=int(node.facts.get("group", 1)), zeros=float((matrix == 0).mean()),
    )  # fmt: skip
    if quantized is None:
        return common
    units = np.rint(matrix / unit(quantized.fmt)).astype(np.int64)
    gain = _gain(graph, node)
    acc_bits, pow2 = None, False
    if entry[0] is not None:
        acc_bits = int(exact_bits(units, entry[0].fmt).max())
        pow2 = _pow2(entry[0].scale) and _pow2(gain) and _pow2(quantized.scale)
    scale = quantized.scale.T if across else quantized.scale
    scale = scale.reshape(len(scale), -1) if scale.ndim > 2 else scale
    granularity = _granularity(scale, gain, matrix.shape, quantized.block)
    return replace(common, weight=quantized.fmt, granularity=granularity, acc_bits=acc_bits, scale_pow2=pow2)


def _granularity(scale: np.ndarray, gain: np.ndarray, shape: tuple[int, ...], block: int | None) -> Granularity:
    """From the weight's scales, as many as its rows or columns need, and the factors behind the sum."""
    if scale.ndim == 2 and scale.shape[1] == shape[1] and shape[1] > 1:  # written out for every column
        changes = np.flatnonzero((scale[:, 1:] != scale[:, :-1]).any(axis=0)) + 1
        return PerGroup(math.gcd(*changes.tolist())) if len(changes) else PerRow()
    if scale.ndim == 2 and scale.shape[1] > 1:
        return PerGroup(block or shape[1] // scale.shape[1])
    return PerRow() if scale.size > 1 or gain.size > 1 else PerTensor()


def _window(graph: Graph, node: Node, spec: LayerSpec) -> Window | None:
    """The map that a product reads; None where it is not in the file or no hardware here follows it.

    Of a product behind a convolution or a maximum whose whole map it reads, this map.
    """
    if isinstance(spec.granularity, PerGroup):
        return None
    if node.op != "Conv":
        names = [name for above in ascent(graph, node) for name in (above.output, *above.inputs)]
        for name in [node.inputs[0], *names]:
            known = [size for size in graph.shapes.get(name, ())[1:] if size is not None]
            if len(known) in (2, 3) and math.prod(known) == spec.in_features:
                channels, height, width = (*known, 1)[:3]
                return Window(channels, height, width, (height, width))
        return Window(spec.in_features)
    return _moving(graph.shapes.get(node.inputs[0], ()), node.facts)


def _positions(graph: Graph, node: Node) -> int:
    dims = graph.shapes.get(node.output, ())[2:]
    if not dims or None in dims:
        raise graph.fail(node, "the height and width of its output are not in the file")
    return math.prod(d for d in dims if d is not None)


def _pow2(values: np.ndarray) -> bool:
    """Whether every value is a power of two."""
    return bool((np.frexp(np.abs(values.astype(np.float64)))[0] == 0.5).all())
