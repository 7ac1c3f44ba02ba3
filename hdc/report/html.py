"""Pieces of a page: elements that escape what they are given, tables, numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


class Html(str):
    """Text that is HTML already; every other string is escaped on its way into an element."""


@dataclass(frozen=True)
class Number:
    """A figure in a table: shown as `text`, with every digit of `value` where the pointer rests."""

    text: str
    value: float


def number(value: float) -> Number:
    """Four digits are enough to read."""
    return Number(f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}", value)


def percent(share: float) -> Number:
    return Number(f"{100 * share:.1f}", 100 * share)


def points(difference: float) -> Number:
    """Of two percentages, with its sign."""
    return Number(f"{difference:+.1f}", difference)


def element(name: str, *children: object, **attributes: object) -> Html:
    """`element("td", "a < b", class_="n")`: attributes lose a last _, the other ones become -."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable[object]) -> Html:
    """Everything that is not `Html` is escaped."""
    return Html(
        "".join(child if isinstance(child, Html) else escape(str(child)) for child in children)
    )


def table(caption: object, header: Sequence[object], rows: Sequence[Sequence[object]]) -> Html:
    """A table in a box of its own that scrolls sideways on a narrow screen; the first column heads the rows."""
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    classes = [
        {"class_": "n"} if any(isinstance(cell, Number) for cell in column) else {}
        for column in columns
    ]
    head = [
        element("th", cell, scope="col", **names)
        for cell, names in zip(header, classes, strict=True)
    ]
    body = [
        element("tr", element("th", first, scope="row"), *map(_cell, rest, classes[1:]))
        for first, *rest in rows
    ]
    title = [element("caption", caption)] if caption else []
    inner = (*title, element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", element("table", *inner), class_="wide")


def section(identity: str, title: str, *children: object) -> Html:
    return element("section", element("h2", title), *children, id=identity)


def folded(title: object, *children: object) -> Html:
    """Closed until somebody wants it."""
    return element("details", element("summary", title), *children)


def _cell(value: object, names: dict[str, str]) -> Html:
    if isinstance(value, Number):
        return element("td", value.text, title=value.value, **names)
    return element("td", value, **names)
