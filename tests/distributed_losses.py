"""Every loss with its options, and its inputs on ranks: compared with the loss of one process that has the whole batch.

A check of `processes` is a function of (rank, world size); `every_loss` becomes one with a case and a kind of batches.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from embeddings import randn
from torch import Tensor

from hdc_kernels import (
    fused_clip,
    fused_dcl,
    fused_dclw,
    fused_hd_nce,
    fused_hn_nce,
    fused_info_nce,
    fused_moco,
    fused_nt_xent,
    fused_siglip,
    fused_sup_con,
)
from hdc_kernels.distributed import Ranks

WIDTH = 5
STRATEGIES = ("gather", "ring")


class Part(NamedTuple):
    """An input of the whole batch, and how many rows each rank has of it, in which dimension."""

    whole: Tensor
    sizes: list[int]
    rows: int = 0

    def of(self, rank: int) -> Tensor:
        return self.whole.split(self.sizes, self.rows)[rank]


class Pairs(Part):
    """Indices, which on each rank are those of its own rows."""

    def of(self, rank: int) -> Tensor:
        return super().of(rank) - sum(self.sizes[:rank])


Shared = Tensor  # an input that every rank has
Inputs = dict[str, Part | Shared]


class Case(NamedTuple):
    """A loss of (inputs, process_group, reduction), its inputs for batches of these sizes, and where its terms' rows
    are."""

    loss: Callable[..., Tensor]
    inputs: Callable[[list[int]], Inputs]
    rows: int = 0


def pair(sizes: list[int], **others: Any) -> Inputs:
    """Two sides, a temperature, and whatever else."""
    size = sum(sizes)
    sides = {"x": Part(randn(size, WIDTH), sizes), "y": Part(randn(size, WIDTH, seed=1), sizes)}
    return {**sides, "tau": torch.tensor(0.3, dtype=torch.float64), **others}


def labelled(sizes: list[int]) -> Inputs:
    labels = torch.randint(0, 3, (sum(sizes),), generator=torch.Generator().manual_seed(0))
    return pair(sizes, labels=Part(labels, sizes))


def listed(sizes: list[int]) -> Inputs:
    """Row i of y is a positive of row i // 2 of the same rank: some have two, one, or none."""
    whole = [
        torch.stack((torch.arange(n) // 2, torch.arange(n))) + sum(sizes[:k])
        for k, n in enumerate(sizes)
    ]
    return pair(sizes, pairs=Pairs(torch.cat(whole, 1), sizes, 1))


def with_extra(sizes: list[int]) -> Inputs:
    """Keys of nobody, of which ranks have 0, 1, 2 and so on."""
    extra = list(range(len(sizes)))
    return pair(sizes, extra=Part(randn(sum(extra), WIDTH, seed=2), extra))


def with_private(sizes: list[int]) -> Inputs:
    return pair(sizes, extra=Part(randn(sum(sizes), 3, WIDTH, seed=2), sizes))


def weighted(sizes: list[int]) -> Inputs:
    return pair(sizes, sample_weights=Part(randn(sum(sizes), seed=2).exp(), sizes))


def weighted_labels(sizes: list[int]) -> Inputs:
    return {**labelled(sizes), "sample_weights": weighted(sizes)["sample_weights"]}


def grouped(sizes: list[int]) -> Inputs:
    """[3, 2, B, D]."""
    x, y = (randn(3, 2, sum(sizes), WIDTH, seed=k) for k in range(2))
    return {**pair(sizes), "x": Part(x, sizes, 2), "y": Part(y, sizes, 2)}


def scales(sizes: list[int]) -> Inputs:
    """Two spatial pairs of 3 and 2 timesteps, one temporal pair."""
    size = sum(sizes)
    shapes = {"s": (size, 3, 4), "t": (size, 2, 6), "u": (size, 5)}
    return {
        **{
            name + side: Part(randn(*shape, seed=7 * k + len(name)), sizes)
            for name, shape in shapes.items()
            for k, side in enumerate("xy")
        },
        "tau": torch.tensor(0.3, dtype=torch.float64),
    }


def weighted_scales(sizes: list[int]) -> Inputs:
    return {**scales(sizes), "sample_weights": weighted(sizes)["sample_weights"]}


def biased(sizes: list[int]) -> Inputs:
    return pair(sizes, bias=torch.tensor(-2.0, dtype=torch.float64))


def queued(sizes: list[int]) -> Inputs:
    return pair(sizes, queue=randn(7, WIDTH, seed=2))


def info_nce(x: Tensor, y: Tensor, tau: Tensor, **options: Any) -> Tensor:
    return fused_info_nce(x, y, temperature=tau, **options)


def info_nce_ids(x: Tensor, y: Tensor, tau: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return fused_info_nce(x, y, temperature=tau, ids=labels, **options)


def info_nce_keys(x: Tensor, y: Tensor, tau: Tensor, extra: Tensor, **options: Any) -> Tensor:
    return fused_info_nce(x, torch.cat((y, extra)), temperature=tau, **options)


def info_nce_negatives(x: Tensor, y: Tensor, tau: Tensor, extra: Tensor, **options: Any) -> Tensor:
    return fused_info_nce(x, y, temperature=tau, negatives=extra, **options)


def clip(x: Tensor, y: Tensor, tau: Tensor, **options: Any) -> Tensor:
    return fused_clip(x, y, temperature=tau, **options)


def nt_xent(x: Tensor, y: Tensor, tau: Tensor, **options: Any) -> Tensor:
    return fused_nt_xent(x, y, temperature=tau, **options)


def siglip(x: Tensor, y: Tensor, tau: Tensor, **options: Any) -> Tensor:
    return fused_siglip(x, y, temperature=tau, **options)


def siglip_ids(x: Tensor, y: Tensor, tau: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return fused_siglip(x, y, temperature=tau, ids=labels, **options)


def siglip_keys(x: Tensor, y: Tensor, tau: Tensor, extra: Tensor, **options: Any) -> Tensor:
    return fused_siglip(x, torch.cat((y, extra)), temperature=tau, **options)


def dcl(x: Tensor, y: Tensor, tau: Tensor, **options: Any) -> Tensor:
    return fused_dcl(x, y, temperature=tau, **options)


def dcl_weighted(x: Tensor, y: Tensor, sample_weights: Tensor, **options: Any) -> Tensor:
    return dcl(x, y, weights=sample_weights, **options)


def dclw(x: Tensor, y: Tensor, tau: Tensor, **options: Any) -> Tensor:
    return fused_dclw(x, y, temperature=tau, **options)


def hn_nce(x: Tensor, y: Tensor, tau: Tensor, **options: Any) -> Tensor:
    return fused_hn_nce(x, y, temperature=tau, **options)


def sup_con(x: Tensor, y: Tensor, tau: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return fused_sup_con(x * y, labels, temperature=tau, **options)


def sup_con_other(x: Tensor, y: Tensor, tau: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return fused_sup_con(x, labels, other=y, other_labels=labels, temperature=tau, **options)


def hn_nce_labels(x: Tensor, y: Tensor, tau: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return fused_hn_nce(x, y, temperature=tau, labels=labels, symmetric=True, **options)


def sup_con_list(x: Tensor, y: Tensor, tau: Tensor, pairs: Tensor, **options: Any) -> Tensor:
    return fused_sup_con(x, positives=pairs, other=y, temperature=tau, **options)


def moco(x: Tensor, y: Tensor, tau: Tensor, queue: Tensor, **options: Any) -> Tensor:
    return fused_moco(x, y, queue, temperature=tau, **options)


def hd_nce(tau: Tensor, **parts: Any) -> Tensor:
    pairs = [(parts.pop(name + "x"), parts.pop(name + "y")) for name in "stu"]
    return fused_hd_nce(
        pairs[:2], pairs[2:], alpha=[0.5, 1.0], beta=[0.7], temperature=tau, **parts
    )


CASES = {
    "info_nce": Case(info_nce, pair),
    "info_nce symmetric": Case(partial(info_nce, symmetric=True), pair),
    "info_nce dot": Case(partial(info_nce, normalize=False), pair),
    "info_nce plain": Case(partial(info_nce, backend="torch"), pair),
    "info_nce chunked": Case(partial(info_nce, backend="chunked", symmetric=True), pair),
    "info_nce grouped": Case(partial(info_nce, symmetric=True), grouped, 2),
    "info_nce keys": Case(info_nce_keys, with_extra),
    "info_nce smoothed": Case(partial(info_nce, label_smoothing=0.1, symmetric=True), pair),
    "info_nce smoothed keys": Case(partial(info_nce_keys, label_smoothing=0.1), with_extra),
    "info_nce ids": Case(partial(info_nce_ids, symmetric=True), labelled),
    "info_nce weights": Case(info_nce, weighted),
    "info_nce negatives": Case(partial(info_nce_negatives, label_smoothing=0.2), with_extra),
    "info_nce only negatives": Case(partial(info_nce_negatives, in_batch=False), with_extra),
    "info_nce private": Case(partial(info_nce_negatives, label_smoothing=0.2), with_private),
    "info_nce only private": Case(partial(info_nce_negatives, in_batch=False), with_private),
    "clip": Case(clip, pair),
    "nt_xent": Case(nt_xent, pair, 1),
    "nt_xent chunked": Case(partial(nt_xent, backend="chunked"), pair, 1),
    "hd_nce": Case(hd_nce, scales),
    "siglip": Case(siglip, biased),
    "siglip plain": Case(partial(siglip, backend="torch"), biased),
    "siglip keys": Case(siglip_keys, with_extra),
    "dcl": Case(dcl, pair, 1),
    "dcl weights": Case(dcl_weighted, weighted, 1),
    "dclw": Case(dclw, pair, 1),
    "hn_nce": Case(partial(hn_nce, tau_plus=0.1), pair),
    "hn_nce symmetric": Case(partial(hn_nce, alpha=0.5, symmetric=True), pair),
    "sup_con out": Case(sup_con, labelled),
    "sup_con zero": Case(partial(sup_con, without_positive="zero"), labelled),
    "sup_con in": Case(partial(sup_con, definition="in"), labelled),
    "sup_con each": Case(partial(sup_con, definition="each"), labelled),
    "sup_con each, chunked": Case(partial(sup_con, definition="each", backend="chunked"), labelled),
    "sup_con other": Case(sup_con_other, labelled),
    "sup_con out, list": Case(sup_con_list, listed),
    "sup_con in, list": Case(partial(sup_con_list, definition="in"), listed),
    "sup_con each, list": Case(partial(sup_con_list, definition="each"), listed),
    "hn_nce labels": Case(hn_nce_labels, labelled),
    "moco": Case(moco, queued),
}
# What does not care how many ranks there are: it is checked on two.
OPTIONS = {
    "nt_xent smoothed": Case(partial(nt_xent, label_smoothing=0.1), pair, 1),
    "siglip ids": Case(siglip_ids, labelled),
    "siglip weights": Case(siglip, weighted),
    "dcl sample weights": Case(dcl, weighted, 1),
    "dclw weights": Case(dclw, weighted, 1),
    "hn_nce weights": Case(partial(hn_nce, symmetric=True), weighted),
    "hd_nce weights": Case(hd_nce, weighted_scales),
    "sup_con out weights": Case(sup_con, weighted_labels),
    "sup_con zero weights": Case(partial(sup_con, without_positive="zero"), weighted_labels),
    "sup_con each weights": Case(partial(sup_con, definition="each"), weighted_labels),
}
SIZES = {
    2: {"even": [3, 3], "uneven": [1, 4], "empty": [0, 4]},
    3: {"even": [2, 2, 2], "uneven": [3, 1, 2], "empty": [3, 0, 1]},
    4: {"even": [2, 2, 2, 2], "uneven": [1, 3, 2, 1], "empty": [0, 2, 3, 0]},
}


def differentiate(
    case: Case, leaves: dict[str, Tensor], reduction: str, group: Any, upstream: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    for leaf in leaves.values():
        leaf.requires_grad_(leaf.is_floating_point())
    value = case.loss(**leaves, reduction=reduction, process_group=group)
    if upstream is None:
        upstream = randn(*value.shape, seed=9)
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(value, list(asked.values()), upstream)
    return value.detach(), dict(zip(asked, found, strict=True))


def compare(
    name: str,
    sizes: list[int],
    reduction: str,
    group: Any,
    options: dict[str, Any],
    bound: float = 1e-10,
) -> None:
    """On a rank of `group`, whose ranks have batches of `sizes`."""
    case, size, rank = (CASES | OPTIONS)[name], len(sizes), group.rank()
    inputs = case.inputs(sizes)
    whole = {k: (p.whole if isinstance(p, Part) else p).clone() for k, p in inputs.items()}
    expected, gradients = differentiate(case, whole, reduction, None, None)
    upstream = randn(*expected.shape, seed=9)
    if reduction == "none":
        expected, upstream = (t.split(sizes, case.rows)[rank] for t in (expected, upstream))
    local = {k: (p.of(rank) if isinstance(p, Part) else p).clone() for k, p in inputs.items()}
    value, found = differentiate(case, local, reduction, Ranks(group, **options), upstream)
    torch.testing.assert_close(value, expected, rtol=bound, atol=bound)
    for key, gradient in found.items():
        part = inputs[key]
        if isinstance(part, Part):  # averaging over ranks takes 1/W of each rank's own rows
            torch.testing.assert_close(
                gradient / size,
                part._replace(whole=gradients[key]).of(rank),
                rtol=bound,
                atol=bound,
                msg=lambda text, key=key: f"gradient of {key}: {text}",
            )
        else:
            gradient = gradient.contiguous()  # of other strides, gloo would add up other elements
            dist.all_reduce(gradient, group=group)
            torch.testing.assert_close(
                gradient / size,
                gradients[key],
                rtol=bound,
                atol=bound,
                msg=lambda text, key=key: f"gradient of {key}: {text}",
            )


def every_loss(name: str, kind: str, rank: int, world_size: int) -> None:
    """All reductions, both strategies."""
    sizes = SIZES[world_size][kind]
    for strategy in STRATEGIES:
        for reduction in ("mean", "none") if strategy == "ring" else ("mean", "sum", "none"):
            compare(name, sizes, reduction, dist.group.WORLD, {"strategy": strategy})
    if kind == "even" and "keys" not in name and "negatives" not in name:
        compare(name, sizes, "mean", dist.group.WORLD, {"even_batches": True})
