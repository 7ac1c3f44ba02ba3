"""Decoding with PyAV: random clips for training, every frame for evaluation.

Frames come out as uint8 RGB, resized so that the short side has a given length. A clip is reached by
seeking to the keyframe before it and taking frames in decode order from there: AVI files with B-frames
store no presentation times, and filtering by them would lose frames.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from hdc.errors import InputError

Frames = np.ndarray  # uint8 [frames, height, width, 3]


class VideoError(InputError):
    """A file that cannot be decoded as asked. The message names the file and the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["VideoError"], tuple[Path, str]]:
        return type(self), (self.path, self.reason)  # so that it crosses process borders


@contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream; every error on the way becomes a VideoError."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(path, "holds no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the loader's processes are the parallelism
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, (error.strerror or str(error)).lower()) from error


def count_frames(path: Path) -> int:
    """The number of coded frames, read off the packets without decoding them."""
    with _open(path) as (container, stream):
        count = sum(packet.size > 0 for packet in container.demux(stream))
    if count == 0:
        raise VideoError(path, "holds no frames")
    return count


def read_clips(path: Path, starts: list[int], frames: int, short_side: int) -> list[Frames]:
    """For every entry of `starts` the `frames` consecutive frames from there, out of one open file.

    Raises:
        VideoError: when the file cannot be opened or decoded, or ends too early.
    """
    with _open(path) as (container, stream):
        resize = _Resizer(short_side)
        return [_clip(path, container, stream, start, frames, resize) for start in starts]


def read_all(path: Path, short_side: int, start: int = 0, frames: int | None = None) -> Frames:
    """Every frame of the file (or `frames` from `start` on), decoded from the first: never off by one."""
    with _open(path) as (container, stream):
        resize = _Resizer(short_side)
        decoded = []
        for number, frame in enumerate(container.decode(stream)):
            if frames is not None and number >= start + frames:
                break
            if number >= start:
                decoded.append(resize(frame))
    if not decoded or (frames is not None and len(decoded) < frames):
        raise VideoError(path, _too_short(start, frames or 1, start + len(decoded)))
    return np.stack(decoded)


class _Resizer:
    """VideoFrame -> uint8 RGB array whose short side has the given length."""

    def __init__(self, short_side: int) -> None:
        self.short_side = short_side
        self.reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        scale = self.short_side / min(frame.width, frame.height)
        width = max(self.short_side, round(frame.width * scale))
        height = max(self.short_side, round(frame.height * scale))
        # One thread: starting more costs four times what small frames take (44 against 10 µs at 48 × 48).
        return self.reformatter.reformat(
            frame, width, height, format="rgb24", threads=1
        ).to_ndarray()


def _clip(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    start: int,
    frames: int,
    resize: _Resizer,
) -> Frames:
    first, decoder = _decode_from_keyframe(container, stream, start)
    decoded = []
    number = first
    for number, frame in enumerate(decoder, first):
        if number >= start:
            decoded.append(resize(frame))
        if len(decoded) == frames:
            return np.stack(decoded)
    raise VideoError(path, _too_short(start, frames, number + 1))


def _decode_from_keyframe(
    container: InputContainer, stream: VideoStream, start: int
) -> tuple[int, Iterator[VideoFrame]]:
    """Seek to the last keyframe not after frame `start`: (its frame number, frames from there on).

    Where the container has no usable times, or lands too late, the frames from the beginning.
    """
    rate, unit = stream.average_rate, stream.time_base
    origin = stream.start_time or 0
    if start > 0 and rate and unit:
        container.seek(origin + round(start / rate / unit), stream=stream)
        for packet in container.demux(stream):
            time = packet.pts if packet.pts is not None else packet.dts
            if time is None:
                break
            first = round((time - origin) * unit * rate)
            if packet.is_keyframe and first <= start:
                return first, _decode(packet, container, stream)
            break
    container.seek(origin, stream=stream)
    return 0, container.decode(stream)


def _decode(
    packet: "Packet[VideoStream]", container: InputContainer, stream: VideoStream
) -> Iterator[VideoFrame]:
    """The frames of `packet` and of all that follow it (the last packet flushes the decoder)."""
    yield from stream.decode(packet)
    for following in container.demux(stream):
        yield from stream.decode(following)


def _too_short(start: int, frames: int, found: int) -> str:
    return f"ends after {found} frames, but frames {start} to {start + frames - 1} were asked for"
