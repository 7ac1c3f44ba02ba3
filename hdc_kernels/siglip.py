"""SigLIP's sigmoid loss (Zhai et al. 2023): whether an image and a text belong together, pair by pair."""

import math
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdc_kernels import reference
from hdc_kernels.checks import (
    Backend,
    Reduction,
    check_bias,
    check_choice,
    check_number,
    check_pair,
    check_temperature,
)
from hdc_kernels.distributed.contrast import mask_across
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import Rows, meet
from hdc_kernels.false_negatives import Ids, without_false_negatives
from hdc_kernels.module import Loss
from hdc_kernels.pairwise import Columns, sums
from hdc_kernels.positives import accuracy, positive_logits
from hdc_kernels.reduction import check_sample_weights, reduce


class SigLIPMetrics(NamedTuple):
    """What to log of one step, detached. There is no logsumexp: the loss has no softmax.

    loss: [B], the loss of every image, before `sample_weights`.
    accuracy: the share of images whose text is closer than all others that count; float32, no dimension.
    rank: [B] int64, how many of these are at least as close as the image's own: 0 is a hit.
    """

    loss: Tensor
    accuracy: Tensor
    rank: Tensor


@overload
def fused_siglip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = ...,
    bias: float | Tensor = ...,
    ids: Ids | None = ...,
    false_negatives: Tensor | None = ...,
    sample_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[False] = ...,
) -> Tensor: ...


@overload
def fused_siglip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = ...,
    bias: float | Tensor = ...,
    ids: Ids | None = ...,
    false_negatives: Tensor | None = ...,
    sample_weights: Tensor | None = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[True],
) -> tuple[Tensor, SigLIPMetrics]: ...


def fused_siglip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    ids: Ids | None = None,
    false_negatives: Tensor | None = None,
    sample_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: Backend = "auto",
    process_group: ProcessGroups | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, SigLIPMetrics]:
    """−Σ_j log σ(z_ij·(sim(image_i, text_j)/τ + b)) with cosine similarity; z_ij is 1 if i = j, otherwise −1.

    Args:
        image: [B, D], float64, float32, bfloat16 or float16.
        text: [N, D] with N ≥ B; `text[i]` belongs to `image[i]`, the texts from B on to no image. Same D,
            dtype and device as `image`.
        temperature: τ > 0, the paper's 1/t, initially 1/10 there; a number, or a tensor with one element,
            which then gets its gradient. The value of a tensor is not checked.
        bias: b, initially −10 in the paper; a number, or a tensor with one element, which then gets its
            gradient.
        ids, false_negatives: texts that do not count for an image, unless they are its own, as in `fused_info_nce`.
        sample_weights: [B], of the images, as in `fused_info_nce`.
        reduction: "mean" over the images (each is a sum over the texts), their "sum", or "none" for
            one value per image, [B].
        normalize: divide by the L2 norm first. With False, the similarity is the plain dot product.
        backend, process_group: as in `fused_info_nce`.
        return_metrics: also return every image's loss, the rank of its text and the accuracy, out of the same pass
            (on a GPU, ranks take another one without gradients).

    Returns:
        A scalar, or [B] for "none"; float64 for float64 inputs, float32 for all others. With
        `return_metrics` a pair of it and `SigLIPMetrics`.
        A NaN in the input gives a NaN loss. A zero vector has similarity 0 and gradient 0.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.

    Equals: on normalised inputs, open_clip's `SigLipLoss` at `logit_scale=1/τ` and `logit_bias=b`.
    """
    across = process_group is not None
    check_pair(("image", "text"), (image, text), "[B, D]", extra_rows=True, empty=across)
    check_temperature(temperature)
    check_bias("bias", bias)
    check_choice("reduction", reduction, Reduction)
    check_choice("backend", backend, Backend)
    check_sample_weights(sample_weights, image.shape[:1], image.device)
    mask = without_false_negatives(
        ids, false_negatives, ("image", "text"), image, text, grouped=across
    )._replace(diagonal=False)
    if isinstance(bias, Tensor):
        bias = bias.to(reference.compute_dtype(image.dtype)).reshape(())
    else:
        bias = float(bias)
    positive = positive_logits(image, text[: len(image)], temperature, normalize=normalize)
    rows: Rows | None = None
    texts: Columns = text
    if process_group is not None:
        rows, columns = meet(process_group, image.device, len(image), len(text))
        texts, mask = columns.share(text), mask_across(columns, mask)
    summed = rows is None and sample_weights is None
    negatives = sums(
        "softplus",
        image,
        texts,
        bias=bias,
        temperature=temperature,
        normalize=normalize,
        mask=mask,
        reduction=reduction if summed else "none",
        ranked=return_metrics,
        backend=backend,
    )
    positives = -F.logsigmoid(positive + bias)
    if summed:
        value = negatives.value + reference.reduce(positives, reduction)
    else:
        value = reduce(negatives.value + positives, reduction, sample_weights, rows)
    if not return_metrics:
        return value
    ranks = negatives.ranks
    assert ranks is not None
    terms = negatives.terms + positives.detach()
    return value, SigLIPMetrics(terms, accuracy(ranks), ranks)


class SigLIP(Loss):
    """`fused_siglip` with the scale and the bias that the paper learns.

    The parameters have the names that they have in open_clip's models: `logit_scale` is log(1/τ), of which
    the similarities get the exponential, `logit_bias` is b.

    Args:
        scale: the initial 1/τ.
        bias: the initial b.
        reduction, normalize, backend, process_group: as in `fused_siglip`.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.
    """

    def __init__(
        self,
        scale: float = 10.0,
        bias: float = -10.0,
        *,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: Backend = "auto",
        process_group: ProcessGroups | None = None,
    ) -> None:
        check_number("scale", scale)
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale is {scale}; it must be positive and finite")
        check_bias("bias", bias)
        super().__init__(
            None,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            process_group=process_group,
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        *,
        ids: Ids | None = None,
        false_negatives: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """See `fused_siglip`."""
        loss: Tensor = fused_siglip(
            image,
            text,
            temperature=(-self.logit_scale).exp(),
            bias=self.logit_bias,
            ids=ids,
            false_negatives=false_negatives,
            sample_weights=sample_weights,
            **self.options,
        )
        return loss
