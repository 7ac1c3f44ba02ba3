"""Frozen features: one vector per row of a manifest, for retrieval and for the linear probe."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from hdc import checkpoint, distributed
from hdc.backbones import Backbone, build_backbone
from hdc.backbones.clip_size import check_clip_size
from hdc.config import CommandConfig, FeatureConfig
from hdc.data.clips import Unreadable, loop
from hdc.data.crashes import items
from hdc.data.manifest import Manifest, Part
from hdc.data.packed import find_pack
from hdc.data.video import Frames
from hdc.data.whole_videos import WholeVideos
from hdc.device import decoding_workers, pick_device
from hdc.errors import InputError
from hdc.progress import ProgressBar, warn
from hdc.provenance import check_encoder, check_split
from hdc.views import center_square, to_unit_range

POOL = 2  # of "max" pooling, in height and width
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


def load_encoder(config: CommandConfig, path: str | None, manifest: Manifest) -> Backbone:
    """The encoder of a checkpoint, or a randomly initialised one, ready to look at clips of `manifest`.

    Raises:
        InputError: the checkpoint is of another encoder, or was finetuned on another split of `manifest`.
    """
    torch.manual_seed(config.seed)
    backbone = build_backbone(
        config.backbone, norm_eps=config.norm_eps, norm_affine=config.norm_affine
    )
    if path is not None:
        state = checkpoint.load_backbone_weights(backbone, config.backbone, Path(path))
        check_encoder(config, state, path)
        check_split(config, state, path, manifest)
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


@contextmanager
def readable_videos(
    manifest: Manifest,
    rows: Sequence[int],
    config: CommandConfig,
    name: str,
    unreadable: dict[int, Unreadable],
) -> Iterator[Iterator[tuple[int, Frames]]]:
    """(row, frames) of those of `rows` that can be decoded, with a progress bar; `unreadable` gets the rest.

    Raises:
        InputError: a video is missing, or a decoding process died.
    """
    manifest.check_files()
    if config.clips.short_videos == "error":
        manifest.check_length(config.clips.frames)
    workers, size = decoding_workers(config), config.clips.size
    dataset = WholeVideos(manifest, size, workers, find_pack(manifest, size))
    loader = DataLoader(dataset, batch_size=None, sampler=rows, num_workers=workers)

    def videos() -> Iterator[tuple[int, Frames]]:
        for row, video in zip(rows, items(loader), strict=True):
            if isinstance(video, Unreadable):
                warn(f"skipped {video.path}: {video.reason}")
                unreadable[row] = video
            else:
                yield row, np.asarray(video)
            bar.advance()

    with ProgressBar(name, len(rows)) as bar, dataset.readers.name_crashes():
        yield videos()


def merge_unreadable(own: dict[int, Unreadable], rows: int) -> list[Unreadable]:
    """The unreadable ones among all `rows`, in their order, from what each rank found.

    Raises:
        InputError: when they are all of them.
    """
    found: dict[int, Unreadable] = {}
    for part in distributed.gather(own):
        found |= part
    for row in sorted(found.keys() - own.keys()):
        warn(f"skipped {found[row].path}: {found[row].reason}")
    entries = [found[row] for row in sorted(found)]
    if len(entries) == rows:
        raise InputError(f"no video can be decoded, e.g. {entries[0].path}: {entries[0].reason}")
    if entries:
        warn(f"{len(entries)} of {rows} videos could not be read and were left out")
    return entries


def own_rows(clips: Sequence[int], at_once: int) -> list[int]:
    """The rows that are this rank's, of `len(clips)` rows with so many clips each.

    Rows that are computed together, until there are `at_once` clips, stay together: the last bit of a
    feature depends on what it shares a batch with. The ranks take turns, so that they end together.
    """
    batches: list[list[int]] = [[]]
    for row in range(len(clips)):
        if sum(clips[other] for other in batches[-1]) >= at_once:
            batches.append([])
        batches[-1].append(row)
    own = batches[distributed.rank() :: distributed.world()]
    return [row for batch in own for row in batch]


@torch.inference_mode()
def extract(config: FeatureConfig, backbone: Backbone, manifest: Manifest, part: Part) -> Features:
    """The mean over clips of each video's pooled block-5 features.

    Several processes share the videos, and each of them gets all the features.
    Clips are centre crops at `clip_starts`; "max" pooling is 2 × 2 over space, flattened (9,216 values
    for C3D and R(2+1)D-10, 2,048 for 3D-ResNet18 at 112 × 112), "average" is global (one per channel).
    """
    check_clip_size(
        config.backbone,
        config.clips.frames,
        config.crop_size,
        option="crop_size",
        least_map=POOL if config.pooling == "max" else 1,
    )
    rows = manifest.rows(part, config.split)
    device = next(backbone.parameters()).device
    lengths = rows.frames.tolist()
    frames, count = config.clips.frames, config.clips_per_video
    own = own_rows([len(clip_starts(n, frames, count)) for n in lengths], CLIPS_AT_ONCE)
    pooled: list[Tensor] = []  # per video [clips, D]
    kept: list[int] = []
    unreadable: dict[int, Unreadable] = {}

    def encode(videos: list[Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            feature_map = backbone(to_unit_range(torch.cat(videos).to(device)))[5]
        vectors = _pool(feature_map.float(), config.pooling).cpu()
        pooled.extend(vectors.split([len(video) for video in videos]))

    waiting: list[Tensor] = []
    name = f"features of {part} videos"
    with readable_videos(rows, own, config, name, unreadable) as videos:
        for row, video in videos:
            starts = clip_starts(len(video), frames, count)
            clips = np.stack([cut(video, start, frames) for start in starts])
            waiting.append(torch.from_numpy(center_square(clips, config.crop_size)))
            kept.append(row)
            if sum(map(len, waiting)) >= CLIPS_AT_ONCE:
                encode(waiting)
                waiting.clear()
    if waiting:
        encode(waiting)
    entries = merge_unreadable(unreadable, len(rows))
    vectors = [clips.mean(0) for clips in pooled]
    parts = distributed.gather((kept, torch.stack(vectors) if vectors else None))
    found = np.array([row for numbers, _ in parts for row in numbers])
    order = np.argsort(found)
    gathered = torch.cat([part for _, part in parts if part is not None])
    return Features(gathered[torch.from_numpy(order)], rows.take(found[order]), entries)


def _pool(feature_map: Tensor, pooling: str) -> Tensor:
    """[clips, C, t, h, w] -> [clips, D]."""
    if pooling == "average":
        return feature_map.mean((2, 3, 4))
    return F.max_pool3d(feature_map, (1, POOL, POOL)).flatten(1)
