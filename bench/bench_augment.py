"""Views of video clips: what everyone writes beside `augment_clips`, 16 clips of 16 frames, on a GPU 128.

Clip by clip, one transformation after the other; the whole batch in PyTorch, as it is and compiled; and on a GPU
the Triton kernels. What is drawn for the clips is the paper's: a crop of one of four sizes, half of them mirrored,
colours of eight in ten.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from hdc_kernels import augment_clips
from hdc_kernels.augment import LUMA

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BATCH = 128 if GPU else 16
CALLS = 10 if GPU else 1  # before the device is waited for
FRAMES, SIDE, SIZE = 16, 128, 112

Augment = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


def clip_by_clip(
    clips: Tensor, boxes: Tensor, matrix: Tensor, contrast: Tensor, dtype: torch.dtype
) -> Tensor:
    """Crop, resize, mirror, recolour, contrast, rescale; for boxes of whole pixels."""
    luma = torch.tensor(LUMA, device=clips.device)
    matrix, contrast = matrix.to(clips.device), contrast.to(clips.device)
    views = []
    for i, (left, top, width, height) in enumerate(boxes.int().tolist()):
        columns = slice(min(left, left + width), max(left, left + width))
        crop = clips[i, :, top : top + height, columns].permute(0, 3, 1, 2).float()
        view = F.interpolate(crop, (SIZE, SIZE), mode="bilinear")
        if width < 0:
            view = view.flip(-1)
        view = torch.einsum("cd,tdhw->cthw", matrix[i], view)
        grey = torch.einsum("c,cthw->thw", luma, view).mean()
        view = grey + contrast[i] * (view - grey)
        views.append((view / 127.5 - 1).clamp(-1, 1).to(dtype))
    return torch.stack(views)


def whole_batch(
    clips: Tensor, boxes: Tensor, matrix: Tensor, contrast: Tensor, dtype: torch.dtype
) -> Tensor:
    """The specification, one operation after the other."""
    return augment_clips(
        clips, boxes, SIZE, matrix=matrix, contrast=contrast, dtype=dtype, backend="torch"
    )


def triton(
    clips: Tensor, boxes: Tensor, matrix: Tensor, contrast: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same by the kernels."""
    return augment_clips(
        clips, boxes, SIZE, matrix=matrix, contrast=contrast, dtype=dtype, backend="triton"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "augment",
    [
        clip_by_clip,
        whole_batch,
        pytest.param(torch.compile(whole_batch, fullgraph=True, dynamic=False), id="compiled"),
        pytest.param(triton, marks=pytest.mark.skipif(not GPU, reason="needs a CUDA device")),
    ],
)
def test_augment(benchmark: BenchmarkFixture, augment: Augment, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"{CALLS} × views of {BATCH} × {FRAMES} frames, {SIDE}² → {SIZE}², {name}"
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(
        256, (BATCH, FRAMES, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator
    ).to(DEVICE)
    side = torch.tensor([128.0, 112.0, 96.0, 84.0]).repeat(BATCH // 4)
    left, top = (torch.rand(2, BATCH, generator=generator) * (SIDE - side + 1)).floor()
    mirrored = torch.rand(BATCH, generator=generator) < 0.5
    boxes = torch.stack(
        (torch.where(mirrored, left + side, left), top, torch.where(mirrored, -side, side), side), 1
    )
    jittered = (torch.rand(BATCH, generator=generator) < 0.8).float()
    matrix = torch.randn(BATCH, 3, 3, generator=generator) * 0.2 * jittered.view(-1, 1, 1)
    matrix += torch.eye(3)
    contrast = 1 + 0.4 * jittered * (2 * torch.rand(BATCH, generator=generator) - 1)

    def step() -> Tensor:
        for _ in range(CALLS):
            views = augment(clips, boxes, matrix, contrast, dtype)
        if GPU:
            torch.cuda.synchronize()
        return views

    expected = whole_batch(clips, boxes, matrix, contrast, torch.float32)
    # Where a crop is enlarged, its outermost pixels see what lies beside it, unless it was cut out first.
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(benchmark(step)[inner].float(), expected[inner], rtol=0, atol=1e-2)
