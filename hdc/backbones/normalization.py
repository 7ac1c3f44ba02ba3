"""Instance normalisation, which the paper puts in the place of batch normalisation.

Batch statistics would let the encoder recognise which clips share a batch, and so cheat.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

NormLayer = Callable[[int], nn.Module]


def instance_norm(eps: float = 1e-5, affine: bool = True) -> NormLayer:
    """A factory of InstanceNorm3d layers. `affine` adds a learned scale and shift per channel.

    PyTorch's own default is `affine=False`; Keras implementations use `eps=1e-3`.
    """
    return partial(nn.InstanceNorm3d, eps=eps, affine=affine)
