"""Observation and action spaces from the readable JSON of an SB3 zip: type, shape, bounds as printed."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.errors import InputError

_TYPE = re.compile(r"<class '(?:gym|gymnasium)\.spaces\.\w+\.(\w+)'>")
_NUMBER = re.compile(r"[-+]?(?:inf|nan|\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?)", re.I)
_ENTRY = re.compile(
    r"'(?P<key>[^'\\]{1,200})'\s*[:,]\s*(?P<kind>Box|Discrete|MultiDiscrete|MultiBinary)"
    r"\((?P<inside>[^()]*(?:\((?P<shape>[\d,\s]*)\)(?:,\s*(?P<dtype>\w+))?)?)\)"
)
_MAX_ENTRIES = 10**8


@dataclass(frozen=True)
class Space:
    """A space as printed: kind ("Box", "Discrete", ...), shape or None, dtype, and bounds or sizes.

    low, high: every entry's bound (flat), or None where the printed text left entries out. nvec: network
    outputs for each component of Discrete (one size), MultiDiscrete and MultiBinary (ones), else (). spaces: of a Dict,
    by key in the order of its vector, whose bounds are not read.
    """

    kind: str
    shape: tuple[int, ...] | None
    dtype: str
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    nvec: tuple[int, ...] = ()
    is_image: bool = False
    spaces: tuple[tuple[str, Space], ...] = ()

    def facts(self) -> dict[str, Any]:
        """JSON facts for `Model.meta`; infinite bounds are texts."""
        facts: dict[str, Any] = {"type": self.kind, "shape": list(self.shape or ()), "dtype": self.dtype}
        if self.spaces:
            return {"type": self.kind, "spaces": {key: space.facts() for key, space in self.spaces}}
        if self.nvec:
            facts["nvec"] = list(self.nvec)
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None and self.shape is not None and len(self.shape) == 1:
                facts[name] = [value if math.isfinite(value) else str(value) for value in bound]
        return facts


def read_space(data: dict[str, Any], key: str, where: str) -> Space:
    """The space under `key` ("observation_space" or "action_space"); InputError when absent or unreadable."""
    fields = data.get(key)
    match = _TYPE.fullmatch(str(fields.get(":type:"))) if isinstance(fields, dict) else None
    if not match or not isinstance(fields, dict):
        raise InputError(f"{where}: member 'data' has no readable {key}; expected a gymnasium Box, Discrete, ...")
    kind, dtype = match[1], str(fields.get("dtype", "float32"))
    shape = _shape(fields, f"{where}: {key}")
    match kind:
        case "Box" if shape is not None:
            low, high = (_bounds(fields, name, shape) for name in ("low", "high"))
            flat = [_uniform(fields, name) for name in ("low", "high")]
            return Space(
                kind, shape, dtype, low, high, (), len(shape) == 3 and dtype == "uint8" and flat == [0.0, 255.0]
            )
        case "Discrete" | "MultiBinary" | "MultiDiscrete":
            text = str(fields.get("nvec" if kind == "MultiDiscrete" else "n"))
            sizes = [int(n) for n in re.findall(r"\d+", text[:100_000]) if len(n) < 9]
            plain = re.fullmatch(r"\[[\d\s,]+\]" if kind == "MultiDiscrete" else r"\d{1,8}", text)
            if not plain or min(sizes) < 1 or sum(sizes) > _MAX_ENTRIES:
                raise InputError(f"{where}: {key}: unreadable size of {kind}")
            if kind == "MultiBinary" and sizes[0] > 10**6:
                raise InputError(f"{where}: {key}: MultiBinary of {sizes[0]} entries; at most 10^6 are read")
            nvec = (1,) * sizes[0] if kind == "MultiBinary" else tuple(sizes)
            return Space(kind, shape, dtype, nvec=nvec)
        case "Dict":
            return Space(kind, None, dtype, spaces=_printed(str(fields.get("spaces")), f"{where}: {key}"))
    return Space(kind, shape, dtype)


def _printed(text: str, where: str) -> tuple[tuple[str, Space], ...]:
    """The spaces of a Dict as gymnasium prints them, `{'key': Box(-1.0, 1.0, (3,), float32), ...}`.

    InputError for whatever is none of Box, Discrete, MultiDiscrete and MultiBinary, and for a text that is cut.
    """
    found, rest = [], text.strip().removeprefix("OrderedDict").strip("({[ ")
    while rest.strip(" )}],"):
        match = _ENTRY.match(rest)
        if not match or len(text) > 100_000:
            raise InputError(
                f"{where}: cannot read {rest[:60]!r} in a Dict; accepted under its keys: Box, Discrete, MultiDiscrete, "
                "MultiBinary"
            )
        key, kind, inside = match["key"], match["kind"], match["inside"]
        sizes = [int(n) for n in re.findall(r"\d+", inside.partition("start")[0]) if len(n) < 9]
        shape = tuple(int(n) for n in re.findall(r"\d+", match["shape"] or ""))
        if (
            math.prod(shape) > _MAX_ENTRIES
            or 0 in shape
            or "[[" in inside
            or (kind != "Box" and not 0 < sum(sizes) < _MAX_ENTRIES)
        ):
            raise InputError(f"{where}: key {key!r} has no readable size")
        match kind:
            case "Box":
                image = len(shape) == 3 and match["dtype"] == "uint8" and inside.startswith("0, 255,")
                space = Space(kind, shape, match["dtype"], is_image=image)
            case "Discrete":
                space = Space(kind, (), "int64", nvec=(sizes[0],))
            case "MultiDiscrete":
                space = Space(kind, (len(sizes),), "int64", nvec=tuple(sizes))
            case _:
                space = Space(kind, tuple(sizes), "int8")
        found.append((key, space))
        rest = rest[match.end() :].lstrip("), (")
    if not found:
        raise InputError(f"{where}: a Dict without keys")
    return tuple(found)


def _shape(fields: dict[str, Any], where: str) -> tuple[int, ...] | None:
    value = fields.get("_shape", fields.get("shape"))
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
        shape = None if value is None else tuple(int(n) for n in value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise InputError(f"{where}: unreadable shape {str(value)[:40]!r}") from None
    if shape is not None and (min(shape, default=1) < 1 or math.prod(shape) > _MAX_ENTRIES):
        raise InputError(f"{where}: shape {shape} is no shape of a space")
    return shape


def _numbers(text: Any) -> list[float]:
    return [float(n) for n in _NUMBER.findall(text)] if isinstance(text, str) else []


def _uniform(fields: dict[str, Any], name: str) -> float | None:
    """The one number that every printed entry equals, if that is so."""
    numbers = set(_numbers(fields.get(f"{name}_repr")) or _numbers(fields.get(name)))
    return numbers.pop() if len(numbers) == 1 else None


def _bounds(fields: dict[str, Any], name: str, shape: tuple[int, ...]) -> tuple[float, ...] | None:
    """Every entry's bound; None when numpy's print left entries out and no single number stands for all."""
    count = math.prod(shape)
    numbers = _numbers(fields.get(name))
    if len(numbers) == count and "..." not in str(fields.get(name)):
        return tuple(numbers)
    single = _numbers(fields.get(f"{name}_repr"))
    if len(single) == 1 and count <= 10**6:
        return tuple(np.full(count, single[0]).tolist())
    return None
