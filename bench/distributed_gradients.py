"""What data-parallel training makes of each loss: two processes against one with the whole batch.

    python bench/distributed_gradients.py

Two linear encoders in float64, 4 pairs on each of two gloo processes. Every loss is compared with itself in
one process: the mean of the ranks' values, and the parameters' gradients averaged over the ranks, as
DistributedDataParallel does. 1, 1 and 1 is right; for a loss that is the mean of each rank's own batch, no table would
be fair, so peers are asked to gather wherever they can.
"""

import json
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import peer_imports
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

import hdc_kernels
from hdc_kernels.compat import (
    lightly,
    moco,
    open_clip,
    pytorch_metric_learning,
    sentence_transformers,
    supcon,
)
from hdc_kernels.distributed import Ranks

RANKS, PAIRS, WIDTH = 2, 4, 6
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # embeddings twice, 1/τ
Make = Callable[[bool], Loss]  # of all processes, or of this one alone


class Row(NamedTuple):
    """Ratios to one process: of loss, gradient and the scale's gradient; and the gradients' cosine."""

    loss: float
    gradient: float
    cosine: float
    scale: float | None


def normalized(loss: Callable[..., Tensor], *rest: object) -> Loss:
    return lambda x, y, scale: loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale, *rest)


def fused(loss: Callable[..., Tensor], **options: str) -> Make:
    def make(gather: bool) -> Loss:
        group = Ranks(dist.group.WORLD, **options) if gather else None  # type: ignore[arg-type]
        return lambda x, y, scale: loss(x, y, temperature=1 / scale, process_group=group)

    return make


def clip(module: object, local_loss: bool, gather_with_grad: bool) -> Make:
    def make(gather: bool) -> Loss:
        place = (dist.get_rank(), RANKS) if gather else (0, 1)
        options = {"rank": place[0], "world_size": place[1]}
        if gather:
            options |= {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
        return normalized(module.ClipLoss(**options))  # type: ignore[attr-defined]

    return make


def siglip(module: object) -> Make:
    def make(gather: bool) -> Loss:
        place = (dist.get_rank(), RANKS) if gather else (0, 1)
        return normalized(module.SigLipLoss(rank=place[0], world_size=place[1]), -3.0)  # type: ignore[attr-defined]

    return make


def two_views(loss: Callable[..., Callable[[Tensor, Tensor], Tensor]]) -> Make:
    def make(gather: bool) -> Loss:
        module = loss(gather_distributed=gather)
        return lambda x, y, scale: module(x, y)

    return make


def sentences(loss: Callable[..., nn.Module]) -> Make:
    def make(gather: bool) -> Loss:
        module = loss(nn.Identity(), gather_across_devices=gather)
        return lambda x, y, scale: module.compute_loss_from_embeddings([x, y], None)

    return make


def labelled(loss: Callable[..., Callable[..., Tensor]]) -> Make:
    """Of views stacked row upon row, each with the label of its pair."""

    def make(gather: bool) -> Loss:
        several = loss(process_group=dist.group.WORLD if gather else None)
        first = PAIRS * dist.get_rank() if gather else 0
        return lambda x, y, scale: several(
            torch.cat((x, y)), torch.arange(first, first + len(x)).repeat(2)
        )

    return make


def image_views(gather: bool) -> Loss:
    module = supcon.SupConLoss(process_group=dist.group.WORLD if gather else None)
    return lambda x, y, scale: module(F.normalize(torch.stack((x, y), 1), dim=-1))


def momentum(gather: bool) -> Loss:
    group = dist.group.WORLD if gather else None
    return lambda x, y, scale: moco.contrastive_loss(x, y, T=1.0, process_group=group)


def scales(gather: bool) -> Loss:
    """Two timesteps of Spatial Contrast, and Temporal Contrast."""
    group = dist.group.WORLD if gather else None
    return lambda x, y, scale: hdc_kernels.fused_hd_nce(
        [(torch.stack((x, x * y), 1), torch.stack((y, x - y), 1))],
        [(x, y)],
        alpha=[0.5],
        beta=[1.0],
        temperature=1 / scale,
        process_group=group,
    )


def metric_learning(efficient: bool) -> Make:
    def make(gather: bool) -> Loss:
        module: nn.Module = pml.NTXentLoss(0.5)
        if gather:
            module = DistributedLossWrapper(module, efficient=efficient)
        first = PAIRS * dist.get_rank() if gather else 0

        def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            labels = torch.arange(first, first + len(x)).repeat(2)
            found: Tensor = module(torch.cat((x, y)), labels)
            return found

        return loss

    return make


def contenders() -> dict[str, Make]:
    """By name, ours first; adapters have the name of their module."""
    peer_clip, peer_lightly = peer_imports.open_clip(), peer_imports.lightly()
    ours: dict[str, Make] = {
        "fused_info_nce": fused(hdc_kernels.fused_info_nce),
        "fused_clip": fused(hdc_kernels.fused_clip),
        "fused_clip, ring": fused(hdc_kernels.fused_clip, strategy="ring"),
        "fused_nt_xent": fused(hdc_kernels.fused_nt_xent),
        "fused_nt_xent, ring": fused(hdc_kernels.fused_nt_xent, strategy="ring"),
        "fused_siglip": fused(hdc_kernels.fused_siglip),
        "fused_dcl": fused(hdc_kernels.fused_dcl),
        "fused_dclw": fused(hdc_kernels.fused_dclw),
        "fused_hn_nce": fused(hdc_kernels.fused_hn_nce),
        "fused_sup_con": labelled(partial(partial, hdc_kernels.fused_sup_con, temperature=0.1)),
        "fused_hd_nce": scales,
        "compat ClipLoss, defaults": clip(open_clip, False, False),
        "compat ClipLoss, local_loss": clip(open_clip, True, False),
        "compat SigLipLoss": siglip(open_clip),
        "compat lightly NTXentLoss": two_views(lightly.NTXentLoss),
        "compat lightly DCLLoss": two_views(lightly.DCLLoss),
        "compat lightly DCLWLoss": two_views(lightly.DCLWLoss),
        "compat MultipleNegativesRankingLoss": sentences(
            sentence_transformers.MultipleNegativesRankingLoss
        ),
        "compat pytorch-metric-learning NTXentLoss": labelled(pytorch_metric_learning.NTXentLoss),
        "compat pytorch-metric-learning SupConLoss": labelled(pytorch_metric_learning.SupConLoss),
        "compat SupContrast SupConLoss": image_views,
        "compat MoCo v3 contrastive_loss": momentum,
    }
    peers: dict[str, Make] = {
        "open_clip ClipLoss, defaults": clip(peer_clip, False, False),
        "open_clip ClipLoss, local_loss": clip(peer_clip, True, False),
        "open_clip ClipLoss, gather_with_grad": clip(peer_clip, False, True),
        "open_clip ClipLoss, both": clip(peer_clip, True, True),
        "open_clip SigLipLoss": siglip(peer_clip),
        "lightly NTXentLoss": two_views(peer_lightly.NTXentLoss),
        "lightly DCLLoss": two_views(peer_lightly.DCLLoss),
        "lightly DCLWLoss": two_views(peer_lightly.DCLWLoss),
        "sentence-transformers MultipleNegativesRankingLoss": sentences(
            MultipleNegativesRankingLoss
        ),
        "pytorch-metric-learning DistributedLossWrapper": metric_learning(False),
        "pytorch-metric-learning DistributedLossWrapper, efficient": metric_learning(True),
    }
    return {**ours, **peers}


def evaluate(loss: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Value, the encoders' gradients and the scale's."""
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64)
    encoders = draw.requires_grad_()
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    value = loss(x @ encoders[0], y @ encoders[1], scale)
    gradient, slope = torch.autograd.grad(value, (encoders, scale), allow_unused=True)
    return value.detach(), gradient.flatten(), slope


def measure(make: Make) -> Row:
    """On every rank, the same."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, RANKS * PAIRS, 5, generator=generator, dtype=torch.float64)
    value, gradient, slope = evaluate(make(False), x, y)
    rank = dist.get_rank()
    found = evaluate(make(True), x.split(PAIRS)[rank], y.split(PAIRS)[rank])
    means = [None if t is None else t.clone() for t in found]
    for t in means:
        if t is not None:
            dist.all_reduce(t)
            t /= RANKS
    mean_value, mean_gradient, mean_slope = means
    assert mean_value is not None
    assert mean_gradient is not None
    return Row(
        (mean_value / value).item(),
        (mean_gradient.norm() / gradient.norm()).item(),
        F.cosine_similarity(mean_gradient, gradient, dim=0).item(),
        None if mean_slope is None or slope is None else (mean_slope / slope).item(),
    )


def measure_all(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    rows = {name: measure(make) for name, make in contenders().items()}
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def run() -> dict[str, Row]:
    """The table, by name."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure_all, (folder,), nprocs=RANKS, daemon=True)
        rows = json.loads(Path(folder, "rows.json").read_text())
    return {name: Row(*row) for name, row in rows.items()}


def main() -> None:
    print(
        "| loss | loss ratio | gradient ratio | cosine | scale's gradient |\n|---|---|---|---|---|"
    )
    for name, row in run().items():
        scale = "" if row.scale is None else f"{row.scale:.3f}"
        print(f"| {name} | {row.loss:.3f} | {row.gradient:.3f} | {row.cosine:.3f} | {scale} |")


if __name__ == "__main__":
    main()
