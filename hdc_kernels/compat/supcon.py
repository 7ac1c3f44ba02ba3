"""SupContrast, the code of Khosla et al. 2020: `from hdc_kernels.compat.supcon import SupConLoss`."""

from typing import Literal

import torch
from torch import Tensor, nn

from hdc_kernels.checks import check_choice, check_temperature
from hdc_kernels.compat import times
from hdc_kernels.distributed.ranks import ProcessGroups, check_process_group
from hdc_kernels.distributed.rows import meet
from hdc_kernels.positives import divide
from hdc_kernels.sup_con import fused_sup_con

ContrastMode = Literal["all", "one"]


class SupConLoss(nn.Module):
    """`fused_sup_con` with "out" of several views, which are normalised already, times T/T_base.

    Args:
        temperature: T.
        contrast_mode: "all" views are anchors, or only the first "one".
        base_temperature: T_base.
        process_group: as in `fused_sup_con`; the peer's loss has none. A `mask` is of this rank's images; those
            of other ranks are no positives.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: ContrastMode = "all",
        base_temperature: float | Tensor = 0.07,
        *,
        process_group: ProcessGroups | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_choice("contrast_mode", contrast_mode, ContrastMode)
        check_temperature(base_temperature, "base_temperature")
        check_process_group(process_group)
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.process_group = process_group

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The mean over all anchors, of which those without a positive count as 0; no dimension.

        Args:
            features: [B, V, ...], V views of B images, normalised; further dimensions are flattened.
            labels: [B] or [B, 1], any integers: the positives of a view are the other views of all images
                with its label. Without labels and mask they are the other views of its own image.
            mask: [B, B] of 0 and 1 instead of labels, whether image j is a positive of image i. Takes
                memory for every pair of views that it marks.

        Raises:
            TypeError, ValueError: naming the argument, what was given, and what is allowed.
        """
        if not isinstance(features, Tensor):
            raise TypeError(
                f"features is a {type(features).__name__}; it must be a tensor [B, V, ...]"
            )
        if features.dim() < 3:
            raise ValueError(f"features has shape {list(features.shape)}; it must be [B, V, ...]")
        if labels is not None and mask is not None:
            raise ValueError("labels and mask are both given; give one at most")
        images, views = features.shape[:2]
        columns = torch.cat(features.flatten(2).unbind(1))  # image i's view v is row v·B + i
        anchors = columns if self.contrast_mode == "all" else columns[:images]
        positives = None
        if mask is not None:
            mask = mask.to(features.device)
            positives = _pairs(mask, images, 1 if anchors is not columns else views, views)
        else:
            labels = self._numbers(features) if labels is None else labels.flatten()
            if len(labels) != images:
                raise ValueError(f"labels has {len(labels)} entries; features need {images}")
            labels = labels.to(features.device).repeat(views)
        loss = fused_sup_con(
            anchors,
            None if labels is None else labels[: len(anchors)],
            positives=positives,
            other_labels=labels,
            other=columns,
            other_holds_self=True,
            temperature=self.temperature,
            without_positive="zero",
            normalize=False,
            process_group=self.process_group,
        )
        return divide(times(loss, self.temperature), self.base_temperature)

    def _numbers(self, features: Tensor) -> Tensor:
        """A label for each image of its own, on all ranks."""
        images, device = len(features), features.device
        if self.process_group is None:
            return torch.arange(images, device=device)
        return meet(self.process_group, device, images)[0].numbers(device)[:images]

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, contrast_mode={self.contrast_mode!r}, "
            f"base_temperature={self.base_temperature}"
        )


def _pairs(mask: Tensor, images: int, anchor_views: int, views: int) -> Tensor:
    """The mask of images as pairs (anchor, positive) of views, [2, E]."""
    if mask.shape != (images, images):
        raise ValueError(f"mask has shape {list(mask.shape)}; it must be [{images}, {images}]")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask holds something else than 0 and 1")
    image, positive = mask.nonzero().mT
    first = torch.arange(anchor_views, device=mask.device).view(-1, 1, 1) * images
    second = torch.arange(views, device=mask.device).view(-1, 1) * images
    pairs = torch.broadcast_tensors(first + image, second + positive)
    every = torch.stack([side.flatten() for side in pairs])
    return every[:, every[0] != every[1]]
