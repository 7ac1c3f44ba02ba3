"""Figures of the results that `compare.py` stores, in `bench/results/`: time, speed-up, memory, error."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import report
from contenders import COMPILED, EAGER, OURS, OURS_IN_BFLOAT16, OURS_IN_CUDA
from family import FAMILY
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hdc import atomic

Result = dict[str, Any]
# Okabe and Ito's colours, which the colour-blind tell apart; ours is the darkest.
COLOURS = {
    OURS: "#000000",
    "ours, compiled": "#7f7f7f",
    OURS_IN_CUDA: "#bfbfbf",
    OURS_IN_BFLOAT16: "#bfbfbf",
    EAGER: "#d55e00",
    COMPILED: "#e69f00",
    "linear_cross_entropy": "#0072b2",
    "info-nce-pytorch": "#56b4e9",
    "pytorch-metric-learning": "#cc79a7",
    "KeOps": "#009e73",
    "Inf-CL": "#cc79a7",
    "memeff": "#009e73",
    "FlexAttention": "#56b4e9",
}
WIDTH, HEIGHT, DPI = 9.0, 4.2, 150


def write(results: Sequence[Result], folder: Path = report.RESULTS) -> list[Path]:
    """All figures of all results; those of a GPU have names of their own."""
    written = []
    for result in results:
        for name, draw in (
            ("time", _time),
            ("speedup", _speedup),
            ("memory", _memory),
            ("error", _error),
        ):
            path = folder / f"{name}-{result['settings']['device']}.png"
            figure = draw(result)
            atomic.write(path, partial(figure.savefig, dpi=DPI))
            written.append(path)
    return written


def _panels(
    count: int, title: str, subtitle: str, height: float = HEIGHT
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    axes = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        ax.set_axisbelow(True)
    figure.supxlabel(subtitle, fontsize=7.5, color="#555555", x=0.01, ha="left")
    return figure, axes


def _label_ends(ax: Axes, ends: Sequence[tuple[str, float, float, str]], gap: float) -> None:
    """A name at the last point of each line; those too close move up, `gap` being a factor."""
    lowest = 0.0
    for name, x, y, colour in sorted(ends, key=lambda end: end[2]):
        lowest = max(y, lowest * gap)
        ax.annotate(
            name,
            (x, y),
            (x * 1.25, lowest),
            color=colour,
            fontsize=8.5,
            va="center",
            fontweight="bold" if name == OURS else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "shrinkA": 0,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )


def _style(name: str) -> dict[str, Any]:
    ours = name == OURS
    return {
        "color": COLOURS[name],
        "linewidth": 2.4 if ours else 1.4,
        "marker": "o",
        "markersize": 5 if ours else 3.5,
        "zorder": 3 if ours else 2,
    }


def _against_batch(ax: Axes, series: dict[str, list[tuple[int, float]]]) -> None:
    """Lines over the batch, both axes logarithmic, each with its name at its end."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ends = []
    for name, points in series.items():
        batches, values = zip(*points, strict=True)
        ax.plot(batches, values, **_style(name))
        ends.append((name, batches[-1], values[-1], COLOURS[name]))
    sizes = sorted({batch for points in series.values() for batch, _ in points})
    ax.set_xticks(
        sizes, [f"{size:,}" for size in sizes], fontsize=8.5, rotation=30 if len(sizes) > 5 else 0
    )
    ax.minorticks_off()
    ax.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    heights = [value for points in series.values() for _, value in points]
    decades = math.log10(max(heights) / min(heights)) + 1
    _label_ends(ax, ends, gap=10 ** (decades / 20))
    ax.set_xlabel("batch B")


def _series(cases: list[dict[str, Any]], what: str) -> dict[str, list[tuple[int, float]]]:
    """For each contender its (B, value) of plain InfoNCE."""
    series: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        for name, found in case["contenders"].items() if case["problem"] == "InfoNCE" else ():
            if what in found:
                value = found[what]["median"] if isinstance(found[what], dict) else found[what]
                series.setdefault(name, []).append((case["batch"], value))
    return series


def _default_runs(result: Result) -> list[dict[str, Any]]:
    return [run for run in result["runs"] if run["allocator"] == "default"]


def _run_title(result: Result, run: dict[str, Any]) -> str:
    if result["settings"]["device"] == "cuda":
        return str(result["machine"]["gpu"])
    return f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}"


def _time(result: Result) -> Figure:
    runs = _default_runs(result)
    figure, axes = _panels(len(runs), "InfoNCE, forward + backward", report.describe(result))
    for ax, run in zip(axes, runs, strict=True):
        _against_batch(ax, _series(run["cases"], "step"))
        ax.set_title(_run_title(result, run), loc="left", fontsize=10)
    axes[0].set_ylabel("time of a step")
    axes[0].yaxis.set_major_formatter(lambda seconds, _: report.time(seconds))
    return figure


def _memory(result: Result) -> Figure:
    figure, (ax,) = _panels(
        1,
        "InfoNCE, peak memory of forward + backward",
        f"what is compiled is shown by a lower bound\n{report.describe(result)}",
    )
    floor = 2**16  # pages are counted by the system in lumps; less than this is nothing
    series = _series(result["memory"], "peak_bytes")
    _against_batch(ax, {n: [(b, max(v, floor)) for b, v in points] for n, points in series.items()})
    ax.set_yscale("log", base=2)
    ax.set_ylabel("memory on top of the inputs")
    ax.yaxis.set_major_formatter(lambda count, _: report.amount(count))
    return figure


def _short(case: dict[str, Any]) -> str:
    """A title that leaves room for eight others."""
    if case["problem"] == "InfoNCE":
        return f"{case['batch']:,}"
    return f"sym.\n{case['batch']:,}" if case["problem"] != "HD-NCE" else "HD-\nNCE"


def _speedup(result: Result) -> Figure:
    runs = _default_runs(result)
    title = "How many times as long as ours plain PyTorch takes"
    figure, axes = _panels(len(runs), title, report.describe(result))
    for ax, run in zip(axes, runs, strict=True):
        others = [
            other
            for other in result["runs"]
            if other["threads"] == run["threads"] and other is not run
        ]
        cases = [case for case in run["cases"] if case["problem"] not in ("overhead", *FAMILY)]
        for offset, name in ((-0.2, EAGER), (0.2, COMPILED)):
            heights = [report.ratio(case, name) or 0 for case in cases]
            places = [number + offset for number in range(len(cases))]
            ax.bar(places, heights, 0.38, color=COLOURS[name], label=name)
            for place, height in zip(places, heights, strict=True):
                if height:  # at the foot, clear of the marks
                    ax.text(place, 0.08, f"{height:.1f}", fontsize=6, ha="center", va="bottom")
            for other in others:
                twins = [report.same(other, case) for case in cases]
                found = [twin and report.ratio(twin, name) for twin in twins]
                points = [
                    (place, value) for place, value in zip(places, found, strict=True) if value
                ]
                if points:
                    label = f"with a {other['allocator']}" if name == EAGER else None
                    x, y = zip(*points, strict=True)
                    ax.scatter(x, y, 130, "black", marker="_", zorder=3, label=label)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_xticks(range(len(cases)), [_short(case) for case in cases], fontsize=6.5)
        ax.set_xlabel("batch B (sym.: symmetric InfoNCE)")
        ax.set_title(_run_title(result, run), loc="left", fontsize=10)
    axes[0].set_ylabel("time of a step / ours")
    axes[0].set_ylim(top=axes[0].get_ylim()[1] * 1.2)
    axes[0].legend(frameon=False, fontsize=8.5, loc="upper left", ncols=3)
    return figure


def _error(result: Result) -> Figure:
    rows = result["accuracy"]
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = _panels(
        len(kinds),
        "InfoNCE, error of the gradients against float64",
        f"relative, in the Euclidean norm; B = {result['settings']['accuracy_batch']}\n{report.describe(result)}",
    )
    markers = {"float32": "o", "bfloat16": "s", "float16": "^"}
    for ax, data in zip(axes, kinds, strict=True):
        temperatures = sorted({row["temperature"] for row in rows})
        ends = []
        for name in (EAGER, OURS):
            for dtype, marker in markers.items():
                points = [
                    (temperatures.index(row["temperature"]) + 1, row["gradient_error"])
                    for row in rows
                    if (row["data"], row["implementation"], row["dtype"]) == (data, name, dtype)
                    and row["gradient_error"] is not None
                ]
                style = {**_style(name), "marker": marker, "markersize": 5.5}
                ax.plot(*zip(*points, strict=True), **style)
                ends.append((f"{name} {dtype}", *points[-1], COLOURS[name]))
        ax.set_yscale("log")
        ax.set_xlim(0.7, len(temperatures) + 0.3)
        _label_ends(ax, ends, gap=2.2)
        ax.set_xticks(range(1, len(temperatures) + 1), [f"τ = {tau}" for tau in temperatures])
        titles = {
            "random": "random embeddings",
            "converged": "converged: key = query + 0.001 · noise",
        }
        ax.set_title(titles[data], loc="left", fontsize=10)
    axes[0].set_ylabel("relative error")
    return figure
