"""Verification of an exported file: torch against onnxruntime on real states and whole episodes.

What may differ. With target "qdq" the sums of a quantized network are exact (wide convolutions
excepted, see `quantkit.export`) and both sides agree bit for bit, except where a transcendental
activation (tanh, sigmoid, GELU, ELU: libraries differ in the last bit) or a float layer comes
first. Such a difference of one part in 10^7 is invisible, unless it falls on the boundary between
two grid values: then one value rounds the other way and the output moves by what one step of that
layer is worth. Every state that deviates is checked for this. A deviation with no value near a
boundary has no innocent explanation: the file is wrong, and `ok` is False.

A network that is no policy is deep and may flip somewhere in every input. Its file is compared node by node
(`quantkit.verify_graph`) on the first inputs and on all that deviate: exact sums bit for bit, everything else within
float rounding, each node on the file's own values. There an input is explained if no node is wrong.

A recurrent network's file takes one step, and its states carry a difference on. It is run over whole sequences with its
own states, and torch takes every step from the states that the file had: what is compared are single steps, their
outputs and states, and again the nodes. Of a recurrent policy whole episodes are played as well, both sides with their
own states.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnxruntime
import torch
from torch import fx, nn

from hwmodel import formats
from quantkit import stepwise
from quantkit.errors import InputError, one_line
from quantkit.export import canonical, input_dtype
from quantkit.model import Model
from quantkit.onnx_run import Act, onnx_act, runner, session_of
from quantkit.policy import Policy
from quantkit.qlayers import QLayer
from quantkit.qtensor import QTensor
from quantkit.simulate import compile_policy
from quantkit.statistics import t_quantile
from quantkit.ties import at_boundary, near_tie, same_actions, torch_outputs
from quantkit.verify_graph import stepper

if TYPE_CHECKING:
    from quantkit.tasks.episodes import Actor

Progress = Callable[[str, int, int], None]

OUTPUT_TOLERANCE = 1e-5
"""Outputs agree within this part of the largest torch output; several times float32 rounding of a deep network."""
MIN_AGREEMENT, MAX_FLIPS = 0.99, 0.05
"""How many states must keep their action, and how many may deviate by boundaries, for `ok`."""
_BATCH = 1024
_FIRST = 4  # inputs that are always compared node by node


class Evaluate(Protocol):
    """Returns of `episodes` episodes with seeds seed, seed + 1, ...: an array (episodes,)."""

    def __call__(self, act: Actor, *, episodes: int, seed: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Agreement:
    """How well an ONNX file in onnxruntime agrees with the torch policy.

    n: states compared. compared: "outputs" of the network, or "actions" if the file computes those.
    max_abs: largest absolute difference. max_lsb: the same in LSBs of the last layer, the step of
    its products (input scale * weight scale of that output * steps of the two formats; for
    groups, the smallest scale of the row), or None where the last layer is not quantized on both
    sides or actions were compared.
    action_agreement: fraction of states with the same action (continuous: within 1e-4 of the range).
    first_mismatch: first state with another action or with outputs beyond float rounding, or None.
    flips: such states that a value on a rounding boundary explains; of a network that is no policy, those with no
    wrong node. unexplained: those without.
    mean, mean_torch: mean return of whole episodes on the same seeds through onnxruntime and torch,
    None without episodes. equal_returns: how many episodes returned exactly the same.
    ok: no unexplained state, at least 99 % equal actions, at most 5 % flips, and returns equal within
    3 standard errors of their paired differences (of few episodes, a t test at 1 %); where nodes were
    compared, no wrong node. reason: one line that says what is not ok. nodes: how many were compared one
    by one, exact_nodes: how many of them bit for bit.
    """

    n: int
    compared: str
    max_abs: float
    max_lsb: float | None
    action_agreement: float
    first_mismatch: int | None
    flips: int
    unexplained: int
    episodes: int
    seed: int
    mean: float | None
    mean_torch: float | None
    equal_returns: int | None
    ok: bool
    reason: str
    nodes: int = 0
    exact_nodes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite becomes None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def verify(
    model: Model,
    onnx_path: Path,
    *,
    states: np.ndarray,
    episodes: int = 0,
    seed: int = 1000,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> Agreement:
    """Compare the file with the model on `states` (n, *input shape) and, for a policy, on whole episodes.

    Of a recurrent network `states` are sequences, (n, time, ...), and every step of them counts.
    evaluate: how episodes are run; by default in `model.env`. Raises InputError for a file that is
    missing, no ONNX, or of another artifact (checkpoint, recipe or shapes), and for unfit states.
    """
    if stepwise.is_recurrent(model.module):
        found = _verify_steps(model, Path(onnx_path), states, progress)
        return _with_episodes(found, model, Path(onnx_path), episodes, seed, evaluate, progress) if episodes else found
    session, facts = _open(model, Path(onnx_path))
    head = model.module.head if isinstance(model.module, Policy) else None
    as_actions = facts["postprocess"] == "true"
    runtime = runner(session, Path(onnx_path))
    inputs = _states(session, states)
    batch = _BATCH if head else 64
    outputs, others = [], []
    for start in range(0, len(inputs), batch):
        if progress:
            progress("states", start, len(inputs))
        outputs.append(torch_outputs(model.module, inputs[start : start + batch]))
        others.append(runtime(inputs[start : start + batch]))
    if progress:
        progress("states", len(inputs), len(inputs))
    out, other = np.concatenate(outputs), np.concatenate(others)
    if not np.isfinite(out).all():
        first = int((~np.isfinite(out)).reshape(len(out), -1).any(axis=1).argmax())
        raise InputError(f"state {first}: the torch model's own output is not finite, there is nothing to compare with")
    expected = head.actions(out) if head and as_actions else out
    if other.shape != expected.shape:
        raise InputError(f"{onnx_path}: gives {other.shape[1:]} per state where the model gives {expected.shape[1:]}")

    difference = np.abs(expected.astype(np.float64) - other).reshape(len(out), -1)
    difference[~np.isfinite(difference)] = np.inf
    tolerance = OUTPUT_TOLERANCE * float(np.abs(expected).max(initial=1e-30))
    deviates = difference.max(axis=1) > tolerance
    if head is None:
        same = ~deviates
    else:
        same = same_actions(head, head.actions(out), other if as_actions else head.actions(other))
    rows = np.flatnonzero(deviates | ~same)
    wrong, nodes, exact_nodes = _nodes(model, Path(onnx_path), facts, inputs, rows)
    explained = at_boundary(model.module, inputs[rows]) if wrong is None else ~np.isin(rows, list(wrong))
    if head is not None:
        tied = near_tie(head, out[rows], OUTPUT_TOLERANCE * float(np.abs(out).max(initial=1e-30)))
        explained |= tied & (as_actions | ~deviates[rows])
    unexplained = int((~explained).sum())
    lsb = None if as_actions else _lsb(model)
    pair = _returns(model, runtime, as_actions, episodes, seed, evaluate, progress) if episodes else None

    agreement = float(same.mean())
    reason = ""
    if wrong:
        first = min(wrong)
        reason = f"{len(wrong)} of the states compared node by node have a wrong one, first {first}: {wrong[first]}"
    elif unexplained:
        first = rows[~explained][0]
        reason = f"{unexplained} of {len(out)} states differ with no value at a rounding boundary, first {first}"
    elif nodes:
        pass  # every deviation has its proof
    elif agreement < MIN_AGREEMENT:
        reason = f"only {agreement:.2%} of the states keep their action"
    elif len(rows) > MAX_FLIPS * len(out):
        reason = f"{len(rows)} of {len(out)} states differ, each with a value at a rounding boundary"
    elif pair and not _equal_means(*pair):
        reason = f"mean return {pair[0].mean():.6g} in onnxruntime, {pair[1].mean():.6g} in torch on the same seeds"
    return Agreement(
        n=len(out),
        compared="actions" if as_actions else "outputs",
        max_abs=float(difference.max(initial=0.0)),
        max_lsb=None
        if lsb is None or lsb.shape[0] != difference.shape[1]
        else float((difference / lsb).max(initial=0.0)),
        action_agreement=agreement,
        first_mismatch=int(rows[0]) if rows.size else None,
        flips=int(explained.sum()),
        unexplained=unexplained,
        episodes=episodes,
        seed=seed,
        mean=float(pair[0].mean()) if pair else None,
        mean_torch=float(pair[1].mean()) if pair else None,
        equal_returns=int((pair[0] == pair[1]).sum()) if pair else None,
        ok=not reason,
        reason=reason,
        nodes=nodes,
        exact_nodes=exact_nodes,
    )


def _verify_steps(model: Model, path: Path, sequences: np.ndarray, progress: Progress | None) -> Agreement:
    """`verify` of a recurrent network over sequences (n, time, ...), time first where the network has it so."""
    session, facts = _open(model, path)
    step = stepwise.step_graph(model)
    head = model.module.head if isinstance(model.module, Policy) else None
    as_actions = facts["postprocess"] == "true"
    x = np.asarray(sequences, np.float32)
    if x.ndim != model.example.dim() or x.shape[2:] != tuple(model.example.shape[2:]) or 0 in x.shape:
        wanted = ", ".join(map(str, model.example.shape[2:]))
        raise InputError(f"states of shape {x.shape} given; accepted: sequences (n, time, {wanted}), n and time >= 1")
    x = x if stepwise.batch_first(model.module) else x.swapaxes(0, 1)
    names = [entry.name for entry in session.get_inputs()]
    kept = [state.numpy() for state in step.start(len(x))]
    rows, got, want = [], [], []
    for t in range(x.shape[1]):
        inputs = [np.ascontiguousarray(x[:, t]), *kept]
        with torch.inference_mode():
            want.append([y.numpy() for y in step.graph(*map(torch.from_numpy, inputs))])
        if head and as_actions:
            want[-1][0] = head.actions(want[-1][0])
        try:
            got.append(session.run(None, dict(zip(names, inputs, strict=True))))
        except Exception as error:
            raise InputError(f"{path}: onnxruntime cannot run it ({one_line(error)})") from None
        rows.append(inputs)
        kept = got[-1][1:]
        if progress:
            progress("steps", t + 1, x.shape[1])
    given = [np.concatenate(part) for part in zip(*rows, strict=True)]
    ours, theirs = ([np.concatenate(part) for part in zip(*found, strict=True)] for found in (want, got))
    if not all(np.isfinite(part).all() for part in ours):
        raise InputError("the torch model's own output is not finite, there is nothing to compare with")
    differences = [np.abs(a.astype(np.float64) - b).reshape(len(a), -1) for a, b in zip(ours, theirs, strict=True)]
    deviates = np.zeros(len(given[0]), bool)
    for found, reference in zip(differences, ours, strict=True):
        found[~np.isfinite(found)] = np.inf
        deviates |= found.max(axis=1) > OUTPUT_TOLERANCE * float(np.abs(reference).max(initial=1e-30))
    same = ~deviates
    if head:
        same = same_actions(head, *((y if as_actions else head.actions(y)) for y in (ours[0], theirs[0])))
    differing = np.flatnonzero(deviates)
    compare = stepper(step.graph, path, json.loads(facts["values"]), facts["target"], actions=as_actions)
    wrong: dict[int, str] = {}
    for row in sorted({*range(min(_FIRST * len(x), len(deviates))), *differing.tolist()}):
        steps = compare(*(part[row : row + 1] for part in given))
        if steps.wrong:
            wrong[row] = steps.wrong[0]
    first = min(wrong, default=0)
    return Agreement(
        n=len(deviates),
        compared=f"{'actions' if as_actions else 'outputs'} and states of single steps",
        max_abs=float(differences[0].max()),
        max_lsb=None,
        action_agreement=float(same.mean()),
        first_mismatch=int(differing[0]) if differing.size else None,
        flips=int(differing.size) - sum(deviates[row] for row in wrong),
        unexplained=len(wrong),
        episodes=0,
        seed=0,
        mean=None,
        mean_torch=None,
        equal_returns=None,
        ok=not wrong,
        reason=f"{len(wrong)} of the steps compared node by node have a wrong one: {wrong[first]}" if wrong else "",
        nodes=steps.compared,
        exact_nodes=steps.exact,
    )


def _with_episodes(
    found: Agreement,
    model: Model,
    path: Path,
    episodes: int,
    seed: int,
    evaluate: Evaluate | None,
    progress: Progress | None,
) -> Agreement:
    """The agreement of a recurrent policy's steps, and its returns in whole episodes beside."""
    policy = _acting(model, evaluate)
    from quantkit.tasks.episodes import act_of

    acts = {"episodes in onnxruntime": onnx_act(path, policy.head), "episodes in torch": act_of(policy)}
    pair = _played(acts, model, episodes, seed, evaluate, progress)
    ok = found.ok and _equal_means(*pair)
    reason = f"mean return {pair[0].mean():.6g} in onnxruntime, {pair[1].mean():.6g} in torch on the same seeds"
    return replace(
        found,
        episodes=episodes,
        seed=seed,
        mean=float(pair[0].mean()),
        mean_torch=float(pair[1].mean()),
        equal_returns=int((pair[0] == pair[1]).sum()),
        ok=ok,
        reason=found.reason or ("" if ok else reason),
    )


def _nodes(
    model: Model, path: Path, facts: dict[str, str], inputs: np.ndarray, rows: np.ndarray
) -> tuple[dict[int, str] | None, int, int]:
    """Inputs with a wrong node (the first, by row), and how many nodes were compared and how many of them bit for bit.

    None for the first if the file does not say where its nodes are, that is, if it holds a chain.
    """
    if "values" not in facts or not isinstance(model.module, fx.GraphModule):
        return None, 0, 0
    compare = stepper(model.module, path, json.loads(facts["values"]), facts["target"])
    wrong: dict[int, str] = {}
    for row in sorted({*range(min(_FIRST, len(inputs))), *rows.tolist()}):
        steps = compare(inputs[row : row + 1])
        if steps.wrong:
            wrong[row] = steps.wrong[0]
    return wrong, steps.compared, steps.exact


def _open(model: Model, path: Path) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
    """The session and its metadata, after checking that the file was made from this model."""
    session = session_of(path)
    facts = session.get_modelmeta().custom_metadata_map
    if "quantkit_version" not in facts:
        raise InputError(
            f"{path}: was not exported by quantkit (no metadata), so it cannot be compared with this model"
        )
    sha = str(model.meta.get("sha256", ""))
    if facts["source_sha256"] != sha:
        theirs, ours = facts["source_sha256"][:12] or "unknown", sha[:12] or "unknown"
        raise InputError(f"{path}: was exported from another checkpoint (sha256 {theirs}, this model's is {ours})")
    recipe = model.meta.get("recipe")
    if facts.get("recipe") != (None if recipe is None else canonical(recipe)):
        raise InputError(f"{path}: was exported from the same checkpoint quantized by another recipe")
    shape = list(model.module.obs_shape if isinstance(model.module, Policy) else model.example.shape[1:])
    recurrent = stepwise.is_recurrent(model.module)
    if recurrent:
        shape = list(stepwise.observation(model).shape[1:])
    if (len(session.get_inputs()) != 1) != recurrent or session.get_inputs()[0].shape[1:] != shape:
        raise InputError(f"{path}: takes inputs {session.get_inputs()[0].shape[1:]}, this model takes {shape}")
    return session, facts


def _states(session: onnxruntime.InferenceSession, states: np.ndarray) -> np.ndarray:
    entry = session.get_inputs()[0]
    array = np.asarray(states, input_dtype(entry.type))
    if array.ndim == 0 or len(array) == 0 or list(array.shape[1:]) != entry.shape[1:]:
        raise InputError(
            f"states of shape {array.shape} given; accepted: (n, {', '.join(map(str, entry.shape[1:]))}), n >= 1"
        )
    return array


def _lsb(model: Model) -> np.ndarray | None:
    """The step of the last layer's products, one number per output, or None where there is no such grid."""
    last = _last(model)
    if not isinstance(last, QLayer) or last.op != "linear" or not isinstance(last.q, QTensor) or last.act is None:
        return None
    steps = formats.unit(last.act.fmt) * formats.unit(last.q.fmt) * last.act.scale
    scale = last.q.scale.double().amin(dim=1).numpy()
    return steps * np.broadcast_to(scale, (last.weight.shape[0],))


def _last(model: Model) -> nn.Module | None:
    """The module that gives the output."""
    if not isinstance(model.module, fx.GraphModule):
        return next(reversed(model.layers().values()), None)
    (node,) = model.module.graph.output_node().args
    named = isinstance(node, fx.Node) and node.op == "call_module"
    return model.module.get_submodule(str(node.target)) if named else None  # type: ignore[union-attr]


def _returns(
    model: Model,
    runtime: Act,
    as_actions: bool,
    episodes: int,
    seed: int,
    evaluate: Evaluate | None,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns of the same episodes through onnxruntime and through torch."""
    policy = _acting(model, evaluate)
    forward, head = compile_policy(policy), policy.head
    acts: dict[str, Actor] = {
        "episodes in onnxruntime": runtime if as_actions else lambda obs: head.actions(runtime(obs)),
        "episodes in torch": lambda obs: head.actions(forward(obs)),
    }
    return _played(acts, model, episodes, seed, evaluate, progress)


def _acting(model: Model, evaluate: Evaluate | None) -> Policy:
    """The policy, if there are episodes for it."""
    if not isinstance(model.module, Policy):
        raise InputError("whole episodes need a policy; this model is a plain module: use episodes=0")
    if evaluate is None and model.env is None:
        raise InputError("whole episodes need an environment and this model names none: use episodes=0")
    return model.module


def _played(
    acts: dict[str, Actor],
    model: Model,
    episodes: int,
    seed: int,
    evaluate: Evaluate | None,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns of the same episodes by each of two actors."""
    found = []
    for name, act in acts.items():
        if evaluate is not None:
            found.append(np.asarray(evaluate(act, episodes=episodes, seed=seed), np.float64))
            continue
        from quantkit.tasks.episodes import rollout

        def report(done: int, total: int, name: str = name) -> None:
            if progress:
                progress(name, done, total)

        assert model.env is not None
        found.append(rollout(act, model.env, episodes=episodes, seed=seed, progress=report).returns)
    return found[0], found[1]


def _equal_means(returns: np.ndarray, reference: np.ndarray) -> bool:
    """Whether paired returns are equal within 3 standard errors, of few episodes those of a t test at 1 %.

    One differing episode alone is not.
    """
    difference = returns - reference
    if np.abs(difference).max() <= 1e-6 * max(1.0, float(np.abs(reference).max())):
        return True
    if len(difference) < 2:
        return False
    stderr = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return abs(float(difference.mean())) <= max(3.0, t_quantile(0.995, len(difference) - 1)) * stderr
