"""Training curves out of metrics.jsonl, as inline SVG: one panel per quantity, the values under the pointer."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hdc.report.html import Html, element, joined
from hdc.report.shapes import NUMBER

WIDTH, HEIGHT = 360, 210  # of a panel, in the units of its drawing
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 26
MOST_POINTS = 150  # of a curve; longer logs are averaged in that many pieces
NOT_DRAWN = {"step", "epoch"}
PANELS = ("Loss", "Losses by scale", "Accuracy %", "Learning rate", "Clips per second")
KNOWN = {"loss": PANELS[0], "lr": PANELS[3], "clips_per_second": PANELS[4]}
TASKS = {"spatial": "SC", "temporal": "TC"}


@dataclass(frozen=True)
class Curve:
    """name: in the legend and under the pointer. style: CSS classes. values: one per piece, None for none."""

    name: str
    style: str
    values: list[float | None]


def draw_curves(lines: Sequence[dict[str, Any]]) -> Html:
    """A panel for the loss, the losses by scale, the accuracies, and one for every other number logged."""
    names = dict.fromkeys(name for line in lines for name in line)
    numeric = [name for name in names if name not in NOT_DRAWN and _values(lines, name)]
    groups: dict[str, list[str]] = {title: [] for title in PANELS}
    for name in numeric:
        groups.setdefault(_group(name), []).append(name)
    pieces = _pieces(lines)
    panels = [_panel(title, members, pieces) for title, members in groups.items() if members]
    length = -(-len(lines) // len(pieces))
    note = f"Each point is the mean of {length} logged steps." if length > 1 else ""
    return joined([element("p", note, class_="soft"), element("div", *panels, class_="panels")])


def _values(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    found = [line[name] for line in lines if name in line]
    return [value for value in found if NUMBER.holds(value) and math.isfinite(value)]


def _pieces(lines: Sequence[dict[str, Any]]) -> list[Sequence[dict[str, Any]]]:
    length = -(-len(lines) // MOST_POINTS)
    return [lines[first : first + length] for first in range(0, len(lines), length)]


def _group(name: str) -> str:
    """The title of the panel that a logged number belongs to."""
    if name.endswith("accuracy"):
        return PANELS[2]
    return PANELS[1] if name.endswith("_loss") else KNOWN.get(name, name.replace("_", " "))


def _curve(name: str, pieces: Sequence[Sequence[dict[str, Any]]]) -> Curve:
    scale = 100 if name.endswith("accuracy") else 1
    found = [_values(piece, name) for piece in pieces]
    values = [scale * sum(piece) / len(piece) if piece else None for piece in found]
    task = re.match(r"(spatial|temporal)(\d)_", name)
    if not task:
        return Curve(name.replace("_", " "), "line", values)
    return Curve(f"{TASKS[task[1]]} block {task[2]}", f"line {task[1]} block{task[2]}", values)


def _panel(title: str, names: Sequence[str], pieces: Sequence[Sequence[dict[str, Any]]]) -> Html:
    curves = [_curve(name, pieces) for name in names]
    steps = [sum(line["step"] for line in piece) / len(piece) for piece in pieces]
    known = [value for curve in curves for value in curve.values if value is not None]
    # Losses are compared with each other, the rest with nothing: there a curve starts at zero.
    low, high = (min(known) if title in PANELS[:2] else min(0.0, *known)), max(known)
    ticks = round_numbers(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    drawing = [
        *(_horizontal(y(tick), f"{tick:g}") for tick in ticks),
        *(
            element("text", f"{tick:,.0f}", x=f"{x(tick):.1f}", y=HEIGHT - 8, class_="x")
            for tick in round_numbers(first, last)
            if first <= tick <= last and tick == int(tick)
        ),
    ]
    edges = [x(step) for step in steps]
    drawing += [_path(curve, edges, y) for curve in curves]
    middles = [LEFT, *((a + b) / 2 for a, b in pairwise(edges)), WIDTH - RIGHT]
    for number, piece in enumerate(pieces):
        drawing.append(
            element(
                "rect",
                element("title", _under_pointer(piece, curves, number)),
                class_="hover",
                x=f"{middles[number]:.1f}",
                y=TOP,
                width=f"{max(0.5, middles[number + 1] - middles[number]):.1f}",
                height=HEIGHT - TOP - BOTTOM,
            )
        )
    ends = f"{title} over training steps {steps[0]:.0f} to {steps[-1]:.0f}"
    return element(
        "figure",
        element("figcaption", element("b", title), *(map(_key, curves) if len(curves) > 1 else ())),
        element("svg", *drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=ends),
        class_="panel",
    )


def round_numbers(low: float, high: float) -> list[float]:
    """Three to seven multiples of 1, 2 or 5 times a power of ten that span [low, high] or nearly so."""
    if high - low < 1e-300:
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * k for k in (1, 2, 5, 10) if (high - low) / (size * k) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _horizontal(y: float, text: str) -> Html:
    return joined(
        [
            element("path", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", class_="rule"),
            element("text", text, x=LEFT - 5, y=f"{y + 4:.1f}", class_="y"),
        ]
    )


def _path(curve: Curve, across: list[float], y: Callable[[float], float]) -> Html:
    """One path through the values; a hole where there are none."""
    path, pen_up = "", True
    for place, value in zip(across, curve.values, strict=True):
        if value is not None:
            path += f"{'M' if pen_up else 'L'}{place:.1f} {y(value):.1f}"
        pen_up = value is None
    return element("path", d=path, class_=curve.style)


def _under_pointer(piece: Sequence[dict[str, Any]], curves: list[Curve], number: int) -> str:
    first, last = piece[0]["step"], piece[-1]["step"]
    shown = [f"step {first}" if first == last else f"steps {first} to {last}, mean"]
    for curve in curves:
        value = curve.values[number]
        if value is not None:
            shown.append(f"{curve.name}: {value:.4g}")
    return "\n".join(shown)


def _key(curve: Curve) -> Html:
    sample = element("path", d="M0 5H22", class_=curve.style)
    return element(
        "span",
        element("svg", sample, viewBox="0 0 22 10", width=22, height=10, aria_hidden="true"),
        f" {curve.name}",
        class_="key",
    )
