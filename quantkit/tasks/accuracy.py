"""Top-1 accuracy of a network on labelled inputs: the number for networks that do not act in an environment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.errors import InputError, one_line
from quantkit.statistics import spread
from quantkit.tasks.episodes import Score

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Labelled:
    """Inputs (n, ...) with the class (n,) of each: what a network that does not act is measured on.

    They are in an order of chance, for races look at the first ones. calibration: other inputs (m, ...), that
    quantization looks at.
    """

    inputs: Tensor
    labels: np.ndarray
    calibration: Tensor

    def score(
        self, module: nn.Module, progress: Callable[[int, int], None] | None = None, known: Sequence[float] = ()
    ) -> Score:
        """The accuracy as a `Score` whose n returns are 1.0 where the label was the largest output, else 0.0.

        So a quantized network is compared with a float one input by input, as policies are episode by episode. known:
        the first of these returns, whose inputs are left out. Raises InputError as `evaluate`.
        """
        began, first = time.perf_counter(), len(known)
        right = answers(module, self.inputs[first:], self.labels[first:], progress=progress)
        return as_score(np.concatenate((np.asarray(known) == 1.0, right)), time.perf_counter() - began)

    def constant(self) -> Score:
        """The score of always answering the most frequent class."""
        return as_score(self.labels == np.bincount(self.labels).argmax())


def as_score(right: np.ndarray, seconds: float = 0.0) -> Score:
    """The `Score` of answers (n,) that were right or not. Its interquartile mean is the mean, with Wilson's interval:
    that of zeros and ones themselves is 0 or 1.
    """
    found, (std, stderr) = summary(int(right.sum()), right.size, seconds), spread(right.astype(np.float64))
    each = tuple(right.astype(np.float64).tolist())
    return Score(
        "accuracy", found.mean, std, stderr, found.n, found.mean, found.low, found.high, each, (), 0, found.seconds
    )


@dataclass(frozen=True)
class Accuracy:
    """The fraction `mean` of n labels that were the largest output.

    stderr: sqrt(mean (1 - mean) / n), which is 0 at 0 % and 100 %; low, high: the 95 % Wilson interval, which is
    not (Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927).
    """

    metric: str
    mean: float
    stderr: float
    n: int
    correct: int
    low: float
    high: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def evaluate(
    module: nn.Module,
    inputs: Tensor,
    labels: np.ndarray,
    *,
    batch: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Accuracy of `module` on inputs (n, ...) with integer labels (n,). Raises InputError as `answers`."""
    began = time.perf_counter()
    right = answers(module, inputs, labels, batch=batch, progress=progress)
    return summary(int(right.sum()), right.size, time.perf_counter() - began)


def answers(
    module: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: np.ndarray,
    *,
    batch: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Whether the label (n,) is the largest output of `module`, for each of the inputs (n, ...): bool (n,).

    A tie counts for the first class. Raises InputError for labels of another length or outside 0 .. classes - 1 and
    for outputs that are not (n, classes). `progress(inputs done, n)` is called after each batch.
    """
    n, right = len(inputs), np.zeros(len(inputs), bool)
    if len(labels) != n:
        raise InputError(f"{len(labels)} labels for {n} inputs; accepted: one label for each input")
    for start in range(0, n, batch):
        with torch.inference_mode():
            out = module(inputs[start : start + batch])
        rows = min(batch, n - start)
        if not isinstance(out, Tensor) or out.dim() != 2 or out.shape[0] != rows or out.shape[1] < 2:
            given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(f"the network gives {given} for {rows} inputs; accuracy needs ({rows}, classes)")
        if start == 0:
            _check_range(labels, out.shape[1])
        right[start : start + rows] = out.argmax(dim=1).numpy() == labels[start : start + rows]
        if progress:
            progress(start + rows, n)
    return right


def summary(correct: int, n: int, seconds: float = 0.0) -> Accuracy:
    """The accuracy of `correct` right answers out of n.

    >>> a = summary(8, 10)
    >>> round(a.stderr, 4), round(a.low, 4), round(a.high, 4)
    (0.1265, 0.4902, 0.9433)
    """
    p, z2 = correct / n, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = middle - half if correct else 0.0, middle + half if correct < n else 1.0
    return Accuracy("accuracy", p, math.sqrt(p * (1 - p) / n), n, correct, low, high, seconds)


def _check_range(labels: np.ndarray, classes: int) -> None:
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"labels lie in {labels.min()}..{labels.max()}, the network has {classes} classes;"
            f" accepted: 0..{classes - 1}"
        )


def read_labels(path: Path) -> np.ndarray:
    """The labels (n,) in a .npy file, or in the only one-dimensional array of a .npz; InputError if no integers."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = [loaded]
        else:
            with loaded:
                arrays = [array for name in loaded.files if (array := loaded[name]).ndim == 1]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, EOFError, OSError, LookupError) as error:
        raise InputError(f"{path}: not a .npy or .npz file of plain numbers ({one_line(error)})") from None
    if len(arrays) != 1:
        raise InputError(f"{path}: holds {len(arrays)} one-dimensional arrays; accepted: one, the labels")
    labels = arrays[0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0:
        raise InputError(f"{path}: holds {labels.dtype} of shape {labels.shape}; accepted: integers of shape (n,)")
    return labels.astype(np.int64)
