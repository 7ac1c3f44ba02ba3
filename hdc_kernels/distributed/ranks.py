"""A process group, and how its ranks work together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Union

import torch
import torch.distributed as dist

from hdc_kernels.checks import FLOATING, check_choice

if TYPE_CHECKING:  # not there where PyTorch was built without
    from torch.distributed import ProcessGroup

Strategy = Literal["auto", "gather", "ring"]

# "auto" gathers up to so many bytes of keys. On paper, not measured: beside its copy, a gathered key costs its gradient
# twice in float32, which makes 1.25 GiB of bfloat16 keys at this bound; below it, one large call is no slower.
GATHER_BYTES = 2**28


@dataclass(frozen=True)
class Ranks:
    """A process group with options, for `process_group=` of any loss. A bare group means the defaults.

    Args:
        group: a `torch.distributed.ProcessGroup`, that of all processes (`torch.distributed.group.WORLD`) or any
            subgroup that this process belongs to.
        strategy: "gather" copies all keys to every rank, O(B·D) memory each for a global batch of B. "ring" sends
            them from rank to rank, computing with one block while the next one travels: O(B/W·D) memory, and B
            integers where there are ids or labels. "auto" is the ring where the gathered keys would take more than
            `GATHER_BYTES`. Both keep the one graph of `torch.compile` with `even_batches`; the ring only with a
            backend that has kernels.
        even_batches: a promise that all ranks have equally many rows, which is not checked. It saves the exchange
            of sizes, for which the host waits, and lets `torch.compile` make one graph.
        wire_dtype: send keys rounded to this dtype, `torch.bfloat16` for example. A rank's own keys stay as
            they are. Gradients travel in float32 or wider, whatever this is.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.
    """

    group: "ProcessGroup"
    strategy: Strategy = "auto"
    even_batches: bool = False
    wire_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not _is_group(self.group):
            raise TypeError(f"group is {_describe(self.group)}; it must be a ProcessGroup")
        check_choice("strategy", self.strategy, Strategy)
        if not isinstance(self.even_batches, bool):
            raise TypeError(
                f"even_batches is a {type(self.even_batches).__name__}; it must be a bool"
            )
        if self.wire_dtype is not None and self.wire_dtype not in FLOATING:
            raise ValueError(
                f"wire_dtype is {self.wire_dtype!r}; it must be None or one of "
                + ", ".join(map(str, FLOATING))
            )

    def prefers_ring(self, gathered: int) -> bool:
        """Whether keys travel, of which so many bytes would be gathered."""
        if self.strategy != "auto":
            return self.strategy == "ring"
        return gathered > GATHER_BYTES


ProcessGroups = Union["ProcessGroup", Ranks]


def check_process_group(process_group: ProcessGroups | None) -> None:
    """None, a process group that this process belongs to, or `Ranks`."""
    if process_group is not None and not isinstance(process_group, Ranks):
        as_ranks(process_group)


def as_ranks(process_group: ProcessGroups) -> Ranks:
    """Raises TypeError for anything that is no process group."""
    if isinstance(process_group, Ranks):
        return process_group
    if not _is_group(process_group):
        raise TypeError(
            f"process_group is {_describe(process_group)}; it must be None, a ProcessGroup that this process "
            "belongs to, or hdc_kernels.distributed.Ranks of one"
        )
    return Ranks(process_group)


def _is_group(group: object) -> bool:
    return dist.is_available() and isinstance(group, dist.ProcessGroup)


def _describe(group: object) -> str:
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        return "a group without this process"
    return f"a {type(group).__name__}"
