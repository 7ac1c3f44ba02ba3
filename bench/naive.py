"""The losses as everyone writes them first: one B × B matrix after the other, in plain PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def info_nce(query: Tensor, key: Tensor, temperature: float, *, symmetric: bool = False) -> Tensor:
    """Normalise, multiply, cross entropy; [B, D] twice, or [G, B, D] for G problems at once."""
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT / temperature
    logits = logits.float()  # as autocast does before a softmax
    loss = _cross_entropy(logits)
    return (loss + _cross_entropy(logits.mT)) / 2 if symmetric else loss


def _cross_entropy(logits: Tensor) -> Tensor:
    batch = logits.shape[-1]
    target = torch.arange(batch, device=logits.device).repeat(logits.numel() // batch**2)
    return F.cross_entropy(logits.reshape(-1, batch), target)


def hd_nce_loop(
    spatial: Sequence[Pair], temporal: Sequence[Pair], weights: Sequence[float], temperature: float
) -> Tensor:
    """One InfoNCE after the other, as the paper's equations read; α = β = `weights`."""
    loss = torch.zeros((), device=temporal[0][0].device)
    for weight, (v_o, v_s), (w_o, w_t) in zip(weights, spatial, temporal, strict=True):
        steps = v_o.shape[1]
        for n in range(steps):
            loss = loss + weight / steps * info_nce(v_o[:, n], v_s[:, n], temperature)
        loss = loss + weight * info_nce(w_o, w_t, temperature)
    return loss


def hd_nce_bmm(
    spatial: Sequence[Pair], temporal: Sequence[Pair], weights: Sequence[float], temperature: float
) -> Tensor:
    """All problems in one batched product; α = β = `weights`."""
    pairs = [(v_o.transpose(0, 1), v_s.transpose(0, 1)) for v_o, v_s in spatial]
    pairs += [(w_o[None], w_t[None]) for w_o, w_t in temporal]
    query, key = (torch.cat(views) for views in zip(*pairs, strict=True))
    logits = (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT / temperature).float()
    problems, batch = logits.shape[:2]
    target = torch.arange(batch, device=logits.device).repeat(problems)
    terms = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
    losses = terms.view(problems, batch).mean(1)
    shares = [weight / len(q) for weight, (q, _) in zip([*weights, *weights], pairs, strict=True)]
    steps = [len(q) for q, _ in pairs]
    return sum(
        (share * part.sum() for share, part in zip(shares, losses.split(steps), strict=True)),
        losses.new_zeros(()),
    )


def sup_con_in(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """−log( Σ positives / Σ all but self ) over masked logits."""
    unit = F.normalize(embeddings, dim=-1)
    logits = (unit @ unit.mT / temperature).float()
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    others = logits.masked_fill(itself, -torch.inf)
    positives = others.masked_fill(labels[:, None] != labels, -torch.inf)
    return (others.logsumexp(-1) - positives.logsumexp(-1)).mean()


def hn_nce(query: Tensor, key: Tensor, temperature: float, *, beta: float) -> Tensor:
    """InfoNCE whose negatives weigh n·softmax(β·logits)."""
    logits = (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT / temperature).float()
    positive, negatives = logits.diagonal(), len(logits) - 1
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(itself, -torch.inf)
    weighted = negatives * (beta * logits).softmax(-1) * logits.exp()
    return (positive.exp() + weighted.sum(-1)).log().sub(positive).mean()
