"""Frame i is the i-th that is shown, whatever the times: clips begin where decoding everything says."""

import random
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from hdc.data import frame_times
from hdc.data.video import count_frames, read_all, read_clips

FRAMES, CLIP = 72, 8
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"}
FILES: dict[str, dict[str, Any]] = {
    "plain.mp4": {},
    "b-frames.mp4": {"codec": "libx264", "b_frames": 3},
    "long-gop.mp4": {"codec": "libx264", "b_frames": 3, "gop": 250},
    "open-gop.mp4": {"codec": "libx264", "options": OPEN_GOP},
    "h264.mkv": {"codec": "libx264", "b_frames": 3},
    "mpeg4.mkv": {"b_frames": 2},
    "stream.ts": {"codec": "libx264", "b_frames": 3},
    "vp8.webm": {"codec": "libvpx"},
    "windows.wmv": {"codec": "wmv2"},
}


# In milliseconds.
TIMES = {
    "slow, then fast": [100 * min(n, 30) + 20 * max(0, n - 30) for n in range(FRAMES)],
    "fast, then slow": [20 * min(n, 30) + 100 * max(0, n - 30) for n in range(FRAMES)],
    "jitter": list(accumulate(random.Random(0).choices(range(5, 95), k=FRAMES))),
    "pause": [40 * n + 3000 * (n >= 40) for n in range(FRAMES)],
    "long last frame": [*range(0, 40 * (FRAMES - 1), 40), 9000],
}


def check_every_start(path: Path, frame_numbers: Callable[..., list[int]]) -> None:
    everything = read_all(path, 32)
    assert len(everything) == count_frames(path)
    starts = list(range(len(everything) - CLIP + 1))
    random.Random(0).shuffle(starts)
    clips = read_clips(path, starts, CLIP, 32)
    shown = frame_numbers(everything)
    assert [frame_numbers(clip) for clip in clips] == [shown[s : s + CLIP] for s in starts]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", FILES)
def test_uneven_times(
    name: str,
    times: str,
    tmp_path: Path,
    write_video: Callable[..., Path],
    frame_numbers: Callable[..., list[int]],
) -> None:
    path = write_video(tmp_path / name, FRAMES, times=TIMES[times], **FILES[name])
    assert frame_numbers(read_all(path, 32)) == list(range(FRAMES))
    check_every_start(path, frame_numbers)


@pytest.mark.parametrize("how", [{}, {"b_frames": 2}, {"codec": "libx264", "b_frames": 3}])
def test_dropped_frames(
    how: dict[str, Any],
    tmp_path: Path,
    write_video: Callable[..., Path],
    frame_numbers: Callable[..., list[int]],
) -> None:
    """An AVI has a fixed rate and, where a recorder could not follow, empty frames. They are not shown."""
    times = [n + 2 * (n >= 9) + (n >= 30) for n in range(FRAMES)]
    path = write_video(tmp_path / "v.avi", FRAMES, times=times, unit=Fraction(1, 25), **how)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == FRAMES + 3
    assert frame_numbers(read_all(path, 32)) == list(range(FRAMES))
    check_every_start(path, frame_numbers)


def test_hidden_frames(
    tmp_path: Path, write_video: Callable[..., Path], frame_numbers: Callable[..., list[int]]
) -> None:
    """VP8 has frames that are only referred to; here, two of each twelve are made such."""
    plain = write_video(tmp_path / "plain.webm", FRAMES, codec="libvpx")
    path = tmp_path / "hidden.webm"
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                content = bytearray(bytes(packet))
                if number % 12 in (5, 8):
                    content[0] &= ~0x10
                changed = av.Packet(bytes(content))
                changed.pts, changed.dts, changed.time_base = (
                    packet.pts,
                    packet.dts,
                    packet.time_base,
                )
                changed.is_keyframe, changed.stream = packet.is_keyframe, stream
                target.mux(changed)
    shown = [number for number in range(FRAMES) if number % 12 not in (5, 8)]
    assert frame_numbers(read_all(path, 32)) == shown
    check_every_start(path, frame_numbers)


def test_times_that_start_over(
    tmp_path: Path, write_video: Callable[..., Path], frame_numbers: Callable[..., list[int]]
) -> None:
    """Two recordings in one file, of different rates: no time is there twice, and no order in them."""
    parts = [
        write_video(tmp_path / f"{rate}.ts", 36, codec="libx264", rate=rate).read_bytes()
        for rate in (25, 23)
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(parts))
    assert frame_numbers(read_all(path, 32)) == [*range(36)] * 2
    check_every_start(path, frame_numbers)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose packets were counted."""
    files: list[str] = []
    count = frame_times._count_keyframes

    def noted(container: av.container.InputContainer, stream: Any) -> Any:
        files.append(Path(container.name).name)
        return count(container, stream)

    monkeypatch.setattr(frame_times, "_count_keyframes", noted)
    return files


def test_constant_rates_are_not_counted(
    counted: list[str], tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    """Where the index shows that the rate is constant; else a file is counted once, until it changes."""
    rate = Fraction(30000, 1001)
    for name, how in {
        "v.avi": {"b_frames": 2},
        "v.mp4": {"rate": rate},
        "b.mp4": {"codec": "libx264", "b_frames": 3, "rate": rate},
        "v.mkv": {"rate": rate},
    }.items():
        path = write_video(tmp_path / name, 30, **how)
        for _ in range(2):
            read_clips(path, [3, 17], CLIP, 32)
    assert counted == ["v.mkv"]
    times = [40 * n + 40 * (n > 5) for n in range(30)]
    write_video(tmp_path / "v.mkv", 30, times=times)
    (clip,) = read_clips(tmp_path / "v.mkv", [12], CLIP, 32)
    np.testing.assert_array_equal(clip, read_all(tmp_path / "v.mkv", 32)[12:20])
    assert counted == ["v.mkv"] * 2
