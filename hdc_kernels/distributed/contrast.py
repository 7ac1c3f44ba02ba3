"""InfoNCE of this rank's rows against the keys of all ranks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdc_kernels.backends import EVERYTHING, Mask
from hdc_kernels.contrast import Contrast, Pair, contrast
from hdc_kernels.distributed import ring
from hdc_kernels.distributed.rows import Rows

# "auto" gathers up to so many bytes of keys. On paper, not measured: beside its copy, a gathered key costs its gradient
# twice in float32, which makes 1.25 GiB of bfloat16 keys at this bound; below it, one large call is no slower.
GATHER_BYTES = 2**28


def contrast_across(
    queries: Rows,
    keys: Rows,
    pairs: Sequence[Pair],
    *,
    weights: Sequence[float] | None,
    divisor: int = 1,
    symmetric: bool = False,
    rows_first: int = 0,
    ids: tuple[Tensor, Tensor] | None = None,
    own_ids: tuple[Tensor, Tensor] | None = None,
    ranked: bool = False,
    refuse_ring: str = "",
    **options: Any,
) -> Contrast:
    """`contrast` of each x [own, ..., D] with the y [own, ..., D] of all ranks: this rank's terms and its share.

    `ids` [own] of x and y are compared across all ranks, `own_ids` only within this one. The ring has neither `ids`
    nor hits nor ranks; `refuse_ring` says what else it does not have, if that is asked for.
    """
    x, y = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    if ids is not None:
        refuse_ring = "there are ids"
    if ranked:
        refuse_ring = "metrics are asked for"
    if refuse_ring:
        queries.ranks.refuse_ring(refuse_ring)
    elif _prefers_ring(keys, (*x, *y) if symmetric else y):
        terms = ring.terms(queries, keys, x, y, symmetric, rows_first, own_ids, options)
        value = terms if weights is None else _total(terms, x, weights, divisor)
        return Contrast(value, terms.detach(), torch.zeros_like(terms, dtype=torch.bool))
    sides = [(x, keys.gather(*y), _mask(keys, ids, own_ids))]
    if symmetric:
        back_ids = None if ids is None else ids[::-1]
        sides.append((y, queries.gather(*x), _mask(queries, back_ids, None)))
    if not queries.own:
        embeddings = (t for own, everybody, _ in sides for t in (*own, *everybody))
        nothing = queries.nothing(*embeddings, options["temperature"])
        value = nothing if weights is None else nothing.sum()
        return Contrast(value, nothing.detach(), nothing.bool(), nothing.long())
    found = [
        contrast(
            list(zip(own, everybody, strict=True)),
            weights=None if weights is None else [w / len(sides) for w in weights],
            divisor=divisor,
            rows_first=rows_first,
            mask=mask,
            ranked=ranked and k == 0,
            **options,
        )
        for k, (own, everybody, mask) in enumerate(sides)
    ]
    forth, *back = found
    if not back:
        return forth
    if weights is not None:
        terms = (forth.terms + back[0].terms) / 2
        return forth._replace(value=forth.value + back[0].value, terms=terms)
    value = (forth.value + back[0].value) / 2
    return forth._replace(value=value, terms=value.detach())


def _mask(
    rows: Rows, ids: tuple[Tensor, Tensor] | None, own_ids: tuple[Tensor, Tensor] | None
) -> Mask:
    if ids is not None:
        everybody = rows.gather_integers(ids[1].long())
        return Mask(ids=(ids[0].long().unsqueeze(0), everybody.unsqueeze(0)))
    if own_ids is not None:
        x_ids, y_ids = own_ids
        others = y_ids.new_full((rows.size - rows.own,), -1)
        return Mask(ids=(x_ids.unsqueeze(0), torch.cat((y_ids, others)).unsqueeze(0)))
    return EVERYTHING


def _prefers_ring(keys: Rows, travelling: Sequence[Tensor]) -> bool:
    if keys.ranks.strategy != "auto":
        return keys.ranks.strategy == "ring"
    if torch.compiler.is_compiling():
        return False
    row = sum(math.prod(t.shape[1:]) * t.element_size() for t in travelling)
    return keys.size * row > GATHER_BYTES


def _total(terms: Tensor, x: Sequence[Tensor], weights: Sequence[float], divisor: int) -> Tensor:
    sums = [part.sum() for part in terms.split([math.prod(t.shape[:-1]) for t in x])]
    return torch.stack([w / divisor * s for w, s in zip(weights, sums, strict=True)]).sum()
