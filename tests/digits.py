"""Losses in 60 digits, on arrays of mpmath's numbers: who is right where two differ by their rounding errors."""

from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import numpy as np
from torch import Tensor

DIGITS = 60
STEP = (
    "1e-20"  # of differences: their own error is its square, what they cancel its number of digits
)

exp, log1p, sqrt = (np.frompyfunc(f, 1, 1) for f in (mpmath.exp, mpmath.log1p, mpmath.sqrt))


def unit(x: Any) -> Any:
    """Rows of length 1."""
    return x / sqrt((x * x).sum(-1, keepdims=True))


def cross_entropy(positive: Any, *negatives: tuple[Any, Any]) -> Any:
    """log(1 + Σ_j e^(s_ij − s_i)) of [B] and of logits [B, N] where a bool [B, N] says so, from several matrices."""
    total = 0
    for logits, there in negatives:
        total = total + np.where(there, exp(logits - positive[:, None]), 0).sum(1)
    return log1p(total)


def evaluate(function: Callable[..., Any], inputs: Sequence[Tensor], upstream: Tensor) -> list[Any]:
    """The value and, by central differences, the gradients of Σ upstream · value, as flat arrays."""
    with mpmath.workdps(DIGITS):
        step = mpmath.mpf(STEP)
        arrays, weights = [array(x) for x in inputs], array(upstream)
        found = [np.ravel(function(*arrays))]
        for x in arrays:
            slopes = []
            for place in np.ndindex(x.shape):
                here, sides = x[place], []
                for x[place] in (here + step, here - step):
                    sides.append(np.sum(function(*arrays) * weights))
                x[place] = here
                slopes.append((sides[0] - sides[1]) / (2 * step))
            found.append(np.array(slopes, dtype=object))
        return found


def norm(x: Any) -> Any:
    """L2, of a flat array."""
    return mpmath.norm(list(x))


def distance(found: Tensor, exact: Any) -> Any:
    """Between a tensor and a flat array."""
    with mpmath.workdps(DIGITS):
        return norm(array(found).ravel() - exact)


def array(x: Tensor) -> Any:
    """Every number as it is."""
    numbers = [mpmath.mpf(number) for number in x.detach().flatten().tolist()]
    return np.array(numbers, dtype=object).reshape(x.shape)
