"""The study of integers and minifloats: it resumes, its fronts are right, and its controllers are the trained ones."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hwmodel.formats import bits, levels, parse
from quantkit.capture import captured
from quantkit.model import Calib, Model
from quantkit.results import Row, read_rows

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("QUANTKIT_SHARED_DATA", "/nonexistent")) / "quad"

sys.path.insert(0, str(ROOT / "benchmarks"))
import minifloat_report as report  # noqa: E402
import minifloat_vs_integer as study  # noqa: E402
import quadrotors  # noqa: E402

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="QUANTKIT_SHARED_DATA has no quad")


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> study.Task:
    """A classifier of 2 layers whose labels are what it says, at 3 and 4 bits and by two techniques."""
    monkeypatch.setattr(study, "WIDTHS", (4, 3))
    monkeypatch.setattr(study, "TECHNIQUES", {"vision": {"rtn": (), "gptq": study.GPTQ}})
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    x = torch.randn(96, 6)
    y = module(x[32:]).argmax(1)

    def score(model: Model) -> np.ndarray:
        with torch.no_grad():
            return (model.module(x[32:]).argmax(1) == y).numpy()

    return study.Task("tiny", "vision", captured(Model(module, x[:1], None, {})), Calib(x[:32]), score, 0.25)


def facts_of(row: Row) -> Row:
    """A row without its timings."""
    return {key: value for key, value in row.items() if "seconds" not in key}


def test_a_run_that_was_cut_off_ends_with_the_rows_of_one_that_was_not(task: study.Task, tmp_path: Path) -> None:
    """Whatever lines are left, the rows are the same in the end; a finished study evaluates nothing."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for work in (whole, cut):
        study.open_work(work)
        study.run({"tiny": task}, work, float("inf"))
    path = cut / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]) + lines[-1][:40])  # the last line broken, as by a crash
    study.run({"tiny": task}, cut, float("inf"))
    rows = [facts_of(row) for row in read_rows(path)]
    assert rows == [facts_of(row) for row in read_rows(whole / "rows.jsonl")]
    assert len(rows) == len({row["id"] for row in rows}) == study.planned(cut, ["tiny"])["tiny"][1]
    before = path.read_bytes()
    study.run({"tiny": task}, cut, float("inf"))
    assert path.read_bytes() == before


def test_other_settings_are_refused(task: study.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of rows of other settings is not mixed with new ones."""
    study.open_work(tmp_path)
    monkeypatch.setitem(study.SETTINGS, "flights", 3)
    with pytest.raises(study.InputError, match="other settings"):
        study.open_work(tmp_path)


def test_the_report_is_made_of_the_rows(task: study.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line of a table and of the reading is the command; every row and every figure is there, no NaN."""
    folder = tmp_path / "reports" / "made"
    monkeypatch.setattr(report, "FOLDER", folder)
    study.open_work(tmp_path / "work")
    study.run({"tiny": task}, tmp_path / "work", float("inf"))
    report.publish_study(tmp_path / "work", study.planned(tmp_path / "work", ["tiny"]))
    rows = read_rows(tmp_path / "work" / "rows.jsonl")
    with (folder / "rows.csv").open() as handle:
        assert handle.readline() == f"# {report.COMMAND}\n"
        assert len(list(csv.DictReader(handle))) == len(rows)
    reading = (folder / "README.md").read_text()
    assert reading.startswith(f"`{report.COMMAND}`\n")
    assert "nan" not in reading.lower().split()
    for name in ("same_widths", "equal_widths", *(f"quality_by_{axis}" for axis in report.AXES)):
        assert f"({name}.png)" in reading and (folder / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize("width", range(3, 9))
def test_every_exmy_of_a_width_is_tried(width: int) -> None:
    """E from 1 to width - 1, each with the bits that are left, and each paired with itself."""
    names = study.floats_of(width)
    assert [parse(name).exp for name in names] == list(range(1, width))  # type: ignore[union-attr]
    assert {bits(parse(name)) for name in names} == {width}
    noise = {side: {n: float(len(n)) for w in study.WIDTHS for n in study.floats_of(w)} for side in ("weights", "acts")}
    designs = study.designs(noise)
    assert len({(d.weights, d.acts) for d in designs}) == len(designs)
    assert sum(d.family == "integer" for d in designs) == 36
    assert {d.weights for d in designs if d.weights == d.acts and bits(parse(d.weights)) == width} >= {*names}
    pairs = {(bits(parse(d.weights)), bits(parse(d.acts))) for d in designs if d.family == "minifloat"}
    assert len(pairs) == 36


def test_the_format_of_least_noise_is_that_of_the_numbers(task: study.Task) -> None:
    """Weights that are values of e2m1 have the most SQNR in e2m1."""
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor(levels(parse("e2m1")))
    for layer in task.model.layers().values():
        layer.weight.copy_(values[torch.randint(len(values), layer.weight.shape, generator=generator)])
        layer.weight[:, 0] = 6.0
    noise = study.least_noise(task)["weights"]
    assert max(study.floats_of(4), key=noise.__getitem__) == "e2m1"


def points(*found: tuple[str, str, float, float]) -> list[report.Point]:
    """(weights, acts, LUTs, quality) as points of 100 outcomes."""
    made = []
    for w, a, luts, quality in found:
        values = (np.arange(100) < round(100 * quality)).astype(float)
        made.append(report.Point("n", "", w, a, report.kind_of(w, a), "rtn", quality, values, {"luts_mac": luts}))
    return made


TABLE = points(
    ("int3", "int3", 20, 0.2),
    ("e2m0", "e2m0", 25, 0.6),
    ("int4", "int4", 30, 0.5),
    ("e2m1", "e2m1", 40, 0.9),
    ("int6", "int6", 40, 0.9),
    ("int8", "int8", 60, 1.0),
    ("e4m3", "e4m3", 99, 0.95),
)


def test_a_front_is_what_none_beats() -> None:
    """On a table made by hand: dominated designs are left out, of identical ones the first stays."""
    front = report.front(TABLE, "luts_mac")
    assert [p.name for p in front] == ["int3/int3", "e2m0/e2m0", "e2m1/e2m1", "int8/int8"]
    assert [p.name for p in report.front(report.of_kind(TABLE, report.INTEGER), "luts_mac")] == [
        *("int3/int3", "int4/int4", "int6/int6", "int8/int8")
    ]


def test_the_cheapest_and_the_best_within() -> None:
    """Both by hand; None where nothing is good or cheap enough."""
    assert report.cheapest(TABLE, "luts_mac", 0.55) == TABLE[1]
    assert report.cheapest(TABLE, "luts_mac", 1.01) is None
    assert report.best_within(TABLE, "luts_mac", 35) == TABLE[1]
    assert report.best_within(TABLE, "luts_mac", 19) is None


def test_fronts_cross_where_the_leader_changes() -> None:
    """Integers alone, minifloats from 25, level from 40 where both reach 0.9, integers from 60 on."""
    found = report.stretches(TABLE, "luts_mac")
    assert [(s.start, s.leader) for s in found] == [
        *((20, report.INTEGER), (25, report.MINIFLOAT), (40, ""), (60, report.INTEGER))
    ]
    assert found[1].lead == pytest.approx(0.4)


def test_a_duel_uses_the_techniques_that_both_were_tried_by() -> None:
    """A technique that only one design has does not count, nor one that was refused; without a common one none."""
    facts = {"network": "n", "chance": 0.0, "quality": 1.0}

    def row(fmt: str, technique: str, good: int, **more: str) -> Row:
        outcomes = study.outcomes_json(np.arange(8) < good)
        costs = {"luts_mac": 1.0, "luts_mac32": 1.0, "weight_kib": 1.0, "acc_bits": 9}
        pair = {"network": "n", "group": "equal", "weights": fmt, "acts": fmt, "technique": technique}
        return {**pair, **outcomes, **costs, **more}

    rows = [row("int4", "rtn", 3), row("e2m1", "rtn", 4), row("e2m1", "gptq", 7), row("int4", "gptq", 8, error="no")]
    pair = report.duel(rows, facts, ("int4", "int4"), ("e2m1", "e2m1"))
    assert pair is not None
    assert [p.kept for p in pair] == [3 / 8, 4 / 8]
    assert report.paired(pair[1], pair[0])[0] == 1 / 8
    assert report.duel(rows[:1], facts, ("int4", "int4"), ("e2m1", "e2m1")) is None


def test_outcomes_come_back_from_a_row() -> None:
    """Bits and numbers, rescaled so that chance is 0 and the float network 1."""
    bools = np.array([True, False, True, True, False, True, True, True, True])
    facts = {"chance": 0.25, "quality": 0.75}
    assert report.kept(study.outcomes_json(bools), facts) == pytest.approx((bools - 0.25) / 0.5)
    returns = np.array([1.5, -2.25])
    assert report.kept(json.loads(json.dumps(study.outcomes_json(returns))), facts) == pytest.approx(
        (returns - 0.25) / 0.5
    )


@needs_data
def test_l2f_reproduces_its_vector() -> None:
    """The observation and action embedded in the published controller."""
    vector = np.load(DATA / "l2f_test_vector.npz")
    action = quadrotors.load("l2f", DATA)(torch.tensor(vector["observation"])[None])[0]
    assert action.numpy() == pytest.approx(vector["action"], abs=1e-6)


@needs_data
def test_raptor_reproduces_its_sequence() -> None:
    """500 steps of two flights: whole sequences at once, float and with the cells that can be quantized."""
    example = np.load(DATA / "raptor_example_io.npz")
    module, x = quadrotors.load("raptor", DATA), torch.tensor(example["input"]).transpose(0, 1)
    for net in (module, captured(Model(module, x[:1], None, {})).module):
        assert net(x).transpose(0, 1).numpy() == pytest.approx(example["output"], abs=1e-5)


@needs_data
@pytest.mark.parametrize("name", quadrotors.NAMES)
def test_flights_start_alike_and_recur(name: str) -> None:
    """The same seed gives the same flights, and another controller starts from the same states."""
    module = quadrotors.load(name, DATA)
    one, again = (quadrotors.fly(module, name, DATA, flights=6, seed=3, steps=20) for _ in range(2))
    assert np.array_equal(one.inputs, again.inputs)
    other = quadrotors.load(name, DATA)
    for parameter in other.parameters():
        parameter.zero_()
    assert np.array_equal(quadrotors.fly(other, name, DATA, flights=6, seed=3, steps=20).inputs[0], one.inputs[0])
