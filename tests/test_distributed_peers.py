"""The adapters of losses that gather, across ranks; and the table of what peers make of it."""

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import distributed_gradients
import processes
import pytest
import torch
import torch.distributed as dist
from embeddings import randn
from torch import Tensor, nn

from hdc_kernels import fused_info_nce
from hdc_kernels.compat import lightly, moco, open_clip, supcon
from hdc_kernels.compat import pytorch_metric_learning as pml
from hdc_kernels.compat.sentence_transformers import (
    MultipleNegativesRankingLoss,
    multiple_negatives_ranking,
)
from hdc_kernels.distributed import Ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

SIZES = [3, 0, 2]


def compare(
    alone: Callable[..., Tensor], across: Callable[..., Tensor], rank: int, columns: int = 2
) -> None:
    """Of columns of embeddings, uneven and empty on one rank: value and gradients as of all rows in one process."""
    whole = [randn(sum(SIZES), 4, seed=k).requires_grad_() for k in range(columns)]
    local = [x.detach().split(SIZES)[rank].clone().requires_grad_() for x in whole]
    expected, found = alone(*whole), across(*local)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    gradients = torch.autograd.grad(expected, whole), torch.autograd.grad(found, local)
    for exact, ours in zip(*gradients, strict=True):
        ours = ours / len(SIZES)
        torch.testing.assert_close(ours, exact.split(SIZES)[rank], rtol=1e-10, atol=1e-12)


def clip(rank: int, world_size: int) -> None:
    """Whatever open_clip's flags are."""
    for loss, rest in ((open_clip.ClipLoss, (5.0,)), (open_clip.SigLipLoss, (5.0, -3.0))):
        alone = loss()
        several = loss(rank=rank, world_size=world_size)
        compare(
            lambda x, y, f=alone, r=rest: f(x, y, *r),
            lambda x, y, f=several, r=rest: f(x, y, *r),
            rank,
        )
    for flags in ((True, False), (False, True), (True, True)):
        several = open_clip.ClipLoss(*flags, rank=rank, world_size=world_size)
        compare(
            lambda x, y: open_clip.ClipLoss()(x, y, 5.0), lambda x, y, f=several: f(x, y, 5.0), rank
        )
    other = (rank + 1) % world_size
    with pytest.raises(ValueError, match=f"world_size is 3 and rank {other}; they must be"):
        open_clip.ClipLoss(rank=other, world_size=world_size)


def views(rank: int, world_size: int) -> None:
    """lightly's, with the bank, too, which all ranks fill alike."""
    for loss in (lightly.NTXentLoss, lightly.DCLLoss, lightly.DCLWLoss):
        compare(loss(), loss(gather_distributed=True), rank)
    banks = []
    for gather in (False, True):
        torch.manual_seed(0)
        banks.append(lightly.NTXentLoss(memory_bank_size=(6, 4), gather_distributed=gather))
    for _ in range(3):
        compare(*banks, rank)
        assert torch.equal(banks[0].memory_bank.keys, banks[1].memory_bank.keys)


def sentences(rank: int, world_size: int) -> None:
    """All directions, with hard negatives."""
    every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    for options in (
        {},
        {"directions": every},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    ):
        make = partial(MultipleNegativesRankingLoss, nn.Identity(), **options)
        alone, several = make(), make(gather_across_devices=True)
        assert several.get_config_dict()["gather_across_devices"]
        compare(
            lambda *x, f=alone: f.compute_loss_from_embeddings(list(x)),
            lambda *x, f=several: f.compute_loss_from_embeddings(list(x)),
            rank,
            columns=3,
        )
    ring = Ranks(dist.group.WORLD, strategy="ring")
    compare(
        lambda *x: multiple_negatives_ranking(x, directions=every),
        lambda *x: multiple_negatives_ranking(x, directions=every, process_group=ring),
        rank,
        columns=3,
    )


def labels(rank: int, world_size: int) -> None:
    """pytorch-metric-learning's and SupContrast's, with labels that ranks share, and by image."""
    whole = torch.arange(sum(SIZES)) % 2
    mine = whole.split(SIZES)[rank]
    mask = torch.block_diag(*(torch.ones(n, n) for n in SIZES))
    for strategy in ("gather", "ring"):
        ranks = Ranks(dist.group.WORLD, strategy=strategy)
        for loss in (pml.NTXentLoss, pml.SupConLoss):
            alone, several = loss(), loss(process_group=ranks)
            compare(partial(alone, labels=whole), partial(several, labels=mine), rank, columns=1)
        for options in ({}, {"contrast_mode": "one"}):
            alone = supcon.SupConLoss(**options)
            several = supcon.SupConLoss(**options, process_group=ranks)
            for all_labels, own_labels in ((whole, mine), (None, None)):
                compare(
                    lambda x, y, f=alone, its=all_labels: f(torch.stack((x, y), 1), its),
                    lambda x, y, f=several, its=own_labels: f(torch.stack((x, y), 1), its),
                    rank,
                )
            compare(
                lambda x, y, f=alone: f(torch.stack((x, y), 1), mask=mask),
                lambda x, y, f=several: f(torch.stack((x, y), 1), mask=torch.ones(len(x), len(x))),
                rank,
            )


def memory(rank: int, world_size: int) -> None:
    """pytorch-metric-learning's, which on each rank holds this rank's earlier batches: among them, all there were."""
    labels, earlier = torch.arange(sum(SIZES)) % 2, randn(sum(SIZES), 4, seed=7)

    def second_step(whole: bool, loss: nn.Module, x: Tensor) -> Tensor:
        module = pml.CrossBatchMemory(loss, 4, memory_size=20).double()
        before, its = (t if whole else t.split(SIZES)[rank] for t in (earlier, labels))
        module(before, its)
        found: Tensor = module(x, its)
        return found

    for make in (pml.NTXentLoss, pml.SupConLoss):
        for strategy in ("gather", "ring"):
            several = make(process_group=Ranks(dist.group.WORLD, strategy=strategy))
            compare(
                partial(second_step, True, make()),
                partial(second_step, False, several),
                rank,
                columns=1,
            )


def momentum(rank: int, world_size: int) -> None:
    """MoCo v3's."""
    several = partial(moco.contrastive_loss, T=0.2, process_group=dist.group.WORLD)
    compare(partial(moco.contrastive_loss, T=0.2), several, rank)


CHECKS: dict[str, processes.Check] = {
    f.__name__: f for f in (clip, views, sentences, labels, memory, momentum)
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What every check said."""
    return processes.run(CHECKS, len(SIZES), tmp_path_factory.mktemp("peers"))


@pytest.mark.parametrize("check", CHECKS)
def test_adapters(check: str, results: dict[str, str]) -> None:
    """See the function of that name."""
    assert not results[check], results[check]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Ours and the adapters are right; what is known of the peers is still so."""
    rows = distributed_gradients.run()
    for name, row in rows.items():
        if name.startswith(("fused", "compat")):
            assert row[:3] == pytest.approx((1, 1, 1), abs=1e-10), name
            assert row.scale is None or row.scale == pytest.approx(1, abs=1e-10), name
    defaults = rows["open_clip ClipLoss, defaults"]
    assert (defaults.gradient, defaults.scale) == pytest.approx((0.5, 1.0))
    assert rows["open_clip ClipLoss, local_loss"].cosine < 0.999
    wrapped = rows["pytorch-metric-learning DistributedLossWrapper"]
    assert (wrapped.loss, wrapped.gradient) == pytest.approx((2.0, 1.0))
    assert rows["lightly DCLWLoss"].cosine < 0.99


def wait_in_vain(rank: int, folder: str) -> None:
    """Rank 1 never comes."""
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=3),
    )
    x = randn(3, 4).requires_grad_()
    if rank == 0:
        message = "no error"
        try:
            fused_info_nce(x, x, process_group=dist.group.WORLD)
        except RuntimeError as error:
            message = str(error)
        Path(folder, "message").write_text(message)
    else:
        while not Path(folder, "message").exists():
            time.sleep(0.1)


def test_a_missing_rank(tmp_path: Path) -> None:
    """An error that says what was waited for, after the group's timeout."""
    processes.start(wait_in_vain, 2, str(tmp_path))
    message = (tmp_path / "message").read_text()
    assert "rank 0 of 2 did not get the batch sizes from the other ranks" in message, message
