"""A quantized network with convolutions as a directory of Verilog: one design, or one for each piece between branches.

Where the layers follow each other without a branch, or branches meet in sums of integers (step joints), the directory
is one design (`hwmodel.emit_conv`). Otherwise it holds a folder for each design, `network.json` that lists them, and a
README that says what the host computes between.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hwmodel import emit_conv
from hwmodel.cost import HwError
from hwmodel.devices import Device
from hwmodel.folding import Fold
from hwmodel.network import FORMAT_VERSION
from hwmodel.plan import RESOURCES, plan_streams
from quantkit.errors import InputError
from quantkit.model import Model
from quantkit.rtl_conv import Design, designs_of


def write_designs(
    model: Model,
    folder: Path,
    device: Device,
    *,
    latency_us: float | None = None,
    luts: int | None = None,
    clock_mhz: float = 100.0,
    dsp: str = "none",
) -> dict[str, Any]:
    """Write the model's hardware into an existing folder; returns the facts of all designs together, in JSON.

    cycles: the sum over the designs, each from the beat that completes its first window to its last result; interval:
    likewise, of their cycles from map to map. The host's work between them is in neither. The targets are those of
    `hwmodel.plan.plan_streams`.
    """
    designs, after = designs_of(model)
    try:
        plans = plan_streams(
            [design.network.specs for design in designs],
            device,
            latency_us=latency_us,
            luts=luts,
            clock_mhz=clock_mhz,
            dsp=dsp,
        )
    except HwError as error:
        raise InputError(str(error)) from None
    alone = len(designs) == 1
    entries = []
    for design, folds in zip(designs, plans, strict=True):
        inside = folder if alone else folder / design.name
        if not alone:
            inside.mkdir()
        facts = emit_conv.write(design.network, folds, inside, device, clock_mhz=clock_mhz)
        entries.append({"folder": "." if alone else design.name, "before": list(design.before), **facts})
    document = _document(entries, after, device, clock_mhz)
    if not alone:
        index = {"format_version": FORMAT_VERSION, "parts": entries, "after": list(after)}
        (folder / "network.json").write_text(json.dumps(index, indent=1) + "\n")
        (folder / "README.md").write_text(_readme(designs, plans, document))
    return document


def _document(entries: list[dict[str, Any]], after: Sequence[str], device: Device, clock_mhz: float) -> dict[str, Any]:
    total = {key: sum(entry[key] for entry in entries) for key in ("cycles", "interval", *RESOURCES)}
    return {
        "device": device.name,
        "clock_mhz": clock_mhz,
        "latency_us": total["cycles"] / clock_mhz,
        **total,
        "designs": entries,
        "after": list(after),
    }


def outside(document: dict[str, Any]) -> str:
    """What the host computes beside the designs, one line for each place, and how it could be hardware's; empty if
    nothing but the ends."""
    lines = [
        f"before {entry['layers'][0]['name']}: {', '.join(entry['before'])}"
        for entry in document["designs"]
        if entry["before"]
    ]
    lines += [f"behind the last layer: {', '.join(document['after'])}"] if document["after"] else []
    met = {step for entry in document["designs"] for step in entry["before"]}
    if met & {"add", "mean", *(f"{kind}_pool{axes}d" for kind in ("adaptive_avg", "avg") for axes in (1, 2))}:
        lines.append("quantize with --step joints to have sums, means and averages in hardware, too")
    return "\n".join(lines)


def _readme(designs: Sequence[Design], plans: Sequence[Sequence[Fold]], document: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| [{entry['folder']}]({entry['folder']}) | {', '.join(part.name for part in design.parts)} | "
        f"{', '.join(entry['before']) or 'nothing'} | {entry['cycles']} | {entry['luts']} | {entry['bram18']} |"
        for design, entry in zip(designs, document["designs"], strict=True)
    )
    layers = sum(map(len, plans))
    return f"""# A quantized network in Verilog: {layers} layers, {len(designs)} designs

Each folder is a design of its own, with stream, testbench, scripts and README: layers that feed each other without a
branch. In order:

| design | layers | the host computes before | cycles | LUTs | BRAM18 |
|---|---|---|---|---|---|
{rows}

Together {document["cycles"]} cycles ({document["latency_us"]:g} us at {document["clock_mhz"]:g} MHz, one design after \
the other, the host's work not counted), about {document["luts"]} LUTs and {document["bram18"]} BRAM18 on \
{document["device"]} (estimated).

Outside the designs, in float32 on the host: the input of each is divided by its scale and rounded (`host.in_scale`, \
`host.in_format` in its `network.json`), the sums that leave are multiplied by `host.step`, then `host.gain`, and \
`host.bias` is added; and the operations of the table. Behind the last design: \
{", ".join(document["after"]) or "nothing"}.
"""
