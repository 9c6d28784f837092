"""Memory shapes and device facts."""

from __future__ import annotations

from fractions import Fraction

import pytest

from hwmodel.devices import DeviceError, devices, find_device
from hwmodel.fabric import pricing, rom_depth
from hwmodel.memory import bram18, ram, rom, rom_columns


@pytest.mark.parametrize(
    ("width", "depth", "blocks"),
    [(1, 16384, 1), (1, 16385, 2), (2, 8192, 1), (2, 8193, 2), (4, 4096, 1), (3, 4097, 2), (9, 2048, 1), (5, 2049, 2),
     (18, 1024, 1), (10, 1025, 2), (36, 512, 1), (37, 512, 2), (36, 513, 2), (72, 1024, 4), (256, 64, 8), (0, 5, 0)],
)  # fmt: skip
def test_bram_shapes(width: int, depth: int, blocks: int) -> None:
    """Every shape of an 18 Kb block, and one bit or word more than it holds."""
    assert bram18(width, depth) == blocks


def test_memories_by_depth() -> None:
    """One word is wiring or registers, up to 128 words LUTs, more a block RAM; an order for a kind is obeyed."""
    assert [rom(8, d).kind for d in (1, 2, 128, 129)] == ["logic", "lutram", "lutram", "bram"]
    assert [ram(8, d).kind for d in (1, 2, 128, 129)] == ["registers", "lutram", "lutram", "bram"]
    assert rom(8, 64).cost.luts == 8 and rom(8, 65).cost.luts == 16 and rom(8, 4096, "lutram").cost.luts > 512
    assert ram(6, 32).cost.luts == 4 and ram(6, 33).cost.luts == 8
    assert rom(36, 16, "bram").cost.bram18 == 1 and rom(0, 16).kind == "none"


@pytest.mark.parametrize(
    ("name", "part"),
    [("xc7a35t", "xc7a35t"), ("XC7A35TCSG324-1", "xc7a35t"), ("xc7z020clg400-1", "xc7z020"),
     (" xck26-sfvc784-2lv-c ", "xck26"),
     ("xczu3eg-sbva484-1-e", "xczu3eg"), ("xcvc1902-vsva2197-2MP-e-S", "xcvc1902")],
)  # fmt: skip
def test_parts_are_found_by_full_name(name: str, part: str) -> None:
    """A full part number with package and speed grade finds its device."""
    assert find_device(name).name == part


def test_unknown_parts_suggest_near_ones() -> None:
    """An unknown part is refused with the nearest names."""
    with pytest.raises(DeviceError, match="xc7a35t"):
        find_device("xc7a30t")
    with pytest.raises(DeviceError, match="hwmodel devices"):
        find_device("")


def test_devices_are_complete() -> None:
    """Every device has positive resources and a source; AMD's have two flip-flops per LUT, Lattice's one."""
    needed = {
        "xc7a35t",
        "xc7a100t",
        "xc7z020",
        "xczu3eg",
        "xczu7ev",
        "xck26",
        "xcvc1902",
        "xc7a50t",
        "xc7a200t",
        "xc7z010",
        "xc7z007s",
        "xczu9eg",
        "lfe5u-25f",
        "lfe5u-85f",
    }
    assert needed <= set(devices())
    for part in devices().values():
        lattice = part.family == "ecp5"
        assert part.ffs == (1 if lattice else 2) * part.luts and part.bram18 % 2 == 0 and part.dsps > 0
        assert part.source.startswith("Lattice FPGA-DS" if lattice else "AMD DS")


@pytest.mark.parametrize("family", ["xc7", "ecp5"])
@pytest.mark.parametrize("depth", [2, 3, 8, 16, 17, 20, 40, 100])
def test_equal_columns_are_kept_once(family: str, depth: int) -> None:
    """Registers are the functions of the address that occur among random columns, the two constants aside, and those
    that are a bit of the address take no LUT: by exact fractions, whatever the depth."""
    with pricing(family):
        for columns in (1, 7, 64, 300):
            functions, found = Fraction(2) ** depth, rom_columns(columns, depth)
            seen = 1 - (1 - 1 / functions) ** columns
            assert found.ffs == pytest.approx(float((functions - 2) * seen), rel=1e-9)
            luts = (functions - 2 - (depth - 1).bit_length()) * seen * rom_depth(depth)
            assert found.luts == pytest.approx(float(luts), rel=1e-9, abs=1e-9)
