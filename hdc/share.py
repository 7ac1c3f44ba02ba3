"""One rank's part of a global batch: what is drawn for a clip follows from its row, whoever computes it."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Generator, Tensor

from hdc import views
from hdc.views import AugmentConfig


@dataclass(frozen=True)
class Share:
    """`count` rows from `first` on, of the `total` rows of a batch that `ranks` processes share."""

    first: int
    count: int
    total: int
    ranks: int

    @classmethod
    def of(cls, counts: list[int], rank: int) -> "Share":
        """The share of `rank`, when rank r has `counts[r]` rows and they follow one another."""
        return cls(sum(counts[:rank]), counts[rank], sum(counts), len(counts))

    def pick(self, drawn: Tensor, rows: int) -> Tensor:
        """What belongs to this share's `rows` clips, out of one entry per row of the batch."""
        # A share without rows computes one clip all the same (see `hdc.training`), with anybody's draw.
        first = self.first if self.count else 0
        return drawn[first : first + rows]

    @property
    def weight(self) -> float:
        """Times a mean over this share: then the mean over the ranks is the mean over the batch."""
        return self.count * self.ranks / self.total

    def weigh(self, value: Tensor) -> Tensor:
        """A value to log times `weight`; 0 for a share without rows, whatever their mean is."""
        return value * self.weight if self.count else value.new_zeros(())


def augment(clips: Tensor, config: AugmentConfig, generator: Generator, share: Share) -> Tensor:
    """`hdc.views.augment` for this share's clips, with the draws they get in the whole batch."""
    if share.ranks == 1:
        return views.augment(clips, config, generator)
    height, width = clips.shape[2:4]
    boxes = views.draw_boxes(share.total, height, width, config, generator)
    colors = views.draw_colors(share.total, config, generator)
    drawn = (share.pick(each, len(clips)) for each in (boxes, *colors))
    return views.transform(clips, config.crop_size, *drawn)


def dropout(features: Tensor, probability: float, share: Share) -> Tensor:
    """Dropout of [count, D] with this share's rows of the mask of the whole batch."""
    if share.ranks == 1:
        return F.dropout(features, probability)
    mask = F.dropout(features.new_ones(share.total, *features.shape[1:]), probability)
    return features * share.pick(mask, len(features))
