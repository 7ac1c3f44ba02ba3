"""A loader's worker does not grow: FFmpeg's memory is freed, and so are files and shared memory.

HDC_LOADER_SECONDS=3600 pytest -s tests/test_loader_memory.py      an hour of it
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hdc.data.clips import ClipConfig, TrainingClips, training_loader
from hdc.data.manifest import Manifest

SECONDS = float(os.environ.get("HDC_LOADER_SECONDS", "0"))
WARM_UP, VIDEOS = 600, 1200
BATCH = 8
GROWTH = 512  # kB that may come, however long it runs; 1,200 videos lost 1,800 before iterators were closed


def private_memory(process: int) -> int:
    """kB that it shares with no file and no other process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(found)


def open_files(process: int) -> int:
    return sum(1 for _ in Path(f"/proc/{process}/fd").iterdir())


def test_flat(
    tmp_path: Path, write_video: Callable[..., Path], make_manifest: Callable[..., Manifest]
) -> None:
    """Files with and without usable times, with B-frames, and bad ones."""
    options = {"width": 32, "height": 32}
    write_video(tmp_path / "0.mp4", 48, **options)
    write_video(tmp_path / "1.avi", 48, b_frames=2, **options)
    write_video(tmp_path / "2.mkv", 48, codec="libx264", gop=30, **options)
    write_video(tmp_path / "3.avi", 10, **options)  # shorter than a clip, but its row says 48
    (tmp_path / "4.avi").write_bytes((tmp_path / "1.avi").read_bytes()[:600])
    names = ["0.mp4", "1.avi", "2.mkv", "3.avi", "4.avi"]
    rows = [(names[number % 5], 0, 48, "a", "train") for number in range(BATCH)]
    manifest = make_manifest(tmp_path, rows)
    labels = np.zeros(len(rows), dtype=np.int64)
    dataset = TrainingClips(manifest, labels, ClipConfig(size=32), views=2, seed=0)
    before = set(torch.multiprocessing.active_children())
    loader = training_loader(
        dataset,
        batch_size=BATCH,
        epochs=10**9,
        first_step=0,
        workers=1,
        pin_memory=False,
    )
    batches = iter(loader)
    videos = 0
    while videos < WARM_UP:
        batch = next(batches)
        videos += BATCH
        assert {Path(entry.path).name for entry in batch.unreadable} == {"3.avi", "4.avi"}
    (worker,) = set(torch.multiprocessing.active_children()) - before
    assert worker.pid
    processes = worker.pid, os.getpid()
    start = [private_memory(process) for process in processes]
    files = [open_files(process) for process in processes]
    end = time.monotonic() + SECONDS
    while videos < WARM_UP + VIDEOS or time.monotonic() < end:
        next(batches)
        videos += BATCH
    for process, memory, count in zip(processes, start, files, strict=True):
        now = private_memory(process)
        print(f"process {process}: {memory} kB after {WARM_UP} videos, {now} kB after {videos:,}")
        assert now < memory + GROWTH, f"{videos} videos"
        assert open_files(process) <= count + 8  # the batches that are on their way
