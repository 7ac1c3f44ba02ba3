"""Whose rows are where: the parts of a batch on the ranks of a group, gathered and summed."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hdc_kernels.distributed.collectives import all_gather, all_reduce, first_derivative_only
from hdc_kernels.distributed.gather import Gather
from hdc_kernels.distributed.ranks import ProcessGroups, Ranks, as_ranks


class Rows(NamedTuple):
    """How many rows of some embeddings each rank has. Gathered rows come as this rank's own, then all others."""

    ranks: Ranks
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """On all ranks together."""
        return sum(self.sizes)

    @property
    def own(self) -> int:
        """On this rank."""
        return self.sizes[self.ranks.group.rank()]

    def times(self, factor: int) -> "Rows":
        """Of so many rows for each of these."""
        return Rows(self.ranks, tuple(factor * size for size in self.sizes))

    def columns(self, rank: int) -> slice:
        """Where the rows of this rank are among gathered ones."""
        own, ranks = self.ranks.group.rank(), len(self.sizes)
        before = [self.sizes[(own + k) % ranks] for k in range((rank - own) % ranks)]
        return slice(sum(before), sum(before) + self.sizes[rank])

    def prefers_ring(self, *embeddings: Tensor) -> bool:
        """Whether these [own, ...] travel rather than being gathered."""
        row = sum(math.prod(x.shape[1:]) * x.element_size() for x in embeddings)
        return self.ranks.prefers_ring(self.size * row)

    def share(self, y: Tensor) -> "Tensor | Travelling":
        """[own, D] as the y of `pairwise`, of all ranks, by one strategy or the other: gathered rows, or travelling."""
        return Travelling(y, self) if self.prefers_ring(y) else self.gather(y)[0]

    def gather(self, *embeddings: Tensor) -> tuple[Tensor, ...]:
        """Each [own, ...] -> [size, ...], by one collective; gradients come back summed over all ranks."""
        shapes = [x.shape[1:] for x in embeddings]
        flat = [
            x.reshape(x.shape[0], shape.numel())
            for x, shape in zip(embeddings, shapes, strict=True)
        ]
        packed = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
        ranks = self.ranks
        found = Gather.apply(packed, ranks.group, self.sizes, ranks.wire_dtype)
        parts = found.split([x.shape[1] for x in flat], 1)
        return tuple(
            part.reshape(self.size, *shape) for part, shape in zip(parts, shapes, strict=True)
        )

    def gather_integers(self, labels: Tensor) -> Tensor:
        """[own] -> [size]."""
        return Gather.apply(labels.unsqueeze(1), self.ranks.group, self.sizes, None).squeeze(1)

    def by_rank(self, x: Tensor) -> Tensor:
        """[own, ...] -> [size, ...] without gradients, in the same order on every rank."""
        (found,) = self.gather(x.detach())
        return found.roll(sum(self.sizes[: self.ranks.group.rank()]), 0)

    def numbers(self, device: torch.device) -> Tensor:
        """[size] integers, one for each gathered row, the same on every rank for the same row."""
        first = sum(self.sizes[: self.ranks.group.rank()])
        return torch.arange(self.size, device=device).roll(-first)

    def reduce(self, terms: Tensor, reduction: str, count: int | None = None) -> Tensor:
        """As `reference.reduce` over the terms of all ranks; `count` of them, one for each row if not given."""
        if reduction == "none":
            return self.local(terms)
        total = self.total(terms.sum())
        return total / (self.size if count is None else count) if reduction == "mean" else total

    def total(self, share: Tensor) -> Tensor:
        """The sum over all ranks, of which each differentiates W times its own share: for a loss."""
        return Total.apply(share, self.ranks.group)

    def local(self, terms: Tensor) -> Tensor:
        """This rank's terms, of which W times the upstream gradient is taken."""
        return Local.apply(terms, self.ranks.group.size())

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, as a part of each rank's loss: its gradients are summed, too."""
        return Sum.apply(x, self.ranks.group)


class Travelling(NamedTuple):
    """The rows of all ranks, of which each keeps its `own`: they are sent around (`trip.py`)."""

    own: Tensor
    rows: Rows


def meet(
    process_group: ProcessGroups,
    device: torch.device,
    *counts: int,
    names: Sequence[str] = ("the batch",),
) -> tuple[Rows, ...]:
    """The rows on every rank, of one or more kinds of embeddings on `device` of which this one has so many.

    Raises:
        TypeError: for anything that is no process group.
        ValueError: where no rank has rows of the first kind, or of any other that has a name in `names`.
    """
    ranks = as_ranks(process_group)
    group = ranks.group
    if ranks.even_batches:
        sizes = [(count,) * group.size() for count in counts]
    else:
        own = torch.tensor([counts], device=device)
        found = all_gather(own, group, "the batch sizes").tolist()
        sizes = [tuple(rank[kind] for rank in found) for kind in range(len(counts))]
    for name, each in zip(names, sizes, strict=False):
        if not sum(each):
            raise ValueError(f"{name} is empty on all ranks; one rank at least must have a row")
    return tuple(Rows(ranks, each) for each in sizes)


class Total(torch.autograd.Function):
    """Σ over ranks forward, W · upstream backward."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: Any) -> Tensor:
        ctx.ranks = group.size()
        return all_reduce(share, group, "its share of the loss")

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.ranks, None


class Local(torch.autograd.Function):
    """Nothing forward, W · upstream backward."""

    @staticmethod
    def forward(ctx: Any, terms: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return terms.clone()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.ranks, None


class Sum(torch.autograd.Function):
    """Σ over ranks forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_reduce(x, group, "its sum")

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return all_reduce(upstream, ctx.group, "the gradient of its sum"), None
