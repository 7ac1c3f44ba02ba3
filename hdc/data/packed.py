"""A dataset decoded once, for disks that have the room: training then reads pixels instead of videos.

    manifest.packed-128/pack.json       which manifest it is of, and how large the shards are
    manifest.packed-128/00000.u8, ...   the frames, uint8 [frames, height, width, 3], one row after the other

A frame of 170 × 128 takes 65 kB: UCF101's 2.5 million take 160 GB, Kinetics-400 is out of the question. Where a
row begins follows from the manifest's frames, widths and heights. The frames are those that decoding gives, to the
last bit, so clips are the same with a pack and without.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hdc import atomic
from hdc.data.manifest import OF_THE_FILE, Manifest, csv_text, read_manifest
from hdc.data.video import Frames, resized
from hdc.errors import InputError

PLAN = "pack.json"
SHARD_BYTES = 2**30  # a shard is full when the next row would make it larger


@dataclass(frozen=True)
class Layout:
    """Where each row of a manifest lies: arrays [rows], and the shards' sizes in bytes."""

    width: np.ndarray
    height: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    sizes: tuple[int, ...]


class Pack:
    """The pack of a manifest for one `short_side`, whole or not."""

    def __init__(self, manifest: Manifest, short_side: int) -> None:
        """`manifest` with all its rows.

        Raises:
            InputError: it does not say how large its videos are.
        """
        self.manifest = manifest
        self.layout = _lay_out(manifest, short_side)
        self.folder = folder(manifest.source, short_side)
        self.plan: dict[str, Any] = {
            "manifest": _checksum(manifest),
            "short_side": short_side,
            "shards": list(self.layout.sizes),
        }

    def shard(self, number: int) -> Path:
        """The path of one shard."""
        return self.folder / f"{number:05}.u8"

    def missing(self) -> list[int]:
        """The shards that are not there, or not whole.

        Raises:
            InputError: the folder holds the pack of something else.
        """
        plan = atomic.read_json(self.folder / PLAN, list(self.plan))
        if plan and plan != self.plan:
            raise InputError(
                f"{self.folder} was packed from another {self.manifest.source.name}; "
                "delete it, then pack anew"
            )
        return [
            number
            for number, size in enumerate(self.layout.sizes)
            if not self.shard(number).is_file() or self.shard(number).stat().st_size != size
        ]

    def check_room(self, shards: list[int]) -> int:
        """Bytes that these shards take.

        Raises:
            InputError: the disk has less.
        """
        needed = sum(self.layout.sizes[number] for number in shards)
        free = shutil.disk_usage(self.manifest.source.parent).free
        if needed > free:
            raise InputError(
                f"{self.folder} would take {gigabytes(needed)}, but {gigabytes(free)} are free there"
            )
        return needed

    def write(self, shards: list[int], videos: Iterator[tuple[Path, Frames]]) -> None:
        """Write shards, each whole or not at all; what is there already stays.

        Args:
            videos: files with the frames of every row of these shards, in the manifest's order.

        Raises:
            InputError: a video is not what the manifest says, or the shard cannot be written.
        """
        atomic.write_json(self.folder / PLAN, self.plan)
        for number in shards:
            rows = np.flatnonzero(self.layout.shard == number)

            def fill(file: BinaryIO, rows: np.ndarray = rows) -> None:
                for row, (path, frames) in zip(rows, videos, strict=False):
                    if frames.shape != self.shape(row):
                        raise InputError(
                            f"{path} gives frames {list(frames.shape)}, but {self.manifest.source} says "
                            f"{list(self.shape(row))}; prepare it again"
                        )
                    file.write(np.ascontiguousarray(frames).data)

            atomic.write(self.shard(number), fill)

    def shape(self, row: int) -> tuple[int, int, int, int]:
        """Of the row's frames."""
        height, width = int(self.layout.height[row]), int(self.layout.width[row])
        return int(self.manifest.frames[row]), height, width, 3


class PackedRows:
    """The frames of some rows of a packed manifest, mapped into memory."""

    def __init__(self, pack: Pack, rows: np.ndarray) -> None:
        self.pack = pack
        self.rows = rows

    def __getitem__(self, row: int) -> Frames:
        """uint8 [frames, height, width, 3], read-only, of a row as the one who asks counts them."""
        number = int(self.rows[row])
        layout = self.pack.layout
        return np.asarray(
            np.memmap(
                self.pack.shard(int(layout.shard[number])),
                np.uint8,
                mode="r",
                offset=int(layout.offset[number]),
                shape=self.pack.shape(number),
            )
        )


def find_pack(manifest: Manifest, short_side: int) -> PackedRows | None:
    """The rows of `manifest`, which may be some of its file's, in the pack beside it; None without one.

    Raises:
        InputError: the pack is not whole, or not of this manifest.
    """
    place = folder(manifest.source, short_side)
    if not place.exists():
        return None
    pack = Pack(read_manifest(manifest.source), short_side)
    if missing := pack.missing():
        raise InputError(
            f"{len(missing)} of {len(pack.layout.sizes)} shards of {place} are missing or cut short, "
            f"{pack.shard(missing[0]).name} first; run hdc-train pack {manifest.source} again, or delete it"
        )
    number = {part: row for row, part in enumerate(_parts(pack.manifest))}
    return PackedRows(pack, np.array([number[part] for part in _parts(manifest)], dtype=np.int64))


def _parts(manifest: Manifest) -> Iterator[tuple[str, int, int]]:
    """What each row stands for."""
    columns = manifest.path, manifest.start, manifest.frames
    return zip(*(column.tolist() for column in columns), strict=True)


def folder(source: Path, short_side: int) -> Path:
    """Where the pack of a manifest lies."""
    return source.with_name(f"{source.stem}.packed-{short_side}")


def is_packed(path: str, manifest: str) -> bool:
    """Whether a file, both relative to the same folder, is part of a pack of the manifest."""
    return path.startswith(f"{Path(manifest).stem}.packed-")


def gigabytes(count: int) -> str:
    """ "1,234.56 GB"."""
    return f"{count / 1e9:,.2f} GB"


def _lay_out(manifest: Manifest, short_side: int) -> Layout:
    try:
        sides = [manifest.columns[name].astype(np.int64).tolist() for name in ("width", "height")]
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{manifest.source} lacks the width and height of some videos; hdc-train prepare writes them"
        ) from error
    found = np.array(
        [resized(width, height, short_side) for width, height in zip(*sides, strict=True)]
    )
    shard, offset, sizes = [], [], [0]
    for frames, (width, height) in zip(manifest.frames.tolist(), found.tolist(), strict=True):
        size = frames * height * width * 3
        if sizes[-1] and sizes[-1] + size > SHARD_BYTES:
            sizes.append(0)
        shard.append(len(sizes) - 1)
        offset.append(sizes[-1])
        sizes[-1] += size
    return Layout(found[:, 0], found[:, 1], np.array(shard), np.array(offset), tuple(sizes))


def _checksum(manifest: Manifest) -> str:
    """SHA-256 of all that decides about the frames: labels and splits may change."""
    names = [name for name in OF_THE_FILE if name in manifest.columns]
    columns = [manifest.path, manifest.start, manifest.frames, *map(manifest.columns.get, names)]
    rows = zip(*columns, strict=True)
    return hashlib.sha256(csv_text(names, rows).encode()).hexdigest()
