"""Read the lists and the folders of Kinetics-400 as the usual downloads leave them.

    ROOT/**/<any name>.csv      columns label, youtube_id, time_start, time_end, split
    ROOT/**/<youtube_id>_000001_000011.mp4      start and end in seconds

A video is found by its name alone, so the folders may be train/<class>/, train_256/, or anything. A list
without the column `split` is named after it (val.csv). Rows without a label (the first test list had
none) are left out. Every copy of Kinetics lacks videos: those are listed as missing.
"""

import csv
import os
import re
from pathlib import Path

from hdc.data.listing import LISTS, Listed, evaluation_splits
from hdc.errors import InputError, reason

COLUMNS = {"youtube_id", "time_start", "time_end"}
# Downloaders leave names such as id_000001_000011.mp4.webm, too.
VIDEO_NAME = re.compile(r"(?P<id>.+)_(?P<start>\d{1,6})_(?P<end>\d{1,6})(\.[A-Za-z]\w*)+")

Clip = tuple[str, int, int]  # YouTube's id, and the seconds between which the clip was cut


def list_kinetics400(root: Path) -> list[Listed]:
    """The clips that the lists of `root` name, in the order of their paths.

    Raises:
        InputError: no list, a row that cannot be read.
    """
    lists, files = _find(root)
    if not lists:
        raise InputError(
            f"{root} has no list of Kinetics-400: a CSV file with the columns youtube_id, time_start and "
            "time_end (for a folder of class folders: hdc-train prepare folder)"
        )
    found: dict[Clip, tuple[str, str]] = {}
    for file in lists:
        for clip, label, part in _read(file):
            # A clip that is listed twice is not trained on if any list evaluates on it.
            if clip not in found or found[clip][1] == "train":
                found[clip] = (label, part)
    splits = evaluation_splits({part for _, part in found.values()})
    videos = []
    for clip, (label, part) in found.items():
        name = f"{clip[0]}_{clip[1]:06}_{clip[2]:06}.mp4"
        path = files.get(clip, f"{part}/{label}/{name}")
        videos.append(Listed(path, label, splits[part], clip not in files))
    return sorted(videos, key=lambda video: video.path)


def _find(root: Path) -> tuple[list[Path], dict[Clip, str]]:
    """The lists below `root`, and where each clip's file is, in one walk."""
    lists = []
    files: dict[Clip, str] = {}
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".csv"):
                if _header(path) >= COLUMNS:
                    lists.append(path)
            elif not name.startswith(".") and (match := VIDEO_NAME.fullmatch(name)):
                clip = (match["id"], int(match["start"]), int(match["end"]))
                if clip not in files or not files[clip].endswith(
                    ".mp4"
                ):  # beside id_1_11.info.json
                    files[clip] = path.relative_to(root).as_posix()
    return lists, files


def _header(file: Path) -> set[str]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            return set(next(csv.reader(lines), []))
    except (OSError, UnicodeDecodeError, csv.Error):
        return set()  # some other file; a list that is needed will be missed and asked for


def _read(file: Path) -> list[tuple[Clip, str, str]]:
    """The clips of a list with their labels and parts."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            numbered = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {file}: {reason(error)}") from error
    rows = []
    for number, row in numbered:
        part = LISTS.get((row.get("split") or "").strip() or _part_in_name(file))
        try:
            clip = (
                row["youtube_id"].strip(),
                int(float(row["time_start"])),
                int(float(row["time_end"])),
            )
        except (ValueError, OverflowError, TypeError, AttributeError):
            part = None
        if part is None:
            raise InputError(
                f"{file}, line {number}: {','.join(map(str, row.values()))!r} is not of the form "
                "'abseiling,0347ZoDXyP0,95,105,train' (or val, or test)"
            )
        label = (row.get("label") or "").strip()
        if label:
            rows.append((clip, label, part))
    return rows


def _part_in_name(file: Path) -> str:
    """The part that a list is named after: val for kinetics_val.csv."""
    words = re.findall("[a-z]+", file.stem.lower())
    return next((word for word in words if word in LISTS), "")
