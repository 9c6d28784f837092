"""Accuracy of labelled inputs: counted by hand, its errors against simulation, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.tasks.accuracy import evaluate, read_labels, summary


def call(*arguments: str | Path) -> Any:
    """One command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.mark.parametrize("batch", [1, 3, 128])
def test_right_answers_are_counted(batch: int) -> None:
    """For any batch size: one of five is wrong, a tie counts for the first class."""
    outputs = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 0], [0, 0, 1]])
    calls: list[tuple[int, int]] = []
    found = evaluate(
        nn.Identity(), outputs, np.array([0, 1, 2, 0, 1]), batch=batch, progress=lambda *a: calls.append(a)
    )
    assert (found.metric, found.n, found.correct, found.mean) == ("accuracy", 5, 4, 0.8)
    assert found.stderr == pytest.approx(math.sqrt(0.8 * 0.2 / 5)) and calls[-1] == (5, 5)
    assert set(found.to_json()) >= {"metric", "mean", "stderr", "n"}


def test_the_standard_error_is_that_of_repetitions() -> None:
    """Over many sets of 200 answers, each right with 90 %, accuracies spread by the standard error."""
    correct = np.random.default_rng(7).binomial(200, 0.9, size=4000)
    spread = (correct / 200).std()
    assert summary(180, 200).stderr == pytest.approx(spread, rel=0.05)


def test_the_interval_covers() -> None:
    """The 95 % interval holds the truth in 92 to 98 % of the sets, near certainty too, and is never empty."""
    for p, n in ((0.7, 50), (0.97, 100)):
        correct = np.random.default_rng(8).binomial(n, p, size=2000)
        intervals = [summary(int(c), n) for c in correct]
        assert 0.92 < np.mean([s.low <= p <= s.high for s in intervals]) < 0.98
    assert summary(10, 10).low < 1 == summary(10, 10).high and summary(0, 10).high > 0 == summary(0, 10).low


def refused(outputs: Tensor, labels: list[int]) -> str:
    """The message for a network that gives these outputs."""
    with pytest.raises(InputError) as caught:
        evaluate(nn.Identity(), outputs, np.array(labels))
    return str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    """Other lengths, classes that the network does not have, and outputs that are no classes."""
    assert "3 labels for 2 inputs" in refused(torch.zeros(2, 4), [0, 1, 2])
    assert "0..3" in refused(torch.zeros(2, 4), [0, 4]) and "-1" in refused(torch.zeros(2, 4), [-1, 0])
    assert "(2, classes)" in refused(torch.zeros(2, 1), [0, 0])
    assert "(2, 4, 5)" in refused(torch.zeros(2, 4, 5), [0, 0])


def test_labels_are_read_from_both_kinds_of_file(tmp_path: Path) -> None:
    """A .npy of integers, and the one-dimensional array of a .npz; everything else is refused by name."""
    np.save(tmp_path / "y.npy", np.array([3, 1], np.uint8))
    np.savez(tmp_path / "xy.npz", x=np.zeros((2, 5)), y=np.array([3, 1]))
    for name in ("y.npy", "xy.npz"):
        assert read_labels(tmp_path / name).tolist() == [3, 1]
    np.save(tmp_path / "float.npy", np.array([0.5]))
    np.save(tmp_path / "wide.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "empty.npy", np.zeros(0, int))
    np.savez(tmp_path / "two.npz", a=np.zeros(2, int), b=np.zeros(2, int))
    (tmp_path / "text.npy").write_text("1 2 3\n")
    for name in ("float.npy", "wide.npy", "empty.npy", "two.npz", "text.npy", "missing.npy"):
        with pytest.raises(InputError, match=name):
            read_labels(tmp_path / name)


@pytest.fixture
def classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code, weights, inputs and labels of a small network that is always right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "accurate_nets.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))\n"
    )
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    x = torch.randn(300, 6)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", net(x).argmax(dim=1).numpy())
    return tmp_path


NET = ("--factory", "accurate_nets:make", "--inputs", "x.npy")


def test_the_command_measures_checkpoints_and_directories(classifier: Path) -> None:
    """100 % for the float network on its own answers, the direct count for the quantized directory, and text."""
    exact = json.loads(call("evaluate", "net.pt", *NET, "--labels", "y.npy", "--json").stdout)
    assert (exact["metric"], exact["mean"], exact["n"]) == ("accuracy", 1.0, 300)
    made = call("quantize", "net.pt", "-o", "q", *NET, "--weights", "int2", "--acts", "int3", "--calibration", "200")
    assert made.exit_code == 0, made.stderr
    found = json.loads(call("evaluate", "q", *NET, "--labels", "y.npy", "--json").stdout)
    from quantkit.artifact import load_artifact

    module = load_artifact(classifier / "q", factory="accurate_nets:make").module
    right = module(torch.from_numpy(np.load("x.npy"))).argmax(dim=1).numpy() == np.load("y.npy")
    assert found["correct"] == right.sum() < 300
    text = call("evaluate", "q", *NET, "--labels", "y.npy")
    assert f"{found['mean']:.2%}" in text.stdout and text.stderr == ""


def test_a_network_is_diagnosed_end_to_end(classifier: Path) -> None:
    """inspect and analyze take the same network and its directory; the changed answers are those of accuracy."""
    options = (*NET, "--weights", "int2", "--acts", "int3", "--calibration", "100")
    found = json.loads(call("analyze", "net.pt", *options, "--states", "200", "--json").stdout)
    assert found["metric"] == "output_error" and found["n"] == 200 and found["whole"]["top1_change"] > 0
    call("quantize", "net.pt", "-o", "q", *options)
    np.save("rest.npy", np.load("x.npy")[100:])
    np.save("answers.npy", np.load("y.npy")[100:])
    rest = ("--factory", "accurate_nets:make", "--inputs", "rest.npy", "--labels", "answers.npy")
    accuracy = json.loads(call("evaluate", "q", *rest, "--json").stdout)["mean"]
    assert found["whole"]["top1_change"] == pytest.approx(1 - accuracy)
    assert json.loads(call("inspect", "q", *NET[:2], "--json").stdout)["layers"][0]["weight"] == "int2"
    assert call("analyze", "q", *NET).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("net.pt", *NET), "--labels"),
        (("net.pt", *NET, "--labels", "missing.npy"), "missing.npy"),
        (("net.pt", *NET, "--labels", "x.npy"), "(300, 6)"),
        (("net.pt", *NET, "--labels", "few.npy"), "few.npy for x.npy: 7 labels for 300 inputs"),
        (("net.pt", *NET, "--labels", "high.npy"), "high.npy for x.npy: labels lie in 3..3, the network has 3 classes"),
        (("net.pt", "--factory", "accurate_nets:make", "--inputs", "wide.npy", "--labels", "y.npy"), "wide.npy"),
        ((str(Path(__file__).parents[1] / "benchmarks/agents/sac/Pendulum-v1.zip"), "--labels", "y.npy"), "policy"),
    ],
)
def test_mistakes_are_one_line(classifier: Path, arguments: tuple[str, ...], words: str) -> None:
    """Exit code 2 and one line that names the file or what is missing."""
    np.save("few.npy", np.zeros(7, int))
    np.save("high.npy", np.full(300, 3))
    np.save("wide.npy", np.zeros((300, 9), np.float32))
    result = call("evaluate", *arguments)
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
