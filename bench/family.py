"""Every loss but plain InfoNCE and HD-NCE, each beside the package that people use it from.

All of a query and a key, [B, D]; each row of either is a sample of its own, or one of SAME samples of a class. Both
get their gradients, but for MoCo's key: there, as in any use of it, key and queue come from a momentum encoder.
"""

from collections.abc import Callable
from typing import Any

import naive
import peer_imports
import torch
import torch.nn.functional as F
from contenders import OURS, TAU, Case, Contender, Loss, Unfit
from torch import Tensor

from hdc_kernels import (
    fused_clip,
    fused_dcl,
    fused_dclw,
    fused_hn_nce,
    fused_info_nce,
    fused_moco,
    fused_nt_xent,
    fused_siglip,
    fused_sup_con,
)

SAME = 8  # samples of a class
QUEUE = 4  # keys of earlier batches for each row
SCALE, BIAS = 10.0, -10.0  # SigLIP's first ones


def _units(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(query, dim=-1), F.normalize(key, dim=-1)


def _labels(case: Case) -> Tensor:
    """Of query and key together, [2B]."""
    return torch.arange(2 * case.batch, device=case.device) // SAME


def _ours(loss: Callable[..., Tensor], **options: Any) -> Callable[[Case], Loss]:
    """One of our losses of query and key, with τ unless something else is given."""
    options = {"temperature": TAU, **options}
    return lambda case: lambda query, key: loss(query, key, **options)


def _queue(case: Case) -> Tensor:
    """Keys of earlier batches; as many as in the paper at B = 16,384."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(QUEUE * case.batch, case.width, generator=generator)
    return keys.to(case.device, getattr(torch, case.dtype))


def moco(case: Case) -> Loss:
    queue = _queue(case)
    return lambda query, key: fused_moco(query, key, queue, temperature=TAU)


def info_nce_pytorch_queue(case: Case) -> Loss:
    from info_nce import info_nce  # type: ignore[import-not-found, import-untyped, unused-ignore]

    queue = _queue(case)
    return lambda query, key: info_nce(query, key, queue, temperature=TAU)


def lightly(name: str) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        loss: Loss = getattr(peer_imports.lightly(), name)(temperature=TAU)
        return loss

    return build


def open_clip(case: Case) -> Loss:
    loss = peer_imports.open_clip().ClipLoss()
    return lambda query, key: loss(*_units(query, key), 1 / TAU)


def open_clip_siglip(case: Case) -> Loss:
    loss = peer_imports.open_clip().SigLipLoss()
    return lambda query, key: loss(*_units(query, key), SCALE, BIAS)


def sentence_transformers(case: Case) -> Loss:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # type: ignore[import-not-found, import-untyped, unused-ignore]

    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=1 / TAU)
    return lambda query, key: loss.compute_loss_from_embeddings([query, key], None)


def sup_con(definition: str) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        labels = _labels(case)
        options: dict[str, Any] = {"temperature": TAU, "definition": definition}
        return lambda query, key: fused_sup_con(torch.cat((query, key)), labels, **options)

    return build


def metric_learning(name: str) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        from pytorch_metric_learning import losses  # type: ignore[import-not-found, import-untyped, unused-ignore]

        if name == "NTXentLoss" and case.batch > 128:
            raise Unfit("holds a number for every positive, negative pair: O(B²·positives)")
        labels = _labels(case)
        loss = getattr(losses, name)(temperature=TAU)
        return lambda query, key: loss(torch.cat((query, key)), labels)

    return build


def sup_con_in(case: Case) -> Loss:
    labels = _labels(case)
    return lambda query, key: naive.sup_con_in(torch.cat((query, key)), labels, TAU)


def hn_nce(case: Case) -> Loss:
    return lambda query, key: naive.hn_nce(query, key, TAU, beta=1.0)


LIGHTLY, OPEN_CLIP, SENTENCES, METRIC = (
    "lightly",
    "open_clip",
    "sentence-transformers",
    "pytorch-metric-learning",
)

FAMILY: dict[str, list[Contender]] = {
    "NT-Xent": [
        Contender(OURS, "fused_nt_xent", _ours(fused_nt_xent)),
        Contender(LIGHTLY, "NTXentLoss", lightly("NTXentLoss"), peer=True),
    ],
    "CLIP": [
        Contender(OURS, "fused_clip", _ours(fused_clip)),
        Contender(OPEN_CLIP, "ClipLoss of normalised features", open_clip, peer=True),
    ],
    "SigLIP": [
        Contender(OURS, "fused_siglip", _ours(fused_siglip, temperature=1 / SCALE, bias=BIAS)),
        Contender(OPEN_CLIP, "SigLipLoss of normalised features", open_clip_siglip, peer=True),
    ],
    "SupCon": [
        Contender(OURS, "fused_sup_con", sup_con("out")),
        Contender(METRIC, "SupConLoss", metric_learning("SupConLoss"), peer=True),
    ],
    "SupCon, each": [
        Contender(OURS, 'fused_sup_con(definition="each")', sup_con("each")),
        Contender(METRIC, "NTXentLoss", metric_learning("NTXentLoss"), peer=True),
    ],
    "SupCon, in": [
        Contender(OURS, 'fused_sup_con(definition="in")', sup_con("in")),
        Contender("plain PyTorch", "the formula over masked logits", sup_con_in),
    ],
    "DCL": [
        Contender(OURS, "fused_dcl", _ours(fused_dcl)),
        Contender(LIGHTLY, "DCLLoss", lightly("DCLLoss"), peer=True),
    ],
    "DCLW": [
        Contender(OURS, "fused_dclw", _ours(fused_dclw)),
        Contender(LIGHTLY, "DCLWLoss", lightly("DCLWLoss"), peer=True),
    ],
    "MoCo": [
        Contender(OURS, f"fused_moco, a queue of {QUEUE}·B keys, fixed keys", moco),
        Contender("info-nce-pytorch", "info_nce with negative_keys, fixed keys", info_nce_pytorch_queue, peer=True),
    ],
    "ranking": [
        Contender(OURS, "fused_info_nce", _ours(fused_info_nce)),
        Contender(SENTENCES, "MultipleNegativesRankingLoss", sentence_transformers, peer=True),
    ],
    "HN-NCE": [
        Contender(OURS, "fused_hn_nce, β = 1", _ours(fused_hn_nce)),
        Contender("plain PyTorch", "the formula over the logits", hn_nce),
    ],
}  # fmt: skip
