"""The slowest path of an ECP5 netlist by Yosys, before placement: in the delays of its mapper, or of nextpnr.

The mapper (abc9) makes logic fast only where it lies on the module's slowest path, and small elsewhere, so what a
piece costs depends on what stands beside it. Both delays are sums along a path: wires that nobody has placed yet,
LUTs, the multiplexers that join LUTs, carry chains.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Delays:
    """Nanoseconds. wire: to an input that is not reached inside a slice, whatever its length and fan-out.

    lut: LUT4. join: PFUMX and L6MUX21 behind it. select: their select inputs. enter, pair, leave: into a carry
    chain, past each CCU2C, out of it. ff, ram: from the clock to an output.
    """

    wire: float
    lut: float
    join: float
    select: float
    enter: float
    pair: float
    leave: float
    ff: float
    ram: float


MAPPER = Delays(0.3, 0.379, 0.12, 0.15, 0.516, 0.043, 0.27, 0.0, 0.0)
"""Of abc9 as `synth_ecp5` calls it (`abc9 -W 300`, Yosys' lattice/common_sim.vh and ccu2c_sim.vh)."""
PLACED = Delays(1.15, 0.24, 0.2, 0.17, 0.45, 0.07, 0.44, 0.52, 5.61)
"""Of nextpnr's speed grade 6; the wire is the mean hop of critical paths that it reports."""


Start = Literal["ports", "registers"]
STARTS: tuple[Start, Start] = ("ports", "registers")


def slowest(module: Mapping[str, Any], delays: Delays, *, start: Start) -> float:
    """Nanoseconds of the slowest path of a flat module without DSPs (Yosys JSON); 0 for none.

    Paths end at registers, memories and ports, but for registers named `slack...`. start: at its input ports, as if
    registers stood before them, or at registers and memories inside.
    """
    return max(0.0, _Paths(module, delays, start == "ports").slowest())


class _Paths:
    """Arrival times of the wires of a module, each found once; minus infinity where no path starts."""

    def __init__(self, module: Mapping[str, Any], delays: Delays, from_ports: bool) -> None:
        self.cells: Mapping[str, Any] = module["cells"]
        self.ports: Mapping[str, Any] = module["ports"]
        self.delays = delays
        self.from_ports = from_ports
        self.driver: dict[int, tuple[Any, str]] = {}
        self.known: dict[int, float] = {}
        for cell in self.cells.values():
            for port, wires in cell["connections"].items():
                if cell["port_directions"][port] == "output":
                    self.driver.update((wire, (cell, port)) for wire in wires)

    def slowest(self) -> float:
        depth, worst = sys.getrecursionlimit(), -math.inf
        sys.setrecursionlimit(max(depth, 100_000))
        try:
            for name, cell in self.cells.items():
                if cell["type"] in ENDS and not name.startswith("slack"):
                    for port, wires in cell["connections"].items():
                        if cell["port_directions"][port] == "input" and port not in ("RAD", "CLK", "WCK"):
                            worst = max([worst, *(self._sunk(wire, port) for wire in wires)])
            for name, port in self.ports.items():
                if port["direction"] == "output" and not name.startswith("slack"):
                    worst = max([worst, *(self._sunk(wire, "DI") for wire in port["bits"])])
        finally:
            sys.setrecursionlimit(depth)
        return worst

    def _sunk(self, wire: int | str, port: str) -> float:
        """Arrival at a register: at its data from logic in the same slice, else over a wire."""
        start = self._at(wire)
        source = self.driver.get(wire) if isinstance(wire, int) else None
        inside = port == "DI" and source is not None and source[0]["type"] not in ENDS
        return start if inside else start + self.delays.wire

    def _at(self, wire: int | str) -> float:
        """Arrival at the output that drives the wire."""
        if isinstance(wire, str):
            return -math.inf
        if wire not in self.known:
            self.known[wire] = -math.inf  # a loop ends here
            self.known[wire] = self._driven(wire)
        return self.known[wire]

    def _driven(self, wire: int) -> float:
        d = self.delays
        if wire not in self.driver:
            return d.ff if self.from_ports else -math.inf
        cell, port = self.driver[wire]
        ends = cell["connections"]

        def after(delay: float, *ports: str, routed: bool = True) -> float:
            """Latest of the inputs, over a wire where they are routed."""
            wires = [wire for name in ports for wire in ends.get(name, ())]
            return max((self._at(w) + (d.wire if routed else 0.0) + delay for w in wires), default=-math.inf)

        match cell["type"]:
            case "LUT4":
                return after(d.lut, "A", "B", "C", "D")
            case "PFUMX":
                return max(after(d.join, "ALUT", "BLUT", routed=False), after(d.select, "C0"))
            case "L6MUX21":
                return max(after(d.join, "D0", "D1", routed=False), after(d.select, "SD"))
            case "CCU2C":
                low, high = [f"{p}0" for p in "ABCD"], [f"{p}1" for p in "ABCD"]
                if port == "COUT":
                    return max(after(d.enter, *low, *high), after(d.pair, "CIN", routed=False))
                own = after(d.lut, *(low if port == "S0" else high))
                across = after(d.enter + d.leave, *low) if port == "S1" else -math.inf
                return max(own, across, after(d.leave, "CIN", routed=False))
            case "TRELLIS_DPR16X4":
                return after(d.lut, "RAD")
            case _ if self.from_ports:
                return -math.inf
            case "DP16KD" | "PDPW16KD":
                return d.ram
            case _:
                return d.ff


ENDS = ("TRELLIS_FF", "DP16KD", "PDPW16KD", "TRELLIS_DPR16X4")
"""Cells at which paths end."""
