"""Two quadrotor controllers as modules, and their flights: what a study of quantized flight loads.

| name | network | observation | flies |
|---|---|---|---|
| l2f | 146-64-64-4, a rational tanh behind every layer | state (18) and the last 32 actions (4 each) | Crazyflie |
| raptor | 22-16 ReLU, GRU of 16, 4 | state (18) and the last action (4) | Crazyflie, x500, racing frame |

Both act at 100 Hz in the simulator of the data folder (`quad_sim.py`, numpy). A flight of 5 s starts up to 90 degrees
tilted, with velocity and rotation; it survives if it never is further than 2 m (l2f) or 5 m (raptor) from its goal.

Run: python benchmarks/quadrotors.py --data ../shared/data/quad    # flights of the float controllers
     python benchmarks/quadrotors.py --write raptor                # what `quantkit quantize` takes of RAPTOR:
     quantkit quantize raptor/raptor.safetensors --factory benchmarks.quadrotors:Raptor \\
         --inputs raptor/flights.npy --env benchmarks.quadrotor_env:Crazyflie-v0 -o raptor.q --weights int8 --acts int8
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantkit.errors import InputError
from quantkit.recurrent import Unrolled

NAMES = ("l2f", "raptor")
FILES = {"l2f": "l2f_crazyflie_mlp.safetensors", "raptor": "raptor_gru.safetensors"}
AIRFRAMES = ("crazyflie", "x500", "race")
STEPS, HISTORY, HIDDEN = 500, 32, 16
TOO_FAR = {"l2f": 2.0, "raptor": 5.0}
LAST_SECOND = 100
CALIBRATION = 12


def fast_tanh(x: Tensor) -> Tensor:
    """x (27 + x²) / (27 + 9 x²) of x clipped to [-3, 3]: the activation that l2f was trained with."""
    x = x.clamp(-3, 3)
    return x * (27 + x * x) / (27 + 9 * x * x)


class L2F(nn.Module):
    """Observations (batch, 146) -> actions (batch, 4) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_0, self.layer_1, self.layer_2 = nn.Linear(146, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layer_0, self.layer_1, self.layer_2):
            x = fast_tanh(layer(x))
        return x


class Raptor(nn.Module):
    """Observations of whole flights (batch, time, 22) -> actions (batch, time, 4), not clipped; state 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(22, HIDDEN), nn.Linear(HIDDEN, 4)
        self.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.gru(torch.relu(self.inputs(x)))
        return self.outputs(hidden)


def load(name: str, data: str | Path) -> nn.Module:
    """The trained controller `name` of NAMES, in eval mode. InputError for another name and for a missing file."""
    if name not in NAMES:
        raise InputError(f"unknown controller {name!r}; accepted: {', '.join(NAMES)}")
    state = load_file(_file(Path(data), FILES[name]))
    module: nn.Module = L2F() if name == "l2f" else Raptor()
    if name == "raptor":
        if state.pop("h0").any():
            raise InputError(f"{FILES[name]}: h0 is not zero, and this network starts at zero")
        state = {new: state[old] for new, old in _RAPTOR.items()}
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


_RAPTOR = {
    **{f"inputs.{kind}": f"{kind[0]}0" for kind in ("weight", "bias")},
    **{f"gru.{kind}_ih_l0": f"{kind[0]}i" for kind in ("weight", "bias")},
    **{f"gru.{kind}_hh_l0": f"{kind[0]}h" for kind in ("weight", "bias")},
    **{f"outputs.{kind}": f"{kind[0]}2" for kind in ("weight", "bias")},
}


@dataclass(frozen=True)
class Flights:
    """survived (n,) bool; error_m (n,): mean distance from the goal in the last second, NaN or huge after a crash.

    inputs: what the controller saw, (steps, n, inputs) float32.
    """

    survived: np.ndarray
    error_m: np.ndarray
    inputs: np.ndarray


def fly(
    module: nn.Module | Act, name: str, data: str | Path, *, flights: int, seed: int, steps: int = STEPS
) -> Flights:
    """`flights` flights of a controller, float or quantized, shared evenly by its airframes; deterministic.

    module: or RAPTOR as a function from observations (flights, 22) to actions (flights, 4) that keeps its states.
    An airframe's starts depend on `seed` and on its number of flights only, so controllers meet the same ones.
    """
    sims = _simulators(name, Path(data), flights, seed)
    ends = np.cumsum([0, *(sim.n for sim in sims)])
    hover = np.concatenate([np.full((sim.n, 4), sim.hover_action) for sim in sims])
    controller: Controller
    if isinstance(module, nn.Module):
        controller = _l2f(module, hover) if name == "l2f" else _raptor(module, hover)
    else:
        controller = _stepping(module, hover)
    dead, near, seen = np.zeros(len(hover), bool), [], []
    with np.errstate(all="ignore"), torch.inference_mode():
        for step in range(steps):
            x, action = controller(np.concatenate([sim.obs() for sim in sims]))
            seen.append(x)
            for sim, first, end in zip(sims, ends, ends[1:], strict=False):
                sim.step(action[first:end])
            distance = np.concatenate([np.linalg.norm(sim.x, axis=1) for sim in sims])
            dead |= ~(distance <= TOO_FAR[name])  # also NaN
            if step >= steps - LAST_SECOND:
                near.append(distance)
            if dead.all():
                break
    error = np.mean(near, axis=0) if near and not dead.all() else np.full(len(hover), np.nan)
    return Flights(~dead, error, np.stack(seen))


Controller = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""States (n, 18) -> what the network saw (n, inputs) float32, and actions (n, 4)."""


Act = Callable[[np.ndarray], np.ndarray]


def _stepping(act: Act, hover: np.ndarray) -> Controller:
    last = hover

    def fly_on(observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal last
        x = np.concatenate([observed, last], axis=1).astype(np.float32)
        last = act(x).clip(-1, 1)
        return x, last

    return fly_on


def _l2f(module: nn.Module, hover: np.ndarray) -> Controller:
    past = np.repeat(hover[:, None], HISTORY, axis=1)

    def act(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal past
        x = np.concatenate([state, past.reshape(len(past), -1)], axis=1).astype(np.float32)
        action = module(torch.from_numpy(x)).numpy()
        past = np.concatenate([past[:, 1:], action[:, None]], axis=1)
        return x, action

    return act


def _raptor(module: nn.Module, hover: np.ndarray) -> Controller:
    """One step of the network at a time: its GRU, float or quantized, is called with the state it left."""
    inputs, gru, outputs = module.inputs, module.gru, module.outputs
    assert isinstance(gru, nn.GRU | Unrolled)
    assert callable(inputs) and callable(outputs)
    last, state = hover, torch.zeros(1, len(hover), HIDDEN)

    def act(observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal last, state
        x = np.concatenate([observed, last], axis=1).astype(np.float32)
        hidden, state = gru(torch.relu(inputs(torch.from_numpy(x)[:, None])), state)
        last = outputs(hidden)[:, 0].clamp(-1, 1).numpy()
        return x, last

    return act


def _simulators(name: str, data: Path, flights: int, seed: int) -> list[Any]:
    spec = importlib.util.spec_from_file_location("quad_sim", _file(data, "quad_sim.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name == "l2f":
        return [module.Quad(module.CRAZYFLIE_L2F, flights, seed)]
    if flights % len(AIRFRAMES):
        raise InputError(f"{flights} flights cannot be shared by {len(AIRFRAMES)} airframes; give a multiple")
    each = flights // len(AIRFRAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the simulator leaves its files open
        frames = [module.from_raptor_json(str(_file(data / "params", f"{frame}.json"))) for frame in AIRFRAMES]
    return [module.Quad(frame, each, seed + i, max_pos=0.5) for i, frame in enumerate(frames)]


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise InputError(f"{folder} has no {name}; give --data the folder of the quadrotor controllers")
    return folder / name


def visited(module: nn.Module, name: str, data: Path, flights: int = 24) -> Tensor:
    """What a controller sees on those of so many flights that it survives.

    Every fifth state of l2f, (states, 146); the first 200 steps of RAPTOR's flights, (flights, 200, 22).
    """
    flown = fly(module, name, data, flights=flights, seed=900)
    inputs = torch.from_numpy(flown.inputs[:, flown.survived])  # (steps, flights, inputs)
    return (inputs[::5].flatten(0, 1) if name == "l2f" else inputs[:200].transpose(0, 1)).contiguous()


def calibration(data: Path) -> Tensor:
    """What the float RAPTOR sees on flights that it survives: (flights, 200, 22)."""
    flown = fly(load("raptor", data), "raptor", data, flights=CALIBRATION, seed=900, steps=200)
    return torch.from_numpy(flown.inputs[:, flown.survived]).transpose(0, 1).contiguous()


def write(data: Path, folder: Path) -> None:
    """RAPTOR's tensors under the module's names, and calibration flights, as files that `quantkit quantize` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(load("raptor", data).state_dict(), folder / "raptor.safetensors")
    np.save(folder / "flights.npy", calibration(data).numpy())
    print(f"wrote {folder}/raptor.safetensors and {folder}/flights.npy")


def main() -> None:
    """Print how the float controllers fly, or write RAPTOR's files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/quad"))
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    data = args.data
    if args.write is not None:
        write(data, args.write)
        return
    for name in NAMES:
        result = fly(load(name, data), name, data, flights=198, seed=0)
        error = float(result.error_m[result.survived].mean())
        print(f"{name}: {100 * result.survived.mean():.1f} % of 198 flights survive, {error:.3f} m off at the end")


if __name__ == "__main__":
    main()
