"""Integers against minifloats after training: quality, LUTs per MAC and weight memory of networks, flights and agents.

    python benchmarks/minifloat_vs_integer.py --data ../shared/data --work FOLDER --publish

The question and the axes are those of Aggarwal et al., "Shedding the Bits", FPL 2024 (arXiv 2311.12359); the networks,
the techniques and the cost model are ours. Every pair of 3 to 8 weight bits and 3 to 8 activation bits is quantized as
integers and as minifloats ExMy (E >= 1, M >= 0). A pair of widths takes the ExMy of least quantization noise, of the
weights and of the calibration activations (mean over layers of the signal to noise ratio in dB); where both widths are
equal, every ExMy is also paired with itself. All layers, first and last ones included, have the same formats; scales
are float32, per row of weights and per tensor of activations. Integers of inputs that are never negative are unsigned.

| networks | calibrate on | scored on | techniques |
|---|---|---|---|
| 4 of vision_networks.py | 250 inputs (dscnn: 200) | accuracy on 1,000 (800) test inputs | fast, rtn, adaround |
| 2 of quadrotors.py | states of 24 float flights | survival of 198 flights from other starts | gptq, rtn, adaround |
| 7 agents of rl-zoo | 2,048 states of float episodes | return of 20 (walker, swimmer: 10) episodes | fast, rtn |

fast is the preset of the kind, for networks GPTQ behind activation scales of least error at the outputs. adaround is
followed by bias_correction, on networks it has these scales, too: of least error at the inputs they give DS-CNN at
int7/int6 80 instead of 86 %. gptq stands between equalize, smoothquant and bias_correction (the first two do nothing
where no channels can be rescaled). Fewer calibration images than a deployment would take
are for speed: with 1,000, ResNet-20, ResNet-8 and the ViT at e2m1/e2m1 scored within 2.1 points of these.

--work keeps a JSON line per design and technique, so a run that was cut off goes on where it was. The order makes any
prefix a study: equal widths first, one network after the other, integers next to minifloats.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import quadrotors
import torch
import vision_networks
from minifloat_report import publish_study
from torch import Tensor, nn

from hwmodel.cost import HwError
from hwmodel.devices import find_device
from hwmodel.estimate import estimate
from hwmodel.formats import Format, minifloats, parse
from hwmodel.mac import mac_cost
from hwmodel.spec import LayerSpec
from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.loading import load_checkpoint
from quantkit.model import Calib, Model
from quantkit.observers import spread
from quantkit.presets import preset_steps
from quantkit.qtensor import fit_groups
from quantkit.recipe import Step, quantize, uniform
from quantkit.results import Row, append_row, read_rows, versions
from quantkit.rounding import round_to
from quantkit.specs import bits_per_weight, layer_specs
from quantkit.study import Settings, policy_of, visited_states
from quantkit.sweep import open_study
from quantkit.tasks.episodes import act_of, evaluate

WIDTHS = (8, 6, 4, 3, 5, 7)
"""Bits, in the order of evaluation."""
AGENTS = {
    "cartpole": ("ppo/CartPole-v1_1", 20),
    "acrobot": ("dqn/Acrobot-v1_1", 20),
    "pendulum": ("sac/Pendulum-v1_1", 20),
    "lunarlander": ("ppo/LunarLander-v2_1", 20),
    "lunarlander_continuous": ("trpo/LunarLanderContinuous-v2_1", 20),
    "bipedalwalker": ("a2c/BipedalWalker-v3_1", 10),
    "swimmer": ("ppo/Swimmer-v3_1", 10),
}
NETWORKS = (*vision_networks.NAMES, *quadrotors.NAMES, *AGENTS)
GPTQ: tuple[Step, ...] = (
    ("equalize", {}),
    ("smoothquant", {"explicit": False}),
    ("gptq", {"act_order": True}),
    ("bias_correction", {}),
)
ADAROUND: tuple[Step, ...] = (("adaround", {"steps": 300}), ("bias_correction", {}))
TECHNIQUES: dict[str, dict[str, tuple[Step, ...]]] = {
    "vision": {
        "fast": preset_steps("fast", "network"),
        "rtn": (),
        "adaround": (("act_scales", {"scale": "output"}), *ADAROUND),
    },
    "flight": {"gptq": GPTQ, "rtn": (), "adaround": ADAROUND},
    "policy": {"fast": preset_steps("fast"), "rtn": ()},
}
"""Techniques of a kind of network, the one tried first in front."""
SETTINGS = {"calibration_images": 250, "test_images": 1000, "flights": 198, "calibration_flights": 24, "seed": 1000}
SQNR_SAMPLES = 4096
DEVICE = "xc7z020"


@dataclass(frozen=True)
class Task:
    """A network of the study. score: the outcome of every image (1 correct), flight (1 survived) or episode (return).

    chance: the mean outcome of guessing, of a crash, or of random actions.
    """

    name: str
    kind: str
    model: Model
    calib: Calib
    score: Callable[[Model], np.ndarray]
    chance: float


@dataclass(frozen=True, order=True)
class Design:
    """Formats of all weights and all activations.

    group: "equal" widths, the "same" ExMy on both sides (E <= 3; "wide": E >= 4), or "other" pairs of widths.
    """

    group: str
    weights: str
    acts: str

    @property
    def family(self) -> str:
        """ "integer" or "minifloat"."""
        return "minifloat" if self.weights.startswith("e") else "integer"


def make_task(name: str, data: Path, work: Path) -> Task:
    """The float network with its calibration set and its measure."""
    if name in vision_networks.NAMES:
        return _vision(name, data / "vision")
    if name in quadrotors.NAMES:
        return _flight(name, data / "quad")
    return _policy(name, data / "rl-zoo", work)


def _vision(name: str, data: Path) -> Task:
    network = vision_networks.load(name, data)
    model = captured(Model(network.module, network.example, None, {}))
    x, y = network.test_x[: SETTINGS["test_images"]], network.test_y[: SETTINGS["test_images"]]
    classes = vision_networks.outputs(network.module, network.example).shape[1]

    def score(model: Model) -> np.ndarray:
        return (vision_networks.outputs(model.module, x).argmax(1) == y).numpy()

    calib = Calib(network.calib[: SETTINGS["calibration_images"]], batch=250)
    return Task(name, "vision", model, calib, score, 1 / classes)


def _flight(name: str, data: Path) -> Task:
    module = quadrotors.load(name, data)
    inputs = quadrotors.visited(module, name, data, SETTINGS["calibration_flights"])

    def score(model: Model) -> np.ndarray:
        return quadrotors.fly(model.module, name, data, flights=SETTINGS["flights"], seed=0).survived

    return Task(name, "flight", captured(Model(module, inputs[:1].clone(), None, {})), Calib(inputs), score, 0.0)


def _policy(name: str, data: Path, work: Path) -> Task:
    folder, episodes = AGENTS[name]
    seed = SETTINGS["seed"]
    study = open_study(work / name, load_checkpoint(data / folder), Settings(episodes=episodes, seed=seed))

    def score(model: Model) -> np.ndarray:
        policy, spec = policy_of(model)
        return np.array(evaluate(act_of(policy), spec, episodes=episodes, seed=seed).returns)

    calib = Calib(torch.from_numpy(study.states), visit=visited_states)
    return Task(name, "policy", study.model, calib, score, study.random.mean)


def floats_of(width: int) -> list[str]:
    """Every ExMy of so many bits, E >= 1 and M >= 0.

    >>> floats_of(4)
    ['e1m2', 'e2m1', 'e3m0']
    """
    return [str(fmt) for fmt in minifloats(width)]


def least_noise(task: Task) -> dict[str, dict[str, float]]:
    """Mean over layers of the SQNR in dB of every ExMy, {"weights": {"e2m1": ...}, "acts": {...}}, scales fitted."""
    layers, points = task.model.layers(), task.model.points()
    seen: dict[str, list[Tensor]] = {name: [] for name in (*layers, *points)}

    def see(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name].append(_sampled(args[0].detach().flatten().float()))

        return hook

    handles = [part.register_forward_pre_hook(see(name)) for name, part in (layers | points).items()]
    with torch.no_grad():
        task.model.module(next(iter(task.calib.batches())))
    for handle in handles:
        handle.remove()
    samples = [torch.cat(parts) for parts in seen.values() if parts]
    acts = [_sampled(x).reshape(1, 1, -1) for x in samples if x.any()]
    weights = [layer.weight.detach().flatten(1).unsqueeze(1) for layer in layers.values()]
    formats = [parse(name) for width in sorted(WIDTHS) for name in floats_of(width)]
    return {
        "weights": {str(fmt): float(np.mean([_sqnr(x, fmt) for x in weights])) for fmt in formats},
        "acts": {str(fmt): float(np.mean([_sqnr(x, fmt) for x in acts])) for fmt in formats},
    }


def _sampled(x: Tensor) -> Tensor:
    at = spread(x.numel(), SQNR_SAMPLES)  # a fixed step would see some channels or columns of an image only
    return x if at is None else x[at]


def _sqnr(x: Tensor, fmt: Format) -> float:
    scale = fit_groups(x, fmt, "mse").unsqueeze(-1)
    noise = (round_to(x / scale, fmt) * scale - x).double().square().sum()
    return float(10 * torch.log10(x.double().square().sum() / noise.clamp_min(1e-30)))


def best_floats(noise: dict[str, dict[str, float]], least_exponent: int = 1) -> dict[str, dict[int, str]]:
    """The ExMy of most SQNR of every width, for weights and for acts, among those of E >= `least_exponent`."""
    return {
        side: {width: max(floats_of(width)[least_exponent - 1 :], key=table.__getitem__) for width in WIDTHS}
        for side, table in noise.items()
    }


def designs(noise: dict[str, dict[str, float]]) -> list[Design]:
    """Every design of a network once: equal widths, same ExMy on both sides, other pairs of widths.

    E1My are narrow integers by another name. Where the least noise has E1 on both sides, the pair of least noise
    with E >= 2 is a design, too.
    """
    found: dict[tuple[str, str], Design] = {}
    best, proper = best_floats(noise), best_floats(noise, 2)

    def add(group: str, weights: str, acts: str) -> None:
        found.setdefault((weights, acts), Design(group, weights, acts))

    def pair(group: str, w: int, a: int) -> None:
        weights, acts = best["weights"][w], best["acts"][a]
        add(group, f"int{w}", f"int{a}")
        add(group, weights, acts)
        if weights.startswith("e1") and acts.startswith("e1"):
            add(group, proper["weights"][w], proper["acts"][a])

    for width in WIDTHS:
        pair("equal", width, width)
    for width in WIDTHS:
        for name in floats_of(width):
            add("same" if parse(name).exp <= 3 else "wide", name, name)  # type: ignore[union-attr]
    for w, a in sorted(product(WIDTHS, WIDTHS), key=lambda pair: (abs(pair[0] - pair[1]), -sum(pair), pair)):
        pair("other", w, a)
    return list(found.values())


STAGES = (
    *(("equal", 0), ("equal", 1), ("same", 0), ("equal", 2), ("other", 0), ("wide", 0)),
    *(("same", 1), ("other", 1), ("wide", 1), ("same", 2), ("other", 2), ("wide", 2)),
)
"""(group, place of the technique in TECHNIQUES), in the order of evaluation."""


SHARE = {"vision": 1, "flight": 2, "policy": 2}
"""Designs per turn: a vision network's take the longest."""


def schedule(plans: dict[str, list[Design]], kinds: dict[str, str]) -> Iterator[tuple[str, Design, str]]:
    """(network, design, technique) of the whole study; every network goes through its stages, and they take turns."""
    queues = {
        name: [
            (name, design, technique)
            for group, place in STAGES
            for technique in list(TECHNIQUES[kinds[name]])[place : place + 1]
            for design in plan
            if design.group == group
        ]
        for name, plan in plans.items()
    }
    while any(queues.values()):
        for name, queue in queues.items():
            yield from queue[: SHARE[kinds[name]]]
            del queue[: SHARE[kinds[name]]]


def row_id(network: str, design: Design, technique: str) -> str:
    """What a row is known by."""
    return f"{network} {design.weights} {design.acts} {technique}"


def evaluate_row(task: Task, design: Design, technique: str) -> Row:
    """One design by one technique; `error` where the formats cannot be used together."""
    began, cpu = time.perf_counter(), time.process_time()
    row: Row = {
        "id": row_id(task.name, design, technique),
        "network": task.name,
        "kind": task.kind,
        **asdict(design),
        "family": design.family,
        "technique": technique,
    }
    try:
        recipe = uniform(design.weights, design.acts, steps=TECHNIQUES[task.kind][technique])
        quantized = quantize(task.model, recipe, task.calib)
        specs = layer_specs(quantized)
        row |= hardware(specs)
        if design.group == "equal" and technique == "rtn":
            row |= folded(specs)
    except (InputError, HwError) as error:
        return row | {"error": str(error)}
    bits = bits_per_weight(quantized)
    row["weight_kib"] = bits * sum(layer.weight.numel() for layer in quantized.layers().values()) / 8192
    row["quantize_seconds"] = time.perf_counter() - began
    row |= outcomes_json(task.score(quantized))
    return row | {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}


def hardware(specs: Sequence[LayerSpec]) -> dict[str, float]:
    """LUTs of the dearest layer's MAC with the network's widest exact accumulator: one lane, and one of 32 lanes."""
    acc = max(spec.acc_bits or 1 for spec in specs)

    def luts(lanes: int) -> float:
        costs = [
            mac_cost(s.weight, s.act, acc, lanes).luts for s in specs if s.weight is not None and s.act is not None
        ]
        return max(costs) / lanes

    return {"acc_bits": acc, "luts_mac": luts(1), "luts_mac32": luts(32)}


def folded(specs: Sequence[LayerSpec]) -> dict[str, float]:
    """LUTs and cycles of the whole network at the estimate's default speed."""
    result = estimate(specs, find_device(DEVICE))
    return {"folded_luts": result.luts, "folded_dsps": result.dsps, "folded_cycles": result.cycles}


def outcomes_json(outcomes: np.ndarray) -> dict[str, Any]:
    """Mean, standard error and the outcomes themselves, bits in hexadecimal or numbers, as JSON values."""
    values = outcomes.astype(np.float64)
    packed = np.packbits(outcomes).tobytes().hex() if outcomes.dtype == bool else [round(float(v), 6) for v in values]
    return {
        "quality": float(values.mean()),
        "stderr": float(values.std(ddof=1) / np.sqrt(len(values))),
        "n": len(values),
        "outcomes": packed,
    }


def prepare(task: Task, work: Path) -> dict[str, Any]:
    """What is known of the float network: its outcomes, chance, and the noise of every ExMy; kept in --work."""
    path = work / f"{task.name}.json"
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        return known
    began = time.perf_counter()
    facts = {"network": task.name, "kind": task.kind, "chance": task.chance, "sqnr_db": least_noise(task)}
    facts["weights"] = sum(layer.weight.numel() for layer in task.model.layers().values())
    facts |= outcomes_json(task.score(task.model))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts, indent=1) + "\n")
    temporary.rename(path)
    print(f"{task.name}: float {facts['quality']:.4g}, prepared in {time.perf_counter() - began:.1f} s", flush=True)
    return facts


def open_work(work: Path) -> None:
    """Make the folder, or check that what is in it was measured with the same settings."""
    facts = json.loads(json.dumps({"settings": SETTINGS, "techniques": TECHNIQUES, "agents": AGENTS}))
    path = work / "settings.json"
    if path.is_file():
        if json.loads(path.read_text())["facts"] != facts:
            raise InputError(f"{work} holds rows of other settings than this version's; give another folder")
        return
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"facts": facts, "versions": versions()}, indent=1) + "\n")


class Clock:
    """Seconds left, from the mean time of each network's techniques so far."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.spent: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            self.note(row)

    def note(self, row: Row) -> None:
        if "seconds" in row:
            self.spent.setdefault((row["network"], row["technique"]), []).append(row["seconds"])

    def left(self, todo: Sequence[tuple[str, Design, str]]) -> float:
        means = {key: float(np.mean(times[-8:])) for key, times in self.spent.items()}
        usual = float(np.mean(list(means.values()))) if means else 0.0
        return sum(means.get((network, technique), usual) for network, _, technique in todo)


def run(tasks: dict[str, Task], work: Path, minutes: float) -> None:
    """Evaluate what is missing, in order, for at most so many minutes."""
    began = time.monotonic()
    plans = {name: designs(prepare(task, work)["sqnr_db"]) for name, task in tasks.items()}
    path = work / "rows.jsonl"
    rows = read_rows(path)
    done, clock = {row["id"] for row in rows}, Clock(rows)
    every = list(schedule(plans, {name: task.kind for name, task in tasks.items()}))
    todo = [item for item in every if row_id(*item) not in done]
    for index, (network, design, technique) in enumerate(todo):
        if time.monotonic() - began > 60 * minutes:
            return
        row = evaluate_row(tasks[network], design, technique)
        append_row(path, row)
        clock.note(row)
        told = row.get("error") or f"{row['quality']:.4g}, {row['luts_mac']:.0f} LUT/MAC, {row['seconds']:.1f} s"
        place = (
            f"[{len(every) - len(todo) + index + 1}/{len(every)}, {clock.left(todo[index + 1 :]) / 60:.0f} min left]"
        )
        print(f"{place} {row['id']}: {told}", flush=True)


def planned(work: Path, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Designs and rows of the whole study of each network that was begun."""
    facts = [json.loads((work / f"{n}.json").read_text()) for n in names if (work / f"{n}.json").is_file()]
    counts = {f["network"]: (len(designs(f["sqnr_db"])), len(TECHNIQUES[f["kind"]])) for f in facts}
    return {name: (some, some * techniques) for name, (some, techniques) in counts.items()}


def main() -> None:
    """Evaluate, then publish if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with vision, quad and rl-zoo")
    parser.add_argument("--work", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks, with commas between")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop starting designs after so long")
    parser.add_argument("--publish", action="store_true", help="write reports/minifloat_vs_integer of what is there")
    args = parser.parse_args()
    names = args.only.split(",")
    for name in names:
        if name not in NETWORKS:
            raise InputError(f"unknown network {name!r}; accepted: {', '.join(NETWORKS)}")
    torch.set_num_threads(1)
    open_work(args.work)
    if args.minutes > 0:
        run({name: make_task(name, args.data, args.work) for name in names}, args.work, args.minutes)
    if args.publish:
        publish_study(args.work, planned(args.work, names))


if __name__ == "__main__":
    main()
