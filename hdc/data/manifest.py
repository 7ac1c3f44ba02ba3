"""The list of videos that everything else works from: a CSV file, one row per video (or part of one).

Columns:
    path        file, absolute or relative to the manifest's folder
    start       first frame of the part that the row stands for (0 where the column is missing)
    frames      number of frames from there on
    label       class name; further columns of class names may stand beside it, under any name
    split1 ...  "train", "test" or empty, one column per split
    fps, width, height, sha256
                of the file; `hdc-train prepare` writes them, and nothing needs them to train
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hdc.atomic import write_text
from hdc.errors import InputError, reason

Part = Literal["train", "test"]
MANIFEST = "manifest.csv"
MOST_DIGITS = 18  # of a number: it must fit into int64, and so must start + frames
OF_THE_FILE = ("fps", "width", "height", "sha256")


@dataclass(frozen=True)
class Labels:
    """Class numbers [rows], counting from 0, and the names they stand for."""

    ids: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Parallel arrays, one entry per row. Arrays, not objects: workers share them without copying."""

    source: Path
    path: np.ndarray
    start: np.ndarray
    frames: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.path)

    def file(self, row: int) -> Path:
        """Where the row's video lies."""
        return self.source.parent / str(self.path[row])

    def rows(self, part: Part, split: int) -> "Manifest":
        """The rows of one part of one split, in the manifest's order."""
        column = f"split{split}"
        if column not in self.columns:
            given = [name for name in self.columns if name.startswith("split")]
            raise InputError(
                f"{self.source} has no column {column}; it has {', '.join(given) or 'no splits'}"
            )
        keep = np.flatnonzero(self.columns[column] == part)
        if not len(keep):
            raise InputError(f"{self.source}: split {split} has no {part} videos")
        return self.take(keep)

    def take(self, rows: np.ndarray) -> "Manifest":
        """The given rows, in that order."""
        return Manifest(
            self.source,
            self.path[rows],
            self.start[rows],
            self.frames[rows],
            {name: values[rows] for name, values in self.columns.items()},
        )

    def labels(self, column: str, names: Sequence[str] | None = None) -> Labels:
        """The classes in `column`, numbered in the order of `names` (by default their sorted order)."""
        if column not in self.columns:
            given = [
                name
                for name in self.columns
                if not name.startswith("split") and name not in OF_THE_FILE
            ]
            raise InputError(
                f"{self.source} has no column {column!r}; it has {', '.join(given) or 'no labels'}"
            )
        values = self.columns[column]
        if (values == "").any():
            row = int(np.flatnonzero(values == "")[0])
            raise InputError(f"{self.source}: {self.path[row]} has an empty {column!r}")
        names = tuple(names or sorted(set(values.tolist())))
        missing = set(values.tolist()) - set(names)
        if missing:
            raise InputError(f"{self.source}: {_some(sorted(missing))} not among the known classes")
        number = {name: index for index, name in enumerate(names)}
        return Labels(np.array([number[value] for value in values], dtype=np.int64), names)

    def check_files(self) -> None:
        """Raises InputError when a video is missing: better now than after an hour."""
        missing = [str(p) for p in np.unique(self.path) if not (self.source.parent / p).is_file()]
        if missing:
            raise InputError(
                f"{self.source} names {len(missing)} missing "
                f"{'video' if len(missing) == 1 else 'videos'}: {_some(missing)}"
            )

    def check_length(self, clip_frames: int) -> None:
        """Raises InputError when a video is shorter than a clip."""
        short = np.flatnonzero(self.frames < clip_frames)
        if len(short):
            given = [f"{self.path[row]} ({self.frames[row]} frames)" for row in short]
            raise InputError(
                f"{self.source}: {len(short)} shorter than a clip of {clip_frames} frames: "
                f"{_some(given)}; take them out, or set --clips.short_videos loop"
            )

    def digest(self, *columns: str) -> str:
        """SHA-256 of which frames of which files the rows are, in their order, and of the given columns."""
        named = [self.path, self.start, self.frames, *(self.columns[name] for name in columns)]
        rows = zip(*(values.tolist() for values in named), strict=True)
        return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()

    def text(self) -> str:
        """What `write` writes."""
        rows = zip(self.path, self.start, self.frames, *self.columns.values(), strict=True)
        return csv_text(["path", "start", "frames", *self.columns], rows)

    def write(self) -> None:
        """Write it to `source`, whole or not at all."""
        write_text(self.source, self.text())


def manifest_file(data: str) -> Path:
    """The manifest that `data` names, itself or by its folder."""
    path = Path(data)
    return path / MANIFEST if path.is_dir() else path


def csv_text(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A CSV file's content."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def read_manifest(source: Path) -> Manifest:
    """Read a manifest; see the head of this file for its columns."""
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            numbered = [(reader.line_num, line) for line in reader]
    except (OSError, ValueError, csv.Error) as error:  # no UTF-8, a path with a null character
        raise InputError(f"cannot read the manifest {source}: {reason(error)}") from error
    for required in ("path", "frames"):
        if required not in header:
            raise InputError(f"{source} is no manifest: it has no column {required!r}")
    if not numbered:
        raise InputError(f"{source} lists no videos")
    for number, line in numbered:
        if not line["path"]:
            raise InputError(f"{source}, line {number}: path is empty; it must name a video")
    lines = [line for _, line in numbered]
    starts = [(number, line.get("start") or "0") for number, line in numbered]
    frames = [(number, line["frames"]) for number, line in numbered]
    extra = [name for name in header if name not in ("path", "start", "frames")]
    return Manifest(
        source,
        np.array([line["path"] for line in lines]),
        _integers(source, "start", starts, at_least=0),
        _integers(source, "frames", frames, at_least=1),
        {name: np.array([line[name] or "" for line in lines]) for name in extra},
    )


def _integers(
    source: Path, column: str, values: list[tuple[int, str]], at_least: int
) -> np.ndarray:
    """The values, given with their line numbers."""
    for line, value in values:
        digits = value or ""
        if not digits.isdecimal() or len(digits) > MOST_DIGITS or int(digits) < at_least:
            raise InputError(
                f"{source}, line {line}: {column} is {value!r}; it must be an integer of at least "
                f"{at_least}, with at most {MOST_DIGITS} digits"
            )
    return np.array([int(value) for _, value in values], dtype=np.int64)


def _some(items: list[str], limit: int = 3) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
