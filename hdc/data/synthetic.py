"""A toy dataset that shows the decoupling: real video files in UCF101's layout, made in seconds.

A video is six takes of 16 frames. Its motion is one of five classes and holds for the whole video; its
appearance, one of six families of texture, is drawn anew for every take. So two clips of one video
share their motion but not their looks, and two views of one clip share both. `fixed_appearance` keeps
the looks, too: then they become a shortcut for Temporal Contrast.

The class folders are the motions. `takes.csv` lists every take with its motion, its appearance, and both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from hdc.atomic import write_text
from hdc.data.manifest import Manifest
from hdc.data.ucf101 import LISTS, VIDEOS, index_ucf101

MOTIONS = (
    "Down",
    "Side",
    "Spin",
    "Static",
    "Up",
)  # left and right are one class: a flip swaps them
TEXTURES = ("checker", "dash", "dots", "grid", "holes", "rings")
TAKES, TAKE_FRAMES, SIZE, FPS = 6, 16, 48, 25


@dataclass(frozen=True)
class _Looks:
    """One draw of appearance. Lengths are in half frame heights."""

    texture: str
    angle: float
    frequency: float
    stretch: float
    duty: float
    offset: np.ndarray
    light: np.ndarray
    dark: np.ndarray


def make_dataset(
    root: Path, *, train: int, test: int, seed: int, fixed_appearance: bool = False
) -> tuple[Manifest, Manifest]:
    """Write the videos, the split files and two manifests below `root`.

    Args:
        train, test: number of videos in either part, a multiple of five (the motions share evenly).
        seed: the same seed gives the same pixels before encoding.
        fixed_appearance: one appearance per video instead of one per take.

    Returns:
        `manifest.csv` (rows are videos, labelled by motion) and `takes.csv` (rows are takes, labelled
        "motion", "appearance" and "both").
    """
    rows: list[tuple[str, int, str, str, str]] = []
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for part, count in (("train", train), ("test", test)):
        for number in range(count):
            motion = MOTIONS[number % len(MOTIONS)]
            # Each video has a stream of its own, so its pixels do not depend on how many there are.
            rng = np.random.default_rng((seed, part == "test", number))
            name = f"{motion}/v_{motion}_g{number // len(MOTIONS) + 1:02}_c{1 + (part == 'test'):02}.avi"
            textures = _write_video(root / VIDEOS / name, motion, rng, fixed_appearance)
            lists[part].append(name)
            for take, texture in enumerate(textures):
                rows.append((f"{VIDEOS}/{name}", take * TAKE_FRAMES, motion, texture, part))
    _write_lists(root, lists)
    manifest = index_ucf101(root)
    manifest.write()
    path, start, motion_column, texture_column, part_column = (
        np.array(c) for c in zip(*rows, strict=True)
    )
    takes = Manifest(
        root / "takes.csv",
        path,
        start,
        np.full(len(rows), TAKE_FRAMES),
        {
            "motion": motion_column,
            "appearance": texture_column,
            "both": np.array([f"{m} {t}" for _, _, m, t, _ in rows]),
            "split1": part_column,
        },
    )
    takes.write()
    return manifest, takes


def _write_lists(root: Path, lists: dict[str, list[str]]) -> None:
    folder = root / LISTS
    number = {motion: index for index, motion in enumerate(MOTIONS, start=1)}
    write_text(folder / "classInd.txt", "".join(f"{i} {name}\n" for name, i in number.items()))
    train = "".join(f"{name} {number[name.split('/')[0]]}\n" for name in lists["train"])
    write_text(folder / "trainlist01.txt", train)
    write_text(folder / "testlist01.txt", "".join(f"{name}\n" for name in lists["test"]))


def draw_takes(
    motion: str,
    rng: np.random.Generator,
    *,
    takes: int = TAKES,
    width: int = SIZE,
    height: int = SIZE,
    fixed_appearance: bool = False,
) -> Iterator[tuple[str, np.ndarray]]:
    """One video, take by take: the texture's name, and uint8 frames [16, height, width, 3]."""
    move = _draw_motion(motion, rng)
    looks = [_draw_looks(rng) for _ in range(takes)]
    if fixed_appearance:
        looks = looks[:1] * takes
    for take in looks:
        yield take.texture, _render(take, move, width, height)


def _write_video(
    path: Path, motion: str, rng: np.random.Generator, fixed_appearance: bool
) -> list[str]:
    """Draw and encode one video; returns the texture of every take."""
    textures = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000  # more than 48 × 48 pixels need: next to no coding loss
        stream.gop_size = TAKE_FRAMES
        stream.codec_context.thread_count = 1
        for texture, images in draw_takes(motion, rng, fixed_appearance=fixed_appearance):
            textures.append(texture)
            for image in images:
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        container.mux(stream.encode(None))
    return textures


@dataclass(frozen=True)
class _Motion:
    """Per frame: a shift in half frame heights, and a turn in radians, about the centre."""

    shift: np.ndarray
    turn: float


def _draw_motion(motion: str, rng: np.random.Generator) -> _Motion:
    sign = rng.choice((-1.0, 1.0))
    if motion == "Spin":
        return _Motion(np.zeros(2), sign * rng.uniform(0.15, 0.20))
    if motion == "Static":
        return _Motion(np.zeros(2), 0.0)
    heading = {"Down": np.pi / 2, "Up": -np.pi / 2, "Side": 0.0 if sign > 0 else np.pi}[motion]
    heading += rng.uniform(-0.25, 0.25)
    speed = rng.uniform(0.09, 0.11)
    return _Motion(speed * np.array([np.cos(heading), np.sin(heading)]), 0.0)


def _draw_looks(rng: np.random.Generator) -> _Looks:
    return _Looks(
        texture=str(rng.choice(TEXTURES)),
        angle=rng.uniform(0, np.pi),
        frequency=rng.uniform(1.0, 1.6),
        stretch=rng.uniform(0.85, 1.2),
        duty=rng.uniform(0.4, 0.6),
        offset=rng.uniform(0, 1, 2),
        # Bright on dark in every channel: replicating any one of them must not erase the texture.
        light=rng.uniform(0.6, 1.0, 3),
        dark=rng.uniform(0.0, 0.3, 3),
    )


def _render(looks: _Looks, motion: _Motion, width: int, height: int) -> np.ndarray:
    """The frames of one take: uint8 [16, height, width, 3]."""
    across, down = (
        (np.arange(side) + 0.5) / height * 2 - side / height for side in (width, height)
    )
    y, x = np.meshgrid(down, across, indexing="ij")
    time = np.arange(TAKE_FRAMES)[:, None, None]
    x, y = x - motion.shift[0] * time, y - motion.shift[1] * time
    angle = looks.angle - motion.turn * time
    u = (x * np.cos(angle) + y * np.sin(angle)) * looks.frequency * looks.stretch + looks.offset[0]
    v = (y * np.cos(angle) - x * np.sin(angle)) * looks.frequency / looks.stretch + looks.offset[1]
    pattern = _pattern(looks.texture, u, v, looks.duty)[..., None]
    colors = looks.dark + pattern * (looks.light - looks.dark)
    return np.round(255 * colors).astype(np.uint8)


def _pattern(texture: str, u: np.ndarray, v: np.ndarray, duty: float) -> np.ndarray:
    """Brightness in [0, 1], of period 1 in both coordinates, with edges about a pixel wide."""
    across, along = np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)  # distance from the middle of the cell
    distance = np.hypot(across, along)

    def inside(value: np.ndarray, bound: float) -> np.ndarray:
        return np.clip((bound - value) / 0.08 + 0.5, 0, 1)

    match texture:
        case "checker":
            return np.clip(np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v) * 3 + 0.5, 0, 1)
        case "dash":
            return inside(across, duty / 3) * inside(along, 0.38)
        case "dots":
            return inside(distance, 0.5 * duty + 0.05)
        case "grid":
            return 1 - inside(across, 0.5 - duty / 5) * inside(along, 0.5 - duty / 5)
        case "holes":
            return 1 - inside(distance, 0.5 * duty + 0.1)
        case _:  # rings
            return inside(np.abs(distance - 0.32), duty / 5)
