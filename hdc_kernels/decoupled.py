"""Decoupled contrastive learning (Yeh et al. 2022): NT-Xent without the positive in the denominator."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import Mask
from hdc_kernels.checks import (
    Backend,
    Reduction,
    check_choice,
    check_number,
    check_pair,
    check_temperature,
)
from hdc_kernels.cross_entropy import InfoNCEMetrics, Result
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import Rows, meet
from hdc_kernels.module import Loss
from hdc_kernels.pairwise import Columns, sums
from hdc_kernels.positives import accuracy, positive_logits
from hdc_kernels.reduction import check_sample_weights, reduce


@overload
def fused_dcl(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor = ...,
    weights: Tensor | None = ...,
    sample_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[False] = ...,
) -> Tensor: ...


@overload
def fused_dcl(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor = ...,
    weights: Tensor | None = ...,
    sample_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[True],
) -> tuple[Tensor, InfoNCEMetrics]: ...


def fused_dcl(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: Backend = "auto",
    process_group: ProcessGroups | None = None,
    return_metrics: bool = False,
) -> Result:
    """−w_i·sim(z_i, z_p)/τ + log Σ_j exp(sim(z_i, z_j)/τ) for all 2B rows z of both views.

    z_p is the other view of the sample of z_i. The sum is over the 2B − 2 rows of the other samples, of both
    views. The paper's Eq. 5 (w = 1) and Eq. 6. The loss can be negative.

    Args:
        first: [B, D] with B ≥ 2, float64, float32, bfloat16 or float16: one view of each sample.
        second: [B, D], the other views: `second[i]` belongs to `first[i]`. Same dtype and device.
        temperature: τ > 0; a number, or a tensor with one element, which then gets its gradient.
            The value of a tensor is not checked.
        weights: the paper's w, of the positives: [B] for both views of a sample or [2, B] for every row; 1 if not
            given.
        sample_weights: of the terms, in either of these shapes; as in `fused_info_nce`.
        reduction: "mean" over the 2B rows, their "sum", or "none" for one value per row, [2, B].
        normalize: divide by the L2 norm first. With False, the similarity is the plain dot product.
        backend, process_group: as in `fused_info_nce`. B ≥ 2 is then that of all ranks together.
        return_metrics: as in `fused_info_nce`, of all rows, [2, B].

    Returns:
        A scalar, or [2, B] for "none"; float64 for float64 inputs, float32 for all others. With
        `return_metrics` a pair of it and `InfoNCEMetrics`.
        A NaN in the input gives a NaN loss. A zero vector has similarity 0 and gradient 0.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.

    Equals: lightly's `DCLLoss(temperature=τ)`, whose `weight_fn` gives the weights.
    """
    check_pair(("first", "second"), (first, second), "[B, D]", empty=process_group is not None)
    check_temperature(temperature)
    check_choice("reduction", reduction, Reduction)
    check_choice("backend", backend, Backend)
    batch = first.shape[0]
    for name, given in (("weights", weights), ("sample_weights", sample_weights)):
        check_sample_weights(given, (batch,), first.device, name=name, views=2)
    across: Rows | None = None
    if process_group is not None:
        (across,) = meet(process_group, first.device, batch)
    if (batch if across is None else across.size) == 1:
        raise ValueError(
            f"first has shape {list(first.shape)}; B must be at least 2, for the only negatives are other "
            "samples and a sum over none of them has no logarithm"
        )
    rows = torch.cat((first, second))
    # A rank is that of the positive in the diagonal; without ranks, one copy of both views is enough.
    others = torch.cat((second, first)) if return_metrics else rows
    columns: Columns = others
    samples = everybody = torch.arange(batch, device=first.device).repeat(2)
    if across is not None:
        views = across.times(2)
        columns, samples = views.share(others), across.numbers(first.device)[:batch].repeat(2)
        everybody = views.gather_integers(samples)
    ids = samples.unsqueeze(0), everybody.unsqueeze(0)
    summed = across is None and sample_weights is None
    negatives = sums(
        "logsumexp",
        rows,
        columns,
        temperature=temperature,
        normalize=normalize,
        mask=Mask(diagonal=not return_metrics, ids=ids),
        reduction=reduction if summed else "none",
        ranked=return_metrics,
        backend=backend,
    )
    # Made last: what autograd keeps of it would lie beside the scratch of the sums.
    positive = positive_logits(first, second, temperature, normalize=normalize).expand(2, batch)
    if weights is not None:
        positive = positive * weights.to(positive.dtype)
    if summed and reduction != "none":
        value = negatives.value - reference.reduce(positive, reduction)
    else:
        terms = negatives.value.view(2, batch) - positive
        count = None if across is None else 2 * across.size
        value = reduce(terms, reduction, sample_weights, across, count=count)
    if not return_metrics:
        return value
    assert negatives.ranks is not None
    lse, ranks = negatives.terms.view(2, batch), negatives.ranks.view(2, batch)
    return value, InfoNCEMetrics(lse - positive.detach(), accuracy(ranks), ranks, lse)


@overload
def fused_dclw(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor = ...,
    sigma: float = ...,
    sample_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[False] = ...,
) -> Tensor: ...


@overload
def fused_dclw(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor = ...,
    sigma: float = ...,
    sample_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[True],
) -> tuple[Tensor, InfoNCEMetrics]: ...


def fused_dclw(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    sigma: float = 0.5,
    sample_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: Backend = "auto",
    process_group: ProcessGroups | None = None,
    return_metrics: bool = False,
) -> Result:
    """`fused_dcl` with w_i = 2 − B·softmax_i(sim(first_i, second_i)/σ): the harder the positive, the more it counts.

    The weights carry no gradient. In the paper, it is the von Mises-Fisher weighting of DCLW.

    Args:
        sigma: σ > 0.
        first, second, temperature, sample_weights, reduction, normalize, backend, process_group, return_metrics: as
            in `fused_dcl`; with a group, B and the softmax are over the samples of all ranks.

    Returns, raises: as `fused_dcl`.

    Equals: lightly's `DCLWLoss(temperature=τ, sigma=σ)`.
    """
    check_pair(("first", "second"), (first, second), "[B, D]", empty=process_group is not None)
    check_sigma(sigma)
    similarity = positive_logits(first.detach(), second.detach(), sigma, normalize=normalize)
    if process_group is None:
        shares = first.shape[0] * similarity.softmax(0)
    else:
        (across,) = meet(process_group, first.device, first.shape[0])
        everybody = across.by_rank(similarity)
        shares = across.size * (similarity - everybody.logsumexp(0)).exp()
    options: dict[str, Any] = {"normalize": normalize, "return_metrics": return_metrics}
    result: Result = fused_dcl(
        first,
        second,
        temperature=temperature,
        weights=2 - shares,
        sample_weights=sample_weights,
        reduction=reduction,
        backend=backend,
        process_group=process_group,
        **options,
    )
    return result


def check_sigma(sigma: float) -> None:
    """A positive finite number."""
    check_number("sigma", sigma)
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma is {sigma}; it must be positive and finite")


class DCL(Loss):
    """`fused_dcl` as a module. Pass an `nn.Parameter` as `temperature` to learn it."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: Backend = "auto",
        process_group: ProcessGroups | None = None,
    ) -> None:
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            process_group=process_group,
        )

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        weights: Tensor | None = None,
        *,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """See `fused_dcl`."""
        loss: Tensor = fused_dcl(
            first, second, weights=weights, sample_weights=sample_weights, **self.options
        )
        return loss


class DCLW(Loss):
    """`fused_dclw` as a module. Pass an `nn.Parameter` as `temperature` to learn it."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        sigma: float = 0.5,
        *,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: Backend = "auto",
        process_group: ProcessGroups | None = None,
    ) -> None:
        check_sigma(sigma)
        super().__init__(
            temperature,
            sigma=sigma,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            process_group=process_group,
        )

    def forward(
        self, first: Tensor, second: Tensor, *, sample_weights: Tensor | None = None
    ) -> Tensor:
        """See `fused_dclw`."""
        loss: Tensor = fused_dclw(first, second, sample_weights=sample_weights, **self.options)
        return loss
