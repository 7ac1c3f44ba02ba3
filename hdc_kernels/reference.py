"""The specification: the paper's equations 1 to 6 in plain PyTorch, one function each.

Every fused backend is tested against this file, in float64. It materialises the B×B logits, runs in
any floating dtype, and is differentiable as often as you like. Nothing is summed over the batch here:
each function returns one value per query, and `reduce` does the rest.

Half-precision inputs are computed, and returned, in float32: a norm or a sum of exponentials does not
fit into 16 bits. Everything else keeps its dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# A vector no longer than this counts as the zero vector: its cosine with anything is 0 and its gradient
# is 0. Norms are never taken in 16 bits, so the bound holds for float16 inputs too (there, 1e-12 would
# itself round to 0, and every non-zero vector is longer than it).
ZERO_NORM = 1e-12


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that inputs of `dtype` are computed in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def l2_normalize(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; zero vectors stay zero and get a zero gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.where(norm > ZERO_NORM, norm.clamp_min(ZERO_NORM).reciprocal(), 0.0)
    return x * inverse


def cosine_logits(
    query: Tensor, key: Tensor, temperature: float | Tensor, *, normalize: bool = True
) -> Tensor:
    """sim(q_i, k_j) / τ, the exponent of Eq. 2: query [..., B, D], key [..., B, D] -> [..., B, B]."""
    # Autocast would turn the product into a 16-bit one; the logits need the full mantissa.
    with torch.autocast(query.device.type, enabled=False):
        dtype = compute_dtype(query.dtype)
        query, key = query.to(dtype), key.to(dtype)
        if isinstance(temperature, Tensor):  # a [1] or float64 one would widen the logits
            temperature = temperature.to(dtype).reshape(())
        if normalize:
            query, key = l2_normalize(query), l2_normalize(key)
        return query @ key.mT / temperature


def info_nce(logits: Tensor, *, symmetric: bool = False) -> Tensor:
    """Eq. 1 and 3, one term per query: logits [..., B, B], positives on the diagonal -> [..., B].

    `symmetric` gives the mean of both directions (query to key, key to query).
    """
    positive = logits.diagonal(dim1=-2, dim2=-1)
    loss = logits.logsumexp(-1) - positive
    if symmetric:
        loss = (loss + logits.logsumexp(-2) - positive) / 2
    return loss


def top1(logits: Tensor, first: int = 0) -> Tensor:
    """Whether the positive beats every negative: [..., B, N] -> bool [..., B]. A tie is a miss, and so is NaN.

    The positive of row 0 is in column `first`.
    """
    positive = logits.diagonal(offset=first, dim1=-2, dim2=-1)
    beaten = (logits < positive.unsqueeze(-1)).sum(-1)  # no NaN counts as beaten
    return (beaten == logits.shape[-1] - 1) & ~positive.isnan()


def spatial_logits(
    query: Tensor, key: Tensor, temperature: float | Tensor, *, normalize: bool = True
) -> Tensor:
    """Eq. 4's logits: each of the N timesteps is a problem of its own. [B, N, D] twice -> [N, B, B]."""
    return cosine_logits(
        query.transpose(0, 1), key.transpose(0, 1), temperature, normalize=normalize
    )


def spatial_contrast(logits: Tensor) -> Tensor:
    """Eq. 4, one term per clip: the mean over timesteps. [N, B, B] -> [B]."""
    return info_nce(logits).mean(0)


def temporal_contrast(logits: Tensor) -> Tensor:
    """Eq. 5, one term per clip: [B, B] -> [B]."""
    return info_nce(logits)


def hd_nce(
    spatial: Sequence[Tensor],
    temporal: Sequence[Tensor],
    alpha: Sequence[float],
    beta: Sequence[float],
) -> Tensor:
    """Eq. 6, one term per clip: Σ_k α_k·L_s^k + β_k·L_t^k, of the terms of Eq. 4 and 5. K × [B] -> [B]."""
    weighted = zip((*alpha, *beta), (*spatial, *temporal), strict=True)
    return torch.stack([weight * term for weight, term in weighted]).sum(0)


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """ "none", "sum" or "mean" over every element."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()
