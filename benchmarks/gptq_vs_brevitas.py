"""GPTQ here and in Brevitas, side by side: the same layers, calibration data and kind of scale.

Both get a float layer and a calibration set and have to leave a quantized layer; the time includes
collecting the Hessian. Brevitas runs with `gptq_mode` at its defaults (100 blocks, no act-order) on
a QuantLinear or QuantConv2d with absolute-maximum scales per channel (narrow integers, as are ours,
"int4n"), frozen beforehand. (With its default, scales that follow the weights, linear layers of
Brevitas 0.13.4 come out with the error of rounding to nearest: `brevitas_default_error`. The scales of
the single column being rounded are the likely reason; it was not traced in its source.) The error is the mean
squared error of the layer's output on the calibration set, relative to the output's mean square,
with round-to-nearest at the same scales as the yardstick. Times are CPU time, the best of `repeats`
rounds in which everybody runs once, so that other work on the machine counts little.

Run: python benchmarks/gptq_vs_brevitas.py [--repeats 5] [--samples 2048] [--threads 1]
"""

from __future__ import annotations

import argparse
import csv
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
from quantkit.qlayers import LayerPlan, QLayer

warnings.filterwarnings("ignore")  # Brevitas uses deprecated parts of torch


@dataclass
class Args:
    """The command line. samples: rows of calibration data; for convolutions, positions in images of 16 x 16."""

    samples: int = 2048
    repeats: int = 5
    threads: int = 1
    seed: int = 0
    out: str = "reports/gptq_vs_brevitas.csv"


def layers() -> dict[str, nn.Module]:
    """Name -> float layer."""
    linear = {f"linear {n}x{n}": nn.Linear(n, n) for n in (64, 256, 512, 1024)}
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


def ours(layer: nn.Module, x: Tensor, fmt: str, method: object) -> tuple[float, Tensor]:
    """Seconds and the quantized weight."""
    model = Model(nn.Sequential(QLayer(layer, LayerPlan(weight=parse(fmt)))), x[:1])
    calib = Calib(x)
    start = time.process_time()
    with torch.no_grad():
        method.apply(model, calib, scale="absmax")  # type: ignore[attr-defined]
    return time.process_time() - start, model.module[0].effective_weight()


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


def brevitas(layer: nn.Module, x: Tensor, fmt: str, frozen: bool) -> tuple[float, Tensor]:
    """Seconds and the quantized weight."""
    from brevitas.graph.gptq import gptq_mode

    model = nn.Sequential(brevitas_layer(layer, fmt, frozen)).eval()
    with torch.no_grad():
        model(x[:1])  # initializes a frozen scale
        start = time.process_time()
        with gptq_mode(model, use_quant_activations=False) as mode:
            for _ in range(mode.num_layers):
                for batch in x.split(512):
                    mode.model(batch)
                mode.update()
        seconds = time.process_time() - start
        return seconds, model[0].quant_weight().value.detach()


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
    rows = []
    for name, layer in layers().items():
        for fmt in ("int4n", "e2m1"):
            torch.manual_seed(args.seed)
            layer.reset_parameters()
            x = inputs(layer, args.samples)
            runs: dict[str, Callable[[], tuple[float, Tensor]]] = {
                "brevitas": partial(brevitas, layer, x, fmt, True),
                "brevitas_default": partial(brevitas, layer, x, fmt, False),
                "ours": partial(ours, layer, x, fmt, gptq),
                "rtn": partial(ours, layer, x, fmt, rtn),
            }
            row: dict[str, object] = {"layer": name, "format": fmt}
            seconds: dict[str, float] = {}
            results = [{key: run() for key, run in runs.items()} for _ in range(args.repeats)]
            for key in runs:
                seconds[key] = min(result[key][0] for result in results)
                row[f"{key}_ms"] = f"{1e3 * seconds[key]:.2f}"
                row[f"{key}_error"] = f"{relative_error(layer, results[0][key][1], x):.6f}"
            row["speedup"] = f"{seconds['brevitas'] / seconds['ours']:.1f}"
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        command = " ".join(["python", *sys.argv])
        file.write(
            f"# {command}; brevitas {package.__version__}, torch {torch.__version__}, {args.threads} thread(s)\n"
        )
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for option in fields(Args):
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    main(Args(**vars(parser.parse_args())))
