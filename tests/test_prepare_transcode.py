"""Frame k of what is written is frame k of the source, upright, in its colors; bad files say what they are."""

import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from hdc.data.transcode import VideoInfo, measure, transcode
from hdc.data.video import VideoError, count_frames, read_all, read_clips

FRAMES = 40
FILES: dict[str, dict[str, Any]] = {
    "b-frames.avi": {"b_frames": 2},  # no presentation times, as in UCF101
    "h264.avi": {"codec": "libx264", "b_frames": 3},
    "one-gop.mp4": {"codec": "libx264", "b_frames": 3, "gop": 250},
    "ntsc.mkv": {"codec": "libx264", "rate": Fraction(30000, 1001)},
    "vp8.webm": {"codec": "libvpx"},
    "stream.ts": {"codec": "libx264", "b_frames": 3},
    "windows.wmv": {"codec": "wmv2"},
    "fast.mp4": {"codec": "libx264", "rate": Fraction(120000, 1001)},  # MPEG-4 has 16 bits for it
    "slow.mp4": {"codec": "libx264", "rate": Fraction(1, 2)},
    "odd.mkv": {"codec": "ffv1", "width": 97, "height": 65},
}


def small(path: Path, short_side: int = 32) -> tuple[Path, VideoInfo]:
    content, info = transcode(path, short_side)
    target = path.with_name(f"{path.name}.small.mp4")
    target.write_bytes(content)
    return target, info


@pytest.mark.parametrize("name", FILES)
def test_every_frame(
    name: str,
    tmp_path: Path,
    write_video: Callable[..., Path],
    frame_numbers: Callable[[np.ndarray], list[int]],
) -> None:
    source = write_video(tmp_path / name, FRAMES, **{"width": 96, "height": 64} | FILES[name])
    target, info = small(source)
    assert info == VideoInfo(FRAMES, info.fps, 48, 32)
    assert measure(source).frames == count_frames(target) == FRAMES
    assert measure(target) == info
    assert frame_numbers(read_all(target, 32)) == list(range(FRAMES))
    for start in (0, 11, 12, 25, 32):
        (clip,) = read_clips(target, [start], 8, 32)
        assert frame_numbers(clip) == list(range(start, start + 8))


def test_rate_is_kept(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    rates = {"ntsc.mkv": Fraction(30000, 1001), "fast.mp4": Fraction(120000, 1001), "slow.mp4": 25}
    for name, rate in rates.items():
        assert small(write_video(tmp_path / name, 9, **FILES[name]))[1].fps == pytest.approx(rate)


def test_keyframes_are_near(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    def grey(number: int, width: int, height: int) -> np.ndarray:
        return np.full((height, width, 3), 100 + number, np.uint8)

    target, _ = small(write_video(tmp_path / "v.mp4", 30, codec="libx264", gop=250, draw=grey))
    with av.open(str(target)) as container:
        keys = [n for n, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    assert keys[0] == 0
    assert max(np.diff([*keys, 30])) <= 12


@pytest.mark.parametrize(
    ("width", "height", "short_side", "expected"),
    [
        (340, 256, 128, (170, 128)),
        (256, 340, 128, (128, 170)),
        (97, 65, 128, (96, 64)),  # not enlarged, but even
        (97, 65, 32, (48, 32)),
        (320, 16, 16, (320, 16)),
    ],
)
def test_size(
    width: int,
    height: int,
    short_side: int,
    expected: tuple[int, int],
    tmp_path: Path,
    write_video: Callable[..., Path],
) -> None:
    source = write_video(tmp_path / "v.mkv", 2, codec="ffv1", width=width, height=height)
    _, info = small(source, short_side)
    assert (info.width, info.height) == expected


def write_frames(
    path: Path,
    images: list[np.ndarray],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    colorspace: Colorspace | None = None,
    color_range: ColorRange = ColorRange.MPEG,
    rotation: int = 0,
    times: list[int] | None = None,
) -> Path:
    """A file with what `write_video` does not offer; `times` are in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.color_range = color_range
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(
                format=pix_fmt, dst_colorspace=colorspace, dst_color_range=color_range
            )
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def barcodes(count: int) -> list[np.ndarray]:
    """96 × 64, the bits of the number from left to right."""
    bits = [[number >> bit & 1 for bit in range(8)] for number in range(count)]
    rows = [np.repeat(np.where(row, 220, 30), 12).astype(np.uint8) for row in bits]
    return [np.broadcast_to(row[None, :, None], (64, 96, 3)) for row in rows]


@pytest.mark.parametrize("name", ["phone.mp4", "phone.mkv"])
def test_varying_frame_rate(
    name: str, tmp_path: Path, frame_numbers: Callable[[np.ndarray], list[int]]
) -> None:
    """No frame is dropped or doubled, and afterwards a frame's number is its time."""
    times = [100 * min(n, 20) + 20 * max(0, n - 20) for n in range(FRAMES)]
    target, info = small(write_frames(tmp_path / name, barcodes(FRAMES), times=times))
    assert info.frames == FRAMES
    assert frame_numbers(read_all(target, 32)) == list(range(FRAMES))
    for start in range(FRAMES - 8 + 1):
        (clip,) = read_clips(target, [start], 8, 32)
        assert frame_numbers(clip) == list(range(start, start + 8))


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation(
    rotation: int, tmp_path: Path, frame_numbers: Callable[[np.ndarray], list[int]]
) -> None:
    """A phone held upright stores lying frames and says so."""
    source = write_frames(tmp_path / "phone.mp4", barcodes(20), rotation=rotation)
    target, info = small(source)
    assert (info.width, info.height) == ((48, 32) if rotation == 180 else (32, 48))
    lying = np.rot90(read_all(target, 32), -rotation // 90, axes=(1, 2))
    assert frame_numbers(lying) == list(range(20))
    # Unprepared, it is the same but for what coding loses.
    assert (measure(source).height, measure(source).width) == read_all(source, 64).shape[1:3]
    difference = read_all(source, 32).astype(int) - read_all(target, 32)
    assert abs(difference).mean() < 8  # of 190 between dark and light


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"colorspace": Colorspace.ITU709},
        {"colorspace": Colorspace.ITU709, "pix_fmt": "yuv444p"},
        {"color_range": ColorRange.JPEG},
        {"color_range": ColorRange.JPEG, "pix_fmt": "yuvj420p", "codec": "mjpeg"},
    ],
)
def test_colors(how: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the source's matrix and range."""
    orange = np.broadcast_to(np.array([220, 120, 20], np.uint8), (64, 64, 3))
    target, _ = small(write_frames(tmp_path / "v.mkv", [orange] * 3, **how))
    assert read_all(target, 32).mean((0, 1, 2)) == pytest.approx([220, 120, 20], abs=5)


def test_packed_b_frames(
    tmp_path: Path,
    write_video: Callable[..., Path],
    frame_numbers: Callable[[np.ndarray], list[int]],
) -> None:
    """As DivX and XviD wrote them: two frames in one chunk, then an empty one to keep the count."""
    start, user_data = b"\x00\x00\x01\xb6", b"\x00\x00\x01\xb2"
    options = {"b_strategy": "0"}
    plain = write_video(tmp_path / "plain.avi", 30, b_frames=1, options=options)
    path = tmp_path / "packed.avi"
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        chunks = [bytes(packet) for packet in source.demux(video=0) if packet.size]
        backward = [chunk[chunk.index(start) + 4] >> 6 == 2 for chunk in chunks]
        assert any(backward)
        packed = []
        for number, chunk in enumerate(chunks):
            if backward[number]:
                packed[-1] += chunk
                packed.append(start + b"\x51\x82\x7f")
            else:
                packed.append(chunk)
        before = packed[0].index(start)
        packed[0] = packed[0][:before] + user_data + b"DivX503b1393p" + packed[0][before:]
        for number, chunk in enumerate(packed):
            packet = av.Packet(chunk)
            packet.dts, packet.time_base, packet.stream = number, Fraction(1, 25), stream
            packet.is_keyframe = number == 0
            target.mux(packet)
    result, info = small(path)
    assert info.frames == 30
    assert frame_numbers(read_all(result, 32)) == list(range(30))


@pytest.fixture(scope="module")
def good(
    tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]
) -> dict[str, bytes]:
    """The content of a small valid file in several containers."""
    folder = tmp_path_factory.mktemp("good")
    codecs = {"avi": "mpeg4", "mp4": "libx264", "mkv": "libx264", "ts": "libx264", "wmv": "wmv2"}
    return {
        end: write_video(folder / f"v.{end}", 30, codec=codec).read_bytes()
        for end, codec in codecs.items()
    }


@pytest.mark.parametrize(
    ("end", "part", "reason"),
    [
        ("avi", 0.8, r"\d+ of 30 frames"),
        ("mkv", 0.5, r"is truncated: 0\.\d of 1\.2 seconds are there"),
        ("mp4", 0.5, "invalid data found"),  # its index is at the end
    ],
)
@pytest.mark.parametrize("read", [measure, lambda path: transcode(path, 32)])
def test_truncated(
    read: Callable[[Path], Any],
    end: str,
    part: float,
    reason: str,
    good: dict[str, bytes],
    tmp_path: Path,
) -> None:
    path = tmp_path / f"cut.{end}"
    path.write_bytes(good[end][: int(part * len(good[end]))])
    with pytest.raises(VideoError, match=reason):
        read(path)


def test_truncated_after_its_index(good: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(good["mp4"])
    path = tmp_path / "web.mp4"
    options = {"movflags": "faststart"}
    with av.open(str(tmp_path / "v.mp4")) as source, av.open(str(path), "w", options=options) as to:
        stream = to.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                to.mux(packet)
    path.write_bytes(path.read_bytes()[: len(good["mp4"]) * 3 // 4])
    with pytest.raises(VideoError, match=r"cannot be decoded after \d+ of 30 frames: invalid data"):
        measure(path)


def test_one_frame(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    with pytest.raises(VideoError, match="holds a single frame"):
        transcode(write_video(tmp_path / "v.mp4", 1), 32)


def test_cover_of_a_song_is_no_video(tmp_path: Path) -> None:
    """Text is none, either, though FFmpeg would draw it."""
    path = tmp_path / "song.mka"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / "notes.txt").write_text("this is no video\n" * 200)
    for file in (path, tmp_path / "notes.txt"):
        with pytest.raises(VideoError, match="holds no video stream"):
            transcode(file, 32)


def test_title_in_another_encoding(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    """Old AVI files have titles in Latin-1, or in anything."""
    plain, titled = str(write_video(tmp_path / "v.avi", 20)), str(tmp_path / "titled.avi")
    with av.open(plain) as source, av.open(titled, "w") as target:
        target.metadata["title"] = "cafe at noon"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    path = tmp_path / "titled.avi"
    path.write_bytes(path.read_bytes().replace(b"cafe at", b"caf\xe9 at"))
    assert measure(path).frames == 20


def test_unknown_codec(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    path = write_video(tmp_path / "v.avi", 20)
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"ZZZZ"))
    for read in (measure, count_frames):
        with pytest.raises(VideoError, match="holds no video stream that can be decoded"):
            read(path)


def test_size_that_changes_midway(
    tmp_path: Path,
    write_video: Callable[..., Path],
    frame_numbers: Callable[[np.ndarray], list[int]],
) -> None:
    """The first frame decides."""
    parts = [
        write_video(tmp_path / f"{side}.ts", 12, codec="libx264", width=side, height=side)
        for side in (64, 96)
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert read_all(path, 48).shape == (24, 48, 48, 3)
    target, info = small(path)
    assert info == VideoInfo(24, info.fps, 32, 32)
    assert frame_numbers(read_all(target, 32)) == [*range(12)] * 2


CORRUPT = """
import os, random, sys
from pathlib import Path
from hdc.data.transcode import measure, transcode
from hdc.data.video import VideoError, count_frames, read_all, read_clips

folder, first, count, step = Path(sys.argv[1]), *map(int, sys.argv[2:])
files = sorted(folder.glob("good.*"))


def read_corrupted(seed):  # -> how many of five readings fail
    draw = random.Random(seed)
    content = bytearray(files[seed % len(files)].read_bytes())
    for _ in range(draw.choice((1, 3, 10, 100))):
        match draw.randrange(4):
            case 0: content[draw.randrange(len(content))] = draw.randrange(256)
            case 1: content[draw.randrange(min(len(content), 600))] = draw.choice((0, 127, 128, 255))
            case 2: del content[draw.randrange(len(content)):][: draw.randrange(1, 50)]
            case 3: content[(at := draw.randrange(len(content))) : at] = draw.randbytes(4)
    path = folder / f"bad{first}{files[seed % len(files)].suffix}"
    path.write_bytes(content)
    print(seed, flush=True)
    caught = 0
    for read in (
        lambda: transcode(path, 32),
        lambda: measure(path),
        lambda: count_frames(path),
        lambda: read_all(path, 32),
        lambda: read_clips(path, [0, 15], 8, 32),
    ):
        try:
            read()
        except VideoError:
            caught += 1
    return caught


def private_memory():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0])


caught = sum(read_corrupted(seed) for seed in range(first, count, step))
open_files = [os.readlink(file) for file in Path("/proc/self/fd").glob("*") if file.exists()]
assert not any(str(folder) in file for file in open_files), open_files
again = range(first, min(count, 40 * step), step)
memory = []
for _ in range(6):
    for seed in again:
        read_corrupted(seed)
    memory.append(private_memory())
# The heap comes and goes by a few hundred kB; what is lost stays in the least of it.
assert min(memory[3:]) - min(memory[:3]) < 48, memory  # kB
print("caught", caught)
"""


def test_corrupted_bytes(good: dict[str, bytes], tmp_path: Path) -> None:
    """In processes of their own: no crash, no hang, no other error, no file left open, no memory lost."""
    for end, content in good.items():
        (tmp_path / f"good.{end}").write_bytes(content)
    count, processes = 1000, os.cpu_count() or 1
    parts = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", CORRUPT, str(tmp_path), *map(str, (n, count, processes))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(processes)
    ]
    caught = 0
    try:
        for part in parts:
            shown, errors = part.communicate(timeout=600)
            lines = shown.split("\n")
            assert part.returncode == 0, f"after corruption {lines[-2:]}: {errors[-2000:]}"
            caught += int(lines[-2].removeprefix("caught "))
    finally:
        for part in parts:
            part.kill()
            part.wait()
    assert caught > count  # of five readings each
