"""The primitive as an `autograd.Function`: half the overhead of a registered operator; and for torch.func.

Second derivatives are those of `backends/plain.py`, which holds the logits; first ones in reverse mode never do.
Forward mode is plain PyTorch's altogether. A vmap runs the kernels on one entry after the other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hdc_kernels.backends import Terms
from hdc_kernels.backends.outputs import NO_ROWS
from hdc_kernels.call import Call, in_dtype, in_forward_mode, scaled, temperature_gradient
from hdc_kernels.selection import implementation

MASK = 3  # tensors: `Call.without_tensors`


def value(
    call: Call, tau: Tensor | None, bias: Tensor | None, xy: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Value (which has gradients), terms, hits and, if they are asked for, ranks and means."""
    # Under torch.func, results travel by `setup_context`, which costs 15 µs more a call.
    if torch._C._are_functorch_transforms_active():
        bare, mask = call.without_tensors()
        shown = TransformedValue.apply(bare, *mask, tau, bias, *xy)[: -_made(call, bias)]
        shown = shown[0] if call.detail == "total" else shown
    else:
        shown = Value.apply(call, tau, bias, *xy)
    if call.detail == "total":
        return shown, NO_ROWS.loss, NO_ROWS.hits, None, None
    if call.detail == "means":
        result, means = shown
        return result, NO_ROWS.loss, NO_ROWS.hits, None, means
    result, hits, *rest = shown
    terms = result.detach() if call.weights is None else rest.pop(0)
    return result, terms, hits, rest[0] if rest else None, None


class Value(torch.autograd.Function):
    """(call, τ or None, bias or None, *x, *y) -> what `_evaluate` shows."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, tau: Tensor | None, bias: Tensor | None, *xy: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        if not any(ctx.needs_input_grad[3 + call.pairs :]):
            call = call._replace(needs_y=False)
        shown, ctx.made = _evaluate(call, tau, bias, xy)
        ctx.call, mask = call.without_tensors()
        ctx.save_for_backward(*mask, tau, bias, *xy)
        ctx.set_materialize_grads(False)
        if call.detail == "total":
            return shown[0]
        ctx.mark_non_differentiable(*shown[1:])
        return shown

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
        if upstream is None:
            return tuple(None for _ in ctx.needs_input_grad)
        x_ids, y_ids, left_out, tau, bias, *xy = ctx.saved_tensors
        call = ctx.call.with_tensors(x_ids, y_ids, left_out)
        if in_forward_mode() or torch._C._functorch.is_legacy_batchedtensor(upstream):
            return None, *_plain_gradient(call, upstream, tau, bias, *xy)
        made = ctx.made or _evaluate(call, tau, bias, xy)[1]
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            bare = ctx.call, x_ids, y_ids, left_out
            return None, *Gradient.apply(*bare, upstream, tau, bias, *xy, *made)
        if call.weights is None:
            return None, *_gradient(call, upstream, tau, bias, *xy, *made)
        # The total's gradients are given away, not copied: a second pass makes new ones.
        ctx.made = None
        if not _is_one(upstream):
            made = scaled(made, upstream, xy[0].dtype, scalars=_scalars(bias), in_place=True)
        return None, *_per_input(made, tau, bias, xy)


class TransformedValue(torch.autograd.Function):
    """`Value`, showing to torch.func every tensor: those of the mask, and what it made on the way behind the rest."""

    @staticmethod
    def forward(
        bare: Call,
        x_ids: Tensor | None,
        y_ids: Tensor | None,
        left_out: Tensor | None,
        tau: Tensor | None,
        bias: Tensor | None,
        *xy: Tensor,
    ) -> tuple[Tensor, ...]:
        shown, made = _evaluate(bare.with_tensors(x_ids, y_ids, left_out), tau, bias, xy)
        return *shown, *made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors, *output[-_made(ctx.call, tensors[MASK + 1]) :])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
        if upstream is None:
            return tuple(None for _ in ctx.needs_input_grad)
        # The transform may have ended, as in `vjp`: what is left of its tensors has no memory of its own.
        saved: list[Any] = [
            t if t is None else torch._C._functorch.unwrap_if_dead(t) for t in ctx.saved_tensors
        ]
        mask, saved = saved[:MASK], saved[MASK:]
        if in_forward_mode():
            inputs = saved[: 2 + 2 * ctx.call.pairs]
            found = _plain_gradient(ctx.call.with_tensors(*mask), upstream, *inputs)
        else:
            found = Gradient.apply(ctx.call, *mask, upstream, *saved)
        return None, *(None,) * MASK, *found

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *inputs: Any
    ) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
        return _one_by_one(TransformedValue, info.batch_size, in_dims, inputs)


class Gradient(torch.autograd.Function):
    """`Value.backward` as a function of its own, so that it too has a derivative."""

    @staticmethod
    def forward(
        bare: Call,
        x_ids: Tensor | None,
        y_ids: Tensor | None,
        left_out: Tensor | None,
        upstream: Tensor,
        *saved: Tensor,
    ) -> tuple[Tensor | None, ...]:
        return _gradient(bare.with_tensors(x_ids, y_ids, left_out), upstream, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors[: MASK + 3 + 2 * ctx.call.pairs])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        mask, saved = ctx.saved_tensors[:MASK], ctx.saved_tensors[MASK:]
        call = ctx.call.with_tensors(*mask)
        inputs = [None if t is None else _variable(t) for t in saved]
        absent = [t is None for t in inputs[1:]]
        of_slopes = [g for g, missing in zip(upstream, absent, strict=True) if not missing]
        asked = [k for k, g in enumerate(of_slopes) if g is not None]

        def slopes(first: Tensor, *variables: Tensor) -> tuple[Tensor, ...]:
            found = _pulled_back(_value(call, absent), variables, (first,))
            return tuple([found[k] for k in asked])

        variables = [t for t in inputs if t is not None]
        found = iter(_pulled_back(slopes, variables, tuple([of_slopes[k] for k in asked])))
        results = [None if t is None else next(found) for t in inputs]
        results = [None, *(None for _ in mask), *results]
        return *results, *(None for _ in ctx.needs_input_grad[len(results) :])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *inputs: Any
    ) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
        return _one_by_one(Gradient, info.batch_size, in_dims, inputs)


def _one_by_one(
    function: type[torch.autograd.Function],
    count: int,
    in_dims: tuple[Any, ...],
    inputs: tuple[Any, ...],
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """The rule of `torch.vmap`: a batch of calls, and where its dimension is in the outputs."""
    bare, *tensors = inputs
    results = [
        function.apply(
            bare,
            *(
                t if dim is None else t.select(dim, k)
                for t, dim in zip(tensors, in_dims[1:], strict=True)
            ),
        )
        for k in range(count)
    ]
    stacked = tuple(
        [None if parts[0] is None else torch.stack(parts) for parts in zip(*results, strict=True)]
    )
    return stacked, tuple([None if t is None else 0 for t in stacked])


def _plain_gradient(
    call: Call,
    upstream: Tensor,
    tau: Tensor | None,
    bias: Tensor | None,
    *xy: Tensor,
) -> tuple[Tensor | None, ...]:
    """`_gradient` in PyTorch's own operations, where `upstream` is a batch or has a tangent."""
    inputs = [None if t is None else _variable(t) for t in (tau, bias, *xy)]
    absent = [t is None for t in inputs]
    variables = [t for t in inputs if t is not None]
    found = iter(_pulled_back(_value(call, absent), variables, (upstream,)))
    return tuple([None if t is None else next(found) for t in inputs])


def _value(call: Call, absent: Sequence[bool]) -> Callable[..., tuple[Tensor]]:
    """The value in plain PyTorch, of those of (τ, bias, *x, *y) that are not `absent`."""
    whole = call._replace(backend="torch")

    def value(*variables: Tensor) -> tuple[Tensor]:
        present = iter(variables)
        inputs: list[Any] = [None if missing else next(present) for missing in absent]
        tau, bias, *xy = inputs
        return (whole.plain(tau, bias, xy[: call.pairs], xy[call.pairs :])[0],)

    return value


def _variable(t: Tensor) -> Tensor:
    """To differentiate by. In a further derivative the graph goes on into t, otherwise it ends here.

    A view keeps `grad` from walking into whatever made t, which is the engine's to do.
    """
    if torch._C._are_functorch_transforms_active():
        return t  # `vjp` makes its own
    if torch.is_grad_enabled() and t.requires_grad:
        return t.view_as(t)
    return t.detach().requires_grad_()


def _pulled_back(
    function: Callable[..., tuple[Tensor, ...]],
    variables: Sequence[Tensor],
    upstream: tuple[Any, ...],
) -> Sequence[Any]:
    """The gradients of Σ upstream · function(*variables), by torch.func where it is at work: it allows nothing else."""
    if torch._C._are_functorch_transforms_active():
        slopes: Sequence[Tensor] = torch.func.vjp(function, *variables)[1](upstream)
        return slopes
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        values = function(*variables)
    return torch.autograd.grad(values, variables, upstream, create_graph=again, allow_unused=True)


def _evaluate(
    call: Call, tau: Tensor | None, bias: Tensor | None, xy: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
    """What is to be shown, and what is kept for `_gradient`: the total's gradients, or logsumexps.

    Shown is the value; beside it means, or hits, with weights terms, and any ranks.
    """
    x, y = xy[: call.pairs], xy[call.pairs :]
    if call.weights is None:
        result = implementation(call.backend).forward(call.problems(tau, bias, x, y))
        return (result.loss, result.hits, *_counted(result)), [result.lse]
    terms, made = call.step(tau, bias, x, y)
    if call.detail == "total":
        return (terms.total,), made
    if terms.means is not None:
        return (terms.total, terms.means), made
    return (terms.total, terms.hits, terms.loss, *_counted(terms)), made


def _counted(terms: Terms) -> tuple[Tensor, ...]:
    return () if terms.ranks is None else (terms.ranks,)


def _made(call: Call, bias: Tensor | None) -> int:
    """How many tensors `_evaluate` keeps while all gradients are needed."""
    return 1 if call.weights is None else _scalars(bias) + 2 * call.pairs


def _scalars(bias: Tensor | None) -> int:
    """How many of a total's gradients are not by embeddings."""
    return 1 if bias is None else 2


def _gradient(
    call: Call,
    upstream: Tensor,
    tau: Tensor | None,
    bias: Tensor | None,
    *rest: Tensor,
) -> tuple[Tensor | None, ...]:
    """(dτ or None, dbias or None, *dx, *dy or None) out of what `_evaluate` made."""
    xy: Sequence[Tensor] = rest[: 2 * call.pairs]
    made: Sequence[Tensor] = rest[2 * call.pairs :]
    if call.weights is None:
        x, y = xy[: call.pairs], xy[call.pairs :]
        made = call.backward(tau, bias, x, y, made[0], upstream)
    else:
        made = scaled(made, upstream, xy[0].dtype, scalars=_scalars(bias), in_place=False)
    return _per_input(made, tau, bias, xy)


def _per_input(
    found: Sequence[Tensor], tau: Tensor | None, bias: Tensor | None, xy: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """(dτ, dbias if there is one, *dx, *dy if they are needed), in the dtypes of the inputs; else None."""
    d_tau, *others = found
    d_bias = None if bias is None else others.pop(0)
    others = in_dtype(others, xy[0].dtype)
    not_needed = (None,) * (len(xy) - len(others))
    return temperature_gradient(d_tau, tau), d_bias, *others, *not_needed


def _is_one(upstream: Tensor) -> bool:
    """Mostly it is. On a GPU, asking would wait for it."""
    return upstream.is_cpu and upstream.item() == 1
