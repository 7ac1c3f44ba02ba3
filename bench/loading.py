"""How fast videos become views here: the training loader beside a plain loop, on prepared and unprepared files.

    python bench/loading.py
    python bench/loading.py --folder FOLDER       keep the videos that it makes, or take those of last time
    python bench/loading.py --out result.json

A video gives two clips of 16 frames and three views of 112 × 112, as in pretraining. Ours is what `hdc-train pretrain`
runs on a CPU, with a decoding process a core; the plain loop is `plain_loop.py`. The files lie in the page cache.
Unprepared ones are 320 × 240, 240 frames, H.264 with x264's defaults, but for a single keyframe, as in a shot without
cuts (x264 sets one every 250 frames); `hdc.data.synthetic` draws them, with noise added until they are as large as
camera footage (about 2 kB a frame; UCF101 has 2.6). Prepared ones are what `hdc-train prepare` makes of these, packed
ones what `hdc-train pack` makes of those.

The contenders take turns, round after round, and the table has the medians. A round starts its processes anew
and begins to count when their first batches, made in advance, are used up. CPU time is that of all processes of a
contender: it says how many cores a faster consumer needs, and depends less on what else the machine does. Clips
that are decoded alone are what a CPU has to do where a GPU augments.
"""

import os

# Threads that spin while they wait would count as work, and on a busy machine keep others from theirs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import machine
import numpy as np
import plain_loop
import torch
from torch import Generator

from hdc.config import PretrainConfig
from hdc.data.clips import TrainingClips, training_loader
from hdc.data.manifest import MANIFEST, Manifest, read_manifest
from hdc.data.pack import PackConfig, pack
from hdc.data.prepare import PrepareConfig, prepare
from hdc.data.synthetic import FPS, MOTIONS, TAKE_FRAMES, draw_takes
from hdc.pretrain import make_views
from hdc.share import Share

WIDTH, HEIGHT, NOISE = 320, 240, 8.0
CLIPS = 2  # a video
BATCH = 4
OURS, PLAIN = "ours", "plain loop"
PACKED = "packed"
ALONE = "decoding alone"
Run = Iterator[int]  # yields the number of videos that were done since the last time


@dataclass(frozen=True)
class Contender:
    """`start` begins a run over a manifest; `ahead` videos of it may have been made before it counts."""

    name: str
    start: Callable[[Manifest], Run]
    ahead: int = 1


def ours(manifest: Manifest, workers: int, views: bool) -> Run:
    """The batches of a pretraining run, with its augmentation or without."""
    config = PretrainConfig(data=str(manifest.source), batch_size=BATCH)
    rows = manifest.take(np.arange(max(BATCH, len(manifest))) % len(manifest))
    labels = np.zeros(len(rows), dtype=np.int64)
    dataset = TrainingClips(rows, labels, config.clips, views=CLIPS, seed=0)
    loader = training_loader(
        dataset,
        batch_size=BATCH,
        epochs=1_000_000,
        first_step=0,
        workers=workers,
        pin_memory=False,
    )
    generator = Generator().manual_seed(0)
    for batch in loader:
        assert not batch.unreadable
        if views:
            make_views(batch.clips, config, generator, Share(0, BATCH, BATCH, 1))
        yield BATCH


def contenders(workers: int) -> tuple[list[Contender], dict[str, str]]:
    """Who is there, and why the others are not."""
    ahead = 2 * workers * BATCH  # DataLoader's prefetch_factor
    found = [
        Contender(OURS, partial(ours, workers=workers, views=True), ahead),
        Contender(PLAIN, _plain(plain_loop.decode_with_pyav, plain_loop.augment_with_torch)),
        Contender(f"{OURS}, {ALONE}", partial(ours, workers=workers, views=False), ahead),
        Contender(f"{PLAIN}, {ALONE}", _plain(plain_loop.decode_with_pyav, None)),
    ]
    missing = {}
    for name, make in (
        ("torchcodec", lambda: _plain(plain_loop.torchcodec(), plain_loop.augment_with_torch)),
        ("kornia", lambda: _plain(plain_loop.decode_with_pyav, plain_loop.kornia())),
    ):
        try:
            found.append(Contender(f"{PLAIN} with {name}", make()))
        except (
            ImportError,
            RuntimeError,
            OSError,
        ) as error:  # torchcodec without FFmpeg's libraries
            missing[f"{PLAIN} with {name}"] = f"missing: {str(error).splitlines()[0]}"
    return found, missing


def _plain(
    decode: plain_loop.Decode, augment: plain_loop.Augment | None
) -> Callable[[Manifest], Run]:
    return partial(plain_loop.run, decode=decode, augment=augment)


def speed(contender: Contender, manifest: Manifest, seconds: float) -> tuple[float, float]:
    """Videos a second, and the CPU time that all processes together spend on one, in seconds."""
    run = contender.start(manifest)
    done = 0
    while done < contender.ahead:
        done += next(run)
    cpu, begin = cpu_time(), time.perf_counter()
    done = next(run)
    while (taken := time.perf_counter() - begin) < seconds:
        done += next(run)
    cpu = cpu_time() - cpu
    run.close()  # type: ignore[attr-defined]
    return done / taken, cpu / done


def cpu_time() -> float:
    """Seconds that this process and those that it started have run."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def make_videos(folder: Path, videos: int, takes: int) -> dict[str, Manifest]:
    """Manifests of the same videos "prepared", "packed" and "unprepared", below `folder`."""
    raw, small = folder / "unprepared", folder / "prepared"
    if not (small / MANIFEST).exists():
        with ProcessPoolExecutor(machine.cores()) as pool:
            list(pool.map(_write_video, itertools.repeat(raw), range(videos), [takes] * videos))
        prepare("folder", raw, small, PrepareConfig())
    prepared = read_manifest(small / MANIFEST)
    where = np.array([f"../unprepared/{path}" for path in prepared.path])
    unprepared = Manifest(prepared.source, where, prepared.start, prepared.frames, {})
    packed = replace(prepared, source=small / "decoded.csv")
    packed.write()
    pack(packed.source, PackConfig())
    return {"prepared": prepared, PACKED: packed, "unprepared": unprepared}


def _write_video(folder: Path, number: int, takes: int) -> None:
    motion = MOTIONS[number % len(MOTIONS)]
    rng = np.random.default_rng(number)
    path = folder / motion / f"{number}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for _, images in draw_takes(motion, rng, takes=takes, width=WIDTH, height=HEIGHT):
            for image in images:
                noisy = image + rng.normal(0, NOISE, image.shape)
                image = noisy.clip(0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def bytes_a_frame(manifest: Manifest) -> float:
    """Of the files."""
    sizes = [manifest.file(row).stat().st_size for row in range(len(manifest))]
    return sum(sizes) / int(manifest.frames.sum())


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    manifests = make_videos(folder, given.videos, given.takes)
    load = os.getloadavg()[0]  # what others do: on a quiet machine, nearly none
    who, missing = contenders(given.workers)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {c.name: {} for c in who}
    for _ in range(given.rounds):
        for contender in who:
            for files, manifest in manifests.items():
                if files == PACKED and not contender.name.startswith(OURS):
                    continue
                speeds = found[contender.name].setdefault(files, [])
                speeds.append(speed(contender, manifest, given.seconds))
    return {
        "machine": machine.describe(),
        "settings": {
            "videos": len(manifests["prepared"]),
            "frames": given.takes * TAKE_FRAMES,
            "workers": given.workers,
            "threads": torch.get_num_threads(),
            "load": load,
            "batch": BATCH,
            "rounds": given.rounds,
            "seconds": given.seconds,
            "bytes_a_frame": {name: bytes_a_frame(m) for name, m in manifests.items()},
        },
        "videos_a_second_and_cpu_seconds_a_video": found,
        "missing": missing,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: the medians, and what they come to."""
    found = result["videos_a_second_and_cpu_seconds_a_video"]
    kinds = list(found[OURS])
    cells = [f"{files}: videos/s | clips/s | CPU ms a video" for files in kinds]
    lines = [f"| | {' | '.join(cells)} |", "|---" * (1 + 3 * len(kinds)) + "|"]
    for name, by_files in found.items():
        line = [name]
        for files in kinds:
            if files in by_files:
                videos, cpu = map(statistics.median, zip(*by_files[files], strict=True))
                line += [f"{videos:.1f}", f"{CLIPS * videos:.1f}", f"{1e3 * cpu:.1f}"]
            else:
                line += ["–"] * 3
        lines.append(f"| {' | '.join(line)} |")
    for name, why in result["missing"].items():
        lines.append(f"| {name} | {why}" + " |" * (3 * len(kinds)))
    lines += [
        "",
        "| times as many videos a second; in brackets: as little CPU time | |",
        "|---|---|",
    ]
    for what, above, below in (
        ("ours beside the plain loop, both on prepared files", (OURS, "prepared"), (PLAIN, "prepared")),
        ("ours on prepared files beside the plain loop on unprepared ones", (OURS, "prepared"), (PLAIN, "unprepared")),
        ("ours on packed frames beside the plain loop on unprepared files", (OURS, PACKED), (PLAIN, "unprepared")),
    ):  # fmt: skip
        for part in ("", f", {ALONE}"):
            ours, theirs = found[above[0] + part][above[1]], found[below[0] + part][below[1]]
            # Of the same round: what else the machine did then slowed both.
            pairs = [(a[0] / b[0], b[1] / a[1]) for a, b in zip(ours, theirs, strict=True)]
            videos, cpu = map(statistics.median, zip(*pairs, strict=True))
            lines.append(f"| {what}{part} | {videos:.1f} ({cpu:.1f}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="of the videos; default: a temporary one")
    parser.add_argument("--videos", type=int, default=12, help="default: %(default)s")
    parser.add_argument(
        "--takes", type=int, default=15, help="of 16 frames each; default: %(default)s"
    )
    parser.add_argument("--workers", type=int, default=machine.cores(), help="default: the cores")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="a round; default: %(default)s")
    parser.add_argument("--out", type=Path, help="a JSON file to write, too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(given, given.folder or Path(temporary))
    print(table(result))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
