"""FPGA parts and what they hold, found by name."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from hwmodel.cost import HwError


@dataclass(frozen=True, slots=True)
class Device:
    """A part: its resources, with the document they come from.

    luts: of six inputs, of ECP5 of four. bram18 counts 18 Kb halves of block RAMs, or ECP5's blocks of 18 Kb.
    """

    name: str
    family: Literal["xc7", "xcup", "versal", "ecp5"]
    luts: int
    ffs: int
    dsps: int
    bram18: int
    uram: int
    source: str


def part_option(device: Device) -> str:
    """The option by which nextpnr-ecp5 knows a part.

    >>> part_option(find_device("LFE5U-45F"))
    '--45k'
    """
    return f"--{device.name.split('-')[1].strip('f')}k"


class DeviceError(HwError):
    """A name that is no known part."""


@cache
def devices() -> dict[str, Device]:
    """Every known part by name."""
    table = tomllib.loads(resources.files("hwmodel").joinpath("devices.toml").read_text())
    return {name: Device(name=name, **facts) for name, facts in table.items()}


def find_device(name: str) -> Device:
    """The part that `name` is or begins with, in any case; raises `DeviceError` naming the nearest parts.

    >>> find_device("xc7a35tcsg324-1").luts, find_device("XCK26-SFVC784-2LV-C").name
    (20800, 'xck26')
    """
    known = devices()
    text = name.strip().lower()
    matches = [part for part in known if text.startswith(part)]
    if matches:
        return known[max(matches, key=len)]
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.3) or sorted(known)[:3]
    raise DeviceError(f"unknown device {name!r}; did you mean {', '.join(near)}? `hwmodel devices` lists all")
