"""InfoNCE that weights hard negatives: Robinson et al. 2021 (HCL) and Radenovic et al. 2023 (HN-NCE)."""

import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import Mask
from hdc_kernels.checks import (
    Backend,
    Reduction,
    check_choice,
    check_labels,
    check_number,
    check_pair,
    check_temperature,
)
from hdc_kernels.cross_entropy import InfoNCEMetrics, Result
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import Rows, meet
from hdc_kernels.module import Loss
from hdc_kernels.pairwise import Columns, sums
from hdc_kernels.positives import accuracy, divide, positive_logits
from hdc_kernels.reduction import check_sample_weights, reduce


@overload
def fused_hn_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    alpha: float = ...,
    beta: float = ...,
    tau_plus: float = ...,
    labels: Tensor | None = ...,
    symmetric: bool = ...,
    sample_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[False] = ...,
) -> Tensor: ...


@overload
def fused_hn_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    alpha: float = ...,
    beta: float = ...,
    tau_plus: float = ...,
    labels: Tensor | None = ...,
    symmetric: bool = ...,
    sample_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[True],
) -> tuple[Tensor, InfoNCEMetrics]: ...


def fused_hn_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    alpha: float = 1.0,
    beta: float = 1.0,
    tau_plus: float = 0.0,
    labels: Tensor | None = None,
    symmetric: bool = False,
    sample_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: Backend = "auto",
    process_group: ProcessGroups | None = None,
    return_metrics: bool = False,
) -> Result:
    """−log( e^{s_ii} / (α·e^{s_ii} + N_i) ) with s_ij = sim(q_i, k_j)/τ and N_i a weighted sum over negatives.

        N_i = Σ_{j≠i} w_ij·e^{s_ij},   w_ij = n·e^{β·s_ij} / Σ_{k≠i} e^{β·s_ik},   n = B − 1

    is that of Radenovic et al. β = 0 and α = 1 make it InfoNCE. Robinson et al. also take away what
    false negatives are expected to add, if a share τ⁺ of all keys belongs to the query; N_i becomes

        max( (N_i − τ⁺·n·e^{s_ii}) / (1 − τ⁺), n·e^{−1/τ} ).

    Args:
        query: [B, D], float64, float32, bfloat16 or float16.
        key: [B, D]; `key[i]` is the positive of `query[i]`, all others are its negatives. Same dtype
            and device as `query`.
        temperature: τ > 0; a number, or a tensor with one element, which then gets its gradient.
            The value of a tensor is not checked.
        alpha: α ≥ 0, the positive's share in the denominator; 0 leaves it out.
        beta: β ≥ 0, how much the weights concentrate on hard negatives; it multiplies the logits s.
        tau_plus: τ⁺, from 0 to below 1. The bound n·e^{−1/τ} is the least that cosines can add up to.
        labels: [B] integers, or None: keys of the query's own label are no negatives (nor is the query's
            positive), and n is the number of those that are.
        symmetric: the mean of both directions, query to key and key to query.
        sample_weights: [B], as in `fused_info_nce`.
        reduction: "mean", "sum", or "none" for one value per query, [B].
        normalize: divide by the L2 norm first. With False, the similarity is the plain dot product.
        backend: as in `fused_info_nce`. There is one pass over the pairs (on a GPU two, unless β = 0), and
            twice as many with `symmetric`.
        process_group: as in `fused_info_nce`. n is then the number of negatives on all ranks together.
        return_metrics: as in `fused_info_nce`; weights do not reorder negatives, so that ranks are InfoNCE's.

    Returns:
        A scalar, or [B] for "none"; float64 for float64 inputs, float32 for all others. With
        `return_metrics` a pair of it and `InfoNCEMetrics`.
        The term of a query without negatives is 0, as it is with B = 1. A NaN in the input gives a NaN loss.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.

    Equals: with `symmetric=True` half of HN-NCE as published, which adds the directions. Two views a and b
    of the same images as in HCL: `fused_hn_nce(cat(a, b), cat(b, a), tau_plus=τ⁺, labels=cat(i, i))`
    with `i = arange(len(a))`.
    """
    check_pair(("query", "key"), (query, key), "[B, D]", empty=process_group is not None)
    check_temperature(temperature)
    _check_weighting(alpha, beta, tau_plus)
    if labels is not None:
        check_labels("labels", labels, "query", query)
        labels = labels.long()
    check_choice("reduction", reduction, Reduction)
    check_choice("backend", backend, Backend)
    check_sample_weights(sample_weights, query.shape[:1], query.device)

    if isinstance(temperature, Tensor):  # before it is divided, in 16 bits perhaps
        temperature = temperature.to(reference.compute_dtype(query.dtype)).reshape(())
    positive = positive_logits(query, key, temperature, normalize=normalize)
    across: Rows | None = None
    keys: Columns = key
    queries: Columns = query
    everybody, size = labels, len(query)
    if process_group is not None:
        (across,) = meet(process_group, query.device, size)
        size = across.size
        keys = across.share(key)
        if symmetric:
            queries = across.share(query)
        if labels is not None:
            everybody = across.gather_integers(labels)
    counts = _count_negatives(positive, labels, everybody, size)
    least = divide(counts.new_full((), -1.0), temperature)
    ids = None
    if labels is not None and everybody is not None:
        ids = labels.unsqueeze(0), everybody.unsqueeze(0)

    def direction(x: Tensor, y: Columns, ranked: bool) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = {
            "temperature": temperature,
            "normalize": normalize,
            "mask": Mask(diagonal=False, ids=ids),
            "ranked": ranked,
            "backend": backend,
        }
        if beta > 0:
            found = sums("tilted", x, y, beta=float(beta), **options)
            lse = found.value + counts.clamp_min(1).log()
        else:  # all weights are 1
            found = sums("logsumexp", x, y, **options)
            lse = found.value
        excess = torch.where(counts > 0, lse - positive, 0.0)
        if tau_plus > 0:
            excess = _debias(excess, counts, least - positive, tau_plus)
        term = excess
        if alpha > 0:  # log(α + e^z)
            term = math.log(alpha) - F.logsigmoid(math.log(alpha) - excess)
        return torch.where(counts > 0, term, 0.0), found.ranks

    terms, ranks = direction(query, keys, return_metrics)
    if symmetric:
        back, _ = direction(key, queries, False)
        terms = (terms + back) / 2
    value = reduce(terms, reduction, sample_weights, across)
    if not return_metrics:
        return value
    assert ranks is not None
    # Metrics stay as they are when somebody changes the loss in place.
    terms = terms.detach().clone() if value is terms else terms.detach()
    return value, InfoNCEMetrics(terms, accuracy(ranks), ranks, terms + positive.detach())


class HNNCE(Loss):
    """`fused_hn_nce` as a module. Pass an `nn.Parameter` as `temperature` to learn it."""

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        tau_plus: float = 0.0,
        symmetric: bool = False,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: Backend = "auto",
        process_group: ProcessGroups | None = None,
    ) -> None:
        _check_weighting(alpha, beta, tau_plus)
        super().__init__(
            temperature,
            alpha=alpha,
            beta=beta,
            tau_plus=tau_plus,
            symmetric=symmetric,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            process_group=process_group,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        labels: Tensor | None = None,
        *,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """See `fused_hn_nce`."""
        loss: Tensor = fused_hn_nce(
            query, key, labels=labels, sample_weights=sample_weights, **self.options
        )
        return loss


def _count_negatives(
    positive: Tensor, labels: Tensor | None, of_keys: Tensor | None, size: int
) -> Tensor:
    """How many negatives each query has among so many keys, in the dtype of the logits."""
    if labels is None or of_keys is None:
        return torch.full_like(positive, size - 1)
    ordered = of_keys.sort().values
    same = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
    return (size - same).to(positive.dtype)


def _debias(excess: Tensor, counts: Tensor, least: Tensor, tau_plus: float) -> Tensor:
    """log(N_i / e^{s_ii}) without the false negatives; `least` is that of the easiest possible negative."""
    some = counts.clamp_min(1).log()
    # The logarithm of the false negatives' share. Where it is 0 or more nothing would be left, and the
    # bound takes over; written so that NaN is not among these.
    share = math.log(tau_plus) + some - excess
    nothing = share >= 0
    left = excess + torch.log1p(-share.masked_fill(nothing, -1.0).exp()) - math.log1p(-tau_plus)
    return torch.maximum(left.masked_fill(nothing, -torch.inf), some + least)


def _check_weighting(alpha: float, beta: float, tau_plus: float) -> None:
    for name, value in (("alpha", alpha), ("beta", beta), ("tau_plus", tau_plus)):
        check_number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be finite and not negative")
    if tau_plus >= 1:
        raise ValueError(f"tau_plus is {tau_plus}; it must be below 1")
