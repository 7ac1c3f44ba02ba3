"""How large the blocks of a launch are: a table by depth and dtype, and how many blocks fill a device.

There is no autotuning: it would time kernels in the middle of training, and two runs could differ. None
of these choices has been timed. They are large ones that spill no registers and stay within the shared
memory of an A100 (163 KB), or of AMD's CDNA 3 (64 KB); `tests/test_triton_compile.py` holds them to that.
"""

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]

AMD = torch.version.hip is not None
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
        return block_size(dimensions)
    return triton.cdiv(dimensions, ALL_AT_ONCE) * ALL_AT_ONCE


def forward_tiles(depth: int, dtype: torch.dtype, ids: bool) -> Tiles:
    """For `logsumexp_kernel` and unit vectors of `depth` padded dimensions.

    Where there are `ids`, each takes two registers, and blocks are smaller.
    """
    if dtype == torch.float32:
        return Tiles(min(depth, 32), own=64, other=32, warps=8, stages=2)
    if AMD:
        return Tiles(min(depth, 64), own=128, other=64, warps=8, stages=2)
    if depth <= 128:
        return Tiles(depth, own=128, other=32 if ids else 128, warps=8, stages=3)
    if depth <= ALL_AT_ONCE:
        return Tiles(depth, own=128, other=64, warps=8, stages=3)
    return Tiles(64, own=128, other=32 if ids else 128, warps=8, stages=3)


def gradient_tiles(depth: int, dtype: torch.dtype, ids: bool) -> Tiles:
    """For `gradient_kernel`."""
    width = min(depth, ALL_AT_ONCE)
    if dtype == torch.float32:
        return Tiles(min(depth, 32), own=64, other=32, warps=8, stages=2, width=width)
    if AMD:
        return Tiles(min(depth, 64), own=64, other=32, warps=8, stages=2, width=width)
    if depth <= 128:
        return Tiles(depth, own=128, other=32 if ids else 64, warps=8, stages=3, width=width)
    if depth <= ALL_AT_ONCE:
        return Tiles(depth, own=64 if ids else 128, other=32, warps=8, stages=2, width=width)
    return Tiles(64, own=128, other=32, warps=8, stages=2, width=width)


def small_tiles(columns: int, dimensions: int, dtype: torch.dtype) -> Tiles:
    """For `contrast_kernel`, which owns `own` vectors and takes logsumexps over `other` ones at a time."""
    width = block_size(dimensions)
    if dtype == torch.float32:
        tile = Tiles(min(width, 32), own=32, other=32, warps=8, stages=1)
    else:
        tile = Tiles(width, own=32, other=64, warps=8, stages=1)
    if width > 128:
        tile = tile._replace(depth=min(tile.depth, 64), own=16, other=32)
    if AMD:
        tile = tile._replace(warps=4)
    return fitted(tile, columns, columns)._replace(width=width)


def block_size(length: int) -> int:
    """The power of two, at least the tensor cores' 16, that holds `length`."""
    return max(16, triton.next_power_of_2(length))


def fitted(tiles: Tiles, own: int, other: int) -> Tiles:
    """`tiles` for fewer vectors than a block holds."""
    return tiles._replace(
        own=min(tiles.own, block_size(own)),
        other=min(tiles.other, block_size(other)),
    )


def splits(blocks: int, others: int, device: torch.device) -> int:
    """Into how many parts the others are split, so that `blocks` times it fills the device once."""
    if device.type != "cuda":
        return min(others, 2)  # the interpreter has no processors to fill, and shall test the parts
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(others, processors // blocks))
