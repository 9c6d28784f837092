"""A design of a study quantized again, from the checkpoint and the study's own calibration states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit.errors import InputError
from quantkit.loading import load_checkpoint
from quantkit.model import Calib, Model
from quantkit.policy import Policy
from quantkit.recipe import Recipe, quantize
from quantkit.report import normalize_of
from quantkit.results import Row
from quantkit.study import design_id, visited_states


def study_model(
    document: Mapping[str, Any], folder: Path, checkpoint: Path | None = None, factory: str | None = None
) -> Model:
    """The float model of a study, from `checkpoint` or where the study remembers it; InputError if it is another.

    factory: builds a network, whose code a study may name and only the caller may run.
    """
    settings, origin = document["settings"], document.get("origin") or {}
    path = checkpoint or (Path(origin["path"]) if origin.get("path") else None)
    if path is None or (checkpoint is None and not path.exists()):
        raise InputError(
            f"the checkpoint of {folder} ({settings.get('checkpoint')}) is not where it was; give --checkpoint"
        )
    if origin.get("factory") and factory is None:
        raise InputError(f"{folder} is of a network of your own code; give --factory {origin['factory']} to build it")
    inputs = folder / "calibration.npy" if settings.get("labelled") else None
    model = load_checkpoint(
        path, env=origin.get("env"), normalize=normalize_of(document), factory=factory, inputs=inputs
    )
    if model.meta.get("sha256") != settings.get("checkpoint_sha256"):
        theirs, ours = (str(v)[:12] for v in (model.meta.get("sha256"), settings.get("checkpoint_sha256")))
        raise InputError(f"{path} is another checkpoint (sha256 {theirs}) than that of {folder} ({ours})")
    return model


def study_states(folder: Path, model: Model) -> np.ndarray:
    """The calibration states of a study; InputError if they are gone or not the model's."""
    path = folder / "calibration.npy"
    try:
        states: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise InputError(f"{path}: missing or damaged; run the sweep again in a new directory") from None
    if states.shape[1:] != tuple(model.example.shape[1:]):
        raise InputError(f"{path}: states of shape {states.shape} do not fit the model's {model.example.shape[1:]}")
    return states


def rebuild(row: Row, model: Model, states: np.ndarray) -> Model:
    """The design of a row, quantized as the study did it; InputError if the row's recipe has another id."""
    recipe = Recipe.from_json(row["recipe"])
    if design_id(recipe) != row["id"]:
        raise InputError(f"design {row['id']}: its recipe is that of {design_id(recipe)}; the study's rows are damaged")
    visit = visited_states if isinstance(model.module, Policy) else None
    return quantize(model, recipe, Calib(torch.from_numpy(states), visit=visit))
