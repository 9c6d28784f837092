"""GPTQ here and in Brevitas, side by side: the same layers, calibration data and kind of scale.

Both get a float layer and a calibration set and have to leave a quantized layer; the time includes
collecting the Hessian. Brevitas runs with `gptq_mode` at its defaults (100 blocks, no act-order) on
a QuantLinear or QuantConv2d with absolute-maximum scales per channel (narrow integers, as are ours,
"int4n"), frozen beforehand. (With its default, scales that follow the weights, linear layers of
Brevitas 0.13.4 come out with the error of rounding to nearest: `brevitas_default_error`. The scales of
the single column being rounded are the likely reason; it was not traced in its source.) The error is the mean
squared error of the layer's output on the calibration set, relative to the output's mean square,
with round-to-nearest at the same scales as the yardstick. Times are CPU time (`wall`: by the clock), the best of
`repeats` rounds in which everybody runs once, so that other work on the machine counts little; `load` is the machine's
load average over a minute before the row.

`floor` is the CPU time that the unavoidable arithmetic would take at the rate of one large matrix product, timed beside
each row: 2 s n^2 operations for the Hessian of s samples, n^3 / 3 for a Cholesky factor, m n^2 to feed every
column's error of m outputs to those after it.

Run: python benchmarks/gptq_vs_brevitas.py [--repeats 5] [--samples 2048] [--threads 1]
     python benchmarks/gptq_vs_brevitas.py --sizes 4096 --repeats 1 --threads 2     (minutes; keeps the other rows)
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hwmodel.formats import parse
from quantkit.methods import gptq, rtn
from quantkit.model import Calib, Model
from quantkit.qlayers import LayerPlan, QLayer, shape_of

warnings.filterwarnings("ignore")  # Brevitas uses deprecated parts of torch


Run = tuple[float, float, Tensor]
"""Seconds of the processor, seconds by the clock, the quantized weight."""


@dataclass
class Args:
    """The command line. samples: rows of calibration data; for convolutions, positions in images of 16 x 16.

    sizes: of square linear layers, in place of the usual layers.
    """

    sizes: str = ""
    samples: int = 2048
    repeats: int = 5
    threads: int = 1
    seed: int = 0
    out: str = "reports/gptq_vs_brevitas.csv"


def layers(sizes: str) -> dict[str, nn.Module]:
    """Name -> float layer."""
    linear = {
        f"linear {n}x{n}": nn.Linear(n, n) for n in (map(int, sizes.split(",")) if sizes else (64, 256, 512, 1024))
    }
    if sizes:
        return linear
    convolutions = {
        "conv 64x64 3x3": nn.Conv2d(64, 64, 3, padding=1),
        "depthwise 64 3x3": nn.Conv2d(64, 64, 3, padding=1, groups=64),
    }
    return {**linear, **convolutions}


def inputs(layer: nn.Module, samples: int) -> Tensor:
    """Non-negative, correlated inputs with channels of unequal size, as after a ReLU."""
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    mix = torch.randn(channels, channels) / channels**0.5 + torch.eye(channels)
    spread = torch.exp(0.5 * torch.randn(channels))
    if isinstance(layer, nn.Linear):
        return torch.relu(torch.randn(samples, channels) @ mix) * spread
    images = nn.functional.avg_pool2d(torch.randn(max(1, samples // 256), channels, 18, 18), 3, 1)
    return torch.relu(torch.einsum("bchw,cd->bdhw", images, mix)) * spread[:, None, None]


def floor(layer: nn.Module, samples: int) -> float:
    """Seconds of the processor for the docstring's operations at the rate of a matrix product, its best of three."""
    A, B = torch.randn(2, 2048, 2048)
    A @ B
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        A @ B
        best = min(best, time.process_time() - start)
    shape = shape_of(layer)  # type: ignore[arg-type]
    m, n = shape.outputs // shape.groups, layer.weight[0].numel()  # type: ignore[index,operator]
    return shape.groups * n * n * (2 * samples + n / 3 + m) * best / (2 * 2048**3)


def ours(layer: nn.Module, x: Tensor, fmt: str, method: object) -> Run:
    """What it took, and the quantized weight."""
    model = Model(nn.Sequential(QLayer(layer, LayerPlan(weight=parse(fmt)))), x[:1])
    calib = Calib(x)
    start, wall = time.process_time(), time.perf_counter()
    with torch.no_grad():
        method.apply(model, calib, scale="absmax")  # type: ignore[attr-defined]
    seconds = time.process_time() - start, time.perf_counter() - wall
    return *seconds, model.module[0].effective_weight()


def brevitas_layer(layer: nn.Module, fmt: str, frozen: bool) -> nn.Module:
    """The layer with a Brevitas weight quantizer of the same format and kind of scale."""
    import brevitas.nn as qnn
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8WeightPerChannelFloat
    from brevitas.quant.float import Fp8e4m3WeightPerChannelFloat

    scaling = ScalingImplType.PARAMETER_FROM_STATS if frozen else ScalingImplType.STATS
    if fmt == "int4n":
        quantizer = Int8WeightPerChannelFloat.let(bit_width=4, scaling_impl_type=scaling)
    else:
        quantizer = Fp8e4m3WeightPerChannelFloat.let(
            bit_width=4, exponent_bit_width=2, mantissa_bit_width=1, scaling_impl_type=scaling
        )
    if isinstance(layer, nn.Linear):
        made = qnn.QuantLinear(layer.in_features, layer.out_features, True, weight_quant=quantizer)
    else:
        made = qnn.QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            padding=layer.padding,
            groups=layer.groups,
            weight_quant=quantizer,
        )
    state = {k: v for k, v in layer.state_dict().items()}
    made.load_state_dict(state, strict=False)
    return made.eval()


def brevitas(layer: nn.Module, x: Tensor, fmt: str, frozen: bool) -> Run:
    """What it took, and the quantized weight."""
    from brevitas.graph.gptq import gptq_mode

    model = nn.Sequential(brevitas_layer(layer, fmt, frozen)).eval()
    with torch.no_grad():
        model(x[:1])  # initializes a frozen scale
        start, wall = time.process_time(), time.perf_counter()
        with gptq_mode(model, use_quant_activations=False) as mode:
            for _ in range(mode.num_layers):
                for batch in x.split(512):
                    mode.model(batch)
                mode.update()
        seconds = time.process_time() - start, time.perf_counter() - wall
        return *seconds, model[0].quant_weight().value.detach()


def relative_error(layer: nn.Module, weight: Tensor, x: Tensor) -> float:
    """Mean squared output error over the mean square of the output, both without bias."""
    with torch.no_grad():
        module = QLayer(layer, LayerPlan())
        reference = module.product(x, layer.weight)
        error = module.product(x, weight.reshape(layer.weight.shape)) - reference
        return float(error.double().square().mean() / reference.double().square().mean())


def main(args: Args) -> None:
    """Print the table and write the rows."""
    import brevitas as package

    torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []
    for name, layer in layers(args.sizes).items():
        for fmt in ("int4n", "e2m1"):
            torch.manual_seed(args.seed)
            layer.reset_parameters()
            x = inputs(layer, args.samples)
            runs: dict[str, Callable[[], Run]] = {
                "brevitas": partial(brevitas, layer, x, fmt, True),
                "brevitas_default": partial(brevitas, layer, x, fmt, False),
                "ours": partial(ours, layer, x, fmt, gptq),
                "rtn": partial(ours, layer, x, fmt, rtn),
            }
            if layer.weight.numel() >= 4096**2:
                del runs["brevitas_default"]  # a round takes minutes
            row = {"layer": name, "format": fmt, "threads": args.threads, "load": f"{os.getloadavg()[0]:.1f}"}
            results = [{key: run() for key, run in runs.items()} for _ in range(args.repeats)]
            best = {key: [min(result[key][i] for result in results) for i in (0, 1)] for key in runs}
            for key in ("brevitas", "brevitas_default", "ours", "rtn"):
                row[f"{key}_ms"] = f"{1e3 * best[key][0]:.2f}" if key in runs else ""
                row[f"{key}_error"] = f"{relative_error(layer, results[0][key][2], x):.6f}" if key in runs else ""
            row["speedup"] = f"{best['brevitas'][0] / best['ours'][0]:.1f}"
            row |= {f"{key}_wall_ms": f"{1e3 * best[key][1]:.2f}" for key in ("brevitas", "ours")}
            row["floor_ms"] = f"{1e3 * floor(layer, args.samples):.2f}"
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    command = " ".join(["python", *sys.argv])
    first = f"# {command}; brevitas {package.__version__}, torch {torch.__version__}, {args.threads} thread(s)\n"
    write(Path(args.out), first, rows)


def write(path: Path, first: str, rows: list[dict[str, object]]) -> None:
    """The rows behind those of other layers that the file has; `first` says how they were made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept, comments = [], []
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        comments = [line for line in lines if line.startswith("#") and line != first]
        new = {(row["layer"], row["format"]) for row in rows}
        old = csv.DictReader(line for line in lines if not line.startswith("#"))
        kept = [row for row in old if row.keys() == rows[0].keys() and (row["layer"], row["format"]) not in new]
    with path.open("w", newline="") as file:
        file.writelines([*(comments if kept else []), first])
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for option in fields(Args):
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    main(Args(**vars(parser.parse_args())))
