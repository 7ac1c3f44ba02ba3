"""UCF101's folder as it comes: CRLF, class names that differ in case, names with spaces."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hdc.data.manifest import read_manifest
from hdc.data.ucf101 import index_ucf101
from hdc.errors import InputError

LISTS = {
    "classInd.txt": "1 Archery\r\n2 HandStandPushups\r\n",
    "trainlist01.txt": "Archery/v_a g1 (2).avi 1\r\nHandStandPushups/v_h_g01.avi 2\r\n\r\n",
    "testlist01.txt": "Archery/v_a, b.avi\r\n",
}


@pytest.fixture
def root(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    for name, frames in (
        ("Archery/v_a g1 (2).avi", 3),
        ("Archery/v_a, b.avi", 4),
        ("HandstandPushups/v_h_g01.avi", 5),
        ("HandstandPushups/unlisted.avi", 2),
    ):
        write_video(tmp_path / "UCF-101" / name, frames, width=16, height=16)
    (tmp_path / "ucfTrainTestlist").mkdir()
    for name, text in LISTS.items():
        replace_list(tmp_path, name, text)
    return tmp_path


def replace_list(root: Path, name: str, text: str) -> None:
    (root / "ucfTrainTestlist" / name).write_bytes(text.encode())


def test_index(root: Path) -> None:
    steps: list[tuple[int, int]] = []
    manifest = index_ucf101(root, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert manifest.source == root / "manifest.csv"
    assert not manifest.source.exists()
    manifest.write()
    manifest = read_manifest(manifest.source)
    assert manifest.path.tolist() == [
        "UCF-101/Archery/v_a g1 (2).avi",
        "UCF-101/Archery/v_a, b.avi",
        "UCF-101/HandstandPushups/v_h_g01.avi",
    ]
    assert manifest.frames.tolist() == [3, 4, 5]
    assert manifest.start.tolist() == [0, 0, 0]
    # The class is the folder's name, not the lists' spelling.
    assert manifest.columns["label"].tolist() == ["Archery", "Archery", "HandstandPushups"]
    assert manifest.columns["split1"].tolist() == ["train", "test", "train"]
    assert set(manifest.columns) == {"label", "split1"}
    manifest.check_files()


def test_more_splits(root: Path) -> None:
    replace_list(root, "trainlist03.txt", "Archery/v_a, b.avi 1\n")
    replace_list(root, "testlist03.txt", "HandStandPushups/v_h_g01.avi\n")
    manifest = index_ucf101(root)
    assert set(manifest.columns) == {"label", "split1", "split3"}
    assert manifest.columns["split3"].tolist() == ["", "train", "test"]


@pytest.mark.parametrize("folder", ["UCF-101", "ucfTrainTestlist"])
def test_missing_folder(folder: str, root: Path) -> None:
    (root / folder).rename(root / "elsewhere")
    with pytest.raises(InputError, match=f"has no folder {folder}"):
        index_ucf101(root)


@pytest.mark.parametrize("name", LISTS)
def test_missing_list(name: str, root: Path) -> None:
    (root / "ucfTrainTestlist" / name).unlink()
    with pytest.raises(InputError, match=rf"cannot read .*{name}: no such file"):
        index_ucf101(root)


def test_half_a_split(root: Path) -> None:
    replace_list(root, "trainlist02.txt", "Archery/v_a, b.avi 1\n")
    with pytest.raises(InputError, match=r"cannot read .*testlist02\.txt"):
        index_ucf101(root)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classInd.txt", "Archery\n", "'Archery' is not of the form '1 ApplyEyeMakeup'"),
        ("classInd.txt", "1 Archery\n2 Yoga\n", "lists no video of class Yoga"),
        ("trainlist01.txt", "v_a.avi 1\n", "'v_a.avi 1' is not of the form 'Class/video.avi'"),
        (
            "trainlist01.txt",
            "Yoga/v.avi 1\nHandStandPushups/v_h_g01.avi 2\n",
            "names UCF-101/Yoga/v.avi, which is missing",
        ),
        ("testlist01.txt", "Archery/v_x.avi\n", "names UCF-101/Archery/v_x.avi, which is missing"),
        (
            "trainlist01.txt",
            "Archery/v_a g1 (2).avi 1\n",
            "lists no video of class HandStandPushups",
        ),
    ],
)
def test_wrong_lists(name: str, text: str, message: str, root: Path) -> None:
    replace_list(root, name, text)
    with pytest.raises(InputError, match=message):
        index_ucf101(root)


def test_video_in_both_lists(root: Path) -> None:
    """A test video that was trained on would spoil every number."""
    replace_list(root, "testlist01.txt", LISTS["testlist01.txt"] + "Archery/v_a g1 (2).avi\r\n")
    with pytest.raises(InputError, match=r"v_a g1 \(2\).avi is in the train and the test list"):
        index_ucf101(root)


def test_corrupt_video(root: Path) -> None:
    (root / "UCF-101/Archery/v_a, b.avi").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"v_a, b\.avi: "):
        index_ucf101(root)
