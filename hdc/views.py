"""The paper's spatial transformations: uint8 clips in, views in [−1, 1] out, the whole batch at once.

One draw per clip, the same for all its frames: random crop, scale jitter, horizontal flip, colour jitter,
channel replication. Crop, resize and flip are one bilinear sampling; everything done to the colours is
affine in (R, G, B), so it collapses into one 3×4 matrix per clip, together with the step to [−1, 1].
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hdc.errors import InputError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


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
        float32 [B, 3, T, crop_size, crop_size] in [−1, 1], on the device of `clips`.
    """
    height, width = clips.shape[2:4]
    if config.crop_size > min(height, width):
        raise InputError(
            f"crop_size is {config.crop_size}, larger than the {height} × {width} frames; "
            "lower --augment.crop_size or raise --clips.size"
        )
    boxes = draw_boxes(len(clips), height, width, config, generator)
    views = sample_boxes(clips, boxes.to(clips.device), config.crop_size)
    return recolor(views, *draw_colors(len(clips), config, generator))


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


def sample_boxes(clips: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop, mirror and resize, bilinear: uint8 [B, T, H, W, 3] -> float32 [B, 3, T, size, size]."""
    batch, frames, height, width, _ = clips.shape
    left, top, box_width, box_height = boxes.unbind(1)
    # theta maps output coordinates in [−1, 1] to input coordinates in [−1, 1], pixel edges at ±1.
    theta = torch.zeros(batch, 2, 3, device=clips.device)
    theta[:, 0, 0] = box_width / width
    theta[:, 1, 1] = box_height / height
    theta[:, 0, 2] = (2 * left + box_width) / width - 1
    theta[:, 1, 2] = (2 * top + box_height) / height - 1
    grid = F.affine_grid(theta, [batch, 1, size, size], align_corners=False)
    # Frames and colours share one grid, so they travel together as channels.
    planes = clips.permute(0, 4, 1, 2, 3).reshape(batch, 3 * frames, height, width).float()
    sampled = F.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return sampled.view(batch, 3, frames, size, size)


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


def recolor(views: Tensor, matrix: Tensor, contrast: Tensor) -> Tensor:
    """Apply the colour matrix, then the contrast about the clip's mean grey; [0, 255] -> [−1, 1]."""
    pixels = views.flatten(2)
    matrix, contrast = matrix.to(views.device), contrast.to(views.device).view(-1, 1, 1)
    # The mean grey of the recoloured clip is the recoloured mean, read through LUMA.
    mean = matrix @ pixels.mean(2, keepdim=True)
    grey = torch.tensor([LUMA], device=views.device) @ mean
    offset = (1 - contrast) * grey / 127.5 - 1
    recolored = torch.baddbmm(offset.expand(-1, 3, 1), contrast * matrix / 127.5, pixels)
    return recolored.clamp_(-1, 1).view_as(views)
