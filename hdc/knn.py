"""Classification by the nearest training videos, on frozen features: nothing is trained.

The weighted vote is that of Wu et al., 2018 (Unsupervised Feature Learning via Non-Parametric Instance
Discrimination, Section 3.4), which DINO and others report; k = 20 and T = 0.07 are DINO's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hdc.data.manifest import Manifest
from hdc.features import Features
from hdc.retrieval import nearest


@dataclass(frozen=True)
class KnnResult:
    """Top-1 accuracy on the test videos where neighbours vote with weight exp(cosine / T), and with one vote each.

    neighbors: how many vote: k, or all training videos where there are fewer.
    """

    weighted: float
    majority: float
    neighbors: int


def vote(neighbor_ids: Tensor, weights: Tensor, classes: int) -> Tensor:
    """The class with the largest sum of weights; of equal ones, that of the nearest neighbour.

    Args:
        neighbor_ids: int64 [Q, k], classes of the neighbours, nearest first.
        weights: [Q, k].

    Returns:
        int64 [Q].
    """
    sums = weights.new_zeros(len(weights), classes).scatter_add_(1, neighbor_ids, weights)
    best = sums.gather(1, neighbor_ids).argmax(1, keepdim=True)  # the first of equal ones
    return neighbor_ids.gather(1, best).squeeze(1)


def score(
    train: Features, test: Features, manifest: Manifest, label: str, k: int, temperature: float
) -> KnnResult:
    """Let the `k` nearest of `train` by cosine vote on each of `test`; `label` names the column of classes."""
    names = manifest.labels(label).names
    train_ids, test_ids = (
        torch.from_numpy(part.manifest.labels(label, names).ids) for part in (train, test)
    )
    cosines, rows = nearest(test.vectors, train.vectors, k)
    # Relative to the nearest one: exp(cosine / T) itself overflows for T below 0.0113.
    weights = ((cosines - cosines[:, :1]) / temperature).double().exp()
    weighted, majority = (
        (vote(train_ids[rows], given, len(names)) == test_ids).double().mean().item()
        for given in (weights, torch.ones_like(weights))
    )
    return KnnResult(weighted, majority, neighbors=rows.shape[1])
