"""Number formats: what integers, minifloats, ternary and binary numbers are.

A format is a small frozen record of facts; everything else is derived from it by the
functions below. Nothing here depends on numpy or torch: the slow scalar functions
(`nearest`, `encode`, `decode`) are the specification that every fast version is tested
against.

Text names, `parse(str(fmt)) == fmt`:

    int4  int8n  uint8  uint4n     integers; n = narrow range (symmetric for signed)
    e2m1  e4m3  e3m0               minifloats, every code a finite number (1 sign bit)
    e4m3fn  e5m2ieee               minifloats with the OCP/IEEE special codes
    ternary  binary                {-1, 0, 1} and {-1, 1}
    mxfp8  mxfp8e5m2  mxfp6        blocks of 32 with one power of two each (OCP MX 1.0);
    mxfp6e3m2  mxfp4  mxint8       mxfp8 is e4m3fn, mxfp6 e2m3, mxfp4 e2m1, mxint8 int8
    nvfp4                          blocks of 16 e2m1 with an e4m3fn scale each
    int4/e4m3x32  e2m1/e8m0x8      any other block: element / scale x size

Minifloat semantics follow Aggarwal et al., "Shedding the Bits", FPL 2024 (arXiv
2311.12359): bias `2^(E-1) - 1`, subnormals, no codes reserved for infinity or NaN. The
suffix `ieee` reserves the whole top exponent (infinity and NaN, as OCP E5M2 does), the
suffix `fn` only the all-ones code (NaN, as OCP E4M3 does).

Rounding is half to even everywhere, and out-of-range values saturate.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal, assert_never


@dataclass(frozen=True, slots=True)
class Int:
    """Integer of 1-8 or 16 bits; `narrow` drops one code (the most negative if signed, else the largest)."""

    bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4, 5, 6, 7, 8, 16):
            raise FormatError(f"integers have 1 to 8 bits or 16, not {self.bits}")
        if self.narrow and self.bits == 1:
            raise FormatError("a narrow integer needs at least 2 bits")

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}{'n' if self.narrow else ''}"


@dataclass(frozen=True, slots=True)
class Float:
    """Minifloat with one sign bit, `exp` exponent and `man` significand bits, 3-8 bits in all."""

    exp: int
    man: int
    special: Literal["none", "ieee", "fn"] = "none"

    def __post_init__(self) -> None:
        if self.exp < 1 or self.man < 0 or not 3 <= 1 + self.exp + self.man <= 8:
            raise FormatError(f"e{self.exp}m{self.man} is not a minifloat of 3 to 8 bits with E >= 1, M >= 0")
        if self.special == "ieee" and (self.man < 1 or self.exp < 2):
            raise FormatError("an ieee minifloat needs E >= 2 and M >= 1 (NaN and infinity are told apart by M)")
        if self.special == "fn" and self.exp + self.man < 3:
            raise FormatError("an fn minifloat needs at least 4 bits")

    def __str__(self) -> str:
        return f"e{self.exp}m{self.man}{'' if self.special == 'none' else self.special}"


@dataclass(frozen=True, slots=True)
class Levels:
    """A short table of values: ternary {-1, 0, 1} or binary {-1, 1}."""

    name: Literal["ternary", "binary"]

    def __str__(self) -> str:
        return self.name


ScaleFormat = Literal["e8m0"] | Float
Number = Int | Float | Levels


@dataclass(frozen=True, slots=True)
class Block:
    """`size` neighbouring numbers of format `elem` with one scale in common, of format `scale`.

    Scales in "e8m0" are powers of two, 2^-127 to 2^127 (8 bits, code = exponent + 127). Those in a minifloat are its
    positive values times one float32 of the whole tensor. The functions of this file see a block's element.
    """

    elem: Number
    size: int
    scale: ScaleFormat = "e8m0"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise FormatError(f"a block has at least one number, not {self.size}")

    @property
    def bits(self) -> float:
        """Stored bits per number with its share of the block's scale (without a tensor's float32).

        >>> parse("mxfp4").bits, parse("nvfp4").bits
        (4.25, 4.5)
        """
        return bits(self.elem) + scale_bits(self.scale) / self.size

    def __str__(self) -> str:
        return _NAME_OF_BLOCK.get(self) or f"{self.elem}/{self.scale}x{self.size}"


Format = Number | Block

TERNARY = Levels("ternary")
BINARY = Levels("binary")


BLOCKS = {
    "mxfp8": Block(Float(4, 3, "fn"), 32),
    "mxfp8e5m2": Block(Float(5, 2, "ieee"), 32),
    "mxfp6": Block(Float(2, 3), 32),
    "mxfp6e3m2": Block(Float(3, 2), 32),
    "mxfp4": Block(Float(2, 1), 32),
    "mxint8": Block(Int(8), 32),
    "nvfp4": Block(Float(2, 1), 16, Float(4, 3, "fn")),
}
_NAME_OF_BLOCK = {block: name for name, block in BLOCKS.items()}


class FormatError(ValueError):
    """A text or a set of facts that names no format."""


def minifloats(bits: int) -> list[Float]:
    """Every finite-only minifloat of the given total width, most exponent bits last.

    >>> [str(f) for f in minifloats(4)]
    ['e1m2', 'e2m1', 'e3m0']
    """
    return [Float(exp, bits - 1 - exp) for exp in range(1, bits)]


def all_names() -> list[str]:
    """Every name of a format that is no block, in the order of width."""
    ints = [
        str(Int(b, signed, narrow))
        for b in (1, 2, 3, 4, 5, 6, 7, 8, 16)
        for signed in (True, False)
        for narrow in (False, True)
        if not (narrow and b == 1)
    ]
    floats = [str(f) for bits in range(3, 9) for f in minifloats(bits)]
    special = []
    for bits in range(3, 9):
        for fmt in minifloats(bits):
            for kind in ("ieee", "fn"):
                try:
                    special.append(str(Float(fmt.exp, fmt.man, kind)))  # type: ignore[arg-type]
                except FormatError:
                    continue
    return ["binary", "ternary", *ints, *floats, *special]


_INT = re.compile(r"(u?)int(\d+)(n?)")
_FLOAT = re.compile(r"e(\d+)m(\d+)(ieee|fn)?")
_BLOCK = re.compile(r"([^/]+)/([^/]+)x(\d+)")


@cache
def parse(text: str) -> Format:
    """The format that `text` names; raises `FormatError` naming the nearest one.

    >>> parse("e4m3fn"), parse("uint8")
    (Float(exp=4, man=3, special='fn'), Int(bits=8, signed=False, narrow=False))
    """
    name = text.strip().lower()
    if name in ("ternary", "binary"):
        return Levels(name)  # type: ignore[arg-type]
    if name in BLOCKS:
        return BLOCKS[name]
    if m := _BLOCK.fullmatch(name):
        elem = parse(m[1])
        if isinstance(elem, Block):
            raise FormatError(f"unknown format {text!r}: a block holds numbers, not blocks such as {elem}")
        try:
            return Block(elem, int(m[3]), parse_scale(m[2]))
        except FormatError as error:
            raise FormatError(f"unknown format {text!r}: {error}") from None
    try:
        if m := _INT.fullmatch(name):
            return Int(int(m[2]), m[1] == "", m[3] == "n")
        if m := _FLOAT.fullmatch(name):
            return Float(int(m[1]), int(m[2]), m[3] or "none")  # type: ignore[arg-type]
        reason = ""
    except FormatError as error:
        reason = f" ({error})"
    near = difflib.get_close_matches(name, [*all_names(), *BLOCKS], n=1, cutoff=0.45)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise FormatError(
        f"unknown format {text!r}{reason}; {hint}Formats: int1..int8, int16 and uint.., with n for narrow; "
        "minifloats such as e2m1 or e4m3 (3-8 bits in all), with fn or ieee for the OCP codes; ternary; binary; "
        "blocks: mxfp8, mxfp6, mxfp4, mxint8, nvfp4, or element/scale x size as in int4/e8m0x32"
    )


def parse_scale(text: str) -> ScaleFormat:
    """The format of a block's scale: "e8m0" or a minifloat."""
    if text == "e8m0":
        return "e8m0"
    found = parse(text)
    if not isinstance(found, Float):
        raise FormatError(f"scales cannot be {text}; accepted: e8m0, or a minifloat such as e4m3fn")
    return found


def scale_bits(scale: ScaleFormat) -> int:
    """Stored bits of one scale."""
    return 8 if scale == "e8m0" else bits(scale)


def element(fmt: Format) -> Number:
    """The format of the numbers themselves: a block's element, any other format as it is."""
    return fmt.elem if isinstance(fmt, Block) else fmt


def bits(fmt: Format) -> int:
    """Storage bits of one number (of a block's element: `Block.bits` adds the scale)."""
    match fmt:
        case Int():
            return fmt.bits
        case Float():
            return 1 + fmt.exp + fmt.man
        case Levels():
            return 2 if fmt.name == "ternary" else 1
        case Block():
            return bits(fmt.elem)
        case _:
            assert_never(fmt)


def is_signed(fmt: Format) -> bool:
    """Whether negative values exist."""
    fmt = element(fmt)
    return fmt.signed if isinstance(fmt, Int) else True


def bias(fmt: Float) -> int:
    """Exponent bias, `2^(E-1) - 1`."""
    return 2 ** (fmt.exp - 1) - 1


def min_exponent(fmt: Float) -> int:
    """Exponent of the smallest normal number, `1 - bias`, also that of the subnormals."""
    return 1 - bias(fmt)


def max_value(fmt: Format) -> float:
    """Largest value.

    >>> max_value(parse("e4m3")), max_value(parse("e4m3fn")), max_value(parse("e5m2ieee"))
    (480.0, 448.0, 57344.0)
    """
    match fmt:
        case Int():
            top = 2 ** (fmt.bits - 1) - 1 if fmt.signed else 2**fmt.bits - 1
            return float(top - (1 if fmt.narrow and not fmt.signed else 0))
        case Float(exp, man, special):
            top_exp = 2**exp - 1 - bias(fmt)
            if special == "ieee":
                return (2 - 2.0**-man) * 2.0 ** (top_exp - 1)
            if special == "fn":
                if man == 0:
                    return 2.0 ** (top_exp - 1)
                return (2 - 2.0 ** (1 - man)) * 2.0**top_exp
            return (2 - 2.0**-man) * 2.0**top_exp
        case Levels():
            return 1.0
        case Block():
            return max_value(fmt.elem)
        case _:
            assert_never(fmt)


def min_value(fmt: Format) -> float:
    """Smallest (most negative) value; 0 for unsigned integers."""
    fmt = element(fmt)
    if isinstance(fmt, Int):
        if not fmt.signed:
            return 0.0
        return float(-(2 ** (fmt.bits - 1)) + (1 if fmt.narrow else 0))
    return -max_value(fmt)


def unit(fmt: Format) -> float:
    """The step of which every value is a whole multiple: 1, or the smallest subnormal of a minifloat."""
    fmt = element(fmt)
    return 2.0 ** (min_exponent(fmt) - fmt.man) if isinstance(fmt, Float) else 1.0


def int_max(fmt: Format) -> int:
    """Largest magnitude in units of `unit`: what exact fixed-point arithmetic has to hold.

    >>> int_max(parse("e2m1")), int_max(parse("e4m3")), int_max(parse("int4"))
    (12, 245760, 8)
    """
    return int(max(max_value(fmt), -min_value(fmt)) / unit(fmt))


@cache
def levels(fmt: Format) -> tuple[float, ...]:
    """Every distinct value, ascending (zero once)."""
    fmt = element(fmt)
    if isinstance(fmt, Levels):
        return (-1.0, 0.0, 1.0) if fmt.name == "ternary" else (-1.0, 1.0)
    if isinstance(fmt, Int):
        return tuple(float(v) for v in range(int(min_value(fmt)), int(max_value(fmt)) + 1))
    values = {decode(code, fmt) for code in range(2 ** bits(fmt))}
    return tuple(sorted(v + 0.0 for v in values if math.isfinite(v)))


def nearest(x: float, fmt: Format) -> float:
    """Round `x` to the nearest value, ties to even, saturating; NaN raises. The specification of rounding.

    >>> nearest(2.5, parse("e2m1")), nearest(5.0, parse("e2m1")), nearest(1e9, parse("int4"))
    (2.0, 4.0, 7.0)
    """
    if math.isnan(x):
        raise ValueError("NaN cannot be rounded to a number format")
    fmt = element(fmt)
    if isinstance(fmt, Levels) and fmt.name == "binary":
        return 1.0 if x >= 0 else -1.0
    low, high = (-1.0, 1.0) if isinstance(fmt, Levels) else (min_value(fmt), max_value(fmt))
    x = min(max(x, low), high)
    if not isinstance(fmt, Float):
        return float(round(x))
    exponent = max(math.frexp(x)[1] - 1, min_exponent(fmt)) if x else min_exponent(fmt)
    step = 2.0 ** (exponent - fmt.man)
    return round(x / step) * step


def decode(code: int, fmt: Format) -> float:
    """The value of a bit pattern: two's complement, sign-exponent-significand, or a table index.

    Reserved codes of `ieee` and `fn` formats give infinity or NaN; ternary is two's complement
    in 2 bits (code 2 is unused and NaN); binary maps 0 to -1 and 1 to 1.
    """
    fmt = element(fmt)
    width = bits(fmt)
    if not 0 <= code < 2**width:
        raise ValueError(f"code {code} does not fit {fmt} ({width} bits)")
    if isinstance(fmt, Levels):
        return (0.0, 1.0, math.nan, -1.0)[code] if fmt.name == "ternary" else (-1.0, 1.0)[code]
    if isinstance(fmt, Int):
        return float(code - 2**width if fmt.signed and code >= 2 ** (width - 1) else code)
    sign = -1.0 if code >> (width - 1) else 1.0
    field = (code >> fmt.man) & (2**fmt.exp - 1)
    significand = code & (2**fmt.man - 1)
    top = field == 2**fmt.exp - 1
    if fmt.special == "ieee" and top:
        return sign * math.inf if significand == 0 else math.nan
    if fmt.special == "fn" and top and significand == 2**fmt.man - 1:
        return math.nan
    if field == 0:
        return sign * significand * unit(fmt)
    return sign * (1 + significand / 2**fmt.man) * 2.0 ** (field - bias(fmt))


def encode(value: float, fmt: Format) -> int:
    """The bit pattern of a value of the format (+0 for zero); raises if it is not one.

    >>> encode(-6.0, parse("e2m1")), encode(-1.0, parse("int4"))
    (15, 15)
    """
    try:
        return _codes(fmt)[value + 0.0]
    except KeyError:
        raise ValueError(f"{value} is not a value of {fmt}") from None


@cache
def _codes(fmt: Format) -> dict[float, int]:
    table: dict[float, int] = {}
    for code in range(2 ** bits(fmt)):
        value = decode(code, fmt)
        if math.isfinite(value) and min_value(fmt) <= value <= max_value(fmt):
            table.setdefault(value + 0.0, code)
    return table
