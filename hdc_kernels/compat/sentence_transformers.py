"""sentence-transformers 6.2: `MultipleNegativesRankingLoss` and its cached variant, and both of embeddings."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hdc_kernels.backends import Mask
from hdc_kernels.checks import check_choice, check_pair
from hdc_kernels.compat import all_processes, temperature_of
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import Rows, meet
from hdc_kernels.in_chunks import InChunks
from hdc_kernels.info_nce import fused_info_nce
from hdc_kernels.pairwise import Columns, logsumexp
from hdc_kernels.positives import info_nce_terms, positive_logits

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
PartitionMode = Literal["joint", "per_direction"]
Similarity = Callable[..., Tensor] | str

# By the names of sentence-transformers' functions: whether they normalise.
NORMALIZES = {"cos_sim": True, "dot_score": False}


def multiple_negatives_ranking(
    embeddings: Sequence[Tensor],
    *,
    scale: float | Tensor = 20.0,
    similarity_fct: Similarity = "cos_sim",
    directions: Sequence[Direction] = ("query_to_doc",),
    partition_mode: PartitionMode = "joint",
    process_group: ProcessGroups | None = None,
) -> Tensor:
    """InfoNCE of queries and documents; everybody's hard negatives are negatives of every query.

    Args:
        embeddings: queries, their documents, and any number of hard negatives, [B, D] each.
        scale: 1/τ.
        similarity_fct: sentence-transformers' own `cos_sim` or `dot_score`, or one of these names.
        directions: whom the sum of query i with document i goes over besides this pair: "query_to_doc", always
            there, all documents and hard negatives; "query_to_query" all other queries; "doc_to_query"
            document i with all queries; "doc_to_doc" document i with those of other queries.
        partition_mode: "joint" is one sum over all directions. "per_direction" is the mean of the losses of each,
            which only "query_to_doc" and "doc_to_query" have.
        process_group: as in `fused_info_nce`.

    Returns:
        The mean loss: float64 for float64 inputs, float32 for all others.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.

    Equals: the same loss of sentence-transformers, without hardness weights.
    """
    _check(scale, similarity_fct, directions, partition_mode)
    _check_embeddings(embeddings, empty=process_group is not None)
    queries, positives = embeddings[:2]
    documents = torch.cat(list(embeddings[1:])) if len(embeddings) > 2 else positives
    options: dict[str, Any] = {
        "temperature": temperature_of(scale),
        "normalize": NORMALIZES[_name(similarity_fct)],
    }
    others = set(directions) - {"query_to_doc"}
    if not others:
        return fused_info_nce(queries, documents, process_group=process_group, **options)
    if partition_mode == "per_direction":
        forth = fused_info_nce(queries, documents, process_group=process_group, **options)
        back = fused_info_nce(positives, queries, process_group=process_group, **options)
        return (forth + back) / 2
    all_queries: Columns = queries
    all_documents: Columns = documents
    rows = torch.arange(len(queries), device=queries.device)
    everybody = rows.repeat(len(embeddings) - 1)  # whose each document is
    across: Rows | None = None
    if process_group is not None:
        (across,) = meet(process_group, queries.device, len(queries))
        of_documents = across.times(len(embeddings) - 1)
        all_queries, all_documents = across.share(queries), of_documents.share(documents)
        rows = across.numbers(queries.device)[: len(queries)]
        everybody = of_documents.gather_integers(rows.repeat(len(embeddings) - 1))
    sums = [logsumexp(queries, all_documents, mask=Mask(diagonal=False), **options)]
    if "query_to_query" in others:
        sums.append(logsumexp(queries, all_queries, mask=Mask(diagonal=False), **options))
    if "doc_to_query" in others:  # the pair itself once more, as a negative
        sums.append(logsumexp(positives, all_queries, **options))
    if "doc_to_doc" in others:
        ids = rows.unsqueeze(0), everybody.unsqueeze(0)
        sums.append(logsumexp(positives, all_documents, mask=Mask(ids=ids), **options))
    negative = torch.stack(sums).logsumexp(0)
    terms = info_nce_terms(negative, positive_logits(queries, positives, **options))
    return terms.mean() if across is None else across.reduce(terms, "mean")


class MultipleNegativesRankingLoss(nn.Module):
    """`multiple_negatives_ranking` of what a SentenceTransformer makes of the columns of a batch.

    Each column takes a forward pass of its own; the peer runs hard negatives together with the documents where
    it can, which changes the time and which numbers dropout draws.

    Args:
        model: a SentenceTransformer, or any module from a column's features to {"sentence_embedding": [B, D]}.
        scale, similarity_fct, directions, partition_mode: see `multiple_negatives_ranking`.
        gather_across_devices: take the batches of all processes as one.
        hardness_mode, hardness_strength: must be None or 0, hardness weights are not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float | Tensor = 20.0,
        similarity_fct: Similarity = "cos_sim",
        gather_across_devices: bool = False,
        directions: Sequence[Direction] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__()
        _check(scale, similarity_fct, directions, partition_mode)
        self.gather_across_devices = gather_across_devices
        if hardness_mode is not None and hardness_strength != 0:
            raise ValueError(
                f"hardness_mode is {hardness_mode!r} with hardness_strength {hardness_strength}; hardness weights "
                "are not supported, they must be None or 0"
            )
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.directions = tuple(directions)
        self.partition_mode = partition_mode

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:
        """Of queries, documents and hard negatives, the features of one column each. Labels are not used."""
        return self.compute_loss_from_embeddings([self.embed(x) for x in sentence_features], labels)

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """One column's embeddings, [B, D]."""
        return self.model(features)["sentence_embedding"]

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """See `multiple_negatives_ranking`."""
        return multiple_negatives_ranking(
            embeddings,
            scale=self.scale,
            similarity_fct=self.similarity_fct,
            directions=self.directions,
            partition_mode=self.partition_mode,
            process_group=all_processes(self.gather_across_devices),
        )

    @property
    def temperature(self) -> float | Tensor:
        """τ."""
        return temperature_of(self.scale)

    def get_config_dict(self) -> dict[str, Any]:
        """What the peer's model card tells of the loss."""
        return {
            "scale": float(self.scale),
            "similarity_fct": _name(self.similarity_fct),
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": None,
            "hardness_strength": 0.0,
        }


class CachedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` with the activations of `mini_batch_size` rows at a time, see `InChunks`.

    Args:
        mini_batch_size: rows that go through the model at a time.
        mini_batch_num_tokens: must be None.
        show_progress_bar: must be False.
        others: as in `MultipleNegativesRankingLoss`.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float | Tensor = 20.0,
        similarity_fct: Similarity = "cos_sim",
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[Direction] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        show_progress_bar: bool = False,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__(
            model,
            scale,
            similarity_fct,
            gather_across_devices,
            directions,
            partition_mode,
            hardness_mode,
            hardness_strength,
        )
        for name, value, only in (
            ("mini_batch_num_tokens", mini_batch_num_tokens, None),
            ("show_progress_bar", show_progress_bar, False),
        ):
            if value != only:
                raise ValueError(f"{name} is {value!r}; it is not supported, it must be {only!r}")
        self.mini_batch_size = mini_batch_size
        InChunks(model, mini_batch_size)  # it checks its arguments

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """One column's embeddings, [B, D], in chunks."""
        return InChunks(_Embedding(self.model), self.mini_batch_size)(features)


class _Embedding(nn.Module):
    """A model without its other outputs, which `InChunks` would keep."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.model(features)["sentence_embedding"]


def _name(similarity_fct: Similarity) -> str:
    return similarity_fct if isinstance(similarity_fct, str) else similarity_fct.__name__


def _check(
    scale: float | Tensor,
    similarity_fct: Similarity,
    directions: Sequence[Direction],
    partition_mode: PartitionMode,
) -> None:
    temperature_of(scale)
    name = getattr(similarity_fct, "__name__", similarity_fct)
    if name not in NORMALIZES:
        raise ValueError(
            f"similarity_fct is {name!r}; only sentence-transformers' cos_sim and dot_score are supported"
        )
    for direction in directions:
        check_choice("an entry of directions", direction, Direction)
    if "query_to_doc" not in directions:
        raise ValueError(f"directions is {tuple(directions)}; it must have 'query_to_doc'")
    check_choice("partition_mode", partition_mode, PartitionMode)
    if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
        raise ValueError(
            f"directions is {tuple(directions)}; with partition_mode='per_direction' it can have "
            "'query_to_doc' and 'doc_to_query' only, which hold the positive pair"
        )


def _check_embeddings(embeddings: Sequence[Tensor], *, empty: bool) -> None:
    """Two entries at least, all alike: what the documents are joined of goes to kernels as it is."""
    if len(embeddings) < 2:
        raise ValueError(
            f"embeddings has {len(embeddings)} entries; it must have queries and documents at least"
        )
    for k, column in enumerate(embeddings[1:], 1):
        names = "embeddings[0]", f"embeddings[{k}]"
        check_pair(names, (embeddings[0], column), "[B, D]", empty=empty)
