"""open_clip 3.3: `from hdc_kernels.compat.open_clip import ClipLoss, SigLipLoss`."""

from torch import Tensor, nn

from hdc_kernels import reference
from hdc_kernels.clip import fused_clip
from hdc_kernels.compat import refuse_distributed
from hdc_kernels.siglip import fused_siglip


class ClipLoss(nn.Module):
    """`fused_clip` of features that are normalised already, with a scale that is exponentiated already.

    Args:
        local_loss, gather_with_grad, rank, world_size, use_horovod: must be as in a single process. (With
            several, open_clip's own defaults give the features half their gradient, or a quarter with four.)
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
        refuse_distributed(
            local_loss=(local_loss, False),
            gather_with_grad=(gather_with_grad, False),
            rank=(rank, 0),
            world_size=(world_size, 1),
            use_horovod=(use_horovod, False),
        )

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
        if isinstance(logit_scale, Tensor):
            logit_scale = logit_scale.to(reference.compute_dtype(logit_scale.dtype))
        loss = fused_clip(
            image_features, text_features, temperature=1 / logit_scale, normalize=False
        )
        if isinstance(logit_bias, Tensor):  # a parameter without any gradient would stop DDP
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """`fused_siglip` of features that are normalised already, with a scale that is exponentiated already.

    Args:
        rank, world_size: must be as in a single process.
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
        refuse_distributed(rank=(rank, 0), world_size=(world_size, 1))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The sum over all pairs of [B, D] twice over B, as {"contrastive_loss": loss} with `output_dict`."""
        if isinstance(logit_scale, Tensor):
            logit_scale = logit_scale.to(reference.compute_dtype(logit_scale.dtype))
        loss = fused_siglip(
            image_features,
            text_features,
            temperature=1 / logit_scale,
            bias=0.0 if logit_bias is None else logit_bias,
            normalize=False,
        )
        return {"contrastive_loss": loss} if output_dict else loss
