"""Time of one forward: float policy, ours quantized, Brevitas, at batch 1 and 64 on one thread.

    python benchmarks/simulation_speed.py

An 8-64-64-4 tanh policy. "float policy" is the torch module from observation to network output
under inference_mode, what the quantized ones replace; "float network" is its nn.Sequential of
Linear and Tanh alone. Each figure is the best of several interleaved rounds.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
from brevitas_policy import BrevitasPolicy, brevitas_network
from report import publish
from torch import nn

from quantkit.model import Calib, Model
from quantkit.policy import Head, InputStage, Policy
from quantkit.recipe import quantize, uniform
from quantkit.simulate import compile_policy

FORMATS = (("int8", "int8"), ("int4", "int4"), ("e2m1", "e3m2"), ("e4m3", "e4m3"), ("ternary", "int4"))


def best_of(calls: dict[str, Callable[[], object]], rounds: int = 7, repeats: int = 300) -> dict[str, float]:
    """Microseconds per call, best over rounds; the candidates alternate so that noise hits all."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            n = repeats if best[name] < 500 else repeats // 10
            began = time.perf_counter()
            for _ in range(n):
                call()
            best[name] = min(best[name], (time.perf_counter() - began) / n * 1e6)
    return best


def main() -> None:
    """Measure and publish."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(
        OrderedDict(fc1=nn.Linear(8, 64), act1=nn.Tanh(), fc2=nn.Linear(64, 64), act2=nn.Tanh(), head=nn.Linear(64, 4))
    )
    policy = Policy(InputStage(), net, Head("discrete", (4,)), (8,)).eval()
    calib = Calib(torch.randn(2048, 8))
    model = Model(policy, torch.zeros(2, 8))
    ours = {f"{w} x {a}": compile_policy(quantize(model, uniform(w, a), calib).module) for w, a in FORMATS}
    peers = {
        "Brevitas int4 x int4": BrevitasPolicy(policy, brevitas_network(policy, calib.inputs)),
        "Brevitas e4m3 x e4m3": BrevitasPolicy(policy, brevitas_network(policy, calib.inputs, minifloat=True)),
    }
    rows = []
    for batch in (1, 64):
        obs = np.random.default_rng(0).standard_normal((batch, 8)).astype(np.float32)
        tensor = torch.from_numpy(obs)
        calls: dict[str, Callable[[], object]] = {
            "float policy": lambda tensor=tensor: policy(tensor),
            "float network": lambda tensor=tensor: net(tensor),
        }
        calls |= {name: (lambda f=f, obs=obs: f(obs)) for name, f in ours.items()}
        calls |= {name: (lambda p=p, obs=obs: p.outputs(obs)) for name, p in peers.items()}
        with torch.inference_mode():
            times = best_of(calls)
        whole, bare = times["float policy"], times["float network"]
        rows += [
            {
                "batch": batch,
                "network": name,
                "us": round(us, 1),
                "ratio_to_policy": round(us / whole, 2),
                "ratio_to_network": round(us / bare, 2),
            }
            for name, us in times.items()
        ]
    publish("simulation_speed", rows, packages=("torch", "brevitas", "numpy"))


if __name__ == "__main__":
    main()
