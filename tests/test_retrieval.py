"""Nearest neighbours against a search by hand, and hits against counting."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hdc import retrieval
from hdc.config import RetrieveConfig
from hdc.data.clips import ClipConfig
from hdc.data.manifest import Manifest
from hdc.errors import InputError
from hdc.features import Features
from hdc.retrieval import hit_rates, nearest, retrieve, score


def by_hand(query: np.ndarray, gallery: np.ndarray, k: int) -> list[list[int]]:
    found = []
    for q in query:
        cosines = [q @ g / np.sqrt((q @ q) * (g @ g)) for g in gallery]
        found.append(sorted(range(len(gallery)), key=lambda row: -cosines[row])[:k])
    return found


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    """Of very different lengths and far from the origin: neither must matter to a centred cosine."""
    torch.manual_seed(0)
    query, gallery = torch.randn(11, 6) + 2, torch.randn(30, 6) + 2
    return query * torch.logspace(-2, 2, 11)[:, None], gallery * torch.logspace(2, -2, 30)[:, None]


@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_nearest(
    chunk: int, vectors: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    query, gallery = vectors
    expected = by_hand(query.double().numpy(), gallery.double().numpy(), 7)
    assert nearest(query, gallery, 7)[1].tolist() == expected


def test_centred(vectors: tuple[Tensor, Tensor]) -> None:
    """The gallery's mean is taken off both; with an offset it changes who is nearest."""
    query, gallery = vectors
    q, g = query.double().numpy(), gallery.double().numpy()
    expected = by_hand(q - g.mean(0), g - g.mean(0), 7)
    assert nearest(query.double(), gallery.double(), 7, center=True)[1].tolist() == expected
    assert nearest(query, gallery, 7)[1].tolist() != expected


def test_small_gallery(vectors: tuple[Tensor, Tensor]) -> None:
    query, gallery = vectors
    _, found = nearest(query, gallery[:3], 50)
    assert found.sort(1).values.tolist() == [[0, 1, 2]] * 11


def test_hit_rates() -> None:
    """Four queries whose first hit is at rank 1, 4, 11 and never."""
    gallery_ids = torch.tensor([0] * 10 + [1] * 10 + [2])
    query_ids = torch.tensor([0, 1, 2, 3])
    neighbors = torch.stack(
        [
            torch.tensor([3, *range(10, 20), 20]),
            torch.tensor([0, 1, 2, 12, 3, 4, 5, 6, 7, 8, 9, 20]),
            torch.tensor([*range(10), 20, 10]),
            torch.tensor([20, *range(10), 10]),
        ]
    )
    rates = hit_rates(neighbors, query_ids, gallery_ids)
    assert rates == {1: 0.25, 5: 0.5, 10: 0.5, 20: 0.75, 50: 0.75}


def part(manifest: Manifest, vectors: list[list[float]], rows: list[int]) -> Features:
    return Features(torch.tensor(vectors), manifest.take(np.array(rows)), [])


def test_score() -> None:
    """Class numbers come from the whole manifest, though the gallery lacks class "a"."""
    manifest = Manifest(
        Path("manifest.csv"),
        np.array(list("vwxyz")),
        np.zeros(5, int),
        np.full(5, 16),
        {"label": np.array(["a", "b", "b", "b", "c"])},
    )
    gallery = part(manifest, [[1.0, 0.0], [0.0, 1.0]], [3, 4])  # b, c
    queries = part(manifest, [[2.0, 0.1], [9.0, 1.0], [5.0, 4.0]], [0, 1, 2])  # a, b, b
    result = score(queries, gallery, manifest, "label")
    assert result.neighbors.tolist() == [[0, 1], [0, 1], [0, 1]]
    assert result.accuracy[1] == pytest.approx(2 / 3)
    assert result.accuracy[5] == pytest.approx(2 / 3)


def test_retrieve(numbered: Manifest, tmp_path: Path) -> None:
    """Test videos look for training videos; a training video that stands in both lists finds itself."""
    rows = np.array([0, 1, 2, 3, 2, 1])
    manifest = numbered.take(rows)
    manifest.columns["split1"][:] = ["train"] * 4 + ["test"] * 2
    config = RetrieveConfig(
        data="",
        out=str(tmp_path),
        backbone="tiny",
        clips=ClipConfig(size=32),
        crop_size=28,
        clips_per_video=2,
        device="cpu",
    )
    result = retrieve(config, manifest)
    assert result.neighbors.shape == (2, 4)
    written = json.loads((tmp_path / "retrieval.json").read_text())
    assert (written["queries"], written["gallery"]) == (2, 4)
    assert list(written["accuracy"]) == ["top1", "top5", "top10", "top20", "top50"]
    assert written["accuracy"]["top50"] == 1.0
    assert written["nearest"][0]["query"] == "2.avi"
    assert written["unreadable"] == []
    with pytest.raises(InputError, match="no column 'motion'"):
        retrieve(RetrieveConfig(data="", out=str(tmp_path), label="motion"), manifest)
