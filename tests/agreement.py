"""Whether two losses are the same function."""

from collections.abc import Callable

import torch
from torch import Tensor


def agree(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    *inputs: Tensor,
    bound: float = 1e-12,
    floor: float = 0.0,
) -> None:
    """The same value of the same inputs, and the same gradients, to `bound` relative in the L2 norm.

    `floor` is added to the norm, for what may be 0 but for rounding errors of larger numbers. The upstream
    gradient is random where there is more than one value.
    """
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        generator = torch.Generator().manual_seed(value.numel())
        upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        results.append([value, *torch.autograd.grad(value, leaves, upstream.to(value.dtype))])
    for our, their in zip(*results, strict=True):
        assert our.shape == their.shape
        assert our.dtype == their.dtype
        assert (our - their).norm() <= bound * (their.norm() + floor), (our, their)
