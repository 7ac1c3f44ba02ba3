"""The primitive in plain, differentiable PyTorch: the specification, whole or in chunks of rows.

Whole, it is `hdc_kernels/reference.py` and holds the logits. In chunks it holds only some of them at a time:
it forgets them after use and computes them again in the backward pass, which takes longer than any other
backend but runs wherever PyTorch does.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hdc_kernels import reference
from hdc_kernels.backends import Problems

CHUNK = 2**22  # logits held at a time: 16 MiB in float32


def terms(problems: Problems, *, chunked: bool = False) -> tuple[Tensor, Tensor]:
    """Every row's loss term and hit, [T] each, as `hdc_kernels.backends.Terms` has them."""
    evaluate = _in_chunks if chunked else _whole
    results = [evaluate(x, y, problems) for x, y in zip(problems.x, problems.y, strict=True)]
    if len(results) == 1:
        return results[0][0].flatten(), results[0][1].flatten()
    loss, hits = zip(*results, strict=True)
    return torch.cat([t.flatten() for t in loss]), torch.cat([t.flatten() for t in hits])


def total(problems: Problems, loss: Tensor) -> Tensor:
    """Σ_k weights[k] · Σ terms of pair k."""
    if len(problems.x) == 1:
        return loss.sum() * problems.weights[0]
    pairs = loss.split([x.shape[0] * x.shape[1] for x in problems.x])
    sums = zip(problems.weights, pairs, strict=True)
    return torch.stack([weight * pair.sum() for weight, pair in sums]).sum()


def _whole(x: Tensor, y: Tensor, problems: Problems) -> tuple[Tensor, Tensor]:
    logits = reference.cosine_logits(x, y, problems.temperature, normalize=problems.normalize)
    return reference.info_nce(logits, symmetric=problems.symmetric), reference.top1(logits)


def _in_chunks(x: Tensor, y: Tensor, problems: Problems) -> tuple[Tensor, Tensor]:
    rows = max(1, CHUNK // (y.shape[0] * y.shape[1]))
    parts = []
    columns = x.new_full(y.shape[:2], -torch.inf, dtype=reference.compute_dtype(x.dtype))
    for first, chunk in zip(range(0, x.shape[1], rows), x.split(rows, 1), strict=True):
        part = checkpoint(_chunk, chunk, y, first, problems, use_reentrant=False)
        parts.append(part)
        columns = torch.logaddexp(columns, part[3])
    lse, positive, hits = (torch.cat([part[k] for part in parts], 1) for k in range(3))
    loss = lse - positive
    if problems.symmetric:
        loss = (loss + columns - positive) / 2
    return loss, hits


def _chunk(
    x: Tensor, y: Tensor, first: int, problems: Problems
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows' logsumexp, positive logit and hit [G, rows]; columns' logsumexp over these rows [G, N]."""
    logits = reference.cosine_logits(x, y, problems.temperature, normalize=problems.normalize)
    positive = logits.diagonal(offset=first, dim1=-2, dim2=-1)
    hits = reference.top1(logits, first)
    return logits.logsumexp(-1), positive, hits, logits.logsumexp(-2)
