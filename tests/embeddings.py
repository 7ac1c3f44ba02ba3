"""Random embeddings that do not depend on the order of the tests."""

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, drawn in float64 whatever their dtype: the same to rounding in all of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same, requiring its gradient."""
    return randn(*shape, seed=seed, dtype=dtype).requires_grad_()
