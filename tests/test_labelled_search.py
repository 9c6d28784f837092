"""A search on labelled inputs and the network taken from it: races are prefixes, and the files do what the row says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from scipy.special import rel_entr, softmax
from test_cli import call, document, error
from test_labelled_sweep import FACTORY, MEASURE, in_place, place  # noqa: F401  (fixtures)

from quantkit.loading import load_checkpoint
from quantkit.model import Calib
from quantkit.pareto import front
from quantkit.racing import levels, looks
from quantkit.recipe import Recipe, make_plan, quantize
from quantkit.results import read_rows
from quantkit.statistics import non_inferior

pytest.importorskip("optuna")
SPACE = ("--weights", "int2,int3,int6", "--acts", "int4,int6", "--device", "xc7a35t", "--jobs", "1", "--step", "rtn")


def search(output: str, *more: str) -> Any:
    """`quantkit search` in the working directory."""
    size = ("--budget-designs", "14", "--batch", "4")
    return call(
        "search", "net.safetensors", "-o", output, *MEASURE, "--calibration", "c.npy", *SPACE, *size, "--json", *more
    )


@pytest.fixture(scope="module")
def found(place: Path) -> Path:  # noqa: F811
    """The folder of a finished search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(str(place))
        assert search("found").exit_code == 0
    return place / "found"


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The last row of each design."""
    return {row["id"]: row for row in read_rows(folder / "rows.jsonl")}


def rebuilt(row: dict[str, Any]) -> torch.nn.Module:
    """The network of a row, quantized here."""
    model = load_checkpoint("net.safetensors", factory=FACTORY, inputs=Path("c.npy"))
    calib = Calib(torch.from_numpy(np.load("c.npy")))
    return quantize(model, Recipe.from_json(row["recipe"]), calib).module


def test_races_are_prefixes_and_the_front_is_complete(found: Path) -> None:
    """Answers of a race are the first ones of the whole set in an order of chance, stopped at a look whose bounds
    decide; what is on the front answered all inputs."""
    rows, n = rows_of(found), 300
    order = np.random.default_rng(0).permutation(n)
    x, y = torch.from_numpy(np.load("x.npy"))[order], np.load("y.npy")[order]
    assert len(rows) == 14 and {row["episodes"] for row in rows.values()} <= set(looks(n, 64))
    short = [row for row in rows.values() if row["episodes"] < n]
    assert short and all(row["verdict"]["verdict"] == "inferior" for row in short)
    document = json.loads((found / "study.json").read_text())
    reference = np.array(document["reference"]["returns"])
    for row in (short[0], next(row for row in rows.values() if row["episodes"] == n)):
        with torch.inference_mode():
            right = (rebuilt(row)(x[: row["episodes"]]).argmax(1).numpy() == y[: row["episodes"]]).astype(float)
        assert row["score"]["returns"] == right.tolist() and row["score"]["mean"] == right.mean()
    for row in short:
        level = dict(zip(looks(n, 64), levels(4), strict=True))[row["episodes"]]
        again = non_inferior(
            reference[: row["episodes"]], row["score"]["returns"], document["margin"], level=level, method="shares"
        )
        assert again.to_json() == row["verdict"]
    ordered = list(rows.values())
    whole = [row | ({"partial": True} if row["episodes"] < n else {}) for row in ordered]
    assert front(whole, "luts", "mean") and all(whole[i]["episodes"] == n for i in front(whole, "luts", "mean"))


def test_searched_again_nothing_is_done(found: Path) -> None:
    """The same command again adds no row and no cell."""
    before = [(found / name).read_bytes() for name in ("rows.jsonl", "sensitivity.jsonl")]
    assert search("found").exit_code == 0
    assert [(found / name).read_bytes() for name in ("rows.jsonl", "sensitivity.jsonl")] == before


def test_a_cell_is_the_divergence_of_the_classes(found: Path) -> None:
    """The loss of a cell is scipy's KL of the softmax outputs, of the float network against one quantized layer."""
    cell = next(
        row
        for row in read_rows(found / "sensitivity.jsonl")
        if row["metric"] == "output_kl" and row["weights"] == "int3"
    )
    model = load_checkpoint("net.safetensors", factory=FACTORY, inputs=Path("c.npy"))
    x = torch.from_numpy(np.load("c.npy"))
    plan = ((cell["layer"], make_plan(cell["weights"], cell["acts"])),)
    quantized = quantize(model, Recipe(plan, (("rtn", {}),)), Calib(x))
    with torch.inference_mode():
        p, q = (softmax(m(x).double().numpy(), axis=1) for m in (model.module, quantized.module))
    assert cell["value"] == pytest.approx(rel_entr(p, q).sum(axis=1).mean(), rel=1e-5)


@pytest.fixture(scope="module")
def taken(found: Path) -> tuple[Path, dict[str, Any]]:
    """A design of the search, picked, with its record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found.parent)
        patch.syspath_prepend(str(found.parent))
        fresh = torch.randn(120, 2, 6, 6, generator=torch.Generator().manual_seed(9))
        np.save("fx.npy", np.concatenate([fresh.numpy(), np.load("x.npy")[:5]]))
        np.save("fy.npy", np.arange(125) % 5)
        options = ("--factory", FACTORY, "--inputs", "fx.npy", "--labels", "fy.npy", "--latency-us", "500")
        record = document("pick", "found", "-o", "taken", "--max-loss", "30%", *options)
    return found.parent / "taken", record


def test_what_is_taken_answers_as_its_row_says(found: Path, taken: tuple[Path, dict[str, Any]]) -> None:
    """The directory's accuracy by `evaluate`, and the file's by onnxruntime alone, are the row's; the card tells it."""
    folder, record = taken
    row = rows_of(found)[record["row"]["id"]]
    told = call("evaluate", folder, *MEASURE, "--json")
    assert json.loads(told.stdout)["mean"] == row["score"]["mean"] == record["onnx"]["verified"]["mean"]
    session = onnxruntime.InferenceSession(str(folder / "network.onnx"))
    answers = session.run(None, {"input": np.load("x.npy")})[0].argmax(axis=1)
    assert (answers == np.load("y.npy")).mean() == row["score"]["mean"]
    assert record["onnx"]["verified"]["ok"] and record["differences"] == []
    card = (folder / "README.md").read_text()
    assert f"| this one | 300 of the study | {100 * row['score']['mean']:.2f} % |" in card
    assert "`fx.npy`, which had to show the same" in card and "5 inputs that the study has were left out" in card
    assert (folder / "network.qonnx.onnx").is_file() == (record["onnx"]["qonnx"] is not None)


def test_the_choice_is_the_cheapest_within_the_loss(found: Path, taken: tuple[Path, dict[str, Any]]) -> None:
    """Of the designs whose bound is within the loss it is the cheapest for the latency asked for, and fits."""
    record = taken[1]
    reference = json.loads((found / "study.json").read_text())
    span = reference["reference"]["mean"] - reference["random"]["mean"]
    assert -record["row"]["verdict"]["low"] <= 0.3 * span and record["estimate"]["latency_us"] <= 500
    assert record["fresh"]["score"]["n"] == 120 and record["fresh"]["seen"] == 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), f"--factory {FACTORY}"),
        (("--factory", FACTORY, "--confirm", "5"), "--confirm"),
        (("--factory", FACTORY, "--robustness"), "--robustness"),
        (("--factory", FACTORY, "--inputs", "fx.npy"), "--labels"),
        (("--factory", FACTORY, "--inputs", "x.npy", "--labels", "y.npy"), "has seen 300 of its 300"),
    ],
)
@pytest.mark.usefixtures("taken")
def test_misfits_are_one_line(options: tuple[str, ...], named: str) -> None:
    """What a network's study cannot do, and what is missing, is named; nothing is written."""
    assert named in error("pick", "found", "-o", "never", "--knee", *options)
    assert not Path("never").exists()


def test_inputs_that_are_gone_or_others_are_named(found: Path) -> None:
    """The study's labelled inputs are read again: moved or changed ones are refused by name."""
    shutil.copytree(found, "moved")
    path = Path("moved/study.json")
    document = json.loads(path.read_text())
    for name, words in (("gone.npy", "gone.npy is no file"), ("z.npy", "hold other inputs or labels")):
        document["origin"]["labels"] = str(Path(name).absolute())
        path.write_text(json.dumps(document))
        np.save("z.npy", (np.load("y.npy") + 1) % 5)
        assert words in error("pick", "moved", "-o", "never", "--knee", "--factory", FACTORY)


def test_embeddings_are_searched_for_their_memory(place: Path) -> None:  # noqa: F811
    """A table has formats of its own and no inputs; each row's memory is that of its codes and scales, counted here."""
    code = """
from torch import nn
class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.table = nn.Linear(8, 5), nn.Embedding(9, 8)
    def forward(self, x):
        return self.fc(self.table(x).mean(1))
"""
    (place / "tiny_bag.py").write_text(code)
    import tiny_bag
    from safetensors.torch import save_file

    torch.manual_seed(0)
    bag, words = tiny_bag.Bag(), np.random.default_rng(0).integers(0, 9, (150, 6))
    save_file(bag.state_dict(), "bag.safetensors")
    np.save("words.npy", words)
    np.save("classes.npy", bag(torch.from_numpy(words)).argmax(1).numpy())
    given = ("--inputs", "words.npy", "--labels", "classes.npy", "--calibration", "words.npy", "--factory")
    space = ("--weights", "int2,int3,int4,int8", "--acts", "int6", "--step", "rtn", "--cost", "weight_kib")
    size = ("--budget-designs", "12", "--batch", "4", "--jobs", "1", "--json")
    assert call("search", "bag.safetensors", "-o", "bag", *given, "tiny_bag:Bag", *space, *size).exit_code == 0
    rows = list(rows_of(Path("bag")).values())
    plans = [Recipe.from_json(row["recipe"]) for row in rows]
    bits = [[plan.plan_for(name, i, 2).weight.bits for i, name in enumerate(("fc", "table"))] for plan in plans]  # type: ignore[union-attr]
    for row, (fc, table) in zip(rows, bits, strict=True):
        assert row["weight_kib"] == pytest.approx((fc * 40 + 32 * 5 + table * 72 + 32 * 9) / 8192)
        assert row["cost"]["luts"] > 0
    assert len(rows) == 12 and len(set(map(tuple, bits))) == 12 and any(fc != table for fc, table in bits)
    cells = {(row["layer"], row["acts"]) for row in read_rows(Path("bag") / "sensitivity.jsonl")}
    assert cells == {("fc", "int6"), ("table", "float")}
