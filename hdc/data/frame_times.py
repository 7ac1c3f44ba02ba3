"""Which number a frame has, by its time: at a constant rate by arithmetic, at any other by counting packets.

A frame's number is how many are shown before it. Neither way decodes anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

MOST_REORDERED = 16  # frames between a keyframe's place in decoding order and in time
CLOCKS_KEPT = 16384  # files whose times a process remembers, up to some kB each


class Clock(Protocol):
    """Frame numbers and times, in the units of the stream."""

    def time(self, number: int) -> int:
        """Where to seek for a frame."""

    def number(self, time: int) -> int | None:
        """Of the keyframe with this time; None for one that is not shown."""


@dataclass(frozen=True)
class _Even:
    """Times of a constant rate: `per_unit` frames each from `origin` on."""

    origin: int
    per_unit: Fraction

    def time(self, number: int) -> int:
        return self.origin + round(number / self.per_unit)

    def number(self, time: int) -> int | None:
        number = round((time - self.origin) * self.per_unit)
        return number if number >= 0 else None  # below 0: the frames that an edit list cuts off


@dataclass(frozen=True)
class _Counted:
    """The keyframes with how many frames are shown before each: ascending int64 arrays [keyframes]."""

    times: np.ndarray
    numbers: np.ndarray

    def time(self, number: int) -> int:
        place = int(np.searchsorted(self.numbers, number, side="right")) - 1
        return int(self.times[max(0, place)])

    def number(self, time: int) -> int | None:
        place = int(np.searchsorted(self.times, time))
        known = place < len(self.times) and self.times[place] == time
        return int(self.numbers[place]) if known else None


@dataclass
class _Known:
    """A file's clock, and the size and time of change of the file that it is of."""

    stamp: tuple[int, int] | None = None
    clock: Clock | None = None


def find_clock(path: Path, container: InputContainer, stream: VideoStream) -> Clock | None:
    """None where packets carry no usable times. `container` is where it was opened, and then anywhere."""
    known, status = _known(str(path)), path.stat()
    stamp = status.st_size, status.st_mtime_ns
    if known.stamp != stamp:
        known.clock, known.stamp = _look(container, stream), stamp
    return known.clock


@lru_cache(CLOCKS_KEPT)
def _known(path: str) -> _Known:
    """What is remembered of a file, nothing at first: to find its clock may cost as much as to read all of it."""
    return _Known()


def _look(container: InputContainer, stream: VideoStream) -> Clock | None:
    rate, unit = stream.average_rate, stream.time_base
    if rate and unit and _is_even(stream, rate * unit):
        origin = _origin(container, stream)
        return None if origin is None else _Even(origin, rate * unit)
    return _count_keyframes(container, stream)


def _is_even(stream: VideoStream, per_unit: Fraction) -> bool:
    """Whether the container's index lists every frame, and `_Even` gives their numbers.

    MP4 and AVI have such an index (120 µs for 300 frames). It has decoding times: within a quarter of a frame of an
    even grid they leave none for the times of keyframes, each of which is some frame's decoding time plus a constant.
    """
    index = stream.index_entries
    if not len(index) or len(index) != stream.frames:  # an AVI counts the frames that were dropped
        return False
    shown = [entry.timestamp for entry in index if not entry.is_discard]
    times = np.array(shown, dtype=np.int64)
    numbers = (times - times[:1]) * float(per_unit)
    return bool((abs(numbers - np.arange(len(times))) < 0.25).all())


def _count_keyframes(container: InputContainer, stream: VideoStream) -> _Counted | None:
    """Read off the packets; None where their times are missing, not distinct, or start over."""
    found: list[int | None] = []
    keyframes: list[int] = []
    # What lies behind damage has no number.
    with suppress(av.FFmpegError), demux(container, stream) as packets:
        for packet in packets:
            if is_shown(packet, stream):
                if packet.is_keyframe:
                    keyframes.append(len(found))
                found.append(packet_time(packet))
    known = [time for time in found if time is not None]
    times, rank = np.unique(np.array(known, dtype=np.int64), return_inverse=True)
    if not keyframes or len(times) < len(found):
        return None
    if abs(rank - np.arange(len(rank))).max() > MOST_REORDERED:
        return None
    numbers = np.sort(rank[keyframes])
    return _Counted(times[numbers], numbers)


def _origin(container: InputContainer, stream: VideoStream) -> int | None:
    """The time of frame 0 in the units of the stream, None where packets carry no times.

    The first packet has it, unless an edit list cuts that packet off. `stream.start_time` will not do
    for an AVI with B-frames, where it is a decoding time.
    """
    packet = next_packet(container, stream)
    return stream.start_time if packet.is_discard else packet_time(packet)


def packet_time(packet: "Packet[VideoStream]") -> int | None:
    """When its frame is shown, in units of the stream; where the file does not say that, when it is decoded."""
    return packet.pts if packet.pts is not None else packet.dts


def is_shown(packet: "Packet[VideoStream]", stream: VideoStream) -> bool:
    """False for what ends a stream, for the empty packets of dropped frames, and for what an edit list cuts off.

    VP8 has frames that others refer to and nobody sees, in packets of their own: RFC 6386, section 9.1.
    """
    if packet.size == 0 or packet.is_discard:
        return False
    return stream.codec_context.name != "vp8" or bool(memoryview(packet)[0] & 0x10)


@contextmanager
def demux(
    container: InputContainer, stream: VideoStream
) -> "Iterator[Iterator[Packet[VideoStream]]]":
    """From where the file is. PyAV 18.1 loses 0.3 kB for every such iterator that is dropped, not closed."""
    packets = container.demux(stream)
    try:
        yield packets
    finally:
        packets.close()  # type: ignore[attr-defined]


def next_packet(container: InputContainer, stream: VideoStream) -> "Packet[VideoStream]":
    """Of the stream, from where the file is."""
    with demux(container, stream) as packets:
        return next(packets)
