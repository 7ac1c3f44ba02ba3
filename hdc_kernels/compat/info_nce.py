"""info-nce-pytorch 0.1.4: `from hdc_kernels.compat.info_nce import InfoNCE, info_nce`."""

from typing import Literal

from torch import Tensor, nn

from hdc_kernels.checks import Reduction, check_choice, check_pair
from hdc_kernels.info_nce import fused_info_nce

NegativeMode = Literal["unpaired", "paired"]


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired",
) -> Tensor:
    """`fused_info_nce`; with `negative_keys`, the other positives are no negatives.

    Args:
        query, positive_key: [N, D].
        negative_keys: [M, D] with `negative_mode="unpaired"`, [N, M, D] with "paired". None: the other positives.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.
    """
    check_choice("negative_mode", negative_mode, NegativeMode)
    check_pair(("query", "positive_key"), (query, positive_key), "[N, D]")
    dimensions = 2 if negative_mode == "unpaired" else 3
    if negative_keys is not None and negative_keys.dim() != dimensions:
        raise ValueError(
            f"negative_keys has shape {list(negative_keys.shape)}; with negative_mode={negative_mode!r} "
            f"it must be {'[M, D]' if dimensions == 2 else '[N, M, D]'}"
        )
    return fused_info_nce(
        query,
        positive_key,
        temperature=temperature,
        negatives=negative_keys,
        in_batch=negative_keys is None,
        reduction=reduction,
    )


class InfoNCE(nn.Module):
    """`info_nce` as a module."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: Reduction = "mean",
        negative_mode: NegativeMode = "unpaired",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        """See `info_nce`."""
        return info_nce(
            query,
            positive_key,
            negative_keys,
            self.temperature,
            self.reduction,
            self.negative_mode,
        )
