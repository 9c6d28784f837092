"""A policy as one straight numpy function, for rollouts.

`nn.Module` calls and small torch operations cost more than the arithmetic of a policy network.
`compile_policy` flattens a `Policy` into a list of numpy steps with preallocated constants; a
quantized MLP then costs about what the float module costs. The steps perform the same float32
operations in the same order as the modules, so both agree bit for bit where inputs are
quantized, because sums of products are then exact (see `qlayers`), and to float rounding
elsewhere. Convolutions run in torch. A recurrent policy is taken one step at a time by `compile_step`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from hwmodel.formats import Format
from quantkit.policy import InputStage, Policy, Recurrent
from quantkit.qlayers import BlockAct, QLayer
from quantkit.recurrent import LSTMCell
from quantkit.rounding import rounder

Step = Callable[[np.ndarray], np.ndarray]


def compile_policy(policy: Policy) -> Step:
    """A function from raw observations (batch, *obs_shape) to network outputs (batch, outputs), float32.

    It holds copies of the weights: compile again after changing the policy. Of a recurrent policy it takes sequences
    (batch, time, *obs_shape), and is the module itself.
    """
    if policy.recurrent:
        return _torch_step(policy)
    steps: list[Step] = [_input_stage(policy.stage)]
    modules = list(policy.net.children())
    if any(isinstance(m, nn.Conv2d) or (isinstance(m, QLayer) and m.op == "conv2d") for m in modules):
        return _torch_step(policy)
    for module in modules:
        steps.extend(_steps(module))
    return _chain(steps)


NumpyStates = tuple[np.ndarray, np.ndarray]
"""h and c (cells, batch, hidden) float32."""


def compile_step(policy: Policy) -> Callable[[np.ndarray, NumpyStates], tuple[np.ndarray, NumpyStates]]:
    """A function from raw observations (batch, *obs_shape) and the states of a recurrent policy to its outputs (batch,
    outputs), float32, and the next states; of zero states it is `compile_policy` of a sequence of one.

    It holds copies of the weights: compile again after changing the policy. A row does not depend on the others.
    """
    parts: list[Step | list[Callable[..., NumpyStates]]] = [_input_stage(policy.stage)]
    for module in policy.net.children():
        if isinstance(module, Recurrent):
            parts.append([_cell(cell) for cell in module.loop.cells])  # type: ignore[arg-type]
        else:
            parts.extend(_steps(module))

    def run(obs: np.ndarray, states: NumpyStates) -> tuple[np.ndarray, NumpyStates]:
        x, h, c = obs, list[np.ndarray](), list[np.ndarray]()
        for part in parts:
            if not isinstance(part, list):
                x = part(x)
                continue
            for cell in part:
                x, memory = cell(x, states[0][len(h)], states[1][len(c)])
                h.append(x)
                c.append(memory)
                x = x.copy()  # what follows may work in place
        return x, (np.stack(h), np.stack(c))

    return run


def _cell(cell: LSTMCell) -> Callable[[np.ndarray, np.ndarray, np.ndarray], NumpyStates]:
    """(x, h, c) -> h', c' as `LSTMCell` computes them; gates in torch, since numpy's differ in the last bit."""
    ih, hh = _chain(_steps(cell.ih)), _chain(_steps(cell.hh))
    stored = [None if point.act is None else _torch_step(point) for point in (cell.state, cell.cell)]

    def step(x: np.ndarray, h: np.ndarray, c: np.ndarray) -> NumpyStates:
        h, c = (s if store is None else store(s) for store, s in zip(stored, (h, c), strict=True))
        with torch.inference_mode():
            i, f, g, o = torch.from_numpy(ih(x.copy()) + hh(h.copy())).chunk(4, dim=-1)
            memory = torch.sigmoid(f) * torch.from_numpy(c) + torch.sigmoid(i) * torch.tanh(g)
            return (torch.sigmoid(o) * torch.tanh(memory)).numpy(), memory.numpy()

    return step


def _steps(module: nn.Module) -> list[Step]:
    """One module as numpy steps, some of which work in place."""
    match module:
        case QLayer():
            return _qlayer(module)
        case nn.Linear():
            bias = None if module.bias is None else module.bias.detach().numpy().copy()
            return [_linear(module.weight.detach().numpy(), bias)]
        case nn.ReLU():
            return [_relu]
        case nn.Tanh():
            return [_tanh]
        case nn.Hardtanh():
            return [_clip(module.min_val, module.max_val)]
        case nn.Flatten():
            return [_flatten]
    return [_torch_step(module)]


def _chain(steps: list[Step]) -> Step:
    def run(obs: np.ndarray) -> np.ndarray:
        x = obs
        for step in steps:
            x = step(x)
        return x

    return run


def _torch_step(module: Callable[[torch.Tensor], torch.Tensor]) -> Step:
    def step(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(np.ascontiguousarray(x))).numpy()

    return step


def _input_stage(stage: InputStage) -> Step:
    mean, std = stage.mean.numpy().copy(), stage.std.numpy().copy()
    low, high = stage.low.numpy().copy(), stage.high.numpy().copy()
    scales, clips = stage.scales, stage.clips

    def step(x: np.ndarray) -> np.ndarray:
        x = np.array(x, dtype=np.float32)
        if scales:
            x -= mean
            x /= std
        if clips:
            np.maximum(x, low, out=x)
            np.minimum(x, high, out=x)
        return x

    return step


def _linear(weight: np.ndarray, bias: np.ndarray | None) -> Step:
    """A float layer. One product per row: BLAS rounds differently for different batch sizes."""
    transposed = weight.T.copy(order="C")

    def step(x: np.ndarray) -> np.ndarray:
        y = np.matmul(x[:, None, :], transposed)[:, 0, :]
        if bias is not None:
            y += bias
        return y

    return step


def _qlayer(layer: QLayer) -> list[Step]:
    steps: list[Step] = []
    if layer.in_scale is not None:
        factor = layer.in_scale.detach().numpy().copy()
        steps.append(lambda x: x * factor)
    bias = layer.bias.detach().numpy().copy()
    frozen = layer.kernel()
    weight = frozen.weight.detach().numpy()
    if layer.act is None and frozen.gain is None:
        return [*steps, _linear(weight, bias)]
    if isinstance(layer.act, BlockAct):
        steps.append(_torch_step(layer.act.values))
    elif layer.act is not None:
        steps.append(_quantizer(layer.act.fmt, layer.act.scale))
    transposed = weight.T.copy(order="C")
    gain = np.asarray(frozen.gain, np.float32)
    wide = frozen.weight.dtype == torch.float64
    by_row = layer.act is None

    def step(x: np.ndarray) -> np.ndarray:
        if by_row:
            y = np.matmul(x[:, None, :], transposed)[:, 0, :]
        elif wide:
            y = np.matmul(x.astype(np.float64), transposed).astype(np.float32)
        else:
            y = np.matmul(x, transposed)
        np.multiply(y, gain, y)
        return np.add(y, bias, y)

    return [*steps, step]


def _quantizer(fmt: Format, scale: float) -> Step:
    divisor = np.array(scale, np.float32)
    round_in_place, divide = rounder(fmt), np.divide

    def step(x: np.ndarray) -> np.ndarray:
        return round_in_place(divide(x, divisor, x))

    return step


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, np.float32(0), out=x)


def _tanh(x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():  # torch's tanh and not numpy's: the two differ in the last bit
        torch.from_numpy(x).tanh_()
    return x


def _clip(low: float, high: float) -> Step:
    f_low, f_high = np.float32(low), np.float32(high)

    def step(x: np.ndarray) -> np.ndarray:
        np.maximum(x, f_low, out=x)
        return np.minimum(x, f_high, out=x)

    return step


def _flatten(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], -1)
