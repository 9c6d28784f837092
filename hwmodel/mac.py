"""LUTs and flip-flops of one processing element: products, adder tree, accumulator.

Every pair of formats goes through one structure (`rtl/mac.v`): an operand is significand,
shift and sign; the product is the significands' product, shifted, negated; the sum is exact
in fixed point. The cost is composed from pieces that registers keep apart:

    LUTs = lanes * product(weight, act) + adders of the tree + accumulator bits

where `product` is a table of what the mapper made of each pair (`coeffs.toml`, fitted by
`hwmodel fit`) and a formula for pairs outside the table. Binary x binary is
popcount of agreements (`rtl/popcount.v`). Products in DSPs are `packing`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import assert_never

from hwmodel import fabric
from hwmodel.coeffs import COMPRESSOR, coefficients, document, published
from hwmodel.compressor import GATE, Counter, heap_luts, partial_products
from hwmodel.cost import Cost, HwError
from hwmodel.fabric import kept
from hwmodel.formats import BINARY, TERNARY, Block, Float, Format, Int, Levels, bits, int_max


@dataclass(frozen=True, slots=True)
class Operand:
    """What a format is to a multiplier.

    key: name in the tables (formats with the same hardware share it).
    kind: number of the KIND parameter in `rtl/operand.v`.
    sig: bits of the significand, `signed` if it is two's complement.
    reach: largest left shift.
    owes: a separate sign makes the product owe a one to two's complement.
    """

    key: str
    kind: int
    bits: int
    exp: int
    sig: int
    signed: bool
    reach: int
    owes: bool


@cache
def operand(fmt: Format) -> Operand:
    """The operand that a format is; special codes and narrow ranges change nothing."""
    match fmt:
        case Int(width, signed, _):
            return Operand(f"{'s' if signed else 'u'}{width}", 0 if signed else 1, width, 0, width, signed, 0, False)
        case Float(exp, man, _):
            return Operand(f"e{exp}m{man}", 2, bits(fmt), exp, man + 1, False, 2**exp - 2, True)
        case Levels():
            kind = 3 if fmt == TERNARY else 4
            return Operand(fmt.name[0], kind, bits(fmt), 0, 1, False, 0, True)
        case Block():
            raise HwError(
                f"{fmt} has a scale per block, which one multiply-accumulate has not; accepted: its element {fmt.elem}"
            )
        case _:
            assert_never(fmt)


def product_bits(weight: Format, act: Format) -> int:
    """Two's complement bits of any product, in units of the product of the two smallest steps.

    >>> from hwmodel.formats import parse
    >>> product_bits(parse("int4"), parse("uint4")), product_bits(parse("e2m1"), parse("e2m1"))
    (8, 9)
    """
    return (int_max(weight) * int_max(act)).bit_length() + 1


def shift_bits(weight: Format, act: Format) -> int:
    """Bits of the shift amount of a product; 0 if nothing is ever shifted."""
    return (operand(weight).reach + operand(act).reach).bit_length()


def owes(weight: Format, act: Format) -> bool:
    """Whether a product carries a separate sign into the adders."""
    return operand(weight).owes or operand(act).owes


def pair_key(weight: Format, act: Format) -> str:
    """Name of an unordered pair in the product table."""
    return " ".join(sorted((operand(weight).key, operand(act).key)))


def compressed_luts(weight: Format, act: Format, acc_bits: int, lanes: int) -> float:
    """LUTs of one element whose sums are a compressor tree and a ternary adder with the accumulator (`compressor`).

    Integers and levels enter by their partial products, minifloats by products of our own table.
    """
    if fabric.family() != "xc7":
        raise HwError(f"the {COMPRESSOR} coefficients are of 7-series and UltraScale counters, not of ECP5")
    known = [Counter(tuple(takes), tuple(gives), luts) for takes, gives, luts in document()[COMPRESSOR]["counters"]]
    w, a = operand(weight), operand(act)
    if shift_bits(weight, act):
        heap, before = [lanes] * product_bits(weight, act), lanes * product_cost(weight, act).luts
    else:
        heap, before = partial_products(w.sig, a.sig, lanes), GATE * w.sig * a.sig * lanes
        if owes(weight, act) and weight != act:  # a row that a sign negates owes a one
            heap[0] += lanes
    return before + heap_luts(heap[:acc_bits], known) + acc_bits


MARGIN_NS = 0.11
"""Beyond its own time, what a small product needs before the mapper of ECP5 takes it."""


@kept
def product_cost(weight: Format, act: Format, slack_ns: float = 0.0) -> Cost:
    """One registered product in LUTs: measured where the table has the pair, else the formula, times what it misses.

    slack_ns: the slowest path beside it as the mapper of ECP5 counts, which makes it small where it has the time.
    The formula is kept between the table's pairs that can do less and those that can do more.
    """
    entry = coefficients()["products"].get(pair_key(weight, act))
    if entry:
        small = coefficients().get("timing", {}).get("products", {}).get(pair_key(weight, act))
        if small and slack_ns >= small[1] + MARGIN_NS:
            return Cost(luts=min(entry[0], small[0]), ffs=entry[1])
        return Cost(luts=entry[0], ffs=entry[1])
    guess = product_formula(weight, act, coefficients()["product_formula"])
    wanted = guess.luts * missed(weight, act)
    low, high = 0.0, math.inf
    for key, (luts, _, _) in coefficients()["products"].items():
        x, y = (format_of(part) for part in key.split())
        if (does(weight, x) and does(act, y)) or (does(weight, y) and does(act, x)):
            low = max(low, luts)
        if (does(x, weight) and does(y, act)) or (does(x, act) and does(y, weight)):
            high = min(high, luts)
    return Cost(luts=min(max(wanted, low), high), ffs=guess.ffs)


def missed(weight: Format, act: Format) -> float:
    """How many times the formula's LUTs the table's nearest pairs take whose integer is narrower or wider: their
    geometric mean; 1 where there are none."""
    known, found = coefficients(), []
    for one, other in ((weight, act), (act, weight)):
        if isinstance(one, Int):
            for widths in (range(min(one.bits, 9) - 1, 0, -1), range(one.bits + 1, 9)):
                pairs = ((Int(width, one.signed), other) for width in widths)
                if near := next((pair for pair in pairs if pair_key(*pair) in known["products"]), None):
                    told = known["products"][pair_key(*near)][0]
                    found.append(max(1.0, told) / product_formula(*near, known["product_formula"]).luts)
    return math.exp(sum(map(math.log, found)) / len(found)) if found else 1.0


@cache
def format_of(key: str) -> Format:
    """The format that an operand's key stands for."""
    if key in ("t", "b"):
        return TERNARY if key == "t" else BINARY
    if key[0] == "e":
        exp, man = key[1:].split("m")
        return Float(int(exp), int(man))
    return Int(int(key[1:]), signed=key[0] == "s")


def does(wide: Format, narrow: Format) -> bool:
    """Whether an operand of `wide` can stand in for one of `narrow` in the same hardware."""
    match wide, narrow:
        case Int(), Int():
            return wide.bits >= narrow.bits + (wide.signed and not narrow.signed) and wide.signed >= narrow.signed
        case Float(), Float():
            return wide.exp >= narrow.exp and wide.man >= narrow.man
        case _:
            return wide == narrow


def product_formula(weight: Format, act: Format, weights: dict[str, float]) -> Cost:
    """The fallback: a weighted sum of `product_features`; flip-flops counted from the structure."""
    luts = sum(weights[name] * value for name, value in product_features(weight, act).items())
    return Cost(luts=max(1.0, luts), ffs=product_ffs(weight, act))


def product_ffs(weight: Format, act: Format) -> int:
    """Flip-flops of the one or two register stages of a product.

    Two unsigned integers need no sign; beside a signed integer a separate sign has a register of its own.
    """
    w, a = operand(weight), operand(act)
    beside = (w.signed and a.owes and act != BINARY) or (a.signed and w.owes and weight != BINARY)
    if not shift_bits(weight, act):
        return product_bits(weight, act) + beside - (not (w.signed or a.signed or w.owes or a.owes))
    significand = w.sig + a.sig + (beside or min(w.sig, a.sig) > 1)
    return product_bits(weight, act) + significand + shift_bits(weight, act) + 1


def product_features(weight: Format, act: Format) -> dict[str, float]:
    """What the LUTs of a product are about proportional to."""
    w, a = operand(weight), operand(act)
    out = product_bits(weight, act)
    shift = shift_bits(weight, act)
    multiplier = multiplier_luts(w.sig, w.signed, a.sig, a.signed)
    if not shift:
        return {"multiplier": multiplier, "sign": float(out if owes(weight, act) else 0), "one": 1.0}
    return {
        "shifted_multiplier": multiplier,
        "exponents": float(w.exp + a.exp),
        "shifted_bits": float(out),
        "shifted_stages": float(out * shift),
        "shifted_significand": float((w.sig + a.sig) * shift),
        "shifted_one": 1.0,
    }


def multiplier_luts(x: int, x_signed: bool, y: int, y_signed: bool) -> float:
    """A combinational multiplier of integers: the table, or rows of a radix-4 Booth multiplier beyond it."""
    if min(x, y) == 1 and not (x_signed or y_signed):
        return 0.0 if max(x, y) == 1 else float(max(x, y))
    key = " ".join(sorted((f"{'s' if x_signed else 'u'}{x}", f"{'s' if y_signed else 'u'}{y}")))
    entry = coefficients()["products"].get(key)
    if entry:
        return float(entry[0])
    return booth_rows(x, x_signed, y, y_signed)


def booth_rows(x: int, x_signed: bool, y: int, y_signed: bool) -> float:
    """Rows times row length of the better of the two recodings.

    >>> booth_rows(8, True, 8, True)
    41.0
    """

    def rows(n: int, signed: bool) -> int:
        return (n + 1) // 2 if signed else n // 2 + 1

    return 1.0 + min(rows(y, y_signed) * (x + 2), rows(x, x_signed) * (y + 2))


def tree_cost(lanes: int, width: int, max_bits: int, owed: bool, *, registers: int = 1, inside: bool = False) -> Cost:
    """Adders of a registered binary tree over `lanes` values of `width` bits, sums cut at `max_bits`.

    An adder of xc7 takes one LUT per bit of its operands, one more where it takes in an owed one. registers: of each
    value before the tree that could begin a shift register: 0 where DSPs hold them. inside: the first additions and
    their registers are DSPs', too.
    """
    luts = ffs = 0
    count, level = lanes, 0
    odd_bits, age = width, registers  # of the value left over by odd counts: its bits, and registers in a row so far
    while count > 1:
        level += 1
        pairs, single = divmod(count, 2)
        narrow, wide = min(width + level - 1, max_bits), min(width + level, max_bits)
        count = pairs + single
        if inside and level == 1:
            odd_bits = odd_bits if single else wide
            continue
        luts += pairs * fabric.adder(wide, narrow, owed)
        ffs += pairs * (wide + owed)
        if single:
            age += 1
            ffs += odd_bits + owed
        else:
            # the mapper makes such a chain, product register included, a shift register in LUTs
            if age >= 3 and fabric.shift_registers():
                luts += odd_bits
                ffs -= age * odd_bits
            odd_bits, age = wide, 1
    chains = owed_chains(lanes, registers) if owed and fabric.shift_registers() else ()
    return Cost(luts=luts + len(chains), ffs=ffs - sum(chains))


@cache
def owed_chains(lanes: int, registers: int = 1) -> tuple[int, ...]:
    """Registers in a row through which an owed one waits for its adder: those that become shift registers.

    registers: of them before the tree.

    >>> owed_chains(4), owed_chains(12)
    ((3,), (3, 4, 5))
    """
    ages, done = [registers] * lanes, []
    while len(ages) > 1:
        done += ages[0 : len(ages) // 2 * 2 : 2]
        ages = [age + 1 for age in ages[1::2]] + [ages[-1] + 1] * (len(ages) % 2)
    return tuple(sorted(age for age in [*done, *ages] if age >= 3))


def tree_levels(lanes: int) -> int:
    """Register stages of the tree."""
    return (lanes - 1).bit_length()


@kept
def mac_cost(weight: Format, act: Format, acc_bits: int, lanes: int = 1, slack_ns: float = 0.0) -> Cost:
    """One element that adds `lanes` products per cycle, made of LUTs, into one accumulator of `acc_bits` bits.

    slack_ns: of what stands beside it (`product_cost`); its own accumulator gives as much as it takes.
    """
    if lanes < 1 or acc_bits < 1:
        raise ValueError(f"a MAC has at least 1 lane and 1 accumulator bit, not {lanes} and {acc_bits}")
    if published():
        return Cost(luts=compressed_luts(weight, act, acc_bits, lanes), ffs=_own(weight, act, acc_bits, lanes, 0).ffs)
    return _own(weight, act, acc_bits, lanes, slack_ns)


def _own(weight: Format, act: Format, acc_bits: int, lanes: int, slack_ns: float) -> Cost:
    """`mac_cost` of what `rtl/` writes."""
    owed = owes(weight, act)
    slack = max(slack_ns, fabric.slack_ns(acc_bits + owed))
    if weight == BINARY and act == BINARY:
        return popcount_cost(acc_bits, lanes, slack)
    width = min(product_bits(weight, act), acc_bits)
    end = Cost(luts=fabric.adder(acc_bits, acc_bits, owed), ffs=2 * acc_bits)
    return product_cost(weight, act, slack) * lanes + tree_cost(lanes, width, acc_bits, owed) + end


FAST_AGREEMENTS = 8
"""LUTs of ECP5 in which three binary pairs are counted where that is the slowest path: two functions of six inputs."""


def popcount_cost(acc_bits: int, lanes: int, slack_ns: float = 0.0) -> Cost:
    """Binary x binary: agreements of `lanes` pairs counted per cycle (`rtl/popcount.v`).

    Three pairs fill two LUTs; the counts are never negative, so the accumulator needs LUTs only where
    the tree's sum reaches.
    """
    groups, rest = divmod(lanes, 3)
    count = groups + (rest > 0)
    if fabric.family() == "ecp5":
        tree = tree_cost(count, 3, acc_bits, owed=False)
        small, need, *_ = coefficients()["timing"]["agreements"]
        group = small if slack_ns >= need + MARGIN_NS else FAST_AGREEMENTS
        luts = group * groups + rest + tree.luts + fabric.adder(acc_bits, acc_bits, False)
        return Cost(luts=luts, ffs=2 * groups + rest + tree.ffs + 2 * acc_bits)
    adders = tree_cost(count, 2, acc_bits, owed=False) + Cost(luts=count - 1)
    luts = 2 * groups + (0.0, -1.0, 0.0)[rest] + adders.luts + min(3 + tree_levels(count), acc_bits)
    return Cost(luts=max(1.0, luts), ffs=2 * groups + rest + adders.ffs + 2 * acc_bits)


def pipeline_stages(weight: Format, act: Format, lanes: int) -> int:
    """Cycles from operands to the finished sum: product (two with a shifter), tree, accumulator.

    Binary x binary counts ones by groups of three lanes before the tree (`rtl/popcount.v`).
    """
    if weight == act == BINARY:
        return 1 + tree_levels(math.ceil(lanes / 3)) + 1
    return (2 if shift_bits(weight, act) else 1) + tree_levels(lanes) + 1
