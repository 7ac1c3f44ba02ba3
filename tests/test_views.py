"""Augmentation: what each switch does to pixels, against arithmetic done pixel by pixel."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from hdc.errors import InputError
from hdc.views import AugmentConfig, augment, center_square, draw_boxes

PLAIN = AugmentConfig(
    crop_size=20,
    random_crop=False,
    scale_jitter=False,
    flip=False,
    color_jitter=False,
    channel_replication=False,
)
EVERYTHING = AugmentConfig(crop_size=20)


def random_clips(batch: int = 6, frames: int = 3, height: int = 24, width: int = 32) -> Tensor:
    generator = Generator().manual_seed(5)
    return torch.randint(
        256, (batch, frames, height, width, 3), dtype=torch.uint8, generator=generator
    )


def view(clips: Tensor, config: AugmentConfig, seed: int = 0) -> Tensor:
    return augment(clips, config, Generator().manual_seed(seed))


def to_pixels(views: Tensor) -> np.ndarray:
    """[B, 3, T, h, w] in [−1, 1] -> grey levels [B, T, h, w, 3], not rounded."""
    return ((views.double() + 1) * 127.5).permute(0, 2, 3, 4, 1).numpy()


def test_shape_type_and_range() -> None:
    views = view(random_clips(batch=64), EVERYTHING)
    assert views.shape == (64, 3, 3, 20, 20)
    assert views.dtype == torch.float32
    assert views.min() >= -1
    assert views.max() <= 1
    assert views.max() - views.min() > 1.9


def test_everything_off_is_a_centre_crop() -> None:
    clips = random_clips()
    pixels = to_pixels(view(clips, PLAIN))
    np.testing.assert_allclose(pixels, clips[:, :, 2:22, 6:26].numpy(), atol=1e-2)
    assert EVERYTHING.center_only() == PLAIN


def test_black_and_white_are_the_ends_of_the_range() -> None:
    clips = torch.zeros(2, 1, 24, 24, 3, dtype=torch.uint8)
    clips[1] = 255
    views = view(clips, PLAIN)
    torch.testing.assert_close(views[0], torch.full_like(views[0], -1))
    torch.testing.assert_close(views[1], torch.full_like(views[1], 1))


@pytest.mark.parametrize(
    "switch", ["random_crop", "scale_jitter", "flip", "color_jitter", "channel_replication"]
)
def test_every_switch_switches(switch: str) -> None:
    clips = random_clips(batch=16)
    alone = view(clips, replace(PLAIN, **{switch: True}))
    assert not torch.allclose(alone, view(clips, PLAIN), atol=0.05)
    without = view(clips, replace(EVERYTHING, **{switch: False}))
    assert not torch.allclose(without, view(clips, EVERYTHING), atol=0.05)


def test_one_draw_per_clip() -> None:
    """A static clip stays static, and equal clips get different draws."""
    image = random_clips(batch=1, frames=1)
    views = view(image.expand(12, 5, -1, -1, -1), EVERYTHING)
    assert torch.equal(views, views[:, :, :1].expand_as(views))
    for i in range(12):
        for j in range(i):
            assert not torch.allclose(views[i], views[j], atol=0.05)


def test_same_generator_same_views() -> None:
    clips = random_clips()
    assert torch.equal(view(clips, EVERYTHING, seed=3), view(clips, EVERYTHING, seed=3))
    assert not torch.equal(view(clips, EVERYTHING, seed=3), view(clips, EVERYTHING, seed=4))


def test_autocast_rounds_the_views_and_nothing_else() -> None:
    """Training in bf16 draws the same, and computes it as well."""
    clips = random_clips()
    full = view(clips, EVERYTHING)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(view(clips, EVERYTHING), full.bfloat16())


def test_random_crop_copies_pixels() -> None:
    """Without scale jitter nothing is interpolated, and every place can be drawn, the borders too."""
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    image = torch.stack([y, x, (7 * y + 3 * x) % 256], dim=-1).to(torch.uint8)
    clips = image.expand(400, 1, -1, -1, -1)
    pixels = to_pixels(view(clips, replace(PLAIN, random_crop=True)))[:, 0]
    corners = pixels[:, 0, 0, :2].round().astype(int)
    for crop, (top, left) in zip(pixels, corners, strict=True):
        expected = image[top : top + 20, left : left + 20].numpy()
        np.testing.assert_allclose(crop, expected, atol=1e-2)
    assert {tuple(corner) for corner in corners.tolist()} == {
        (top, left) for top in range(5) for left in range(5)
    }


def test_flip_is_an_exact_mirror() -> None:
    clips = random_clips(batch=200)
    plain, flipped = view(clips, PLAIN), view(clips, replace(PLAIN, flip=True))
    mirrored = 0
    for before, after in zip(plain, flipped, strict=True):
        is_mirrored = torch.allclose(after, before.flip(-1), atol=1e-4)
        assert is_mirrored or torch.allclose(after, before, atol=1e-4)
        mirrored += is_mirrored
    assert 70 < mirrored < 130  # 100 ± 4 standard deviations


def test_scale_jitter_resizes_the_chosen_share() -> None:
    """On a ramp, bilinear sampling is exact: pixel j of a crop shows position left + (j + ½)·share − ½."""
    ramp = (2 * torch.arange(100)).to(torch.uint8).view(1, 1, 1, 100, 1).expand(80, 1, 100, -1, 3)
    config = replace(PLAIN, crop_size=50, scale_jitter=True, scales=(1.0, 0.875, 0.66))
    rows = to_pixels(view(ramp, config))[:, 0, 25, :, 0]
    expected = {
        side: 2 * ((100 - side) / 2 + (np.arange(50) + 0.5) * side / 50 - 0.5)
        for side in (100, 88, 66)  # 87.5 rounds to the even number
    }
    found = set()
    for row in rows:
        side = min(expected, key=lambda side: np.abs(row - expected[side]).max())
        np.testing.assert_allclose(row, expected[side], atol=1e-2)
        found.add(side)
    assert found == {100, 88, 66}


def test_boxes_stay_inside_the_frame() -> None:
    boxes = draw_boxes(500, 128, 171, AugmentConfig(), Generator().manual_seed(0))
    left, top, width, height = boxes.unbind(1)
    right = torch.maximum(left, left + width)
    left = torch.minimum(left, left + width)
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 171
    assert (top + height).max() <= 128
    assert set(height.tolist()) == {128, 112, 96, 84}
    assert torch.equal(width.abs(), height)


def test_channel_replication() -> None:
    """Three equal channels, each a copy of one; each of the three as often, in a share p of the clips."""
    clips = random_clips(batch=3000, frames=1, height=4, width=4)
    config = replace(
        PLAIN, crop_size=4, channel_replication=True, channel_replication_probability=0.3
    )
    plain, replicated = view(clips, replace(PLAIN, crop_size=4)), view(clips, config)
    counts = {"untouched": 0, 0: 0, 1: 0, 2: 0}
    for before, after in zip(plain, replicated, strict=True):
        if torch.allclose(after, before, atol=1e-4):
            counts["untouched"] += 1
            continue
        torch.testing.assert_close(after, after[:1].expand_as(after), rtol=0, atol=1e-5)
        source = [c for c in range(3) if torch.allclose(after[0], before[c], atol=1e-4)]
        counts[source[0]] += 1
    assert counts["untouched"] == pytest.approx(2100, abs=101)  # 4 standard deviations
    for channel in range(3):
        assert counts[channel] == pytest.approx(300, abs=66)


@pytest.mark.parametrize(("probability", "replicated"), [(0.0, 0), (1.0, 50)])
def test_certain_channel_replication(probability: float, replicated: int) -> None:
    config = replace(PLAIN, channel_replication=True, channel_replication_probability=probability)
    views = view(random_clips(batch=50), config)
    equal = [torch.allclose(v[0], v[1], atol=1e-5) for v in views]
    assert sum(equal) == replicated


def test_replication_copies_a_jittered_channel() -> None:
    """Both may happen to a clip: the grey that all channels show is one of the changed colours."""
    clips = random_clips(batch=9)
    jitter = replace(PLAIN, color_jitter=True, color_jitter_probability=1.0)
    both = replace(jitter, channel_replication=True, channel_replication_probability=1.0)
    # Contrast acts last and about the clip's own grey, which replication changes.
    jitter, both = replace(jitter, contrast=0.0), replace(both, contrast=0.0)
    for before, after in zip(view(clips, jitter), view(clips, both), strict=True):
        assert any(torch.allclose(after, before[c : c + 1], atol=1e-4) for c in range(3))


def recolor(
    pixels: np.ndarray, brightness: float, contrast: float, saturation: float, turns: float
) -> np.ndarray:
    """Grey levels [T, h, w, 3] of one clip, pixel by pixel: saturation, hue, brightness, contrast."""

    def luma(rgb: np.ndarray) -> float:
        return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]

    changed = []
    for rgb in pixels.reshape(-1, 3):
        y = luma(rgb)
        r, g, b = (y + saturation * (value - y) for value in rgb)
        i = 0.596 * r - 0.274 * g - 0.322 * b
        q = 0.211 * r - 0.523 * g + 0.312 * b
        chroma, angle = math.hypot(i, q), math.atan2(q, i) + 2 * math.pi * turns
        i, q = chroma * math.cos(angle), chroma * math.sin(angle)
        turned = [  # the inverse of YIQ as it is printed in colour handbooks, to three digits
            y + 0.956 * i + 0.619 * q,
            y - 0.272 * i - 0.647 * q,
            y - 1.106 * i + 1.703 * q,
        ]
        changed.append([brightness * value for value in turned])
    grey = sum(luma(rgb) for rgb in changed) / len(changed)
    changed = [[grey + contrast * (value - grey) for value in rgb] for rgb in changed]
    return np.clip(changed, 0, 255).reshape(pixels.shape)


def test_colors_against_pixel_arithmetic() -> None:
    """The draws are replayed from the generator; what they do to a pixel is computed step by step."""
    clips = random_clips(batch=8, frames=2)
    config = replace(
        PLAIN, color_jitter=True, brightness=0.4, contrast=0.3, saturation=0.6, hue=0.2
    )
    generator = Generator().manual_seed(11)
    draw = (torch.rand(4, 8, generator=generator) * 2 - 1).double()
    jittered = torch.rand(8, generator=generator) < 0.8
    assert 0 < jittered.sum() < 8
    pixels = to_pixels(view(clips, config, seed=11))
    for i in range(8):
        b, c, s, h = (draw[:, i] * jittered[i]).tolist()
        crop = clips[i, :, 2:22, 6:26].double().numpy()
        expected = recolor(crop, 1 + 0.4 * b, 1 + 0.3 * c, 1 + 0.6 * s, 0.2 * h)
        np.testing.assert_allclose(pixels[i], expected, atol=1.0)  # the three digits above


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_color_change_alone(name: str) -> None:
    """What a change must leave alone, and that it is there."""
    none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    config = replace(PLAIN, color_jitter=True, color_jitter_probability=1.0, **{**none, name: 0.2})
    clips = random_clips(batch=4) // 4 + 96  # far from black and white: nothing is cut off
    before, after = to_pixels(view(clips, PLAIN)), to_pixels(view(clips, config))
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs(before - after).max() > 2
    for x, y in zip(before, after, strict=True):
        if name == "brightness":
            assert np.ptp(y / x) < 1e-3
        elif name == "contrast":
            slope = np.ptp(y) / np.ptp(x)
            assert (y @ luma).mean() == pytest.approx((x @ luma).mean(), abs=1e-2)
            np.testing.assert_allclose(y - y.mean(), slope * (x - x.mean()), atol=1e-2)
        else:
            np.testing.assert_allclose(y @ luma, x @ luma, atol=1e-2)


def test_color_jitter_probability() -> None:
    clips = random_clips(batch=2000, frames=1, height=4, width=4)
    config = replace(PLAIN, crop_size=4, color_jitter=True, color_jitter_probability=0.8)
    changed = (view(clips, config) - view(clips, replace(PLAIN, crop_size=4))).abs() > 1e-4
    assert changed.flatten(1).any(1).sum().item() == pytest.approx(1600, abs=72)


def test_crop_larger_than_the_frame() -> None:
    with pytest.raises(InputError, match="crop_size is 25, larger than the 24 × 32 frames"):
        view(random_clips(), replace(EVERYTHING, crop_size=25))
    assert view(random_clips(), replace(EVERYTHING, crop_size=24)).shape[-1] == 24


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_size": 0},
        {"scales": ()},
        {"scales": (1.0, 1.5)},
        {"color_jitter_probability": -0.1},
        {"channel_replication_probability": 1.1},
        {"brightness": 1.5},
        {"hue": 0.6},
    ],
)
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(wrong))} is"):
        replace(EVERYTHING, **wrong)


def test_center_square() -> None:
    frames = np.arange(2 * 9 * 12).reshape(2, 9, 12, 1)
    np.testing.assert_array_equal(center_square(frames, 5), frames[:, 2:7, 3:8])
