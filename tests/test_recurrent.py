"""Recurrent cells: torch's results, and states that hold quantized values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hwmodel.formats import levels, parse
from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.qlayers import ActQuant
from quantkit.recipe import quantize, uniform
from quantkit.recurrent import GRUCell, LSTMCell, Unrolled, substitute


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_sequences_equal_torch(kind, layers, both, first, bias):
    """Outputs and final states of `nn.GRU` and `nn.LSTM`, batched or not, from zero and from given states."""
    torch.manual_seed(3)
    theirs = kind(5, 4, layers, bias=bias, bidirectional=both, batch_first=first).eval()
    root = nn.ModuleDict({"rnn": theirs})
    assert list(substitute(root)) == ["rnn"]
    ours = root["rnn"]
    assert isinstance(ours, Unrolled)
    depth = layers * (1 + both)
    batched = torch.randn(depth, 3, 4), torch.randn(depth, 3, 4)
    lone = torch.randn(depth, 4), torch.randn(depth, 4)
    for x, start in ((torch.randn(3, 3, 5), batched), (torch.randn(6, 5), lone)):
        for state in (None, start[0] if kind is nn.GRU else start):
            with torch.no_grad():
                (y, end), (expected, last) = ours(x, state), theirs(x, state)
            ends, lasts = (end, last) if kind is nn.LSTM else ((end,), (last,))
            assert torch.allclose(y, expected, atol=1e-6)
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ends, lasts, strict=True))


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
def test_cells_equal_torch(kind):
    """One step of torch's cells, and the cell is found at the root, too."""
    torch.manual_seed(4)
    theirs = kind(5, 4)
    ours = substitute(theirs)[""]
    x, h = torch.randn(3, 5), torch.randn(3, 4)
    state = h if kind is nn.GRUCell else (h, torch.randn(3, 4))
    with torch.no_grad():
        for given in (None, state):
            got, expected = ours(x, given), theirs(x, given)
            for a, b in zip(
                got if isinstance(got, tuple) else (got,),
                expected if isinstance(expected, tuple) else (expected,),
                strict=True,
            ):
                assert torch.allclose(a, b, atol=1e-6)


class Flier(nn.Module):
    """A recurrent controller over sequences (batch, time, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gru, self.leave = nn.Linear(6, 8), nn.GRU(8, 7, batch_first=True), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.gru(torch.relu(self.enter(x)))[0])


def test_a_recurrent_network_is_quantized_with_its_state():
    """Calibrated on sequences, products and state are quantized, for sequences of another length, too."""
    torch.manual_seed(5)
    model, x = Model(Flier().eval(), torch.zeros(2, 4, 6)), torch.randn(10, 12, 6)
    done = quantize(model, uniform("int8", "int8", steps=(("gptq", {}), ("bias_correction", {}))), Calib(x))
    assert list(done.qlayers()) == ["enter", "gru.cells.0.ih", "gru.cells.0.hh", "leave"]
    assert list(done.points()) == ["gru.cells.0.state"] and done.points()["gru.cells.0.state"].act is not None
    assert done.meta["untraced"] == "it loops over time"
    longer = torch.randn(3, 20, 6)
    with torch.no_grad():
        exact = model.module(longer)
        assert (done.module(longer) - exact).square().mean() < 1e-2 * exact.square().mean()


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_recurrent_network_can_be_trained(kind):
    """`distill` trains through time: what it keeps is nearer to the float network than what it began with."""
    torch.manual_seed(7)
    net = Flier()
    net.gru = kind(8, 7, batch_first=True)
    model, x = Model(net.eval(), torch.zeros(2, 4, 6)), torch.randn(48, 6, 6)
    errors = []
    for steps in ((("rtn", {}),), (("rtn", {}), ("distill", {"steps": 40, "rounds": 1, "batch": 16, "lr": 0.02}))):
        done = quantize(model, uniform("int3", "int4", steps=steps), Calib(x))
        with torch.no_grad():
            errors.append(float((done.module(x) - model.module(x)).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_the_state_is_stored_quantized():
    """The product with the state and the blend both see grid values of the state's format."""
    torch.manual_seed(6)
    cell = substitute(nn.GRUCell(3, 4))[""]
    assert isinstance(cell, GRUCell)
    cell.state.set_act(ActQuant(parse("int3"), 0.25))
    h = torch.randn(50, 4)
    seen = []
    cell.hh.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with torch.no_grad():
        quantized = cell(torch.randn(50, 3), h)
    assert set((seen[0] / 0.25).unique().tolist()) <= set(levels(parse("int3")))
    assert torch.isfinite(quantized).all()


def test_projections_are_refused():
    """An LSTM with projections is named, with what would be accepted."""
    root = nn.ModuleDict({"lstm": nn.LSTM(4, 6, proj_size=2)})
    with pytest.raises(InputError, match=r"layer 'lstm': an LSTM with projections.*proj_size=0"):
        substitute(root)


def test_lstm_has_two_points():
    """Both states of an LSTM can be quantized."""
    model = captured(Model(nn.LSTM(4, 3), torch.zeros(2, 5, 4)))
    assert list(model.points()) == ["cells.0.state", "cells.0.cell"]
    assert all(isinstance(c, LSTMCell) for c in model.module.cells)
