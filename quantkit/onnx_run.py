"""Running an exported file in onnxruntime: its outputs, and its actions in an environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from quantkit.errors import InputError, one_line
from quantkit.export import input_dtype, open_session
from quantkit.policy import Head

if TYPE_CHECKING:
    from quantkit.tasks.episodes import Actor

Act = Callable[[np.ndarray], np.ndarray]
"""Inputs (batch, ...) -> outputs or actions (batch, ...)."""


def onnx_act(path: Path, head: Head) -> Actor:
    """The actions of an exported policy as a numpy function, for `quantkit.tasks.episodes`; of one with states, too."""
    path = Path(path)
    session = session_of(path)
    as_actions = session.get_modelmeta().custom_metadata_map.get("postprocess") == "true"
    entry, *states = session.get_inputs()
    if not states:
        run = runner(session, path)
        return run if as_actions else lambda obs: head.actions(run(obs))
    from quantkit.tasks.episodes import Recalling

    def step(obs: np.ndarray, held: tuple[np.ndarray, ...]) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        kept = {state.name: part[0] for state, part in zip(states, held, strict=True)}
        out, *after = session.run(None, {entry.name: np.ascontiguousarray(obs, input_dtype(entry.type)), **kept})
        return out if as_actions else head.actions(out), tuple(part[None] for part in after)

    return Recalling(step, tuple((1, state.shape[1]) for state in states))


def onnx_outputs(path: Path) -> Act:
    """The first output of an exported file as a numpy function of its input."""
    return runner(session_of(Path(path)), Path(path))


def session_of(path: Path) -> onnxruntime.InferenceSession:
    """The file in onnxruntime; InputError if it is missing or cannot be loaded."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return open_session(path)
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise InputError(f"{path}: onnxruntime cannot load it ({one_line(error)})") from None


def runner(session: onnxruntime.InferenceSession, path: Path) -> Act:
    """The first output as a numpy function of the first input; InputError naming `path` where it cannot be run."""
    entry, name = session.get_inputs()[0], session.get_outputs()[0].name
    dtype = input_dtype(entry.type)
    single = entry.shape[0] == 1  # a file for FPGA tools takes one state at a time

    def run(x: np.ndarray) -> np.ndarray:
        if single and len(x) != 1:
            return np.concatenate([run(x[i : i + 1]) for i in range(len(x))])
        try:
            return np.asarray(session.run([name], {entry.name: np.ascontiguousarray(x, dtype)})[0])
        except Exception as error:
            raise InputError(f"{path}: onnxruntime cannot run it ({one_line(error)})") from None

    return run
