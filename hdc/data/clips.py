"""Training clips: a stateless sampler, a dataset that decodes, and the loader that joins them.

Nothing here has a state to save. Which videos are in step s, and which frames are cut from them, follows
from (seed, epoch, row) alone, so a resumed run sees what the uninterrupted one would have seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hdc.data.manifest import Manifest
from hdc.data.video import Frames, VideoError, read_all, read_clips
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


class TrainingClips(Dataset[tuple[Tensor, int] | Unreadable]):
    """`views` clips from every row of a manifest, at random, each a random square of its frames.

    The clips of one row are different ones wherever the row has room for that.
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

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | Unreadable:
        """uint8 [views, T, size, size, 3] and the label; a file that fails is named, not raised."""
        rng = np.random.default_rng((self.seed, *key))
        path = self.manifest.file(key.row)
        first, length = int(self.manifest.start[key.row]), int(self.manifest.frames[key.row])
        count, size = self.config.frames, self.config.size
        try:
            if length < count:
                whole = read_all(path, size, first, length)
                clips = [loop(whole, count)] * self.views
            else:
                starts = self._starts(length, rng)
                clips = read_clips(path, [first + start for start in starts], count, size)
        except VideoError as error:
            return Unreadable(str(error.path), error.reason)
        squares = np.stack([_random_square(clip, rng) for clip in clips])
        return torch.from_numpy(squares), int(self.labels[key.row])

    def black_clip(self) -> Batch:
        """A batch of one row that shows nothing, of class 0."""
        shape = (self.views, 1, self.config.frames, self.config.size, self.config.size, 3)
        return Batch(torch.zeros(shape, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), [])

    def _starts(self, length: int, rng: np.random.Generator) -> list[int]:
        """First frames of the clips, without repetition where there are enough to choose from."""
        choices = (length - self.config.frames) // self.config.start_every + 1
        drawn = rng.choice(choices, self.views, replace=choices < self.views)
        return [int(start) * self.config.start_every for start in drawn]


def loop(frames: Frames, count: int) -> Frames:
    """Repeat the frames from the start until there are `count`."""
    return frames[np.arange(count) % len(frames)]


def _random_square(clip: Frames, rng: np.random.Generator) -> Frames:
    height, width = clip.shape[1:3]
    side = min(height, width)
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    return clip[:, top : top + side, left : left + side]


def collate(samples: list[tuple[Tensor, int] | Unreadable]) -> Batch:
    """Stack what could be read; name what could not."""
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    if not readable:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), unreadable)
    clips = torch.stack([clip for clip, _ in readable], dim=1)
    return Batch(clips, torch.tensor([label for _, label in readable]), unreadable)


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
) -> DataLoader[tuple[Tensor, int] | Unreadable]:
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
    return DataLoader(
        dataset,
        batch_sampler=Batches(
            len(dataset), batch_size, epochs, dataset.seed, first_step, rank, ranks
        ),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
    )
