"""3D encoders: clips [B, 3, T, H, W] in [−1, 1] -> the feature maps of blocks 3, 4 and 5, by block number."""

from collections.abc import Callable
from typing import Literal, get_args

from hdc.backbones.backbone import Backbone
from hdc.backbones.c3d import C3D
from hdc.backbones.normalization import NormLayer, instance_norm
from hdc.backbones.r2plus1d import R2Plus1D10
from hdc.backbones.resnet3d import resnet3d_18, tiny
from hdc.errors import InputError

__all__ = ["Backbone", "BackboneName", "build_backbone"]

BackboneName = Literal["c3d", "resnet3d-18", "r2plus1d-10", "tiny"]

_BUILDERS: dict[str, Callable[[NormLayer], Backbone]] = {
    "c3d": C3D,
    "resnet3d-18": resnet3d_18,
    "r2plus1d-10": R2Plus1D10,
    "tiny": tiny,
}


def build_backbone(name: str, *, norm_eps: float = 1e-5, norm_affine: bool = True) -> Backbone:
    """A freshly initialised encoder.

    Raises:
        InputError: for a name that is not one of `BackboneName`.
    """
    if name not in _BUILDERS:
        allowed = ", ".join(get_args(BackboneName))
        raise InputError(f"backbone is {name!r}; it must be one of {allowed}")
    return _BUILDERS[name](instance_norm(norm_eps, norm_affine))
