"""Real video files whose frames carry their number, manifests of them, and the CUDA kernels' machine code."""

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import cuda_objects
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Run Triton kernels in its interpreter; it must know before anything imports it.
    os.environ["TRITON_INTERPRET"] = "1"

from hdc.data.manifest import Manifest

BITS = 8


def barcode(number: int, width: int, height: int) -> np.ndarray:
    """A frame of eight columns, one per bit of `number`, dark or light: coding cannot blur them away."""
    bits = [number >> bit & 1 for bit in range(BITS)]
    columns = np.repeat(np.where(bits, 220, 30), -(-width // BITS))[:width]
    return np.broadcast_to(columns[None, :, None], (height, width, 3)).astype(np.uint8)


def read_barcodes(frames: np.ndarray) -> list[int]:
    """The numbers in frames [T, H, W, 3] that show the whole width."""
    width = frames.shape[2]
    centres = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
    light = frames[:, :, centres].mean((1, 3)) > 125
    return [int(sum(bit << place for place, bit in enumerate(row))) for row in light.tolist()]


def encode(
    path: Path,
    frames: int = 48,
    *,
    codec: str = "mpeg4",
    width: int = 64,
    height: int = 64,
    gop: int = 12,
    b_frames: int = 0,
    rate: Fraction | int = 25,
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    unit: Fraction = Fraction(1, 1000),
    rotation: int = 0,
    draw: Callable[[int, int, int], np.ndarray] = barcode,
) -> Path:
    """Write a video; `draw` takes the frame's number, width and height.

    `times`, in `unit`s of a second, replace those of a constant rate. `rotation` is how a player is to turn it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 2_000_000
        stream.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = unit
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            image = np.ascontiguousarray(draw(number, width, height))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def list_videos(folder: Path, rows: Sequence[tuple[str, int, int, str, str]]) -> Manifest:
    """A manifest of rows (path, start, frames, label, part of split 1)."""
    path, start, frames, label, part = (list(column) for column in zip(*rows, strict=True))
    return Manifest(
        folder / "manifest.csv",
        np.array(path),
        np.array(start),
        np.array(frames),
        {"label": np.array(label), "split1": np.array(part)},
    )


@pytest.fixture(scope="session")
def read_kernels(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path, str], list[cuda_objects.Kernel]]:
    """`cuda_objects.read_kernels` in a folder that all processes of this test run share."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return partial(cuda_objects.read_kernels, folder)


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    return encode


@pytest.fixture(scope="session")
def frame_numbers() -> Callable[[np.ndarray], list[int]]:
    return read_barcodes


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Manifest]:
    return list_videos


@pytest.fixture(scope="session")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Seven videos of 48 numbered frames, 32 × 32: four to train with and three to test with."""
    folder = tmp_path_factory.mktemp("numbered")
    rows = []
    for video in range(7):
        encode(folder / f"{video}.avi", width=32, height=32)
        rows.append((f"{video}.avi", 0, 48, "ab"[video % 2], "train" if video < 4 else "test"))
    return list_videos(folder, rows)
