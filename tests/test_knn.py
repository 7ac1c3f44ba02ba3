"""Votes of neighbours against counting by hand, and the weights against Wu et al.'s formula."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hdc.data.manifest import Manifest
from hdc.features import Features
from hdc.knn import score, vote


def test_vote() -> None:
    ids = torch.tensor([[0, 1, 1], [2, 0, 1], [1, 2, 2]])
    weights = torch.tensor([[3.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.5, 0.5]])
    # 3 against 2; three of one vote each: the nearest; 1 against 1: the nearest, too.
    assert vote(ids, weights, 3).tolist() == [0, 2, 1]
    assert vote(ids, torch.ones(3, 3), 3).tolist() == [1, 2, 2]


def parts(train: list[list[float]], test: list[list[float]], labels: str) -> tuple:
    rows = np.arange(len(labels))
    manifest = Manifest(
        Path("manifest.csv"),
        np.array([f"{row}.avi" for row in rows]),
        np.zeros(len(rows), int),
        np.full(len(rows), 16),
        {"label": np.array(list(labels))},
    )
    first, second = rows[: len(train)], rows[len(train) :]
    return (
        Features(torch.tensor(train), manifest.take(first), []),
        Features(torch.tensor(test), manifest.take(second), []),
        manifest,
    )


def test_score() -> None:
    """Cosines 1, 0.8 and 0.8 of an a and two b's: a wins the weighted vote while exp(0.2 / T) is above 2."""
    train = [[2.0, 0.0], [0.8, 0.6], [4.0, -3.0], [-1.0, 0.0]]
    given = parts(train, [[5.0, 0.0]], "abba" + "a")
    limit = 0.2 / math.log(2)
    sharp = score(*given, "label", k=3, temperature=limit * 0.99)
    assert (sharp.weighted, sharp.majority, sharp.neighbors) == (1.0, 0.0, 3)
    assert score(*given, "label", k=3, temperature=limit * 1.01).weighted == 0.0
    assert score(*given, "label", k=1, temperature=1.0).majority == 1.0
    # Of all four, two and two: the nearest of them decides.
    every = score(*given, "label", k=20, temperature=1.0)
    assert (every.majority, every.neighbors) == (1.0, 4)


def test_cold() -> None:
    """exp(1 / 0.001) is no number."""
    given = parts([[1.0, 0.0], [0.9, 0.1], [0.9, -0.1]], [[1.0, 0.0]], "abb" + "a")
    assert score(*given, "label", k=3, temperature=1e-3).weighted == pytest.approx(1.0)
