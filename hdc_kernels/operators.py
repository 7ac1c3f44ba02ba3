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
from hdc_kernels.backends import Detail, Mask, Terms
from hdc_kernels.call import Call, in_dtype, scaled, temperature_gradient
from hdc_kernels.selection import implementation

# What every operator takes: the embeddings, then what `make_call` and `Call.problems` make of the rest.
INPUTS = "Tensor[] x, Tensor[] y, Tensor? tau, Tensor? bias, Tensor? x_ids, Tensor? y_ids, Tensor? left_out"
OPTIONS = (
    "float temperature, bool symmetric, bool normalize, int rows_first, str backend, str function, "
    "bool diagonal, bool same, bool ranked, float beta"
)


@torch.library.custom_op(
    "hdc_kernels::contrast_total",
    mutates_args=(),
    schema=f"({INPUTS}, float[] weights, str detail, {OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
)
def contrast_total(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    tau: Tensor | None,
    bias: Tensor | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    left_out: Tensor | None,
    weights: Sequence[float],
    detail: Detail,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Total, means, terms, hits, ranks, and its gradients (dτ, dbias if any, *dx, *dy) in the dtype it is computed in.

    What `detail` does not ask for is empty.
    """
    call = make_call(len(x), weights, x_ids, y_ids, left_out, options)._replace(detail=detail)
    terms, made = call.step(tau, bias, x, y)
    total = terms.total
    means = total.new_empty(2, 0) if terms.means is None else terms.means
    if detail == "rows":
        return total, means, terms.loss, terms.hits, _ranks(terms), made
    no_hits = total.new_empty(0, dtype=torch.bool)
    return total, means, total.new_empty(0), no_hits, _ranks(terms), made


@contrast_total.register_fake
def _(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    tau: Tensor | None,
    bias: Tensor | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    left_out: Tensor | None,
    weights: Sequence[float],
    detail: Detail,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    dtype = reference.compute_dtype(x[0].dtype)
    rows = x if detail == "rows" else []
    terms, hits = flat(rows, dtype, x[0]), flat(rows, torch.bool, x[0])
    ranked = options[-2]  # see OPTIONS
    ranks = flat(x if ranked else [], torch.int64, x[0])
    scalar = x[0].new_empty((), dtype=dtype)
    means = scalar.new_empty(2, len(x) if detail == "means" else 0)
    made = [torch.empty_like(t, dtype=dtype) for t in (*x, *y)]
    return scalar, means, terms, hits, ranks, [*scalars(scalar, bias), *made]


def _total_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, y, ctx.tau, ctx.bias, *_ = inputs
    _, means, terms, hits, ranks, made = output
    ctx.pairs = len(x)
    ctx.save_for_backward(*x, *y, *made)
    ctx.mark_non_differentiable(means, terms, hits, ranks, *made)
    ctx.set_materialize_grads(False)


def _total_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return per_argument(ctx, None)
    xy, made = ctx.saved_tensors[: 2 * ctx.pairs], ctx.saved_tensors[2 * ctx.pairs :]
    return per_argument(ctx, contrast_scale(list(made), upstream, list(xy)))


contrast_total.register_autograd(_total_backward, setup_context=_total_context)


@torch.library.custom_op("hdc_kernels::contrast_scale", mutates_args=())
def contrast_scale(made: Sequence[Tensor], upstream: Tensor, xy: Sequence[Tensor]) -> list[Tensor]:
    """What `contrast_total` made, times the upstream gradient, in the dtypes of `xy` behind the scalars.

    An operator only so that it depends on `xy` and has no derivative by it: PyTorch then raises where a second
    derivative is asked for, which `made` alone would silently lack.
    """
    dtype, first = xy[0].dtype, len(made) - len(xy)
    found = scaled(made, upstream, dtype, scalars=first, in_place=False)
    return [*found[:first], *in_dtype(found[first:], dtype)]


@contrast_scale.register_fake
def _(made: Sequence[Tensor], upstream: Tensor, xy: Sequence[Tensor]) -> list[Tensor]:
    first = len(made) - len(xy)
    return [
        *(torch.empty_like(d) for d in made[:first]),
        *(torch.empty_like(d, dtype=xy[0].dtype) for d in made[first:]),
    ]


@torch.library.custom_op(
    "hdc_kernels::contrast_terms",
    mutates_args=(),
    schema=f"({INPUTS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def contrast_terms(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    tau: Tensor | None,
    bias: Tensor | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    left_out: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Terms, hits, ranks and logsumexps."""
    call = make_call(len(x), None, x_ids, y_ids, left_out, options)
    result = implementation(call.backend).forward(call.problems(tau, bias, x, y))
    return result.loss, result.hits, _ranks(result), result.lse


@contrast_terms.register_fake
def _(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    tau: Tensor | None,
    bias: Tensor | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    left_out: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = make_call(len(x), None, x_ids, y_ids, left_out, options)
    terms = flat(x, reference.compute_dtype(x[0].dtype), x[0])
    lse = implementation(call.backend).LSE_DTYPE
    shape = (call.problems(tau, bias, x, y).sums, terms.shape[0])
    ranks = flat(x if call.ranked else [], torch.int64, x[0])
    return terms, flat(x, torch.bool, x[0]), ranks, terms.new_empty(shape, dtype=lse)


def _terms_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, y, ctx.tau, ctx.bias, x_ids, y_ids, left_out, *ctx.options = inputs
    _, hits, ranks, lse = output
    ctx.pairs = len(x)
    ctx.save_for_backward(*x, *y, x_ids, y_ids, left_out, lse)
    ctx.mark_non_differentiable(hits, ranks, lse)
    ctx.set_materialize_grads(False)


def _terms_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return per_argument(ctx, None)
    *xy, x_ids, y_ids, left_out, lse = ctx.saved_tensors
    inputs = xy[: ctx.pairs], xy[ctx.pairs :], ctx.tau, ctx.bias, x_ids, y_ids, left_out
    return per_argument(ctx, contrast_gradient(*inputs, lse, upstream, *ctx.options))


contrast_terms.register_autograd(_terms_backward, setup_context=_terms_context)


@torch.library.custom_op(
    "hdc_kernels::contrast_gradient",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor lse, Tensor upstream, {OPTIONS}) -> Tensor[]",
)
def contrast_gradient(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    tau: Tensor | None,
    bias: Tensor | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    left_out: Tensor | None,
    lse: Tensor,
    upstream: Tensor,
    *options: Any,
) -> list[Tensor]:
    """(dτ, dbias if any, *dx, *dy) of Σ upstream · terms. Has no derivative: PyTorch raises where one is asked for."""
    call = make_call(len(x), None, x_ids, y_ids, left_out, options)
    return call.backward(tau, bias, x, y, lse, upstream)


@contrast_gradient.register_fake
def fake_gradients(
    x: Sequence[Tensor], y: Sequence[Tensor], tau: Tensor | None, bias: Tensor | None, *_: Any
) -> list[Tensor]:
    """(dτ, dbias if any, *dx, *dy) without their numbers: what tracing sees of an operator that makes them."""
    d_tau = x[0].new_empty((), dtype=reference.compute_dtype(x[0].dtype))
    return [*scalars(d_tau, bias), *(torch.empty_like(t) for t in (*x, *y))]


def make_call(
    pairs: int,
    weights: Sequence[float] | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    left_out: Tensor | None,
    options: Sequence[Any],
) -> Call:
    temperature, symmetric, normalize, rows_first, backend, function, *masking, ranked, beta = (
        options
    )
    diagonal, same = masking
    ids = None if x_ids is None or y_ids is None else (x_ids, y_ids)
    return Call(
        backend,
        None if weights is None else tuple(weights),
        temperature,
        symmetric,
        normalize,
        pairs,
        rows_first,
        function,
        Mask(diagonal, ids, same, left_out),
        ranked=ranked,
        beta=beta,
    )


def inputs_of(
    call: Call, tau: Tensor | None, bias: Tensor | None, x: Sequence[Tensor], y: Sequence[Tensor]
) -> tuple[Any, ...]:
    """What `INPUTS` names."""
    return x, y, tau, bias, *call.without_tensors()[1]


def options_of(call: Call) -> tuple[Any, ...]:
    """What `OPTIONS` names."""
    return (
        call.temperature,
        call.symmetric,
        call.normalize,
        call.rows_first,
        call.backend,
        call.function,
        call.mask.diagonal,
        call.mask.same,
        call.ranked,
        call.beta,
    )


def flat(x: Sequence[Tensor], dtype: torch.dtype, like: Tensor) -> Tensor:
    """[T]: one entry for each row of each x, where `like` is."""
    return like.new_empty(sum(math.prod(t.shape[:-1]) for t in x), dtype=dtype)


def _ranks(terms: Terms) -> Tensor:
    """An operator returns tensors only: an empty one if they were not asked for."""
    return terms.total.new_empty(0, dtype=torch.int64) if terms.ranks is None else terms.ranks


def scalars(d_tau: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Room for (dτ, dbias if any)."""
    return [torch.empty_like(d_tau)] + ([] if bias is None else [torch.empty_like(bias)])


def per_argument(ctx: Any, found: list[Tensor] | None) -> tuple[Any, ...]:
    """(dτ, dbias if any, *dx, *dy) as one entry for each argument of the operator: x, y, τ, bias, and the rest."""
    rest = (None,) * (len(ctx.needs_input_grad) - 4)
    if found is None:
        nothing = [None] * ctx.pairs
        return nothing, nothing, None, None, *rest
    d_tau, *others = found
    d_bias = None if ctx.bias is None else others.pop(0)
    dx, dy = others[: ctx.pairs], others[ctx.pairs :]
    return dx, dy, temperature_gradient(d_tau, ctx.tau), d_bias, *rest
