"""Frozen features: which frames they see, how they are pooled, and that no video gets lost."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hdc import checkpoint, features
from hdc.backbones import Backbone, build_backbone
from hdc.config import FeatureConfig
from hdc.data.clips import ClipConfig
from hdc.data.manifest import Manifest
from hdc.data.video import read_all
from hdc.errors import InputError
from hdc.features import clip_starts, cut, extract, load_encoder

CONFIG = FeatureConfig(
    data="", out="", backbone="tiny", clips=ClipConfig(size=32), crop_size=28, device="cpu"
)


class MeanColor(Backbone):
    """Stands in for an encoder: its feature map is the clip itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, clips: Tensor) -> dict[int, Tensor]:
        return {5: clips * self.scale}


def grey(number: int, width: int, height: int) -> np.ndarray:
    """Frame n has the grey level 20 + 4n all over."""
    return np.full((height, width, 3), 20 + 4 * number, np.uint8)


@pytest.mark.parametrize(
    ("frames", "starts"),
    [
        (10, [0]),
        (16, [0]),
        (17, [0] * 9 + [1]),
        (34, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        (48, [0, 3, 7, 10, 14, 17, 21, 24, 28, 32]),
        (1000, [0, 109, 218, 328, 437, 546, 656, 765, 874, 984]),
    ],
)
def test_clip_starts(frames: int, starts: list[int]) -> None:
    """Centre i of 10 is at 8 + i·(L − 16)/9, rounded down; the clip begins 8 frames before."""
    assert clip_starts(frames, 16, 10) == starts
    if frames > 16:
        assert starts == [8 + i * (frames - 16) // 9 - 8 for i in range(10)]


@pytest.mark.parametrize(("frames", "clip", "clips"), [(41, 15, 10), (40, 1, 3), (50, 16, 1)])
def test_clips_lie_inside_the_video(frames: int, clip: int, clips: int) -> None:
    starts = clip_starts(frames, clip, clips)
    assert starts[0] == 0
    assert len(starts) <= clips
    assert starts[-1] == (frames - clip if clips > 1 else 0)


def test_cut() -> None:
    video = np.arange(20)
    assert cut(video, 4, 16).tolist() == list(range(4, 20))
    assert cut(video, 16, 6).tolist() == [16, 17, 18, 19, 16, 17]


@pytest.mark.parametrize(
    ("name", "maximum", "average"),
    [("c3d", 9216, 512), ("r2plus1d-10", 9216, 512), ("resnet3d-18", 2048, 512)],
)
def test_published_feature_sizes(name: str, maximum: int, average: int) -> None:
    with torch.device("meta"):
        feature_map = build_backbone(name)(torch.empty(2, 3, 16, 112, 112))[5]
    assert features._pool(feature_map, "max").shape == (2, maximum)
    assert features._pool(feature_map, "average").shape == (2, average)


def test_pooling() -> None:
    feature_map = torch.randn(2, 3, 2, 5, 7)
    blocks = feature_map[..., :4, :6].numpy().reshape(2, 3, 2, 2, 2, 3, 2)
    expected = blocks.max(axis=(4, 6)).reshape(2, -1)
    np.testing.assert_array_equal(features._pool(feature_map, "max").numpy(), expected)
    average = feature_map.numpy().mean(axis=(2, 3, 4))
    np.testing.assert_allclose(
        features._pool(feature_map, "average"), average, rtol=1e-5, atol=1e-6
    )


def test_mean_over_the_clips(
    tmp_path: Path, write_video: Callable[..., Path], make_manifest: Callable[..., Manifest]
) -> None:
    """Frames are grey, so a feature is the mean grey of the frames that were looked at."""
    rows = []
    for name, frames in (("long", 48), ("exact", 16), ("short", 6)):
        write_video(tmp_path / f"{name}.avi", frames, width=48, height=32, draw=grey)
        rows.append((f"{name}.avi", 0, frames, "a", "test"))
    rows.append(("long.avi", 20, 16, "a", "test"))  # a part of a file
    config = replace(CONFIG, pooling="average", clips=ClipConfig(size=32, short_videos="loop"))
    found = extract(config, MeanColor(), make_manifest(tmp_path, rows), "test").vectors
    long = np.mean([0, 3, 7, 10, 14, 17, 21, 24, 28, 32]) + 7.5
    short = np.mean([n % 6 for n in range(16)])
    levels = [20 + 4 * frame for frame in (long, 7.5, short, 27.5)]
    assert found.shape == (4, 3)
    for channel in range(3):
        assert ((found[:, channel] + 1) * 127.5).tolist() == pytest.approx(levels, abs=3)


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_batching_changes_nothing(
    pooling: str, numbered: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batch is a partial one; each video is compared with itself, encoded alone."""
    torch.manual_seed(0)
    backbone = build_backbone("tiny").eval()
    numbered = numbered.take(np.arange(7))
    numbered.columns["split1"][:] = "train"
    config = replace(CONFIG, pooling=pooling)
    together = extract(config, backbone, numbered, "train")
    assert len(together.vectors) == 7  # 10 clips each: batches of 40 and 30
    assert together.manifest.path.tolist() == numbered.path.tolist()
    assert together.unreadable == []
    monkeypatch.setattr(features, "CLIPS_AT_ONCE", 1)
    alone = extract(config, backbone, numbered, "train").vectors
    torch.testing.assert_close(together.vectors, alone, rtol=1e-4, atol=1e-5)

    video = read_all(numbered.file(6), 32)[:, 2:30, 2:30]
    clips = np.stack([video[s : s + 16] for s in (0, 3, 7, 10, 14, 17, 21, 24, 28, 32)])
    with torch.no_grad():
        last = backbone(torch.from_numpy(clips).permute(0, 4, 1, 2, 3) / 127.5 - 1)[5]
    # The map is 2 × 2, so one window of the max pool covers it.
    last = last.mean((2, 3, 4)) if pooling == "average" else last.amax((3, 4)).flatten(1)
    torch.testing.assert_close(alone[6], last.mean(0), rtol=1e-4, atol=1e-5)


def test_unreadable_videos_are_left_out_and_named(
    tmp_path: Path, write_video: Callable[..., Path], make_manifest: Callable[..., Manifest]
) -> None:
    for name in ("0", "2", "3"):
        write_video(tmp_path / f"{name}.avi", 20, width=32, height=32, draw=grey)
    (tmp_path / "1.avi").write_text("no video")
    rows = [(f"{i}.avi", 0, 30 if i == 3 else 20 - i, "abcd"[i], "test") for i in range(4)]
    found = extract(CONFIG, MeanColor(), make_manifest(tmp_path, rows), "test")
    assert found.manifest.path.tolist() == ["0.avi", "2.avi"]
    assert found.manifest.columns["label"].tolist() == ["a", "c"]
    assert len(found.vectors) == 2
    assert found.vectors[1].mean() < found.vectors[0].mean()  # it has the two lightest frames less
    assert [entry.path for entry in found.unreadable] == [
        str(tmp_path / "1.avi"),
        str(tmp_path / "3.avi"),
    ]
    assert "ends after 20 frames" in found.unreadable[1].reason


def test_nothing_readable(tmp_path: Path, make_manifest: Callable[..., Manifest]) -> None:
    (tmp_path / "a.avi").write_text("no video")
    manifest = make_manifest(tmp_path, [("a.avi", 0, 20, "a", "test")])
    with pytest.raises(InputError, match=r"no video can be decoded, e\.g\. .*a\.avi"):
        extract(CONFIG, MeanColor(), manifest, "test")


def test_mistakes_are_found_before_the_work(
    tmp_path: Path, make_manifest: Callable[..., Manifest]
) -> None:
    gone = make_manifest(tmp_path, [("gone.avi", 0, 20, "a", "test")])
    with pytest.raises(InputError, match=r"1 missing video: gone\.avi"):
        extract(CONFIG, MeanColor(), gone, "test")
    (tmp_path / "gone.avi").touch()
    short = make_manifest(tmp_path, [("gone.avi", 0, 12, "a", "test")])
    with pytest.raises(InputError, match="1 shorter than a clip of 16 frames"):
        extract(CONFIG, MeanColor(), short, "test")


def test_load_encoder(tmp_path: Path, numbered: Manifest) -> None:
    """Random weights follow from the seed; those of a checkpoint replace them."""

    def weights(seed: int, path: str | None = None) -> Tensor:
        return load_encoder(replace(CONFIG, seed=seed), path, numbered).block1[0].weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert not load_encoder(CONFIG, None, numbered).training
    state = {
        f"backbone.{k}": v for k, v in load_encoder(CONFIG, None, numbered).state_dict().items()
    }
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, "pretrain", {"config": asdict(CONFIG), "model": state})
    assert torch.equal(weights(2, str(path)), weights(CONFIG.seed))
