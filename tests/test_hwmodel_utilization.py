"""Coefficients are fitted to what a user's own tool counts."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hwmodel import mac
from hwmodel.cli import app
from hwmodel.coeffs import use_coefficients
from hwmodel.cost import HwError
from hwmodel.formats import parse
from hwmodel.mac import mac_cost
from hwmodel.utilization import RowsError, fit_utilization, read_utilization

HEAD = "weight,act,lanes,acc_bits,luts,ffs\n"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_malformed_rows_are_named_each(tmp_path: Path) -> None:
    """Every wrong row has its line and what is accepted; a missing column or file is one line."""
    text = (
        HEAD + "int4,int4,8,16,300,200\nint9,int4,8,16,300,200\nint4,int4,0,16,300,200\nint4,int4,8,16,many,2\nint4\n"
    )
    with pytest.raises(RowsError) as caught:
        read_utilization(written(tmp_path / "a.csv", text))
    assert [line.split(", ")[1].split(":")[0] for line in caught.value.lines] == [
        "line 3",
        "line 4",
        "line 5",
        "line 6",
    ]
    assert "unknown format" in caught.value.lines[0] and "numbers from 1 up" in caught.value.lines[1]
    result = CliRunner().invoke(app, ["fit", "--csv", str(tmp_path / "a.csv"), "--out", str(tmp_path / "o.toml")])
    assert result.exit_code == 2 and result.stderr.count("error: ") == 4 and not (tmp_path / "o.toml").exists()
    for text, message in (("weight,act\n", "no column 'lanes'"), ("", "empty"), (HEAD, "at least 3")):
        with pytest.raises(HwError, match=message):
            read_utilization(written(tmp_path / "b.csv", text))
    with pytest.raises(HwError, match="cannot be read"):
        read_utilization(tmp_path / "none.csv")


def test_a_fit_recovers_the_tool_it_came_from(tmp_path: Path) -> None:
    """Counts from a tool whose products are 1.5 of ours give coefficients that price them, passed with --coeffs."""
    lines = []
    for text, lanes in (("int4", 8), ("int5", 4), ("e2m1", 8), ("int8", 2), ("int3", 16), ("e3m2", 4)):
        fmt = parse(text)
        whole = mac_cost(fmt, fmt, 24, lanes)
        luts = whole.luts + 0.5 * lanes * mac.product_cost(fmt, fmt).luts
        lines.append(f"{text},{text},{lanes},24,{luts},{whole.ffs}\n")
    path = written(tmp_path / "mine.csv", HEAD + "".join(lines))
    out = tmp_path / "mine.toml"
    ours = mac_cost(parse("int6"), parse("int6"), 24, 4).luts
    try:
        found = fit_utilization(read_utilization(path), out, tool="Vivado 2024.1", command="hwmodel fit")
        assert found["p90"] < 0.02
        theirs = mac_cost(parse("int6"), parse("int6"), 24, 4).luts
        assert theirs > 1.2 * ours
        stamp = tomllib.loads(out.read_text())["fit"]
        assert stamp["tool"] == "Vivado 2024.1" and stamp["date"] and stamp["command"]
        use_coefficients(None)
        command = ["cost", "--weights", "int6", "--acts", "int6", "--lanes", "4", "--acc-bits", "24", "--json"]
        result = CliRunner().invoke(app, [*command, "--coeffs", str(out)])
        assert json.loads(result.stdout)["luts"] == pytest.approx(theirs, abs=0.1)
    finally:
        use_coefficients(None)
    assert mac_cost(parse("int6"), parse("int6"), 24, 4).luts == ours
