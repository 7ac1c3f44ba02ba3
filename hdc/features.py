"""Frozen features: one vector per row of a manifest, for retrieval and for the linear probe."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hdc import checkpoint
from hdc.backbones import Backbone, build_backbone
from hdc.config import CommandConfig, FeatureConfig
from hdc.data.clips import ClipConfig, Unreadable, loop
from hdc.data.manifest import Manifest, Part
from hdc.data.video import Frames, VideoError, read_all
from hdc.device import decoding_workers, pick_device
from hdc.errors import InputError
from hdc.progress import ProgressBar, warn
from hdc.views import center_square, to_unit_range

CLIPS_AT_ONCE = 32  # through the encoder; short videos share a batch


@dataclass(frozen=True)
class Features:
    """The features of the readable rows of one part of a split.

    vectors: float32 [rows, D].
    manifest: those rows, in the same order.
    unreadable: the rows that are missing from both.
    """

    vectors: Tensor
    manifest: Manifest
    unreadable: list[Unreadable]


def load_encoder(config: CommandConfig, path: str | None) -> Backbone:
    """The encoder of a checkpoint, or a randomly initialised one, ready to look at clips."""
    torch.manual_seed(config.seed)
    backbone = build_backbone(
        config.backbone, norm_eps=config.norm_eps, norm_affine=config.norm_affine
    )
    if path is not None:
        checkpoint.load_backbone_weights(backbone, config.backbone, Path(path))
    return backbone.to(pick_device(config)).eval()


def clip_starts(frames: int, clip_frames: int, clips: int) -> list[int]:
    """First frames of clips whose centres are spread evenly, as in VCOP; in a short video some coincide.

    A video no longer than a clip has a single start, 0.
    """
    if frames <= clip_frames:
        return [0]
    half = clip_frames // 2
    centres = np.linspace(half, frames - (clip_frames - half), clips)
    return [int(centre) - half for centre in centres]


def cut(frames: Frames, start: int, clip_frames: int) -> Frames:
    """`clip_frames` frames from `start`; where the video ends before, it starts over."""
    return (
        loop(frames[start:], clip_frames)
        if len(frames) - start < clip_frames
        else frames[start : start + clip_frames]
    )


class WholeVideos(Dataset[Frames | Unreadable]):
    """Every frame of every row, decoded from the first one on: uint8 [frames, H, W, 3]."""

    def __init__(self, manifest: Manifest, config: ClipConfig) -> None:
        if config.short_videos == "error":
            manifest.check_length(config.frames)
        self.manifest = manifest
        self.config = config

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, row: int) -> Frames | Unreadable:
        first, count = int(self.manifest.start[row]), int(self.manifest.frames[row])
        try:
            return read_all(self.manifest.file(row), self.config.size, first, count)
        except VideoError as error:
            return Unreadable(str(error.path), error.reason)


def readable_videos(
    manifest: Manifest, config: CommandConfig, name: str, unreadable: list[Unreadable]
) -> Iterator[tuple[int, Frames]]:
    """(row, frames) of what can be decoded, with a progress bar; the rest is appended to `unreadable`."""
    manifest.check_files()
    dataset = WholeVideos(manifest, config.clips)
    loader = DataLoader(dataset, batch_size=None, num_workers=decoding_workers(config))
    with ProgressBar(name, len(dataset)) as bar:
        for row, video in enumerate(loader):
            if isinstance(video, Unreadable):
                warn(f"skipped {video.path}: {video.reason}")
                unreadable.append(video)
            else:
                yield row, np.asarray(video)
            bar.advance()
    if len(unreadable) == len(dataset):
        raise InputError(
            f"no video can be decoded, e.g. {unreadable[0].path}: {unreadable[0].reason}"
        )


@torch.inference_mode()
def extract(config: FeatureConfig, backbone: Backbone, manifest: Manifest, part: Part) -> Features:
    """The mean over clips of each video's pooled block-5 features.

    Clips are centre crops at `clip_starts`; "max" pooling is 2 × 2 over space, flattened (9,216 values
    for C3D and R(2+1)D-10, 2,048 for 3D-ResNet18 at 112 × 112), "average" is global (one per channel).
    """
    rows = manifest.rows(part, config.split)
    device = next(backbone.parameters()).device
    pooled: list[Tensor] = []  # per video [clips, D]
    kept: list[int] = []
    unreadable: list[Unreadable] = []

    def encode(videos: list[Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            feature_map = backbone(to_unit_range(torch.cat(videos).to(device)))[5]
        vectors = _pool(feature_map.float(), config.pooling).cpu()
        pooled.extend(vectors.split([len(video) for video in videos]))

    waiting: list[Tensor] = []
    for row, video in readable_videos(rows, config, f"features of {part} videos", unreadable):
        starts = clip_starts(len(video), config.clips.frames, config.clips_per_video)
        clips = np.stack([cut(video, start, config.clips.frames) for start in starts])
        waiting.append(torch.from_numpy(center_square(clips, config.crop_size)))
        kept.append(row)
        if sum(map(len, waiting)) >= CLIPS_AT_ONCE:
            encode(waiting)
            waiting.clear()
    if waiting:
        encode(waiting)
    vectors = torch.stack([clips.mean(0) for clips in pooled])
    return Features(vectors, rows.take(np.array(kept)), unreadable)


def _pool(feature_map: Tensor, pooling: str) -> Tensor:
    """[clips, C, t, h, w] -> [clips, D]."""
    if pooling == "average":
        return feature_map.mean((2, 3, 4))
    return F.max_pool3d(feature_map, (1, 2, 2)).flatten(1)
