"""A sweep of a language model: rows are those of the two commands, bits are counted, nothing is measured twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import call, document, error
from test_language import checkpoint

from quantkit.language_sweep import best_of
from quantkit.results import read_rows

SPACE = ("--weights", "int2,int4", "--acts", "float", "--step", "rtn", "--step", "gptq")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """Folder, model directory and what the sweep says."""
    folder = tmp_path_factory.mktemp("language")
    model = checkpoint(folder)
    text = folder / "t.txt"
    options = ("--text", text, "--calibration", text, "--window", "16", *SPACE)
    return folder, model, document("sweep", model, "-o", folder / "s", *options)


def test_rows_are_those_of_quantize_and_evaluate(swept: tuple[Path, Path, dict[str, Any]]) -> None:
    """Perplexity and its error are what `quantize` and `evaluate` give for the same options."""
    folder, model, told = swept
    assert [(r["weights"].split()[0], r["steps"]) for r in told["rows"]] == [
        ("int2", "rtn"), ("int2", "gptq"), ("int4", "rtn"), ("int4", "gptq"),
    ]  # fmt: skip
    row, text = told["rows"][1], folder / "t.txt"
    made = ("--weights", "int2", "--acts", "float", "--step", "gptq", "--calibration", text, "--window", "16")
    assert call("quantize", model, "-o", folder / "q", *made).exit_code == 0
    found = document("evaluate", folder / "q", "--text", text)
    assert (row["score"]["mean"], row["score"]["n"]) == (pytest.approx(found["mean"], rel=1e-6), found["n"])
    plain = document("evaluate", model, "--text", text)
    assert row["ratio"] == pytest.approx(found["mean"] / plain["mean"], rel=1e-5)
    assert told["reference"] == pytest.approx(plain["mean"], rel=1e-6)


def test_bits_are_counted_by_hand(swept: tuple[Path, Path, dict[str, Any]]) -> None:
    """Codes and one 32-bit scale for each row, per quantized weight; all else is stored in 32 bits."""
    from quantkit.loading import load_checkpoint

    folder, model, told = swept
    del folder
    layers = {n: p for n, p in load_checkpoint(model).module.named_parameters() if p.dim() == 2}
    inside = {n: p for n, p in layers.items() if "embed" not in n and "lm_head" not in n}
    weights, rows = sum(p.numel() for p in inside.values()), sum(len(p) for p in inside.values())
    every = {p.data_ptr(): p.numel() for p in load_checkpoint(model).module.parameters()}
    for row, bits in zip(told["rows"], (2, 2, 4, 4), strict=True):
        assert row["bits_per_weight"] == pytest.approx(bits + 32 * rows / weights)
        stored = bits * weights + 32 * rows + 32 * (sum(every.values()) - weights)
        assert row["weight_kib"] == pytest.approx(stored / 8192)


def test_the_table_marks_the_front(swept: tuple[Path, Path, dict[str, Any]]) -> None:
    """perplexity.csv has each design once by ascending bits; on its front nothing has fewer bits and is better."""
    folder, _, told = swept
    table = list(csv.DictReader((folder / "s/perplexity.csv").read_text().splitlines()))
    rows = {row["id"]: row for row in told["rows"]}
    assert [float(line["bits_per_weight"]) for line in table] == sorted(r["bits_per_weight"] for r in rows.values())
    for line in table:
        mine = rows[line["id"]]
        beaten = any(
            r["bits_per_weight"] <= mine["bits_per_weight"] and r["score"]["mean"] < mine["score"]["mean"]
            for r in rows.values()
        )
        assert (line["front"] == "True") == (not beaten)
    assert best_of([{"error": "x"}]) == []


def test_nothing_is_measured_twice_and_other_texts_are_refused(swept: tuple[Path, Path, dict[str, Any]]) -> None:
    """The same sweep again adds no row; another text is another study, named; report and pick name the table."""
    folder, model, told = swept
    before = (folder / "s/rows.jsonl").read_bytes()
    text = folder / "t.txt"
    options = ("--calibration", text, "--window", "16", *SPACE)
    again = document("sweep", model, "-o", folder / "s", "--text", text, *options)
    assert again["rows"] == told["rows"] and (folder / "s/rows.jsonl").read_bytes() == before
    assert len(read_rows(folder / "s/rows.jsonl")) == 4
    other = folder / "other.txt"
    other.write_text(text.read_text() + " w3 w4")
    line = error("sweep", model, "-o", folder / "s", "--text", other, *options)
    assert "text: " in line and "another output directory" in line
    assert "perplexity.csv" in error("report", folder / "s")
    assert "perplexity.csv" in error("pick", folder / "s", "-o", folder / "p", "--knee")
    assert json.loads((folder / "s/study.json").read_text())["settings"]["kind"] == "language"


def test_misfits_are_one_line(swept: tuple[Path, Path, dict[str, Any]]) -> None:
    """A sweep of a language model without its texts, and a text for what is none, are named; nothing is begun."""
    folder, model, _ = swept
    text, out = folder / "t.txt", folder / "never"
    assert "--text" in error("sweep", model, "-o", out, *SPACE)
    assert "--calibration FILE.txt" in error("sweep", model, "-o", out, "--text", text, *SPACE)
    agent = Path(__file__).parents[1] / "benchmarks/agents/sac/Pendulum-v1.zip"
    assert "Hugging Face" in error("sweep", agent, "-o", out, "--text", text, *SPACE)
    assert not out.exists()
