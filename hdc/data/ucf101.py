"""Read the folder and the split files of UCF101 as they come from the download.

    ROOT/UCF-101/<Class>/v_<Class>_g01_c01.avi
    ROOT/ucfTrainTestlist/classInd.txt          "1 ApplyEyeMakeup"
    ROOT/ucfTrainTestlist/trainlist01.txt       "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1"
    ROOT/ucfTrainTestlist/testlist01.txt        "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"

Lines may end in CRLF. A class folder may differ from the split files in case (HandstandPushups in one,
HandStandPushups in the other); the folder on the disk gives the name.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from hdc.data.manifest import Manifest
from hdc.data.video import count_frames
from hdc.errors import InputError

VIDEOS, LISTS = "UCF-101", "ucfTrainTestlist"


def index_ucf101(
    root: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Manifest:
    """Build the manifest of `root` (its `source` is ROOT/manifest.csv, not yet written).

    Args:
        root: the folder that holds `UCF-101` and `ucfTrainTestlist`.
        progress: called with the videos counted so far and their number; counting reads every file.

    Raises:
        InputError: a missing folder or list, a line that names a missing video, a class with no
            videos, a file that cannot be read as a video.
    """
    for folder in (root / VIDEOS, root / LISTS):
        if not folder.is_dir():
            raise InputError(
                f"{root} is not laid out like UCF101: it has no folder {folder.name} "
                "(give a manifest file, or a folder with UCF-101 and ucfTrainTestlist in it)"
            )
    folders = {
        folder.name.casefold(): folder for folder in (root / VIDEOS).iterdir() if folder.is_dir()
    }
    classes = _classes(root / LISTS / "classInd.txt", folders)

    parts: dict[str, dict[Path, str]] = {}
    for split in (1, 2, 3):
        lists = {part: root / LISTS / f"{part}list{split:02}.txt" for part in ("train", "test")}
        if split > 1 and not any(file.exists() for file in lists.values()):
            continue
        listed = {part: _listed(file, folders) for part, file in lists.items()}
        both = set(listed["train"]) & set(listed["test"])
        if both:
            raise InputError(
                f"{root / LISTS}: {min(both).name} is in the train and the test list of split {split}"
            )
        parts[f"split{split}"] = {video: part for part in listed for video in listed[part]}
    videos = sorted({video for column in parts.values() for video in column})
    empty = sorted(set(classes) - {video.parent.name for video in videos})
    if empty:
        raise InputError(f"{root / LISTS} lists no video of class {empty[0]}")

    frames = []
    for done, video in enumerate(videos, start=1):
        frames.append(count_frames(video))
        progress(done, len(videos))
    columns = {"label": np.array([video.parent.name for video in videos])}
    for split_name, part_of in parts.items():
        columns[split_name] = np.array([part_of.get(video, "") for video in videos])
    return Manifest(
        root / "manifest.csv",
        np.array([video.relative_to(root).as_posix() for video in videos]),
        np.zeros(len(videos), dtype=np.int64),
        np.array(frames, dtype=np.int64),
        columns,
    )


def _classes(file: Path, folders: dict[str, Path]) -> list[str]:
    names = []
    for line in _lines(file):
        number, _, name = line.partition(" ")
        if not number.isdecimal() or not name:
            raise InputError(f"{file}: {line!r} is not of the form '1 ApplyEyeMakeup'")
        names.append(_folder(name, folders, file).name)
    return names


def _listed(file: Path, folders: dict[str, Path]) -> list[Path]:
    videos = []
    for line in _lines(file):
        entry = line.rsplit(" ", 1)[0] if line.rsplit(" ", 1)[-1].isdecimal() else line
        name, slash, video = entry.partition("/")
        if not slash:
            raise InputError(f"{file}: {line!r} is not of the form 'Class/video.avi'")
        path = _folder(name, folders, file) / video
        if not path.is_file():
            raise InputError(f"{file} names {entry}, which is missing")
        videos.append(path)
    return videos


def _folder(name: str, folders: dict[str, Path], file: Path) -> Path:
    try:
        return folders[name.casefold()]
    except KeyError:
        raise InputError(f"{file} names class {name}, which has no folder") from None


def _lines(file: Path) -> list[str]:
    try:
        return [
            line.strip()
            for line in file.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {file}: {reason.lower()}") from error
