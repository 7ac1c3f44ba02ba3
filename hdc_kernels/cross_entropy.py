"""The cross-entropy of each row's positive among its columns: what InfoNCE, NT-Xent, CLIP and MoCo are."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hdc_kernels.backends import EVERYTHING, Mask
from hdc_kernels.checks import (
    Backend,
    Reduction,
    check_choice,
    check_number,
    check_temperature,
)
from hdc_kernels.contrast import Contrast, contrast
from hdc_kernels.distributed.contrast import contrast_across
from hdc_kernels.distributed.rows import Rows
from hdc_kernels.positives import accuracy, divide, embeddings, positive_logits
from hdc_kernels.reduction import check_sample_weights, reduce


class InfoNCEMetrics(NamedTuple):
    """What to log of one step, detached; [..., B] has an entry for each row of the loss.

    loss: [..., B], the loss of every row, before `sample_weights`.
    accuracy: the share of rows whose positive is closer than every negative; float32, no dimension.
    rank: [..., B] int64, how many negatives are at least as close as the positive: 0 is a hit.
    logsumexp: [..., B], log Σ exp(sim/τ) over the positive and the negatives, the softmax's denominator; DCL's has no
        positive in it, and HN-NCE's is that of its own formula, of weighted negatives.

    With two directions (CLIP, `symmetric`), loss and logsumexp are the mean of both, accuracy and rank those of the
    first, from query to key.
    """

    loss: Tensor
    accuracy: Tensor
    rank: Tensor
    logsumexp: Tensor


Result = Tensor | tuple[Tensor, InfoNCEMetrics]


class Options(NamedTuple):
    """Those that all these losses have, as they were given; `fused_info_nce` says what they mean."""

    temperature: float | Tensor
    reduction: Reduction
    normalize: bool
    backend: Backend
    sample_weights: Tensor | None
    label_smoothing: float
    return_metrics: bool

    def check(
        self, shape: torch.Size, device: torch.device, views: int = 1, **leaving_out: object
    ) -> None:
        """For samples of this shape, and beside options that leave columns out. Raises TypeError or ValueError."""
        check_temperature(self.temperature)
        check_choice("reduction", self.reduction, Reduction)
        check_choice("backend", self.backend, Backend)
        check_sample_weights(self.sample_weights, shape, device, views=views)
        check_label_smoothing(self.label_smoothing)
        if not self.label_smoothing:
            return
        for option, given in leaving_out.items():
            if given is not None:
                raise ValueError(
                    f"label_smoothing is {self.label_smoothing} but {option} leave columns out; it must be 0"
                )

    def primitive(self) -> dict[str, Any]:
        """For `contrast` and `logsumexp`."""
        return {
            "temperature": self.temperature,
            "normalize": self.normalize,
            "backend": self.backend,
        }

    def result(
        self,
        found: Contrast,
        query: Tensor,
        key: Tensor,
        shape: torch.Size | tuple[int, ...],
        count: int,
        queries: Rows | None,
        excess: Tensor | None,
    ) -> Result:
        """What the loss returns of the terms of `count` rows on all ranks, if there are others those of `queries`.

        `found.value` is their total already, or they are to be reduced. `excess` is that of `over_uniform`.
        """
        value, terms = found.value, found.terms
        summed = value.dim() == 0
        if excess is not None:
            excess = float(self.label_smoothing) * excess.flatten()
            if self.return_metrics:
                terms = terms + excess.detach()
            divisor = count if self.reduction == "mean" else 1
            value = value + (excess.sum() / divisor if summed else excess)
        if not summed:
            by_row = value.view(shape)
            value = reduce(by_row, self.reduction, self.sample_weights, queries, count=count)
            if value is by_row and excess is None and self.return_metrics:
                terms = terms.clone()  # metrics stay as they are when the loss is changed in place
        elif queries is not None:
            value = queries.total(value)
        if not self.return_metrics:
            return value
        assert found.ranks is not None
        with torch.no_grad():
            own = key[..., : query.shape[-2], :]
            positive = positive_logits(query, own, self.temperature, normalize=self.normalize)
        lse = found.terms.view(shape) + positive.view(shape)
        ranks = found.ranks.view(shape)
        return value, InfoNCEMetrics(terms.view(shape), accuracy(ranks), ranks, lse)


def cross_entropy(
    query: Tensor,
    key: Tensor,
    options: Options,
    *,
    symmetric: bool = False,
    mask: Mask = EVERYTHING,
    columns: Callable[[Tensor, Tensor], tuple[Tensor, int | Tensor]] | None = None,
    shape: tuple[int, ...] | None = None,
    queries: Rows | None = None,
    keys: Rows | None = None,
) -> Result:
    """−log softmax_j(s_ij)_i of query [..., B, D] and key [..., N, D], N ≥ B, over what `mask` lets through.

    Args:
        columns: for label smoothing, from the `embeddings` of query and key to the sum and the number of those that
            are each row's columns, if these are not all of `key`.
        shape: of the terms, if not [..., B].
        queries, keys: whose rows they are, if there are other ranks; without `keys`, no key is exchanged.

    Returns:
        The loss, with `return_metrics` a pair of it and `InfoNCEMetrics`.
    """
    shape = query.shape[:-1] if shape is None else shape
    if query.dim() > 3:
        query, key = query.flatten(0, -3), key.flatten(0, -3)
    count = math.prod(query.shape[:-2]) * (query.shape[-2] if queries is None else queries.size)
    summed = options.reduction != "none" and options.sample_weights is None
    found = compare(
        query,
        key,
        mask,
        queries,
        keys,
        weights=[1.0] if summed else None,
        divisor=count if summed and options.reduction == "mean" else 1,
        symmetric=symmetric,
        ranked=options.return_metrics,
        detail="rows" if options.return_metrics else "total",
        **options.primitive(),
    )
    excess = None
    if options.label_smoothing:
        x, y = (embeddings(t, normalize=options.normalize) for t in (query, key))
        own = y[..., : x.shape[-2], :]
        everything = total(y, keys) if columns is None else columns(x, y)
        excess = over_uniform(x, own, everything, options.temperature)
        if symmetric:
            back = over_uniform(y, x, total(x, queries), options.temperature)
            excess = (excess + back) / 2
    return options.result(found, query, key, shape, count, queries, excess)


def compare(
    query: Tensor,
    key: Tensor,
    mask: Mask,
    queries: Rows | None,
    keys: Rows | None,
    **arguments: Any,
) -> Contrast:
    """`contrast`, with the keys of all ranks if there are `keys` of others."""
    if queries is None or keys is None:
        return contrast([(query, key)], mask=mask, **arguments)
    if query.dim() == 3:  # they are exchanged by rows
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    return contrast_across(
        queries, keys, [(query, key)], rows_first=int(query.dim() == 3), mask=mask, **arguments
    )


def own_and(key: Tensor, negatives: Tensor, empty: Tensor | None = None) -> tuple[Tensor, Mask]:
    """Each query's own key [B, D] and negatives [M, D], the same for all but those that are `empty`, [M] bool.

    One id is that of all queries, their keys and what is empty: nobody meets these, but its own key. That is B × B
    products in vain, few beside B × M, and saves one of three passes over the negatives.
    """
    rows = len(key)
    ids = torch.zeros(rows + len(negatives), dtype=torch.int64, device=key.device)
    ids[rows:] = 1 if empty is None else (~empty).long()
    return torch.cat((key, negatives)), Mask(ids=(ids[:rows].unsqueeze(0), ids.unsqueeze(0)))


def over_uniform(
    query: Tensor, own: Tensor, columns: tuple[Tensor, int | Tensor], temperature: float | Tensor
) -> Tensor:
    """s_ii − mean_j s_ij, what label smoothing adds ε times: [..., B, D] twice -> [..., B].

    The mean of products is one with the mean column, out of the sum and the number of all of them.
    """
    everything, count = columns
    return divide((query * (own - everything / count)).sum(-1), temperature)


def total(columns: Tensor, rows: Rows | None) -> tuple[Tensor, int]:
    """The sum [..., 1, D] of columns [..., N, D] and their number, on all ranks if there are others."""
    everything = columns.sum(-2, keepdim=True)
    if rows is None:
        return everything, columns.shape[-2]
    return rows.sum(everything), rows.size


def check_label_smoothing(epsilon: float) -> None:
    """A number in [0, 1)."""
    check_number("label_smoothing", epsilon)
    if not 0 <= epsilon < 1:
        raise ValueError(f"label_smoothing is {epsilon}; it must be at least 0 and less than 1")
