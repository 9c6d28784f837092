"""One step of a recurrent network: as a graph, as a chain, and as an ONNX file that onnxruntime runs in a loop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from hwmodel.cost import HwError
from hwmodel.onnx_specs import read_onnx
from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.export import build_onnx, export_onnx, open_session
from quantkit.model import Calib, Model
from quantkit.qlayers import QLayer
from quantkit.recipe import quantize, uniform
from quantkit.recurrent import GRUCell, LSTMCell
from quantkit.rtl_export import hardware_specs
from quantkit.stepwise import chain_of, step_graph
from quantkit.verify import verify


class Flier(nn.Module):
    """A recurrent controller over sequences (batch, time, 6), or (time, batch, 6)."""

    def __init__(
        self, kind: type[nn.RNNBase] = nn.GRU, layers: int = 1, first: bool = True, last: bool = False
    ) -> None:
        super().__init__()
        self.enter, self.leave, self.last = nn.Linear(6, 8), nn.Linear(7, 2), last
        self.rnn = kind(8, 7, layers, batch_first=first)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(torch.tanh(self.enter(x)))[0]
        return self.leave(y[:, -1] if self.last else y)


def model_of(module: nn.Module, shape: tuple[int, ...] = (2, 4, 6)) -> Model:
    """The module, loaded."""
    return Model(module.eval(), torch.zeros(shape), None, {"sha256": "x"})


def quantized(
    module: nn.Module, weights: str = "int8", acts: str = "int8", shape: tuple[int, ...] = (2, 4, 6)
) -> Model:
    """The module, quantized on random sequences."""
    generator = torch.Generator().manual_seed(1)
    calib = Calib(torch.randn(12, *shape[1:], generator=generator))
    return quantize(model_of(module, shape), uniform(weights, acts), calib)


def in_a_loop(path: Path, x: np.ndarray) -> np.ndarray:
    """Outputs (batch, time, ...) of observations (batch, time, ...), states carried from run to run."""
    session, found = open_session(path), []
    _, *entries = session.get_inputs()
    states = [np.zeros((len(x), *entry.shape[1:]), np.float32) for entry in entries]
    for t in range(x.shape[1]):
        y, *states = session.run(None, {"input": x[:, t], **{e.name: s for e, s in zip(entries, states, strict=True)}})
        found.append(y)
    return np.stack(found, axis=1)


@pytest.mark.parametrize(("kind", "layers", "first"), [(nn.GRU, 1, True), (nn.GRU, 2, False), (nn.LSTM, 1, True)])
def test_float_steps_are_torchs_sequences(kind, layers, first, tmp_path):
    """Unquantized, the file in a loop gives what nn.GRU and nn.LSTM give of whole sequences, for any batch."""
    torch.manual_seed(2)
    module = Flier(kind, layers, first).eval()
    export_onnx(captured(model_of(module)), tmp_path / "f.onnx")
    x = torch.randn(3, 15, 6)
    with torch.no_grad():
        want = module(x if first else x.transpose(0, 1))
    want = want if first else want.transpose(0, 1)
    assert np.abs(in_a_loop(tmp_path / "f.onnx", x.numpy()) - want.numpy()).max() < 1e-5


@pytest.mark.parametrize(("kind", "layers"), [(nn.GRU, 1), (nn.GRU, 2), (nn.LSTM, 1)])
@pytest.mark.parametrize("to", ["qdq", "qdq-real", "qcdq"])
def test_the_file_verifies(kind, layers, to, tmp_path):
    """Every step over sequences agrees; with qdq the products do bit for bit, and a loop stays where torch is."""
    torch.manual_seed(3)
    model = quantized(Flier(kind, layers))
    export_onnx(model, tmp_path / "q.onnx", to=to)
    x = torch.randn(3, 15, 6)
    agreed = verify(model, tmp_path / "q.onnx", states=x.numpy())
    assert agreed.ok and agreed.n == 45 and agreed.exact_nodes == (2 + 2 * layers if to == "qdq" else 0)
    with torch.no_grad():
        want = model.module(x).numpy()
    assert np.abs(in_a_loop(tmp_path / "q.onnx", x.numpy()) - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize(("kind", "layers"), [(nn.GRU, 1), (nn.GRU, 2), (nn.LSTM, 1)])
@pytest.mark.parametrize("to", ["qdq", "qcdq"])
def test_the_file_costs_what_the_network_costs(kind, layers, to, tmp_path):
    """The layers that hwmodel reads from it are those of the design, gates and states included; of other weights than
    the file's they are not believed."""
    torch.manual_seed(5)
    model = quantized(Flier(kind, layers), "int4", "int6")
    export_onnx(model, tmp_path / "q.onnx", to=to)
    found = read_onnx(tmp_path / "q.onnx")
    assert tuple(found) == hardware_specs(model) and sum(spec.recurrence is not None for spec in found) == layers
    proto = onnx.load(tmp_path / "q.onnx")
    entry = next(entry for entry in proto.metadata_props if entry.key == "hardware")
    told = json.loads(entry.value)
    told[1]["recurrence"]["acc_bits"] += 1
    entry.value = json.dumps(told)
    onnx.save(proto, tmp_path / "other.onnx")
    with pytest.raises(HwError, match="expected a chain"):
        read_onnx(tmp_path / "other.onnx")


def test_names_tell_whose_state_it_is():
    """Inputs, outputs and metadata of one state and of several."""
    torch.manual_seed(4)
    one = build_onnx(quantized(Flier()))
    assert [value.name for value in one.graph.input] == ["input", "state"]
    assert [value.name for value in one.graph.output] == ["output", "next_state"]
    pair = build_onnx(quantized(Flier(nn.LSTM)))
    assert [value.name for value in pair.graph.output] == ["output", "next_state_0", "next_state_1"]
    facts = json.loads(next(p.value for p in pair.metadata_props if p.key == "states"))
    assert [(fact["cell"], fact["part"], fact["size"]) for fact in facts] == [
        ("rnn.cells.0", "h", 7),
        ("rnn.cells.0", "c", 7),
    ]


def test_sabotage_a_changed_weight_is_found(tmp_path):
    """One weight of the state's product changed: verification names a wrong node."""
    torch.manual_seed(5)
    model = quantized(Flier())
    proto = build_onnx(model)
    tensor = next(t for t in proto.graph.initializer if t.name.startswith("rnn.cells.0.hh.weight") and len(t.dims) == 2)
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] ^= 0x20
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, tmp_path / "bad.onnx")
    agreed = verify(model, tmp_path / "bad.onnx", states=torch.randn(2, 9, 6).numpy())
    assert not agreed.ok and "rnn_cells_0_hh" in agreed.reason


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("weights", ["int3", "e2m1"])
def test_a_step_graph_is_the_sequence(weights, last):
    """Taken step by step a quantized network gives its own outputs of a sequence, also where it gives the last only."""
    torch.manual_seed(6)
    model = quantized(Flier(last=last), weights, "int6")
    x = torch.randn(4, 11, 6)
    step = step_graph(model)
    with torch.no_grad():
        want = model.module(x)
    got = step.over(x)
    assert torch.allclose(got[:, -1] if last else got, want, atol=1e-6)
    assert [state.cell for state in step.states] == ["rnn.cells.0"]


def test_a_chain_is_layers_in_a_row():
    """Layers, activations and whole cells, under the names they have in the network."""
    torch.manual_seed(7)
    chain = chain_of(quantized(Flier(layers=2)))
    names = [name for name, part in chain if isinstance(part, QLayer | GRUCell)]
    assert names == ["enter", "rnn.cells.0", "rnn.cells.1", "leave"] and isinstance(chain[1][1], nn.Tanh)
    alone = chain_of(quantized(_Bare()))
    assert [name for name, _ in alone] == ["gru.cells.0"]


class _Bare(nn.Module):
    """A GRU whose states are the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class _Mean(_Bare):
    """Looks at the whole sequence before the first step."""

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x - x.mean(dim=1, keepdim=True))[0]


class _Learned(_Bare):
    """Starts from a state of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x, x.new_ones(1, len(x), 3))[0]


class _Branches(_Bare):
    """The input goes around the GRU, too."""

    def __init__(self) -> None:
        super().__init__()
        self.around = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0] + self.around(x)


class _Backwards(_Bare):
    """Runs both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 3, batch_first=True, bidirectional=True)


class _OwnLoop(nn.Module):
    """A cell in a loop of the network's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.gru = nn.GRUCell(6, 3), nn.GRU(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        seen = []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            seen.append(h)
        return self.gru(torch.stack(seen, dim=1))[0]


class _Whole(_Bare):
    """Gives the final state beside the output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.gru(x)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (_Whole, "several values"),
        (_Mean, "does more between two steps"),
        (_Learned, "a first state"),
        (_Backwards, "layer 'gru' runs backwards in time"),
        (_OwnLoop, "outside of one: cell"),
    ],
)
def test_what_has_no_step_is_refused(module, words):
    """One line says why; nothing is exported that would compute something else."""
    torch.manual_seed(8)
    with pytest.raises(InputError, match=words):
        step_graph(captured(model_of(module())))


def test_chains_and_targets_are_limited():
    """Branches have a step and no chain; FPGA tools get no recurrent networks."""
    torch.manual_seed(9)
    model = quantized(_Branches())
    step_graph(model)
    with pytest.raises(InputError, match="no place in a chain"):
        chain_of(model)
    kinds = [type(part) for _, part in chain_of(quantized(Flier(nn.LSTM)))]
    assert kinds.count(LSTMCell) == 1 and kinds[-1] is QLayer
    with pytest.raises(InputError, match="accepted: qdq, qdq-real, qcdq"):
        build_onnx(model, to="qonnx")
    with pytest.raises(InputError, match=r"over sequences \(batch, time, \.\.\.\), not over \(2, 6\)"):
        step_graph(captured(model_of(_Bare(), (2, 6))))
