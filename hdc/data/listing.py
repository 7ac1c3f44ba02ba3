"""What the lists of a dataset say before any video is opened: every dataset module returns these records."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hdc.data.manifest import Part
from hdc.errors import InputError, reason

# What lists and folders are called, and the list that is meant.
LISTS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Listed:
    """One video, as the lists of its dataset name it.

    Attributes:
        path: below the dataset's folder, with forward slashes; where it should be if it is missing.
        label: class name; empty where there is none.
        parts: "split1" → "train" or "test", for the splits that use the video.
        missing: listed, but not on the disk.
    """

    path: str
    label: str
    parts: dict[str, Part]
    missing: bool = False


def label_columns(videos: Sequence[Listed]) -> dict[str, np.ndarray]:
    """The manifest's columns `label`, `split1`, ... of the given videos."""
    columns = {"label": np.array([video.label for video in videos])}
    for split in sorted({split for video in videos for split in video.parts}):
        columns[split] = np.array([video.parts.get(split, "") for video in videos])
    return columns


def evaluation_splits(lists: set[str]) -> dict[str, dict[str, Part]]:
    """How lists called train, val and test become splits: "train" → {"split1": "train", ...}.

    Models are compared on the validation list where there is one: that is split 1, and the test list is
    split 2 beside it.
    """
    split_of = {"val": "split1", "test": "split2" if "val" in lists else "split1"}
    split_of = {name: split for name, split in split_of.items() if name in lists}
    train: dict[str, Part] = dict.fromkeys(split_of.values() or ["split1"], "train")
    return {"train": train, **{name: {split: "test"} for name, split in split_of.items()}}


class FolderEntries:
    """What lies in a folder, found by name; where no name fits exactly, upper and lower case are one."""

    def __init__(self, folder: Path) -> None:
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        self.folder = folder
        self.exact = set(names)
        self.folded = {name.casefold(): name for name in names}

    def find(self, name: str) -> Path | None:
        """The entry's path as it is spelled on the disk."""
        found = name if name in self.exact else self.folded.get(name.casefold())
        return self.folder / found if found else None


def read_lines(file: Path) -> list[str]:
    """The lines of a list that hold something, without the spaces (and CR) around them."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {reason(error)}") from error
    return [line.strip() for line in lines if line.strip()]
