"""What Brevitas' own post-training techniques reach on four vision networks, and our presets beside them.

The pipeline is that of `brevitas_examples/imagenet_classification/ptq`, made of the same calls in the same order:
`preprocess_for_quantize` (graph equalization), SmoothQuant, `layerwise_quantize` with the example's quantizers,
calibration, GPFQ or GPTQ, learned rounding, bias correction. Where it departs from the example's defaults it does so
for Brevitas' good or for comparability:

- weights have a float scale per output channel, activations one static float scale per layer input, all symmetric,
  biases stay float; every Conv2d and Linear is quantized, `ends="8bit"` keeps the first and the last at 8 bits;
- an integer input that is never negative on the calibration data is unsigned (the example's layer-wise backend always
  signs it), as its `fx` backend does behind a ReLU;
- scales: "mse" searches weight and activation scales (Brevitas' MSE quantizers; the activation scales of DS-CNN at int4
  come within 3 % of the smallest squared error there is), "percentile" takes the largest weight and the 99.999th
  percentile of the activations (the example's defaults);
- SmoothQuant runs in graph mode with alpha 0.5 and is absorbed by the layers before;
- learned rounding has the example's defaults (layer by layer, 1,000 iterations, Adam, learning rate 1e-3, regularized
  MSE) with the hard sigmoid of AdaRound, in float32 instead of float16 and with 8 images an iteration instead of 1:
  these images are small, and ResNet-8 at int3/int8 (percentile) then agreed with the float network on 80.7 % instead of
  74.1 % of the images.

Only Conv2d and Linear are quantized. Sums of residual branches, normalizations and, in ViT, the softmax and the
products q·k and attention·v stay float: the layer-wise backend does not replace them (column `attention`).

The techniques `quantkit-fast`, `quantkit-balanced` and `quantkit-best` are our presets at the same formats, on the
same images, with the products of attention in float, too; of `ends` and `scales` they know "same" and "mse".

Each case runs in a process of its own: `seconds` is the wall time of quantizing alone, without imports and evaluation
but with one float pass that looks for negative inputs (`cpu_seconds` the same in CPU time, for machines that are
shared; it grows by a quarter or so under a load of 30), `peak_mib` the process's largest resident size up to then and
`loaded_mib` the same before quantizing. A case that needs more than 15 minutes of CPU time is stopped and recorded so.
Finished cases are kept in WORK/cases.csv; run again to go on.

Run: python benchmarks/brevitas_vision.py --data ../shared/data/vision --work WORK [--network resnet8] [--publish]
Learned rounding also needs `pip install accelerate`, which the example imports.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmodel.formats import Float, Format, FormatError, Int, bits, parse
from quantkit.errors import InputError

if TYPE_CHECKING:  # torch and Brevitas are imported where a case runs: the parent process stays small
    from torch import Tensor, nn
    from vision_networks import Network

STEPS = ("equalize", "smoothquant", "gpfq", "gptq", "gptq_act_order", "learned_round", "bias_correction")
"""In the order in which they are applied, however a technique names them."""
TECHNIQUES = (
    "none",
    "equalize",
    "smoothquant",
    "bias_correction",
    "gptq",
    "gptq_act_order",
    "learned_round",
    "gpfq",
    "equalize+gptq+bias_correction",
    "equalize+gptq_act_order+bias_correction",
    "equalize+learned_round+bias_correction",
)
OURS = ("quantkit-fast", "quantkit-balanced", "quantkit-best")
DESIGNS = (
    ("int8", "int8"),
    ("int4", "int8"),
    ("int4", "int4"),
    ("int3", "int8"),
    ("int3", "int3"),
    ("e4m3", "e4m3"),
    ("e3m4", "e3m4"),
    ("e2m1", "e4m3"),
    ("e2m1", "e3m4"),
    ("e2m1", "e2m1"),
    ("e2m0", "e3m4"),
    ("e2m0", "e2m0"),
)
"""Weights and activations. e1m1 has the values of int3n and is left out; e2m0 is {0, 1, 2, 4} with a sign."""
ENDS, SCALES = ("same", "8bit"), ("mse", "percentile")
BATCH, LEARNED_ROUND_ITERS, LEARNED_ROUND_BATCH, EQUALIZE_ITERS = 64, 1000, 8, 20
SECONDS_ALLOWED = 900
"""CPU time of a case, all its threads together."""
COLUMNS = (
    *("network", "weights", "acts", "ends", "scales", "technique", "attention", "accuracy", "agreement", "sqnr_db"),
    *("seconds", "cpu_seconds", "threads", "loaded_mib", "peak_mib", "status"),
)
FILTERS = ("network", "design", "technique", "ends", "scales")


@dataclass(frozen=True)
class Case:
    """One row's identity."""

    network: str
    weights: str
    acts: str
    ends: str
    scales: str
    technique: str


def run(
    network: Network, weights: str, acts: str, technique: str, *, ends: str = "same", scales: str = "mse"
) -> tuple[nn.Module, float]:
    """A Brevitas model of the network in eval mode, and the seconds that making it took (wall).

    weights, acts: "int4", "e2m1", ...; technique: "none" or steps of STEPS joined by "+", such as
    "equalize+gptq+bias_correction"; ends: of ENDS; scales: of SCALES. The network itself is left alone.
    InputError names a format, step or option that is not accepted.
    """
    import copy

    import torch
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    steps = _steps(technique)
    _check("ends", ends, ENDS)
    _check("scales", scales, SCALES)
    formats = _format(weights), _format(acts)
    torch.manual_seed(0)
    loader = [(part, None) for part in network.calib.split(BATCH)]
    with _quiet() as caught:
        start = time.perf_counter()
        iterations = EQUALIZE_ITERS if "equalize" in steps else 0
        model = preprocess_for_quantize(copy.deepcopy(network.module), equalize_iters=iterations, merge_bn=False)
        if "smoothquant" in steps:
            ptq_common.apply_act_equalization(model, loader, layerwise=False)
        model = _quantized(model, network.calib, formats, ends, scales)
        with torch.no_grad():
            model(loader[0][0])  # initializes the scales, as in the example
        ptq_common.calibrate(loader, model)
        if "gpfq" in steps:
            ptq_common.apply_gpfq(loader, model, act_order=False)
        if "gptq" in steps or "gptq_act_order" in steps:
            ptq_common.apply_gptq(loader, model, act_order="gptq_act_order" in steps, create_weight_orig=True)
        if "learned_round" in steps:
            _learn_rounding(model, loader)
        if "bias_correction" in steps:
            ptq_common.apply_bias_correction(loader, model)
        seconds = time.perf_counter() - start
    skipped = sum("will not be applied" in str(warning.message) for warning in caught)
    if skipped:  # Brevitas goes on with the layer rounded to nearest
        warnings.warn(f"GPTQ left {skipped} layer(s) alone: their Hessian could not be inverted", stacklevel=2)
    return model.eval(), seconds


def _quantized(model: nn.Module, calib: Tensor, formats: tuple[Format, Format], ends: str, scales: str) -> nn.Module:
    """The model with every Conv2d and Linear quantized, the first and last in calling order with formats of `ends`."""
    from brevitas.graph.quantize import layerwise_quantize

    negative = _inputs_negative(model, calib)
    names = list(negative)
    eight = tuple(Int(8) if isinstance(f, Int) else Float(3, 4) for f in formats)
    groups: dict[tuple[Any, bool], list[str]] = {}
    for name in names:
        chosen = eight if ends == "8bit" and name in (names[0], names[-1]) else formats
        groups.setdefault((chosen, negative[name]), []).append(name)
    for (chosen, signed), members in groups.items():
        others = [name for name in names if name not in members]
        model = layerwise_quantize(model, _layer_map(chosen, scales, signed), name_blacklist=others)
    return model


def _inputs_negative(model: nn.Module, calib: Tensor) -> dict[str, bool]:
    """Layer name -> whether its input is ever negative on the calibration data, in the order of the calls."""
    import torch
    from torch import nn

    seen: dict[str, bool] = {}

    def look(name: str, x: Tensor) -> None:
        seen[name] = seen.get(name, False) or bool((x < 0).any())

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_pre_hook(lambda _, x, n=n: look(n, x[0])) for n, m in layers]
    with torch.no_grad():
        for part in calib.split(BATCH):
            model(part)
    for hook in hooks:
        hook.remove()
    return seen


def _layer_map(formats: tuple[Format, Format], scales: str, signed: bool) -> dict[type, Any]:
    """Brevitas' layer map for these formats; `signed` says whether an integer input needs a sign."""
    import torch
    from brevitas_examples.imagenet_classification.ptq.ptq_common import create_quant_maps

    method = "mse" if scales == "mse" else "stats"
    options: dict[str, Any] = {}
    for side, fmt in zip(("weight", "act"), formats, strict=True):
        options |= {f"{side}_bit_width": bits(fmt), f"{side}_quant_format": "int", f"{side}_param_method": method}
        if isinstance(fmt, Float):
            options |= {f"{side}_quant_format": "float", f"{side}_exponent_bit_width": fmt.exp}
            options |= {f"{side}_mantissa_bit_width": fmt.man}
    _, layers, _, _ = create_quant_maps(
        dtype=torch.float32,
        bias_bit_width=None,
        weight_scale_type="float_scale",
        weight_quant_type="sym",
        weight_quant_granularity="per_channel",
        weight_narrow_range=False,
        act_scale_type="float_scale",
        act_scale_computation_type="static",
        act_quant_type="sym",
        act_quant_granularity="per_tensor",
        act_quant_percentile=99.999,
        **options,
    )
    if isinstance(formats[1], Int) and not signed:
        layers = {layer: (made, kwargs | {"input_signed": False}) for layer, (made, kwargs) in layers.items()}
    return layers


def _learn_rounding(model: nn.Module, loader: list[tuple[Tensor, None]]) -> None:
    """The example's `apply_learned_round`, in float32: its half precision is meant for GPUs."""
    import functools

    from brevitas_examples.common.learned_round import learned_round_trainer as trainer
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils as example

    config = example.parse_args_to_dataclass(
        argparse.Namespace(
            learned_round="hard_sigmoid",
            learned_round_lr_scheduler=None,
            learned_round_iters=LEARNED_ROUND_ITERS,
            learned_round_lr=1e-3,
            learned_round_loss="regularised_mse",
            learned_round_batch_size=LEARNED_ROUND_BATCH,
        )
    )
    config.training_args.use_amp = False
    trainer.LearnedRoundTrainer(config=config).train(
        model=model,
        model_forward=example.vision_forward,
        block_forward=example.vision_block_forward,
        data_loader=loader,
        cache=example.CacheVision(),
        get_blocks_fn=functools.partial(trainer.get_blocks, block_check_fn=example.is_layer),
        keep_gpu=True,
    )


def _steps(technique: str) -> tuple[str, ...]:
    if technique == "none":
        return ()
    steps = tuple(technique.split("+"))
    for step in steps:
        _check("technique", step, ("none", *STEPS))
    return steps


def _format(text: str) -> Int | Float:
    """A format that Brevitas' symmetric quantizers express: signed integers and minifloats without special codes."""
    try:
        fmt = parse(text)
    except FormatError as error:
        raise InputError(str(error)) from None
    plain = (isinstance(fmt, Int) and fmt.signed and not fmt.narrow and fmt.bits > 1) or (
        isinstance(fmt, Float) and fmt.special == "none"
    )
    if not plain:
        raise InputError(f"Brevitas' side takes int2..int8 and minifloats such as e2m1, not {text!r}")
    assert isinstance(fmt, Int | Float)
    return fmt


def _check(what: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise InputError(f"unknown {what} {value!r}; accepted: {', '.join(accepted)}")


@contextlib.contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Without Brevitas' prints and progress bars; its warnings go to the list."""
    silent = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(silent):
        warnings.simplefilter("always")
        with contextlib.redirect_stderr(silent):
            yield caught


def _peak_mib() -> float:
    """This process's largest resident size so far, in MiB (Linux reports KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(case: Case, data: str, threads: int) -> dict[str, Any]:
    """The case's row, measured in this process."""
    import torch
    import vision_networks

    if case.technique in OURS:
        return _measured_ours(case, data, threads)
    from brevitas.export.inference.manager import quant_inference_mode

    if "learned_round" in case.technique:  # imported before the clock runs; the other techniques do not need it
        from brevitas_examples.imagenet_classification.ptq import learned_round_utils  # noqa: F401
    from brevitas_examples.imagenet_classification.ptq import ptq_common  # noqa: F401

    torch.set_num_threads(threads)
    network = vision_networks.load(case.network, data)
    loaded, cpu = _peak_mib(), time.process_time()
    options = {"ends": case.ends, "scales": case.scales}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        module, seconds = run(network, case.weights, case.acts, case.technique, **options)
    cpu, peak = time.process_time() - cpu, _peak_mib()
    with _quiet(), torch.no_grad(), quant_inference_mode(module):
        module(network.example)  # caches the quantized weights
        result = vision_networks.measure(module, network)
    status = "; ".join(["ok", *(str(w.message) for w in told)])
    return _row(case, result, seconds, cpu, threads, loaded, peak) | {"status": status}


def _row(
    case: Case, result: dict[str, Any], seconds: float, cpu: float, threads: int, loaded: float, peak: float
) -> dict[str, Any]:
    rounded = {key: None if v is None else round(v, 2) for key, v in result.items()}
    sizes = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "threads": threads}
    return _identity(case) | rounded | sizes | {"loaded_mib": round(loaded), "peak_mib": round(peak)}


def _measured_ours(case: Case, data: str, threads: int) -> dict[str, Any]:
    """The same of one of our presets."""
    import torch
    import torch.export._trace  # imported before the clock runs, as Brevitas' modules are
    import vision_networks

    from quantkit.capture import captured
    from quantkit.model import Calib, Model
    from quantkit.presets import preset_steps
    from quantkit.qlayers import LayerPlan
    from quantkit.recipe import Recipe, make_plan, quantize

    _check("ends of a preset", case.ends, ("same",))
    _check("scales of a preset", case.scales, ("mse",))
    torch.set_num_threads(threads)
    network = vision_networks.load(case.network, data)
    loaded, cpu, began = _peak_mib(), time.process_time(), time.perf_counter()
    model = captured(Model(network.module, network.example, None, {"kind": "module"}))
    plan = [("*", make_plan(case.weights, case.acts)), *((name, LayerPlan()) for name in model.points())]
    recipe = Recipe(tuple(plan), preset_steps(case.technique.removeprefix("quantkit-"), "network"))
    done = quantize(model, recipe, Calib(network.calib, batch=BATCH))
    seconds, cpu, peak = time.perf_counter() - began, time.process_time() - cpu, _peak_mib()
    result = vision_networks.measure(done.module, network)
    return _row(case, result, seconds, cpu, threads, loaded, peak) | {"status": "ok"}


def _identity(case: Case) -> dict[str, Any]:
    """The columns that name the case; `attention` says what the products of attention are computed in."""
    return asdict(case) | {"attention": "float" if case.network == "vit_mnist" else "none"}


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the filters of the command line leave, in the order in which they run."""
    return [
        Case(network, weights, acts, ends, scales, technique)
        for ends in args.ends or ENDS
        for scales in args.scales or SCALES
        for weights, acts in DESIGNS
        if not args.design or f"{weights}/{acts}" in args.design
        for network in args.network or ("dscnn", "resnet8", "vit_mnist", "resnet20")
        for technique in args.technique or (*TECHNIQUES, *OURS)
        if technique not in OURS or (ends, scales) == ("same", "mse")
    ]


def measure_apart(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The case's row, measured in a fresh process; without figures, and `status` saying why, if it did not finish."""
    command = [sys.executable, __file__, "--data", args.data, "--threads", str(args.threads)]
    command += ["--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=_limit_cpu)
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        return _identity(case) | {"threads": args.threads, "status": f"stopped after {SECONDS_ALLOWED} s of CPU time"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return _identity(case) | {"threads": args.threads, "status": f"failed: {reason[:200]}"}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _limit_cpu() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS_ALLOWED, SECONDS_ALLOWED + 5))


def finished(path: Path) -> dict[Case, dict[str, str]]:
    """Rows of a work file by case, a later row of the same case replacing an earlier one; empty without a file."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {Case(*(row[field.name] for field in fields(Case))): row for row in csv.DictReader(file)}


def append(path: Path, row: dict[str, Any]) -> None:
    """Add the row to the work file, which is made, with its header, by the first one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Measure the cases that have no row yet; with --publish, write all rows there are to reports/."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="../shared/data/vision")
    parser.add_argument("--work", default="brevitas_vision_work", help="folder of cases.csv")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--network", nargs="+")
    parser.add_argument("--design", nargs="+", help="such as int4/int8")
    parser.add_argument("--technique", nargs="+")
    parser.add_argument("--ends", nargs="+", choices=ENDS)
    parser.add_argument("--scales", nargs="+", choices=SCALES)
    parser.add_argument("--retry", action="store_true", help="measure failed cases again")
    parser.add_argument("--publish", action="store_true", help="measure nothing; write reports/brevitas_vision.csv")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measured(Case(**json.loads(args.case)), args.data, args.threads)))
        return
    path = Path(args.work) / "cases.csv"
    rows = finished(path)
    if args.publish:
        _publish(rows, path)
        return
    for case in cases(args):
        if case in rows and not (args.retry and not rows[case]["status"].startswith("ok")):
            continue
        row = measure_apart(case, args)
        append(path, row)
        print("  ".join(str(row.get(column, "")) for column in COLUMNS if column not in ("loaded_mib",)), flush=True)


def _publish(rows: dict[Case, dict[str, str]], path: Path) -> None:
    from report import publish

    if not rows:
        raise SystemExit(f"error: {path} holds no rows; measure first (without --publish)")
    position = {case: i for i, case in enumerate(cases(argparse.Namespace(**dict.fromkeys(FILTERS))))}
    ordered = sorted(rows, key=lambda case: position.get(case, len(position)))
    publish("brevitas_vision", [rows[case] for case in ordered], packages=("torch", "brevitas"))


if __name__ == "__main__":
    main()
