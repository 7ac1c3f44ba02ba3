"""CLIP's loss (Radford et al. 2021): InfoNCE from images to texts and back, with a learned scale."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hdc_kernels.checks import (
    Backend,
    Reduction,
    check_choice,
    check_number,
    check_pair,
    check_temperature,
)
from hdc_kernels.contrast import contrast
from hdc_kernels.distributed.contrast import contrast_across
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import meet
from hdc_kernels.module import Loss


def fused_clip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: Backend = "auto",
    process_group: ProcessGroups | None = None,
) -> Tensor:
    """½·[ −log softmax_j(sim(image_i, text_j)/τ)_i − log softmax_j(sim(image_j, text_i)/τ)_i ], cosine similarity.

    Args:
        image: [B, D], float64, float32, bfloat16 or float16.
        text: [B, D]; `text[i]` belongs to `image[i]`, all others are its negatives. Same dtype and device.
        temperature: τ > 0, one over the scale; a number, or a tensor with one element, which then gets its
            gradient. The value of a tensor is not checked.
        reduction: "mean" over the pairs, their "sum", or "none" for one value per pair, [B].
        normalize: divide by the L2 norm first. With False, the similarity is the plain dot product.
        backend, process_group: as in `fused_info_nce`.

    Returns:
        A scalar, or [B] for "none"; float64 for float64 inputs, float32 for all others.
        A NaN in the input gives a NaN loss. A zero vector has similarity 0 and gradient 0.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.

    Equals: `fused_info_nce(..., symmetric=True)`; on normalised inputs, open_clip's `ClipLoss` at
    `logit_scale=1/τ`.
    """
    check_pair(("image", "text"), (image, text), "[B, D]", empty=process_group is not None)
    check_temperature(temperature)
    check_choice("reduction", reduction, Reduction)
    check_choice("backend", backend, Backend)
    pairs = [(image, text)]
    options: dict[str, Any] = {
        "weights": None if reduction == "none" else [1.0],
        "temperature": temperature,
        "symmetric": True,
        "normalize": normalize,
        "backend": backend,
    }
    if process_group is None:
        return contrast(pairs, divisor=len(image) if reduction == "mean" else 1, **options).value
    (rows,) = meet(process_group, image.device, len(image))
    divisor = rows.size if reduction == "mean" else 1
    share = contrast_across(rows, rows, pairs, divisor=divisor, **options).value
    return rows.shown(share, reduction)


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
        reduction, normalize, backend, process_group: as in `fused_clip`.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.
    """

    def __init__(
        self,
        scale: float = 1 / 0.07,
        *,
        max_scale: float = 100.0,
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
        super().__init__(
            None,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            process_group=process_group,
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.max_scale = max_scale

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """See `fused_clip`."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(self.max_scale))
        return fused_clip(image, text, temperature=(-self.logit_scale).exp(), **self.options)

    def extra_repr(self) -> str:
        return f"max_scale={self.max_scale}, {super().extra_repr()}"
