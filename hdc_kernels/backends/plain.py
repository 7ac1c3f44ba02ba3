"""The primitive in plain, differentiable PyTorch: the specification, whole or in chunks of rows.

Whole, it holds the logits. In chunks it holds only some of them at a time: it forgets them after use and
computes them again in the backward pass, which takes longer than any other backend but runs wherever
PyTorch does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hdc_kernels import reference
from hdc_kernels.backends import Problems

CHUNK = 2**22  # logits held at a time: 16 MiB in float32


def terms(problems: Problems, *, chunked: bool = False) -> tuple[Tensor, Tensor]:
    """Every row's term and hit, [T] each, as `hdc_kernels.backends.Terms` has them."""
    evaluate = _in_chunks if chunked else _whole
    problems = problems.grouped()
    count = len(problems.x)
    biases = [None] * count if problems.bias is None else problems.bias.split(problems.rows)
    pairs = zip(problems.x, problems.y, biases, strict=True)
    results = [evaluate(x, y, bias, problems) for x, y, bias in pairs]
    if len(results) == 1:
        return results[0][0].flatten(), results[0][1].flatten()
    loss, hits = zip(*results, strict=True)
    return torch.cat([t.flatten() for t in loss]), torch.cat([t.flatten() for t in hits])


def total(problems: Problems, loss: Tensor) -> Tensor:
    """Σ_k weights[k] · Σ terms of pair k."""
    if len(problems.x) == 1:
        return loss.sum() * problems.weights[0]
    pairs = loss.split(problems.rows)
    sums = zip(problems.weights, pairs, strict=True)
    return torch.stack([weight * pair.sum() for weight, pair in sums]).sum()


def ranks(problems: Problems) -> Tensor:
    """`Terms.ranks`, for whoever does not count them on the way."""
    # "info_nce" lets the positive through, which does not beat itself.
    return rivals(problems._replace(function="info_nce"))[0] - 1


@torch.no_grad()
def rivals(problems: Problems, positive: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many of each row's columns the positive's logit is not above, and that logit, [T] each.

    The positive is on the diagonal, and then among these columns, unless its logit is given.
    """
    problems = problems.grouped()
    given = [None] * len(problems.x) if positive is None else positive.split(problems.rows)
    counts, positives = [], []
    for x, y, its in zip(problems.x, problems.y, given, strict=True):
        rows = max(1, CHUNK // (y.shape[0] * y.shape[1]))
        parts = []
        for first, chunk in zip(range(0, x.shape[1], rows), x.split(rows, 1), strict=True):
            logits = _logits(chunk, y, first, problems)
            own = (
                logits.diagonal(offset=first, dim1=-2, dim2=-1)
                if its is None
                else its.view(x.shape[:2])[:, first : first + rows]
            )
            parts.append(((~(logits < own.unsqueeze(-1))).sum(-1), own))
        count, found = (torch.cat(part, 1).flatten() for part in zip(*parts, strict=True))
        counts.append(count)
        positives.append(found)
    return torch.cat(counts), torch.cat(positives)


def _whole(x: Tensor, y: Tensor, bias: Tensor | None, problems: Problems) -> tuple[Tensor, Tensor]:
    logits = _logits(x, y, 0, problems)
    if problems.function == "info_nce":
        return reference.info_nce(logits, symmetric=problems.symmetric), reference.top1(logits)
    loss = _of_rows(logits, bias, problems)
    if problems.symmetric:
        loss = (loss + _logsumexp(logits, -2)) / 2
    return loss, torch.zeros_like(loss, dtype=torch.bool)


def _in_chunks(
    x: Tensor, y: Tensor, bias: Tensor | None, problems: Problems
) -> tuple[Tensor, Tensor]:
    rows = max(1, CHUNK // (y.shape[0] * y.shape[1]))
    bias = None if bias is None else bias.view(x.shape[:2])
    parts = []
    columns = x.new_full(y.shape[:2], -torch.inf, dtype=reference.compute_dtype(x.dtype))
    for first, chunk in zip(range(0, x.shape[1], rows), x.split(rows, 1), strict=True):
        its_bias = None if bias is None else bias[:, first : first + rows]
        part = checkpoint(_chunk, chunk, y, its_bias, first, problems, use_reentrant=False)
        parts.append(part)
        if problems.symmetric:
            columns = torch.logaddexp(columns, part[3])
    loss, positive, hits = (torch.cat([part[k] for part in parts], 1) for k in range(3))
    if problems.function == "info_nce":
        loss = loss - positive
        columns = columns - positive if problems.symmetric else columns
    if problems.symmetric:
        loss = (loss + columns) / 2
    return loss, hits


def _chunk(
    x: Tensor, y: Tensor, bias: Tensor | None, first: int, problems: Problems
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of these rows, [G, rows]: logsumexp or sum, positive logit, hit; columns' logsumexp over them [G, N]."""
    logits = _logits(x, y, first, problems)
    if problems.function == "info_nce":
        positive = logits.diagonal(offset=first, dim1=-2, dim2=-1)
        hits = reference.top1(logits, first)
        return logits.logsumexp(-1), positive, hits, _logsumexp(logits, -2)
    loss = _of_rows(logits, bias, problems)
    nothing = torch.zeros_like(loss)
    return loss, nothing, nothing.bool(), _logsumexp(logits, -2)


def _of_rows(logits: Tensor, bias: Tensor | None, problems: Problems) -> Tensor:
    """The terms of all functions that know no positives, [G, rows]; the columns' share apart."""
    if problems.function == "softplus":
        return _softplus(logits, bias)
    if problems.function == "tilted":
        return _tilted(logits, problems.beta)
    return _logsumexp(logits, -1)


def _logits(x: Tensor, y: Tensor, first: int, problems: Problems) -> Tensor:
    """[G, rows, N], −inf where the mask lets nothing through; x begins with row `first`."""
    logits = reference.cosine_logits(x, y, problems.temperature, normalize=problems.normalize)
    mask, (rows, columns) = problems.mask, logits.shape[1:]
    if mask.ids is None and mask.left_out is None and mask.diagonal:
        return logits
    if mask.ids is None:
        out = torch.zeros((1, rows, columns), dtype=torch.bool, device=x.device)
    else:
        x_ids, y_ids = mask.ids
        equal = x_ids[:, first : first + rows, None] == y_ids[:, None]
        out = ~equal if mask.same else equal
    if mask.left_out is not None:
        row, column = mask.left_out
        here = (row >= first) & (row < first + rows)
        out = out.clone()
        out[0, row[here] - first, column[here]] = True
    diagonal = torch.arange(columns, device=x.device) == torch.arange(
        first, first + rows, device=x.device
    ).unsqueeze(1)
    if problems.function == "info_nce":
        out = out & ~diagonal
    elif not mask.diagonal:
        out = out | diagonal
    return logits.masked_fill(out, -torch.inf)


def _logsumexp(logits: Tensor, dimension: int) -> Tensor:
    """−inf, with a gradient of 0, where all are −inf: torch.logsumexp would make the gradient NaN."""
    empty = (logits == -torch.inf).all(dimension, keepdim=True)
    lse = logits.masked_fill(empty, 0.0).logsumexp(dimension)
    return lse.masked_fill(empty.squeeze(dimension), -torch.inf)


def _tilted(logits: Tensor, beta: float) -> Tensor:
    """log Σ_j exp((1 + β)·s_ij) − log Σ_j exp(β·s_ij), −inf, with a gradient of 0, where all are −inf."""
    lse, tilt = _logsumexp(logits * (1 + beta), -1), _logsumexp(logits * beta, -1)
    return (lse - tilt).masked_fill(lse == -torch.inf, -torch.inf)


def _softplus(logits: Tensor, bias: Tensor | None) -> Tensor:
    """Σ_j log(1 + exp(s_ij + bias_i)).

    `F.softplus` would be linear from 20 on, and the second derivative of `torch.logaddexp` NaN at −inf.
    """
    assert bias is not None
    shifted = logits + bias.view(logits.shape[:2]).unsqueeze(-1)
    return -F.logsigmoid(-shifted).sum(-1)
