"""Keys travel from rank to rank; nobody holds more than two blocks of them.

Forward: in W steps, each rank gets the logsumexp of its rows over every block, while the next block is on its way,
and merges them in float64. Positives are its own, row by row. Backward: a second trip, as no block was kept. With
the logsumexp over all blocks, a block's gradients are those of the primitive, P_ij = exp(s_ij − lse_i). Those of
its keys travel along behind it, each rank adds its part, and after W steps they are home.

    step of rank r       0      1      2    …   W − 1
    block of rank        r    r − 1  r − 2      r + 1
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hdc_kernels import reference
from hdc_kernels.backends import EVERYTHING, Mask
from hdc_kernels.call import Call, temperature_gradient
from hdc_kernels.distributed.collectives import Arrival, pass_on
from hdc_kernels.distributed.rows import Rows
from hdc_kernels.positives import info_nce_terms, positive_logits
from hdc_kernels.selection import implementation, select


@torch.compiler.disable(reason="Point-to-point transfers; use strategy='gather'.")
def terms(
    queries: Rows,
    keys: Rows,
    x: tuple[Tensor, ...],
    y: tuple[Tensor, ...],
    symmetric: bool,
    rows_first: int,
    own_ids: tuple[Tensor, Tensor] | None,
    options: dict[str, Any],
) -> Tensor:
    """log(1 + exp(lse_i − s_ii)) of this rank's rows, [T], flat as those of `contrast`; in which `options` go."""
    temperature, normalize = options["temperature"], options["normalize"]
    tau = temperature if isinstance(temperature, Tensor) else None
    ids = None if own_ids is None else (own_ids[0].unsqueeze(0), own_ids[1].unsqueeze(0))
    call = Call(
        select(options["backend"], x, y, rows_first),
        None,
        0.0 if isinstance(temperature, Tensor) else float(temperature),
        False,
        normalize,
        len(x),
        rows_first,
        "logsumexp",
        Mask(False, ids),
    )
    positive = torch.cat(
        [
            _by_problem(
                positive_logits(a, b[: len(a)], temperature, normalize=normalize), k < rows_first
            )
            for k, (a, b) in enumerate(zip(x, y, strict=True))
        ]
    ).double()
    loss = info_nce_terms(Logsumexp.apply(call, keys, tau, *x, *y), positive)
    if symmetric:
        loss = (loss + info_nce_terms(Logsumexp.apply(call, queries, tau, *y, *x), positive)) / 2
    return loss.to(reference.compute_dtype(x[0].dtype))


def _by_problem(logits: Tensor, rows_first: bool) -> Tensor:
    """[M] or [G, M], or with the rows first [M, G], as [G·M]."""
    return (logits.transpose(0, 1) if rows_first else logits).flatten()


class Block(NamedTuple):
    """Keys on their way around the ring, of `rows` on the rank `owner`."""

    owner: int
    keys: list[Tensor]


class Logsumexp(torch.autograd.Function):
    """(call, rows of y, τ or None, *x, *y) -> [T] in float64, over the y of all ranks but the rows' positives.

    The call's mask holds within this rank's own block; the others count whole.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, rows: Rows, tau: Tensor | None, *xy: Tensor) -> Tensor:
        x, y = xy[: call.pairs], xy[call.pairs :]
        lse = torch.full(
            (sum(t.shape[:-1].numel() for t in x),),
            -torch.inf,
            dtype=torch.float64,
            device=x[0].device,
        )
        for block in _trip(rows, y):
            if lse.numel() and rows.sizes[block.owner]:
                its = _masked(call, block.owner == rows.ranks.group.rank())
                lse = torch.logaddexp(lse, _logsumexp(its, tau, x, block.keys))
        ctx.call, ctx.rows = call, rows
        ctx.save_for_backward(lse, tau, *xy)
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        call, rows = ctx.call, ctx.rows
        lse, tau, *xy = ctx.saved_tensors
        x, y = xy[: call.pairs], xy[call.pairs :]
        group, dtype = rows.ranks.group, reference.compute_dtype(x[0].dtype)
        rank, size = group.rank(), group.size()
        dx = [torch.zeros_like(t, dtype=dtype) for t in x]
        d_tau = torch.zeros((), dtype=dtype, device=lse.device)
        arriving: Arrival | None = None
        for block in _trip(rows, y):
            dy = [torch.zeros_like(t, dtype=dtype) for t in block.keys]
            if lse.numel() and rows.sizes[block.owner]:
                its = _masked(call, block.owner == rank)
                made = _gradients(its, tau, x, block.keys, lse, upstream)
                d_tau += made[0]
                for total, part in zip((*dx, *dy), made[1:], strict=True):
                    total += part
            carried = _pack(dy)
            if arriving is not None:
                carried += arriving.wait()
            if size > 1:
                before = rows.sizes[(block.owner - 1) % size]
                room = carried.new_empty(before, carried.shape[1])
                arriving = pass_on(carried, room, group, "gradients of its keys")
            home = carried
        if arriving is not None:
            home = arriving.wait()
        gradients = [g.to(x[0].dtype) for g in (*dx, *_unpack(home, y))]
        return None, None, temperature_gradient(d_tau, tau), *gradients


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


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """[rows, ...] each -> [rows, F]."""
    return torch.cat([t.reshape(t.shape[0], t.shape[1:].numel()) for t in tensors], 1)


def _unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """`_pack` undone; any number of rows."""
    parts = packed.split([t.shape[1:].numel() for t in like], 1)
    return [part.reshape(-1, *t.shape[1:]) for part, t in zip(parts, like, strict=True)]


def _masked(call: Call, own: bool) -> Call:
    return call if own else call._replace(mask=EVERYTHING)


def _logsumexp(call: Call, tau: Tensor | None, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """[T] over one block."""
    if call.backend in ("torch", "chunked"):
        return call.plain(tau, None, x, y)[1].double()
    problems = call.problems(tau, None, x, y)
    return implementation(call.backend).forward(problems).lse[0].double()


def _gradients(
    call: Call,
    tau: Tensor | None,
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    lse: Tensor,
    upstream: Tensor,
) -> list[Tensor]:
    """(dτ, *dx, *dy) of one block: of Σ upstream_i · exp(s_ij − lse_i) · s_ij, all but the last factor constant."""
    if call.backend not in ("torch", "chunked"):
        upstream = upstream.to(reference.compute_dtype(x[0].dtype))
        return call.backward(tau, None, x, y, lse.unsqueeze(0), upstream)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (*x, *y)]
        number = torch.tensor(call.temperature, dtype=torch.float64) if tau is None else tau
        number = number.detach().requires_grad_()
        found = call.plain(number, None, leaves[: len(x)], leaves[len(x) :])[1]
        share = (found.detach().double() - lse).exp().masked_fill(lse == -torch.inf, 0.0)
        return list(
            torch.autograd.grad(found, [number, *leaves], (upstream * share).to(found.dtype))
        )
