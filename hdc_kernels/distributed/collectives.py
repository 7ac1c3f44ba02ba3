"""What all ranks of a group do together, without gradients. Every error says who waited for what.

These are PyTorch's functional collectives, the operators that the compiler knows. They are called by name: the
Python functions around them change from version to version, and what `torch.compile` makes of the public in-place
ones in a backward pass was silently 0 in PyTorch 2.11.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def all_gather(x: Tensor, group: "ProcessGroup", what: str) -> Tensor:
    """[n, ...] of every rank, n the same on all -> [W·n, ...] by rank."""
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    return _wait(gather, (x.contiguous(), group.size(), group.group_name), group, what)


def reduce_scatter(x: Tensor, group: "ProcessGroup", what: str) -> Tensor:
    """[W·n, ...] of every rank -> [n, ...], the sum of this rank's part over all of them."""
    reduce = torch.ops._c10d_functional.reduce_scatter_tensor
    return _wait(reduce, (x.contiguous(), "sum", group.size(), group.group_name), group, what)


def all_reduce(x: Tensor, group: "ProcessGroup", what: str) -> Tensor:
    """The sum over all ranks."""
    reduce = torch.ops._c10d_functional.all_reduce
    return _wait(reduce, (x.contiguous(), "sum", group.group_name), group, what)


class Arrival(NamedTuple):
    """A tensor on its way."""

    tensor: Tensor
    sent: Tensor  # must live until it is
    works: Sequence["dist.Work"]
    group: "ProcessGroup"
    what: str

    def wait(self) -> Tensor:
        with _saying(self.group, self.what):
            for work in self.works:
                work.wait()
        return self.tensor


def pass_on(x: Tensor, into: Tensor, group: "ProcessGroup", what: str) -> Arrival:
    """Send `x` to the next rank of the ring and receive `into` from the one before; nothing empty is sent.

    One batch, as NCCL wants it, which also wants all ranks in a group's first collective: either they all have
    something to send, or their sizes were exchanged before.
    """
    rank, size = group.rank(), group.size()
    x = x.contiguous()
    ends = [(dist.isend, x, (rank + 1) % size), (dist.irecv, into, (rank - 1) % size)]
    with _saying(group, what):
        transfers = [
            dist.P2POp(op, tensor, group=group, group_peer=peer)
            for op, tensor, peer in ends
            if tensor.numel()
        ]
        works = dist.batch_isend_irecv(transfers) if transfers else []
    return Arrival(into, x, works, group, what)


Backward = Callable[..., tuple[Tensor | None, ...]]


def first_derivative_only(backward: Backward) -> Backward:
    """Refuses a derivative of what this `autograd.Function.backward` returns, and says why."""

    @wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        with torch.no_grad():
            found = backward(ctx, *upstream)
        depends = [t for t in (*upstream, *ctx.saved_tensors) if t is not None and t.requires_grad]
        if not depends:
            return found
        return tuple(None if g is None else Refused.apply(g, *depends) for g in found)

    return wrapped


SECOND_DERIVATIVE = (
    "a second derivative of a loss with a process_group: only first ones are exchanged between ranks; "
    "take it in one process, with process_group=None"
)


class Refused(torch.autograd.Function):
    """(gradient, what it depends on) -> the gradient, which has no derivative."""

    @staticmethod
    def forward(_: Any, gradient: Tensor, *depends: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(_: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(SECOND_DERIVATIVE)


def _wait(
    collective: "torch._ops.OpOverloadPacket",
    arguments: tuple[object, ...],
    group: "ProcessGroup",
    what: str,
) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops._c10d_functional.wait_tensor(collective(*arguments))
    with _saying(group, what):
        return torch.ops._c10d_functional.wait_tensor(collective(*arguments))


@contextmanager
def _saying(group: "ProcessGroup", what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {group.rank()} of {group.size()} did not get {what} from the other ranks; one of them stopped, "
            f"or does something else, or something of another shape or dtype: {error}"
        ) from error
