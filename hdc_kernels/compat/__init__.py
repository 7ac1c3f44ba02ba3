"""The losses under their peers' own names, signatures and defaults: change the import, keep the call.

One module for each peer, named as the peer is imported; none needs the peer to be installed. Where a peer has
a bug, the adapter is right, and its docstring says how to get the peer's behaviour. A `temperature`, `scale` or
`logit_scale` may always be a tensor, and gets its gradient.

Where a peer gathers embeddings from all processes, so does its adapter: loss and gradients are then those of
`hdc_kernels.distributed`, whichever of the peer's options for it are set. Others take a `process_group`.
"""

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.checks import check_temperature

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def all_processes(gather: bool) -> "ProcessGroup | None":
    """The group of all, if they are to be gathered and there are several."""
    if not gather or not dist.is_available() or not dist.is_initialized():
        return None
    return dist.group.WORLD if dist.get_world_size() > 1 else None


def temperature_of(scale: float | Tensor, name: str = "scale") -> float | Tensor:
    """1 / scale, which is a positive finite number, or a floating tensor with one element."""
    check_temperature(scale, name)
    if isinstance(scale, Tensor):  # before it is divided by, in 16 bits perhaps
        return 1 / scale.to(reference.compute_dtype(scale.dtype))
    return 1 / float(scale)


def times(loss: Tensor, temperature: float | Tensor) -> Tensor:
    """Their product, of the loss's shape and dtype whatever a temperature tensor is."""
    if isinstance(temperature, Tensor):
        return loss * temperature.to(loss.dtype).reshape(())
    return loss * float(temperature)
