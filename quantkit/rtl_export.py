"""From a quantized policy to the integers that `hwmodel.emit` turns into Verilog, and the host's float part.

Thresholds between two layers (`rtl_thresholds`) give the simulator's very codes.

A recurrent network is taken one step at a time (`quantkit.stepwise`). Its GRU and LSTM cells become fixed point and
tables (`hwmodel.cell`), which do differ from the float simulation: there the truth is `hwmodel.network.reference`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from hwmodel.affine import solved
from hwmodel.cell import MEMORY_BITS, NOUNS
from hwmodel.cell import Cell as Integers
from hwmodel.cost import HwError
from hwmodel.formats import Int, bits, unit
from hwmodel.gates import INDEX, G
from hwmodel.network import Layer, Network
from hwmodel.spec import LayerSpec
from quantkit.errors import InputError
from quantkit.model import Model
from quantkit.policy import ACTIVATION_NAMES, Head, InputStage, Policy
from quantkit.qlayers import ActQuant, QLayer
from quantkit.qtensor import encode
from quantkit.recurrent import Cell, GRUCell, LSTMCell
from quantkit.rtl_thresholds import (
    Step,
    act_format,
    activating,
    input_facts,
    line_of,
    output_facts,
    quantized_layer,
    quantizing,
    requantizing,
    scaling,
    sum_step,
    thresholds,
)
from quantkit.simulate import compile_policy
from quantkit.specs import layer_specs
from quantkit.stepwise import MODULES, chain_of, is_recurrent

SOUGHT = 8
"""Bits of a layer's results up to which its exact arithmetic is sought to be priced."""
FACTOR_BITS = 9
"""Bits, one more or less, of the factors that bring the sums of a recurrent cell to one scale."""
_MIXING = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Softmax, nn.LogSoftmax)
ACTIVATIONS = sorted({module.__name__ for module in MODULES.values()})


@dataclass(frozen=True)
class Host:
    """The float part of a policy on hardware: observations to input codes, sums to network outputs and actions.

    head: None of a network that is no policy, whose actions are its outputs.
    """

    before: Step
    after: Step
    head: Head | None

    def codes(self, obs: np.ndarray) -> np.ndarray:
        """Input codes (n, inputs) int64 of raw observations (n, *obs_shape)."""
        return self.before(obs)

    def outputs(self, sums: np.ndarray) -> np.ndarray:
        """Network outputs (n, outputs) float32 of the hardware's sums, as `compile_policy` gives them."""
        return self.after(sums)

    def actions(self, sums: np.ndarray) -> np.ndarray:
        """Environment actions of the hardware's sums."""
        return self.after(sums) if self.head is None else self.head.actions(self.after(sums))


def network_of(model: Model) -> tuple[Network, Host]:
    """The integers of a quantized MLP, a policy or not, or of a recurrent network; InputError names what has none."""
    stage, head, modules = _chain(model)
    places = [i for i, (_, m) in enumerate(modules) if isinstance(m, QLayer | nn.Linear | nn.Conv2d | Cell)]
    if not places:
        raise InputError("this network has no layers")
    for i in places:
        _check_part(*modules[i])
    specs = {spec.name: spec for spec in layer_specs(model)}
    for name, module in modules[places[0] : places[-1]]:
        if isinstance(module, _MIXING):
            kind = type(module).__name__
            raise InputError(f"{name}: a {kind} mixes features; hardware computes what depends on one sum at a time")
    parts = [[m for _, m in modules[a + 1 : b]] for a, b in pairwise([*places, len(modules)])]
    layers: list[Layer | Integers] = []
    try:
        for n, i in enumerate(places):
            name, layer = modules[i]
            following = None if n + 1 == len(places) else _entry(modules[places[n + 1]][1])
            if isinstance(layer, Cell):
                cell = cell_of(layer, name)[0]
                layers.append(cell if following is None else _coded(cell, parts[n], following))
                continue
            assert isinstance(layer, QLayer) and layer.q is not None
            spec = replace(specs[name], activation=_activation(parts[n]), positions=1)
            codes = layer.q.codes.numpy().astype(np.int64)
            plain = Layer(replace(spec, out=None), codes, None)
            if following is None:
                layers.append(plain)
                continue
            table = thresholds(requantizing(layer, parts[n], following), plain, act_format(following))
            layers.append(
                Layer(replace(spec, out=act_format(following)), codes, table.astype(object), line_of(layer, following))
            )
        first, last = _entry(modules[places[0]][1]), modules[places[-1]][1]
        network = solved(Network(tuple(layers), _facts(stage, head, first, last, parts[-1])))
    except HwError as error:
        raise InputError(str(error)) from None
    before = _host_input(stage, [m for _, m in modules[: places[0]]], first)
    return network, Host(before, _to_outputs(last, parts[-1]), head)


def hardware_specs(model: Model) -> tuple[LayerSpec, ...]:
    """What the cost model is to price: the layers that `quantkit rtl` writes, one design behind the other.

    Their exact arithmetic is known, sums and windows without weights are among them. `layer_specs` of other networks,
    and where a layer gives codes of more than SOUGHT bits: finding their arithmetic takes a minute, for `quantkit rtl`
    alone.
    """
    plain = layer_specs(model)
    if not is_recurrent(model.module) and any(spec.out is not None and bits(spec.out) > SOUGHT for spec in plain):
        return plain
    try:
        if isinstance(model.module, Policy) or is_recurrent(model.module):
            return network_of(model)[0].specs
    except InputError:  # float sides, or convolutions
        pass
    if _convolutional(model):
        from quantkit.rtl_conv import designs_of

        try:
            return tuple(spec for design in designs_of(model)[0] for spec in design.network.specs)
        except InputError:
            pass
    return plain


def _convolutional(model: Model) -> bool:
    """Whether a layer is a convolution of images or signals, all others are that or linear, and none has a side in
    float or in blocks."""
    layers = model.layers().values()
    kinds = {x.op if isinstance(x, QLayer) and x.q is not None and isinstance(x.act, ActQuant) else "" for x in layers}
    return bool(kinds & {"conv1d", "conv2d"}) and kinds <= {"conv1d", "conv2d", "linear"}


def _chain(model: Model) -> tuple[InputStage, Head | None, list[tuple[str, nn.Module]]]:
    """Input stage, head (None: no policy) and layers by name with what is between them."""
    policy = model.module
    if isinstance(policy, Policy) and policy.recurrent:
        chain = chain_of(Model(policy.net, policy.stage(model.example)))
        return policy.stage, policy.head, [(f"net.{name}", module) for name, module in chain]
    if isinstance(policy, Policy):
        return policy.stage, policy.head, [(f"net.{name}", m) for name, m in policy.net.named_children()]
    return InputStage(), None, chain_of(model) if is_recurrent(policy) else _row(model)


def _row(model: Model) -> list[tuple[str, nn.Module]]:
    """The layers and activations of a network that is no policy, by name, each fed by the one before alone.

    InputError names the first node that has no place in such a row.
    """
    written = f"hardware is written for linear layers in a row, with {', '.join(ACTIVATIONS)} between"
    if not isinstance(model.module, fx.GraphModule):
        why = model.meta.get("untraced", "it is not traced")
        raise InputError(f"this network cannot be followed ({why}); {written}")
    if model.example.dim() != 2:
        raise InputError(f"inputs have the shape {tuple(model.example.shape[1:])}; {written}, on vectors")
    row: list[tuple[str, nn.Module]] = []
    last: fx.Node | None = None
    for n in model.module.graph.nodes:
        if n.op == "output":
            if n.args != (last,):
                raise InputError(f"the output is not that of the last layer alone; {written}")
        elif last is None and n.op == "placeholder":
            last = n
        elif last is not None and n.op == "call_module" and n.args == (last,):
            row.append((str(n.target), model.module.get_submodule(str(n.target))))
            last = n
        elif n.target in MODULES and n.args[0] is last and None not in n.args:
            row.append((n.name, MODULES[n.target](*n.args[1:])))
            last = n
        else:
            raise InputError(f"node {n.name!r}: {n.target} has no place there; {written}")
    return row


def _activation(modules: list[nn.Module]) -> Any:
    """The name of what stands between two layers: of the first module, "other" if any has no name."""
    named = {**ACTIVATION_NAMES, nn.Hardtanh: "hardtanh", nn.Identity: "none", nn.Flatten: "none"}
    if any(type(m) not in named for m in modules):
        return "other"
    return named[type(modules[0])] if modules else "none"


def _entry(part: nn.Module) -> QLayer:
    """The layer whose quantizer a part's input meets."""
    layer = part.ih if isinstance(part, Cell) else part
    assert isinstance(layer, QLayer)
    return layer


def _coded(cell: Integers, modules: list[nn.Module], following: QLayer) -> Integers:
    """The cell with the table of codes that the next layer reads for every state."""
    b = cell.state.bits
    patterns = np.arange(1 << b)
    states = np.where(patterns < 1 << (b - 1), patterns, patterns - (1 << b)) * 2.0**-cell.state_fraction
    between, values = activating(modules), quantizing(following)
    found = values(between(np.repeat(states[:, None].astype(np.float32), cell.hidden, axis=1)))
    table = encode(torch.from_numpy(found), act_format(following)).numpy().astype(np.int64).T
    return replace(cell, out=act_format(following), table=table[:1] if (table == table[0]).all() else table)


def cell_of(cell: Cell, name: str = "cell") -> tuple[Integers, Step]:
    """The integers of a quantized GRU or LSTM cell, and inputs (n, inputs) float32 to the integers that it reads.

    Differs from the cell in what follows the products: fixed point and tables (`hwmodel.gates`), and states in steps of
    a power of two, the next above the simulator's scale; of c at most 1. InputError for a side in float.
    """
    _check_part(name, cell)
    ih, hh = cell.ih, cell.hh
    assert isinstance(ih, QLayer) and isinstance(hh, QLayer) and ih.q is not None and hh.q is not None
    state, kept, hidden = act_format(hh), _state_fraction(cell), cell.hidden
    kind: Any = "gru" if isinstance(cell, GRUCell) else "lstm"
    biases = [layer.bias.detach().numpy().astype(np.float64) for layer in (ih, hh)]
    gains = [np.broadcast_to(np.asarray(layer.kernel().gain, np.float64), biases[0].shape) for layer in (ih, hh)]
    steps = [sum_step(ih), sum_step(hh) / hh.act.scale / unit(state) * 2.0**-kept]  # type: ignore[union-attr]
    offsets = biases[0] + biases[1]
    if kind == "gru":  # n has one beside either sum
        offsets = np.concatenate([offsets[: 2 * hidden], biases[0][2 * hidden :], biases[1][2 * hidden :]])
    assert ih.uniform is not None and hh.uniform is not None
    if ih.uniform.fmt != hh.uniform.fmt or hh.in_scale is not None:
        raise InputError(
            f"layer {name}: {NOUNS[kind]} in hardware has one format of weights, and no factors on its state as "
            "smoothquant puts them"
        )
    act = cell.state.act
    if act is None or act.fmt != state:
        stored = "float" if act is None else act.fmt
        raise InputError(f"layer {name}: its state is stored as {stored}, but the product with it reads {state}")
    x_codes, h_codes = (layer.q.codes.numpy().astype(np.int64) for layer in (ih, hh))  # type: ignore[union-attr]
    slopes = [gain * step for gain, step in zip(gains, steps, strict=True)]
    fraction = max(INDEX, FACTOR_BITS - int(np.floor(np.log2(min(float(np.median(s)) for s in slopes)))))
    x_factors, h_factors, fixed = (np.rint(v * 2.0**fraction).astype(np.int64) for v in (*slopes, offsets))
    try:
        found = Integers(
            kind, name, ih.uniform.fmt, act_format(ih), state, x_codes, h_codes, x_factors, h_factors, fixed, fraction,
            kept, **_memory(cell, name),
        )  # type: ignore[arg-type]  # fmt: skip
    except HwError as error:
        raise InputError(str(error)) from None
    values, smallest = quantizing(ih), unit(act_format(ih))
    return found, lambda x: np.rint(values(np.asarray(x, np.float32)) / smallest).astype(np.int64)


def _memory(cell: Cell, name: str) -> dict[str, Any]:
    """Format of an LSTM's c and the exponent M of its step 2^-M, by their names in `Integers`; of a GRU nothing."""
    if not isinstance(cell, LSTMCell):
        return {}
    act = cell.cell.act
    if act is None or not isinstance(act.fmt, Int):
        stored = "float" if act is None else act.fmt
        raise InputError(f"layer {name}: its c is stored as {stored}; hardware is written for int2..int{MEMORY_BITS}")
    steps = int(np.floor(-np.log2(act.scale * unit(act.fmt))))  # type: ignore[union-attr]
    return {"memory": act.fmt, "memory_fraction": max(0, min(G, steps))}


def _check_part(name: str, part: nn.Module) -> None:
    if isinstance(part, Cell):
        _check_part(f"{name}.ih", part.ih)
        _check_part(f"{name}.hh", part.hh)
        return
    if quantized_layer(name, part).op != "linear":
        raise InputError(f"layer {name} is a convolution; hardware is written for linear layers only, so far")


def _to_outputs(part: nn.Module, modules: list[nn.Module]) -> Step:
    between = activating(modules)
    if isinstance(part, Cell):
        step = 2.0 ** -_state_fraction(part)
        return lambda states: between((states * step).astype(np.float32))
    assert isinstance(part, QLayer)
    scaled = scaling(part)
    return lambda sums: between(scaled(sums))


def _state_fraction(cell: Cell) -> int:
    """The exponent S of the step 2^-S of a state h: 1 to 2 times the calibrated one, or 2^-(B-1) if that is less."""
    assert isinstance(cell.hh, QLayer) and cell.hh.act is not None
    fmt = act_format(cell.hh)
    least = bits(fmt) - 1
    return max(least, min(G, int(np.floor(-np.log2(cell.hh.act.scale * unit(fmt))))))


def _host_input(first: InputStage, modules: list[nn.Module], layer: QLayer) -> Step:
    fmt = act_format(layer)
    stage = compile_policy(Policy(first, nn.Sequential(*modules), Head("box"), ()))
    values = quantizing(layer)
    return lambda obs: encode(torch.from_numpy(np.ascontiguousarray(values(stage(obs)))), fmt).numpy().astype(np.int64)


def _facts(
    first: InputStage, head: Head | None, entry: QLayer, last: nn.Module, tail: list[nn.Module]
) -> dict[str, Any]:
    """What the host computes, in JSON."""
    stage = {key: getattr(first, key).tolist() for key in ("mean", "std", "low", "high")}
    if isinstance(last, Cell):
        ones, zeros = np.ones(last.hidden), np.zeros(last.hidden)
        leaving = {"step": 2.0 ** -_state_fraction(last), "gain": ones.tolist(), "bias": zeros.tolist()}
    else:
        assert isinstance(last, QLayer)
        leaving = output_facts(last)
    return {
        "stage": {key: _finite(value) for key, value in stage.items()},
        **input_facts(entry),
        **leaving,
        "after": [str(module) for module in tail],
        "head": None if head is None else asdict(head),
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity: text instead."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value if np.isfinite(value) else str(value)
