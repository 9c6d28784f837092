"""What the logic of an FPGA family makes of adders, multiplexers and small memories, and which family is priced.

Two kinds of logic: LUTs of six inputs with a carry per LUT and shift registers and memories inside (7-series; without
DSPs UltraScale+ and Versal come out alike), and ECP5's LUTs of four inputs, whose carry cells are pairs of LUTs and
whose chains are led in and out by four more. Counts of ECP5 are nextpnr's: TRELLIS_COMB.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from hwmodel.netlist import MAPPER

Family = Literal["xc7", "ecp5"]

FAMILIES: dict[str, Family] = {"xc7": "xc7", "xcup": "xc7", "versal": "xc7", "ecp5": "ecp5"}
"""Coefficients by family of devices."""
CHAIN = 4
"""LUTs by which nextpnr-ecp5 leads a carry chain into its slices and out of them, whatever its length."""

RAM_CELLS = 6
"""LUTs that nextpnr-ecp5 counts for a TRELLIS_DPR16X4: four that hold bits, two behind its write port."""
CHAIN_END = (0.273, 0.257)
"""Nanoseconds out of a carry chain at its second and at its first bit, as the mapper counts (ccu2c_sim.vh)."""
CARRIED = 5
"""Bits from which synth_ecp5 gives a sum a carry chain; shorter ones are plain LUTs."""
CONSTANTS = 2
"""LUTs in which nextpnr-ecp5 makes a design's zero and its one."""

_active: list[Family] = ["xc7"]


def family() -> Family:
    """The family that is priced: xc7 but inside `pricing`."""
    return _active[0]


@contextmanager
def pricing(device_family: str) -> Iterator[None]:
    """Price for a family of devices: by its coefficients and its logic."""
    before = _active[0]
    _active[0] = FAMILIES[device_family]
    try:
        yield
    finally:
        _active[0] = before


F = TypeVar("F", bound=Callable[..., Any])


def kept(f: F) -> F:
    """`functools.cache`, for each family apart."""
    memory = {name: functools.cache(f) for name in dict.fromkeys(FAMILIES.values())}

    @functools.wraps(f)
    def call(*args: Any, **options: Any) -> Any:
        return memory[_active[0]](*args, **options)

    def clear() -> None:
        for one in memory.values():
            one.cache_clear()

    call.cache_clear = clear  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def adder(width: int, operand: int, owed: bool) -> int:
    """LUTs of a sum of `width` bits of two operands of `operand` bits, with a carry-in where one is owed.

    >>> adder(9, 8, False), adder(9, 8, True)
    (8, 9)
    """
    if family() == "ecp5":
        return width if width + owed < CARRIED else 2 * math.ceil((width + owed) / 2) + CHAIN
    return operand + owed


def counter(top: int) -> int:
    """LUTs of a register that counts 0 .. top - 1 and around on a condition."""
    width, wraps = max(1, (top - 1).bit_length()), top & (top - 1) != 0
    if family() == "ecp5":
        return (width + 1 if width < CARRIED else adder(width, width, False)) + 3 * wraps
    return 1 + (top == 4) + wraps


def chains(*counts: int) -> int:
    """How many counters of 0 .. count - 1 have a carry chain of their own."""
    return sum((count - 1).bit_length() >= CARRIED for count in counts)


def rom_depth(depth: int) -> int:
    """LUTs of one column of a constant memory; the multiplexers beside LUTs join 4 (xc7), 8 and more (ECP5) of them.

    >>> rom_depth(64), rom_depth(128)
    (1, 2)
    """
    if family() == "ecp5":
        return 1 << max(0, (depth - 1).bit_length() - 4)
    blocks = math.ceil(depth / 64)
    return blocks + math.ceil((math.ceil(blocks / 4) - 1) / 3)


def ram_luts(width: int, depth: int) -> int:
    """LUTs of a memory written and read in the same cycle: RAM32M and RAM64M; TRELLIS_DPR16X4.

    Several of these in depth have multiplexers and a LUT each that enables writing.
    """
    if family() == "ecp5":
        blocks = math.ceil(depth / 16)
        chosen = 0 if blocks == 1 else 2 ** (blocks - 1).bit_length() * width // 2 + blocks
        return RAM_CELLS * math.ceil(width / 4) * blocks + chosen
    return 4 * math.ceil(width / 6) if depth <= 32 else 4 * math.ceil(width / 3) * math.ceil(depth / 64)


DEEPEST = 128
"""Words of the deepest memory that goes to LUTs."""


def slack_ns(width: int) -> float:
    """Time that the mapper sees in a sum of `width` bits, which everything beside it may take as well: ECP5, in ns.

    0 where mapping is for area.
    """
    if family() != "ecp5":
        return 0.0
    return MAPPER.wire + MAPPER.enter + MAPPER.pair * (math.ceil(width / 2) - 1) + CHAIN_END[width % 2]


def constants() -> int:
    """LUTs that a whole design takes for its zeros and ones."""
    return CONSTANTS if family() == "ecp5" else 0


def shift_registers() -> bool:
    """Whether registers in a row become shift registers in LUTs."""
    return family() == "xc7"
