"""The scales that the tests of HD-NCE contrast: three spatial and three temporal pairs, and their weights."""

from typing import Any

import torch
from torch import Tensor

from hdc_kernels.hd_nce import Pair

STEPS, WIDTHS = (4, 2, 1), (3, 5, 2)  # per scale: the encoder halves time, widths need not agree
ALPHA, BETA = (0.25, 0.5, 1.0), (0.75, 0.0, 2.0)


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Pair:
    """Two random views, the same whatever the order of the tests; leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn((2, *shape), generator=generator, dtype=torch.float64).to(dtype)
    return views[0].requires_grad_(), views[1].requires_grad_()


def scales(batch: int, dtype: torch.dtype = torch.float64) -> tuple[list[Pair], list[Pair]]:
    """Three spatial and three temporal pairs, no two alike."""
    spatial = [
        pair(batch, steps, width, seed=k, dtype=dtype)
        for k, (steps, width) in enumerate(zip(STEPS, WIDTHS, strict=True))
    ]
    temporal = [pair(batch, width, seed=3 + k, dtype=dtype) for k, width in enumerate(WIDTHS)]
    return spatial, temporal


def leaves(spatial: list[Pair], temporal: list[Pair]) -> list[Tensor]:
    """Every embedding batch, in the order of `equations.hd_nce_gradient`."""
    return [view for views in (*spatial, *temporal) for view in views]


def lists(pairs: list[Pair]) -> list[tuple[Any, Any]]:
    """The same embeddings as plain Python."""
    return [(first.tolist(), second.tolist()) for first, second in pairs]
