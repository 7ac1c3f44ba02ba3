"""The toy dataset: what is constant in a video, what is not, and that its files are as they say."""

from pathlib import Path

import numpy as np
import pytest

from hdc.data.manifest import Manifest, read_manifest
from hdc.data.synthetic import MOTIONS, TEXTURES, make_dataset
from hdc.data.ucf101 import index_ucf101
from hdc.data.video import count_frames, read_all

TRAIN, TEST = 20, 5
TAKES, TAKE = 6, 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    make_dataset(root, train=TRAIN, test=TEST, seed=1)
    return root


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fixed")
    make_dataset(root, train=5, test=5, seed=0, fixed_appearance=True)
    return root


def takes_of(video: Path) -> np.ndarray:
    """float [take, frame, 48, 48, 3] in grey levels."""
    return read_all(video, 48).reshape(TAKES, TAKE, 48, 48, 3).astype(float)


def test_layout(root: Path) -> None:
    folders = sorted(folder.name for folder in (root / "UCF-101").iterdir())
    assert folders == sorted(MOTIONS) == ["Down", "Side", "Spin", "Static", "Up"]
    lists = root / "ucfTrainTestlist"
    assert len((lists / "trainlist01.txt").read_text().splitlines()) == TRAIN
    assert len((lists / "testlist01.txt").read_text().splitlines()) == TEST
    assert (lists / "classInd.txt").read_text().splitlines()[0] == "1 Down"
    videos = list((root / "UCF-101").rglob("*.avi"))
    assert len(videos) == TRAIN + TEST
    assert {count_frames(video) for video in videos} == {TAKES * TAKE}


def test_manifests(root: Path) -> None:
    manifest, takes = read_manifest(root / "manifest.csv"), read_manifest(root / "takes.csv")
    again = index_ucf101(root)
    assert again.path.tolist() == manifest.path.tolist()
    assert again.columns["split1"].tolist() == manifest.columns["split1"].tolist()
    assert len(manifest.rows("train", 1)) == TRAIN
    assert len(takes.rows("test", 1)) == TAKES * TEST
    takes.check_files()
    part_of = dict(zip(manifest.path, manifest.columns["split1"], strict=True))
    for path in manifest.path:
        rows = takes.take(np.flatnonzero(takes.path == path))
        assert rows.start.tolist() == [0, 16, 32, 48, 64, 80]
        assert set(rows.frames) == {TAKE}
        assert set(rows.columns["motion"]) == {path.split("/")[1]}
        assert set(rows.columns["split1"]) == {part_of[path]}
    for motion, looks, both in zip(
        *(takes.columns[name] for name in ("motion", "appearance", "both")), strict=True
    ):
        assert both == f"{motion} {looks}"


def test_motions_are_shared_evenly(root: Path) -> None:
    for part, count in (("train", TRAIN), ("test", TEST)):
        labels = read_manifest(root / "manifest.csv").rows(part, 1).columns["label"]
        assert {name: (labels == name).sum() for name in MOTIONS} == dict.fromkeys(
            MOTIONS, count // 5
        )


def test_appearance_is_drawn_for_every_take(root: Path, fixed: Path) -> None:
    def textures(manifest: Manifest) -> list[list[str]]:
        return [
            manifest.columns["appearance"][manifest.path == path].tolist()
            for path in np.unique(manifest.path)
        ]

    varied = textures(read_manifest(root / "takes.csv"))
    assert {name for video in varied for name in video} == set(TEXTURES)
    assert all(len(set(video)) > 1 for video in varied)
    assert all(len(set(video)) == 1 for video in textures(read_manifest(fixed / "takes.csv")))


def test_static_videos_change_between_takes_only(root: Path, fixed: Path) -> None:
    for folder, changes in ((root, True), (fixed, False)):
        for video in sorted((folder / "UCF-101/Static").iterdir()):
            takes = takes_of(video)
            within = np.abs(np.diff(takes, axis=1)).mean((1, 2, 3, 4))
            across = np.abs(takes[1:, 0] - takes[:-1, -1]).mean((1, 2, 3))
            assert within.max() < 2
            assert (across.min() > 30) if changes else (across.max() < 5)


def displacement(take: np.ndarray) -> np.ndarray:
    """Pixels per frame (right, down): the shift that best maps each frame's middle onto the next."""
    errors = {}
    for down in range(-4, 5):
        for right in range(-4, 5):
            moved = take[1:, 8 + down : 40 + down, 8 + right : 40 + right]
            errors[right, down] = np.abs(moved - take[:-1, 8:40, 8:40]).mean()
    return np.array(min(errors, key=lambda shift: errors[shift]))


def test_motion_is_what_the_folder_says(root: Path) -> None:
    """Every take of a video moves the same way: 0.09 to 0.11 of half a frame is 2.2 to 2.6 pixels."""
    sides = set()
    for motion, axis in (("Up", 1), ("Down", 1), ("Side", 0)):
        for video in sorted((root / "UCF-101" / motion).iterdir()):
            moves = np.array([displacement(take) for take in takes_of(video)])
            along, across = moves[:, axis], moves[:, 1 - axis]
            assert set(np.abs(along)) <= {2, 3}
            assert np.abs(across).max() <= 1
            assert len(set(np.sign(along))) == 1
            direction = int(np.sign(along[0]))
            if motion == "Side":
                sides.add(direction)
            else:
                assert direction == {"Up": -1, "Down": 1}[motion]
    assert sides == {-1, 1}


def test_spin_moves_the_edge_and_not_the_centre(root: Path) -> None:
    for video in sorted((root / "UCF-101/Spin").iterdir()):
        change = np.abs(np.diff(takes_of(video), axis=1)).mean((0, 1, 4))
        assert change[22:26, 22:26].mean() < 0.6 * change.mean()
        assert change.mean() > 5


def test_same_seed_same_videos(root: Path, tmp_path: Path) -> None:
    """A video's pixels depend on the seed and on its number, not on how many videos there are."""
    make_dataset(tmp_path / "same", train=5, test=5, seed=1)
    make_dataset(tmp_path / "other", train=5, test=5, seed=2)
    for name in ("Up/v_Up_g01_c01.avi", "Spin/v_Spin_g01_c02.avi"):
        frames = read_all(root / "UCF-101" / name, 48)
        np.testing.assert_array_equal(read_all(tmp_path / "same/UCF-101" / name, 48), frames)
        other = read_all(tmp_path / "other/UCF-101" / name, 48)
        assert np.abs(other.astype(float) - frames).mean() > 10


def test_train_and_test_share_no_video(root: Path) -> None:
    manifest = read_manifest(root / "manifest.csv")
    frames = [read_all(manifest.file(row), 48, 0, 1).tobytes() for row in range(len(manifest))]
    assert len(set(frames)) == TRAIN + TEST
