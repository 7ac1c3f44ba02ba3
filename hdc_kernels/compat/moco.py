"""MoCo v1 to v3, whose losses stand in their models: the lines to replace there, as functions.

In v1 and v2 (`moco/builder.py`), everything from "compute logits" on, with the criterion of `main_moco.py`:

    loss = moco_loss(q, k, self.queue.clone(), T=self.T)

In v3, `contrastive_loss` (or `ctr_loss`), called for both directions and added, as there. With a `process_group`,
value and gradients are those of the global batch: keys of other ranks are negatives, as there, but the value
is the mean over all ranks' queries, not this rank's alone.
"""

from torch import Tensor

from hdc_kernels.compat import times
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.info_nce import fused_info_nce
from hdc_kernels.moco import fused_moco


def moco_loss(q: Tensor, k: Tensor, queue: Tensor, T: float | Tensor = 0.07) -> Tensor:
    """`fused_moco`: q and k [N, C], already normalised, with the queue [C, K] of v1 and v2 -> the mean loss."""
    return fused_moco(q, k, queue.mT, temperature=T, normalize=False)


def contrastive_loss(
    q: Tensor,
    k: Tensor,
    T: float | Tensor = 1.0,
    *,
    process_group: ProcessGroups | None = None,
) -> Tensor:
    """`fused_info_nce` times 2T: q and k [N, C], not normalised yet -> the mean loss of v3."""
    return 2 * times(fused_info_nce(q, k, temperature=T, process_group=process_group), T)
