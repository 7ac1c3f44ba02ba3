"""Sums over all pairs of two sets of embeddings, without the matrix of pairs: what most losses are made of.

InfoNCE itself is `contrast.py`: it sets the positives apart, and is exact near convergence because of it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import Function
from hdc_kernels.checks import Reduction
from hdc_kernels.contrast import Contrast, contrast
from hdc_kernels.distributed import ring
from hdc_kernels.distributed.rows import Rows, Travelling

Columns = Tensor | Travelling  # y [N, D]; or that of all ranks, from `Rows.share`


def logsumexp(x: Tensor, y: Columns, *, reduction: Reduction = "none", **options: Any) -> Tensor:
    """log Σ_j exp(sim(x_i, y_j)/τ) over the columns j that `mask` lets through: x [M, D], y [N, D] -> [M].

    The `options` are those of `contrast`: temperature, normalize, mask, backend, and symmetric (M = N), which
    gives the mean of row i's and column i's. −inf, without a gradient, where a row has no column. Float64 for
    float64, otherwise float32. A "mean" or "sum" is faster made here than afterwards.
    """
    return sums("logsumexp", x, y, reduction=reduction, **options).value


def softplus_sum(
    x: Tensor, y: Columns, bias: Tensor | float, *, reduction: Reduction = "none", **options: Any
) -> Tensor:
    """Σ_j log(1 + exp(sim(x_i, y_j)/τ + bias_i)) over the columns j that `mask` lets through.

    As `logsumexp`, but never symmetric. `bias` is a number, a tensor of one element or one of [M].
    """
    return sums("softplus", x, y, bias=bias, reduction=reduction, **options).value


def sums(
    function: Function,
    x: Tensor,
    y: Columns,
    *,
    bias: Tensor | float | None = None,
    reduction: Reduction = "none",
    ranked: bool = False,
    **options: Any,
) -> Contrast:
    """Any of these, with all that `contrast` finds: the terms beside their total, and ranks if they are asked for.

    Those are the ranks of the diagonal, which the mask must then leave out, among the columns that it lets through.

    "tilted" is the log of the mean of exp(s_ij), s_ij = sim(x_i, y_j)/τ, over the columns that the mask lets through,
    weighted by exp(β·s_ij), with `beta` > 0 among the options. One product of matrices makes both of its sums, unless
    y travels: then keys go around twice. Where a row has no column, −inf; NaN if y travels.
    """
    dtype = reference.compute_dtype(x.dtype)
    if isinstance(bias, Tensor):
        bias = bias.to(dtype).expand(x.shape[:1]).contiguous()
    elif bias is not None:
        bias = torch.full(x.shape[:1], bias, dtype=dtype, device=x.device)
    if isinstance(y, Travelling):
        around = _tilted_around if function == "tilted" else partial(ring.sums, function, bias=bias)
        found = around([x], [y.own], y.rows, ranked=ranked, **options)
        terms = found.values.to(dtype)
        value, no_hits = reference.reduce(terms, reduction), torch.zeros_like(terms).bool()
        return Contrast(value, terms.detach(), no_hits, found.ranks if ranked else None)
    return contrast(
        [(x, y)],
        weights=None if reduction == "none" else [1.0],
        divisor=x.shape[0] if reduction == "mean" else 1,
        function=function,
        bias=bias,
        ranked=ranked,
        **options,
    )


def _tilted_around(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    rows: Rows,
    *,
    temperature: float | Tensor,
    beta: float,
    ranked: bool,
    **options: Any,
) -> ring.Sums:
    """`ring.sums` of "tilted"."""
    if not isinstance(temperature, Tensor):
        temperature = float(temperature)  # before it is divided, in 16 bits perhaps
    sharp = ring.sums(
        "logsumexp", x, y, rows, temperature=temperature / (1 + beta), ranked=ranked, **options
    )
    broad = ring.sums("logsumexp", x, y, rows, temperature=temperature / beta, **options)
    return ring.Sums(sharp.values - broad.values, sharp.ranks)
