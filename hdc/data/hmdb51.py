"""Read the folders and the split files of HMDB51 as they come from the download.

    ROOT/<class>/<video>.avi, or one folder deeper (ROOT/hmdb51_org/<class>/...)
    ROOT/testTrainMulti_7030_splits/<class>_test_split1.txt        "<video>.avi 1"

In a split file, 1 is train (70 videos of a class), 2 is test (30), 0 is not used in this split.
"""

import re
from pathlib import Path

from hdc.data.listing import FolderEntries, Listed, read_lines
from hdc.data.manifest import Part
from hdc.errors import InputError

CODES: dict[str, Part | None] = {"0": None, "1": "train", "2": "test"}
LIST_NAME = re.compile(r"(?P<name>.+)_test_split(?P<split>[1-9])\.txt")


def list_hmdb51(root: Path) -> list[Listed]:
    """The videos that the split files of `root` name, in the order of their paths.

    Raises:
        InputError: no split files, no class folders, a line of another form.
    """
    folders = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
    lists = [
        (match["name"], f"split{match['split']}", file)
        for folder in folders
        for file in sorted(folder.iterdir())
        if (match := LIST_NAME.fullmatch(file.name))
    ]
    if not lists:
        raise InputError(
            f"{root} is not laid out like HMDB51: neither it nor a folder in it has split files "
            "(<class>_test_split1.txt)"
        )
    names = sorted({name for name, _, _ in lists})
    videos = max(folders, key=lambda folder: sum((folder / name).is_dir() for name in names))
    classes = FolderEntries(videos)
    if not any(classes.find(name) for name in names):
        raise InputError(
            f"{root} is not laid out like HMDB51: it has split files, but no folder {names[0]} with videos"
        )
    parts: dict[Path, dict[str, Part]] = {}
    for name, split, file in lists:
        entries = FolderEntries(classes.find(name) or videos / name)
        for line in read_lines(file):
            video, _, code = line.rpartition(" ")
            if not video or code not in CODES:
                raise InputError(f"{file}: {line!r} is not of the form 'video.avi 1' (or 2, or 0)")
            path = entries.find(video.strip()) or entries.folder / video.strip()
            part = CODES[code]
            parts.setdefault(path, {}).update({split: part} if part else {})
    return [
        Listed(path.relative_to(root).as_posix(), path.parent.name, parts[path], not path.is_file())
        for path in sorted(parts)
    ]
