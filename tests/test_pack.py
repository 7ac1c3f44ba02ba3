"""A packed dataset: the same clips as from the files, written whole or gone on with, and refused if it is not."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from hdc.cli import main
from hdc.data import packed
from hdc.data.clips import ClipConfig, TrainingClips, training_loader
from hdc.data.manifest import Manifest, read_manifest
from hdc.data.pack import PackConfig, pack
from hdc.data.packed import find_pack
from hdc.data.prepare import PrepareConfig, check, prepare
from hdc.data.video import read_all
from hdc.data.whole_videos import WholeVideos
from hdc.errors import InputError

SIDE = 32
ONE = PackConfig(short_side=SIDE, workers=1)
# Frames, width, height of the files; and the rows of the manifest: file, first frame, frames, part.
FILES = [(48, 64, 48), (40, 48, 80), (30, 32, 32), (9, 64, 64)]
ROWS = [
    (0, 0, 48, "test"),
    (1, 0, 20, "train"),
    (1, 20, 20, "train"),
    (2, 0, 30, "test"),
    (3, 0, 9, "train"),
    (0, 0, 24, "train"),
]
# The width and height of each with a short side of 32, and the bytes they take.
SHAPES = [(43, 32), (32, 53), (32, 53), (32, 32), (32, 32), (43, 32)]
SIZES = [row[2] * width * height * 3 for row, (width, height) in zip(ROWS, SHAPES, strict=True)]


@pytest.fixture
def manifest(tmp_path: Path, write_video: Callable[..., Path]) -> Manifest:
    digests = []
    for number, (frames, width, height) in enumerate(FILES):
        path = write_video(tmp_path / f"{number}.avi", frames, width=width, height=height)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    file, start, frames, part = (np.array(column) for column in zip(*ROWS, strict=True))
    sizes = np.array(FILES)[file].astype(str)
    columns = {
        "label": np.array(["a"] * len(ROWS)),
        "split1": part,
        "width": sizes[:, 1],
        "height": sizes[:, 2],
        "sha256": np.array(digests)[file],
    }
    paths = np.array([f"{number}.avi" for number in file])
    made = Manifest(tmp_path / "manifest.csv", paths, start, frames, columns)
    made.write()
    return made


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shards of at most 200 kB, and their sizes: the first row is larger than that, rows 1 and 2 together, too."""
    monkeypatch.setattr(packed, "SHARD_BYTES", 200_000)
    return [SIZES[0], SIZES[1], SIZES[2] + SIZES[3], SIZES[4] + SIZES[5]]


class State(NamedTuple):
    content: dict[str, bytes]
    written: dict[str, int]


def state(folder: Path) -> State:
    """The files, and when each was written."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    content = {path.name: path.read_bytes() for path in files}
    return State(content, {path.name: path.stat().st_mtime_ns for path in files})


def clips(manifest: Manifest, workers: int = 0, **config: object) -> list[bytes]:
    rows = manifest.rows("train", 1)
    settings = ClipConfig(size=SIDE, short_videos="loop", **config)  # type: ignore[arg-type]
    dataset = TrainingClips(rows, np.arange(len(rows)), settings, views=2, seed=7)
    loader = training_loader(
        dataset, batch_size=2, epochs=6, first_step=1, workers=workers, pin_memory=False
    )
    return [part.contiguous().numpy().tobytes() for batch in loader for part in batch[:2]]


def test_layout(manifest: Manifest, small_shards: list[int]) -> None:
    """One row after the other, and nothing else."""
    pack(manifest.source, ONE)
    folder = manifest.source.parent / "manifest.packed-32"
    content = state(folder).content
    assert list(content) == [*(f"{number:05}.u8" for number in range(4)), "pack.json"]
    assert [len(content[f"{number:05}.u8"]) for number in range(4)] == small_shards
    everything = b"".join(content[f"{number:05}.u8"] for number in range(4))
    for row in range(len(ROWS)):
        first, count = int(manifest.start[row]), int(manifest.frames[row])
        expected = read_all(manifest.file(row), SIDE, first, count).tobytes()
        assert everything[sum(SIZES[:row]) :][: SIZES[row]] == expected


@pytest.mark.parametrize("config", [{}, {"frames": 8, "start_every": 5}, {"frames": 22}])
def test_the_same_clips(
    manifest: Manifest, small_shards: list[int], config: dict[str, int], tmp_path: Path
) -> None:
    """Of the rows of a split, whatever the number of workers; and the files are not looked at."""
    decoded = clips(manifest, **config)
    assert len(decoded) == 2 * (6 * 2 - 1)
    pack(manifest.source.parent, ONE)
    for path in tmp_path.glob("*.avi"):
        path.write_bytes(b"")
    assert clips(manifest, **config) == decoded
    assert clips(manifest, workers=2, **config) == decoded


def test_phone_videos(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    """Read where they lie: frames of unequal length, to be turned by a quarter."""
    source = tmp_path / "a"
    times = [100 * min(n, 30) + 20 * max(0, n - 30) for n in range(60)]
    for name, how in {"1.mp4": {}, "2.mkv": {"codec": "libx264", "b_frames": 2}}.items():
        write_video(source / name, 60, width=96, times=times, rotation=90, **how)
    prepare("folder", tmp_path, tmp_path, PrepareConfig(workers=1, no_transcode=True))
    manifest = read_manifest(tmp_path / "manifest.csv")
    assert manifest.columns["height"].tolist() == ["96"] * 2
    decoded = clips(manifest)
    pack(manifest.source, ONE)
    for path in source.iterdir():
        path.write_bytes(b"")
    assert clips(manifest) == decoded


def test_the_same_whole_videos(manifest: Manifest, small_shards: list[int]) -> None:
    rows = manifest.rows("test", 1)
    expected = [WholeVideos(rows, SIDE, 0, None)[row] for row in range(2)]
    pack(manifest.source, ONE)
    found = find_pack(rows, SIDE)
    assert found
    for row in range(2):
        np.testing.assert_array_equal(WholeVideos(rows, SIDE, 0, found)[row], expected[row])


def test_other_sizes_are_decoded(manifest: Manifest) -> None:
    pack(manifest.source, ONE)
    assert find_pack(manifest, SIDE)
    assert find_pack(manifest, 64) is None


def test_labels_may_change(manifest: Manifest) -> None:
    pack(manifest.source, ONE)
    manifest.columns["label"][:] = "other"
    manifest.columns["split2"] = manifest.columns["split1"]
    manifest.write()
    assert find_pack(manifest.rows("train", 2), SIDE)


RUN = """
import sys
from pathlib import Path
from hdc.data import packed
from hdc.data.pack import PackConfig, pack
packed.SHARD_BYTES = 200_000
pack(Path(sys.argv[1]), PackConfig(short_side=32, workers=1))
"""


def test_killed_while_packing(
    write_video: Callable[..., Path], tmp_path: Path, small_shards: list[int]
) -> None:
    """kill -9 in the midst of it: what is written stays, the rest follows, and all is as if nothing had been."""
    write_video(tmp_path / "0.avi", 240, width=32, height=32)
    rows = 40
    columns = {"split1": np.array(["train"] * rows)}
    columns |= {name: np.array(["32"] * rows) for name in ("width", "height")}
    frames, start = np.full(rows, 60), np.arange(rows)
    source = tmp_path / "manifest.csv"
    Manifest(source, np.array(["0.avi"] * rows), start, frames, columns).write()
    folder = tmp_path / "manifest.packed-32"
    run = subprocess.Popen([sys.executable, "-P", "-c", RUN, str(source)])
    deadline = time.monotonic() + 60
    while not (folder / "00001.u8").exists():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    with pytest.raises(
        InputError, match=r"\d+ of 40 shards of .*packed-32 are missing or cut short"
    ):
        find_pack(read_manifest(source), SIDE)
    before = state(folder).written
    steps: list[tuple[int, int]] = []
    pack(source, ONE, progress=lambda done, total: steps.append((done, total)))
    assert steps[0][0] > 2
    assert steps[-1] == (rows, rows)
    after = state(folder)
    assert set(after.content) == {*(f"{number:05}.u8" for number in range(rows)), "pack.json"}
    whole = [name for name in before if name.endswith(".u8") and not name.startswith(".")]
    assert len(whole) >= 2
    assert all(after.written[name] == before[name] for name in whole)
    shutil.rmtree(folder)
    pack(source, ONE)
    assert state(folder).content == after.content
    steps.clear()
    pack(source, ONE, progress=lambda done, total: steps.append((done, total)))
    assert steps == []


def test_cut_short(manifest: Manifest, small_shards: list[int]) -> None:
    """One clear error, at once; packing again mends it."""
    target = pack(manifest.source, ONE)
    expected = state(target.folder).content
    with target.shard(2).open("r+b") as file:
        file.truncate(small_shards[2] - 1)
    target.shard(3).unlink()
    message = r"2 of 4 shards of .*/manifest\.packed-32 are missing or cut short, 00002\.u8 first; run hdc-train pack"
    with pytest.raises(InputError, match=message):
        clips(manifest)
    pack(manifest.source, ONE)
    assert state(target.folder).content == expected


def test_of_another_manifest(manifest: Manifest) -> None:
    pack(manifest.source, ONE)
    manifest.columns["sha256"][2] = "0" * 64
    manifest.write()
    for use in (lambda: find_pack(manifest, SIDE), lambda: pack(manifest.source, ONE)):
        with pytest.raises(InputError, match=r"packed-32 was packed from another manifest\.csv"):
            use()


def test_too_small_a_disk(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written, and a byte more is enough."""
    usage = shutil.disk_usage(manifest.source.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=sum(SIZES) - 1))
    with pytest.raises(InputError, match=r"would take 0\.00 GB, but 0\.00 GB are free there"):
        pack(manifest.source, ONE)
    assert not (manifest.source.parent / "manifest.packed-32").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=sum(SIZES)))
    pack(manifest.source, ONE)


def test_bad_videos(manifest: Manifest, small_shards: list[int], tmp_path: Path) -> None:
    """What was packed before them stays."""
    content = (tmp_path / "2.avi").read_bytes()
    (tmp_path / "2.avi").write_bytes(content[:600])
    with pytest.raises(InputError, match=r"2\.avi: .*; prepare it again"):
        pack(manifest.source, ONE)
    folder = tmp_path / "manifest.packed-32"
    assert sorted(path.name for path in folder.iterdir()) == ["00000.u8", "00001.u8", "pack.json"]
    shutil.copy(tmp_path / "0.avi", tmp_path / "2.avi")
    message = r"2\.avi gives frames \[30, 32, 43, 3\], but .* says \[30, 32, 32, 3\]"
    with pytest.raises(InputError, match=message):
        pack(manifest.source, ONE)


def test_manifest_without_sizes(numbered: Manifest, tmp_path: Path) -> None:
    Manifest(tmp_path / "m.csv", numbered.path, numbered.start, numbered.frames, {}).write()
    with pytest.raises(InputError, match="lacks the width and height of some videos"):
        pack(tmp_path / "m.csv", ONE)


def test_commands(manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, pack, train again without the pixels of a single file: the same losses."""
    options = [f"--data={manifest.source}", "--backbone=tiny", "--clips.size=32", "--batch_size=2"]
    options += ["--clips.short_videos=loop", "--augment.crop_size=28", "--epochs=2", "--device=cpu"]

    def losses(out: Path) -> list[float]:
        assert main(["pretrain", *options, f"--out={out}", "--log_every=1"]) == 0
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

    decoded = losses(tmp_path / "decoded")
    command = ["pack", str(tmp_path), "--short_side=32", "--workers=1"]
    capsys.readouterr()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"decoding 6 videos into {tmp_path}/manifest.packed-32: 0.00 GB to write" in shown
    assert f"{tmp_path}/manifest.packed-32 is whole: runs with --clips.size 32 read it" in shown
    for path in tmp_path.glob("*.avi"):
        path.write_bytes(b"")
    assert losses(tmp_path / "packed") == decoded
    assert main(command) == 0
    assert "decoding" not in capsys.readouterr().out
    (tmp_path / "manifest.packed-32/00000.u8").unlink()
    assert main(["pretrain", *options, f"--out={tmp_path / 'third'}"]) == 2
    assert "1 of 1 shards of" in capsys.readouterr().err


def test_packed_where_it_was_prepared(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    """A pack is no difference to the manifest, and no class of videos."""
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("a/0.avi", "b/1.avi"):
        write_video(source / name, 20, width=40, height=32)
    prepare("folder", source, target, PrepareConfig(workers=1))
    pack(target, ONE)
    assert check(target) == []
    (target / "manifest.packed").touch()
    assert check(target) == ["extra manifest.packed"]
    in_place = PrepareConfig(workers=1, no_transcode=True)
    prepare("folder", source, source, in_place)
    pack(source, ONE)
    assert not prepare("folder", source, source, in_place).changed
    assert find_pack(read_manifest(source / "manifest.csv"), SIDE)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--short_side=0", "short_side is 0; it must be at least 1"),
        ("--workers=0", "workers is 0; it must be at least 1"),
    ],
)
def test_wrong_settings(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(tmp_path), option]) == 2
    assert message in capsys.readouterr().err
