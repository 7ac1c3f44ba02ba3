# Triton types its kernels itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

"""What the last program of a launch makes of the parts that all of its programs have left: totals and means."""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from hdc_kernels.backends.triton.addressing import of_pair, pair_of

PARTS = 128  # that it reads at a time


@triton.jit
def add_up(
    parts,
    blocks,
    G,
    T,
    weights,
    firsts,
    starts,
    total,
    means,
    d_temperature,
    TERMS: tl.constexpr,
    GRADIENTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The sums of all programs' parts, in an order that does not depend on who adds them up.

    A program's parts are the sum of its terms, its gradient by the temperature, and how many of its rows are hits.
    """
    PAIRS: tl.constexpr = triton.next_power_of_2(len(firsts))
    programs = blocks * G
    pair = tl.arange(0, PAIRS)
    weighted = tl.zeros((PARTS,), tl.float32)
    by_temperature = tl.zeros((PARTS,), tl.float32)
    terms = tl.zeros((PAIRS, PARTS), tl.float32)
    hits = tl.zeros((PAIRS, PARTS), tl.float32)
    for first in range(0, programs, PARTS):
        part = first + tl.arange(0, PARTS)
        if TERMS:
            problem = part // blocks
            term = _read_parts(parts, part, programs)
            weighted += of_pair(weights, firsts, problem) * term
            if means is not None:
                here = pair[:, None] == pair_of(firsts, problem)[None, :]
                hit = _read_parts(parts + 2 * programs, part, programs)
                terms += tl.where(here, term[None, :], 0.0)
                hits += tl.where(here, hit[None, :], 0.0)
        if GRADIENTS:
            by_temperature += _read_parts(parts + programs, part, programs)
    if TERMS:
        tl.store(total, tl.sum(weighted, 0))
        if means is not None:
            rows = T - starts[len(starts) - 1]
            for k in tl.static_range(len(starts) - 1):
                rows = tl.where(pair == k, starts[k + 1] - starts[k], rows)
            there = pair < len(starts)
            tl.store(means + pair, tl.sum(terms, 1) / rows, there)
            tl.store(means + len(starts) + pair, tl.sum(hits, 1) / rows, there)
    if GRADIENTS:
        tl.store(d_temperature, tl.sum(by_temperature, 0))


@triton.jit
def _read_parts(parts, part, programs):
    """Some of one kind of parts, 0 behind the last; past the L1 cache."""
    return tl.load(parts + part, part < programs, 0.0, cache_modifier=".cg")
