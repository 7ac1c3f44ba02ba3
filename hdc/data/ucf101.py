"""Read the folder and the split files of UCF101 as they come from the download.

    ROOT/UCF-101/<Class>/v_<Class>_g01_c01.avi
    ROOT/ucfTrainTestlist/classInd.txt          "1 ApplyEyeMakeup"
    ROOT/ucfTrainTestlist/trainlist01.txt       "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1"
    ROOT/ucfTrainTestlist/testlist01.txt        "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"

Lines may end in CRLF. Folders and files may differ from the split files in case (HandstandPushups in one,
HandStandPushups in the other); the folder on the disk gives the name.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from hdc.data.listing import FolderEntries, Listed, label_columns, read_lines
from hdc.data.manifest import MANIFEST, Manifest, Part
from hdc.data.video import count_frames
from hdc.errors import InputError

VIDEOS, LISTS = "UCF-101", "ucfTrainTestlist"
PARTS: tuple[Part, ...] = ("train", "test")


def list_ucf101(root: Path) -> list[Listed]:
    """The videos that the split files of `root` name, in the order of their paths.

    Raises:
        InputError: a missing folder or list, a class without videos, a video in both lists of a split.
    """
    for folder in (root / VIDEOS, root / LISTS):
        if not folder.is_dir():
            raise InputError(
                f"{root} is not laid out like UCF101: it has no folder {folder.name} "
                "(give a manifest, a folder with UCF-101 and ucfTrainTestlist in it, or one that "
                "hdc-train prepare wrote)"
            )
    videos = _Videos(root / VIDEOS)
    classes = _classes(root / LISTS / "classInd.txt")
    parts: dict[Path, dict[str, Part]] = {}
    for split in (1, 2, 3):
        lists = {part: root / LISTS / f"{part}list{split:02}.txt" for part in PARTS}
        if split > 1 and not any(file.exists() for file in lists.values()):
            continue
        for part, file in lists.items():
            for path in _listed(file, videos):
                if parts.setdefault(path, {}).setdefault(f"split{split}", part) != part:
                    raise InputError(
                        f"{root / LISTS}: {path.name} is in the train and the test list of split {split}"
                    )
    listed_classes = {path.parent.name.casefold() for path in parts}
    empty = sorted(name for name in classes if name.casefold() not in listed_classes)
    if empty:
        raise InputError(f"{root / LISTS} lists no video of class {empty[0]}")
    return [
        Listed(path.relative_to(root).as_posix(), path.parent.name, parts[path], not path.is_file())
        for path in sorted(parts)
    ]


def index_ucf101(
    root: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Manifest:
    """Build the manifest of `root` (its `source` is ROOT/manifest.csv, not yet written).

    Args:
        root: the folder that holds `UCF-101` and `ucfTrainTestlist`.
        progress: called with the videos counted so far and their number; counting reads every file.

    Raises:
        InputError: as `list_ucf101`; a missing video, a file that cannot be read as a video.
    """
    videos = list_ucf101(root)
    for video in videos:
        if video.missing:
            raise InputError(
                f"{root / LISTS} names {video.path}, which is missing "
                "(hdc-train prepare leaves out and reports what it cannot read)"
            )
    frames = []
    for done, video in enumerate(videos, start=1):
        frames.append(count_frames(root / video.path))
        progress(done, len(videos))
    return Manifest(
        root / MANIFEST,
        np.array([video.path for video in videos]),
        np.zeros(len(videos), dtype=np.int64),
        np.array(frames, dtype=np.int64),
        label_columns(videos),
    )


class _Videos:
    """Finds the file behind "Class/video.avi", each folder read once."""

    def __init__(self, folder: Path) -> None:
        self.classes = FolderEntries(folder)
        self.entries: dict[Path, FolderEntries] = {}

    def find(self, class_name: str, video: str) -> Path:
        folder = self.classes.find(class_name) or self.classes.folder / class_name
        if folder not in self.entries:
            self.entries[folder] = FolderEntries(folder)
        return self.entries[folder].find(video) or folder / video


def _classes(file: Path) -> list[str]:
    names = []
    for line in read_lines(file):
        number, _, name = line.partition(" ")
        if not number.isdecimal() or not name:
            raise InputError(f"{file}: {line!r} is not of the form '1 ApplyEyeMakeup'")
        names.append(name)
    return names


def _listed(file: Path, videos: _Videos) -> list[Path]:
    paths = []
    for line in read_lines(file):
        entry = line.rsplit(" ", 1)[0] if line.rsplit(" ", 1)[-1].isdecimal() else line
        name, slash, video = entry.partition("/")
        if not slash:
            raise InputError(f"{file}: {line!r} is not of the form 'Class/video.avi'")
        paths.append(videos.find(name, video))
    return paths
