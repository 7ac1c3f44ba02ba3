"""InfoNCE: pick the key that belongs to the query out of the batch (the paper's equations 1 to 3)."""

from typing import Literal, overload

import torch
from torch import Tensor

from hdc_kernels.backends import EVERYTHING
from hdc_kernels.checks import Backend, Reduction, check_alike, check_pair
from hdc_kernels.contrast import Contrast, contrast
from hdc_kernels.cross_entropy import (
    InfoNCEMetrics,
    Options,
    check_label_smoothing,
    compare,
    cross_entropy,
    over_uniform,
    own_and,
    total,
)
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import Rows, meet
from hdc_kernels.false_negatives import Ids, without_false_negatives
from hdc_kernels.module import Loss
from hdc_kernels.pairwise import logsumexp
from hdc_kernels.positives import embeddings, info_nce_terms, positive_logits


@overload
def fused_info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    symmetric: bool = ...,
    negatives: Tensor | None = ...,
    in_batch: bool = ...,
    ids: Ids | None = ...,
    false_negatives: Tensor | None = ...,
    sample_weights: Tensor | None = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[False] = ...,
) -> Tensor: ...


@overload
def fused_info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    symmetric: bool = ...,
    negatives: Tensor | None = ...,
    in_batch: bool = ...,
    ids: Ids | None = ...,
    false_negatives: Tensor | None = ...,
    sample_weights: Tensor | None = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[True],
) -> tuple[Tensor, InfoNCEMetrics]: ...


def fused_info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    negatives: Tensor | None = None,
    in_batch: bool = True,
    ids: Ids | None = None,
    false_negatives: Tensor | None = None,
    sample_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: Backend = "auto",
    process_group: ProcessGroups | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, InfoNCEMetrics]:
    """−log( exp(sim(q_i, k_i)/τ) / Σ_j exp(sim(q_i, k_j)/τ) ) with cosine similarity.

    Args:
        query: [..., B, D], float64, float32, bfloat16 or float16. Leading dimensions are independent
            problems: a query is compared with the B keys of its own problem only.
        key: [..., N, D] with N ≥ B; `key[..., i, :]` is the positive of `query[..., i, :]`, all others are
            its negatives, also those from B on, which are nobody's positive (hard negatives, a queue). Same
            leading dimensions, D, dtype and device as `query`.
        temperature: τ > 0; a number, or a tensor with one element, which then gets its gradient.
            The value of a tensor is not checked.
        symmetric: the mean of both directions, query to key and key to query. Needs N = B.
        negatives: further negatives, [M, D] of every query or [B, M, D], `negatives[i]` those of query i alone.
            Needs queries [B, D] and one direction.
        in_batch: whether the other rows of `key` are negatives, too. False needs `negatives` and N = B.
        ids: integers that say which keys are no negatives: a key with the query's id that is not its own positive
            is left out. A tensor [B] of queries and keys (N = B), or a pair of [B] and [N]. Needs queries
            [B, D], no `negatives` (those can be rows of `key`), and no `label_smoothing`.
        false_negatives: keys that are left out pair by pair, under the conditions of `ids` and beside them: [2, E]
            integers, the pairs (row of query, row of key), which are not checked and may be left out twice; or
            [B, N] bool, True where a key is left out. That costs B·N bytes, whoever calls holds them, a search through
            all of them, 16 bytes for each that is True, and a graph of `torch.compile` of its own. Needs a single
            process; on a GPU, plain PyTorch computes the loss, of more than 2^24 logits in chunks.
        sample_weights: [..., B], w_i ≥ 0: "mean" becomes Σ w_i·l_i / Σ w_i, "sum" Σ w_i·l_i, "none" w_i·l_i.
            Its values are not checked; where they sum to 0, "mean" is NaN.
        label_smoothing: ε in [0, 1): the target is 1 − ε + ε/C for the positive and ε/C for each negative, among
            C columns, as in `torch.nn.functional.cross_entropy`.
        reduction: "mean" over B and the leading dimensions, their "sum" (the paper's Eq. 1), or
            "none" for one value per query, [..., B].
        normalize: divide by the L2 norm first. With False, the similarity is the plain dot product.
        backend: "auto" picks the fastest there is (`hdc_kernels/selection.py` has the rule); "cpu" is C++,
            "triton" and "cuda" are for GPUs, "torch" is the plain specification, which holds the B×B logits,
            "chunked" the same in O(B) memory; autograd sees through these two alone.
        process_group: a `torch.distributed.ProcessGroup`, or `hdc_kernels.distributed.Ranks` of one, with options:
            the batches of all its ranks are one, of which every rank gets the loss. Gradients averaged over the ranks,
            as DDP does, are those of one process with the whole batch; see `hdc_kernels.distributed`.
            `negatives` [M, D] of any rank are negatives everywhere. B and N may be 0 on some ranks. None is this
            process alone.
        return_metrics: also return every query's loss, the rank of its positive and the accuracy, out of the same
            pass (on a GPU, ranks take another one without gradients).

    Returns:
        A scalar, or [..., B] for "none"; float64 for float64 inputs, float32 for all others. With
        `return_metrics` a pair of it and `InfoNCEMetrics`.
        A NaN in the input gives a NaN loss. A zero vector has similarity 0 and gradient 0.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.

    Equals: `info_nce.info_nce(query, key, temperature=τ)` of info-nce-pytorch, with `in_batch=False` also its
    `negative_keys`; with `symmetric=True` on normalised inputs, open_clip's `ClipLoss` at
    `logit_scale=1/τ`; sentence-transformers' `MultipleNegativesRankingLoss` at `scale=1/τ`, the hard negatives
    below the positives in `key`.
    """
    check_pair(
        ("query", "key"),
        (query, key),
        "[..., B, D]",
        extra_rows=in_batch and not symmetric,
        empty=process_group is not None,
    )
    options = Options(
        temperature,
        reduction,
        normalize,
        backend,
        sample_weights,
        label_smoothing,
        return_metrics,
    )
    options.check(query.shape[:-1], query.device, ids=ids, false_negatives=false_negatives)
    grouped = process_group is not None
    if negatives is not None or not in_batch:
        _check_negatives(negatives, query, symmetric, grouped)
        for option, given in (("ids", ids), ("false_negatives", false_negatives)):
            if given is not None:
                raise ValueError(
                    f"{option} is given together with negatives, which have none; append them to key instead"
                )
    mask = without_false_negatives(
        ids,
        false_negatives,
        ("query", "key"),
        query,
        key,
        grouped=grouped,
    )
    if negatives is not None and in_batch and negatives.dim() == 2:
        key, negatives = torch.cat((key, negatives)), None
    queries = keys = shared = None  # the rows on all ranks
    if process_group is not None:
        queries, keys = meet(process_group, query.device, query.shape[-2], key.shape[-2])
    if negatives is None:
        return cross_entropy(
            query, key, options, symmetric=symmetric, mask=mask, queries=queries, keys=keys
        )
    if queries is not None and negatives.dim() == 2:
        (shared,) = meet(queries.ranks, negatives.device, len(negatives), names=("negatives",))
    found = _against(query, key, negatives, in_batch, queries, keys, shared, options)
    excess = None
    if label_smoothing:
        excess = _over_uniform(query, key, negatives, in_batch, keys, shared, options)
    count = len(query) if queries is None else queries.size
    return options.result(found, query, key, query.shape[:-1], count, queries, excess)


def _against(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    in_batch: bool,
    queries: Rows | None,
    keys: Rows | None,
    shared: Rows | None,
    options: Options,
) -> Contrast:
    """Terms, [B], against private negatives, or against shared ones and no other key."""
    ranked = options.return_metrics
    arguments = {"weights": None, **options.primitive()}
    if negatives.dim() == 3:
        own = torch.cat((key[: len(query)].unsqueeze(1), negatives), 1)
        alone = contrast([(query.unsqueeze(1), own)], ranked=ranked, **arguments)
        if not in_batch:
            return alone
        others = compare(query, key, EVERYTHING, queries, keys, ranked=ranked, **arguments)
        terms, ranks = _union(alone.value, others.value), None
        if alone.ranks is not None and others.ranks is not None:
            ranks = alone.ranks + others.ranks
        return Contrast(terms, terms.detach(), alone.hits & others.hits, ranks)
    if ranked:
        both, mask = own_and(key, negatives)
        if keys is not None and shared is not None:
            sizes = tuple(a + b for a, b in zip(keys.sizes, shared.sizes, strict=True))
            keys = keys._replace(sizes=sizes)
        return compare(query, both, mask, queries, keys, ranked=True, **arguments)
    # Cheaper than that mask unless there are many negatives, but nobody counts ranks.
    positive = positive_logits(query, key, options.temperature, normalize=options.normalize)
    everybody = negatives if shared is None else shared.share(negatives)
    terms = info_nce_terms(logsumexp(query, everybody, **options.primitive()), positive)
    return Contrast(terms, terms.detach(), torch.zeros_like(terms, dtype=torch.bool))


def _union(a: Tensor, b: Tensor) -> Tensor:
    """log(1 + α + β) of a = log(1 + α) and b = log(1 + β): two sets of negatives, one positive.

    To the last digits also where α and β vanish, and without overflow.
    """
    more, less = torch.where(a > b, a, b), torch.where(a > b, b, a)
    return more + torch.log1p(-torch.expm1(-less) * torch.exp(less - more))


def _over_uniform(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    in_batch: bool,
    keys: Rows | None,
    shared: Rows | None,
    options: Options,
) -> Tensor:
    """`over_uniform` among the negatives, and the keys or only the query's own."""
    x, y, z = (embeddings(t, normalize=options.normalize) for t in (query, key, negatives))
    own = y[: len(x)]
    inside, count = total(y, keys) if in_batch else (own, 1)
    outside, several = total(z, shared)
    if z.dim() == 3:
        outside = outside.squeeze(-2)
    return over_uniform(x, own, (inside + outside, count + several), options.temperature)


def _check_negatives(negatives: Tensor | None, query: Tensor, symmetric: bool, empty: bool) -> None:
    if negatives is None:
        raise ValueError(
            "in_batch is False but there are no negatives; give some, or leave it True"
        )
    if not isinstance(negatives, Tensor):
        raise TypeError(
            f"negatives is a {type(negatives).__name__}; it must be a tensor [M, D] or [B, M, D]"
        )
    check_alike(("query", "negatives"), (query, negatives))
    if query.dim() != 2:
        raise ValueError(f"query has shape {list(query.shape)}; with negatives it must be [B, D]")
    rows, width = query.shape
    some = negatives.numel() > 0 or (empty and (negatives.dim() == 2 or not rows))
    allowed = negatives.shape[-1:] == (width,) and some
    if not allowed or not (
        negatives.dim() == 2 or (negatives.dim() == 3 and negatives.shape[0] == rows)
    ):
        raise ValueError(
            f"negatives has shape {list(negatives.shape)}; it must be [M, D] or [B, M, D], "
            f"here [M, {width}] or [{rows}, M, {width}] with M ≥ 1"
        )
    if symmetric:
        raise ValueError(
            "symmetric is True but there are negatives, which have no query; it must be False"
        )


class InfoNCE(Loss):
    """`fused_info_nce` as a module. Pass an `nn.Parameter` as `temperature` to learn it."""

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        symmetric: bool = False,
        in_batch: bool = True,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: Backend = "auto",
        process_group: ProcessGroups | None = None,
    ) -> None:
        check_label_smoothing(label_smoothing)
        super().__init__(
            temperature,
            symmetric=symmetric,
            in_batch=in_batch,
            label_smoothing=label_smoothing,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            process_group=process_group,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        ids: Ids | None = None,
        false_negatives: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """See `fused_info_nce`."""
        loss: Tensor = fused_info_nce(
            query,
            key,
            negatives=negatives,
            ids=ids,
            false_negatives=false_negatives,
            sample_weights=sample_weights,
            **self.options,
        )
        return loss
