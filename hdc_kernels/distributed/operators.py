"""Trips of keys around the ring (`trip.py`) as registered operators."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from hdc_kernels.call import Call
from hdc_kernels.distributed import trip
from hdc_kernels.distributed.collectives import SECOND_DERIVATIVE
from hdc_kernels.distributed.ranks import Ranks
from hdc_kernels.distributed.rows import Rows
from hdc_kernels.operators import (
    INPUTS,
    OPTIONS,
    fake_gradients,
    flat,
    inputs_of,
    make_call,
    options_of,
    per_argument,
)

RING = "str group, SymInt[] sizes, ScalarType? wire_dtype"  # `Rows`


def sums(
    call: Call,
    rows: Rows,
    tau: Tensor | None,
    bias: Tensor | None,
    x: Sequence[Tensor],
    y: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """`trip.sum_over_blocks`, differentiable."""
    inputs = inputs_of(call, tau, bias, x, y)
    found: tuple[Tensor, Tensor] = ring_sums(*inputs, *_listed(rows), *options_of(call))
    return found


def label_sums(y: Tensor, y_labels: Tensor, x_labels: Tensor, rows: Rows) -> Tensor:
    """`trip.sum_labels`, differentiable by y."""
    found: Tensor = ring_label_sums(y, y_labels, x_labels, *_listed(rows))
    return found


def _listed(rows: Rows) -> tuple[str, Sequence[int], torch.dtype | None]:
    return rows.ranks.group.group_name, rows.sizes, rows.ranks.wire_dtype


def _rows(group: str, sizes: Sequence[int], wire_dtype: torch.dtype | None) -> Rows:
    from torch.distributed import distributed_c10d  # not in every build of PyTorch

    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    found = resolve(group)
    return Rows(Ranks(found, wire_dtype=wire_dtype), tuple(sizes))


@torch.library.custom_op(
    "hdc_kernels::ring_sums",
    mutates_args=(),
    schema=f"({INPUTS}, {RING}, {OPTIONS}) -> (Tensor, Tensor)",
)
def ring_sums(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    tau: Tensor | None,
    bias: Tensor | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    left_out: Tensor | None,
    group: str,
    sizes: Sequence[int],
    wire_dtype: torch.dtype | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """See `trip.sum_over_blocks`."""
    call = make_call(len(x), None, x_ids, y_ids, left_out, options)
    return trip.sum_over_blocks(call, _rows(group, sizes, wire_dtype), tau, bias, [*x, *y])


@ring_sums.register_fake
def _(x: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    ranked = rest[-2]  # see OPTIONS
    return flat(x, torch.float64, x[0]), flat(x if ranked else [], torch.int64, x[0])


def _sums_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, y, ctx.tau, ctx.bias, x_ids, y_ids, left_out, *ctx.rest = inputs
    total, ranks = output
    ctx.pairs = len(x)
    ctx.save_for_backward(*x, *y, x_ids, y_ids, left_out, total)
    ctx.mark_non_differentiable(ranks)


def _sums_backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
    *xy, x_ids, y_ids, left_out, total = ctx.saved_tensors
    inputs = xy[: ctx.pairs], xy[ctx.pairs :], ctx.tau, ctx.bias, x_ids, y_ids, left_out
    return per_argument(ctx, ring_gradients(*inputs, total, upstream, *ctx.rest))


ring_sums.register_autograd(_sums_backward, setup_context=_sums_context)


@torch.library.custom_op(
    "hdc_kernels::ring_gradients",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor total, Tensor upstream, {RING}, {OPTIONS}) -> Tensor[]",
)
def ring_gradients(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    tau: Tensor | None,
    bias: Tensor | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    left_out: Tensor | None,
    total: Tensor,
    upstream: Tensor,
    group: str,
    sizes: Sequence[int],
    wire_dtype: torch.dtype | None,
    *options: Any,
) -> list[Tensor]:
    """See `trip.differentiate_blocks`."""
    call = make_call(len(x), None, x_ids, y_ids, left_out, options)
    rows = _rows(group, sizes, wire_dtype)
    found = trip.differentiate_blocks(call, rows, tau, bias, [*x, *y], total, upstream)
    return [gradient.clone() for gradient in found]  # no views of what travelled together


ring_gradients.register_fake(fake_gradients)


@torch.library.custom_op(
    "hdc_kernels::ring_label_sums",
    mutates_args=(),
    schema=f"(Tensor y, Tensor y_labels, Tensor x_labels, {RING}) -> Tensor",
)
def ring_label_sums(y: Tensor, y_labels: Tensor, x_labels: Tensor, *ring: Any) -> Tensor:
    """See `trip.sum_labels`."""
    return trip.sum_labels(y, y_labels, x_labels, _rows(*ring))


@ring_label_sums.register_fake
def _(y: Tensor, y_labels: Tensor, x_labels: Tensor, *_: Any) -> Tensor:
    return y.new_empty(x_labels.shape[0], y.shape[1])


def _labels_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, y_labels, x_labels, *ctx.ring = inputs
    ctx.save_for_backward(y, y_labels, x_labels)


def _labels_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    gradient = ring_label_gradient(*ctx.saved_tensors, upstream, *ctx.ring)
    return gradient, None, None, *(None for _ in ctx.ring)


ring_label_sums.register_autograd(_labels_backward, setup_context=_labels_context)


@torch.library.custom_op(
    "hdc_kernels::ring_label_gradient",
    mutates_args=(),
    schema=f"(Tensor y, Tensor y_labels, Tensor x_labels, Tensor upstream, {RING}) -> Tensor",
)
def ring_label_gradient(
    y: Tensor, y_labels: Tensor, x_labels: Tensor, upstream: Tensor, *ring: Any
) -> Tensor:
    """See `trip.differentiate_labels`."""
    return trip.differentiate_labels(y, y_labels, x_labels, _rows(*ring), upstream)


@ring_label_gradient.register_fake
def _(y: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(y)


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError(SECOND_DERIVATIVE)


for operator in (ring_gradients, ring_label_gradient):
    operator.register_autograd(_refuse)
