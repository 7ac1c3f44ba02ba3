"""Foresees from smaller sizes what a contender will need, so that none stalls or kills the comparison."""

import math
from typing import NamedTuple

from contenders import OURS


class Need(NamedTuple):
    """What one forward and backward pass took."""

    batch: int
    seconds: float
    bytes: int


class Budget:
    """Limits for one forward and backward pass, and what has been seen so far.

    Ours has none: it is what the others are measured beside, in any case.
    """

    def __init__(self, seconds: float, memory: float) -> None:
        self.seconds, self.memory = seconds, memory
        self._seen: dict[tuple[str, str], list[Need]] = {}

    def record(self, problem: str, name: str, need: Need) -> None:
        self._seen.setdefault((problem, name), []).append(need)

    def objection(self, problem: str, name: str, batch: int) -> str | None:
        """Why it should not run at this size; None if it may."""
        seen = self._seen.get((problem, name), []) if name != OURS else []
        if not seen:
            return None
        seconds = _extrapolate([(n.batch, n.seconds) for n in seen], batch)
        memory = _extrapolate([(n.batch, n.bytes) for n in seen], batch)
        if seconds > self.seconds:
            return f"would take {seconds:.0f} s a call, going by B = {seen[-1].batch:,}"
        if memory > self.memory:
            return f"would take {memory / 2**30:.0f} GiB, going by B = {seen[-1].batch:,}"
        return None


def _extrapolate(points: list[tuple[int, float]], batch: int) -> float:
    """With the square of the batch, or faster where the last two points grew faster."""
    power = 2.0
    last, value = points[-1]
    if len(points) > 1 and min(points[-2][1], value) > 0 and points[-2][0] < last:
        power = max(power, math.log(value / points[-2][1]) / math.log(last / points[-2][0]))
    return value * (batch / last) ** power
