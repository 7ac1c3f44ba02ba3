"""Positives, row by row: whatever a loss needs of them is O(B·D) in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from hdc_kernels import reference


def embeddings(x: Tensor, *, normalize: bool) -> Tensor:
    """As every product takes them: in the dtype that is computed in, of length 1 if asked for."""
    x = x.to(reference.compute_dtype(x.dtype))
    return reference.l2_normalize(x) if normalize else x


def divide(similarity: Tensor, temperature: float | Tensor) -> Tensor:
    """Similarities as logits, of the same shape and dtype whatever a temperature tensor is."""
    if isinstance(temperature, Tensor):
        return similarity / temperature.to(similarity.dtype).reshape(())
    return similarity / float(temperature)


def positive_logits(
    query: Tensor, key: Tensor, temperature: float | Tensor, *, normalize: bool
) -> Tensor:
    """s_ii = sim(q_i, k_i)/τ: [..., D] twice -> [...]."""
    x, y = embeddings(query, normalize=normalize), embeddings(key, normalize=normalize)
    return divide((x * y).sum(-1), temperature)


def accuracy(ranks: Tensor) -> Tensor:
    """The share of rows whose positive no negative comes up to: float32, no dimension."""
    return (ranks == 0).float().mean()


def info_nce_terms(negative: Tensor, positive: Tensor) -> Tensor:
    """log(1 + exp(lse_i − s_ii)) of a logsumexp over negatives only: exact near convergence, 0 without any.

    `F.softplus` would be linear from 20 on.
    """
    return -F.logsigmoid(positive - negative)
