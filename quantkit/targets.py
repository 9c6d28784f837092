"""What hardware a study is priced for: parts, and what folds the hardware on each. A design plays once for all of them.

A row's `cost` is that of the study's first target, `costs` has those of the others by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hwmodel
from hwmodel.cost import HwError
from hwmodel.devices import Device, find_device
from hwmodel.estimate import Estimate, estimate
from hwmodel.estimate import Mapping as Mapping_
from hwmodel.spec import LayerSpec
from quantkit.errors import InputError
from quantkit.results import Row


@dataclass(frozen=True)
class Target:
    """The part and what folds the hardware on it: one of latency_us and luts, or neither (the default latency)."""

    device: Device
    latency_us: float | None = None
    luts: int | None = None
    mapping: Mapping_ = "lut"

    def __str__(self) -> str:
        name = self.device.name + {"lut": "", "dsp": " with DSPs", "auto": " with DSPs if needed"}[self.mapping]
        if self.latency_us is not None:
            return f"{name} within {self.latency_us:g} µs"
        return name if self.luts is None else f"{name} within {self.luts:,} LUTs"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        folding = {"latency_us": self.latency_us, "luts": self.luts, "mapping": self.mapping}
        return {"device": self.device.name, **folding}

    def price(self, specs: Sequence[LayerSpec], *, interval: bool = True, **limits: Any) -> Estimate:
        """What layers take there; limits: in place of the target's own; interval: as `hwmodel.estimate.estimate`.

        `HwError` where they cannot be built.
        """
        limits = limits or {"latency_us": self.latency_us, "luts": self.luts}
        return estimate(specs, self.device, mapping=self.mapping, interval=interval, **limits)

    def cost(self, specs: Sequence[LayerSpec]) -> dict[str, Any]:
        """`price` as JSON values with the model's version; {"error": reason} for what cannot be built."""
        try:
            return self.price(specs).to_json() | {"model": hwmodel.__version__}
        except HwError as error:
            return {"error": str(error)}


def parse_targets(
    devices: Sequence[str], latencies: Sequence[float], luts: Sequence[int], mapping: Mapping_ = "lut"
) -> tuple[Target, ...]:
    """Every part with every latency or budget of LUTs; () for no part. `HwError` for an unknown part.

    >>> [str(target) for target in parse_targets(("xc7a35t", "xc7z020"), (5.0, 20.0), ())][1:3]
    ['xc7a35t within 20 µs', 'xc7z020 within 5 µs']
    """
    if latencies and luts:
        raise InputError("give --latency-us or --luts, not both")
    folds: list[tuple[float | None, int | None]] = [(us, None) for us in latencies] + [(None, n) for n in luts]
    pairs = itertools.product(map(find_device, devices), folds or [(None, None)])
    return tuple(dict.fromkeys(Target(device, us, n, mapping) for device, (us, n) in pairs))


def targets_of(settings: Mapping[str, Any]) -> tuple[Target, ...]:
    """The targets of a study's settings as `study.json` has them, the first one first; () without a device."""
    if not settings.get("device"):
        return ()
    return tuple(
        Target(find_device(one["device"]), one.get("latency_us"), one.get("luts"), one.get("mapping", "lut"))
        for one in (settings, *settings.get("also", ()))
    )


def points(row: Mapping[str, Any]) -> list[Row]:
    """The row once for each target, `cost` being that target's. Its return is the same on all of them."""
    own = {key: found for key, found in row.items() if key != "costs"}
    return [own, *({**own, "cost": cost} for cost in (row.get("costs") or {}).values())]


def seen_from(
    document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], place: int
) -> tuple[dict[str, Any], list[Row]]:
    """study.json and rows as of a study that has only the target of that number."""
    settings = document["settings"]
    one = settings if place == 0 else settings["also"][place - 1]
    kept = {key: one.get(key) for key in ("device", "latency_us", "luts")} | {"mapping": one.get("mapping", "lut")}
    return {**document, "settings": {**settings, **kept, "also": []}}, [points(row)[place] for row in rows]


def find_target(settings: Mapping[str, Any], text: str) -> int:
    """The number of the target whose name has the text in it; InputError if that is none or several."""
    names = [str(target) for target in targets_of(settings)]
    found = [i for i, name in enumerate(names) if name == text] or [i for i, name in enumerate(names) if text in name]
    if len(found) != 1:
        raise InputError(f"--target {text!r} names {len(found)} targets of the study; there are: {', '.join(names)}")
    return found[0]
