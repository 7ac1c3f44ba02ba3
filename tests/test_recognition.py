"""Testing on videos: crops and clips to the pixel, scores averaged in the order the paper says."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hdc import checkpoint, recognition
from hdc.backbones import build_backbone
from hdc.config import TestConfig as RecognitionConfig
from hdc.data.clips import ClipConfig
from hdc.data.manifest import Manifest
from hdc.errors import InputError
from hdc.finetune import Classifier
from hdc.recognition import five_crops, load_classifier, non_overlapping

CONFIG = RecognitionConfig(
    data="",
    out="",
    checkpoint="",
    backbone="tiny",
    clips=ClipConfig(size=32),
    crop_size=28,
    device="cpu",
)


@pytest.mark.parametrize(
    ("corners", "places"),
    [
        ("frame", [(3, 8), (0, 0), (0, 16), (6, 0), (6, 16)]),
        ("square", [(3, 8), (0, 5), (0, 11), (6, 5), (6, 11)]),
    ],
)
def test_five_crops(corners: str, places: list[tuple[int, int]]) -> None:
    """14 × 14 out of 20 × 30: the centre, then the corners of the frame or of its middle 20 × 20."""
    frames = np.arange(2 * 20 * 30 * 3).reshape(2, 20, 30, 3)
    crops = five_crops(frames, 14, corners=corners)
    assert crops.shape == (5, 2, 14, 14, 3)
    for crop, (top, left) in zip(crops, places, strict=True):
        np.testing.assert_array_equal(crop, frames[:, top : top + 14, left : left + 14])


@pytest.mark.parametrize(
    ("length", "clips"),
    [
        (8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (10, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 8, 9]]),
        (3, [[0, 1, 2, 0]]),
        (5, [[0, 1, 2, 3], [4, 4, 4, 4]]),
    ],
)
def test_non_overlapping(length: int, clips: list[list[int]]) -> None:
    assert non_overlapping(np.arange(length), 4).tolist() == clips


class Brightness(nn.Module):
    """Stands in for a classifier: its logits are 0 and 4·m for a crop of mean m in [−1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, clips: Tensor) -> Tensor:
        mean = clips.mean((1, 2, 3, 4))
        return torch.stack([torch.zeros_like(mean), self.scale * mean], dim=1)


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognition, "load_classifier", lambda *given: (Brightness(), ("a", "b")))


def level(logit: float) -> int:
    """The grey for which `Brightness` gives this logit to class "b"."""
    return round((logit / 4 + 1) * 127.5)


# Name, class, frames, one logit per clip. Probabilities of "b": 0.31 0.31 0.97, mean 0.53;
# 0.18 0.18 0.97, mean 0.45 (logits would have a positive mean); 0.18 0.18; 0.05 0.62, mean 0.33.
VIDEOS = [
    ("tail.avi", "b", 37, (-0.8, -0.8, 3.6)),  # 1 clip of 3 right, video right
    ("softmax.avi", "a", 48, (-1.5, -1.5, 3.5)),  # 2 of 3, right
    ("wrong.avi", "b", 32, (-1.5, -1.5)),  # 0 of 2, wrong
    ("mixed.avi", "a", 32, (-3.0, 0.5)),  # 1 of 2, right
]


@pytest.mark.usefixtures("brightness")
@pytest.mark.parametrize("crop_batch", [3, 40])
def test_scores_are_averaged(
    crop_batch: int,
    tmp_path: Path,
    write_video: Callable[..., Path],
    make_manifest: Callable[..., Manifest],
) -> None:
    for name, _, frames, logits in VIDEOS:

        def draw(
            number: int, width: int, height: int, logits: tuple[float, ...] = logits
        ) -> np.ndarray:
            return np.full((height, width, 3), level(logits[number // 16]), np.uint8)

        write_video(tmp_path / name, frames, width=48, height=32, gop=16, draw=draw)
    (tmp_path / "bad.avi").write_text("no video")
    rows = [(name, 0, frames, label, "test") for name, label, frames, _ in VIDEOS]
    rows.insert(1, ("bad.avi", 0, 20, "a", "test"))
    config = replace(CONFIG, out=str(tmp_path / "out"), crop_batch=crop_batch)
    result = recognition.test(config, make_manifest(tmp_path, rows))
    assert result.video_accuracy == pytest.approx(3 / 4)
    assert result.clip_accuracy == pytest.approx(4 / 10)
    assert (result.videos, result.clips) == (4, 10)
    assert [entry.path for entry in result.unreadable] == [str(tmp_path / "bad.avi")]

    written = json.loads((tmp_path / "out" / "test.json").read_text())
    assert written["video_accuracy"] == result.video_accuracy
    assert written["predictions"] == [
        {"path": "tail.avi", "class": "b", "predicted": "b"},
        {"path": "softmax.avi", "class": "a", "predicted": "a"},
        {"path": "wrong.avi", "class": "b", "predicted": "a"},
        {"path": "mixed.avi", "class": "a", "predicted": "a"},
    ]
    assert [Path(entry["path"]).name for entry in written["unreadable"]] == ["bad.avi"]
    # With two classes, everything is among the first five.
    assert result.video_top5_accuracy is result.clip_top5_accuracy is None
    assert written["video_top5_accuracy"] is written["clip_top5_accuracy"] is None

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scores.npz", "test.json"]
    with np.load(tmp_path / "out" / "scores.npz") as scores:
        assert scores["paths"].tolist() == [name for name, *_ in VIDEOS]
        assert scores["starts"].tolist() == [0, 0, 0, 0]
        assert scores["labels"].tolist() == [1, 0, 1, 0]
        assert scores["classes"].tolist() == ["a", "b"]
        probabilities = scores["probabilities"]
    assert probabilities.dtype == np.float32
    of_b = [np.mean(1 / (1 + np.exp(-np.array(logits)))) for *_, logits in VIDEOS]
    np.testing.assert_allclose(probabilities[:, 1], of_b, atol=0.02)  # the coding's
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)


class Steps(nn.Module):
    """Stands in for a classifier of 7 classes: the nearer a crop's mean grey is to 30 + 30·c, the likelier is c."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(30 + 30 * torch.arange(7.0))

    def forward(self, clips: Tensor) -> Tensor:
        grey = (clips.mean((1, 2, 3, 4)) + 1) * 127.5
        return -(grey[:, None] - self.centres).abs() / 10


def test_top5(
    tmp_path: Path,
    write_video: Callable[..., Path],
    make_manifest: Callable[..., Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greys near class 2, whose ranking is 2, 3, 1, 4, 0, 5, 6, and near class 6, with 6, 5, 4, 3, 2, 1, 0."""
    monkeypatch.setattr(recognition, "load_classifier", lambda *given: (Steps(), tuple("abcdefg")))
    videos = [(92, "c"), (92, "d"), (92, "a"), (92, "f"), (208, "c"), (208, "b"), (208, "g")]
    rows = []
    for number, (grey, label) in enumerate(videos):

        def draw(number: int, width: int, height: int, grey: int = grey) -> np.ndarray:
            return np.full((height, width, 3), grey, np.uint8)

        name = f"{number}.avi"
        write_video(tmp_path / name, 16 + 16 * number, width=32, height=32, draw=draw)
        rows.append((name, 0, 16 + 16 * number, label, "test"))
    config = replace(CONFIG, out=str(tmp_path / "out"))
    result = recognition.test(config, make_manifest(tmp_path, rows))
    assert result.video_accuracy == 2 / 7  # the first and the last
    assert result.clip_accuracy == (1 + 7) / 28
    assert result.video_top5_accuracy == 5 / 7  # not the fourth and the sixth
    assert result.clip_top5_accuracy == (28 - 4 - 6) / 28
    written = json.loads((tmp_path / "out" / "test.json").read_text())
    assert written["video_top5_accuracy"] == result.video_top5_accuracy
    assert written["clip_top5_accuracy"] == result.clip_top5_accuracy


@pytest.mark.usefixtures("brightness")
@pytest.mark.parametrize(("corners", "predicted"), [("frame", "a"), ("square", "b")])
def test_all_five_crops_count(
    corners: str,
    predicted: str,
    tmp_path: Path,
    write_video: Callable[..., Path],
    make_manifest: Callable[..., Manifest],
) -> None:
    """The middle third of a wide frame is light, the rest dark: corners of the frame outvote the centre."""

    def draw(number: int, width: int, height: int) -> np.ndarray:
        image = np.full((height, width, 3), 30, np.uint8)
        image[:, width // 3 : 2 * width // 3] = 230
        return image

    write_video(tmp_path / "v.avi", 16, width=96, height=32, draw=draw)
    manifest = make_manifest(tmp_path, [("v.avi", 0, 16, "b", "test")])
    config = replace(CONFIG, out=str(tmp_path / "out"), corners=corners)
    assert recognition.test(config, manifest).clip_accuracy == float(predicted == "b")


@pytest.mark.usefixtures("brightness")
def test_mistakes(tmp_path: Path, make_manifest: Callable[..., Manifest]) -> None:
    manifest = make_manifest(tmp_path, [("v.avi", 0, 16, "c", "test")])
    with pytest.raises(InputError, match="c not among the known classes"):
        recognition.test(CONFIG, manifest)
    manifest = make_manifest(tmp_path, [("v.avi", 0, 16, "a", "test")])
    with pytest.raises(InputError, match=r"1 missing video: v\.avi"):
        recognition.test(CONFIG, manifest)
    with pytest.raises(InputError, match=r"crop_size is 40, larger than .* short side of 32"):
        replace(CONFIG, crop_size=40)


def test_load_classifier(tmp_path: Path, numbered: Manifest) -> None:
    """The weights and the classes are those that were stored; evaluation has no dropout."""
    trained = Classifier(build_backbone("tiny"), classes=3, dropout=0.5)
    path = tmp_path / "checkpoint.pt"
    state = {"config": asdict(CONFIG), "model": trained.state_dict(), "classes": list("xyz")}
    checkpoint.save(path, "finetune", state)
    model, classes = load_classifier(replace(CONFIG, checkpoint=str(path)), numbered)
    assert classes == ("x", "y", "z")
    clips = torch.rand(2, 3, 16, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(model(clips), trained.eval()(clips))
    with pytest.raises(InputError, match=r"backbone tiny\) do not fit backbone c3d: .* missing"):
        load_classifier(replace(CONFIG, checkpoint=str(path), backbone="c3d"), numbered)
    checkpoint.save(path, "pretrain", state)
    with pytest.raises(InputError, match="is a pretrain checkpoint; a finetune one is needed"):
        load_classifier(replace(CONFIG, checkpoint=str(path)), numbered)
