"""Everyone who may take part in the comparison of a problem."""

from contenders import HD_NCE, INFO_NCE, OVERHEAD, Contender
from family import FAMILY


def of(problem: str) -> list[Contender]:
    """In the order of the tables."""
    return {"HD-NCE": HD_NCE, "overhead": OVERHEAD, **FAMILY}.get(problem, INFO_NCE)
