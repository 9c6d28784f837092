"""GPTQ: round column after column, and let the columns still free make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
ICLR 2023, arXiv 2210.17323. Per layer, minimize |(W - Q) X|^2 = tr (W - Q) H (W - Q)^T with
H = X X^T. With U^T U = H^-1, U upper triangular, the paper's step for column j is

    q = round(w_j);   W_:k -= (w_j - q) / U_jj U_jk    for k > j.

Here the same numbers come from H itself. With H = R R^T, R upper triangular (so U = R^-1), the
error is the sum over j of |sum_(k <= j) (w_k - q_k) R_kj|^2, and each term is made smallest in turn:

    q_j = round(w_j + sum_(k < j) (w_k - q_k) N_kj),    N_kj = R_kj / R_jj,

w being the original weights. That needs one Cholesky factor and no inverse, and one product of a
vector with the errors so far in place of an update of everything to the right. Matrices are stored
by columns, so that a column is contiguous; the groups of a convolution run side by side.

Differs from the paper: the arithmetic above; inputs that are never active round to nearest instead
of becoming zero, as a policy visits states that calibration did not; the damping raises itself when
the factorization fails, and what still fails is rounded to nearest; a row that would end with a
larger error than rounding to nearest (each with its own scales) is rounded to nearest. Scales are
fitted before a layer starts, those per group when the group is reached, on the weights to be
rounded then. With `act_order` columns go by falling diagonal of H, and scales per group are fitted
beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hwmodel.formats import Format
from hwmodel.spec import PerGroup
from quantkit.model import Calib, Model
from quantkit.observers import Gram, walk
from quantkit.qlayers import QLayer
from quantkit.qtensor import ScaleRule, expand_scale, fit_groups, fit_scale, from_values
from quantkit.rounding import round_to

CHANGES = frozenset({"weights"})


def factorize(H: Tensor, damp: float = 0.01) -> tuple[Tensor, float] | None:
    """N of H + damp mean(diag H) I, unit upper triangular, and the damping used; None if all fails.

    H: (groups, columns, columns). The damping grows tenfold up to 1; the last try keeps the diagonal.
    """
    if not torch.isfinite(H).all():
        return None
    diagonal = H.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True)
    H = H.flip(1, 2)  # the lower factor of the flipped matrix is the flipped upper factor
    for amount in (damp, *(d for d in (1e-3, 1e-2, 1e-1, 1.0) if d > damp)):
        damped = H.clone()
        damped.diagonal(dim1=1, dim2=2).add_((amount * mean).clamp_min(torch.finfo(H.dtype).tiny))
        lower, info = torch.linalg.cholesky_ex(damped)
        if not info.any():
            R = lower.flip(1, 2)
            return R / R.diagonal(dim1=1, dim2=2).unsqueeze(1), amount
    return None


def solve(
    W: Tensor, N: Tensor, fmt: Format, scale: Tensor | Callable[[Tensor, int], Tensor], size: int, block: int
) -> tuple[Tensor, Tensor]:
    """Grid values Q (columns, groups, rows) for W of that shape, and their scales.

    N: (groups, columns, columns) of `factorize`. scale: (columns or 1, groups, rows), or a function
    from the weights about to be rounded, (size, groups, rows), and their first column to the scale
    of their group, (groups, rows). block: columns between two matrix products; it does not change the result
    beyond float noise. Runs on one thread: a column is too little work to share.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _solve(W, N, fmt, scale, size, block)
    finally:
        torch.set_num_threads(threads)


def _solve(
    W: Tensor, N: Tensor, fmt: Format, scale: Tensor | Callable[[Tensor, int], Tensor], size: int, block: int
) -> tuple[Tensor, Tensor]:
    columns, groups, _ = W.shape
    T, D, Q = W.clone(), torch.empty_like(W), torch.empty_like(W)  # W plus feedback, W - Q, Q
    fitted: list[Tensor] = []
    C = N.permute(2, 1, 0).contiguous()  # C[j, :j] meets the errors of the columns before j
    fixed = scale if isinstance(scale, Tensor) else None
    step = block if fixed is not None else min(block, size)
    start = 0
    while start < columns:
        stop = min(start + step, columns, columns if fixed is not None else (start // size + 1) * size)
        if fixed is None and start % size == 0:
            fitted.append(scale(T[start : start + size], start))  # type: ignore[operator]
        for j in range(start, stop):
            w = _feedback(T[j], D[start:j], C[j, start:j])
            s = fitted[-1] if fixed is None else fixed[j if len(fixed) > 1 else 0]
            q = torch.div(w, s, out=Q[j])
            q.copy_(round_to(q, fmt))
            torch.addcmul(W[j], q, s, value=-1, out=D[j])
        if stop < columns:
            late = T[stop:].transpose(0, 1)
            late.baddbmm_(N[:, start:stop, stop:].mT, D[start:stop].transpose(0, 1))
        start = stop
    return Q, fixed if fixed is not None else torch.stack(fitted)


def _feedback(w: Tensor, errors: Tensor, n: Tensor) -> Tensor:
    """w + sum_k n_k errors_k: w (groups, rows), errors (k, groups, rows), n (k, groups)."""
    if not len(errors):
        return w
    if w.shape[0] == 1:
        return torch.addmv(w[0], errors[:, 0].T, n[:, 0]).unsqueeze(0)
    return (errors * n.unsqueeze(-1)).sum(dim=0).add_(w)


def row_errors(D: Tensor, H: Tensor) -> Tensor:
    """|D_r X|^2 of every row of D (groups, rows, columns) under H, (groups, rows)."""
    return (torch.bmm(D, H) * D).sum(dim=-1)


def apply(
    model: Model,
    calib: Calib,
    *,
    scale: ScaleRule = "mse",
    percentile: float = 99.9,
    pow2: bool = False,
    damp: float = 0.01,
    act_order: bool = False,
    block: int = 128,
    sequential: bool = True,
) -> dict[str, float]:
    """Quantize every planned weight that is still float.

    sequential: a layer's inputs come from the layers before it as already quantized; otherwise all
    inputs are collected first. Returns how many inputs were never active, how many layers and rows
    fell back to rounding to nearest, and the largest damping that was needed.
    """
    names = [n for n, layer in model.qlayers().items() if layer.plan.weight is not None and layer.q is None]
    report = {"dead_inputs": 0.0, "nearest_layers": 0.0, "nearest_rows": 0.0, "largest_damp": 0.0}
    for site in walk(model, calib, names, sequential=sequential):
        gram = Gram()
        for x in site.inputs:
            gram(site.layer, x)
        H = torch.zeros(0) if gram.total is None else gram.total / gram.count
        rule = {"rule": scale, "percentile": percentile, "pow2": pow2}
        for key, value in _layer(site.layer, H, rule, damp, act_order, block).items():
            report[key] = max(report[key], value) if key == "largest_damp" else report[key] + value
    return report


def _layer(
    layer: QLayer, H: Tensor, rule: dict[str, Any], damp: float, act_order: bool, block: int
) -> dict[str, float]:
    fmt, granularity = layer.plan.weight, layer.plan.granularity
    assert fmt is not None
    W = layer.weight.detach().float().reshape(layer.groups, layer.weight.shape[0] // layer.groups, -1)
    groups, rows, columns = W.shape
    importance = None
    if H.numel() and rule["rule"] == "importance":
        importance = H.diagonal(dim1=1, dim2=2)  # (groups, columns)
        importance = (importance + 1e-3 * importance.mean()).repeat_interleave(rows, dim=0)
    nearest = fit_scale(layer.weight, fmt, granularity, importance=importance, **rule)
    S = expand_scale(nearest, columns)
    near = round_to(W.reshape(groups * rows, columns) / S, fmt)
    near_scale = nearest.expand(groups * rows, -1)
    dead = float((H.diagonal(dim1=1, dim2=2) == 0).sum()) if H.numel() else 0.0

    factor = None
    if H.numel():
        order = _order(H, act_order)
        factor = factorize(_permuted(H, order), damp)
    if factor is None:
        layer.set_weight(from_values(near, nearest, fmt, granularity, tuple(layer.weight.shape)))
        return {"nearest_layers": 1.0, "dead_inputs": dead}
    N, used = factor

    def fit(weights: Tensor, start: int) -> Tensor:
        elements = weights.permute(1, 2, 0).reshape(groups * rows, 1, -1)
        share = None if importance is None else importance[:, None, start : start + elements.shape[2]]
        fitted = fit_groups(
            elements, fmt, rule["rule"], percentile=rule["percentile"], column_weight=share, pow2=rule["pow2"]
        )
        return fitted.reshape(groups, rows)

    def by_columns(matrix: Tensor) -> Tensor:  # (groups * rows, columns or 1) -> (columns or 1, groups, rows)
        cube = matrix.reshape(groups, rows, -1)
        if cube.shape[2] > 1 and order is not None:
            cube = cube.gather(2, order[:, None, :].expand(-1, rows, -1))
        return cube.permute(2, 0, 1).contiguous()

    size = granularity.size if isinstance(granularity, PerGroup) else columns
    moving = isinstance(granularity, PerGroup) and order is None
    Q, fitted = solve(
        by_columns(W), N, fmt, fit if moving else by_columns(S.expand(groups * rows, -1)), size, block
    )
    if order is not None:
        back = order.argsort(dim=1).T.unsqueeze(-1).expand(-1, -1, rows)
        Q = Q.gather(0, back)
    values = Q.permute(1, 2, 0).reshape(groups * rows, columns)
    scales = fitted.permute(1, 2, 0).reshape(groups * rows, -1) if moving else near_scale

    def errors(v: Tensor, s: Tensor) -> Tensor:
        return row_errors((v * expand_scale(s, columns)).reshape(W.shape) - W, H).reshape(-1, 1)

    better = errors(values, scales) <= errors(near, near_scale)
    values = torch.where(better, values, near)
    kept = torch.where(better, scales, near_scale) if moving else nearest
    layer.set_weight(from_values(values, kept, fmt, granularity, tuple(layer.weight.shape)))
    return {"nearest_rows": float((~better).sum()), "dead_inputs": dead, "largest_damp": used}


def _order(H: Tensor, act_order: bool) -> Tensor | None:
    """Columns by falling diagonal, (groups, columns), or None to keep them."""
    return H.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True) if act_order else None


def _permuted(H: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return H
    columns = H.shape[1]
    H = H.gather(1, order[:, :, None].expand(-1, -1, columns))
    return H.gather(2, order[:, None, :].expand(-1, columns, -1))
