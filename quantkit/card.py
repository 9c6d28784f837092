"""The model card of a picked design: what was measured, on what, with what. Facts of pick.json in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from quantkit.pareto import COLUMNS

CARD = "README.md"
_RESOURCES = ("luts", "ffs", "dsps", "bram18")
_WHAT = {
    "estimate.json": "hardware estimate, layer by layer",
    "model.safetensors": "packed weight codes, scales, biases",
    "pick.json": "everything on this card, as numbers",
    "network.onnx": "inputs in, outputs of the network out; for onnxruntime",
    "network.qonnx.onnx": "QONNX, for FPGA tools",
    "policy.onnx": "observations in, actions out; for onnxruntime",
    "policy.qonnx.onnx": "QONNX, for FPGA tools; raw outputs",
    "quantkit.json": "structure, environment, recipe; with the two beside it the directory quantkit reads",
    "specs.json": "layer specifications that hwmodel reads",
}


def write_card(place: Path, record: Mapping[str, Any], files: Mapping[str, tuple[int, str]]) -> None:
    """Write the card of a `pick` record beside `files` {name: (bytes, sha256)}."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    templates = resources.files("quantkit").joinpath("templates")
    environment = Environment(
        loader=FunctionLoader(lambda name: templates.joinpath(name).read_text(encoding="utf-8")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"num": number, "code": code, "signed": signed, "pct": percent}
    network = record["row"]["score"].get("metric") == "accuracy"
    text = environment.get_template("card_network.md.j2" if network else "card.md.j2").render(
        **record,
        files=[(name, _WHAT.get(name, ""), size, digest) for name, (size, digest) in files.items()],
        resources=[(COLUMNS[name][1], name) for name in _RESOURCES],
    )
    (place / CARD).write_text(text, encoding="utf-8")


def number(value: float | None, digits: int = 5) -> str:
    """A number for people; - where there is none.

    >>> number(2234), number(254.83382), number(13980.0, 4), number(None)
    ('2,234', '254.83', '13,980', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:,.{digits}g}"


def percent(value: float | None) -> str:
    """A share in percent; an unknown bound is unbounded.

    >>> percent(0.9125), percent(-0.004)
    ('91.25 %', '-0.40 %')
    """
    return "unbounded" if value is None else f"{100 * value:.2f} %"


def signed(value: float | None) -> str:
    """A difference, with its sign; an unknown bound is unbounded."""
    return "unbounded" if value is None else f"{value:+.4g}"


def code(text: Any) -> str:
    """Text as Markdown code, on one line, that can stand in a table.

    >>> code("a`b|c")
    "`a'b/c`"
    """
    return "`" + re.sub(r"\s+", " ", str(text)).replace("`", "'").replace("|", "/") + "`"
