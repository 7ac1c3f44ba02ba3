"""lightly 1.6: `from hdc_kernels.compat.lightly import DCLLoss, DCLWLoss, NTXentLoss`."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdc_kernels.checks import check_temperature
from hdc_kernels.compat import refuse_distributed
from hdc_kernels.decoupled import check_sigma, fused_dcl, fused_dclw
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
        gather_distributed: must be False.
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
        refuse_distributed(gather_distributed=(gather_distributed, False))
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
        if bank is None:
            return fused_nt_xent(out0, out1, temperature=self.temperature)
        query, key = embeddings(out0, normalize=True), embeddings(out1, normalize=True)
        loss = fused_moco(query, key, bank, temperature=self.temperature, normalize=False)
        if out0.requires_grad:
            room = len(bank.keys) - int(bank.position) if self.drop_overflow else len(key)
            bank.enqueue(key[:room])
        return loss


class DCLLoss(nn.Module):
    """`fused_dcl`. With a batch of one, which has no negatives, it raises a ValueError; lightly's gives −inf.

    Args:
        temperature: τ.
        weight_fn: (out0, out1), normalised, -> [B], the weight of each positive; called for both directions.
        gather_distributed: must be False.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        refuse_distributed(gather_distributed=(gather_distributed, False))
        self.temperature = temperature
        self.weight_fn = weight_fn

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """out0, out1: [B, D] with B ≥ 2 -> the mean loss."""
        weights = None
        if self.weight_fn is not None:
            x, y = embeddings(out0, normalize=True), embeddings(out1, normalize=True)
            weights = torch.stack([self.weight_fn(x, y), self.weight_fn(y, x)])
        return fused_dcl(out0, out1, temperature=self.temperature, weights=weights)


class DCLWLoss(nn.Module):
    """`fused_dclw`; see `DCLLoss`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_sigma(sigma)
        refuse_distributed(gather_distributed=(gather_distributed, False))
        self.temperature = temperature
        self.sigma = sigma

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """out0, out1: [B, D] with B ≥ 2 -> the mean loss."""
        return fused_dclw(out0, out1, temperature=self.temperature, sigma=self.sigma)
