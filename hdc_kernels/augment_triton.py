# Triton types its kernels itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

"""`augment_clips` on a GPU: bytes in, views out, one launch, or two where contrast is changed.

    greys_kernel   one number a program: its part of the offset that contrast adds, a mean over the clip
    views_kernel   samples, recolours, scales, clamps, rounds, writes

A program computes PIXELS pixels of a view in FRAMES frames: where a pixel comes from and how much of each of its
four neighbours it takes is worked out once and serves all frames and channels. Coordinates are clamped to the
frame before anything is read, so no load needs a mask. The mean is over the view, not the frame, so the first
kernel samples as the second does; its parts are added in a fixed order, without atomics: the same bits every time.
Clips whose contrast stays are skipped there.

For the paper's batch, 128 clips of 16 frames, views of 112 × 112: 69 MB in on average, twice, and 308 MB out in
float32, 154 MB in bfloat16. That is 0.13 ms or 0.09 ms at 3.35 TB/s; plain PyTorch reads and writes 3 GB. A pixel
takes 12 loads of a byte, a launch 10 million of a whole warp, which 132 SMs issue in 0.04 ms. Not run on a GPU
yet: PIXELS and FRAMES are guesses.
"""

from contextlib import nullcontext

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from hdc_kernels.augment import LUMA
from hdc_kernels.backends.triton.arithmetic import narrow

PIXELS = 256  # of one program
FRAMES = 8  # of one program that writes them
WARPS = 8  # a thread for each pixel: neighbours in a view are neighbours in a warp, and share its lines of cache
PARTS = 64  # at most, of a clip's mean


@triton.jit
def neighbours(start, step, extent, index):
    """Output index -> the two inputs between which it lies, and the weight of the second."""
    place = start + (index + 0.5) * step - 0.5
    place = tl.clamp(place, 0.0, extent - 1.0)
    first = tl.floor(place)
    second = tl.minimum(first + 1.0, extent - 1.0)
    return first.to(tl.int64), second.to(tl.int64), place - first


@triton.jit
def corners(parameters, pixel, size, height, width, row_stride, column_stride):
    """Where in a frame the four neighbours of each pixel of a view are, and the weights of right and lower."""
    left, top, x_step = three(parameters)
    x0, x1, right = neighbours(left, x_step, width, pixel % size)
    y0, y1, lower = neighbours(top, tl.load(parameters + 3), height, pixel // size)
    x0, x1 = x0 * column_stride, x1 * column_stride
    y0, y1 = y0 * row_stride, y1 * row_stride
    return y0 + x0, y0 + x1, y1 + x0, y1 + x1, right, lower


@triton.jit
def sample(plane, places):
    """One channel of a frame, bilinear, in [0, 255]."""
    upper_left, upper_right, lower_left, lower_right, right, lower = places
    a = tl.load(plane + upper_left).to(tl.float32)
    b = tl.load(plane + upper_right).to(tl.float32)
    c = tl.load(plane + lower_left).to(tl.float32)
    d = tl.load(plane + lower_right).to(tl.float32)
    upper = a + right * (b - a)
    return upper + lower * (c + right * (d - c) - upper)


@triton.jit
def three(numbers):
    """What is at this pointer and after it: in registers, where no store in a loop makes it be read again."""
    return tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)


@triton.jit
def mix(weights, r, g, b):
    """Their product with (r, g, b)."""
    return weights[0] * r + weights[1] * g + weights[2] * b


@triton.jit
def greys_kernel(
    clips,  # uint8 [B, T, H, W, 3]
    parameters,  # [B, 16], see `pack`
    greys,  # [B, parts]
    clip_stride,
    frame_stride,
    row_stride,
    column_stride,
    channel_stride,
    T,
    H,
    W,
    size,
    parts,
    PIXELS: tl.constexpr,
):
    clip = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    parameters += clip * 16
    weights = three(parameters + 13)
    total = tl.zeros((PIXELS,), tl.float32)
    if (weights[0] != 0) | (weights[1] != 0) | (weights[2] != 0):  # as NaN is
        for tile in range(part, tl.cdiv(size * size, PIXELS), parts):
            pixel = tile * PIXELS + tl.arange(0, PIXELS)
            places = corners(parameters, pixel, size, H, W, row_stride, column_stride)
            plane = clips + clip * clip_stride
            for _ in range(T):
                r = sample(plane, places)
                g = sample(plane + channel_stride, places)
                b = sample(plane + 2 * channel_stride, places)
                total += tl.where(pixel < size * size, mix(weights, r, g, b), 0.0)
                plane += frame_stride
    tl.store(greys + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def views_kernel(
    clips,  # uint8 [B, T, H, W, 3]
    parameters,  # [B, 16], see `pack`
    greys,  # [B, parts], or None where contrast stays
    views,  # [B, 3, T, size, size]
    clip_stride,
    frame_stride,
    row_stride,
    column_stride,
    channel_stride,
    T,
    H,
    W,
    size,
    parts,
    PIXELS: tl.constexpr,
    FRAMES: tl.constexpr,
    PARTS: tl.constexpr,
):
    area = size * size
    tiles, groups = tl.cdiv(area, PIXELS), tl.cdiv(T, FRAMES)
    clip = (tl.program_id(0) // (tiles * groups)).to(tl.int64)
    first = tl.program_id(0) // tiles % groups * FRAMES
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    parameters += clip * 16
    offset = -1.0
    if greys is not None:
        part = tl.arange(0, PARTS)
        offset += tl.sum(tl.load(greys + clip * parts + part, part < parts, 0.0), 0)
    places = corners(parameters, pixel, size, H, W, row_stride, column_stride)
    to_red, to_green, to_blue = three(parameters + 4), three(parameters + 7), three(parameters + 10)
    rows = to_red, to_green, to_blue
    dtype: tl.constexpr = views.dtype.element_ty
    for t in range(first, tl.minimum(first + FRAMES, T)):
        plane = clips + clip * clip_stride + tl.cast(t, tl.int64) * frame_stride
        r = sample(plane, places)
        g = sample(plane + channel_stride, places)
        b = sample(plane + 2 * channel_stride, places)
        for channel in tl.static_range(3):
            value = mix(rows[channel], r, g, b) + offset
            value = tl.clamp(value, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
            place = ((clip * 3 + channel) * T + t) * area + pixel
            tl.store(views + place, narrow(value, dtype), pixel < area)


def augment(
    clips: Tensor,
    boxes: Tensor,
    matrix: Tensor,
    contrast: Tensor | None,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """`hdc_kernels.augment_clips` of checked arguments."""
    B, T, H, W, _ = clips.shape
    parameters = pack(boxes, matrix, contrast, size, T).to(clips.device, non_blocking=True)
    views = clips.new_empty(B, 3, T, size, size, dtype=dtype)
    tiles = triton.cdiv(size * size, PIXELS)
    parts, greys = min(tiles, PARTS), None
    geometry = *clips.stride(), T, H, W, size, parts
    common = {"PIXELS": PIXELS, "num_warps": WARPS}
    with torch.cuda.device(clips.device) if clips.device.type == "cuda" else nullcontext():
        if contrast is not None:
            greys = parameters.new_empty(B, parts)
            greys_kernel[(B * parts,)](clips, parameters, greys, *geometry, **common)
        views_kernel[(B * tiles * triton.cdiv(T, FRAMES),)](
            clips, parameters, greys, views, *geometry, FRAMES=FRAMES, PARTS=PARTS, **common
        )
    return views


def pack(boxes: Tensor, matrix: Tensor, contrast: Tensor | None, size: int, frames: int) -> Tensor:
    """What the kernels read of each clip, [B, 16]: so that it is one copy to the device.

    left, top and the steps from pixel to pixel in x and y; the 3×3 matrix from samples to the view; and the
    three numbers whose product with every sample, summed over the clip, is what contrast adds.
    """
    steps = boxes[:, 2:] / size
    if contrast is None:
        contrast = boxes.new_ones(len(boxes))
    # Neither a product of matrices, which autocast would round, nor a tensor of LUMA, made by waiting for the device.
    grey = sum(share * row for share, row in zip(LUMA, matrix.unbind(1), strict=True))
    weights = (1 - contrast).view(-1, 1) * grey / (127.5 * frames * size * size)
    to_view = (contrast.view(-1, 1, 1) * matrix / 127.5).flatten(1)
    return torch.cat((boxes[:, :2], steps, to_view, weights), 1)
