"""Finetuning and testing over splits: the commands' own numbers, their mean, and going on after a kill."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hdc import results, splits
from hdc.cli import main
from hdc.config import RecognizeConfig, finetune_augment
from hdc.data.clips import ClipConfig
from hdc.data.manifest import Manifest
from hdc.data.synthetic import make_dataset
from hdc.errors import InputError
from hdc.splits import recognize

TINY = ["--backbone=tiny", "--clips.size=32", "--device=cpu"]
TRAIN = [*TINY, "--augment.crop_size=28", "--batch_size=5", "--epochs=2", "--checkpoint_every=1"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Three splits of fifteen videos: each has ten to train with and five to test with."""
    manifest = make_dataset(tmp_path_factory.mktemp("videos"), train=10, test=5, seed=0)[0]
    first = manifest.columns["split1"]
    order = np.argsort(manifest.columns["label"], kind="stable")  # three of a class, side by side
    for split in (2, 3):
        part = np.full(len(manifest), "train", dtype=first.dtype)
        part[order[split - 2 :: 3]] = "test"
        manifest.columns[f"split{split}"] = part
    manifest.write()
    return manifest


@pytest.fixture
def config(videos: Manifest, tmp_path: Path) -> RecognizeConfig:
    return RecognizeConfig(
        data=str(videos.source),
        out=str(tmp_path / "run"),
        backbone="tiny",
        clips=ClipConfig(size=32),
        augment=finetune_augment(28),
        batch_size=5,
        epochs=2,
        checkpoint_every=1,
        device="cpu",
    )


def test_it_is_finetune_and_test(
    videos: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights and predictions as by hand; the mean counts every split the same."""
    data = f"--data={videos.source}"
    assert main(["recognize", data, f"--out={tmp_path}/run", *TRAIN]) == 0
    shown = capsys.readouterr().out
    hand = [data, f"--out={tmp_path}/hand", "--split=2"]
    assert main(["finetune", *hand, *TRAIN]) == 0
    weights = f"--checkpoint={tmp_path}/hand/checkpoint.pt"
    assert main(["test", *hand, weights, "--crop_size=28", *TINY]) == 0
    ours, theirs = (
        json.loads((tmp_path / folder / "test.json").read_text())
        for folder in ("run/split2", "hand")
    )
    for name in ("predictions", "video_accuracy", "clip_accuracy"):
        assert ours[name] == theirs[name]
    found = json.loads((tmp_path / "run/recognition.json").read_text())
    assert list(found["splits"]) == ["1", "2", "3"]
    for name in ("video_accuracy", "clip_accuracy"):
        values = [
            json.loads((tmp_path / f"run/split{split}/test.json").read_text())[name]
            for split in (1, 2, 3)
        ]
        assert [split[name] for split in found["splits"].values()] == values
        assert found["mean"][name] == pytest.approx(sum(values) / 3)
        assert f"{100 * found['mean'][name]:.1f}" in shown
    assert {split["videos"] for split in found["splits"].values()} == {5}


def test_an_interrupted_one_goes_on(
    videos: Manifest, config: RecognizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recognize(replace(config, out=str(tmp_path / "whole")), videos)
    tested: list[int] = []

    def interrupted(config: splits.TestConfig, manifest: Manifest) -> object:
        tested.append(config.split)
        if len(tested) == 2:
            raise KeyboardInterrupt
        return test(config, manifest)

    test = splits.test
    monkeypatch.setattr(splits, "test", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recognize(config, videos)
    with pytest.raises(InputError, match="add --resume"):
        recognize(config, videos)
    assert recognize(replace(config, resume=True), videos) == whole
    assert tested == [1, 2, 2, 3]  # what was done is not done again
    (Path(config.out) / "split3" / "test.json").unlink()
    assert recognize(replace(config, resume=True), videos) == whole
    assert tested == [1, 2, 2, 3, 3]


def test_a_result_of_something_else_is_not_taken(videos: Manifest, config: RecognizeConfig) -> None:
    """Other options, other weights: the file is there, and does not count."""
    config = replace(config, splits=(1,), epochs=1)
    recognize(config, videos)
    assert results.finished(config, results.RECOGNITION)
    assert results.finished(replace(config, workers=1, out=config.out), results.RECOGNITION)
    assert not results.finished(replace(config, corners="square"), results.RECOGNITION)
    weights = Path(config.out) / "split1" / "checkpoint.pt"
    given = replace(config, checkpoint=str(weights))
    results.write(given, results.RECOGNITION, {})
    assert results.finished(given, results.RECOGNITION)
    weights.write_bytes(b"other weights")
    assert not results.finished(given, results.RECOGNITION)


def test_a_result_on_other_videos_is_not_taken(
    videos: Manifest, config: RecognizeConfig, tmp_path: Path
) -> None:
    """The same path, but one video less in the manifest."""
    manifest = tmp_path / "manifest.csv"
    lines = videos.source.read_text().replace("UCF-101", str(videos.source.parent / "UCF-101"))
    manifest.write_text(lines)
    config = replace(config, data=str(manifest))
    results.write(config, results.RECOGNITION, {})
    assert results.finished(config, results.RECOGNITION)
    manifest.write_text("".join(lines.splitlines(keepends=True)[:-1]))
    assert not results.finished(config, results.RECOGNITION)


def test_finished_says_what_would_be_read(videos: Manifest, config: RecognizeConfig) -> None:
    """Nothing while a split, an epoch or a test is left; then the result, whatever splits it is asked for."""
    config = replace(config, splits=(1, 2), epochs=1, resume=True)
    assert splits.finished(config, videos) is None
    result = recognize(config, videos)
    assert splits.finished(config, videos) == result
    first = splits.finished(replace(config, splits=(1,)), videos)
    assert first is not None
    assert first.video_accuracy == result.splits[1].video_accuracy
    assert splits.finished(replace(config, splits=(1, 3)), videos) is None
    assert splits.finished(replace(config, epochs=2), videos) is None
    with pytest.raises(InputError, match="made with different seed; repeat what"):
        splits.finished(replace(config, seed=1), videos)
    (Path(config.out) / "split2" / "test.json").unlink()
    assert splits.finished(config, videos) is None


def test_other_weights_are_not_gone_on_with(
    videos: Manifest, config: RecognizeConfig, tmp_path: Path
) -> None:
    """A finetuning that began with other weights than its checkpoint holds now is refused."""
    weights = tmp_path / "pretrained" / "checkpoint.pt"
    first = replace(config, splits=(1,), epochs=1)
    recognize(replace(first, out=str(tmp_path / "other")), videos)
    weights.parent.mkdir()
    weights.write_bytes((tmp_path / "other/split1/checkpoint.pt").read_bytes())
    given = replace(first, checkpoint=str(weights.parent), resume=True)
    recognize(given, videos)
    assert splits.finished(given, videos)
    recognize(replace(first, out=str(tmp_path / "third"), seed=1), videos)
    weights.write_bytes((tmp_path / "third/split1/checkpoint.pt").read_bytes())
    with pytest.raises(InputError, match="made with different pretrained weights"):
        recognize(given, videos)
