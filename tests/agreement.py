"""Whether two losses are the same function."""

from collections.abc import Callable
from typing import Any

import digits
import torch
from torch import Tensor


def agree(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    *inputs: Tensor,
    bound: float = 1e-12,
    floor: float = 0.0,
    exact: Callable[..., Any] | None = None,
) -> None:
    """The same value of the same inputs, and the same gradients, to `bound` relative in the L2 norm.

    `floor` is added to the norm, for what may be 0 but for rounding errors of larger numbers. Where they differ
    by more, `exact`, a function for `digits.evaluate`, may decide: ours must be within the bound of it, or as near to
    it as theirs. The upstream gradient is random where there is more than one value.
    """
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        generator = torch.Generator().manual_seed(value.numel())
        upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        results.append([value, *torch.autograd.grad(value, leaves, upstream.to(value.dtype))])
    truth = None
    for k, (our, their) in enumerate(zip(*results, strict=True)):
        assert our.shape == their.shape
        assert our.dtype == their.dtype
        if (our - their).norm() <= bound * (their.norm() + floor):
            continue
        assert exact is not None, (our, their)
        truth = truth or digits.evaluate(exact, inputs, upstream)
        error, their_error = (digits.distance(found, truth[k]) for found in (our, their))
        enough = max(bound * digits.norm(truth[k]), their_error)
        assert error <= enough, (our, their, truth[k], error, their_error)


def no_worse_than_plain(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], *half: Tensor
) -> None:
    """Errors against float64, of the loss and of all gradients, at most twice those of the plain loss in 16 bits.

    A NaN fails every comparison.
    """
    results = []
    for function, inputs in (
        (plain, [x.detach().double() for x in half]),
        (plain, half),
        (ours, half),
    ):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        results.append([value.double(), *torch.autograd.grad(value, leaves)])
    assert all(found.dtype == x.dtype for found, x in zip(results[2][1:], half, strict=True))
    for exact, their, our in zip(*results, strict=True):
        assert (our - exact).norm() <= 2 * (their - exact).norm()


def weighted(
    terms: Tensor, weights: Tensor, reduction: str, counts: Tensor | float = 1.0
) -> Tensor:
    """w·l, Σ w·l, or Σ w·l / Σ w·c, where a term counts c times."""
    weights = weights.expand(terms.shape)
    if reduction == "mean":
        return (weights * terms).sum() / (weights * counts).sum()
    return (weights * terms).sum() if reduction == "sum" else weights * terms
