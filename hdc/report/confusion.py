"""The confusion matrix of a tested model: rows are classes, columns what the model took them for."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hdc.report.html import Html, element, joined, number, percent, table

WRITTEN = 20  # classes up to which the cells have room for their numbers
WORST = 10
LETTER = 0.62  # width of a letter over its height, roughly


def draw_confusion(predictions: Sequence[dict[str, Any]]) -> Html:
    """The matrix as SVG, blue where the model was right and orange where not, and its worst mistakes."""
    pairs = Counter((str(entry["class"]), str(entry["predicted"])) for entry in predictions)
    names = sorted({name for pair in pairs for name in pair})
    totals = Counter(str(entry["class"]) for entry in predictions)
    mistakes = [(pair, count) for pair, count in pairs.most_common() if pair[0] != pair[1]]
    worst = [
        (true, taken, number(count), percent(count / totals[true]))
        for (true, taken), count in mistakes[:WORST]
    ]
    parts = [
        element(
            "p",
            "Rows: the class of a test video. Columns: what the model says. The stronger the colour, the "
            "larger the share of its row; blue is right, orange is wrong. The pointer shows the count.",
            class_="soft",
        ),
        element("div", _matrix(names, pairs, totals), class_="wide"),
    ]
    if worst:
        parts.append(
            table("Most frequent mistakes", ["class", "taken for", "videos", "% of class"], worst)
        )
    return joined(parts)


def _matrix(names: Sequence[str], pairs: Counter[tuple[str, str]], totals: Counter[str]) -> Html:
    written = len(names) <= WRITTEN
    cell, letters = (34, 12) if written else (12, 9)
    margin = round(max(map(len, names)) * letters * LETTER) + 10
    side = cell * len(names)
    place = {name: margin + cell * i for i, name in enumerate(names)}
    drawing = [
        element("rect", x=margin, y=margin, width=side, height=side, class_="empty"),
        *(_name(name, margin - 5, place[name] + cell / 2, letters, turned=False) for name in names),
        *(_name(name, place[name] + cell / 2, margin - 5, letters, turned=True) for name in names),
    ]
    for (true, taken), count in sorted(pairs.items()):
        share = count / totals[true]
        x, y = place[taken], place[true]
        kind = "right" if true == taken else "wrong"
        drawing.append(
            element(
                "rect",
                element("title", f"{true} → {taken}: {count} of {totals[true]} ({share:.0%})"),
                x=x + 0.5,
                y=y + 0.5,
                width=cell - 1,
                height=cell - 1,
                class_=kind,
                fill_opacity=f"{0.15 + 0.85 * share:.2f}",
            )
        )
        if written:
            drawing.append(
                element(
                    "text",
                    count,
                    x=x + cell / 2,
                    y=y + cell / 2 + letters / 3,
                    class_=f"count on-{kind}" if share > 0.5 else "count",
                )
            )
    size = margin + side + 1
    label = f"Confusion matrix of {len(names)} classes and {sum(totals.values())} videos"
    return element(
        "svg",
        *drawing,
        viewBox=f"0 0 {size} {size}",
        width=size,
        font_size=letters,
        role="img",
        aria_label=label,
        class_="confusion",
    )


def _name(name: str, x: float, y: float, letters: int, *, turned: bool) -> Html:
    """To the left of a row, or upwards from a column."""
    if turned:
        x += letters / 3
        return element("text", name, x=x, y=y, transform=f"rotate(-90 {x} {y})")
    return element("text", name, x=x, y=y + letters / 3, class_="y")
