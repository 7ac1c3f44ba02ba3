"""The paper's Figure 1: queries beside each model's nearest neighbour, hits green, misses red."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hdc import atomic
from hdc.data.manifest import Manifest
from hdc.data.video import read_all
from hdc.retrieval import RetrievalResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREEN, RED, INK, PAPER = "#1a7f37", "#cf222e", "#1f2328", "#ffffff"
ROWS, SHOWN, GAP = 6, 3, 3  # queries, frames of a clip, pixels between frames


@dataclass(frozen=True)
class Column:
    """One model's retrievals; all columns share their queries."""

    name: str
    result: RetrievalResult


def draw_retrievals(
    path: Path, columns: list[Column], labels: tuple[str, ...], *, seed: int, size: int = 96
) -> None:
    """Write a PNG with `ROWS` random queries and every model's nearest clip.

    Args:
        labels: the manifest columns whose words stand below a clip, each green or red by itself.
        size: short side in pixels at which frames are decoded.
    """
    from matplotlib.figure import Figure  # half a second that no other command should wait for

    queries = columns[0].result.queries.manifest
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(queries), min(ROWS, len(queries)), replace=False))
    width, height = 2.35 * (1 + len(columns)), 1.02 * len(rows) + 0.45
    figure = Figure(figsize=(width, height), dpi=150, facecolor=PAPER)
    grid = figure.subplots(len(rows), 1 + len(columns), squeeze=False)
    for line, (row, axes) in enumerate(zip(rows, grid, strict=True)):
        _draw_clip(axes[0], queries, row, size)
        words = [str(queries.columns[label][row]) for label in labels]
        _draw_words(axes[0], words, [INK] * len(words))
        for column, ax in zip(columns, axes[1:], strict=True):
            gallery = column.result.gallery.manifest
            found = int(column.result.neighbors[row, 0])
            _draw_clip(ax, gallery, found, size)
            answers = [str(gallery.columns[label][found]) for label in labels]
            hits = [answer == word for answer, word in zip(answers, words, strict=True)]
            _draw_words(ax, answers, [GREEN if hit else RED for hit in hits], hits)
            for spine in ax.spines.values():
                spine.set(visible=True, color=GREEN if all(hits) else RED, linewidth=1.8)
        if line == 0:
            for ax, name in zip(axes, ["query", *(c.name for c in columns)], strict=True):
                ax.set_title(name, fontsize=10, fontweight="bold", color=INK, pad=5)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.32 / height, bottom=0.25 / height, hspace=0.36, wspace=0.06
    )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    atomic.write_bytes(path, image.getvalue())


def _draw_clip(ax: "Axes", manifest: Manifest, row: int, size: int) -> None:
    """A clip as a strip of its first, middle and last frame."""
    start, count = int(manifest.start[row]), int(manifest.frames[row])
    frames = read_all(manifest.file(row), size, start, count)
    strip = []
    for number in np.linspace(0, count - 1, SHOWN).astype(int):
        strip += [frames[number], np.full((frames.shape[1], GAP, 3), 255, dtype=np.uint8)]
    ax.imshow(np.concatenate(strip[:-1], axis=1), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _draw_words(
    ax: "Axes", words: list[str], colors: list[str], hits: list[bool] | None = None
) -> None:
    """Class names below the clip, side by side; a hit is bold, so that colour is not the only sign."""
    places = (np.arange(len(words)) + 0.5) / len(words)
    weights = ["bold" if hit else "normal" for hit in hits or [False] * len(words)]
    for place, word, color, weight in zip(places, words, colors, weights, strict=True):
        ax.text(
            place,
            -0.06,
            word,
            color=color,
            fontsize=8,
            fontweight=weight,
            ha="center",
            va="top",
            transform=ax.transAxes,
        )
