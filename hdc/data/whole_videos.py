"""Whole videos, for evaluation and for packing: every frame of a row, decoded from the first one on."""

import numpy as np
from torch.utils.data import Dataset

from hdc.data.clips import Unreadable
from hdc.data.crashes import Readers
from hdc.data.manifest import Manifest
from hdc.data.packed import PackedRows
from hdc.data.video import Frames, VideoError, read_all


class WholeVideos(Dataset[Frames | Unreadable]):
    """uint8 [frames, H, W, 3] of every row, with a short side of `short_side`; out of a pack if there is one."""

    def __init__(
        self, manifest: Manifest, short_side: int, workers: int, packed: PackedRows | None
    ) -> None:
        self.manifest = manifest
        self.short_side = short_side
        self.readers = Readers(manifest, workers)
        self.packed = packed

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, row: int) -> Frames | Unreadable:
        """A file that fails is named, not raised."""
        if self.packed:
            return np.array(self.packed[row])
        first, count = int(self.manifest.start[row]), int(self.manifest.frames[row])
        try:
            with self.readers.reading(row):
                return read_all(self.manifest.file(row), self.short_side, first, count)
        except VideoError as error:
            return Unreadable(str(error.path), error.reason)
