"""The paper's spatial transformations: uint8 clips in, views in [−1, 1] out, the whole batch at once.

One draw per clip, the same for all its frames: random crop, scale jitter, horizontal flip, colour jitter,
channel replication. Crop, resize and flip are one box, everything done to the colours is one 3×3 matrix and
the contrast: what is drawn here, `hdc_kernels.augment_clips` does in one pass.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hdc.errors import InputError
from hdc_kernels import augment_clips
from hdc_kernels.augment import LUMA


@dataclass(frozen=True)
class AugmentConfig:
    """Spatial augmentations of a clip.

    Attributes:
        crop_size: side of a view in pixels.
        random_crop: crop at a random place instead of the centre.
        scale_jitter: crop a random share of the short side (see `scales`), then resize to crop_size.
        scales: the shares that scale jitter chooses from.
        flip: mirror left and right with probability 0.5.
        color_jitter: random brightness, contrast, saturation and hue.
        color_jitter_probability: share of clips whose colours are jittered.
        brightness: factor drawn from [1 − x, 1 + x].
        contrast: factor drawn from [1 − x, 1 + x].
        saturation: factor drawn from [1 − x, 1 + x].
        hue: turn of the colour circle drawn from [−x, x] full turns.
        channel_replication: copy one random channel into all three.
        channel_replication_probability: share of clips that this happens to.
    """

    crop_size: int = 112
    random_crop: bool = True
    scale_jitter: bool = True
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    flip: bool = True
    color_jitter: bool = True
    color_jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    channel_replication: bool = True
    channel_replication_probability: float = 0.5

    def __post_init__(self) -> None:
        if self.crop_size < 1:
            raise InputError(f"crop_size is {self.crop_size}; it must be at least 1")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise InputError(f"scales is {self.scales}; each must be above 0 and at most 1")
        for name in ("color_jitter_probability", "channel_replication_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        for name, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(
                    f"{name} is {getattr(self, name)}; it must be between 0 and {most}"
                )

    def center_only(self) -> "AugmentConfig":
        """The same crop size with every transformation off: a plain centre crop."""
        return AugmentConfig(
            crop_size=self.crop_size,
            random_crop=False,
            scale_jitter=False,
            flip=False,
            color_jitter=False,
            channel_replication=False,
        )


def augment(clips: Tensor, config: AugmentConfig, generator: Generator) -> Tensor:
    """Draw one transformation per clip and apply it.

    Args:
        clips: uint8 [B, T, H, W, 3] on any device.
        config: what may happen to them.
        generator: a CPU generator; the draw is the same on every device.

    Returns:
        [B, 3, T, crop_size, crop_size] in [−1, 1], on the device of `clips`; float32, or autocast's dtype.
    """
    height, width = clips.shape[2:4]
    if config.crop_size > min(height, width):
        raise InputError(
            f"crop_size is {config.crop_size}, larger than the {height} × {width} frames; "
            "lower --augment.crop_size or raise --clips.size"
        )
    boxes = draw_boxes(len(clips), height, width, config, generator)
    return transform(clips, config.crop_size, boxes, *draw_colors(len(clips), config, generator))


def transform(
    clips: Tensor, crop_size: int, boxes: Tensor, matrix: Tensor, contrast: Tensor
) -> Tensor:
    """Apply what was drawn; under autocast, the views have its dtype, to which the encoder would round them."""
    kind = clips.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return augment_clips(clips, boxes, crop_size, matrix=matrix, contrast=contrast, dtype=dtype)


def center_square(clips: np.ndarray, size: int) -> np.ndarray:
    """The middle of every frame: [..., H, W, 3] -> [..., size, size, 3]."""
    top, left = (clips.shape[-3] - size) // 2, (clips.shape[-2] - size) // 2
    return clips[..., top : top + size, left : left + size, :]


def to_unit_range(clips: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [−1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


def draw_boxes(
    batch: int, height: int, width: int, config: AugmentConfig, generator: Generator
) -> Tensor:
    """One crop per clip, [B, 4]: left, top, width, height in pixels. A mirrored crop starts at its right
    edge and has a negative width."""
    short = min(height, width)
    if config.scale_jitter:
        choice = torch.randint(len(config.scales), (batch,), generator=generator)
        side = (torch.tensor(config.scales)[choice] * short).round()
    else:
        side = torch.full((batch,), float(config.crop_size))
    margin = torch.stack([width - side, height - side])
    left, top = (margin / 2).floor()
    if config.random_crop:
        place = torch.rand(2, batch, generator=generator) * (margin + 1)
        left, top = torch.minimum(place.floor(), margin)  # a product may round up to margin + 1
    mirrored = torch.zeros(batch, dtype=torch.bool)
    if config.flip:
        mirrored = torch.rand(batch, generator=generator) < 0.5
    return torch.stack(
        [
            torch.where(mirrored, left + side, left),
            top,
            torch.where(mirrored, -side, side),
            side,
        ],
        dim=1,
    )


@torch.autocast("cpu", enabled=False)  # it would round the matrices, where training runs on a CPU
def draw_colors(batch: int, config: AugmentConfig, generator: Generator) -> tuple[Tensor, Tensor]:
    """Per clip a 3×3 matrix on (R, G, B) and the contrast factor: [B, 3, 3], [B]."""
    luma = torch.tensor(LUMA)
    identity = torch.eye(3).expand(batch, 3, 3)
    matrix, contrast = identity, torch.ones(batch)
    if config.color_jitter:
        draw = torch.rand(4, batch, generator=generator) * 2 - 1
        jittered = torch.rand(batch, generator=generator) < config.color_jitter_probability
        draw = draw * jittered
        brightness = 1 + config.brightness * draw[0]
        contrast = 1 + config.contrast * draw[1]
        saturation = (1 + config.saturation * draw[2]).view(batch, 1, 1)
        saturate = saturation * identity + (1 - saturation) * luma.expand(3, 3)
        matrix = brightness.view(batch, 1, 1) * _rotate_hue(config.hue * draw[3]) @ saturate
    if config.channel_replication:
        channel = torch.randint(3, (batch,), generator=generator)
        replicated = torch.rand(batch, generator=generator) < config.channel_replication_probability
        replicate = F.one_hot(channel, 3).float().unsqueeze(1).expand(batch, 3, 3)
        matrix = torch.where(replicated.view(batch, 1, 1), replicate @ matrix, matrix)
    return matrix, contrast


def _rotate_hue(turns: Tensor) -> Tensor:
    """A rotation of the chroma plane of YIQ, as a matrix on RGB: [B] full turns -> [B, 3, 3]."""
    to_yiq = torch.tensor([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    angle = 2 * math.pi * turns
    rotation = torch.zeros(len(turns), 3, 3)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2] = -angle.sin()
    rotation[:, 2, 1] = angle.sin()
    return torch.linalg.inv(to_yiq) @ rotation @ to_yiq
