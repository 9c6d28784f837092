"""Rounding column after column with the layer's second moments: the arithmetic of `gptq` and `qronos`.

Per layer, |(W - Q) X|^2 = tr (W - Q) H (W - Q)^T with H = X X^T is made small. The paper of GPTQ (arXiv 2210.17323)
takes U^T U = H^-1, U upper triangular, and for column j

    q = round(w_j);   W_:k -= (w_j - q) / U_jj U_jk    for k > j.

Here the same numbers come from H itself. Number the columns backwards, so that the paper's first is
the last, and let H = L L^T, L lower triangular (L = U^-1, turned around). The error is

    sum over j of |sum_(k >= j) (w_k - q_k) L_kj|^2,

and from the last column on each term is made as small as it can be:

    q_j = round(w_j + sum_(k > j) (w_k - q_k) N_kj),    N_kj = L_kj / L_jj,

w being the original weights. That needs one Cholesky factor and no inverse, and one product of a
vector with the errors so far in place of an update of everything still to come. Matrices are stored
by columns, so that a column is contiguous; the groups of a convolution run side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwmodel.formats import Format
from hwmodel.spec import PerGroup
from quantkit.arithmetic import half_products, one_thread
from quantkit.observers import Gram
from quantkit.qlayers import QLayer
from quantkit.qtensor import base_of, expand_scale, fit_groups, fit_scale, from_values, quantize, scale_format, within
from quantkit.rounding import all_finite, round_to, rounder
from quantkit.walk import Site, rows


def factorize(H: Tensor, damp: float = 0.01, order: Tensor | None = None) -> tuple[Tensor, float] | None:
    """N of H + damp mean(diag H) I, unit lower triangular, and the damping used; None if all fails.

    H: (groups, columns, columns). order: its columns in another order, (groups, columns). An input that is never
    active counts as one of mean size; the damping grows tenfold from 0.001 up to 1.
    """
    if not all_finite(H) or not H.numel():
        return None
    for amount in (damp, *(d for d in (1e-3, 1e-2, 1e-1, 1.0) if d > damp)):
        L = H.clone() if order is None else _permuted(H, order)
        diagonal = L.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(dim=1, keepdim=True)
        mean = torch.where(mean > 0, mean, torch.ones_like(mean))
        diagonal.copy_(torch.where(diagonal > 0, diagonal, mean) + amount * mean)
        if _cholesky(L):
            return L.div_(diagonal.unsqueeze(1).clone()), amount
    return None


def _cholesky(A: Tensor) -> bool:
    """Put the Cholesky factor of A (batch, n, n) in its place, the upper half zero; whether there is one.

    By halves, as products of matrices are several times faster than LAPACK's factorization.
    """
    n = A.shape[1]
    if n <= 128:
        L, info = torch.linalg.cholesky_ex(A)
        A.copy_(L)
        return not info.any()
    half = n // 2
    if not _cholesky(A[:, :half, :half]):
        return False
    below = A[:, half:, :half]
    below.copy_(torch.linalg.solve_triangular(A[:, :half, :half].mT, below, upper=True, left=False))
    A[:, half:, half:].baddbmm_(below, below.mT, alpha=-1)
    A[:, :half, half:] = 0
    return _cholesky(A[:, half:, half:])


def solve(
    W: Tensor,
    N: Tensor,
    fmt: Format,
    scale: Tensor | Callable[[Tensor, int], Tensor],
    size: int,
    block: int = 16,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Grid values Q and scales for W.

    W, Q: float32 (columns, groups, rows), from the last column to be rounded to the first. N:
    (groups, columns, columns) of `factorize`. Every `size` columns, from the first to be rounded on, share
    scales, (groups, rows): `scale` gives them, seeing these columns as updated by then and the number of
    the first; the scales returned are (columns / size rounded up, groups, rows). Or `scale` is known
    beforehand for every column, (columns, groups, rows), as where columns of one group come at different
    times. block: columns handled one by one; feedback beyond them is one matrix product each time the
    columns double. It does not change the result beyond float noise. first: what is rounded in the first
    column in place of its weights, (groups, rows).
    Runs on one thread: a column is too little work to share.
    """
    with one_thread():
        Q = W.clone(memory_format=torch.contiguous_format)
        T = Q.clone()  # W plus the feedback received so far, then W - Q
        if first is not None:
            T[-1] = first
        if isinstance(scale, Tensor):
            _span(Q, T, N, rounder(fmt), block, scale)
            return Q, scale
        scales: list[Tensor] = []
        for end in range(len(W), 0, -size):
            edge = max(0, end - size)
            group = slice(edge, end)
            seen = T[group] if end == len(W) else _updated(Q[group], T[group], N[:, group, group])
            s = scale(seen, edge)
            scales.append(s)
            Q[group] /= s
            T[group] /= s
            _span(Q[group], T[group], N[:, group, group], rounder(fmt), block)
            T[group] *= s
            _feed(T[:edge], T[group], N[:, group, :edge])
        return Q, torch.stack(scales[::-1])


def _updated(W: Tensor, T: Tensor, N: Tensor) -> Tensor:
    """The paper's updated weights of a group: each column moved as if those before it were rounded without error.

    The moves M solve M_j = (T_j - w_j) - sum_(k > j) M_k N_kj.
    """
    moves = torch.linalg.solve_triangular(N.mT, (T - W).transpose(0, 1), upper=True, unitriangular=True)
    return W + moves.transpose(0, 1)


def _span(
    Q: Tensor, T: Tensor, N: Tensor, nearest: Callable[[np.ndarray], Any], block: int, scale: Tensor | None = None
) -> None:
    """Round all columns of Q and T, from the last to the first, in place.

    Both are in units of the scale, or as they are, with the scale of every column; Q is left in units of it.
    """
    if len(Q) > block:
        middle = (len(Q) // 2 + block - 1) // block * block
        late, early = (None, None) if scale is None else (scale[middle:], scale[:middle])
        _span(Q[middle:], T[middle:], N[:, middle:, middle:], nearest, block, late)
        _feed(T[:middle], T[middle:], N[:, middle:, :middle])
        _span(Q[:middle], T[:middle], N[:, :middle, :middle], nearest, block, early)
        return
    groups, columns = len(N), len(Q)
    values, targets, n = Q.numpy(), T.numpy(), N.numpy()  # one call of numpy costs a fraction of torch's
    q, units = np.empty_like(values[0]), None if scale is None else scale.numpy()
    for j in range(columns - 1, -1, -1):
        if groups == 1:
            np.dot(n[0, j + 1 :, j], targets[j + 1 :, 0], out=q[0])
        else:
            np.einsum("gk,kgr->gr", n[:, j + 1 :, j], targets[j + 1 :], out=q)
        np.add(q, targets[j], out=q)
        if units is None:
            nearest(q)
            np.subtract(values[j], q, out=targets[j])
            np.copyto(values[j], q)
        else:
            np.divide(q, units[j], out=q)
            nearest(q)
            np.multiply(q, units[j], out=targets[j])
            np.subtract(values[j], targets[j], out=targets[j])
            np.copyto(values[j], q)


def _feed(T: Tensor, errors: Tensor, N: Tensor) -> None:
    """T_j += sum_k N_kj errors_k, in place: T (j, groups, rows), errors (k, groups, rows), N (groups, k, j)."""
    if len(T) and T.shape[1] == 1:
        T[:, 0].addmm_(N[0].T, errors[:, 0])
    elif len(T):
        T.transpose(0, 1).baddbmm_(N.mT, errors.transpose(0, 1))


def advantage(D: Tensor, E: Tensor, H: Tensor) -> Tensor:
    """|E_r X|^2 - |D_r X|^2 of every row of D and E (groups, rows, columns), (groups, rows)."""
    return (torch.bmm(E - D, H) * (E + D)).sum(dim=-1)  # a^2 - b^2 = (a - b)(a + b), H being symmetric


def moments(site: Site, samples: int, *, drift: bool = False) -> tuple[Tensor, Tensor]:
    """H = E[x x^T] of a layer's inputs, (groups, columns, columns), and C = E[(y - W x) x^T], (groups, rows, columns).

    y: what the float network made of its own inputs, without the bias. Empty tensors of a layer that never runs; C is
    empty without `drift`. H is taken over from a layer with the very same inputs where the site knows of one. samples:
    how many inputs are looked at, as in `walk.rows`.
    """
    layer = site.layer
    shared = not layer.spatial and layer.in_scale is None and layer.act is None
    if drift and shared and len(site.floats):
        return _moments_beside(site, samples)
    known = site.moments.get(samples) if shared else None
    if known is not None and not drift:
        return known, torch.zeros(0)
    w = layer.weight.detach().float().flatten(1).reshape(layer.groups, -1, layer.weight[0].numel())
    gram, bias = Gram(half=site.half and layer.act is None), layer.bias.reshape(layer.groups, 1, -1)
    C = torch.zeros_like(w) if drift else torch.zeros(0)
    count = 0
    for x, y in rows(site, samples, targets=drift):
        count += x.shape[1]
        if known is None:
            gram.add(x)
        if drift:
            C.baddbmm_(torch.baddbmm(y, x, w.mT, alpha=-1).sub_(bias).mT, x)
    if count == 0:
        return torch.zeros(0), torch.zeros(0)
    H = gram.total.div_(count) if gram.total is not None else known
    assert H is not None
    if shared:
        site.moments[samples] = H
    return H, C.div_(count)


def _moments_beside(site: Site, samples: int) -> tuple[Tensor, Tensor]:
    """`moments` with drift of a linear layer whose float inputs z are known: C = W E[(z - x) x^T].

    Both expectations are taken over from a layer with the very same inputs.
    """
    keys = samples, (samples, "drift")
    if keys[1] not in site.moments:
        gram, G, count = Gram(half=site.half), torch.zeros(1, *2 * [site.layer.in_channels]), 0
        for x, z in rows(site, samples, floats=True):
            count += x.shape[1]
            gram.add(x)
            G.baddbmm_((z - x).mT, x)
        if gram.total is None:
            return torch.zeros(0), torch.zeros(0)
        site.moments |= {keys[0]: gram.total.div_(count), keys[1]: G.div_(count)}
    H, G = (site.moments[key] for key in keys)
    return H, site.layer.weight.detach().float() @ G


def aimed(layer: QLayer, H: Tensor, C: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weights that make of the inputs as they are now what the float network made of its own, as well as they can.

    With H and C of `moments`: all columns together, W + C (H + r I)^-1, and each of them alone with the others as they
    were, W_j + C_j / (H_jj + r); (out, columns) both. r: `ridge` times the mean diagonal of H. W twice where that
    cannot be inverted.
    """
    groups, columns, _ = H.shape
    W = layer.weight.detach().float().flatten(1)
    w = W.reshape(groups, -1, columns)
    mean = H.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)
    damped = H + torch.eye(columns) * (ridge * mean)[:, None, None]
    L, info = torch.linalg.cholesky_ex(damped)
    together = torch.cholesky_solve(C.mT, L).mT
    alone = C / damped.diagonal(dim1=1, dim2=2).unsqueeze(1)
    if info.any() or not together.isfinite().all() or not alone.isfinite().all():
        return W, W
    return (w + together).reshape(W.shape), (w + alone).reshape(W.shape)


NOTHING = {"dead_inputs": 0.0, "nearest_layers": 0.0, "nearest_rows": 0.0, "largest_damp": 0.0}
"""What a method by columns reports before its first layer."""


def tally(report: dict[str, float], layer: dict[str, float]) -> None:
    """Add what `round_layer` says of one layer: counts add up, of damping the largest stays."""
    for key, value in layer.items():
        report[key] = max(report[key], value) if key == "largest_damp" else report[key] + value


def round_layer(
    layer: QLayer,
    W: Tensor,
    H: Tensor,
    rule: dict[str, Any],
    damp: float,
    act_order: bool,
    block: int,
    first: Tensor | None = None,
    half: bool = False,
) -> dict[str, float]:
    """Give the layer the weight that `solve` makes of W (out, columns) and H of `moments`; returns diagnostics.

    rule: how scales are fitted (`qtensor.fit_scale`). damp: as in `factorize`. first: weights (out, columns) of which
    the column that is rounded first is taken in place of W's. half: compare rows with those rounded to nearest by
    products of bfloat16.
    """
    fmt, (out, columns) = layer.plan.weight, W.shape
    assert fmt is not None
    granularity = within(layer.plan.granularity, columns)
    groups, rows = layer.groups, out // layer.groups
    importance = None
    if H.numel() and rule["rule"] == "importance":
        importance = H.diagonal(dim1=1, dim2=2)  # (groups, columns)
        importance = (importance + 1e-3 * importance.mean()).repeat_interleave(rows, dim=0)
    nearest = fit_scale(W, fmt, granularity, importance=importance, **rule)
    base = base_of(W, fmt, granularity)
    dead = float((H.diagonal(dim1=1, dim2=2) == 0).sum()) if H.numel() else 0.0

    order = _order(H, act_order)
    backwards = torch.arange(columns - 1, -1, -1).expand(groups, columns)
    factor = factorize(H, damp, backwards if order is None else order)
    if factor is None:
        layer.set_weight(quantize(layer.weight, nearest, fmt, granularity))
        return {"nearest_layers": 1.0, "dead_inputs": dead}
    N, used = factor

    def by_columns(matrix: Tensor) -> Tensor:  # (out, columns or 1) -> (columns or 1, groups, rows)
        cube = matrix.reshape(groups, rows, -1).permute(2, 0, 1)
        if len(cube) == 1:
            return cube
        return cube.flip(0) if order is None else _taken(cube, order)

    def by_rows(cube: Tensor) -> Tensor:  # the inverse
        if order is not None:
            cube = _taken(cube, order.argsort(dim=1))
        return (cube.flip(0) if order is None else cube).permute(1, 2, 0).reshape(out, -1)

    def fit(weights: Tensor, start: int) -> Tensor:
        if size == columns:
            return nearest.expand(out, 1).reshape(groups, rows)
        elements = weights.permute(1, 2, 0).reshape(out, 1, -1)
        share = None if importance is None else importance.flip(1)[:, None, start : start + len(weights)]
        options = {"percentile": rule["percentile"], "pow2": rule["pow2"]}
        options |= {"scale": scale_format(granularity), "base": base}
        return fit_groups(elements, fmt, rule["rule"], column_weight=share, **options).reshape(groups, rows)

    moving = isinstance(granularity, PerGroup) and order is None
    size = granularity.size if isinstance(granularity, PerGroup) else columns
    known = isinstance(granularity, PerGroup) and not moving
    start = None if first is None else by_columns(first)[-1]
    scales: Tensor | Callable[[Tensor, int], Tensor] = fit
    if known and order is not None and groups == 1:
        scales = nearest.T.index_select(0, order[0] // size).unsqueeze(1)
    elif known:
        scales = by_columns(expand_scale(nearest, columns, granularity).expand(out, columns)).contiguous()
    Q, fitted = solve(by_columns(W), N, fmt, scales, size, block, start)
    values, scale = by_rows(Q), by_rows(fitted) if moving else nearest

    fallen = 0
    every = torch.arange(out).reshape(groups, rows)
    for part in every.split(max(1, 128 // groups), dim=1):  # few rows at a time: large temporaries are slow
        r = part.flatten()
        w, s = W[r], expand_scale(nearest.expand(out, -1)[r], columns, granularity)
        near = round_to(w / s, fmt)
        D = values[r] * expand_scale(scale.expand(out, -1)[r], columns, granularity) - w
        E = near * s - w
        with half_products(half):
            lost = advantage(D.reshape(groups, -1, columns), E.reshape(groups, -1, columns), H).flatten() < 0
        values[r[lost]] = near[lost]
        if moving:
            scale[r[lost]] = nearest[r[lost]]
        fallen += int(lost.sum())
    layer.set_weight(from_values(values, scale, fmt, granularity, tuple(layer.weight.shape), base))
    return {"nearest_rows": float(fallen), "dead_inputs": dead, "largest_damp": used}


def _order(H: Tensor, act_order: bool) -> Tensor | None:
    """Columns from the smallest diagonal to the largest, (groups, columns), or None to keep them."""
    return H.diagonal(dim1=1, dim2=2).argsort(dim=1, stable=True) if act_order and H.numel() else None


def _taken(cube: Tensor, order: Tensor) -> Tensor:
    """The columns of each group (columns, groups, rows) in another order (groups, columns)."""
    if len(order) == 1 and cube.is_contiguous():  # whole lines of memory, several times faster than single numbers
        return cube.index_select(0, order[0])
    if len(order) == 1:  # of a matrix by rows: picked there, then turned
        return cube[:, 0].T.index_select(1, order[0]).T.contiguous().unsqueeze(1)
    return cube.gather(0, order.T.unsqueeze(-1).expand(-1, -1, cube.shape[2]))


def _permuted(H: Tensor, order: Tensor) -> Tensor:
    """A copy of H with its columns and rows in the order in which `solve` wants them, the last to be rounded first."""
    if len(order) == 1:
        return H[0].index_select(1, order[0]).index_select(0, order[0]).unsqueeze(0)
    columns = H.shape[1]
    H = H.gather(1, order[:, :, None].expand(-1, -1, columns))
    return H.gather(2, order[:, None, :].expand(-1, columns, -1))
