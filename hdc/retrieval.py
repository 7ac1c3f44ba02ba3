"""Nearest-neighbour retrieval: test videos query the training videos (the paper's Section 4.3)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hdc import results
from hdc.config import RetrieveConfig
from hdc.data.manifest import Manifest
from hdc.features import Features, extract, load_encoder

TOP = (1, 5, 10, 20, 50)
CHUNK = 1024  # queries that are compared with the whole gallery at a time


@dataclass(frozen=True)
class RetrievalResult:
    """accuracy: for each k of `TOP` the share of queries with one of its k nearest videos in its class.

    neighbors: int64 [queries, k], rows of the gallery, nearest first.
    """

    accuracy: dict[int, float]
    neighbors: Tensor
    queries: Features
    gallery: Features


def nearest(
    query: Tensor, gallery: Tensor, k: int, *, center: bool = False
) -> tuple[Tensor, Tensor]:
    """The k nearest gallery rows of every query by cosine: [Q, D], [G, D] -> twice [Q, min(k, G)].

    Returns the cosines, largest first, and the rows (int64). `center` subtracts the gallery's mean from
    both first.
    """
    if center:
        mean = gallery.mean(0)
        query, gallery = query - mean, gallery - mean
    gallery = F.normalize(gallery, dim=1).T
    chunks = F.normalize(query, dim=1).split(CHUNK)
    found = [(q @ gallery).topk(min(k, gallery.shape[1])) for q in chunks]
    return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])


def hit_rates(neighbors: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> dict[int, float]:
    """For each k of `TOP`: the share of queries whose class is among their k nearest neighbours."""
    hits = gallery_ids[neighbors] == query_ids.unsqueeze(1)
    return {k: hits[:, :k].any(1).double().mean().item() for k in TOP}


def score(
    queries: Features, gallery: Features, manifest: Manifest, label: str, *, center: bool = False
) -> RetrievalResult:
    """Retrieve by features that were extracted before; `label` names the column that decides a hit."""
    names = manifest.labels(label).names
    _, neighbors = nearest(queries.vectors, gallery.vectors, max(TOP), center=center)
    query_ids, gallery_ids = (
        torch.from_numpy(part.manifest.labels(label, names).ids) for part in (queries, gallery)
    )
    return RetrievalResult(
        hit_rates(neighbors, query_ids, gallery_ids), neighbors, queries, gallery
    )


def write(config: RetrieveConfig, result: RetrievalResult) -> None:
    """Write `retrieval.json` into `config.out`: the hits, and each query with its nearest neighbour."""
    queries, gallery = result.queries, result.gallery
    summary = {
        "accuracy": {f"top{k}": value for k, value in result.accuracy.items()},
        "queries": len(queries.vectors),
        "gallery": len(gallery.vectors),
        "nearest": [
            {
                "query": str(queries.manifest.path[row]),
                "start": int(queries.manifest.start[row]),
                "neighbor": str(gallery.manifest.path[found]),
                "neighbor_start": int(gallery.manifest.start[found]),
            }
            for row, found in enumerate(result.neighbors[:, 0].tolist())
        ],
    }
    results.write(config, results.RETRIEVAL, summary, [*gallery.unreadable, *queries.unreadable])


def retrieve(config: RetrieveConfig, manifest: Manifest) -> RetrievalResult:
    """The paper's protocol: test list against train list; writes `retrieval.json` into `config.out`."""
    manifest.labels(config.label)  # a missing column should fail before the work
    backbone = load_encoder(config, config.checkpoint, manifest)
    gallery = extract(config, backbone, manifest, "train")
    queries = extract(config, backbone, manifest, "test")
    result = score(queries, gallery, manifest, config.label, center=config.center)
    write(config, result)
    return result
