"""The primitive as registered operators, for `torch.compile`, `torch.export` and CUDA graph trees.

`torch.ops.hdc_kernels.contrast_total`, `contrast_terms` and what their backward passes call: one graph, no break. Under
autocast they take what they are given, as the eager path does: nothing is cast.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.call import Call, scale, temperature_gradient
from hdc_kernels.selection import implementation


@torch.library.custom_op("hdc_kernels::contrast_total", mutates_args=())
def contrast_total(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    tau: Tensor | None,
    weights: Sequence[float],
    temperature: float,
    symmetric: bool,
    normalize: bool,
    rows_first: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Total, terms, hits, and the total's gradients (*dx, *dy, dτ) in the dtype it is computed in."""
    call = Call(backend, tuple(weights), temperature, symmetric, normalize, len(x), rows_first)
    return call.step(tau, x, y)


@contrast_total.register_fake
def _(
    x: Sequence[Tensor], y: Sequence[Tensor], *_: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dtype = reference.compute_dtype(x[0].dtype)
    terms, hits = _flat(x, dtype), _flat(x, torch.bool)
    scalar = x[0].new_empty((), dtype=dtype)
    made = [torch.empty_like(t, dtype=dtype) for t in (*x, *y)]
    return scalar, terms, hits, [*made, torch.empty_like(scalar)]


def _total_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, y, ctx.tau, *_ = inputs
    _, terms, hits, made = output
    ctx.pairs = len(x)
    ctx.save_for_backward(*x, *y, *made)
    ctx.mark_non_differentiable(terms, hits, *made)
    ctx.set_materialize_grads(False)


def _total_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return _per_argument(ctx, None)
    xy, made = ctx.saved_tensors[: 2 * ctx.pairs], ctx.saved_tensors[2 * ctx.pairs :]
    return _per_argument(ctx, contrast_scale(list(made), upstream, list(xy)))


contrast_total.register_autograd(_total_backward, setup_context=_total_context)


@torch.library.custom_op("hdc_kernels::contrast_scale", mutates_args=())
def contrast_scale(made: Sequence[Tensor], upstream: Tensor, xy: Sequence[Tensor]) -> list[Tensor]:
    """What `contrast_total` made, times the upstream gradient.

    An operator only so that it depends on `xy` and has no derivative by it: PyTorch then raises where a second
    derivative is asked for, which `made` alone would silently lack.
    """
    return scale(made, upstream, xy[0].dtype)


@contrast_scale.register_fake
def _(made: Sequence[Tensor], upstream: Tensor, xy: Sequence[Tensor]) -> list[Tensor]:
    return [
        *(torch.empty_like(d, dtype=xy[0].dtype) for d in made[:-1]),
        torch.empty_like(made[-1]),
    ]


@torch.library.custom_op("hdc_kernels::contrast_terms", mutates_args=())
def contrast_terms(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    tau: Tensor | None,
    temperature: float,
    symmetric: bool,
    normalize: bool,
    rows_first: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Terms, hits and logsumexps."""
    call = Call(backend, None, temperature, symmetric, normalize, len(x), rows_first)
    result = implementation(backend).forward(call.problems(tau, x, y))
    return result.loss, result.hits, result.lse


@contrast_terms.register_fake
def _(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    tau: Tensor | None,
    temperature: float,
    symmetric: bool,
    normalize: bool,
    rows_first: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    terms = _flat(x, reference.compute_dtype(x[0].dtype))
    lse = implementation(backend).LSE_DTYPE
    return terms, _flat(x, torch.bool), terms.new_empty((1 + symmetric, terms.shape[0]), dtype=lse)


def _terms_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, y, ctx.tau, *ctx.options = inputs
    _, hits, lse = output
    ctx.pairs = len(x)
    ctx.save_for_backward(*x, *y, lse)
    ctx.mark_non_differentiable(hits, lse)
    ctx.set_materialize_grads(False)


def _terms_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return _per_argument(ctx, None)
    *xy, lse = ctx.saved_tensors
    x, y = xy[: ctx.pairs], xy[ctx.pairs :]
    return _per_argument(ctx, contrast_gradient(x, y, ctx.tau, *ctx.options, lse, upstream))


contrast_terms.register_autograd(_terms_backward, setup_context=_terms_context)


@torch.library.custom_op("hdc_kernels::contrast_gradient", mutates_args=())
def contrast_gradient(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    tau: Tensor | None,
    temperature: float,
    symmetric: bool,
    normalize: bool,
    rows_first: int,
    backend: str,
    lse: Tensor,
    upstream: Tensor,
) -> list[Tensor]:
    """(*dx, *dy, dτ) of Σ upstream · terms. Has no derivative: PyTorch raises where one is asked for."""
    call = Call(backend, None, temperature, symmetric, normalize, len(x), rows_first)
    return call.backward(tau, x, y, lse, upstream)


@contrast_gradient.register_fake
def _(x: Sequence[Tensor], y: Sequence[Tensor], *_: Any) -> list[Tensor]:
    d_tau = x[0].new_empty((), dtype=reference.compute_dtype(x[0].dtype))
    return [*(torch.empty_like(t) for t in (*x, *y)), d_tau]


def _flat(x: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[T]: one entry for each row of each x."""
    return x[0].new_empty(sum(math.prod(t.shape[:-1]) for t in x), dtype=dtype)


def _per_argument(ctx: Any, found: list[Tensor] | None) -> tuple[Any, ...]:
    """(*dx, *dy, dτ) as one entry for each argument of the operator: x, y, τ, and its options."""
    options = (None,) * (len(ctx.needs_input_grad) - 3)
    if found is None:
        nothing = [None] * ctx.pairs
        return nothing, nothing, None, *options
    *d_xy, d_tau = found
    dx, dy = d_xy[: ctx.pairs], d_xy[ctx.pairs :]
    return dx, dy, temperature_gradient(d_tau, ctx.tau), *options
