"""The primitive as an `autograd.Function`: half the overhead of a registered operator; and for torch.func.

Second derivatives are those of `backends/plain.py`, which holds the logits; first ones never do.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdc_kernels.call import Call, scale, temperature_gradient
from hdc_kernels.selection import implementation


def value(
    call: Call, tau: Tensor | None, bias: Tensor | None, xy: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Value (which has gradients), terms and hits."""
    # Under torch.func, results travel by `setup_context`, which costs 15 µs more a call.
    if torch._C._are_functorch_transforms_active():
        result, hits, *rest = TransformedValue.apply(call, tau, bias, *xy)
    else:
        result, hits, *rest = Value.apply(call, tau, bias, *xy)
    return result, result.detach() if call.weights is None else rest[0], hits


class Value(torch.autograd.Function):
    """(call, τ or None, bias or None, *x, *y) -> (value, hits), with weights also the terms."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, tau: Tensor | None, bias: Tensor | None, *xy: Tensor
    ) -> tuple[Tensor, ...]:
        if not any(ctx.needs_input_grad[3 + call.pairs :]):
            call = call._replace(needs_y=False)
        shown, made = _evaluate(call, tau, bias, xy)
        ctx.call, ctx.made = call, made
        ctx.save_for_backward(tau, bias, *xy)
        ctx.mark_non_differentiable(*shown[1:])
        ctx.set_materialize_grads(False)
        return shown

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
        if upstream is None:
            return tuple(None for _ in ctx.needs_input_grad)
        tau, bias, *xy = ctx.saved_tensors
        made = ctx.made or _evaluate(ctx.call, tau, bias, xy)[1]
        if torch.is_grad_enabled():
            return None, *Gradient.apply(ctx.call, upstream, tau, bias, *xy, *made)
        # Gradients that need no scaling are given away, not copied: a second pass makes new ones.
        give_away = ctx.call.weights is not None and _is_one(upstream)
        if give_away:
            ctx.made = None
        return None, *_gradient(ctx.call, upstream, tau, bias, *xy, *made, scaled=give_away)


class TransformedValue(torch.autograd.Function):
    """`Value`, showing to torch.func what it saves: what it made on the way comes out behind the rest."""

    @staticmethod
    def forward(
        call: Call, tau: Tensor | None, bias: Tensor | None, *xy: Tensor
    ) -> tuple[Tensor, ...]:
        shown, made = _evaluate(call, tau, bias, xy)
        return *shown, *made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors, *output[2 if ctx.call.weights is None else 3 :])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
        if upstream is None:
            return tuple(None for _ in ctx.needs_input_grad)
        differentiate = Gradient.apply if torch.is_grad_enabled() else _gradient
        return None, *differentiate(ctx.call, upstream, *ctx.saved_tensors)


class Gradient(torch.autograd.Function):
    """`Value.backward` as a function of its own, so that it too has a derivative."""

    @staticmethod
    def forward(call: Call, upstream: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(call, upstream, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors[: 3 + 2 * ctx.call.pairs])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        call, again = ctx.call, torch.is_grad_enabled()
        inputs = [
            # In a third derivative the graph goes on into these tensors, otherwise it ends here. A view keeps
            # `grad` below from walking into whatever made them, which is the engine's to do.
            None
            if t is None
            else t.view_as(t)
            if again and t.requires_grad
            else t.detach().requires_grad_()
            for t in ctx.saved_tensors
        ]
        first, tau, bias, *xy = inputs
        variables = [t for t in inputs[1:] if t is not None]
        with torch.enable_grad():
            whole = call._replace(backend="torch")
            value, _, _ = whole.plain(tau, bias, xy[: call.pairs], xy[call.pairs :])
            slopes = torch.autograd.grad(value, variables, first, create_graph=True)
            of_slopes = [g for g, t in zip(upstream, inputs[1:], strict=True) if t is not None]
            asked = [k for k, g in enumerate(of_slopes) if g is not None]
            found = iter(
                torch.autograd.grad(
                    [slopes[k] for k in asked],
                    [first, *variables],
                    [of_slopes[k] for k in asked],
                    create_graph=again,
                    allow_unused=True,
                )
            )
        results = [None if t is None else next(found) for t in inputs]
        return None, *results, *(None for _ in ctx.needs_input_grad[1 + len(results) :])


def _evaluate(
    call: Call, tau: Tensor | None, bias: Tensor | None, xy: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
    """What `Value` shows, and what it keeps for `_gradient`: the total's gradients, or logsumexps."""
    x, y = xy[: call.pairs], xy[call.pairs :]
    if call.weights is None:
        result = implementation(call.backend).forward(call.problems(tau, bias, x, y))
        return (result.loss, result.hits), [result.lse]
    total, terms, hits, made = call.step(tau, bias, x, y)
    return (total, hits, terms), made


def _gradient(
    call: Call,
    upstream: Tensor,
    tau: Tensor | None,
    bias: Tensor | None,
    *rest: Tensor,
    scaled: bool = False,
) -> tuple[Tensor | None, ...]:
    """(dτ or None, dbias or None, *dx, *dy or None) out of what `_evaluate` made, which the upstream gradient is
    in already if it is `scaled`."""
    xy: Sequence[Tensor] = rest[: 2 * call.pairs]
    made: Sequence[Tensor] = rest[2 * call.pairs :]
    if call.weights is None:
        x, y = xy[: call.pairs], xy[call.pairs :]
        made = call.backward(tau, bias, x, y, made[0], upstream)
    elif not scaled:
        made = scale(made, upstream, xy[0].dtype, 1 if bias is None else 2)
    d_tau, *others = made
    d_bias = None if bias is None else others.pop(0)
    others = [d.to(xy[0].dtype) for d in others]
    not_needed = (None,) * (len(xy) - len(others))
    return temperature_gradient(d_tau, tau), d_bias, *others, *not_needed


def _is_one(upstream: Tensor) -> bool:
    """Mostly it is. On a GPU, asking would wait for it."""
    return upstream.device.type == "cpu" and upstream.item() == 1
