"""Against the formulas of MoCo v1 to v3, in plain PyTorch: its losses stand in models that need a cluster.

And against the packages that have that loss under another name.
"""

from fractions import Fraction

import info_nce
import numpy as np
import peer_imports
import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from embeddings import randn
from torch import Tensor

from hdc_kernels.compat.moco import contrastive_loss, moco_loss


@pytest.mark.parametrize("seed", range(3))
def test_v1_and_v2(seed: int) -> None:
    """The queue has its keys in columns; nothing is normalised again. The default temperature is 0.07."""

    def exact(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        s = torch.cat(((q * k).sum(1, keepdim=True), q @ queue), 1) / 0.07
        return F.cross_entropy(s, torch.zeros(len(q), dtype=torch.int64))

    q, k = (F.normalize(randn(6, 5, seed=seed + 9 * j), dim=1) for j in range(2))
    agree(moco_loss, exact, q, k, F.normalize(randn(5, 16, seed=seed + 20), dim=0))


@pytest.mark.parametrize("seed", range(3))
def test_v1_and_v2_are_other_packages_losses(seed: int) -> None:
    """lightly's NT-Xent with a memory bank, info-nce-pytorch's with negative keys: of embeddings of length 1."""

    def ours(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        return moco_loss(F.normalize(query, dim=1), F.normalize(key, dim=1), queue.mT, T=0.2)

    query, key = randn(6, 5, seed=seed), randn(6, 5, seed=seed + 9)
    queue = F.normalize(randn(16, 5, seed=seed + 20), dim=1)
    agree(
        lambda *pair: ours(*pair, queue),
        lambda *pair: info_nce.info_nce(*pair, queue, temperature=0.2),
        *(query, key),
    )
    bank = peer_imports.lightly().NTXentLoss(temperature=0.2, memory_bank_size=(16, 5)).double()
    bank.memory_bank.bank = queue.clone()
    agree(lambda query: ours(query, key, queue), lambda query: bank(query, key), query)
    assert not torch.equal(bank.memory_bank.bank, queue)  # it was read, then filled


@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_v3(tau: float) -> None:
    """Normalised inside, times 2T, both directions added by the caller."""

    def exact(q: Tensor, k: Tensor, t: Tensor) -> Tensor:
        s = F.normalize(q, dim=1) @ F.normalize(k, dim=1).mT / t
        return F.cross_entropy(s, torch.arange(len(q))) * 2 * t

    agree(
        contrastive_loss,
        exact,
        randn(6, 5),
        randn(6, 5, seed=1),
        torch.tensor(tau, dtype=torch.float64),
    )
    inputs = randn(6, 5), randn(6, 5, seed=1)
    for one in (torch.tensor([tau], dtype=torch.float64), np.float64(tau), Fraction(tau)):
        narrow = contrastive_loss(*(x.float() for x in inputs), one)
        assert narrow.dtype == torch.float32
        assert narrow.shape == ()
        assert narrow.item() == pytest.approx(exact(*inputs, tau).item(), rel=1e-6)
    expected = exact(randn(6, 5), randn(6, 5, seed=1), torch.tensor(1.0))
    assert contrastive_loss(randn(6, 5), randn(6, 5, seed=1)).item() == pytest.approx(
        expected.item(), rel=1e-12
    )
