"""InfoNCE: pick the key that belongs to the query out of the batch (the paper's equations 1 to 3)."""

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from hdc_kernels.backends import EVERYTHING, Mask
from hdc_kernels.checks import (
    Backend,
    Reduction,
    check_choice,
    check_labels,
    check_number,
    check_pair,
    check_temperature,
)
from hdc_kernels.contrast import Contrast, contrast
from hdc_kernels.distributed.contrast import contrast_across
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import Rows, meet
from hdc_kernels.module import Loss
from hdc_kernels.pairwise import logsumexp
from hdc_kernels.positives import divide, embeddings, info_nce_terms, positive_logits

Ids = Tensor | tuple[Tensor, Tensor]


class InfoNCEMetrics(NamedTuple):
    """What to log of one step, detached.

    loss: [..., B], the loss of every query, before `sample_weights`.
    accuracy: the share of queries whose positive is closer than every negative; float32, no dimension.
    rank: [..., B] int64, how many negatives are at least as close as the positive: 0 is a hit.

    Accuracy and rank are of the direction from query to key, also with `symmetric`.
    """

    loss: Tensor
    accuracy: Tensor
    rank: Tensor


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
        sample_weights: [..., B], w_i ≥ 0: "mean" becomes Σ w_i·l_i / Σ w_i, "sum" Σ w_i·l_i, "none" w_i·l_i.
            Its values are not checked; where they sum to 0, "mean" is NaN.
        label_smoothing: ε in [0, 1): the target is 1 − ε + ε/C for the positive and ε/C for each negative, among
            C columns, as in `torch.nn.functional.cross_entropy`.
        reduction: "mean" over B and the leading dimensions, their "sum" (the paper's Eq. 1), or
            "none" for one value per query, [..., B].
        normalize: divide by the L2 norm first. With False, the similarity is the plain dot product.
        backend: "auto" picks the fastest there is (`hdc_kernels/selection.py` has the rule); "cpu" is C++,
            "triton" is for GPUs, "torch" the plain specification, which holds the B×B logits and the only
            one that autograd sees through, "chunked" the same in O(B) memory.
        process_group: a `torch.distributed.ProcessGroup`, or `hdc_kernels.distributed.Ranks` of one, with options:
            the batches of all its ranks are one, of which every rank gets the loss. Gradients averaged over the ranks,
            as DDP does, are those of one process with the whole batch; see `hdc_kernels.distributed`.
            `negatives` [M, D] of any rank are negatives everywhere. B and N may be 0 on some ranks. None is this
            process alone.
        return_metrics: also return every query's loss, the rank of its positive and the accuracy, out of the same
            pass (on a GPU, and with `negatives` [M, D] alone, ranks take another one without gradients).

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
    check_temperature(temperature)
    check_choice("reduction", reduction, Reduction)
    check_choice("backend", backend, Backend)
    if negatives is not None or not in_batch:
        _check_negatives(negatives, query, symmetric, process_group is not None)
    if ids is not None:
        _check_ids(ids, query, key, negatives, label_smoothing)
    if sample_weights is not None:
        _check_sample_weights(sample_weights, query)
    if label_smoothing:
        check_label_smoothing(label_smoothing)
    rows = query.shape[:-1]
    if query.dim() > 3:
        query, key = query.flatten(0, -3), key.flatten(0, -3)
    if negatives is not None and in_batch and negatives.dim() == 2:
        key, negatives = torch.cat((key, negatives)), None
    whole = reduction != "none" and sample_weights is None
    count = math.prod(rows)
    queries = keys = shared = None  # the rows on all ranks
    if process_group is not None:
        queries, keys = meet(process_group, query.device, query.shape[-2], key.shape[-2])
        count = math.prod(rows[:-1]) * queries.size
    divisor: int | Tensor = count if reduction == "mean" else 1
    options: dict[str, Any] = {
        "temperature": temperature,
        "normalize": normalize,
        "backend": backend,
    }
    if negatives is None:
        options["weights"], options["divisor"] = ([1.0], divisor) if whole else (None, 1)
        value, terms, _, ranks = _compare(
            query, key, ids, queries, keys, symmetric=symmetric, ranked=return_metrics, **options
        )
    else:
        if queries is not None and negatives.dim() == 2:
            (shared,) = meet(queries.ranks, negatives.device, len(negatives))
        value, ranks = _against(
            query, key, negatives, in_batch, return_metrics, queries, keys, shared, options
        )
        terms, whole = value.detach(), False
    if label_smoothing:
        extra = label_smoothing * _smoothing(
            query,
            key,
            negatives,
            in_batch,
            temperature,
            symmetric,
            normalize,
            keys,
            shared,
        )
        value = value + (extra.sum() / divisor if whole else extra)
        terms = terms + extra.detach()
    if sample_weights is not None:
        shares = sample_weights.flatten().to(value.dtype)
        value = value * shares
        if reduction == "mean":
            divisor = shares.sum() if queries is None else queries.sum(shares.sum())
    if not whole:
        value = value.view(rows) if reduction == "none" else value.sum() / divisor
    if queries is not None:
        value = queries.shown(value, reduction)
    if not return_metrics:
        return value
    assert ranks is not None
    return value, InfoNCEMetrics(terms.view(rows), (ranks == 0).float().mean(), ranks.view(rows))


def _compare(
    query: Tensor,
    key: Tensor,
    ids: Ids | None,
    queries: Rows | None,
    keys: Rows | None,
    **options: Any,
) -> Contrast:
    """`contrast`, with the keys of all ranks if there are others."""
    if isinstance(ids, Tensor):
        ids = ids, ids
    if queries is None or keys is None:
        mask = EVERYTHING
        if ids is not None:
            mask = Mask(ids=(ids[0].long().unsqueeze(0), ids[1].long().unsqueeze(0)))
        return contrast([(query, key)], mask=mask, **options)
    if query.dim() == 3:  # they are exchanged by rows
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    return contrast_across(
        queries, keys, [(query, key)], rows_first=int(query.dim() == 3), ids=ids, **options
    )


def _against(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    in_batch: bool,
    ranked: bool,
    queries: Rows | None,
    keys: Rows | None,
    shared: Rows | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Terms and ranks, [B] each, against private negatives, or against shared ones and no other key."""
    rows = len(query)
    if negatives.dim() == 3:
        own = torch.cat((key[:rows].unsqueeze(1), negatives), 1)
        terms, _, _, ranks = contrast(
            [(query.unsqueeze(1), own)], weights=None, ranked=ranked, **options
        )
        if not in_batch:
            return terms, ranks
        others = _compare(query, key, None, queries, keys, weights=None, ranked=ranked, **options)
        union = _union(terms, others.value)
        return union, None if ranks is None or others.ranks is None else ranks + others.ranks
    positive = positive_logits(query, key, options["temperature"], normalize=options["normalize"])
    everybody = negatives if shared is None else shared.share(negatives)
    terms = info_nce_terms(logsumexp(query, everybody, **options), positive)
    if not ranked:
        return terms, None
    # With one id for every query and key, and another one for the negatives, no key but its own is left.
    both = torch.cat((key, negatives))
    ids = (torch.arange(len(both), device=query.device) >= rows).long()
    if keys is not None and shared is not None:
        sizes = tuple(a + b for a, b in zip(keys.sizes, shared.sizes, strict=True))
        keys = keys._replace(sizes=sizes)
    with torch.no_grad():
        only_ranks = _compare(
            query, both, (ids[:rows], ids), queries, keys, weights=None, ranked=True, **options
        ).ranks
    return terms, only_ranks


def _union(a: Tensor, b: Tensor) -> Tensor:
    """log(1 + α + β) of a = log(1 + α) and b = log(1 + β): two sets of negatives, one positive.

    To the last digits also where α and β vanish, and without overflow.
    """
    more, less = torch.where(a > b, a, b), torch.where(a > b, b, a)
    return more + torch.log1p(-torch.expm1(-less) * torch.exp(less - more))


def _smoothing(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    in_batch: bool,
    temperature: float | Tensor,
    symmetric: bool,
    normalize: bool,
    keys: Rows | None,
    shared: Rows | None,
) -> Tensor:
    """s_ii − mean_j s_ij of every row, flat: what ε brings in. The mean of products is one with the mean key.

    `keys` and `shared` are the rows of `key` and of `negatives` [M, D] on all ranks, if there are others.
    """
    x, y = embeddings(query, normalize=normalize), embeddings(key, normalize=normalize)
    own = y[..., : x.shape[-2], :]
    total, count = (y.sum(-2, keepdim=True), y.shape[-2]) if in_batch else (own, 1)
    if keys is not None and in_batch:
        total, count = keys.sum(total), keys.size
    if negatives is not None:
        z = embeddings(negatives, normalize=normalize)
        extra, several = z.sum(-2, keepdim=z.dim() == 2), z.shape[-2]
        if shared is not None:
            extra, several = shared.sum(extra), shared.size
        total, count = total + extra, count + several
    difference = (x * (own - total / count)).sum(-1)
    if symmetric:
        mean = x.mean(-2, keepdim=True)
        if keys is not None:
            mean = keys.sum(x.sum(-2, keepdim=True)) / keys.size
        difference = (difference + (own * (x - mean)).sum(-1)) / 2
    return divide(difference.flatten(), temperature)


def _check_negatives(negatives: Tensor | None, query: Tensor, symmetric: bool, empty: bool) -> None:
    if negatives is None:
        raise ValueError(
            "in_batch is False but there are no negatives; give some, or leave it True"
        )
    if not isinstance(negatives, Tensor):
        raise TypeError(
            f"negatives is a {type(negatives).__name__}; it must be a tensor [M, D] or [B, M, D]"
        )
    for what in ("dtype", "device"):
        ours, theirs = getattr(query, what), getattr(negatives, what)
        if ours != theirs:
            raise ValueError(
                f"negatives has {what} {theirs} but query has {ours}; they must be equal"
            )
    if query.dim() != 2:
        raise ValueError(f"query has shape {list(query.shape)}; with negatives it must be [B, D]")
    rows, width = query.shape
    some = empty or negatives.numel() > 0
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


def _check_ids(
    ids: Ids, query: Tensor, key: Tensor, negatives: Tensor | None, label_smoothing: float
) -> None:
    if query.dim() != 2:
        raise ValueError(f"query has shape {list(query.shape)}; with ids it must be [B, D]")
    if negatives is not None:
        raise ValueError(
            "ids is given together with negatives, which have none; append them to key instead"
        )
    if label_smoothing:
        raise ValueError(
            f"label_smoothing is {label_smoothing} but ids leave columns out; it must be 0"
        )
    if isinstance(ids, Tensor):
        ids = (ids, ids)
    if not isinstance(ids, (tuple, list)) or len(ids) != 2:
        raise TypeError(
            f"ids is a {type(ids).__name__}; it must be a tensor [B] or a pair of tensors [B] and [N]"
        )
    check_labels("ids of the queries", ids[0], "query", query)
    check_labels("ids of the keys", ids[1], "key", key)


def _check_sample_weights(weights: Tensor, query: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"sample_weights is a {type(weights).__name__}; it must be a tensor")
    if weights.shape != query.shape[:-1] or weights.device != query.device:
        raise ValueError(
            f"sample_weights has shape {list(weights.shape)} on {weights.device}; "
            f"it must be {list(query.shape[:-1])} on {query.device}, one for each query"
        )


def check_label_smoothing(epsilon: float) -> None:
    """A number in [0, 1)."""
    check_number("label_smoothing", epsilon)
    if not 0 <= epsilon < 1:
        raise ValueError(f"label_smoothing is {epsilon}; it must be at least 0 and less than 1")


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
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """See `fused_info_nce`."""
        loss: Tensor = fused_info_nce(
            query, key, negatives=negatives, ids=ids, sample_weights=sample_weights, **self.options
        )
        return loss
