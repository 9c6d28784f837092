"""Coefficients from a user's own tool: counts of multiply-accumulate elements in a CSV, and products fitted to them."""

from __future__ import annotations

import csv
import datetime
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel import mac
from hwmodel.coeffs import coefficients, use_coefficients, write_coeffs
from hwmodel.cost import HwError
from hwmodel.formats import BINARY, Format, parse
from hwmodel.mac import pair_key
from hwmodel.validate import residual_of

SEED = 20261121
"""Of the draw of rows that are held out."""
COLUMNS = ("weight", "act", "lanes", "acc_bits", "luts", "ffs")
"""Of a utilization CSV: one synthesized `rtl/mac.v` a row."""


class RowsError(HwError):
    """Malformed rows of a CSV, one line each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(lines[0])
        self.lines = lines


@dataclass(frozen=True, slots=True)
class Utilization:
    """LUTs and flip-flops that a tool reported for one multiply-accumulate element."""

    weight: Format
    act: Format
    lanes: int
    acc_bits: int
    luts: float
    ffs: float


def read_utilization(path: Path) -> list[Utilization]:
    """The rows of a CSV with `COLUMNS`; lines starting with # are skipped. `RowsError` names every malformed row."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise HwError(f"{path} cannot be read; expected a CSV with columns {', '.join(COLUMNS)}") from None
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not numbered:
        raise HwError(f"{path} is empty; expected a CSV with columns {', '.join(COLUMNS)}")
    header = [name.strip() for name in numbered[0][1].split(",")]
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise HwError(f"{path} has no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
    rows, wrong = [], []
    for number, line in numbered[1:]:
        cells = [cell.strip() for cell in next(csv.reader([line]))]
        try:
            rows.append(_utilization(dict(zip(header, cells, strict=False))))
        except (ValueError, KeyError) as error:
            reason = f"no value for {error}" if isinstance(error, KeyError) else str(error)
            wrong.append(f"{path}, line {number}: {reason}")
    if wrong:
        raise RowsError(wrong)
    if len(rows) < 3:
        raise HwError(f"{path} has {len(rows)} rows; a fit needs at least 3")
    return rows


def _utilization(record: dict[str, str]) -> Utilization:
    weight, act = parse(record["weight"]), parse(record["act"])
    numbers = {}
    for name in COLUMNS[2:]:
        least = 1 if name in ("lanes", "acc_bits") else 0
        text = record[name]
        if not text.replace(".", "", 1 if name in ("luts", "ffs") else 0).isdecimal() or float(text) < least:
            raise ValueError(f"{name} is {text!r}; accepted: numbers from {least} up")
        numbers[name] = float(text)
    lanes, acc_bits = int(numbers["lanes"]), int(numbers["acc_bits"])
    if (weight, act) == (BINARY, BINARY):
        raise ValueError("binary x binary is counted, not multiplied: it has no product to fit")
    return Utilization(weight, act, lanes, acc_bits, numbers["luts"], numbers["ffs"])


def fit_utilization(rows: Sequence[Utilization], out: Path, *, tool: str, command: str) -> dict[str, Any]:
    """Products as the user's tool makes them, everything else as ours; written to `out`, residuals returned.

    A pair in the rows gets their median product, every other pair ours times the median ratio. The residuals
    are those of a fit to two thirds of the rows on the other third.
    """
    shuffled = list(rows)
    random.Random(SEED).shuffle(shuffled)
    held, seen = shuffled[: len(rows) // 3 or 1], shuffled[len(rows) // 3 or 1 :]
    ours = deepcopy(coefficients())
    trial = out.with_name(f".{out.name}.trial")
    try:
        write_coeffs(trial, _with_products(ours, seen))
        guesses = [mac.mac_cost(r.weight, r.act, r.acc_bits, r.lanes).luts for r in held]
    finally:
        use_coefficients(None)
        trial.unlink(missing_ok=True)
    data = _with_products(ours, rows)
    found = residual_of([r.luts for r in held], guesses)
    data["fit"] = {
        "tool": tool,
        "date": datetime.date.today().isoformat(),
        "command": command,
        "rows": len(rows),
        "base": f"{ours['fit'].get('yosys', 'unknown')}, {ours['fit']['date']}",
    }
    data["residual"] = {kind: dict(found) for kind in ours["residual"]}
    write_coeffs(out, data)
    return found


def _with_products(ours: dict[str, Any], rows: Sequence[Utilization]) -> dict[str, Any]:
    by_pair: dict[str, list[float]] = {}
    ratios = []
    for r in rows:
        around = (
            mac.mac_cost(r.weight, r.act, r.acc_bits, r.lanes).luts - r.lanes * mac.product_cost(r.weight, r.act).luts
        )
        product = max(0.5, (r.luts - around) / r.lanes)
        by_pair.setdefault(pair_key(r.weight, r.act), []).append(product)
        ratios.append(product / mac.product_cost(r.weight, r.act).luts)
    ratio = float(np.median(ratios))
    data = deepcopy(ours)
    for key, entry in data["products"].items():
        entry[0] = round(float(np.median(by_pair[key])) if key in by_pair else entry[0] * ratio, 2)
    for name in data["product_formula"]:
        data["product_formula"][name] = round(data["product_formula"][name] * ratio, 4)
    return data
