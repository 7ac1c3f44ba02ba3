"""From the terms of a loss's rows to what it returns: each times its sample's weight, summed, over all ranks."""

import torch
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.checks import Reduction
from hdc_kernels.distributed.rows import Rows


def reduce(
    terms: Tensor,
    reduction: Reduction,
    sample_weights: Tensor | None = None,
    across: Rows | None = None,
    *,
    count: int | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """ "none" w_i·l_i, "sum" Σ w_i·l_i, or "mean" Σ w_i·l_i / Σ w_i·c_i, of w_i = 1 if there are none.

    Args:
        terms: l.
        sample_weights: w, in the shape of the terms; or [B], of every row of a sample, for terms [2, B].
        across: the sums are over the terms of all ranks.
        count: how many terms there are on all ranks; one for each row if not given.
        shares: c, in the shape of the terms, where not every term counts once; the mean of nothing is then 0.
    """
    weights = None if sample_weights is None else sample_weights.to(terms.dtype).expand_as(terms)
    weighted = terms if weights is None else terms * weights
    if reduction != "mean" or (weights is None and shares is None):
        if across is None:
            return reference.reduce(weighted, reduction)
        return across.reduce(weighted, reduction, count)
    counted = torch.ones_like(terms) if shares is None else shares
    if weights is not None:
        counted = weights * counted
    divisor = counted.sum() if across is None else across.sum(counted.sum())
    if shares is not None:
        divisor = divisor.masked_fill(divisor == 0, 1)
    mean = weighted.sum() / divisor
    return mean if across is None else across.total(mean)


def check_sample_weights(
    weights: Tensor | None,
    shape: torch.Size | tuple[int, ...],
    device: torch.device,
    *,
    name: str = "sample_weights",
    views: int = 1,
) -> None:
    """One for each term, of this shape; of several `views`, one for each sample or for each of its views."""
    if weights is None:
        return
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} is a {type(weights).__name__}; it must be a tensor")
    allowed = [list(shape)] if views == 1 else [list(shape), [views, *shape]]
    if list(weights.shape) not in allowed or weights.device != device:
        raise ValueError(
            f"{name} has shape {list(weights.shape)} on {weights.device}; "
            f"it must be {' or '.join(map(str, allowed))} on {device}"
        )
