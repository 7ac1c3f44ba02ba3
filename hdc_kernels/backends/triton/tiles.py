"""How large the blocks of a launch are: a table by depth and dtype, and how many blocks fill a device.

There is no autotuning: it would time kernels in the middle of training, and two runs could differ. None
of these choices has been timed; they are the largest that neither spill registers nor exceed the
shared memory of an A100 (163 KB), which `tests/test_triton_compile.py` holds them to.
"""

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]

ALL_AT_ONCE = 256  # dimensions that a block keeps on the chip; beyond, it reads them in chunks


class Tiles(NamedTuple):
    """The launch of one kernel: a block of `own` vectors by blocks of `other` ones."""

    depth: int  # dimensions in one chunk
    own: int
    other: int
    warps: int
    stages: int
    width: int = 0  # of a gradient's block, in dimensions


def padded_dimensions(dimensions: int) -> int:
    """How many dimensions packed vectors have."""
    if dimensions <= ALL_AT_ONCE:
        return max(16, triton.next_power_of_2(dimensions))
    return triton.cdiv(dimensions, ALL_AT_ONCE) * ALL_AT_ONCE


def forward_tiles(dimensions: int, dtype: torch.dtype, precision: str) -> Tiles:
    """For `logsumexp_kernel`."""
    depth = padded_dimensions(dimensions)
    if dtype == torch.float32:
        if depth <= 64:
            return Tiles(depth, 64, 64, 4, 2)
        return Tiles(depth if depth <= ALL_AT_ONCE else 64, 64, 32, 4, 2)
    if depth <= 64:
        return Tiles(depth, 128, 128, 8, 3)
    if depth <= 128:
        return Tiles(depth, 128, 128, 8, 3)
    if depth <= ALL_AT_ONCE:
        return Tiles(depth, 128, 64, 8, 3)
    return Tiles(64, 128, 128, 8, 3)


def gradient_tiles(dimensions: int, dtype: torch.dtype, precision: str) -> Tiles:
    """For `gradient_kernel`."""
    depth = padded_dimensions(dimensions)
    if dtype == torch.float32:
        if depth <= ALL_AT_ONCE:
            return Tiles(depth, 64, 32, 8, 2, depth)
        return Tiles(64, 64, 32, 8, 2, 256)
    if depth <= 128:
        return Tiles(depth, 128, 64, 8, 3, depth)
    if depth <= ALL_AT_ONCE:
        return Tiles(depth, 128, 32, 8, 2, depth)
    return Tiles(64, 128, 64, 8, 2, 256)


def fitted(tiles: Tiles, own: int, other: int) -> Tiles:
    """`tiles` for fewer vectors than a block holds."""
    return tiles._replace(
        own=min(tiles.own, max(16, triton.next_power_of_2(own))),
        other=min(tiles.other, max(16, triton.next_power_of_2(other))),
    )


def splits(blocks: int, others: int, device: torch.device) -> int:
    """Into how many parts the others are split, so that `blocks` times it fills the device once."""
    if device.type != "cuda":
        return min(others, 2)  # the interpreter has no processors to fill, and shall test the parts
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(others, processors // blocks))
