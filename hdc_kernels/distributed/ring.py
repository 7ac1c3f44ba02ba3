"""Sums over the keys of all ranks, which travel (`trip.py`): what the losses ask for.

In eager mode an `autograd.Function`, while compiling an operator: to the compiler a whole trip is one, so that
`torch.compile(fullgraph=True)` keeps its graph.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hdc_kernels.backends import EVERYTHING, Function, Mask
from hdc_kernels.call import Call, temperature_gradient
from hdc_kernels.distributed import operators, trip
from hdc_kernels.distributed.collectives import first_derivative_only
from hdc_kernels.distributed.rows import Rows, Travelling
from hdc_kernels.selection import PLAIN, select


class Sums(NamedTuple):
    """[T] each, flat as the terms of `contrast`: of all ranks' columns, in float64, with gradients; ranks if asked for.

    Ranks are those of the positives, which are then on the diagonal of each rank's own block.
    """

    values: Tensor
    ranks: Tensor


def sums(
    function: Function,
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    rows: Rows,
    *,
    temperature: float | Tensor,
    normalize: bool = True,
    rows_first: int = 0,
    mask: Mask = EVERYTHING,
    bias: Tensor | None = None,
    ranked: bool = False,
    backend: str = "auto",
) -> Sums:
    """The "logsumexp" or "softplus" of each x [own, ..., D] over the y [own, ..., D] of all ranks, in `rows` of them.

    The mask is of gathered columns: its ids are those of all; its diagonal and single entries are this rank's own.
    """
    tau = temperature if isinstance(temperature, Tensor) else None
    call = Call(
        select(
            backend, x, y, rows_first, function=function, single_entries=mask.left_out is not None
        ),
        None,
        0.0 if isinstance(temperature, Tensor) else float(temperature),
        False,
        normalize,
        len(x),
        rows_first,
        function,
        mask,
        ranked=ranked,
    )
    apply = SumOverBlocks.apply
    if torch.compiler.is_compiling():
        if call.backend not in PLAIN:
            return Sums(*operators.sums(call, rows, tau, bias, x, y))
        # Inside an operator nothing is recorded, and plain PyTorch needs that for its gradients.
        torch._dynamo.graph_break("use a backend with kernels, or strategy='gather'")
        apply = torch.compiler.disable(apply)
    return Sums(*apply(call, rows, tau, bias, *x, *y))


class SumOverBlocks(torch.autograd.Function):
    """(call, rows of y, τ or None, bias or None, *x, *y) -> `Sums`."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, rows: Rows, tau: Tensor | None, bias: Tensor | None, *xy: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, ranks = trip.sum_over_blocks(call, rows, tau, bias, xy)
        ctx.call, ctx.rows = call, rows
        ctx.save_for_backward(total, tau, bias, *xy)
        ctx.mark_non_differentiable(ranks)
        return total, ranks

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        total, tau, bias, *xy = ctx.saved_tensors
        found = trip.differentiate_blocks(ctx.call, ctx.rows, tau, bias, xy, total, upstream)
        d_tau, *others = found
        d_bias = None if bias is None else others.pop(0)
        return None, None, temperature_gradient(d_tau, tau), d_bias, *others


def sums_by_label(y: Travelling, y_labels: Tensor, x_labels: Tensor) -> Tensor:
    """For each x, the sum of all ranks' y of its label, [M, D], with its gradient; `y_labels` are of all."""
    return operators.label_sums(y.own, y_labels, x_labels, y.rows)
