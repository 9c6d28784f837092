"""Laws of taking a design away: the right one is chosen, what is written is what its row says, and a wish that cannot
be met is answered with the nearest that can."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from test_cli import call, document, error

from hwmodel.devices import find_device
from hwmodel.estimate import estimate
from hwmodel.spec import LayerSpec
from quantkit.card import number
from quantkit.errors import InputError
from quantkit.page import page_data
from quantkit.pareto import value
from quantkit.rebuild import rebuild, study_model, study_states
from quantkit.report import read_study
from quantkit.results import append_row
from quantkit.seeds import CONFIRM
from quantkit.specs import layer_specs
from quantkit.statistics import non_inferior
from quantkit.wishes import loss_bound, parse_loss, span_of, wanted

AGENTS = Path(__file__).parents[1] / "benchmarks/agents"
AGENT = AGENTS / "sac/Pendulum-v1.zip"
QUICK = ("--confirm", "0")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of eight designs of a Pendulum policy, four episodes each."""
    folder = tmp_path_factory.mktemp("pick") / "study"
    options = ("--weights", "int2,int4,int6,e2m1", "--acts", "int4,int8", "-n", "4", "--jobs", "1")
    assert call("sweep", AGENT, "-o", folder, *options, "--layer", "first=int8/int8").exit_code == 0
    return folder


@pytest.fixture(scope="module")
def taken(study: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The knee of the study, picked."""
    folder = tmp_path_factory.mktemp("taken") / "best"
    return folder, document("pick", study, "-o", folder, "--knee", "--confirm", "3")


def copied(study: Path, folder: Path, edit: Any = None) -> Path:
    """The study in another folder, each row edited."""
    shutil.copytree(study, folder)
    if edit is not None:
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        (folder / "rows.jsonl").unlink()
        for row in rows:
            edit(row)
            append_row(folder / "rows.jsonl", row)
    return folder


# --- what is written ------------------------------------------------------------------------------


def test_what_is_taken_is_what_the_row_says(study: Path, taken: tuple[Path, dict[str, Any]]) -> None:
    """The directory's policy plays the row's returns to the last bit, and nothing differs; its price is that of its own
    specs, which know the constants behind the sums, and near the row's."""
    folder, record = taken
    row = next(row for row in read_study(study)[1] if row["id"] == record["row"]["id"])
    assert record["row"] == row and record["differences"] == []
    assert json.loads((folder / "pick.json").read_text()) == {k: v for k, v in record.items() if k != "output"}
    assert document("evaluate", folder, "-n", "4")["returns"] == row["score"]["returns"]
    assert json.loads((folder / "estimate.json").read_text()) == record["estimate"]
    specs = [LayerSpec.from_json(e) for e in json.loads((folder / "specs.json").read_text())["layers"]]
    assert record["estimate"] == json.loads(json.dumps(estimate(specs, find_device("xc7a35t")).to_json()))
    assert record["estimate"]["luts"] == pytest.approx(row["cost"]["luts"], rel=0.1)


def test_the_onnx_files_run_and_are_verified(taken: tuple[Path, dict[str, Any]]) -> None:
    """policy.onnx gives actions of the environment; `quantkit verify` agrees with the card; so does the QONNX file."""
    folder, record = taken
    assert record["onnx"]["verified"]["ok"] and record["onnx"]["qonnx_verified"]["ok"]
    assert record["onnx"]["verified"]["mean_torch"] == record["row"]["score"]["mean"]
    assert record["onnx"]["verified"]["mean"] == pytest.approx(record["row"]["score"]["mean"], rel=1e-2)  # tanh differs
    session = onnxruntime.InferenceSession(folder / "policy.onnx")
    actions = session.run(None, {"obs": np.zeros((5, 3), np.float32)})[0]
    assert actions.shape == (5, 1) and (np.abs(actions) <= 2).all()
    assert document("verify", folder, folder / "policy.onnx", "-n", "2")["ok"]


def cells(card: str, first: str) -> list[str]:
    """The cells of the card's table line that begins with `first`."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_card_says_the_rows_numbers(study: Path, taken: tuple[Path, dict[str, Any]]) -> None:
    """Means, errors, seeds, bounds and files of the card are those of row, study, folder; LUTs are the estimate's."""
    folder, record = taken
    card, row, reference = (folder / "README.md").read_text(), record["row"], read_study(study)[0]["reference"]
    for name, score in (("float", reference), ("this one", row["score"])):
        told = [number(score["mean"]), number(score["stderr"], 3), number(score["iqm"]), number(min(score["returns"]))]
        assert cells(card, name) == [name, "1000..1003", "4", *told]
    for name, key in (("LUTs", "luts"), ("flip-flops", "ffs"), ("DSPs", "dsps"), ("BRAM18", "bram18")):
        have = getattr(find_device("xc7a35t"), key)
        share = f"{100 * record['estimate'][key] / have:.2f} %"
        assert cells(card, name) == [name, number(record["estimate"][key]), number(have), share]
    for bound in (row["verdict"]["diff_mean"], row["verdict"]["low"], row["verdict"]["high"]):
        assert f"{bound:+.4g}" in card
    for path in folder.iterdir():
        if path.name != "README.md":
            assert cells(card, f"`{path.name}`")[2] == number(path.stat().st_size)
    assert row["checkpoint_sha256"] in card and "bit for bit" in card and "not verified" not in card
    assert not re.search(r"\bnan\b|\| None|undefined|\{\{", card)


def test_fresh_seeds_are_fresh(taken: tuple[Path, dict[str, Any]]) -> None:
    """The confirmation equals `evaluate` of float and of the directory on seeds that the study does not have."""
    folder, record = taken
    for path, score in ((AGENT, record["fresh"]["reference"]), (folder, record["fresh"]["score"])):
        again = document("evaluate", path, "-n", "3", "--seed", CONFIRM.start)
        assert score["returns"] == again["returns"] and score["seed"] == CONFIRM.start
    apart = np.subtract(record["fresh"]["score"]["returns"], record["fresh"]["reference"]["returns"])
    assert record["fresh"]["verdict"]["diff_mean"] == pytest.approx(apart.mean())


def test_robustness_goes_to_the_card_and_the_page(study: Path, tmp_path: Path) -> None:
    """Its plain episodes are the row's; the card has each condition, and the study's page shows them."""
    folder = copied(study, tmp_path / "s")
    record = document(
        "pick", folder, "-o", tmp_path / "p", "--id", read_study(folder)[1][3]["id"], "--robustness", *QUICK
    )
    rows = record["robustness"]["rows"]
    assert rows[0]["returns"] == record["row"]["score"]["returns"]
    assert rows[0]["reference"]["returns"] == record["reference"]["returns"]
    card = (tmp_path / "p/README.md").read_text()
    for row in rows:
        assert cells(card, row["condition"])[1:4] == [
            number(row["mean"]), number(row["worst_decile"]), number(row["chatter"], 3),
        ]  # fmt: skip
    shown = {d["id"]: d["robustness"] for d in page_data(folder)["study"]["designs"] if d["robustness"]}
    assert list(shown) == [record["row"]["id"]] and shown[record["row"]["id"]]["rows"] == rows
    assert "fresh" not in record and "not measured on other seeds" in card


# --- which one is chosen --------------------------------------------------------------------------


def test_the_cheapest_within_the_loss_is_chosen(study: Path) -> None:
    """For every tolerated loss and cost, brute force over the episodes' returns finds the same design."""
    facts, rows = read_study(study)
    span = span_of(facts)
    bounds = {}
    for row in rows:
        found = non_inferior(facts["reference"]["returns"], row["score"]["returns"], 0.0)
        bounds[row["id"]] = -found.low
        assert loss_bound(row) == -found.low
    for limit in sorted(bounds.values()):
        if limit < 0:
            continue
        for x in ("luts", "ffs", "weight_kib"):
            chosen = wanted(facts, rows, x, max_loss=f"{limit!r}")[0][0]
            good = [row for row in rows if bounds[row["id"]] <= limit]
            assert value(chosen, x) == min(value(row, x) for row in good)  # type: ignore[type-var]
            assert chosen in good
    percent = wanted(facts, rows, "luts", max_loss="60%")[0]
    assert percent == wanted(facts, rows, "luts", max_loss=f"{0.6 * span!r}")[0]


def test_another_target_is_priced_anew(study: Path, tmp_path: Path) -> None:
    """For another part and latency the design is the cheapest there of all within the loss, by brute force."""
    facts, rows = read_study(study)
    part = find_device("xc7z020")
    options = ("--device", "xc7z020", "--latency-us", "3", "--max-loss", "60%", *QUICK)
    record = document("pick", study, "-o", tmp_path / "p", *options)
    model = study_model(facts, study)
    states = study_states(study, model)
    eligible = [row for row in rows if loss_bound(row) <= 0.6 * span_of(facts)]
    prices = {
        row["id"]: estimate(layer_specs(rebuild(row, model, states)), part, latency_us=3).luts for row in eligible
    }
    assert len(prices) > 2 and min(prices.values()) == prices[record["row"]["id"]]
    assert record["estimate"]["device"] == "xc7z020" and record["estimate"]["latency_us"] <= 3
    assert record["differences"] == [] and "priced for xc7z020 within 3 µs" in record["chosen"]["why"]


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        (("--max-loss", "0"), r"nearest possible is --max-loss ([\d.]+) "),
        (("--max-loss", "60%", "--latency-us", "0.05"), r"nearest possible is ([\d.]+) µs"),
        (("--max-loss", "60%", "--luts", "50"), r"nearest possible is ([\d,]+) LUTs"),
    ],
)
def test_the_nearest_possible_is_possible(study: Path, tmp_path: Path, asked: tuple[str, ...], pattern: str) -> None:
    """A wish that cannot be met writes nothing and names one that can: asked for that, a design is found."""
    line = error("pick", study, "-o", tmp_path / "p", *asked)
    assert not (tmp_path / "p").exists()
    found = re.search(pattern, line)
    assert found, line
    assert call("pick", study, "-o", tmp_path / "p", *asked[:-1], found[1].replace(",", ""), *QUICK).exit_code == 0


def test_a_part_that_is_too_small_is_said(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A design that exceeds the part is not taken; the line says the resource, what is used and what there is."""
    from dataclasses import replace

    import quantkit.pick

    tiny = replace(find_device("xc7a35t"), luts=60, name="tiny")
    monkeypatch.setattr(quantkit.pick, "find_device", lambda name: tiny if name == "tiny" else find_device(name))
    line = error("pick", study, "-o", tmp_path / "p", "--knee", "--device", "tiny")
    assert re.search(r"needs [\d,]+ LUTs of 60", line), line


def test_a_lucky_design_is_passed_over(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A design that fails on fresh seeds is not taken though the study proves it: the next one is, which shows it on
    seeds of its own; the card and stderr name the first."""
    import quantkit.pick

    facts, rows = read_study(study)
    real = quantkit.pick.confirm_policy
    seen: list[range] = []

    def unlucky(design: Any, model: Any, margin: float, n: int, first: int, progress: Any) -> dict[str, Any]:
        found = real(design, model, margin, n, first, progress)
        seen.append(range(first, first + n))
        if len(seen) == 1:
            bad = [mine - 2000 for mine in found["score"]["returns"]]
            found["verdict"] = non_inferior(found["reference"]["returns"], bad, margin).to_json()
        return found

    monkeypatch.setattr(quantkit.pick, "confirm_policy", unlucky)
    out = tmp_path / "p"
    result = call("pick", study, "-o", out, "--max-loss", "100%", "--confirm", "3")
    assert result.exit_code == 0, result.output
    record = json.loads((out / "pick.json").read_text())
    first, second = wanted(facts, rows, "luts", max_loss="100%")[0][:2]
    assert record["row"] == second and [one["id"] for one in record["chosen"]["passed_over"]] == [first["id"]]
    assert not set(seen[0]) & set(seen[1]) and all(set(one) <= set(CONFIRM) for one in seen)
    again = [document("evaluate", path, "-n", "3", "--seed", seen[1].start)["returns"] for path in (AGENT, out)]
    assert -non_inferior(*again, 0.0).low == loss_bound(record["fresh"]) <= record["chosen"]["limit"]
    assert f"passed over: {first['id']}" in result.stderr and first["id"] in (out / "README.md").read_text()


def test_what_nothing_confirms_is_not_taken(study: Path, tmp_path: Path) -> None:
    """One fresh episode bounds no loss: nothing is written, and the line says what would narrow it."""
    line = error("pick", study, "-o", tmp_path / "p", "--max-loss", "100%", "--confirm", "1", "--tries", "2")
    assert "2 cheapest designs" in line and "--confirm 0" in line and not (tmp_path / "p").exists()


# --- what is refused, and what is said --------------------------------------------------------------


def test_a_row_that_is_not_reproduced_is_said(study: Path, tmp_path: Path) -> None:
    """Other fidelity, price or returns in the row than here: listed on the card, on stderr and in pick.json."""

    def edit(row: dict[str, Any]) -> None:
        row["fidelity"]["action_error"] += 1e-9
        row["cost"]["luts"] += 1
        row["score"]["mean"] += 1e-9

    folder = copied(study, tmp_path / "s", edit)
    result = call("pick", folder, "-o", tmp_path / "p", "--knee", *QUICK)
    record = json.loads((tmp_path / "p/pick.json").read_text())
    assert [line.partition(":")[0] for line in record["differences"]] == [
        "fidelity.action_error", "cost.luts", "score.mean",
    ]  # fmt: skip
    card = (tmp_path / "p/README.md").read_text()
    assert result.stderr.count("not as in the study") == 3 and "**not** what the study's row says" in card


def test_bad_input_is_one_line(study: Path, tmp_path: Path) -> None:
    """Contradicting or unknown wishes, and studies that do not hold what is needed."""
    out = ("-o", tmp_path / "p")
    assert "one of --max-loss, --knee and --id" in error("pick", study, *out)
    assert "one of --max-loss, --knee and --id" in error("pick", study, *out, "--knee", "--max-loss", "2%")
    assert "names 0 designs" in error("pick", study, *out, "--id", "zzz")
    assert "names 8 designs" in error("pick", study, *out, "--id", "")
    assert "'mean' is no cost; costs: luts" in error("pick", study, *out, "--knee", "--x", "mean")
    assert "not both" in error("pick", study, *out, "--knee", "--latency-us", "3", "--luts", "500")
    assert "did you mean" in error("pick", study, *out, "--knee", "--device", "xc7z02")
    for text in ("2%%", "-1", "nan", "two", "%"):
        assert f"--max-loss {text!r}" in error("pick", study, *out, "--max-loss", text)
    other = AGENTS / "ppo/LunarLander-v3.zip"
    assert "is another checkpoint" in error("pick", study, *out, "--knee", "--checkpoint", other)
    (tmp_path / "q").mkdir()
    (tmp_path / "q/mine").write_text("mine")
    assert "exists already" in error("pick", study, "-o", tmp_path / "q", "--knee")
    assert "--force replaces only" in error("pick", study, "-o", tmp_path / "q", "--knee", "--force")
    assert not (tmp_path / "p").exists() and (tmp_path / "q/mine").exists()


def test_damaged_studies_are_refused(study: Path, tmp_path: Path) -> None:
    """A recipe of another id, calibration states that are gone, a checkpoint that has moved without being named."""

    def edit(row: dict[str, Any]) -> None:
        row["recipe"]["seed"] += 1

    folder = copied(study, tmp_path / "a", edit)
    assert "rows are damaged" in error("pick", folder, "-o", tmp_path / "p", "--knee")
    folder = copied(study, tmp_path / "b")
    (folder / "calibration.npy").unlink()
    assert "calibration.npy: missing or damaged" in error("pick", folder, "-o", tmp_path / "p", "--knee")
    folder = copied(study, tmp_path / "c")
    facts = json.loads((folder / "study.json").read_text())
    facts["origin"]["path"] = str(tmp_path / "gone.zip")
    (folder / "study.json").write_text(json.dumps(facts))
    assert "is not where it was; give --checkpoint" in error("pick", folder, "-o", tmp_path / "p", "--knee")
    assert call("pick", folder, "-o", tmp_path / "p", "--knee", "--checkpoint", AGENT, *QUICK).exit_code == 0
    assert call("pick", folder, "-o", tmp_path / "p", "--knee", "--checkpoint", AGENT, *QUICK, "--force").exit_code == 0


def test_a_loss_is_a_share_or_a_return() -> None:
    """Percent are of the distance to the random policy; other numbers are returns."""
    assert parse_loss("2%", 300.0) == 6.0 and parse_loss(" 0 ", 300.0) == 0.0 and parse_loss("1e2", 3.0) == 100.0
    with pytest.raises(InputError, match="neither a share such as 2% nor a return"):
        parse_loss("inf", 1.0)
