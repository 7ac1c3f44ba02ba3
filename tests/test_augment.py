"""`augment_clips` against interpolation matrices in float64, and its Triton kernels against plain PyTorch.

On a machine without a GPU the kernels run in Triton's interpreter (see `conftest`); with one, on it.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hdc_kernels import augment_clips
from hdc_kernels.augment import DTYPES

augment_triton = pytest.importorskip("hdc_kernels.augment_triton", exc_type=ModuleNotFoundError)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = "torch", "triton"
# Larger than the frame, mirrored, shrunk and stretched, whole pixels and fractions, over the edge.
BOXES = (
    (3.0, 2.0, 11.0, 11.0),
    (17.0, 1.0, -14.0, 14.0),
    (0.0, 0.0, 19.0, 17.0),
    (4.25, 6.5, 5.0, 3.75),
    (-3.5, 9.0, 12.0, 14.0),
    (21.0, -2.0, -30.0, 25.0),
)


def make(height: int = 17, width: int = 19, frames: int = 2, boxes: Any = BOXES) -> dict[str, Any]:
    """Random clips, one for each box, and random colours: every third clip keeps its contrast."""
    generator = torch.Generator().manual_seed(3)
    batch = len(boxes)
    shape = (batch, frames, height, width, 3)
    contrast = 0.6 + 0.8 * torch.rand(batch, generator=generator)
    contrast[1::3] = 1
    return {
        "clips": torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(DEVICE),
        "boxes": torch.tensor(boxes),
        "matrix": torch.eye(3) + 0.3 * torch.randn(batch, 3, 3, generator=generator),
        "contrast": contrast,
    }


def interpolation(start: float, extent: float, size: int, length: int) -> np.ndarray:
    """What each of `size` outputs takes of each of `length` inputs, as a matrix: tents around a place."""
    place = start + (np.arange(size) + 0.5) * extent / size - 0.5
    distance = np.abs(place.clip(0, length - 1)[:, None] - np.arange(length))
    return (1 - distance).clip(0)


def expected(
    clips: Tensor,
    boxes: Tensor,
    size: int,
    matrix: Tensor | None = None,
    contrast: Tensor | None = None,
) -> np.ndarray:
    """The views in float64, clip by clip, [B, 3, T, size, size]."""
    views = []
    for i, clip in enumerate(clips.cpu().double().numpy()):
        left, top, width, height = boxes[i].tolist()
        x = interpolation(left, width, size, clip.shape[2])
        y = interpolation(top, height, size, clip.shape[1])
        view = np.einsum("iy,tyxc,jx->tijc", y, clip, x)
        if matrix is not None:
            view = view @ matrix[i].double().cpu().numpy().T
        if contrast is not None:
            grey = (view @ np.array([0.299, 0.587, 0.114])).mean()
            view = grey + float(contrast[i]) * (view - grey)
        views.append((view / 127.5 - 1).clip(-1, 1).transpose(3, 0, 1, 2))
    return np.stack(views)


def error(found: Tensor, truth: np.ndarray) -> float:
    """The largest difference in any pixel."""
    assert found.shape == truth.shape
    return float(np.abs(found.cpu().double().numpy() - truth).max())


def gain(made: dict[str, Any]) -> float:
    """What colours are multiplied by at most, or 1."""
    matrix, contrast = made.get("matrix"), made.get("contrast")
    most = 1.0 if matrix is None else float(matrix.abs().sum(2).max())
    return max(1.0, most * (1.0 if contrast is None else float(contrast.abs().max())))


def bound(dtype: torch.dtype, made: dict[str, Any]) -> float:
    """Half a step of the result's dtype below 1, and float32's of places in the frame times the steepest slope.

    From one pixel to the next, in either direction, a view can change by 2, from −1 to 1, times the gain.
    """
    side = max(made["clips"].shape[2:4])
    return torch.finfo(dtype).eps / 4 + 4 * gain(made) * side * torch.finfo(torch.float32).eps


def check(size: int, dtype: torch.dtype, made: dict[str, Any]) -> None:
    """Both backends against float64; Triton at most twice as far off as plain PyTorch, and float32's last bits.

    Those are four roundings of what may be as large as the gain: where all pixels are alike, so are their errors.
    """
    truth = expected(size=size, **made)
    off = {}
    for backend in BACKENDS:
        views = augment_clips(**made, size=size, dtype=dtype, backend=backend)
        assert views.dtype == dtype
        assert views.is_contiguous()
        assert error(views, truth) <= bound(dtype, made), backend
        off[backend] = np.linalg.norm(views.cpu().double().numpy() - truth)
    slack = 4 * gain(made) * torch.finfo(torch.float32).eps / 2
    assert off["triton"] <= 2 * off["torch"] + slack * truth.size**0.5


def few(made: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The first two clips, and what of their parameters is named."""
    return {key: made[key][:2] for key in ("clips", "boxes", *keys)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "frames"), [(13, 9), (20, 2)])
def test_agrees_with_float64(size: int, frames: int, dtype: torch.dtype) -> None:
    """Tiles that end inside a view, the first or the second, and more frames than one program takes."""
    assert 13**2 < augment_triton.PIXELS < 20**2
    assert frames == 2 or frames % augment_triton.FRAMES == 1
    check(size, dtype, make(frames=frames))


@pytest.mark.parametrize("keys", [(), ("matrix",), ("contrast",)])
def test_what_is_left_out_changes_nothing(keys: tuple[str, ...]) -> None:
    made = few(make(), *keys)
    check(11, torch.float32, made)
    full = {"matrix": torch.eye(3).repeat(2, 1, 1), "contrast": torch.ones(2), **made}
    for backend in BACKENDS:
        views = augment_clips(**made, size=11, backend=backend)
        assert torch.equal(views, augment_clips(**full, size=11, backend=backend))


@pytest.mark.parametrize(("height", "width", "frames", "size"), [(1, 9, 1, 4), (9, 1, 1, 1)])
def test_a_single_row_column_frame_or_pixel(
    height: int, width: int, frames: int, size: int
) -> None:
    """Triton compiles a 1 among the arguments apart."""
    check(size, torch.float32, few(make(height, width, frames), "matrix", "contrast"))


def test_many_programs_share_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes several tiles, the last of them fewer: 3 programs, 13² pixels in tiles of 16."""
    monkeypatch.setattr(augment_triton, "PIXELS", 16)
    monkeypatch.setattr(augment_triton, "PARTS", 4)
    made = few(make(), "matrix", "contrast")
    check(13, torch.float32, {key: value[:1] for key, value in made.items()})


def test_a_whole_frame_is_what_interpolate_makes_of_it() -> None:
    made = few(make(boxes=((0.0, 0.0, 19.0, 17.0), (19.0, 0.0, -19.0, 17.0))))
    planes = made["clips"].permute(0, 1, 4, 2, 3).flatten(0, 1).double()
    whole = F.interpolate(planes, (8, 8), mode="bilinear").view(2, 2, 3, 8, 8).transpose(1, 2)
    whole[1] = whole[1].flip(-1)
    for backend in BACKENDS:
        views = augment_clips(**made, size=8, backend=backend)
        torch.testing.assert_close(views.double(), whole / 127.5 - 1, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_pixels_are_copied(backend: str) -> None:
    """Nothing is interpolated where a crop has the view's size; a mirrored one is its mirror."""
    made = few(make(boxes=((3.0, 2.0, 11.0, 11.0), (14.0, 2.0, -11.0, 11.0))))
    made["clips"] = made["clips"][:1].expand(2, -1, -1, -1, -1)  # a stride of 0
    views = augment_clips(**made, size=11, backend=backend)
    crop = made["clips"][0, :, 2:13, 3:14].permute(3, 0, 1, 2)
    torch.testing.assert_close(views[0], crop / 127.5 - 1, rtol=0, atol=2e-5)
    torch.testing.assert_close(views[1], views[0].flip(-1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_black_and_white_are_the_ends_of_the_range(backend: str) -> None:
    """In every dtype: no sum of weights is below 1, and what is above is cut off."""
    made = make()
    made["clips"][::2], made["clips"][1::2] = 0, 255
    for dtype in DTYPES:
        views = augment_clips(made["clips"], made["boxes"], 9, dtype=dtype, backend=backend)
        assert torch.equal(views[::2], torch.full_like(views[::2], -1))
        torch.testing.assert_close(views[1::2], torch.ones_like(views[1::2]), rtol=0, atol=3e-7)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": lambda clips: (
        clips.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    ),
    "planes first": lambda clips: clips.permute(4, 1, 0, 3, 2).contiguous().permute(2, 1, 4, 3, 0),
    "slices": lambda clips: _strew(clips)[1::2, 1::2, 1::2, 1::2, 1::2],
}


def _strew(clips: Tensor) -> Tensor:
    """Every element at an odd place in each dimension, among others."""
    larger = torch.full([2 * length for length in clips.shape], 77, dtype=torch.uint8)
    larger[1::2, 1::2, 1::2, 1::2, 1::2] = clips.cpu()
    return larger.to(DEVICE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str, layout: str) -> None:
    made = few(make(), "matrix", "contrast")
    views = augment_clips(**made, size=9, backend=backend)
    made["clips"] = LAYOUTS[layout](made["clips"])
    assert not made["clips"].is_contiguous()
    assert torch.equal(views, augment_clips(**made, size=9, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend: str) -> None:
    made = few(make(), "matrix", "contrast")
    views = augment_clips(**made, size=20, backend=backend)
    for _ in range(1000 if GPU else 1):
        assert torch.equal(views, augment_clips(**made, size=20, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_clip(backend: str) -> None:
    made = few(make(), "matrix", "contrast")
    made["contrast"][0] = float("nan")
    views = augment_clips(**made, size=5, backend=backend)
    assert views[0].isnan().all()
    assert views[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_in(backend: str) -> None:
    made = few(make(), "matrix", "contrast")
    views = augment_clips(**made, size=9, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(views, augment_clips(**made, size=9, backend=backend))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_default_dtype_does_not_reach_in(backend: str, default: torch.dtype) -> None:
    """Nor does a default device."""
    for keys in ((), ("matrix",), ("matrix", "contrast")):
        arguments = few(make(), *keys)
        views = augment_clips(**arguments, size=9, backend=backend)
        torch.set_default_dtype(default)
        try:
            with torch.device("meta"):
                found = augment_clips(**arguments, size=9, backend=backend)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, views)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend: str) -> None:
    made = few(make(), "matrix", "contrast")

    def brighten(clips: Tensor, boxes: Tensor, **colors: Tensor) -> Tensor:
        return augment_clips(clips, boxes, 9, **colors, backend=backend) + 1

    compiled = torch.compile(brighten, fullgraph=True)(**made)
    torch.testing.assert_close(compiled, brighten(**made), rtol=0, atol=1e-5)


def test_is_a_sound_operator() -> None:
    made = few(make(), "matrix", "contrast")
    operator = torch.ops.hdc_kernels.augment_clips.default
    torch.library.opcheck(operator, (*made.values(), 5, torch.bfloat16))


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_crop(data: st.DataObject) -> None:
    """Shapes, sizes and boxes, within the frame and around it."""
    height, width, frames, size = (data.draw(st.integers(1, most)) for most in (20, 20, 3, 12))
    place = st.floats(-10, 30, width=32)
    extent = st.floats(-40, 40, width=32)
    box = tuple(data.draw(strategy) for strategy in (place, place, extent, st.floats(0, 40)))
    made = make(height, width, frames, (box,))
    for key in ("matrix", "contrast"):
        if data.draw(st.booleans()):
            del made[key]
    check(size, data.draw(st.sampled_from(DTYPES)), made)


def wrong(**changes: Any) -> dict[str, Any]:
    return {**few(make(), "matrix", "contrast"), "size": 5, **changes}


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (wrong(clips=[1]), TypeError, "clips is a list; it must be a tensor [B, T, H, W, 3]"),
        (
            wrong(clips=torch.ones(2, 1, 4, 4, 3)),
            TypeError,
            "clips has dtype torch.float32; it must be uint8",
        ),
        (
            wrong(clips=torch.ones(2, 3, 1, 4, 4, dtype=torch.uint8)),
            ValueError,
            "clips has shape [2, 3, 1, 4, 4]; it must be [B, T, H, W, 3]",
        ),
        (
            wrong(clips=torch.ones(2, 0, 4, 4, 3, dtype=torch.uint8)),
            ValueError,
            "clips has shape [2, 0, 4, 4, 3]; no dimension may be 0",
        ),
        (wrong(boxes=None), TypeError, "boxes is a NoneType; it must be a tensor [2, 4]"),
        (
            wrong(boxes=torch.ones(2, 4).double()),
            TypeError,
            "boxes has dtype torch.float64; it must be float32",
        ),
        (
            wrong(boxes=torch.ones(3, 4)),
            ValueError,
            "boxes has shape [3, 4]; for clips [2, 2, 17, 19, 3] it must be [2, 4]",
        ),
        (
            wrong(matrix=torch.ones(3, 3)),
            ValueError,
            "matrix has shape [3, 3]; for clips [2, 2, 17, 19, 3] it must be [2, 3, 3]",
        ),
        (
            wrong(contrast=torch.ones(2, requires_grad=True)),
            ValueError,
            "contrast requires a gradient, which augment_clips has none of; detach it",
        ),
        (
            wrong(boxes=torch.ones(2, 4, device="meta")),
            ValueError,
            f"boxes is on meta but clips on {make()['clips'].device}; it must be there or on the CPU",
        ),
        (
            wrong(
                clips=torch.ones(2, 1, 4, 4, 3, dtype=torch.uint8, device="meta"),
                matrix=torch.ones(2, 3, 3, device="meta"),
            ),
            ValueError,
            "matrix is on meta but boxes on cpu; they must be equal",
        ),
        (wrong(size=5.0), TypeError, "size is a float; it must be an int"),
        (wrong(size=0), ValueError, "size is 0; it must be at least 1"),
        (
            wrong(dtype=torch.float64),
            ValueError,
            "dtype is torch.float64; it must be float32, bfloat16 or float16",
        ),
        (
            wrong(backend="cpu"),
            ValueError,
            "backend is 'cpu'; it must be one of 'auto', 'torch', 'triton'",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        augment_clips(**arguments)


needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_papers_batch(dtype: torch.dtype) -> None:
    """128 clips of 16 frames, chosen by "auto", parameters on either side."""
    boxes = [(8.0 * (i % 3), 0.0, 112.0, 112.0) for i in range(64)]
    boxes += [(128.0, 0.0, -128.0, 128.0), (120.0, 3.0, -84.0, 84.0)] * 32
    made = make(128, 128, 16, boxes)
    views = augment_clips(**made, size=112, dtype=dtype)
    beside = {key: value.to(DEVICE) for key, value in made.items()}
    torch.testing.assert_close(augment_clips(**beside, size=112, dtype=dtype), views)
    assert torch.equal(views, augment_clips(**made, size=112, dtype=dtype, backend="triton"))
    some = {key: value[60:68] for key, value in made.items()}
    assert error(views[60:68], expected(size=112, **some)) <= bound(dtype, some)


@pytest.mark.gpu
@needs_gpu
def test_more_bytes_than_32_bits_count() -> None:
    """The last clip of 2³¹ bytes, and a view of 2³² elements, is what it is alone."""
    clip = make(1024, 1024, 256, BOXES[:1])["clips"]
    clips = clip.new_zeros(3, *clip.shape[1:])
    clips[2] = clip[0]
    boxes = torch.tensor([(0.0, 0.0, 1024.0, 1024.0)] * 3)
    views = augment_clips(clips, boxes, 1400, dtype=torch.bfloat16)
    assert clips[:2].numel() < 2**31 < clips.numel()
    assert views.numel() > 2**32
    assert torch.equal(views[2:], augment_clips(clip, boxes[:1], 1400, dtype=torch.bfloat16))


@pytest.mark.gpu
@needs_gpu
def test_a_graph_may_capture_it() -> None:
    made = {key: value.to(DEVICE) for key, value in make().items()}
    augment_clips(**made, size=24)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        views = augment_clips(**made, size=24)
    made["clips"].bitwise_not_()
    made["contrast"].fill_(1.5)
    graph.replay()
    assert torch.equal(views, augment_clips(**made, size=24))
