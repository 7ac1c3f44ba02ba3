"""InfoNCE of this rank's rows against the keys of all ranks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import EVERYTHING, Detail, Mask
from hdc_kernels.backends.outputs import means_of
from hdc_kernels.contrast import Contrast, Pair, contrast
from hdc_kernels.distributed import ring
from hdc_kernels.distributed.rows import Rows
from hdc_kernels.positives import info_nce_terms, positive_logits


def contrast_across(
    queries: Rows,
    keys: Rows,
    pairs: Sequence[Pair],
    *,
    weights: Sequence[float] | None,
    divisor: int = 1,
    symmetric: bool = False,
    rows_first: int = 0,
    mask: Mask = EVERYTHING,
    ranked: bool = False,
    detail: Detail = "rows",
    **options: Any,
) -> Contrast:
    """`contrast` of each x [own, ..., D] with the y [own, ..., D] of all ranks: this rank's terms and its share.

    The ids of `mask`, of this rank's x and y, are compared across all ranks. Nothing `symmetric` has means.
    """
    x, y = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    sides = [(x, y, keys, mask_across(keys, mask))]
    if symmetric:
        back = mask if mask.ids is None else mask._replace(ids=mask.ids[::-1])
        sides.append((y, x, queries, mask_across(queries, back)))
    if keys.prefers_ring(*(t for side in sides for t in side[1])):
        return _around(sides, weights, divisor, rows_first, ranked, detail, options)
    found = [
        contrast(
            list(zip(own, columns.gather(*others), strict=True)),
            weights=None if weights is None else [w / len(sides) for w in weights],
            divisor=divisor,
            rows_first=rows_first,
            mask=mask,
            ranked=ranked and k == 0,
            detail=detail,
            **options,
        )
        for k, (own, others, columns, mask) in enumerate(sides)
    ]
    forth = found[0]
    if not symmetric:
        return forth
    if weights is not None:
        terms = (forth.terms + found[1].terms) / 2
        return forth._replace(value=forth.value + found[1].value, terms=terms)
    value = (forth.value + found[1].value) / 2
    return forth._replace(value=value, terms=value.detach())


Side = tuple[tuple[Tensor, ...], tuple[Tensor, ...], Rows, Mask]


def _around(
    sides: Sequence[Side],
    weights: Sequence[float] | None,
    divisor: int,
    rows_first: int,
    ranked: bool,
    detail: Detail,
    options: dict[str, Any],
) -> Contrast:
    """The same with travelling keys: the positives, which are this rank's own, beside a sum over all others."""
    x, y, *_ = sides[0]
    ranked = ranked or detail != "total"
    positive = torch.cat(
        [
            _by_problem(
                positive_logits(
                    a, b[: len(a)], options["temperature"], normalize=options["normalize"]
                ),
                k < rows_first,
            )
            for k, (a, b) in enumerate(zip(x, y, strict=True))
        ]
    ).double()
    found = [
        ring.sums(
            "logsumexp",
            own,
            others,
            rows,
            rows_first=rows_first,
            mask=mask._replace(diagonal=False),
            ranked=ranked and k == 0,
            **options,
        )
        for k, (own, others, rows, mask) in enumerate(sides)
    ]
    losses = torch.stack([info_nce_terms(each.values, positive) for each in found])
    terms = losses.mean(0).to(reference.compute_dtype(x[0].dtype))
    rows = [math.prod(t.shape[:-1]) for t in x]
    value = terms if weights is None else _total(terms, rows, weights, divisor)
    ranks = found[0].ranks
    hit = (ranks == 0) & ~positive.isnan() if ranked else torch.zeros_like(terms, dtype=torch.bool)
    means = means_of(terms.detach(), hit, rows) if detail == "means" else None
    return Contrast(value, terms.detach(), hit, ranks if ranked else None, means)


def mask_across(columns: Rows, mask: Mask) -> Mask:
    """A mask with the ids of this rank's columns, [1, own], as one with those of all ranks."""
    if mask.ids is None:
        return mask
    x_ids, y_ids = mask.ids
    return mask._replace(ids=(x_ids, columns.gather_integers(y_ids.squeeze(0)).unsqueeze(0)))


def _by_problem(logits: Tensor, rows_first: bool) -> Tensor:
    """[M] or [G, M], or with the rows first [M, G], as [G·M]."""
    return (logits.transpose(0, 1) if rows_first else logits).flatten()


def _total(terms: Tensor, rows: list[int], weights: Sequence[float], divisor: int) -> Tensor:
    sums = [part.sum() for part in terms.split(rows)]
    return torch.stack([w / divisor * s for w, s in zip(weights, sums, strict=True)]).sum()
