"""The coefficients that everything is priced with: ours in `coeffs.toml`, or those of a file; read, chosen, written."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from hwmodel import fabric
from hwmodel.cost import HwError
from hwmodel.fabric import kept

COMPRESSOR = "compressor"
"""In place of a file of coefficients: ours, with sums by published counters (`hwmodel.compressor`)."""
_source: list[Path] = []


@cache
def document() -> dict[str, Any]:
    """The contents of `coeffs.toml`, or of the file that `use_coefficients` named: of xc7, and below "ecp5" of ECP5."""
    own = not _source or published()
    source = resources.files("hwmodel").joinpath("coeffs.toml") if own else _source[0]
    return tomllib.loads(source.read_text())


def published() -> bool:
    """Whether sums are priced by published counters, which nobody here has measured."""
    return _source == [Path(COMPRESSOR)]


@kept
def coefficients() -> dict[str, Any]:
    """Those of the family that is priced."""
    if fabric.family() == "xc7":
        return document()
    found: dict[str, Any] = document().get(fabric.family(), {})
    if not found:
        raise HwError(f"these coefficients have none for {fabric.family()}; hwmodel fit --family renews ours")
    return found


def use_coefficients(path: Path | None) -> None:
    """Price everything from now on with the coefficients in `path`, `COMPRESSOR`'s, or our own for None."""
    if path is not None and path != Path(COMPRESSOR):
        try:
            found = tomllib.loads(path.read_text())
        except OSError:
            raise HwError(
                f"{path} cannot be read; expected coefficients written by hwmodel fit, or the word {COMPRESSOR}"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise HwError(f"{path} is not TOML: {error}") from None
        optional = {*fabric.FAMILIES, COMPRESSOR}
        missing = [key for key in document() if key not in found and key not in optional]
        if missing:
            raise HwError(f"{path} lacks [{missing[0]}]; expected coefficients written by hwmodel fit")
    _source[:] = [] if path is None else [path]
    forget()


def forget() -> None:
    """Empty every cache of the package, after coefficients have changed."""
    for name, module in list(sys.modules.items()):
        if name.startswith("hwmodel."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear") and value.__module__.startswith("hwmodel."):
                    value.cache_clear()


def write_coeffs(path: Path, data: dict[str, Any]) -> None:
    """Write the tables as TOML and price everything with them from now on."""
    lines = ["# Written by hwmodel fit; [fit] says with which tool, when and how."]

    def emit(table: dict[str, Any], name: str) -> None:
        plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
        if name and plain:
            lines.extend(["", f"[{name}]"])
        lines.extend(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in plain.items())
        for k, v in table.items():
            if isinstance(v, dict):
                emit(v, f"{name}.{json.dumps(k)}" if name else json.dumps(k))

    emit(data, "")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text("\n".join(lines) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    use_coefficients(path)
