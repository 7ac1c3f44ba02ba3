"""What a file of plain values must look like: a page about it can then be drawn without looking again.

A shape is a `Kind` of value, a list of one shape, or a dict of them. In a dict a key with a ? at its end may be
missing, `...` stands for all keys that are not named, and without it these may hold anything.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hdc.errors import InputError


@dataclass(frozen=True)
class Kind:
    """Of a single value; `words` follow "it must be"."""

    words: str
    holds: Callable[[Any], bool]


Fields = Mapping[Any, Any]  # str or ... → Shape
Shape = Kind | list[Any] | Fields


def _is_number(value: object) -> bool:
    """Of a size that can be subtracted, scaled and drawn; a float may be NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return (isinstance(value, float) and not math.isfinite(value)) or abs(value) < 1e300


def _is_count(value: object) -> bool:
    """Of a size that a float holds exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53


TEXT = Kind("text", lambda value: isinstance(value, str) and "\0" not in value)
NUMBER = Kind("a number", _is_number)
COUNT = Kind("a whole number of at least 0", _is_count)


def or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.holds(value))


def one_of(names: Iterable[str]) -> Kind:
    known = tuple(names)
    return Kind(f"one of {', '.join(known)}", lambda value: value in known)


def check(value: object, shape: Shape, source: str, place: str = "") -> None:
    """Compare `value` with `shape`.

    Args:
        source: the file that it comes from, for the message.
        place: where in it, such as "models.HDC.probe".

    Raises:
        InputError: they differ; says where.
    """
    if isinstance(shape, Kind):
        if not shape.holds(value):
            raise _fault(source, place, value, shape.words)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise _fault(source, place, value, "a list")
        for index, entry in enumerate(value):
            check(entry, shape[0], source, f"{place}[{index}]")
    else:
        if not isinstance(value, dict):
            raise _fault(source, place, value, "an object")
        inner = f"{place}." if place else ""
        named = {key.removesuffix("?"): kind for key, kind in shape.items() if key is not ...}
        for name in required(shape):
            if name not in value:
                raise InputError(f"{source}: {inner}{name} is missing")
        for name, entry in value.items():
            kind = named.get(name, shape.get(...))
            if kind is not None:
                check(entry, kind, source, f"{inner}{name}")


def required(shape: Fields) -> list[str]:
    """The names that must be there."""
    return [key for key in shape if key is not ... and not key.endswith("?")]


def _fault(source: str, place: str, value: object, words: str) -> InputError:
    return InputError(f"{source}: {place or 'this'} is {reprlib.repr(value)}; it must be {words}")
