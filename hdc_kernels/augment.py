"""Augmented views of video clips in one pass: crop, mirror, resize, colours, step to [−1, 1].

What is done to a clip's colours is affine in (R, G, B): brightness, saturation, hue and the copying of one
channel to all are one 3×3 matrix, contrast and the step to [−1, 1] scale it and add a number. So a view is

    clamp(c·M·s/127.5 + (1 − c)·g/127.5 − 1, −1, 1)

of the bilinear samples s, with g the mean grey of M·s over the clip. `plain` below is the specification, in
PyTorch; `augment_triton.py` reads the bytes of the crop and writes the view, and nothing between.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hdc_kernels.checks import check_choice, check_count
from hdc_kernels.selection import select_for_clips

Backend = Literal["auto", "torch", "triton"]

LUMA = (0.299, 0.587, 0.114)  # grey of (R, G, B), ITU-R BT.601
DTYPES = torch.float32, torch.bfloat16, torch.float16


def augment_clips(
    clips: Tensor,
    boxes: Tensor,
    size: int,
    *,
    matrix: Tensor | None = None,
    contrast: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    """One crop of each clip, resized, recoloured and scaled from [0, 255] to [−1, 1].

    Computed in float32 whatever `dtype` and autocast say; only the result is rounded. The order is crop, mirror,
    resize (bilinear, without a filter against aliasing, as `torch.nn.functional.grid_sample`), matrix, contrast.
    The same inputs give the same bits on the same device.

    Args:
        clips: uint8 [B, T, H, W, 3], RGB, of any strides. Images are clips with T = 1.
        boxes: float32 [B, 4], each clip's crop: left, top, width, height in pixels of the frame, fractions allowed. A
            negative width mirrors the crop: left is its right edge then. Beyond the frame, the pixels of its edge go
            on. The values are not checked.
        size: side of a view in pixels.
        matrix: float32 [B, 3, 3], what (R, G, B) of each clip are multiplied by. Default: left as they are.
        contrast: float32 [B], the factor by which all values move away from the mean grey of the recoloured clip, all
            its frames together. Default: 1.
        dtype: of the result: float32, bfloat16 or float16.
        backend: "torch" runs anywhere, "triton" on a GPU. "auto" is "triton" on an NVIDIA GPU of compute
            capability 8.0 or newer if Triton is installed, "torch" otherwise.

    `boxes`, `matrix` and `contrast` may be on the CPU or on the device of `clips`, all on the same; on the CPU they
    travel in one copy that does not wait for the device. No gradient flows to them.

    Returns:
        `dtype` [B, 3, T, size, size], contiguous, on the device of `clips`.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed; also for a `backend` that
            is missing or cannot run there.
    """
    _check_clips(clips)
    _check_parameter("boxes", boxes, (len(clips), 4), clips)
    check_count("size", size)
    for name, parameter, shape in (
        ("matrix", matrix, (len(clips), 3, 3)),
        ("contrast", contrast, (len(clips),)),
    ):
        if parameter is not None:
            _check_parameter(name, parameter, shape, clips)
            if parameter.device != boxes.device:
                raise ValueError(
                    f"{name} is on {parameter.device} but boxes on {boxes.device}; they must be equal"
                )
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be float32, bfloat16 or float16")
    check_choice("backend", backend, Backend)
    if matrix is None:
        matrix = torch.eye(3, dtype=boxes.dtype, device=boxes.device).expand(len(clips), 3, 3)
    if select_for_clips(backend, clips) == "triton":
        return _fused(clips, boxes, matrix, contrast, size, dtype)
    with torch.autocast(clips.device.type, enabled=False):
        return plain(clips, boxes, matrix, contrast, size).to(dtype)


def plain(
    clips: Tensor, boxes: Tensor, matrix: Tensor, contrast: Tensor | None, size: int
) -> Tensor:
    """The specification, the whole batch at once: float32 [B, 3, T, size, size]."""
    device = clips.device
    sampled = _sample(clips, boxes.to(device), size)
    pixels, matrix = sampled.flatten(2), matrix.to(device)
    offset = sampled.new_full((1, 1, 1), -1.0)
    if contrast is not None:
        contrast = contrast.to(device).view(-1, 1, 1)
        # The mean grey of the recoloured clip is the recoloured mean, read through LUMA.
        mean = matrix @ pixels.mean(2, keepdim=True)
        grey = sampled.new_tensor([LUMA]) @ mean
        offset = (1 - contrast) * grey / 127.5 - 1
        matrix = contrast * matrix
    recolored = torch.baddbmm(offset.expand(len(clips), 3, 1), matrix / 127.5, pixels)
    return recolored.clamp_(-1, 1).view_as(sampled)


def _sample(clips: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop, mirror and resize, bilinear: uint8 [B, T, H, W, 3] -> float32 [B, 3, T, size, size]."""
    batch, frames, height, width, _ = clips.shape
    left, top, box_width, box_height = boxes.unbind(1)
    # theta maps output coordinates in [−1, 1] to input coordinates in [−1, 1], pixel edges at ±1.
    theta = boxes.new_zeros(batch, 2, 3)
    theta[:, 0, 0] = box_width / width
    theta[:, 1, 1] = box_height / height
    theta[:, 0, 2] = (2 * left + box_width) / width - 1
    theta[:, 1, 2] = (2 * top + box_height) / height - 1
    grid = F.affine_grid(theta, [batch, 1, size, size], align_corners=False)
    # Frames and colours share one grid, so they travel together as channels.
    planes = clips.permute(0, 4, 1, 2, 3).reshape(batch, 3 * frames, height, width).float()
    sampled = F.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return sampled.view(batch, 3, frames, size, size)


@torch.library.custom_op("hdc_kernels::augment_clips", mutates_args=())
def _fused(
    clips: Tensor,
    boxes: Tensor,
    matrix: Tensor,
    contrast: Tensor | None,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The Triton kernels, as an operator: `torch.compile` need not look inside."""
    from hdc_kernels import augment_triton

    return augment_triton.augment(clips, boxes, matrix, contrast, size, dtype)


@_fused.register_fake
def _(
    clips: Tensor,
    boxes: Tensor,
    matrix: Tensor,
    contrast: Tensor | None,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    return clips.new_empty(clips.shape[0], 3, clips.shape[1], size, size, dtype=dtype)


def _check_clips(clips: Tensor) -> None:
    if not isinstance(clips, Tensor):
        raise TypeError(f"clips is a {type(clips).__name__}; it must be a tensor [B, T, H, W, 3]")
    if clips.dtype != torch.uint8:
        raise TypeError(f"clips has dtype {clips.dtype}; it must be uint8")
    shape = list(clips.shape)
    if clips.dim() != 5 or shape[4] != 3:
        raise ValueError(f"clips has shape {shape}; it must be [B, T, H, W, 3]")
    if clips.numel() == 0:
        raise ValueError(f"clips has shape {shape}; no dimension may be 0")


def _check_parameter(name: str, parameter: Tensor, shape: tuple[int, ...], clips: Tensor) -> None:
    """float32 of this shape, without a gradient, on the CPU or beside the clips."""
    if not isinstance(parameter, Tensor):
        raise TypeError(
            f"{name} is a {type(parameter).__name__}; it must be a tensor {list(shape)}"
        )
    if parameter.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {parameter.dtype}; it must be float32")
    if parameter.shape != shape:
        raise ValueError(
            f"{name} has shape {list(parameter.shape)}; "
            f"for clips {list(clips.shape)} it must be {list(shape)}"
        )
    if parameter.requires_grad:
        raise ValueError(f"{name} requires a gradient, which augment_clips has none of; detach it")
    if parameter.device.type != "cpu" and parameter.device != clips.device:
        raise ValueError(
            f"{name} is on {parameter.device} but clips on {clips.device}; "
            "it must be there or on the CPU"
        )
