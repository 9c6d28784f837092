"""Quantize the operands of residual sums and of means over maps, at scales that are powers of two.

A layer's product of integers is exact, but a residual sum adds two float numbers, so that hardware would have to add
floats, too. Behind this step both operands are integers times powers of two: their sum and a mean of such numbers are
exact in float32 and in integers alike, in every order, and one design holds the whole network (`quantkit rtl`).

A layer that reads an operand, too, reads its codes, and layers that read one map read the same codes. As in Jacob et
al., CVPR 2018, arXiv 1712.05877, appendix A.2, both operands of an addition have scales of their own. Differs from the
paper: these are powers of two, so that operands are aligned by shifts, and there are no zero points.
"""

from __future__ import annotations

import torch

from hwmodel.formats import Format, FormatError, Int, bits, parse
from quantkit.errors import InputError
from quantkit.joints import check, place, readers
from quantkit.model import Calib, Model
from quantkit.observers import Sample, collect
from quantkit.qlayers import ActQuant, BlockAct, LayerPlan, QLayer
from quantkit.qtensor import ScaleRule, fit_groups

CHANGES = frozenset({"joints"})


def apply(
    model: Model, calib: Calib, *, act: str = "int8", scale: ScaleRule = "mse", samples: int = 65536
) -> dict[str, float]:
    """Put a `Point` behind every operand, fitted to what reaches it now; nothing of a policy or in a chain.

    act: their format, an integer, unsigned of the same width where no value is negative. An operand that layers read
    has the format of their inputs, where that is an integer, and these layers its scale; of other maps that several
    layers read, all take the scale of the first. samples: values per operand that the search of a scale looks at.
    Returns how many operands there are and how many layers took another scale than they had.
    InputError where a layer's input is planned to be quantized and is not yet: `act_scales` comes before this step.
    """
    check(model)
    asked = _integer(act)
    names = place(model)
    summed = {n: layer for n, layer in model.qlayers().items() if layer.op != "embedding"}  # that one looks rows up
    if late := [n for n, layer in summed.items() if names and layer.plan.act and not layer.act]:
        raise InputError(f"step 'joints' comes behind act_scales: layer {late[0]!r} has no scale of its input yet")
    seen = {name: Sample(samples) for name in names}
    if seen:
        collect(model, calib, seen)
    points, reading, changed = model.points(), readers(model), 0
    for name, sample in seen.items():
        if sample.broken is not None:
            raise InputError(f"operand {name!r}: {sample.broken[1]} on the calibration set; all must be finite")
        layers = _integers(reading.pop(name, []))
        widths = [bits(layer.act.fmt) for layer in layers if layer.act is not None]
        fmt = Int(max(widths, default=asked.bits), signed=sample.low < 0)
        values = sample.values()
        values = values if values.any() else torch.ones(1)
        found = ActQuant(fmt, float(fit_groups(values.reshape(1, 1, -1), fmt, scale, pow2=True)))
        points[name].plan = LayerPlan(act=fmt)
        points[name].set_act(found)
        changed += _share(layers, found)
    if names:
        for layers in map(_integers, reading.values()):
            changed += _share(layers[1:], layers[0].act) if layers else 0
    return {"operands": float(len(names)), "other_scales": float(changed)}


def _integers(layers: list[QLayer]) -> list[QLayer]:
    """Those whose inputs are integers at one scale."""
    return [x for x in layers if isinstance(x.act, ActQuant) and isinstance(x.act.fmt, Int) and x.in_scale is None]


def _share(layers: list[QLayer], act: ActQuant | BlockAct | None) -> int:
    """Give layers this quantizer of their input; returns how many had another."""
    others = [layer for layer in layers if layer.act != act]
    for layer in others:
        layer.set_act(act)
    return len(others)


def _integer(text: str) -> Int:
    try:
        found: Format | None = parse(text)
    except FormatError:
        found = None
    if not isinstance(found, Int) or not 2 <= found.bits <= 8:
        raise InputError(f"step 'joints': format {text!r} is not accepted; accepted: int2 .. int8")
    return found
