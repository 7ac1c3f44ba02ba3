"""The smallest clips that an encoder takes: its poolings must leave something, its norms more than one value."""

from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache

import torch

from hdc.backbones import Backbone, build_backbone
from hdc.errors import InputError

FRAMES, SIZE = 16, 112  # what all encoders are made for; they take anything larger, too
MOST_FRAMES = 64  # no encoder wants more than this of a clip of any size


def check_clip_size(
    backbone: str, frames: int, size: int, *, option: str, least_map: int = 1
) -> None:
    """Find out, without computing anything, whether clips of `frames` × `size` × `size` go through an encoder.

    Args:
        backbone: its name.
        option: which one sets `size`.
        least_map: height and width that block 5's feature map must have.

    Raises:
        InputError: they do not; it says what would.
    """

    def fits(frames: int, size: int) -> bool:
        found = _last_map(backbone, frames, size)
        return found is not None and min(found[1:]) >= least_map

    if (frames >= FRAMES and size >= SIZE) or fits(frames, size):
        return
    longer = _least(MOST_FRAMES, lambda more: fits(more, size))
    larger = _least(SIZE, lambda more: fits(frames, more))
    enough = []
    if larger:
        enough.append(f"--{option} to at least {larger}")
    if longer:
        enough.append(f"--clips.frames to at least {longer}")
    if not enough:
        longer = _least(FRAMES, lambda more: fits(more, SIZE)) or FRAMES
        larger = _least(SIZE, lambda more: fits(longer, more))
        enough = [f"--clips.frames to at least {longer} and --{option} to at least {larger}"]
    raise InputError(
        f"clips.frames is {frames} and {option} {size}: too small for backbone {backbone}; "
        f"raise {', or '.join(enough)}"
    )


def _least(most: int, fits: Callable[[int], bool]) -> int | None:
    """The least number up to `most` that fits, where all that are larger do, too."""
    found = bisect_left(range(1, most + 1), True, key=fits) + 1
    return found if found <= most else None


@lru_cache
def _last_map(backbone: str, frames: int, size: int) -> tuple[int, ...] | None:
    """Length, height and width of block 5's feature map; None where a layer refuses its input."""
    with torch.device("meta"), torch.inference_mode():
        try:
            feature_map = _without_weights(backbone)(torch.empty(1, 3, frames, size, size))[5]
        except (RuntimeError, ValueError):  # poolings raise the one, norms the other
            return None
    return tuple(feature_map.shape[2:])


@lru_cache
def _without_weights(name: str) -> Backbone:
    with torch.device("meta"):
        return build_backbone(name)
