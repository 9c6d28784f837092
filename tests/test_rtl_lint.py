"""Every template of hwmodel/rtl is clean Verilog by the strictest lint there is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

RTL = Path(__file__).parents[1] / "hwmodel" / "rtl"


@pytest.mark.sim
@pytest.mark.skipif(not shutil.which("verilator"), reason="verilator is not installed (apt-get install verilator)")
@pytest.mark.parametrize("language", ["1364-2005", "1800-2017"])
def test_templates_are_lint_clean(language: str) -> None:
    """-Wall is quiet about each module alone, read as Verilog and as SystemVerilog."""
    for path in sorted(RTL.glob("*.v")):
        command = ["verilator", "--lint-only", "-Wall", "--default-language", language, "-y", str(RTL), str(path)]
        done = subprocess.run([*command, "--top-module", path.stem], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "Warning" not in done.stderr, f"{path.name}: {done.stderr[-1500:]}"


@pytest.mark.sim
@pytest.mark.skipif(not shutil.which("verilator"), reason="verilator is not installed (apt-get install verilator)")
def test_sabotage_a_lost_bit_is_seen(tmp_path: Path) -> None:
    """A register one bit too narrow does not pass."""
    text = (RTL / "search.v").read_text().replace("output reg signed [BITS-1:0] value_out", "output reg value_out")
    (tmp_path / "search.v").write_text(text)
    done = subprocess.run(
        ["verilator", "--lint-only", "-Wall", "search.v"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "WIDTH" in done.stderr
