"""Recurrent cells whose products and states can be quantized, and the loop over time.

The cells have the parameters and the arithmetic of `nn.GRUCell` and `nn.LSTMCell`, with the two products as
`nn.Linear` modules (`ih` of the input, `hh` of the state) and every state behind a `Point`: the state is quantized
where it is stored, so that the next step's product and the blend of old and new state see the same numbers, as
hardware with a register of these bits would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import InputError
from quantkit.qlayers import Point


class GRUCell(nn.Module):
    """h' = (1 - z) n + z h with r, z, n as in `nn.GRUCell`; x (batch, inputs), h (batch, hidden).

    hidden: numbers in the state; known without the layers, which methods that train replace.
    """

    def __init__(self, ih: nn.Linear, hh: nn.Linear) -> None:
        super().__init__()
        self.ih, self.hh, self.state = ih, hh, Point()
        self.hidden = int(hh.weight.shape[0]) // 3

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        h = x.new_zeros(*x.shape[:-1], self.hidden) if h is None else self.state(h)
        ri, zi, ni = self.ih(x).chunk(3, dim=-1)
        rh, zh, nh = self.hh(h).chunk(3, dim=-1)
        r, z = torch.sigmoid(ri + rh), torch.sigmoid(zi + zh)
        n = torch.tanh(ni + r * nh)
        return n + z * (h - n)

    def output(self, state: Tensor) -> Tensor:
        """What the cell gives of its state."""
        return state


class LSTMCell(nn.Module):
    """c' = f c + i g, h' = o tanh(c') as in `nn.LSTMCell`; the state is the pair (h, c), each of `hidden` numbers."""

    def __init__(self, ih: nn.Linear, hh: nn.Linear) -> None:
        super().__init__()
        self.ih, self.hh, self.state, self.cell = ih, hh, Point(), Point()
        self.hidden = int(hh.weight.shape[0]) // 4

    def forward(self, x: Tensor, hc: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if hc is None:
            h = c = x.new_zeros(*x.shape[:-1], self.hidden)
        else:
            h, c = self.state(hc[0]), self.cell(hc[1])
        i, f, g, o = (self.ih(x) + self.hh(h)).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def output(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """What the cell gives of its state: h."""
        return state[0]


Cell = GRUCell | LSTMCell


class Unrolled(nn.Module):
    """Cells over time: `nn.GRU` and `nn.LSTM` with their arguments and results.

    Layer k's cells are `cells[k]`, or `cells[2 k]` and `cells[2 k + 1]` (backwards in time) when bidirectional.
    """

    def __init__(self, cells: list[Cell], bidirectional: bool, batch_first: bool) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.bidirectional, self.batch_first = bidirectional, batch_first

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        single = x.dim() == 2
        x = x.unsqueeze(1) if single else x.transpose(0, 1) if self.batch_first else x  # (time, batch, features)
        ways = 2 if self.bidirectional else 1
        last: list[Any] = []
        for first in range(0, len(self.cells), ways):
            outputs = []
            for way in range(ways):
                cell = self.cells[first + way]
                assert isinstance(cell, GRUCell | LSTMCell)
                y, end = self._run(cell, x.flip(0) if way else x, self._start(state, first + way, single))
                outputs.append(y.flip(0) if way else y)
                last.append(end)
            x = torch.cat(outputs, dim=-1)
        x = x.squeeze(1) if single else x.transpose(0, 1) if self.batch_first else x
        return x, self._joined(last, single)

    @staticmethod
    def _run(cell: Cell, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        seen = []
        for step in x:
            state = cell(step, state)
            seen.append(cell.output(state))
        return torch.stack(seen), state

    @staticmethod
    def _start(state: Any, index: int, single: bool) -> Any:
        def one(h: Tensor) -> Tensor:
            return h[index].unsqueeze(0) if single else h[index]

        return None if state is None else tuple(map(one, state)) if isinstance(state, tuple) else one(state)

    @staticmethod
    def _joined(last: list[Any], single: bool) -> Any:
        def join(parts: list[Tensor]) -> Tensor:
            stacked = torch.stack(parts)
            return stacked.squeeze(1) if single else stacked

        if isinstance(last[0], tuple):
            return tuple(join([state[i] for state in last]) for i in range(2))
        return join(last)


def has_loop(module: nn.Module) -> bool:
    """Whether a part of the module loops over time."""
    return any(isinstance(part, Unrolled | nn.RNNBase) for part in module.modules())


def substitute(module: nn.Module) -> dict[str, nn.Module]:
    """Put the cells above in the place of torch's, in place; what was put, by name ("": the module itself).

    Raises InputError for an LSTM with projections. `nn.RNN` is left alone.
    """
    made: dict[str, nn.Module] = {}
    for name, part in list(module.named_modules()):
        match part:
            case nn.GRUCell():
                ours: nn.Module = GRUCell(*_linears(part, ""))
            case nn.LSTMCell():
                ours = LSTMCell(*_linears(part, ""))
            case nn.GRU() | nn.LSTM():
                ours = _unrolled(part, name)
            case _:
                continue
        made[name] = ours.eval()
        if name:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, ours)
    return made


def _unrolled(part: nn.GRU | nn.LSTM, name: str) -> Unrolled:
    if part.proj_size:
        raise InputError(f"layer {name!r}: an LSTM with projections cannot be quantized; use proj_size=0")
    kind = GRUCell if isinstance(part, nn.GRU) else LSTMCell
    ends = [f"_l{k}{way}" for k in range(part.num_layers) for way in ("", "_reverse")[: 1 + part.bidirectional]]
    return Unrolled([kind(*_linears(part, end)) for end in ends], part.bidirectional, part.batch_first)


def _linears(part: nn.Module, end: str) -> tuple[nn.Linear, nn.Linear]:
    made = []
    for side in ("ih", "hh"):
        weight, bias = getattr(part, f"weight_{side}{end}"), getattr(part, f"bias_{side}{end}", None)
        linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        made.append(linear)
    return made[0], made[1]
