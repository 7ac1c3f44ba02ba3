"""Training clips: a stateless sampler, a dataset that decodes, and the loader that joins them.

Nothing here has a state to save. Which videos are in step s, and which frames are cut from them, follows
from (seed, epoch, row) alone, so a resumed run sees what the uninterrupted one would have seen.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from hdc.data.crashes import Readers
from hdc.data.manifest import Manifest
from hdc.data.packed import find_pack
from hdc.data.video import Frames, VideoError, read_all, store_clips
from hdc.errors import InputError


@dataclass(frozen=True)
class ClipConfig:
    """Which frames make a clip.

    Attributes:
        frames: consecutive frames in a clip.
        size: length in pixels that the short side of a frame is resized to; training clips are random
            squares of that size.
        start_every: clips start at multiples of this many frames.
        short_videos: "error" refuses a manifest with videos shorter than a clip; "loop" repeats them.
    """

    frames: int = 16
    size: int = 128
    start_every: int = 1
    short_videos: Literal["error", "loop"] = "error"

    def __post_init__(self) -> None:
        for name in ("frames", "size", "start_every"):
            if getattr(self, name) < 1:
                raise InputError(f"clips.{name} is {getattr(self, name)}; it must be at least 1")


class Unreadable(NamedTuple):
    """A video that could not be decoded, and why."""

    path: str
    reason: str


class Batch(NamedTuple):
    """The readable clips of one step.

    clips: uint8 [V, B, T, size, size, 3]: V clips of each of B videos.
    labels: int64 [B].
    unreadable: what was left out.
    """

    clips: Tensor
    labels: Tensor
    unreadable: list[Unreadable]


class Key(NamedTuple):
    """Names one draw: the same key gives the same clips."""

    epoch: int
    row: int


class Batches(Sampler[list[Key]]):
    """The batches of a whole run, each epoch a permutation of the rows; the last, uneven batch is dropped.

    Of `ranks` processes each gets a part of every batch: the next rows in its order, as many as the
    others or one less.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        epochs: int,
        seed: int,
        first_step: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.first_step = first_step
        self.rank = rank
        self.ranks = ranks
        self.steps_per_epoch = rows // batch_size

    def __len__(self) -> int:
        return max(0, self.epochs * self.steps_per_epoch - self.first_step)

    def __iter__(self) -> Iterator[list[Key]]:
        first_epoch, skip = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.epochs):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
            for step in range(skip, self.steps_per_epoch):
                rows = order[step * self.batch_size : (step + 1) * self.batch_size]
                own = np.array_split(rows, self.ranks)[self.rank]
                yield [Key(epoch, int(row)) for row in own]
            skip = 0


class TrainingClips(Dataset[Batch]):
    """`views` clips from every row of a manifest, at random, each a random square of its frames.

    The clips of one row are different ones wherever the row has room for that. They are decoded straight
    into the batch, which lies in shared memory where a worker makes it: no copy is made on the way. Where the
    manifest is packed (`hdc.data.packed`), nothing is decoded.
    """

    def __init__(
        self, manifest: Manifest, labels: np.ndarray, config: ClipConfig, *, views: int, seed: int
    ) -> None:
        if config.short_videos == "error":
            manifest.check_length(config.frames)
        self.manifest = manifest
        self.labels = labels
        self.config = config
        self.views = views
        self.seed = seed
        self.readers = Readers(manifest, 0)
        self.packed = find_pack(manifest, config.size)

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, keys: Sequence[Key]) -> Batch:
        """The clips of these rows, in their order; a file that fails is named, not raised."""
        clips = _empty(self._shape(len(keys)))
        labels: list[int] = []
        unreadable: list[Unreadable] = []
        for key in keys:
            try:
                with self.readers.reading(key.row):
                    self._read(key, clips[:, len(labels)].numpy())
            except VideoError as error:
                unreadable.append(Unreadable(str(error.path), error.reason))
            else:
                labels.append(int(self.labels[key.row]))
        ids = torch.tensor(labels, dtype=torch.int64)
        return Batch(clips[:, : len(labels)], ids, unreadable)

    def black_clip(self) -> Batch:
        """A batch of one row that shows nothing, of class 0."""
        clips = torch.zeros(self._shape(1), dtype=torch.uint8)
        return Batch(clips, torch.zeros(1, dtype=torch.int64), [])

    def _shape(self, rows: int) -> tuple[int, ...]:
        return self.views, rows, self.config.frames, self.config.size, self.config.size, 3

    def _read(self, key: Key, clips: Frames) -> None:
        """Fill [views, T, size, size, 3]."""
        rng = np.random.default_rng((self.seed, *key))
        path = self.manifest.file(key.row)
        first, length = int(self.manifest.start[key.row]), int(self.manifest.frames[key.row])
        count, size = self.config.frames, self.config.size
        corners: list[tuple[int, int]] = []  # of the clips' squares

        def store(clip: int, number: int, image: np.ndarray) -> None:
            if clip == len(corners):
                top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
                corners.append((top, left))
            top, left = corners[clip]
            clips[clip, number] = image[top : top + size, left : left + size]

        packed = self.packed[key.row] if self.packed else None
        if length < count:
            video = read_all(path, size, first, length) if packed is None else packed
            for clip in range(self.views):
                for number, image in enumerate(loop(video, count)):
                    store(clip, number, image)
            return
        starts = self._starts(length, rng)
        if packed is None:
            store_clips(path, [first + start for start in starts], count, size, store)
        else:
            for clip, start in enumerate(starts):
                for number, image in enumerate(packed[start : start + count]):
                    store(clip, number, image)

    def _starts(self, length: int, rng: np.random.Generator) -> list[int]:
        """First frames of the clips, without repetition where there are enough to choose from."""
        choices = (length - self.config.frames) // self.config.start_every + 1
        drawn = rng.choice(choices, self.views, replace=choices < self.views)
        return [int(start) * self.config.start_every for start in drawn]


def _empty(shape: tuple[int, ...]) -> Tensor:
    """uint8; in a worker it lies in shared memory, or it would be copied there on its way out."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    # PyTorch's own collate function does it so. `share_memory_` would copy 200 MB of nothing (240 against 50 ms).
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def loop(frames: Frames, count: int) -> Frames:
    """Repeat the frames from the start until there are `count`."""
    return frames[np.arange(count) % len(frames)]


def training_loader(
    dataset: TrainingClips,
    *,
    batch_size: int,
    epochs: int,
    first_step: int,
    workers: int,
    pin_memory: bool,
    rank: int = 0,
    ranks: int = 1,
) -> DataLoader[Batch]:
    """Batches from `first_step` to the last step of the last epoch, in an order fixed by the dataset's seed.

    `batch_size` is that of all `ranks` processes together.
    """
    if batch_size > len(dataset):
        raise InputError(
            f"batch_size is {batch_size} but {dataset.manifest.source} has only {len(dataset)} "
            "training videos; lower --batch_size"
        )
    if batch_size < ranks:
        raise InputError(
            f"batch_size is {batch_size} but there are {ranks} processes; raise --batch_size, which is that "
            "of all processes together, or start fewer"
        )
    dataset.readers = Readers(dataset.manifest, workers)
    return DataLoader(
        dataset,
        batch_size=None,  # the dataset makes whole batches
        sampler=Batches(len(dataset), batch_size, epochs, dataset.seed, first_step, rank, ranks),
        num_workers=workers,
        pin_memory=pin_memory,
    )
