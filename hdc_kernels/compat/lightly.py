"""lightly 1.6: `from hdc_kernels.compat.lightly import DCLLoss, DCLWLoss, NTXentLoss`."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdc_kernels.checks import check_pair, check_temperature
from hdc_kernels.compat import all_processes
from hdc_kernels.decoupled import check_sigma, fused_dcl, fused_dclw
from hdc_kernels.distributed.rows import meet
from hdc_kernels.moco import Queue, fused_moco
from hdc_kernels.nt_xent import fused_nt_xent
from hdc_kernels.positives import embeddings


class NTXentLoss(nn.Module):
    """`fused_nt_xent`, or with a memory bank `fused_moco`, one direction, whose queue starts with random keys.

    The bank is read before `out1` is put in, normalised, and only while `out0` requires its gradient, as
    in lightly. It is saved with the state dict, which lightly's is not.

    Args:
        temperature: τ.
        memory_bank_size: 0, or (number of keys, D).
        gather_distributed: take the batches of all processes as one, also for the memory bank.
        drop_overflow: where lightly's bank reaches its end in the middle of a batch, it drops the rest of the
            batch. True does the same; by default, the rest goes to the beginning.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        drop_overflow: bool = False,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        self.gather_distributed = gather_distributed
        self.temperature = temperature
        self.drop_overflow = drop_overflow
        self.memory_bank: Queue | None = None
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if size in ((0,), ()) or (len(size) == 2 and size[0] == 0):
            return
        if len(size) != 2:
            raise ValueError(
                f"memory_bank_size is {memory_bank_size}; it must be 0 or (number of keys, dimension)"
            )
        self.memory_bank = Queue(*size)
        self.memory_bank.enqueue(F.normalize(torch.randn(size), dim=-1))

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """out0, out1: [B, D] -> the mean loss."""
        bank = self.memory_bank
        group = all_processes(self.gather_distributed)
        if bank is None:
            return fused_nt_xent(out0, out1, temperature=self.temperature, process_group=group)
        check_pair(("out0", "out1"), (out0, out1), "[B, D]", empty=group is not None)
        query, key = embeddings(out0, normalize=True), embeddings(out1, normalize=True)
        loss = fused_moco(
            query, key, bank, temperature=self.temperature, normalize=False, process_group=group
        )
        if out0.requires_grad:
            if group is not None:
                key = meet(group, key.device, len(key))[0].by_rank(key)
            room = len(bank.keys) - int(bank.position) if self.drop_overflow else len(key)
            bank.enqueue(key[:room])
        return loss


class DCLLoss(nn.Module):
    """`fused_dcl`. With a batch of one, which has no negatives, it raises a ValueError; lightly's gives −inf.

    Args:
        temperature: τ.
        weight_fn: (out0, out1), normalised, -> [B], the weight of each positive; called for both directions, with
            the batch of this process.
        gather_distributed: take the batches of all processes as one.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        self.gather_distributed = gather_distributed
        self.temperature = temperature
        self.weight_fn = weight_fn

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """out0, out1: [B, D] with B ≥ 2 -> the mean loss."""
        weights = None
        group = all_processes(self.gather_distributed)
        if self.weight_fn is not None:
            check_pair(("out0", "out1"), (out0, out1), "[B, D]", empty=group is not None)
            x, y = embeddings(out0, normalize=True), embeddings(out1, normalize=True)
            weights = torch.stack([self.weight_fn(x, y), self.weight_fn(y, x)])
        return fused_dcl(
            out0, out1, temperature=self.temperature, weights=weights, process_group=group
        )


class DCLWLoss(nn.Module):
    """`fused_dclw`; see `DCLLoss`. Its weights are those of the batches of all processes; lightly's of one."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_sigma(sigma)
        self.gather_distributed = gather_distributed
        self.temperature = temperature
        self.sigma = sigma

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """out0, out1: [B, D] with B ≥ 2 -> the mean loss."""
        group = all_processes(self.gather_distributed)
        return fused_dclw(
            out0, out1, temperature=self.temperature, sigma=self.sigma, process_group=group
        )
