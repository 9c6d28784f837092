"""Node by node: what a file computes at each node of a captured graph, against torch on the file's own values.

A deep network has some value near a rounding boundary in every input, so that two correct runtimes differ in their
outputs by more than float rounding, and comparing outputs proves little. Here torch computes every node from what the
file itself has at the node's inputs. Quantizers then see equal values and give equal codes, and what is left is

- nothing at products whose sums are exact (`exact`): they must agree bit for bit,
- float rounding elsewhere: `TOLERANCE` of the node's largest value.

A file with no other difference computes the network; its outputs differ by float rounding that quantizers amplified.

The nodes are read without onnxruntime's optimizations, which move quantizers over reshapes and leave other numbers
under a name. What an optimization itself does wrong shows in the outputs only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn

from hwmodel.spec import PerGroup
from quantkit.attention import Attention, MatMul
from quantkit.bands import Bands
from quantkit.qlayers import QLayer

TOLERANCE = 1e-5
"""Float operations agree within this part of their largest torch result; several times float32 rounding."""


def exact(module: nn.Module, target: str) -> bool:
    """Whether the file of that target must give the module's bits: whole sums below 2^24, or taken in float64."""
    match module:
        case Attention():  # its softmax is a step of its own, and so are its scores
            return exact(module.values, target)
        case MatMul():
            return target == "qdq" and module.left.act is not None and module.right.act is not None
        case QLayer() if module.q is not None and module.act is not None:
            if (
                isinstance(module.q, Bands)
                or isinstance(module.q.granularity, PerGroup)
                or target not in ("qdq", "qonnx")
            ):
                return False
            summed = module.kernel().weight.dtype == torch.float32
            return summed or (target == "qdq" and module.op == "linear")
        case _:
            return False


@dataclass
class Steps:
    """One comparison. compared: nodes. exact: those that must be equal bit for bit. wrong: what differs, by node."""

    compared: int = 0
    exact: int = 0
    wrong: list[str] = field(default_factory=list)


def stepper(
    gm: fx.GraphModule, path: Path, values: dict[str, str], target: str, *, actions: bool = False
) -> Callable[..., Steps]:
    """A function from the graph's inputs (n, ...) to the comparison of all nodes in `values`: name -> file's tensor.

    The file's outputs must be the graph's as well; actions: but for the first, which a policy's head made of it.
    """
    file = onnx.load(path)
    outputs = [tensor.name for tensor in file.graph.output]
    file.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(set(values.values()) - set(outputs)))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = sorted({*values.values(), *outputs})

    def compare(*inputs: np.ndarray) -> Steps:
        feed = {entry.name: array for entry, array in zip(session.get_inputs(), inputs, strict=True)}
        found = dict(zip(names, session.run(names, feed), strict=True))
        given = {key: torch.from_numpy(np.asarray(found[name])) for key, name in values.items()}
        forced = _Forced(gm, given, target)
        with torch.no_grad():
            results = forced.run(*map(torch.from_numpy, inputs))
        results = results if isinstance(results, list | tuple) else [results]
        for name, result in [*zip(outputs, results, strict=True)][actions:]:
            forced.check(name, torch.from_numpy(np.asarray(found[name])), result, False)
        return forced.steps

    return compare


class _Forced(fx.Interpreter):
    """Runs a graph with the given value in the place of every node's own, after comparing the two."""

    def __init__(self, gm: fx.GraphModule, given: dict[str, Tensor], target: str) -> None:
        super().__init__(gm)
        self.given, self.target = given, target
        self.steps = Steps()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        bits = n.op == "call_module" and exact(self.fetch_attr(str(n.target)), self.target)
        return self._replaced(n.name, result, bits)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, Attention):
            return super().call_module(target, args, kwargs)
        name = target.replace(".", "_")
        bits = exact(module.scores, self.target)
        handles = (
            module.scores.register_forward_hook(lambda _, __, y: self._replaced(f"{name}/scores", y, bits)),
            module.values.register_forward_pre_hook(
                lambda _, inputs: (self._replaced(f"{name}/softmax", inputs[0], False), *inputs[1:])
            ),
        )
        try:
            return super().call_module(target, args, kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _replaced(self, name: str, result: Any, bits: bool) -> Any:
        given = self.given.get(name)
        if given is None or not isinstance(result, Tensor):
            return result
        self.steps.compared += 1
        self.steps.exact += bits
        self.check(name, given, result, bits)
        return given.to(result.dtype) if given.shape == result.shape else result

    def check(self, name: str, given: Tensor, result: Tensor, bits: bool) -> None:
        """Note where a value of the file's is not the result, bit for bit or to rounding."""
        if given.shape != result.shape:
            self.steps.wrong.append(f"{name}: shape {tuple(given.shape)}, expected {tuple(result.shape)}")
            return
        difference = (given.double() - result.double()).abs()
        difference[given == result] = 0.0  # infinities
        worst = float(difference.max()) if difference.numel() else 0.0
        finite = result.double()[torch.isfinite(result)].abs()
        bound = 0.0 if bits or not finite.numel() else TOLERANCE * float(finite.max())
        if not worst <= bound:
            self.steps.wrong.append(f"{name}: differs by {worst:.3g}, allowed {bound:.3g}")
