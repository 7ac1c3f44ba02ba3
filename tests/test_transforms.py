"""The losses under torch.func, forward-mode AD and batched gradients: what plain PyTorch gives under the same."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from embeddings import randn
from equations import relative_error
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from hdc_kernels import fused_clip, fused_hd_nce, fused_info_nce, fused_siglip
from hdc_kernels.backends import Mask, plain
from hdc_kernels.pairwise import softplus_sum

Function = Callable[..., Tensor]


def info_nce(x: Tensor, y: Tensor, tau: Tensor, **options: Any) -> Tensor:
    return fused_info_nce(x, y, temperature=tau, **options)


def hd_nce(x: Tensor, y: Tensor, tau: Tensor, **options: Any) -> Tensor:
    """Two timesteps of each clip, and their sum."""
    spatial, temporal = [(x.unflatten(0, (-1, 2)), y.unflatten(0, (-1, 2)))], [(x + y, x * y)]
    weights: dict[str, Any] = {"alpha": [0.7], "beta": [1.3]}
    return fused_hd_nce(
        spatial, [(p[::2], t[::2]) for p, t in temporal], temperature=tau, **weights, **options
    )


def siglip(x: Tensor, y: Tensor, tau: Tensor, **options: Any) -> Tensor:
    return fused_siglip(x, y, temperature=tau, bias=-tau.square(), **options)


LOSSES = [info_nce, hd_nce, siglip]
INPUTS = randn(6, 4), randn(6, 4, seed=1), torch.tensor(0.6, dtype=torch.float64)
DIRECTIONS = tuple(randn(*t.shape, seed=5 + k) for k, t in enumerate(INPUTS))
BATCHES = tuple(randn(3, *t.shape, seed=9 + k).abs() + 0.1 for k, t in enumerate(INPUTS))
ALL = (0, 1, 2)


def with_metric(loss: Function) -> Function:
    """Evaluates it beside itself, without a gradient, in both ways that there are."""

    def both(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            metric = loss(*inputs)
        return loss(*inputs) * metric + loss(*(t.detach() for t in inputs))

    return both


def grad(loss: Function) -> Any:
    return torch.func.grad(lambda *t: loss(*t).square().sum(), ALL)(*INPUTS)


def grad_beside_a_metric(loss: Function) -> Any:
    return grad(with_metric(loss))


def vjp(loss: Function) -> Any:
    value, pull_back, *_ = torch.func.vjp(with_metric(loss), *INPUTS)
    return value, pull_back(randn(*value.shape, seed=3))


def jvp(loss: Function) -> Any:
    return torch.func.jvp(with_metric(loss), INPUTS, DIRECTIONS)


def jvp_of_vjp(loss: Function) -> Any:
    value, pull_back, *_ = torch.func.vjp(loss, *INPUTS)
    upstream = randn(*value.shape, seed=3)
    return torch.func.jvp(pull_back, (upstream,), (upstream,))


def grad_of_jvp(loss: Function) -> Any:
    def tangent(*inputs: Tensor) -> Tensor:
        return torch.func.jvp(loss, inputs, DIRECTIONS)[1].square().sum()

    return torch.func.grad(tangent, ALL)(*INPUTS)


def jacrev(loss: Function) -> Any:
    return torch.func.jacrev(with_metric(loss), ALL)(*INPUTS)


def jacrev_without_grad(loss: Function) -> Any:
    with torch.no_grad():
        return jacrev(loss)


def jacfwd(loss: Function) -> Any:
    return torch.func.jacfwd(with_metric(loss), ALL)(*INPUTS)


def hessian(loss: Function) -> Any:
    return torch.func.hessian(loss, ALL)(*INPUTS)


def hessian_in_reverse(loss: Function) -> Any:
    return torch.func.jacrev(torch.func.jacrev(loss, ALL), ALL)(*INPUTS)


def third_derivative(loss: Function) -> Any:
    def of(function: Function) -> Function:
        return lambda x: torch.func.grad(lambda x: function(x).square().sum())(x)

    return of(of(of(lambda x: loss(x, *INPUTS[1:]))))(INPUTS[0])


def vmap(loss: Function) -> Any:
    everything = torch.vmap(loss)(*BATCHES)
    return everything, torch.vmap(loss, (None, 1, None))(
        INPUTS[0], BATCHES[1].transpose(0, 1), INPUTS[2]
    )


def vmap_of_vmap(loss: Function) -> Any:
    return torch.vmap(lambda x: torch.vmap(lambda y: loss(x, y, INPUTS[2]))(BATCHES[1]))(BATCHES[0])


def vmap_of_grad(loss: Function) -> Any:
    return torch.vmap(torch.func.grad(lambda *t: loss(*t).square().sum(), ALL))(*BATCHES)


def grad_of_vmap(loss: Function) -> Any:
    return torch.func.grad(lambda *t: torch.vmap(loss)(*t).square().sum(), ALL)(*BATCHES)


def backward_of_vmap(loss: Function) -> Any:
    inputs = [t.clone().requires_grad_() for t in BATCHES]
    slopes = torch.autograd.grad(
        torch.vmap(loss)(*inputs).square().sum(), inputs, create_graph=True
    )
    return slopes, torch.autograd.grad(sum(s.square().sum() for s in slopes), inputs)


def dual_numbers(loss: Function, inputs: Sequence[Tensor] = INPUTS) -> Any:
    with forward_ad.dual_level():
        pairs = zip(inputs, DIRECTIONS, strict=True)
        result = forward_ad.unpack_dual(loss(*(forward_ad.make_dual(*p) for p in pairs)))
        return result.primal, result.tangent


def backward_of_dual_numbers(loss: Function) -> Any:
    inputs = [t.clone().requires_grad_() for t in INPUTS]
    result = dual_numbers(loss, inputs)
    return result, torch.autograd.grad(result[0].square().sum(), inputs)


def dual_upstream(loss: Function) -> Any:
    """Forward mode entered only for the backward pass."""
    inputs = [t.clone().requires_grad_() for t in INPUTS]
    value = loss(*inputs)
    upstream = randn(*value.shape, seed=3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(upstream, upstream.square())
        slopes = torch.autograd.grad(value, inputs, dual)
        return [t.clone() for s in slopes for t in forward_ad.unpack_dual(s)]


def batched_gradients(loss: Function, create_graph: bool = False) -> Any:
    inputs = [t.clone().requires_grad_() for t in INPUTS]
    value = loss(*inputs)
    upstream = randn(3, *value.shape, seed=3)
    slopes = torch.autograd.grad(
        value, inputs, upstream, is_grads_batched=True, create_graph=create_graph
    )
    if not create_graph:
        return slopes
    return slopes, torch.autograd.grad(sum(s.square().sum() for s in slopes), inputs)


def batched_hessian(loss: Function) -> Any:
    """`torch.autograd.functional` has batches of its own, and two ways to make a Hessian."""
    hessian = partial(torch.autograd.functional.hessian, lambda *t: loss(*t).sum(), INPUTS)
    return hessian(vectorize=True), hessian(vectorize=True, outer_jacobian_strategy="forward-mode")


FIRST_IN_REVERSE = [
    grad_beside_a_metric,
    vjp,
    jacrev,
    jacrev_without_grad,
    vmap,
    vmap_of_vmap,
    vmap_of_grad,
    grad_of_vmap,
]
OTHERS = [
    jvp,
    jvp_of_vjp,
    grad_of_jvp,
    jacfwd,
    hessian,
    hessian_in_reverse,
    third_derivative,
    backward_of_vmap,
    dual_numbers,
    backward_of_dual_numbers,
    dual_upstream,
    batched_gradients,
    partial(batched_gradients, create_graph=True),
    batched_hessian,
]


def name(transform: Any) -> str:
    return getattr(transform, "__name__", "differentiable_batched_gradients")


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("transform", FIRST_IN_REVERSE + OTHERS, ids=name)
def test_transforms(transform: Any, loss: Function, reduction: str, backend: str) -> None:
    """Each gives what it gives of the specification."""
    found, expected = (
        tree_leaves(transform(partial(loss, reduction=reduction, backend=b)))
        for b in (backend, "torch")
    )
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 1e-11
    assert any(t.any() for t in expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_kernels_serve_first_derivatives_in_reverse(
    loss: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without plain PyTorch, whose matrix of pairs would not fit: a batch, too, is one call after the other."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("plain PyTorch was called")

    monkeypatch.setattr(plain, "terms", refuse)
    for reduction in ("mean", "none"):
        for transform in FIRST_IN_REVERSE:
            transform(partial(loss, reduction=reduction, backend="cpu"))
    with pytest.raises(AssertionError, match="plain PyTorch"):
        jvp(partial(loss, backend="cpu"))


def test_batched_masks_and_metrics() -> None:
    """Whatever else is a tensor may have the batch's dimension, in any place."""
    ids = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 4]])

    def evaluate(x: Tensor, y: Tensor, tau: Tensor, ids: Tensor) -> Any:
        return fused_clip(x, y, temperature=tau, ids=ids, backend="cpu", return_metrics=True)

    singly = [tree_leaves(evaluate(*t)) for t in zip(*BATCHES, ids, strict=True)]
    batch = tree_leaves(torch.vmap(evaluate, (0, 0, 0, 1))(*BATCHES, ids.T))
    assert len(batch) == 5  # the loss, and four metrics
    for found, expected in zip(batch, zip(*singly, strict=True), strict=True):
        assert torch.equal(found, torch.stack(expected))


def test_a_batch_of_biases() -> None:
    """One for each row, in whichever dimension the batch is."""
    bias, options = randn(6, 3, seed=4), {"temperature": 0.6, "mask": Mask(diagonal=False)}
    x, y, _ = INPUTS

    def value(bias: Tensor) -> Tensor:
        return softplus_sum(x, y, bias, backend="cpu", **options)

    singly = torch.stack([value(b) for b in bias.unbind(1)])
    assert torch.equal(torch.vmap(value, 1)(bias), singly)
    slopes = torch.stack([torch.func.grad(lambda b: value(b).sum())(b) for b in bias.unbind(1)])
    of_all = torch.func.grad(lambda b: torch.vmap(value, 1)(b).sum())(bias)
    assert torch.equal(of_all, slopes.T)


@pytest.mark.parametrize("transform", [grad_beside_a_metric, jvp, jacrev, vmap, dual_numbers])
def test_compiled_transforms(transform: Any) -> None:
    """The operators have no rules for transforms: plain PyTorch is what is compiled."""
    loss = partial(info_nce, reduction="none")
    compiled = torch.compile(partial(transform, loss), fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    for ours, theirs in zip(tree_leaves(compiled()), tree_leaves(transform(loss)), strict=True):
        assert relative_error(ours, theirs) < 1e-11
