"""CLIP's loss (Radford et al. 2021): InfoNCE from images to texts and back, with a learned scale."""

import math
from typing import Literal, overload

import torch
from torch import Tensor, nn

from hdc_kernels.checks import Backend, Reduction, check_number, check_pair
from hdc_kernels.cross_entropy import (
    InfoNCEMetrics,
    Options,
    check_label_smoothing,
    cross_entropy,
)
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import Rows, meet
from hdc_kernels.false_negatives import Ids, without_false_negatives
from hdc_kernels.module import Loss


@overload
def fused_clip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = ...,
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
def fused_clip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = ...,
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


def fused_clip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = 0.07,
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
    """½·[ −log softmax_j(sim(image_i, text_j)/τ)_i − log softmax_j(sim(image_j, text_i)/τ)_i ], cosine similarity.

    Args:
        image: [B, D], float64, float32, bfloat16 or float16.
        text: [B, D]; `text[i]` belongs to `image[i]`, all others are its negatives. Same dtype and device.
        temperature: τ > 0, one over the scale; a number, or a tensor with one element, which then gets its
            gradient. The value of a tensor is not checked.
        ids, false_negatives: which texts are no negatives of an image, nor it of them, as in `fused_info_nce`.
        sample_weights, label_smoothing: as in `fused_info_nce`; a weight is that of a pair.
        reduction: "mean" over the pairs, their "sum", or "none" for one value per pair, [B].
        normalize: divide by the L2 norm first. With False, the similarity is the plain dot product.
        backend, process_group, return_metrics: as in `fused_info_nce`.

    Returns:
        A scalar, or [B] for "none"; float64 for float64 inputs, float32 for all others. With
        `return_metrics` a pair of it and `InfoNCEMetrics`.
        A NaN in the input gives a NaN loss. A zero vector has similarity 0 and gradient 0.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.

    Equals: `fused_info_nce(..., symmetric=True)`; on normalised inputs, open_clip's `ClipLoss` at
    `logit_scale=1/τ`.
    """
    check_pair(("image", "text"), (image, text), "[B, D]", empty=process_group is not None)
    options = Options(
        temperature,
        reduction,
        normalize,
        backend,
        sample_weights,
        label_smoothing,
        return_metrics,
    )
    options.check(image.shape[:1], image.device, ids=ids, false_negatives=false_negatives)
    mask = without_false_negatives(
        ids,
        false_negatives,
        ("image", "text"),
        image,
        text,
        grouped=process_group is not None,
    )
    rows: Rows | None = None
    if process_group is not None:
        (rows,) = meet(process_group, image.device, len(image))
    return cross_entropy(image, text, options, symmetric=True, mask=mask, queries=rows, keys=rows)


class CLIP(Loss):
    """`fused_clip` with the scale that the paper learns.

    The parameter has the name that it has in open_clip's models: `logit_scale` is log(1/τ), of which the
    similarities get the exponential. The paper keeps that at or below 100, and so does `forward`, before it
    does anything else: it sets a parameter that an optimizer's step brought above back to the bound, as
    open_clip's training does after each step. The gradient is that of the loss at the bound. (A clamp that
    autograd sees would make it 0 from there on, and the parameter would not come back.)

    Args:
        scale: the initial 1/τ.
        max_scale: the bound of 1/τ; `math.inf` for none.
        label_smoothing, reduction, normalize, backend, process_group: as in `fused_clip`.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.
    """

    def __init__(
        self,
        scale: float = 1 / 0.07,
        *,
        max_scale: float = 100.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: Backend = "auto",
        process_group: ProcessGroups | None = None,
    ) -> None:
        check_number("scale", scale)
        check_number("max_scale", max_scale)
        if not 0 < scale <= max_scale or scale == math.inf:
            raise ValueError(
                f"scale is {scale}; it must be positive, finite and at most max_scale, {max_scale}"
            )
        check_label_smoothing(label_smoothing)
        super().__init__(
            None,
            label_smoothing=label_smoothing,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            process_group=process_group,
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.max_scale = max_scale

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        *,
        ids: Ids | None = None,
        false_negatives: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """See `fused_clip`."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(self.max_scale))
        loss: Tensor = fused_clip(
            image,
            text,
            temperature=(-self.logit_scale).exp(),
            ids=ids,
            false_negatives=false_negatives,
            sample_weights=sample_weights,
            **self.options,
        )
        return loss

    def extra_repr(self) -> str:
        return f"max_scale={self.max_scale}, {super().extra_repr()}"
