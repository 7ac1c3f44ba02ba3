"""Keys travel from rank to rank; nobody holds more than two blocks of them.

Forward: in W steps, each rank gets the sum of its rows over every block, while the next block is on its way, and
merges them in float64: logsumexps by log(e^a + e^b), other sums by adding. Backward: a second trip, as no block was
kept. With the logsumexp over all blocks, a block's gradients are those of the primitive, P_ij = exp(s_ij − lse_i).
Those of its keys travel along behind it, each rank adds its part, and after W steps they are home.

    step of rank r       0      1      2    …   W − 1
    block of rank        r    r − 1  r − 2      r + 1
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import Mask, plain
from hdc_kernels.call import Call
from hdc_kernels.distributed.collectives import Arrival, pass_on
from hdc_kernels.distributed.rows import Rows
from hdc_kernels.selection import PLAIN, implementation


class Block(NamedTuple):
    """Keys on their way around the ring, of `rows` on the rank `owner`."""

    owner: int
    keys: list[Tensor]


def sum_over_blocks(
    call: Call, rows: Rows, tau: Tensor | None, bias: Tensor | None, xy: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Each row's "logsumexp" or "softplus" over the y of all ranks [T], in float64; and ranks, if asked for, or []."""
    x, y = xy[: call.pairs], xy[call.pairs :]
    terms = sum(t.shape[:-1].numel() for t in x)
    start = -torch.inf if call.function == "logsumexp" else 0.0
    merge = torch.logaddexp if call.function == "logsumexp" else torch.add
    total = torch.full((terms,), start, dtype=torch.float64, device=x[0].device)
    ranks = torch.zeros(terms if call.ranked else 0, dtype=torch.int64, device=x[0].device)
    positive: Tensor | None = None
    for block in _trip(rows, y):
        if not (terms and rows.sizes[block.owner]):
            continue
        its = _of_block(call, rows, block.owner)
        total = merge(total, _forward(its, tau, bias, x, block.keys))
        if call.ranked:
            # The own block comes first. There the positive is a column, which "info_nce" lets through.
            if positive is None:
                its = its._replace(function="info_nce")
            problems = its.problems(tau, None, x, block.keys)
            found, logits = plain.rivals(problems, positive)
            ranks += found if positive is not None else found - 1
            positive = logits
    return total, ranks


def differentiate_blocks(
    call: Call,
    rows: Rows,
    tau: Tensor | None,
    bias: Tensor | None,
    xy: Sequence[Tensor],
    total: Tensor,
    upstream: Tensor,
) -> list[Tensor]:
    """(dτ, dbias if there is one, *dx, *dy) of Σ upstream · total; dy of this rank's y, but from all ranks."""
    x, y = xy[: call.pairs], xy[call.pairs :]
    dtype = reference.compute_dtype(x[0].dtype)
    d_tau = torch.zeros((), dtype=dtype, device=total.device)
    d_bias = [] if bias is None else [torch.zeros_like(bias)]
    dx = [torch.zeros_like(t, dtype=dtype) for t in x]

    def add(block: Block) -> list[Tensor]:
        its = _of_block(call, rows, block.owner)
        made = _backward(its, tau, bias, x, block.keys, total, upstream)
        for so_far, part in zip((d_tau, *d_bias, *dx), made, strict=False):
            so_far += part
        return made[-len(y) :]

    dy = _return_trip(rows, y, dtype, add if total.numel() else None)
    return [d_tau, *d_bias, *(g.to(x[0].dtype) for g in (*dx, *dy))]


def sum_labels(y: Tensor, y_labels: Tensor, x_labels: Tensor, rows: Rows) -> Tensor:
    """For each x, the sum of the y [own, D] of its label on all ranks; `y_labels` are those of all, gathered."""
    parts = (
        sums_by_label(block.keys[0], y_labels[rows.columns(block.owner)], x_labels)
        for block in _trip(rows, [y])
    )
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def differentiate_labels(
    y: Tensor, y_labels: Tensor, x_labels: Tensor, rows: Rows, upstream: Tensor
) -> Tensor:
    """dy of Σ upstream · `sum_labels`, from all ranks: of each y, the sum of the upstream gradients of its label."""

    def of(block: Block) -> list[Tensor]:
        return [sums_by_label(upstream, x_labels, y_labels[rows.columns(block.owner)])]

    (dy,) = _return_trip(rows, [y], reference.compute_dtype(y.dtype), of)
    return dy.to(y.dtype)


def sums_by_label(y: Tensor, y_labels: Tensor, x_labels: Tensor) -> Tensor:
    """For each label of x, the sum of the y of the same: [M, D]."""
    ordered, last = y_labels.sort().values, len(y)
    place = torch.searchsorted(ordered, x_labels)
    there = torch.searchsorted(ordered, x_labels, right=True) > place
    sums = y.new_zeros(
        last + 1, y.shape[1]
    )  # where a label's first y is in their order; the last stays 0
    sums = sums.index_add(0, torch.searchsorted(ordered, y_labels), y)
    return sums[torch.where(there, place, last)]


def _trip(rows: Rows, y: Sequence[Tensor]) -> Iterator[Block]:
    """This rank's block, as it is, then those of the ranks before it; each while the next one is on its way."""
    group, wire = rows.ranks.group, rows.ranks.wire_dtype
    rank, size = group.rank(), group.size()
    packed = _pack(y) if wire is None else _pack(y).to(wire)
    keys = list(y)
    for step in range(size):
        owner = (rank - step) % size
        coming: Arrival | None = None
        if step < size - 1:
            room = packed.new_empty(rows.sizes[(owner - 1) % size], packed.shape[1])
            coming = pass_on(packed, room, group, "keys")
        yield Block(owner, keys)
        if coming is not None:
            packed = coming.wait()
            keys = _unpack(packed.to(y[0].dtype), y)


def _return_trip(
    rows: Rows,
    y: Sequence[Tensor],
    dtype: torch.dtype,
    gradients: Callable[[Block], list[Tensor]] | None,
) -> list[Tensor]:
    """The gradients of this rank's y, summed over all ranks: what `gradients` makes of each block, if it does."""
    group = rows.ranks.group
    size = group.size()
    arriving: Arrival | None = None
    for block in _trip(rows, y):
        if gradients is not None and rows.sizes[block.owner]:
            carried = _pack([g.to(dtype) for g in gradients(block)])
        else:
            carried = _pack([torch.zeros_like(t, dtype=dtype) for t in block.keys])
        if arriving is not None:
            carried = carried + arriving.wait()
        if size > 1:
            before = rows.sizes[(block.owner - 1) % size]
            room = carried.new_empty(before, carried.shape[1])
            arriving = pass_on(carried, room, group, "gradients of its keys")
        home = carried
    if arriving is not None:
        home = arriving.wait()
    return _unpack(home, y)


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """[rows, ...] each -> [rows, F]."""
    return torch.cat([t.reshape(t.shape[0], t.shape[1:].numel()) for t in tensors], 1)


def _unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """`_pack` undone; any number of rows."""
    parts = packed.split([t.shape[1:].numel() for t in like], 1)
    return [part.reshape(-1, *t.shape[1:]) for part, t in zip(parts, like, strict=True)]


def _of_block(call: Call, rows: Rows, owner: int) -> Call:
    """With the part of the mask that is this block's."""
    mask, own = call.mask, owner == rows.ranks.group.rank()
    ids = None if mask.ids is None else (mask.ids[0], mask.ids[1][:, rows.columns(owner)])
    left_out = mask.left_out if own else None
    return call._replace(mask=Mask(mask.diagonal or not own, ids, mask.same, left_out))


def _forward(
    call: Call,
    tau: Tensor | None,
    bias: Tensor | None,
    x: Sequence[Tensor],
    y: Sequence[Tensor],
) -> Tensor:
    """[T] over one block."""
    if call.backend in PLAIN:
        return call.plain(tau, bias, x, y)[1].double()
    terms = implementation(call.backend).forward(
        call._replace(ranked=False).problems(tau, bias, x, y)
    )
    return (terms.lse[0] if call.function == "logsumexp" else terms.loss).double()


def _backward(
    call: Call,
    tau: Tensor | None,
    bias: Tensor | None,
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    total: Tensor,
    upstream: Tensor,
) -> list[Tensor]:
    """(dτ, dbias if there is one, *dx, *dy) of one block: of Σ upstream · total, where the others stay as they are."""
    if call.backend not in PLAIN:
        upstream = upstream.to(reference.compute_dtype(x[0].dtype))
        return call.backward(tau, bias, x, y, total.unsqueeze(0), upstream)
    with torch.enable_grad():
        number = x[0].new_tensor(call.temperature, dtype=torch.float64) if tau is None else tau
        leaves = [t.detach().requires_grad_() for t in (*x, *y)]
        number = number.detach().requires_grad_()
        scalars = [number]
        if bias is not None:
            scalars.append(bias := bias.detach().requires_grad_())
        found = call.plain(number, bias, leaves[: len(x)], leaves[len(x) :])[1]
        if call.function == "logsumexp":  # a block's share in it
            share = (found.detach().double() - total).exp().masked_fill(total == -torch.inf, 0.0)
            upstream = upstream * share
        return list(torch.autograd.grad(found, [*scalars, *leaves], upstream.to(found.dtype)))
