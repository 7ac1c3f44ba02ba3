"""Everybody gets all keys: an all-gather whose gradients come back by a reduce-scatter.

Each rank then compares its rows with all keys in one call of the primitive, (B/W) × B products. All keys and
their gradients are on every rank, O(B·D).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.distributed.collectives import (
    all_gather,
    first_derivative_only,
    reduce_scatter,
)


class Gather(torch.autograd.Function):
    """(x [own, F], group, sizes, dtype on the wire) -> [Σ sizes, F]: own rows, then those of the next ranks in turn.

    Own rows come first because the primitive has row i's positive in column i. Ranks with fewer rows
    send padding, which is cut off again. The sums of gradients are made in float32 or wider.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Any, sizes: Sequence[int], wire: torch.dtype | None
    ) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        largest, rank = max(sizes), group.rank()
        sent = _pad(x if wire is None else x.to(wire), largest)
        parts = all_gather(sent, group, "the keys").split(largest)
        others = [parts[k][: sizes[k]].to(x.dtype) for k in _turn(rank, len(sizes))[1:]]
        return torch.cat((x, *others))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        group, sizes = ctx.group, ctx.sizes
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        largest, rank = max(sizes), group.rank()
        order = _turn(rank, len(sizes))
        parts = upstream.to(reference.compute_dtype(upstream.dtype)).split(
            [sizes[k] for k in order]
        )
        by_rank = [_pad(parts[(k - rank) % len(sizes)], largest) for k in range(len(sizes))]
        total = reduce_scatter(torch.cat(by_rank), group, "the gradients of its keys")
        return total[: sizes[rank]].to(upstream.dtype), None, None, None


def _turn(rank: int, ranks: int) -> list[int]:
    return [(rank + k) % ranks for k in range(ranks)]


def _pad(x: Tensor, rows: int) -> Tensor:
    missing = rows - x.shape[0]
    return torch.cat((x, x.new_zeros(missing, x.shape[1]))) if missing else x
