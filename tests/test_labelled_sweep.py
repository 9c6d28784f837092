"""A sweep of a network on labelled inputs: its accuracies are those of `evaluate`, and a study keeps to its inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from test_cli import call, error
from test_page import embedded
from test_statistics import tango
from torch import nn

from quantkit.pareto import label
from quantkit.results import read_rows
from quantkit.tasks.accuracy import as_score, summary

FACTORY = "tiny_labelled_net:make"
CODE = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, inputs whose labels are mostly its answers, and other inputs to calibrate it."""
    folder = tmp_path_factory.mktemp("labelled")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5))
    (folder / "tiny_labelled_net.py").write_text(CODE)
    save_file(net.state_dict(), folder / "net.safetensors")
    x, calib = torch.randn(300, 2, 6, 6), torch.randn(64, 2, 6, 6)
    y = net(x).argmax(1).numpy()
    y[::10] = (y[::10] + 1) % 5
    np.save(folder / "x.npy", x.numpy())
    np.save(folder / "y.npy", y)
    np.save(folder / "c.npy", calib.numpy())
    return folder


@pytest.fixture(autouse=True)
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factory is found in the working directory."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))


MEASURE = ("--factory", FACTORY, "--inputs", "x.npy", "--labels", "y.npy")
SPACE = ("--weights", "int2,e2m1", "--acts", "int4", "--device", "none", "--jobs", "1", "--step", "rtn")


def sweep(output: str, *more: str) -> str:
    """`quantkit sweep` in the working directory; its standard output."""
    done = call("sweep", "net.safetensors", "-o", output, *MEASURE, "--calibration", "c.npy", *SPACE, *more)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


@pytest.fixture(scope="module")
def swept(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(str(place))
        sweep("study")
    return place / "study"


def test_accuracies_are_those_of_quantize_and_evaluate(swept: Path) -> None:
    """Each design's accuracy is what the two other commands give, and its verdict pairs input by input (Tango)."""
    study = json.loads((swept / "study.json").read_text())
    told = call("evaluate", "net.safetensors", *MEASURE, "--json")
    assert study["reference"]["mean"] == json.loads(told.stdout)["mean"] == pytest.approx(0.9)
    rows = read_rows(swept / "rows.jsonl")
    assert len(rows) == 2
    for row in rows:
        made = f"{row['weights']}.q"
        formats = ("--weights", row["weights"], "--acts", row["acts"])
        common = ("--factory", FACTORY, "--inputs")
        assert call("quantize", "net.safetensors", "-o", made, *formats, *common, "c.npy").exit_code == 0
        found = json.loads(call("evaluate", made, *common, "x.npy", "--labels", "y.npy", "--json").stdout)
        assert (row["score"]["metric"], row["score"]["mean"], row["score"]["n"]) == ("accuracy", found["mean"], 300)
        difference = np.array(row["score"]["returns"]) - np.array(study["reference"]["returns"])
        bounds = tango(int((difference > 0).sum()), int((difference < 0).sum()), 300, 0.95)
        assert (row["verdict"]["low"], row["verdict"]["high"]) == pytest.approx(bounds, abs=1e-5)


def test_nothing_is_done_twice_and_other_inputs_are_refused(swept: Path) -> None:
    """The same command again adds no row; other labels or calibration are another study, and said to be so."""
    before = (swept / "rows.jsonl").read_bytes()
    assert "accuracy" in sweep("study") and (swept / "rows.jsonl").read_bytes() == before
    labels = np.load("y.npy")
    np.save("other.npy", (labels + 1) % 5)
    same = ("sweep", "net.safetensors", "-o", "study", *SPACE, "--factory", FACTORY, "--inputs", "x.npy")
    assert "labelled" in error(*same, "--labels", "other.npy", "--calibration", "c.npy")
    assert "calibration" in error(*same, "--labels", "y.npy", "--calibration", "x.npy")


def test_the_page_counts_changed_answers(swept: Path) -> None:
    """The page tells accuracies, how many answers were lost and gained, and the command that makes a design again."""
    assert call("report", "study", "-o", "page.html", "--force").exit_code == 0
    told = embedded(Path("page.html").read_text())
    reference = np.array(json.loads((swept / "study.json").read_text())["reference"]["returns"])
    for design, row in zip(told["designs"], read_rows(swept / "rows.jsonl"), strict=True):
        ours = np.array(row["score"]["returns"])
        assert design["changed"] == [int(((reference == 1) & (ours == 0)).sum()), int((reference < ours).sum())]
        assert FACTORY in design["command"] and "--inputs c.npy" in design["command"]
        assert f"--id {design['id']} --factory {FACTORY}" in design["pick"]
    assert told["columns"]["mean"]["label"] == label("mean", "accuracy") == "accuracy"
    assert [layer["inputs"] for layer in told["layers"]] == [2, 96]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--labels", ""), "--labels"),
        (("--calibration", ""), "--calibration"),
        (("--labels", "short.npy"), "299 labels for the 300 inputs"),
        (("--calibration", "flat.npy"), "flat.npy"),
    ],
)
def test_missing_and_misshapen_files_are_named(change: tuple[str, str], named: str) -> None:
    """One line says which file is missing or does not fit, and no study is begun."""
    np.save("short.npy", np.load("y.npy")[1:])
    np.save("flat.npy", np.zeros((4, 72), np.float32))
    given = {"--factory": FACTORY, "--inputs": "x.npy", "--labels": "y.npy", "--calibration": "c.npy"} | dict([change])
    options = [word for pair in given.items() if pair[1] for word in pair]
    assert named in error("sweep", "net.safetensors", "-o", "never", *SPACE, *options)
    assert not Path("never").exists()


def test_policies_are_measured_in_episodes() -> None:
    """Labels for a policy are refused in one line."""
    agent = Path(__file__).parents[1] / "benchmarks/agents/sac/Pendulum-v1.zip"
    message = error("sweep", agent, "-o", "never", *SPACE, "--inputs", "x.npy", "--labels", "y.npy")
    assert "episodes" in message and not Path("never").exists()


def test_a_score_is_its_accuracy() -> None:
    """Mean and interval are those of `summary`, the standard error that of the zeros and ones."""
    right = np.random.default_rng(3).random(500) < 0.8
    score, counted = as_score(right), summary(int(right.sum()), 500)
    assert (score.mean, score.iqm_low, score.iqm_high) == (counted.mean, counted.low, counted.high)
    assert score.stderr == pytest.approx(stats.sem(right.astype(float)))
