"""Decoding with PyAV: random clips for training, every frame for evaluation.

Frames come out as uint8 RGB, upright, resized so that the short side has a given length. Frame i is the i-th that is
shown, however long each is. A clip is reached by seeking to the keyframe before it (`frame_times.py` knows its
number) and taking frames in decode order from there: AVI files with B-frames store no presentation times, and
filtering by them would lose frames.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from hdc.data.frame_times import (
    MOST_REORDERED,
    Clock,
    demux,
    find_clock,
    is_shown,
    next_packet,
    packet_time,
)
from hdc.errors import InputError, reason

Frames = np.ndarray  # uint8 [frames, height, width, 3]
# (number of the clip, of the frame in it, image uint8 [height, width, 3]). The image is the decoder's: copy it.
Store = Callable[[int, int, np.ndarray], None]


class VideoError(InputError):
    """A file that cannot be decoded as asked. The message names the file and the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["VideoError"], tuple[Path, str]]:
        return type(self), (self.path, self.reason)  # so that it crosses process borders


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream; every error on the way becomes a VideoError."""
    try:
        # A playlist that calls itself a video must not reach for the network.
        options = {"protocol_whitelist": "file"}
        with av.open(str(path), options=options, metadata_errors="replace") as container:
            stream = next(filter(_is_moving, container.streams.video), None)
            if stream is None:
                raise VideoError(path, "holds no video stream that can be decoded")
            stream.codec_context.thread_count = 1  # the loader's processes are the parallelism
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, reason(error)) from error
    except IndexError as error:  # what PyAV's demuxer makes of one that was not there when it began
        raise VideoError(path, "has streams that begin midway") from error


def _is_moving(stream: VideoStream) -> bool:
    """False for an unknown codec, for the cover of a song, and for text, which FFmpeg draws as a terminal would."""
    context: VideoCodecContext | None = stream.codec_context
    cover = stream.disposition & Disposition.attached_pic
    return context is not None and context.name != "ansi" and not cover


def count_frames(path: Path) -> int:
    """The number of coded frames, read off the packets without decoding them."""
    with open_video(path) as (container, stream):
        count = sum(is_shown(packet, stream) for packet in container.demux(stream))
    if count == 0:
        raise VideoError(path, "holds no frames")
    return count


def read_clips(path: Path, starts: list[int], frames: int, short_side: int) -> list[Frames]:
    """For every entry of `starts` the `frames` consecutive frames from there, out of one open file.

    Raises:
        VideoError: when the file cannot be opened or decoded, or ends too early.
    """
    clips: list[dict[int, np.ndarray]] = [{} for _ in starts]

    def store(clip: int, number: int, image: np.ndarray) -> None:
        clips[clip][number] = image.copy()

    store_clips(path, starts, frames, short_side, store)
    return [np.stack([clip[number] for number in range(frames)]) for clip in clips]


def store_clips(path: Path, starts: list[int], frames: int, short_side: int, store: Store) -> None:
    """As `read_clips`, but `store` gets every frame: clip after clip, and a frame twice if need be.

    Raises:
        VideoError: as `read_clips`; some frames have been stored then.
    """
    with open_video(path) as (container, stream):
        resize = _Resizer(short_side)
        clock = find_clock(path, container, stream)
        for clip, start in enumerate(starts):
            stored = 0
            found = _seek_keyframe(container, stream, clock, start) if clock else None
            if found:
                packet, first = found
                with closing(_decode(container, stream, packet)) as decoded:
                    for frame in islice(decoded, start - first, start - first + frames):
                        store(clip, stored, resize(frame))
                        stored += 1
            if stored < frames:
                # No usable times, or ones that lead past the end: count from the beginning.
                for number, image in enumerate(_count_to(path, short_side, start, frames)):
                    store(clip, number, image)


def read_all(path: Path, short_side: int, start: int = 0, frames: int | None = None) -> Frames:
    """Every frame of the file (or `frames` from `start` on), decoded from the first: never off by one."""
    return np.stack([image.copy() for image in _count_to(path, short_side, start, frames)])


def _count_to(path: Path, short_side: int, start: int, frames: int | None) -> Iterator[np.ndarray]:
    """The frames from `start` on, `frames` of them or all; a VideoError where they are not there."""
    with open_video(path) as (container, stream), closing(_decode(container, stream)) as decoded:
        resize = _Resizer(short_side)
        found = 0
        for number, frame in enumerate(decoded):
            if frames is not None and number >= start + frames:
                break
            found = number + 1
            if number >= start:
                yield resize(frame)
    if found < start + (frames or 1):
        raise VideoError(path, _too_short(start, frames or 1, found))


class _Resizer:
    """VideoFrame -> uint8 RGB array, upright, whose short side has the given length; it shares the frame's memory.

    The first frame decides the size for all: streams that change theirs midway do exist.
    """

    def __init__(self, short_side: int) -> None:
        self.short_side = short_side
        self.size: tuple[int, int] | None = None
        self.turns = 0
        self.reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        if self.size is None:
            self.size = resized(frame.width, frame.height, self.short_side)
            self.turns = quarter_turns(frame)
        # One thread: starting more costs four times what small frames take (44 against 10 µs at 48 × 48).
        image = self.reformatter.reformat(frame, *self.size, format="rgb24", threads=1)
        (plane,) = image.planes
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
        pixels = rows[:, : 3 * plane.width].reshape(plane.height, plane.width, 3)
        return np.rot90(pixels, self.turns) if self.turns else pixels


def quarter_turns(frame: VideoFrame) -> int:
    """How often to turn it by 90°, counter-clockwise, so that it is as the file says that it is to be shown."""
    return round(frame.rotation / 90) % 4


def resized(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height of a frame when its short side has become `short_side`."""
    scale = short_side / min(width, height)
    return max(short_side, round(width * scale)), max(short_side, round(height * scale))


def _seek_keyframe(
    container: InputContainer, stream: VideoStream, clock: Clock, start: int
) -> "tuple[Packet[VideoStream], int] | None":
    """The packet of a keyframe not after frame `start`, and its frame number."""
    # Some containers seek by decoding times, which precede the frames' own: try once more, from earlier.
    for target in (start, max(0, start - MOST_REORDERED)):
        try:
            container.seek(clock.time(target), stream=stream)
        except av.FFmpegError:
            return None
        packet = next_packet(container, stream)
        time = packet_time(packet)
        if time is not None and packet.is_keyframe:
            first = clock.number(time)
            if first is not None and first <= start:
                return packet, first
    return None


def _decode(
    container: InputContainer, stream: VideoStream, first: "Packet[VideoStream] | None" = None
) -> Generator[VideoFrame, None, None]:
    """The frames of `first` and of all packets that follow it (the last one flushes the decoder)."""
    if first:
        yield from stream.decode(first)
    with demux(container, stream) as packets:
        for packet in packets:
            yield from stream.decode(packet)


def _too_short(start: int, frames: int, found: int) -> str:
    return f"ends after {found} frames, but frames {start} to {start + frames - 1} were asked for"
