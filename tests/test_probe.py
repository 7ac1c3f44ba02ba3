"""The linear probe: it reaches the optimum of a convex problem, and counts right."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hdc.data.manifest import Manifest
from hdc.errors import InputError
from hdc.features import Features
from hdc.probe import fit_linear, score


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    """Three overlapping classes in eight dimensions."""
    torch.manual_seed(0)
    ids = torch.arange(120) % 3
    return torch.randn(120, 8) + torch.randn(3, 8)[ids], ids


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_optimum(problem: tuple[Tensor, Tensor], l2: float) -> None:
    """Where the gradient of cross-entropy + l2·|W|², derived by hand, is zero."""
    features, ids = problem
    weight, bias = fit_linear(features, ids, 3, l2)
    x = features.double()
    logits = x @ weight + bias
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    excess = (probabilities - torch.eye(3, dtype=torch.float64)[ids]) / len(x)
    assert (x.T @ excess + 2 * l2 * weight).abs().max() < 1e-5
    assert excess.sum(0).abs().max() < 1e-5  # the bias carries no penalty


def test_penalty_shrinks_weights(problem: tuple[Tensor, Tensor]) -> None:
    norms = [fit_linear(*problem, 3, l2)[0].norm().item() for l2 in (1e-4, 1e-2, 1.0)]
    assert norms == sorted(norms, reverse=True)
    assert norms[2] < 0.2 * norms[0]


def videos(labels: str) -> Manifest:
    count = len(labels)
    columns = {"label": np.array(list(labels))}
    paths = np.array([f"{i}.avi" for i in range(count)])
    return Manifest(Path("manifest.csv"), paths, np.zeros(count, int), np.full(count, 16), columns)


def split(vectors: Tensor, labels: str, train: int) -> tuple[Features, Features, Manifest]:
    """The first `train` rows, the others, and the whole manifest."""
    manifest = videos(labels)
    rows = np.arange(len(labels))
    first = Features(vectors[:train], manifest.take(rows[:train]), [])
    return first, Features(vectors[train:], manifest.take(rows[train:]), []), manifest


def test_separable_classes() -> None:
    """Two of four test videos lie on the wrong side, and are counted as misses."""
    train = [[-1.0, 5.0], [-2.0, 5.0], [1.0, 5.0], [2.0, 5.0]]  # the second feature is constant
    test = [[-1.5, 5.0], [1.5, 5.0], [-1.0, 5.0], [1.0, 5.0]]
    result = score(*split(torch.tensor(train + test), "aabb" + "abba", 4), "label", l2=1e-3)
    assert result.train_accuracy == 1.0
    assert result.test_accuracy == 0.5


def test_units_of_features_do_not_matter(problem: tuple[Tensor, Tensor]) -> None:
    """Features are standardised by the training videos, so a change of units cancels."""
    vectors, ids = problem
    labels = "".join("abc"[i] for i in ids)
    plain = score(*split(vectors, labels, 80), "label", l2=1e-2)
    scaled = vectors * torch.logspace(-3, 3, 8) + torch.arange(8)
    assert score(*split(scaled.float(), labels, 80), "label", l2=1e-2) == plain
    assert 1 / 3 < plain.test_accuracy < 1


def test_class_without_training_videos() -> None:
    with pytest.raises(InputError, match="class c has no training videos"):
        score(*split(torch.randn(5, 2), "aabbc", 4), "label", l2=1e-3)
