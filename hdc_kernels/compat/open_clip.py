"""open_clip 3.3: `from hdc_kernels.compat.open_clip import ClipLoss, SigLipLoss`."""

from torch import Tensor, nn

from hdc_kernels.clip import fused_clip
from hdc_kernels.compat import all_processes, temperature_of
from hdc_kernels.siglip import fused_siglip


class ClipLoss(nn.Module):
    """`fused_clip` of features that are normalised already, with a scale that is exponentiated already.

    Args:
        rank, world_size: those of `torch.distributed`, whose processes' batches are then one.
        local_loss, gather_with_grad: have no effect: value and gradients are always those of the global batch, in
            time and memory those of a local loss. open_clip's gradients are the same with `gather_with_grad`;
            without it, two processes get half of the features' gradient, and with `local_loss` a wrong one.
        use_horovod: must be False.
        cache_labels: has no effect, there are no labels.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod is True; only torch.distributed is supported")
        _check_processes(rank, world_size)
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The mean loss of [B, D] twice, as {"contrastive_loss": loss} with `output_dict`.

        A bias of all logits leaves a softmax as it is: its gradient is 0.
        """
        loss = fused_clip(
            image_features,
            text_features,
            temperature=temperature_of(logit_scale, "logit_scale"),
            normalize=False,
            process_group=all_processes(self.world_size > 1),
        )
        if isinstance(logit_bias, Tensor):  # a parameter without any gradient would stop DDP
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """`fused_siglip` of features that are normalised already, with a scale that is exponentiated already.

    Args:
        rank, world_size: those of `torch.distributed`, whose processes' batches are then one.
        cache_labels, dist_impl: have no effect.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__()
        _check_processes(rank, world_size)
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The sum over all pairs of [B, D] twice over B, as {"contrastive_loss": loss} with `output_dict`."""
        loss = fused_siglip(
            image_features,
            text_features,
            temperature=temperature_of(logit_scale, "logit_scale"),
            bias=0.0 if logit_bias is None else logit_bias,
            normalize=False,
            process_group=all_processes(self.world_size > 1),
        )
        return {"contrastive_loss": loss} if output_dict else loss


def _check_processes(rank: int, world_size: int) -> None:
    group = all_processes(world_size > 1)
    found = (1, 0) if group is None else (group.size(), group.rank())
    if (world_size, rank) != found:
        raise ValueError(
            f"world_size is {world_size} and rank {rank}; they must be those of torch.distributed, "
            f"{found[0]} and {found[1]}"
        )
