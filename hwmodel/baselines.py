"""Published cost models, for comparison with ours: FINN's formulas, EBOPs, BOPs, compressor trees.

FINN: Xilinx/finn commit 39f0c9a6b, `fpgadataflow/matrixvectoractivation.py`. EBOPs: HGQ's effective bit
operations, read as LUT + 55 DSP. BOPs: QONNX. Compressors: LUTs per product of 32-lane dot products with a
fused accumulator, computed with the generator of Hossfeld et al. (10.1145/3645097) for Versal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hwmodel.cost import Cost, HwError
from hwmodel.formats import BINARY, Float, Format, Int, bits
from hwmodel.spec import LayerSpec

LUTS_PER_DSP = 55


def finn(
    weight_bits: int,
    act_bits: int,
    rows: int,
    columns: int,
    pe: int,
    simd: int,
    acc_bits: int,
    out_bits: int = 0,
    *,
    dsp: bool = False,
) -> Cost:
    """FINN's matrix-vector unit: LUTs, DSPs and 18 Kb block RAMs (it has no formula for flip-flops).

    out_bits: of thresholds kept in distributed RAM, 0 for none. Weights deeper than 128 words lie in block RAM.

    >>> round(finn(4, 4, 1, 32, 1, 32, 14).luts - 300, 1), round(finn(4, 8, 1, 32, 1, 32, 18).dsps)
    (1414.6, 0)
    """
    width = weight_bits + act_bits
    depth = rows * columns // (pe * simd)
    multiply = 0 if dsp else simd * (2 * math.ceil(width / 6) - 1) * width
    tree = width * (2 * simd - 1)
    thresholds = compare = 0
    if out_bits:
        thresholds = (2**out_bits - 1) * acc_bits * math.ceil(rows / pe / 64)
        compare = (2**out_bits - 1) * acc_bits
    in_luts = depth <= 128
    memory = pe * simd * weight_bits * math.ceil(depth / 64) if in_luts and depth > 1 else 0
    return Cost(
        luts=300 + 1.1 * pe * (multiply + tree + acc_bits + thresholds + compare) + memory,
        dsps=pe * simd * math.ceil(width / 48) if dsp else 0,
        bram18=0 if in_luts else finn_bram18(pe * simd * weight_bits, depth),
    )


def finn_bram18(width: int, depth: int) -> int:
    """18 Kb block RAMs for `depth` words of `width` bits by FINN's rules of shape.

    >>> finn_bram18(36, 512), finn_bram18(256, 64), finn_bram18(26, 2048)
    (1, 8, 4)
    """
    if width <= 0 or depth <= 0:
        return 0
    if width == 1:
        return math.ceil(depth / 16384)
    if width == 2:
        return math.ceil(depth / 8192)
    if width <= 4:
        return math.ceil(depth / 4096)
    if width <= 9:
        return math.ceil(depth / 2048)
    if width <= 18 or depth > 512:
        return math.ceil(depth / 1024) * math.ceil(width / 18)
    return math.ceil(width / 36)


def finn_mac(weight_bits: int, act_bits: int, lanes: int, acc_bits: int) -> float:
    """LUTs of one element by FINN's formula, without its constant for the unit around it.

    >>> round(finn_mac(4, 4, 32, 21) / 32, 1), round(finn_mac(8, 8, 32, 29) / 32, 1)
    (44.4, 123.6)
    """
    return finn(weight_bits, act_bits, 1, lanes, 1, lanes, acc_bits).luts - 300


def effective_bits(fmt: Format) -> int:
    """Bits from the highest to the lowest a value uses: of a minifloat, its significand's; one for binary."""
    match fmt:
        case Float():
            return fmt.man + 2
        case _:
            return bits(fmt)


def ebops(weight: Format, act: Format, products: float) -> float:
    """Effective bit operations, which HGQ equates with LUT + 55 DSP.

    >>> ebops(Int(4), Int(8), 10)
    320
    """
    return effective_bits(weight) * effective_bits(act) * products


def bops(weight: Format, act: Format, products: float) -> float:
    """Bit operations of QONNX: stored widths multiplied, so that a minifloat counts as an integer."""
    return bits(weight) * bits(act) * products


# LUT per product, Versal, signed x signed, 32 lanes; symmetric; rows W, columns A as in the dictionary's keys.
_COMPRESSOR = {
    (1, 1): 1.34, (1, 2): 3.16, (1, 3): 4.12, (1, 4): 5.09, (1, 5): 6.06, (1, 6): 7.00, (1, 8): 8.88,
    (2, 2): 5.12, (2, 3): 6.94, (2, 4): 8.75, (2, 5): 10.6, (2, 6): 12.5, (2, 8): 16.2,
    (3, 3): 9.75, (3, 4): 12.6, (3, 5): 15.4, (3, 6): 18.2, (3, 8): 23.7,
    (4, 4): 16.2, (4, 5): 19.9, (4, 6): 23.5, (4, 8): 31.0,
    (5, 5): 24.5, (5, 6): 29.1, (5, 8): 38.3,
    (6, 6): 34.6, (6, 8): 45.7,
    (7, 7): 46.6,
    (8, 8): 60.4,
}  # fmt: skip
_COMPRESSOR_FLOAT = {
    "e1m1": 10.0, "e1m2": 13.9, "e2m1": 17.9, "e3m0": 28.6, "e1m3": 30.9, "e2m2": 39.7, "e3m1": 54.5,
    "e1m4": 48.7, "e2m3": 61.7, "e3m2": 69.3, "e4m1": 98.8, "e1m5": 72.7, "e2m4": 83.6, "e3m3": 91.3,
    "e4m2": 119.6, "e5m1": 194.3, "e1m6": 101.6, "e2m5": 111.5, "e3m4": 121.1, "e4m3": 146.6, "e5m2": 223.2,
}  # fmt: skip


def compressor(weight: Format, act: Format) -> float | None:
    """LUTs per product of the best known LUT-only dot product of 32 lanes; None where none was computed.

    >>> compressor(Int(4), Int(8)), compressor(Float(2, 1), Float(2, 1)), compressor(Int(8), Float(2, 1))
    (31.0, 17.9, None)
    """
    match weight, act:
        case Int(w), Int(a):
            return _COMPRESSOR.get((min(w, a), max(w, a)))
        case Float(), Float() if (weight.exp, weight.man) == (act.exp, act.man):
            return _COMPRESSOR_FLOAT.get(f"e{weight.exp}m{weight.man}")
        case _:
            return 1.34 if weight == act == BINARY else None


def compare_mac(weight: Format, act: Format, lanes: int, acc_bits: int) -> dict[str, float | None]:
    """LUTs of one element by every published model, unscaled; None where a model has no figure."""
    tree = compressor(weight, act)
    return {
        "FINN": finn_mac(bits(weight), bits(act), lanes, acc_bits),
        "EBOPs": ebops(weight, act, lanes),
        "BOPs": bops(weight, act, lanes),
        "compressor trees": None if tree is None else tree * lanes,
    }


def compare_network(specs: Sequence[LayerSpec], folds: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    """LUTs of folded layers by the published models, unscaled; folds: (PE, SIMD, accumulator bits) of each."""
    found = {"FINN": 0.0, "EBOPs": 0.0, "BOPs": 0.0}
    for spec, (pe, simd, acc_bits) in zip(specs, folds, strict=True):
        if spec.recurrence is not None:
            raise HwError(
                f"layer {spec.name!r} is recurrent ({spec.op}), which no published model prices; leave out --compare"
            )
        assert spec.weight is not None and spec.act is not None
        unit = finn(bits(spec.weight), bits(spec.act), spec.out_features, spec.in_features, pe, simd, acc_bits)
        found["FINN"] += unit.luts
        found["EBOPs"] += ebops(spec.weight, spec.act, pe * simd)
        found["BOPs"] += bops(spec.weight, spec.act, pe * simd)
    return found


def best_scale(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """The constant that, times the predictions, has the least median relative error: the median ratio."""
    ratios = sorted(m / p for p, m in zip(predicted, measured, strict=True) if p > 0)
    middle = len(ratios) // 2
    return ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2
