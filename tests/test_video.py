"""Decoding real files: a clip holds exactly the frames that were asked for, or the file is named."""

import pickle
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from hdc.data.video import VideoError, count_frames, read_all, read_clips
from hdc.errors import InputError

FRAMES = 60
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"}
FILES = {
    "short-gop.avi": {},
    "b-frames.avi": {"b_frames": 2},  # keyframes that refer to frames before them, as in UCF101
    "h264.avi": {"codec": "libx264", "b_frames": 3},
    "one-gop.mp4": {"codec": "libx264", "b_frames": 3, "gop": 250},
    "open-gop.mp4": {"codec": "libx264", "options": OPEN_GOP},
    "ntsc.mp4": {"codec": "libx264", "b_frames": 3, "rate": Fraction(30000, 1001)},
    "upright.mkv": {"codec": "libx264", "b_frames": 2, "width": 48, "height": 96},
    "stream.ts": {"codec": "libx264", "b_frames": 3},  # no index, times from 80 ms on
}


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {
        name: write_video(folder / name, FRAMES, **{"width": 96, "height": 64, **how})
        for name, how in FILES.items()
    }


@pytest.mark.parametrize("name", FILES)
def test_clips_from_every_start(
    name: str, files: dict[str, Path], frame_numbers: Callable[..., list[int]]
) -> None:
    """In random order out of one open file, forwards and backwards, up to the last frame."""
    starts = list(range(FRAMES - 8 + 1))
    random.Random(0).shuffle(starts)
    clips = read_clips(files[name], starts, 8, 32)
    assert [frame_numbers(clip) for clip in clips] == [list(range(s, s + 8)) for s in starts]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("start", [0, 1, 11, 12, 37, 52])
def test_one_clip_from_a_fresh_file(
    name: str, start: int, files: dict[str, Path], frame_numbers: Callable[..., list[int]]
) -> None:
    (clip,) = read_clips(files[name], [start], 8, 32)
    assert frame_numbers(clip) == list(range(start, start + 8))


@pytest.mark.parametrize("name", FILES)
def test_whole_file(
    name: str, files: dict[str, Path], frame_numbers: Callable[..., list[int]]
) -> None:
    assert count_frames(files[name]) == FRAMES
    assert frame_numbers(read_all(files[name], 32)) == list(range(FRAMES))
    assert frame_numbers(read_all(files[name], 32, 50)) == list(range(50, FRAMES))
    assert frame_numbers(read_all(files[name], 32, 13, 20)) == list(range(13, 33))


def test_edit_list(files: dict[str, Path], frame_numbers: Callable[..., list[int]]) -> None:
    """A cut without re-encoding keeps frames before the cut and hides them: they do not count."""
    path = files["one-gop.mp4"].with_name("cut.mp4")
    with av.open(str(files["one-gop.mp4"])) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        unit = source.streams.video[0].time_base
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts -= round(7 / 25 / unit)
                packet.dts -= round(7 / 25 / unit)
                packet.stream = stream
                target.mux(packet)
    assert count_frames(path) == FRAMES - 7
    assert frame_numbers(read_all(path, 32)) == list(range(7, FRAMES))
    clips = read_clips(path, [0, 3, 45], 8, 32)
    assert [frame_numbers(clip)[0] for clip in clips] == [7, 10, 52]


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation(
    rotation: int,
    tmp_path: Path,
    write_video: Callable[..., Path],
    frame_numbers: Callable[..., list[int]],
) -> None:
    """What a phone that was held upright stores lying comes out upright, with a short side as asked for."""
    path = write_video(tmp_path / "phone.mp4", 30, width=96, height=64, rotation=rotation)
    upright = read_all(path, 32)
    assert upright.shape == ((30, 32, 48, 3) if rotation == 180 else (30, 48, 32, 3))
    lying = np.rot90(upright, -rotation // 90, axes=(1, 2))
    assert frame_numbers(lying) == list(range(30))
    for start, clip in zip((20, 0), read_clips(path, [20, 0], 8, 32), strict=True):
        np.testing.assert_array_equal(clip, upright[start : start + 8])


@pytest.mark.parametrize(
    ("width", "height", "resized"),
    [
        (96, 64, (32, 48)),
        (64, 96, (48, 32)),
        (64, 64, (32, 32)),
        (100, 60, (32, 53)),
        (20, 16, (32, 40)),
    ],
)
def test_short_side(
    width: int,
    height: int,
    resized: tuple[int, int],
    tmp_path: Path,
    write_video: Callable[..., Path],
) -> None:
    path = write_video(tmp_path / "v.avi", 3, width=width, height=height)
    (clip,) = read_clips(path, [0], 2, 32)
    assert clip.shape == (2, *resized, 3)
    assert clip.dtype == np.uint8
    np.testing.assert_array_equal(clip, read_all(path, 32)[:2])


def test_channel_order(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    """A file of a pure color comes back as red, green, blue."""

    def orange(number: int, width: int, height: int) -> np.ndarray:
        return np.broadcast_to(np.array([220, 120, 20], np.uint8), (height, width, 3))

    frames = read_all(write_video(tmp_path / "v.avi", 3, draw=orange), 32)
    assert frames.mean((0, 1, 2)) == pytest.approx([220, 120, 20], abs=4)


def _missing(path: Path) -> None:
    path.unlink(missing_ok=True)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("this is no video\n" * 200)


def _folder(path: Path) -> None:
    path.mkdir()


def _audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("make", [_missing, _empty, _text, _folder, _audio_only])
@pytest.mark.parametrize(
    "read",
    [count_frames, lambda path: read_clips(path, [0], 8, 32), lambda path: read_all(path, 32)],
    ids=["count_frames", "read_clips", "read_all"],
)
def test_no_video(
    make: Callable[[Path], None], read: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "bad video.avi"
    make(path)
    with pytest.raises(VideoError) as error:
        read(path)
    assert isinstance(error.value, InputError)
    assert str(error.value).startswith(f"{path}: ")
    assert len(error.value.reason) > 5
    assert error.value.path == path


def test_truncated_mp4_has_no_index(tmp_path: Path, files: dict[str, Path]) -> None:
    path = tmp_path / "cut.mp4"
    content = files["one-gop.mp4"].read_bytes()
    path.write_bytes(content[: len(content) // 2])
    for read in (count_frames, lambda p: read_clips(p, [0], 8, 32), lambda p: read_all(p, 32)):
        with pytest.raises(VideoError, match=r"cut\.mp4"):
            read(path)


@pytest.mark.parametrize("name", ["short-gop.avi", "b-frames.avi", "stream.ts"])
def test_truncated_file(
    name: str, tmp_path: Path, files: dict[str, Path], frame_numbers: Callable[..., list[int]]
) -> None:
    """What is there is right, what is not there is an error that names the file."""
    path = tmp_path / name
    content = files[name].read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    (clip,) = read_clips(path, [5], 8, 32)
    assert frame_numbers(clip) == list(range(5, 13))
    with pytest.raises(VideoError, match=f"{name}: ends after"):
        read_clips(path, [50], 8, 32)
    with pytest.raises(VideoError, match=f"{name}: ends after"):
        read_all(path, 32, 0, FRAMES)


@pytest.mark.parametrize("name", FILES)
def test_past_the_end(name: str, files: dict[str, Path]) -> None:
    with pytest.raises(
        VideoError, match="ends after 60 frames, but frames 53 to 60 were asked for"
    ):
        read_clips(files[name], [0, 53], 8, 32)
    with pytest.raises(
        VideoError, match="ends after 60 frames, but frames 55 to 62 were asked for"
    ):
        read_all(files[name], 32, 55, 8)
    with pytest.raises(VideoError, match=f"{name}: ends after 60 frames, but frames 500 to 507"):
        read_clips(files[name], [500], 8, 32)
    with pytest.raises(VideoError, match=f"{name}: ends after 60 frames, but frames 70 to 70"):
        read_all(files[name], 32, 70)


def test_error_crosses_process_borders() -> None:
    error = VideoError(Path("a b.avi"), "holds no frames")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is VideoError
    assert (str(copy), copy.path, copy.reason) == (str(error), error.path, error.reason)
