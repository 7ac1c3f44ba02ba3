"""Against sentence-transformers 6.2.0 itself, with a model of one random layer."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from agreement import agree
from digits import cross_entropy, unit
from embeddings import randn
from equations import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer import losses as peer
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim
from torch import Tensor, nn

from hdc_kernels.compat.sentence_transformers import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
    multiple_negatives_ranking,
)

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
VARIANTS: list[tuple[Any, Any]] = [
    (("query_to_doc",), "joint"),
    (("query_to_doc",), "per_direction"),
    (("query_to_doc", "doc_to_query"), "per_direction"),
    (("query_to_doc", "query_to_query"), "joint"),
    (("query_to_doc", "doc_to_query"), "joint"),
    (("query_to_doc", "doc_to_doc"), "joint"),
    (ALL, "joint"),
]


class Encoder(nn.Module):
    """In place of a SentenceTransformer: word vectors, averaged, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.words = nn.Parameter(torch.randn(30, 6, generator=generator, dtype=torch.float64))
        self.layer = nn.Linear(6, 4).double()
        with torch.no_grad():
            self.layer.weight.copy_(randn(4, 6, seed=8))
            self.layer.bias.zero_()
        self.calls: list[int] = []

    def __getitem__(self, index: int) -> nn.Module:
        """The peer looks at the first module of a SentenceTransformer."""
        return self.layer

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """As a SentenceTransformer: the features with what it made of them."""
        self.calls.append(len(features["input_ids"]))
        mask = features["attention_mask"].unsqueeze(-1)
        words = self.words[features["input_ids"]] * mask
        pooled = self.layer(words.sum(1) / mask.sum(1)).tanh()
        return {**features, "token_embeddings": words, "sentence_embedding": pooled}


def columns(count: int, batch: int = 7, seed: int = 0) -> list[dict[str, Tensor]]:
    """Sentences of up to five words."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 30, (batch, 5), generator=generator)
        lengths = torch.randint(1, 6, (batch, 1), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(5) < lengths).long()})
    return made


def gradients(loss: Tensor, encoder: Encoder) -> list[Tensor]:
    """Of all parameters."""
    return list(torch.autograd.grad(loss, list(encoder.parameters())))


def exactly(directions: Any, partition_mode: str, scale: float, cosine: bool) -> Callable[..., Any]:
    """Near convergence, the peer subtracts logarithms of up to hundreds to get a loss of 1e-10."""

    def loss(*embeddings: Any) -> Any:
        query, *documents = (unit(x) for x in embeddings) if cosine else embeddings
        own = np.eye(len(query), dtype=bool)
        first = np.concatenate((own, np.zeros((len(own), len(own) * len(documents[1:])), bool)), 1)
        samples = np.tile(own, (1, len(documents)))
        positive, every = documents[0], np.concatenate(documents)
        sides = {
            "query_to_doc": (scale * (query @ every.T), ~first),
            "query_to_query": (scale * (query @ query.T), ~own),
            "doc_to_query": (scale * (positive @ query.T), own | True),  # the pair itself, too
            "doc_to_doc": (scale * (positive @ every.T), ~samples),
        }
        logits = scale * (query * positive).sum(1)
        if partition_mode == "joint":
            return cross_entropy(logits, *(sides[name] for name in directions)).sum() / len(query)
        sides["doc_to_query"] = (sides["doc_to_query"][0], ~own)
        each = [cross_entropy(logits, sides[name]).sum() for name in directions]
        return sum(each) / len(each) / len(query)

    return loss


@settings(max_examples=60, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    batch=st.integers(2, 6),
    hard=st.integers(0, 2),
    scale=st.sampled_from([1.0, 20.0]),
    similarity=st.sampled_from([cos_sim, dot_score]),
    seed=st.integers(0, 2**31),
)
def test_embeddings(
    variant: Any, batch: int, hard: int, scale: float, similarity: Any, seed: int
) -> None:
    """All directions and partitions, with hard negatives and without: loss and all gradients, to 1e-12 or nearer
    to the truth."""
    directions, partition_mode = variant
    theirs = peer.MultipleNegativesRankingLoss(
        Encoder(),
        scale=scale,
        similarity_fct=similarity,
        directions=directions,
        partition_mode=partition_mode,
    )
    agree(
        lambda *x: multiple_negatives_ranking(
            x,
            scale=scale,
            similarity_fct=similarity,
            directions=directions,
            partition_mode=partition_mode,
        ),
        lambda *x: theirs.compute_loss_from_embeddings(list(x), None),
        *(randn(batch, 5, seed=seed + k) for k in range(2 + hard)),
        exact=exactly(directions, partition_mode, scale, similarity is cos_sim),
    )


@pytest.mark.parametrize("hard", [0, 2])
def test_module_with_the_peer_s_defaults(hard: int) -> None:
    """The same model, the same columns: loss and the model's gradients."""
    encoder = Encoder()
    found = []
    for loss in (MultipleNegativesRankingLoss, peer.MultipleNegativesRankingLoss):
        value = loss(encoder)(columns(2 + hard), torch.zeros(0))
        found.append([value, *gradients(value, encoder)])
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 1e-12
    assert MultipleNegativesRankingLoss(encoder).temperature == 0.05


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[-1]])
def test_cached(variant: Any) -> None:
    """Three rows at a time, with the gradients of the whole batch, equal to the peer's."""
    directions, partition_mode = variant
    encoder = Encoder()
    options = {"directions": directions, "partition_mode": partition_mode}
    found = []
    for loss in (CachedMultipleNegativesRankingLoss, peer.CachedMultipleNegativesRankingLoss):
        encoder.calls.clear()
        encoder.zero_grad()
        value = loss(encoder, mini_batch_size=3, **options)(columns(3), torch.zeros(0))
        value.backward()
        found.append([value.detach(), *(p.grad.clone() for p in encoder.parameters())])
        assert max(encoder.calls) <= 3
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 1e-12


def test_scale_gets_its_gradient() -> None:
    """It may be learnt."""
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    loss = multiple_negatives_ranking([randn(4, 5), randn(4, 5, seed=1)], scale=scale)
    (found,) = torch.autograd.grad(loss, scale)

    s = cos_sim(randn(4, 5), randn(4, 5, seed=1)) * scale
    exact = torch.nn.functional.cross_entropy(s, torch.arange(4))
    (slope,) = torch.autograd.grad(exact, scale)
    assert found.item() == pytest.approx(slope.item(), rel=1e-12)


def test_the_model_card_s_entries() -> None:
    """The same keys as the peer's."""
    ours = MultipleNegativesRankingLoss(Encoder()).get_config_dict()
    assert ours == peer.MultipleNegativesRankingLoss(Encoder()).get_config_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale is 0.0; it must be positive and finite"),
        ({"scale": torch.ones(2)}, r"scale is a float32 tensor \[2\]; as a tensor it must be"),
        ({"similarity_fct": euclidean_sim}, "similarity_fct is 'euclidean_sim'; only"),
        ({"directions": ("doc_to_query",)}, "it must have 'query_to_doc'"),
        ({"directions": ("query_to_all",)}, "an entry of directions is 'query_to_all'; it must be"),
        ({"directions": ALL, "partition_mode": "per_direction"}, "with partition_mode='per_dir"),
        ({"partition_mode": "x"}, "partition_mode is 'x'; it must be one of"),
        ({"hardness_mode": "hard_negatives", "hardness_strength": 5.0}, "hardness weights are not"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    """One line: the argument, what was given, what is allowed."""
    for loss in (MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss):
        with pytest.raises(ValueError, match=message):
            loss(Encoder(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mini_batch_size": 0}, "chunk_size is 0"),
        ({"mini_batch_num_tokens": 100}, "mini_batch_num_tokens is 100; it is not supported"),
        ({"show_progress_bar": True}, "show_progress_bar is True; it is not supported"),
    ],
)
def test_errors_of_the_cached_loss(options: dict[str, Any], message: str) -> None:
    """What it has no use for is refused, not ignored."""
    with pytest.raises(ValueError, match=message):
        CachedMultipleNegativesRankingLoss(Encoder(), **options)


Q = randn(4, 5)


@pytest.mark.parametrize(
    ("embeddings", "error", "message"),
    [
        ([Q], ValueError, "embeddings has 1 entries; it must have queries and documents at least"),
        ([Q, [1.0]], TypeError, "embeddings[1] is a list; it must be a tensor [B, D]"),
        ([Q.long(), Q.long()], TypeError, "embeddings[0] has dtype torch.int64; it must be one of"),
        ([Q[None], Q[None]], ValueError, "embeddings[0] has shape [1, 4, 5]; it must be [B, D]"),
        (
            [Q, Q.bfloat16()],
            ValueError,
            "embeddings[1] has dtype torch.bfloat16 but embeddings[0] has torch.float64; they must be equal",
        ),
        (
            [Q, Q, Q.to("meta")],
            ValueError,
            "embeddings[2] has device meta but embeddings[0] has cpu; they must be equal",
        ),
        (
            [Q, Q[:, :3]],
            ValueError,
            "embeddings[1] has shape [4, 3] but embeddings[0] has [4, 5]; they must be equal",
        ),
        (
            [Q, Q[:1]],
            ValueError,
            "embeddings[1] has shape [1, 5] but embeddings[0] has [4, 5]; they must be equal",
        ),
        (
            [Q, Q, Q[:3]],
            ValueError,
            "embeddings[2] has shape [3, 5] but embeddings[0] has [4, 5]; they must be equal",
        ),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_are_refused(
    variant: Any, embeddings: Any, error: type[Exception], message: str
) -> None:
    """In every direction, before a kernel reads them."""
    directions, partition_mode = variant
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        multiple_negatives_ranking(embeddings, directions=directions, partition_mode=partition_mode)
