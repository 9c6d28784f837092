"""The Markdown of a study: whatever the rows hold, its table says their numbers and its pictures are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.image import imread
from test_cli import call, error
from test_figures import CASES, study
from test_page import HOSTILE, hostile, real

from quantkit.card import number
from quantkit.markdown import write_markdown
from quantkit.pareto import front, value
from quantkit.report import read_study

__all__ = ["real"]  # the fixture


def lines(text: str) -> list[list[str]]:
    """The cells of the first table's lines behind "## Front"."""
    table = text[text.index("## Front") :].split("\n\n")[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("case", CASES)
def test_the_table_says_the_rows_numbers(case: str, tmp_path: Path) -> None:
    """Any rows give a README whose front has their numbers and whose pictures exist, and a table of all designs."""
    folder, out = study(tmp_path / "s", CASES[case]), tmp_path / "md"
    write_markdown(folder, out)
    text, rows = (out / "README.md").read_text(), read_study(folder)[1]
    x = "luts" if any(value(row, "luts") is not None for row in rows) else "weight_kib"
    told, expected = lines(text), [rows[i] for i in front(rows, x, "mean")]
    if len(expected) <= 12:
        assert len(told) == len(expected)
    for cells in told:
        assert any(
            cells[4].split(" ± ")[0] == number(row["score"]["mean"]) and cells[7] == number(value(row, x), 4)
            for row in expected
        ), cells
    for file in re.findall(r"\]\((.*?)\)", text):
        assert (out / file).is_file(), file
        assert file.endswith(".csv") or imread(out / file).std() > 0
    assert len(pd.read_csv(out / "designs.csv")) == len(rows)
    assert {p.name for p in out.iterdir()} == {"README.md", *re.findall(r"\]\((.*?)\)", text)}


def test_a_real_study_has_every_picture(real: Path, tmp_path: Path) -> None:
    """Front, returns, hardware, sensitivity, robustness, command and checkpoint."""
    result = call("report", real, "--markdown", tmp_path / "md")
    assert result.exit_code == 0
    names = {path.name for path in (tmp_path / "md").iterdir()}
    assert names >= {"README.md", "designs.csv", "front_luts.png", "returns.png", "hardware.png"}
    assert "sensitivity_action_error.png" in names and not any(name.endswith(".svg") for name in names)
    text, settings = (tmp_path / "md/README.md").read_text(), json.loads((real / "study.json").read_text())
    assert "| noise=0.1 |" in text and "quantkit " in text and settings["settings"]["checkpoint_sha256"] in text
    assert "exists already" in error("report", real, "--markdown", tmp_path / "md")
    assert call("report", real, "--markdown", tmp_path / "md", "--force").exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x").write_text("")
    assert "--force replaces only" in error("report", real, "--markdown", tmp_path / "mine", "--force")
    assert "not both" in error("report", real, "--markdown", tmp_path / "md2", "-o", tmp_path / "p.html")


def test_a_hostile_study_is_drawn(tmp_path: Path) -> None:
    """Texts with markup, dollars and quotes do not stop the pictures."""
    folder = hostile(tmp_path / "s")
    write_markdown(folder, tmp_path / "md")
    assert HOSTILE in (tmp_path / "md/README.md").read_text()
