"""Decode a dataset once and for all; `packed.py` says what comes of it, and reads it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from hdc.data.clips import Unreadable
from hdc.data.crashes import items
from hdc.data.manifest import manifest_file, read_manifest
from hdc.data.packed import Pack, gigabytes
from hdc.data.video import Frames
from hdc.data.whole_videos import WholeVideos
from hdc.device import cores
from hdc.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How a dataset is packed.

    Attributes:
        short_side: of the frames, in pixels: what runs call --clips.size.
        workers: decoding processes; null takes one per core.
    """

    short_side: int = 128
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("short_side", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")


def pack(
    data: Path,
    config: PackConfig,
    announce: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pack:
    """Write the shards that are not there yet: killed at any moment, the same call goes on.

    Args:
        data: a manifest with widths and heights, or the folder of one.
        announce: is told how much will be written, and where, before anything is.
        progress: gets the number of rows done, and of all.

    Raises:
        InputError: the disk is too small, a video cannot be decoded, or the pack is of something else.
    """
    manifest = read_manifest(manifest_file(str(data)))
    target = Pack(manifest, config.short_side)
    shards = target.missing()
    if not shards:
        return target
    size = target.check_room(shards)
    announce(f"decoding {len(manifest)} videos into {target.folder}: {gigabytes(size)} to write")
    rows = np.flatnonzero(np.isin(target.layout.shard, shards)).tolist()
    workers = config.workers or cores()
    dataset = WholeVideos(manifest, config.short_side, workers, None)
    loader = DataLoader(dataset, batch_size=None, sampler=rows, num_workers=workers)
    done = len(manifest) - len(rows)

    def videos() -> Iterator[tuple[Path, Frames]]:
        nonlocal done
        with dataset.readers.name_crashes():
            for row, video in zip(rows, items(loader), strict=True):
                if isinstance(video, Unreadable):
                    raise InputError(f"{video.path}: {video.reason}; prepare it again")
                done += 1
                progress(done, len(manifest))
                yield manifest.file(row), np.asarray(video)

    with dataset.readers.name_crashes():
        target.write(shards, videos())
    return target
