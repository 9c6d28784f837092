"""What a picked design is shown to do: its ONNX files against the simulation, and scores that no choice has seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.export import export_onnx
from quantkit.model import Model
from quantkit.onnx_run import onnx_outputs
from quantkit.study import labelled_inputs, policy_of, verify_export
from quantkit.sweep import digest
from quantkit.tasks.accuracy import Labelled, answers
from quantkit.tasks.episodes import Progress, compare_scores, evaluate_policy
from quantkit.verify import verify

STATES, QONNX_STATES = 512, 256


def export_policy(
    model: Model, place: Path, states: Any, episodes: int, seed: int, progress: Progress | None
) -> dict[str, Any]:
    """policy.onnx, compared with torch on states and whole episodes, and policy.qonnx.onnx, or why there is none."""
    path = place / "policy.onnx"
    export_onnx(model, path, postprocess=True)
    found = verify_export(model, path, episodes=episodes, seed=seed, progress=progress).to_json()
    return {"file": path.name, "verified": found, **_qonnx(model, place, "policy", states)}


def export_network(model: Model, place: Path, labelled: Labelled, progress: Progress | None) -> dict[str, Any]:
    """network.onnx, compared with torch on labelled inputs, and network.qonnx.onnx, or why there is none.

    Outputs of the first STATES inputs, node by node where they differ, and the accuracy on all: what an `Agreement`
    says of episodes and returns is of inputs and right answers here.
    """
    path, states = place / "network.onnx", labelled.inputs.numpy()
    export_onnx(model, path)
    found = verify(model, path, states=states[:STATES]).to_json()
    run = onnx_outputs(path)
    theirs = answers(lambda x: torch.from_numpy(run(x.numpy())), labelled.inputs, labelled.labels, progress=progress)
    ours = answers(model.module, labelled.inputs, labelled.labels)
    found |= {"episodes": len(ours), "equal_returns": int((ours == theirs).sum())}
    found |= {"mean": float(theirs.mean()), "mean_torch": float(ours.mean())}
    return {"file": path.name, "verified": found, **_qonnx(model, place, "network", states)}


def _qonnx(model: Model, place: Path, stem: str, states: Any) -> dict[str, Any]:
    path = place / f"{stem}.qonnx.onnx"
    try:
        export_onnx(model, path, to="qonnx")
        agreement = verify(model, path, states=states[:QONNX_STATES]).to_json()
    except InputError as error:
        path.unlink(missing_ok=True)
        return {"qonnx": None, "qonnx_verified": None, "qonnx_missing": str(error).replace(f"{place}/", "")}
    return {"qonnx": path.name, "qonnx_verified": agreement, "qonnx_missing": None}


def confirm_policy(
    design: Model, model: Model, margin: float, episodes: int, first: int, progress: Progress | None
) -> dict[str, Any]:
    """Scores and verdict of design and float on the seeds from `first` on, which no choice has seen."""
    scores = []
    for index, one in enumerate((model, design)):
        policy, spec = policy_of(one)
        tick: Progress | None = None
        if progress is not None:

            def tick(done: int, _: int, base: int = index * episodes) -> None:
                assert progress is not None
                progress(base + done, 2 * episodes)

        scores.append(evaluate_policy(policy, spec, episodes=episodes, seed=first, progress=tick))
    verdict = compare_scores(scores[0], scores[1], margin)
    return {"reference": scores[0].to_json(), "score": scores[1].to_json(), "verdict": verdict.to_json()}


def confirm_network(
    design: Model, model: Model, margin: float, seen: Labelled, inputs: Path, labels: Path
) -> dict[str, Any]:
    """Scores and verdict of design and float on the labelled inputs of the files that the study has not seen.

    InputError if these are fewer than two.
    """
    given = labelled_inputs(model, inputs, labels, inputs)
    known = {_bytes(row) for part in (seen.inputs, seen.calibration) for row in part}
    new = np.array([_bytes(row) not in known for row in given.inputs])
    if new.sum() < 2:
        raise InputError(f"{inputs}: the study has seen {(~new).sum()} of its {len(new)} inputs; give others")
    fresh = Labelled(given.inputs[torch.from_numpy(new)], given.labels[new], given.calibration)
    scores = [fresh.score(one.module) for one in (model, design)]
    verdict = compare_scores(scores[0], scores[1], margin)
    record = {"reference": scores[0].to_json(), "score": scores[1].to_json(), "verdict": verdict.to_json()}
    return record | {"inputs": inputs.name, "seen": int((~new).sum())}


def _bytes(row: Tensor) -> bytes:
    return row.numpy().tobytes()


def study_inputs(document: Mapping[str, Any], folder: Path, model: Model) -> Labelled:
    """The labelled inputs of a network's study, from the files that it remembers; InputError if they are others."""
    origin = document.get("origin") or {}
    inputs, labels = (Path(origin.get(name) or "") for name in ("inputs", "labels"))
    for path in (inputs, labels):
        if not path.is_file():
            raise InputError(f"the labelled inputs of {folder} are not where they were: {path} is no file")
    found = labelled_inputs(model, inputs, labels, folder / "calibration.npy")
    if digest(found.inputs.numpy(), found.labels) != document["settings"]["labelled"]:
        raise InputError(f"{inputs} and {labels} hold other inputs or labels than those of {folder}")
    return found
