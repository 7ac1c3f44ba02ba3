"""NT-Xent (SimCLR, Chen et al. 2020): two views of B samples, each row against the 2B − 1 others."""

from typing import Literal, overload

import torch
from torch import Tensor

from hdc_kernels.backends import Mask
from hdc_kernels.checks import Backend, Reduction, check_labels, check_pair
from hdc_kernels.cross_entropy import (
    InfoNCEMetrics,
    Options,
    check_label_smoothing,
    cross_entropy,
    total,
)
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import Rows, meet
from hdc_kernels.module import Loss


@overload
def fused_nt_xent(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor = ...,
    ids: Tensor | None = ...,
    sample_weights: Tensor | None = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[False] = ...,
) -> Tensor: ...


@overload
def fused_nt_xent(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor = ...,
    ids: Tensor | None = ...,
    sample_weights: Tensor | None = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[True],
) -> tuple[Tensor, InfoNCEMetrics]: ...


def fused_nt_xent(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    ids: Tensor | None = None,
    sample_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: Backend = "auto",
    process_group: ProcessGroups | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, InfoNCEMetrics]:
    """−log( exp(sim(z_i, z_p)/τ) / Σ_{j≠i} exp(sim(z_i, z_j)/τ) ) for all 2B rows z of both views.

    z_p is the other view of the sample of z_i. The sum is over all rows but z_i itself, of both views.

    Args:
        first: [B, D], float64, float32, bfloat16 or float16: one view of each sample.
        second: [B, D], the other views: `second[i]` belongs to `first[i]`. Same dtype and device.
        temperature: τ > 0; a number, or a tensor with one element, which then gets its gradient.
            The value of a tensor is not checked.
        ids: [B] integers: samples with the same id are no negatives of each other. No `label_smoothing` then.
        sample_weights: [B], of both views of a sample, or [2, B]; as in `fused_info_nce`.
        label_smoothing: as in `fused_info_nce`, among the 2B − 1 other rows.
        reduction: "mean" over the 2B rows, their "sum", or "none" for one value per row, [2, B].
        normalize: divide by the L2 norm first. With False, the similarity is the plain dot product.
        backend, process_group, return_metrics: as in `fused_info_nce`, of all rows, [2, B].

    Returns:
        A scalar, or [2, B] for "none"; float64 for float64 inputs, float32 for all others. With
        `return_metrics` a pair of it and `InfoNCEMetrics`.
        A NaN in the input gives a NaN loss. A zero vector has similarity 0 and gradient 0. With B = 1 there is
        nothing to tell apart: the loss is 0.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.

    Equals: lightly's `NTXentLoss(temperature=τ)`; pytorch-metric-learning's `NTXentLoss` and `SupConLoss`
    of both views, labelled by sample.
    """
    check_pair(("first", "second"), (first, second), "[B, D]", empty=process_group is not None)
    options = Options(
        temperature,
        reduction,
        normalize,
        backend,
        sample_weights,
        label_smoothing,
        return_metrics,
    )
    options.check(first.shape[:1], first.device, views=2, ids=ids)
    if ids is not None:
        check_labels("ids", ids, "first", first)
    batch = first.shape[0]
    # Beside row i of x stands its positive; both are of one sample, and so is row i itself, elsewhere in y.
    x, y = torch.cat((first, second)), torch.cat((second, first))
    views: Rows | None = None
    samples = torch.arange(batch, device=first.device)
    if process_group is not None:
        (across,) = meet(process_group, first.device, batch)
        views, samples = across.times(2), across.numbers(first.device)[:batch]
    rows = (samples if ids is None else ids.long()).repeat(2).unsqueeze(0)

    def others(x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        everything, count = total(y, views)
        return everything - x, count - 1

    return cross_entropy(
        x,
        y,
        options,
        mask=Mask(ids=(rows, rows)),
        columns=others,
        shape=(2, batch),
        queries=views,
        keys=views,
    )


class NTXent(Loss):
    """`fused_nt_xent` as a module. Pass an `nn.Parameter` as `temperature` to learn it."""

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: Backend = "auto",
        process_group: ProcessGroups | None = None,
    ) -> None:
        check_label_smoothing(label_smoothing)
        super().__init__(
            temperature,
            label_smoothing=label_smoothing,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            process_group=process_group,
        )

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        *,
        ids: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """See `fused_nt_xent`."""
        loss: Tensor = fused_nt_xent(
            first, second, ids=ids, sample_weights=sample_weights, **self.options
        )
        return loss
