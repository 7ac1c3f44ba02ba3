"""The loop that loading.py compares with: one process, one clip after the other, one operation after the other.

Two clips a video and three views, as `hdc.pretrain` takes them: o and s of the first clip, t of the second.
What happens to the pixels is what `hdc.views` does to them, in the steps of a textbook. Of torchcodec and
kornia each replaces one part of it.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdc.data.manifest import Manifest
from hdc.views import AugmentConfig
from hdc_kernels.augment import LUMA

FRAMES, SHORT_SIDE = 16, 128
Decode = Callable[[Path, int], Tensor]  # (file, first frame) -> uint8 [16, H, W, 3]
Augment = Callable[
    [Tensor], Tensor
]  # float [3, 16, 128, 128] in [0, 1] -> [3, 16, 112, 112] in [−1, 1]


def run(manifest: Manifest, decode: Decode, augment: Augment | None) -> Iterator[int]:
    """Over all videos again and again; a 1 for each video that is done. Without `augment` it only decodes."""
    rng = np.random.default_rng(0)
    while True:
        for row in range(len(manifest)):
            starts = rng.choice(int(manifest.frames[row]) - FRAMES + 1, 2, replace=False)
            clips = [decode(manifest.file(row), int(start)) for start in starts]
            if augment:
                first, second = (random_square(clip, rng) for clip in clips)
                for clip in (first, first, second):
                    augment(clip)
            yield 1


def decode_with_pyav(path: Path, first: int) -> Tensor:
    """Open, seek, decode."""
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate, unit = stream.average_rate, stream.time_base
        assert rate
        assert unit
        container.seek(round(first / rate / unit), stream=stream)
        for frame in container.decode(stream):
            assert frame.pts is not None
            if round(frame.pts * unit * rate) >= first:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == FRAMES:
                break
    return torch.from_numpy(np.stack(frames))


def torchcodec() -> Decode:
    """Decoding by torchcodec; raises ImportError or RuntimeError where it is not at hand."""
    from torchcodec.decoders import VideoDecoder

    def decode(path: Path, first: int) -> Tensor:
        decoder = VideoDecoder(str(path), dimension_order="NHWC")
        return decoder.get_frames_in_range(first, first + FRAMES).data

    return decode


def random_square(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """uint8 [16, H, W, 3] -> float [3, 16, 128, 128] in [0, 1]."""
    images = frames.permute(0, 3, 1, 2).float() / 255
    height, width = images.shape[2:]
    if min(height, width) != SHORT_SIDE:
        scale = SHORT_SIDE / min(height, width)
        size = [round(height * scale), round(width * scale)]
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
    top, left = (rng.integers(side - SHORT_SIDE + 1) for side in images.shape[2:])
    return images[:, :, top : top + SHORT_SIDE, left : left + SHORT_SIDE].transpose(0, 1)


def augment_with_torch(clip: Tensor, config: AugmentConfig | None = None) -> Tensor:
    """Crop, resize, flip, brightness, saturation, hue, contrast, channel replication, [−1, 1]."""
    config = config or AugmentConfig()
    side = config.crop_size
    if config.scale_jitter:
        side = round(config.scales[int(torch.randint(len(config.scales), ()))] * clip.shape[2])
    top = left = (clip.shape[2] - side) // 2
    if config.random_crop:
        top, left = torch.randint(clip.shape[2] - side + 1, (2,)).tolist()
    view = clip[:, :, top : top + side, left : left + side]
    size = [config.crop_size, config.crop_size]
    view = F.interpolate(view, size, mode="bilinear", align_corners=False)
    if config.flip and torch.rand(()) < 0.5:
        view = view.flip(3)
    if config.color_jitter and torch.rand(()) < config.color_jitter_probability:
        brightness, contrast, saturation, hue = (torch.rand(4) * 2 - 1).tolist()
        view = view * (1 + config.brightness * brightness)
        view = view + config.saturation * saturation * (view - grey(view))
        view = turn_hue(view, config.hue * hue)
        view = view + config.contrast * contrast * (view - grey(view).mean())
    if config.channel_replication and torch.rand(()) < config.channel_replication_probability:
        channel = int(torch.randint(3, ()))
        view = view[channel : channel + 1].expand(3, -1, -1, -1)
    return (2 * view - 1).clamp(-1, 1)


def grey(view: Tensor) -> Tensor:
    """[3, ...] -> [1, ...]."""
    return sum(weight * view[i : i + 1] for i, weight in enumerate(LUMA))  # type: ignore[return-value]


def turn_hue(view: Tensor, turns: float) -> Tensor:
    """Turn the chroma plane of YIQ, which takes fewer operations than the way through HSV."""
    red, green, blue = view
    y = grey(view)[0]
    i, q = (
        0.596 * red - 0.274 * green - 0.322 * blue,
        0.211 * red - 0.523 * green + 0.312 * blue,
    )
    sine, cosine = math.sin(2 * math.pi * turns), math.cos(2 * math.pi * turns)
    i, q = cosine * i - sine * q, sine * i + cosine * q
    return torch.stack(
        [y + 0.956 * i + 0.621 * q, y - 0.272 * i - 0.647 * q, y - 1.106 * i + 1.703 * q]
    )


def kornia() -> Augment:
    """Augmentation by kornia, which has everything but channel replication; raises ImportError without it."""
    import kornia.augmentation as K

    config = AugmentConfig()
    size = (config.crop_size, config.crop_size)
    transform = K.VideoSequential(
        K.RandomResizedCrop(size, scale=(min(config.scales) ** 2, 1.0), ratio=(1.0, 1.0), p=1.0),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(
            config.brightness,
            config.contrast,
            config.saturation,
            config.hue,
            p=config.color_jitter_probability,
        ),
        data_format="BCTHW",
        same_on_frame=True,
    )
    left = AugmentConfig(scale_jitter=False, random_crop=False, flip=False, color_jitter=False)
    return lambda clip: augment_with_torch(transform(clip[None])[0], left)
