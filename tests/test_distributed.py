"""Every loss across ranks against one process with the whole batch: values and averaged gradients, in float64."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import processes
import pytest
import torch
import torch.distributed as dist
from embeddings import randn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hdc_kernels import (
    CLIP,
    DCL,
    DCLW,
    HDNCE,
    HNNCE,
    InfoNCE,
    MoCo,
    NTXent,
    Queue,
    SigLIP,
    SupCon,
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
from hdc_kernels.backends import Mask
from hdc_kernels.call import Call
from hdc_kernels.distributed import Ranks, operators
from hdc_kernels.distributed.rows import Rows

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

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


def subgroup(rank: int, world_size: int) -> None:
    """Ranks 2 and 0 alone, in the order that they were given in."""
    group = dist.new_group([0, world_size - 1])
    if rank in (0, world_size - 1):
        for name in ("info_nce", "clip", "nt_xent", "hd_nce", "siglip", "sup_con out"):
            for strategy in STRATEGIES:
                compare(name, [3, 1], "mean", group, {"strategy": strategy})
    else:
        with pytest.raises(TypeError, match="process_group is a group without this process; it"):
            fused_clip(randn(2, 3), randn(2, 3), process_group=group)


class Model(nn.Module):
    """Encoders with a loss on top, whose scale or temperature is learned, too."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.ModuleList(nn.Linear(4, WIDTH).double() for _ in range(2))
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor, *rest: Any) -> Tensor:
        loss: Tensor = self.loss(self.encoders[0](x), self.encoders[1](y), *rest)
        return loss


class SupConOfTwo(nn.Module):
    """Views and their labels."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss = SupCon(temperature(), **options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        labels = (x[:, 0] > 0).long()
        loss: Tensor = self.loss(x + y, labels.detach())
        return loss


class HDNCEOfTwo(nn.Module):
    """One pair of each kind."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss = HDNCE([0.5], [1.0], temperature(), **options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        spatial = torch.stack((x, x * y), 1), torch.stack((y, x - y), 1)
        loss: Tensor = self.loss([spatial], [(x, y)])
        return loss


def temperature() -> nn.Parameter:
    return nn.Parameter(torch.tensor(0.5, dtype=torch.float64))


MODULES: dict[str, Callable[..., nn.Module]] = {
    "InfoNCE": lambda **options: InfoNCE(temperature(), symmetric=True, **options),
    "CLIP": CLIP,
    "NTXent": lambda **options: NTXent(temperature(), **options),
    "HDNCE": HDNCEOfTwo,
    "SigLIP": SigLIP,
    "SupCon": SupConOfTwo,
    "DCL": lambda **options: DCL(temperature(), **options),
    "DCLW": lambda **options: DCLW(temperature(), **options),
    "HNNCE": lambda **options: HNNCE(temperature(), **options),
    "MoCo": lambda **options: MoCo(9, WIDTH, temperature(), dtype=torch.float64, **options),
}


def data_parallel(rank: int, world_size: int) -> None:
    """Three steps of DDP with uneven batches and an empty one: parameters as after three of one process."""
    sizes = SIZES[world_size]["empty"]
    for name, make in MODULES.items():
        for strategy in STRATEGIES:
            whole = Model(make())
            part = Model(make(process_group=Ranks(dist.group.WORLD, strategy=strategy)))
            wrapped = DistributedDataParallel(part)
            optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (whole, part)]
            for step in range(3):
                inputs = [randn(sum(sizes), 4, seed=2 * step + k) for k in range(2)]
                expected = whole(*inputs)
                found = wrapped(*(x.split(sizes)[rank] for x in inputs))
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
                for optimizer, loss in zip(optimizers, (expected, found), strict=True):
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            for (key, ours), exact in zip(
                part.state_dict().items(), whole.state_dict().values(), strict=True
            ):
                torch.testing.assert_close(
                    ours,
                    exact,
                    rtol=1e-8,
                    atol=1e-8,
                    msg=lambda text, k=key, n=name: f"{n} {k}: {text}",
                )


def compiled(rank: int, world_size: int) -> None:
    """One graph with even batches."""
    names = (
        "info_nce symmetric",
        "info_nce ids",
        "nt_xent",
        "hd_nce",
        "siglip",
        "dclw",
        "hn_nce",
        "sup_con out",
    )
    # Gathering compiles alike for all; a trip around the ring has operators for each kind of sum.
    gathered = ("info_nce ids", "sup_con out")
    for name, strategy in (*product(names, ["ring"]), *product(gathered, ["gather"])):
        compare_compiled(CASES[name], strategy, rank, world_size, fullgraph=True)
    plain = CASES["info_nce chunked"]
    compare_compiled(plain, "ring", rank, world_size, fullgraph=False)
    with pytest.raises(RuntimeError, match="use a backend with kernels, or strategy='gather'"):
        compare_compiled(plain, "ring", rank, world_size, fullgraph=True)


def compare_compiled(
    case: Case, strategy: str, rank: int, world_size: int, *, fullgraph: bool
) -> None:
    """Value and gradients of a loss and of the same one compiled."""
    torch.compiler.reset()  # or what was compiled with graph breaks would be taken for the full graph, too
    inputs = case.inputs([2] * world_size)
    results = []
    group = Ranks(dist.group.WORLD, strategy=strategy, even_batches=True)
    for loss in (case.loss, torch.compile(case.loss, backend="aot_eager", fullgraph=fullgraph)):
        local = {k: (p.of(rank) if isinstance(p, Part) else p).clone() for k, p in inputs.items()}
        compared = case._replace(loss=loss)
        results.append(differentiate(compared, local, "mean", group, torch.tensor(1.5).double()))
    (value, gradients), (exact, expected) = results
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-11, atol=1e-13)


def sound_operators(rank: int, world_size: int) -> None:
    """Schemas, fake tensors, autograd and dynamic shapes of the ring's operators, by `torch.library.opcheck`."""
    x, y = (randn(3, 1, WIDTH, seed=2 * rank + k).requires_grad_() for k in range(2))
    ids = torch.arange(3 * world_size) % 4
    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    bias = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
    rows = Rows(Ranks(dist.group.WORLD), (3,) * world_size)
    mask = Mask(diagonal=True, ids=(ids[3 * rank :][None, :3], ids[None]))
    call = Call("cpu", None, 0.0, False, True, 1, 1, "logsumexp", mask)

    def checked(operator: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            torch.library.opcheck(operator, arguments)
            return operator(*arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("ring_sums", "ring_gradients", "ring_label_sums", "ring_label_gradient"):
            patch.setattr(operators, name, checked(getattr(operators, name)))
        operators.sums(call, rows, tau, None, [x], [y])[0].sum().backward()
        softplus = call._replace(function="softplus")
        operators.sums(softplus, rows, tau, bias, [x], [y])[0].sum().backward()
        operators.label_sums(y[:, 0], ids, ids[3 * rank :][:3], rows).sum().backward()


def queue_of_all(rank: int, world_size: int) -> None:
    """Every rank's keys, in the order of the ranks, on every rank."""
    queue, expected = Queue(7, 2), Queue(7, 2)
    sizes = SIZES[world_size]["empty"]
    for step in range(3):
        keys = randn(sum(sizes), 2, seed=step)
        queue.enqueue(keys.split(sizes)[rank], dist.group.WORLD)
        expected.enqueue(keys)
        assert torch.equal(queue.keys, expected.keys)
        assert queue.filled == expected.filled


def metrics(rank: int, world_size: int) -> None:
    """Of this rank's rows, among the keys of all; also where a key is there twice, or left out, or nobody's."""
    sizes = SIZES[world_size]["uneven"]
    size = sum(sizes)
    x, y, extra = (randn(size, WIDTH, seed=k) for k in range(3))
    y[-1] = y[0]
    labels = torch.arange(size) % 3
    for strategy in STRATEGIES:
        group = Ranks(dist.group.WORLD, strategy=strategy)
        for options in (
            {},
            {"symmetric": True},
            {"ids": labels},
            {"negatives": extra},
            {"negatives": extra, "in_batch": False},
            {"negatives": extra.unsqueeze(1) * torch.ones(2, 1)},
        ):
            mine = {
                name: t.split(sizes)[rank] if isinstance(t, Tensor) else t
                for name, t in {"query": x, "key": y, **options}.items()
            }
            _, whole = fused_info_nce(x, y, return_metrics=True, **options)
            _, found = fused_info_nce(**mine, return_metrics=True, process_group=group)
            torch.testing.assert_close(found.loss, whole.loss.split(sizes)[rank])
            assert torch.equal(found.rank, whole.rank.split(sizes)[rank])
            assert found.accuracy == (found.rank == 0).float().mean()
        for loss, options in (
            (fused_siglip, {}),
            (fused_siglip, {"ids": labels}),
            (fused_dcl, {}),
            (fused_dclw, {}),
            (fused_hn_nce, {"labels": labels}),
            (partial(fused_hn_nce, beta=0.0, symmetric=True), {}),
        ):
            rest = {name: t.split(sizes)[rank] for name, t in options.items()}
            parts = [t.split(sizes)[rank] for t in (x, y)]
            _, whole = loss(x, y, return_metrics=True, **options)
            _, found = loss(*parts, return_metrics=True, process_group=group, **rest)
            for ours, exact in zip(found, whole, strict=True):
                if ours.dim():  # an accuracy is that of this rank's rows
                    torch.testing.assert_close(ours, exact.split(sizes, -1)[rank])
        _, expected = fused_info_nce(
            *(t.split(sizes)[rank] for t in (x, y)), return_metrics=True, process_group=group
        )
        pair = tuple(t.split(sizes)[rank] for t in (x, y))
        timesteps = tuple(t.unsqueeze(1).repeat(1, 2, 1) for t in pair)
        _, scale = fused_hd_nce(
            [timesteps], [pair], alpha=[1.0], beta=[1.0], return_metrics=True, process_group=group
        )
        for loss, accuracy in zip(scale[::2], scale[1::2], strict=True):
            torch.testing.assert_close(loss[0].double(), expected.loss.mean(), rtol=1e-6, atol=0)
            torch.testing.assert_close(accuracy[0], expected.accuracy)


def narrow_wire(rank: int, world_size: int) -> None:
    """Keys rounded to bfloat16 on their way: gradients near the exact ones, of the right dtype, in both strategies
    the same."""
    sizes = SIZES[world_size]["uneven"]
    results = []
    for options in (
        {},
        {"wire_dtype": torch.bfloat16},
        {"wire_dtype": torch.bfloat16, "strategy": "ring"},
    ):
        x, y = (randn(sum(sizes), 16, seed=k).float().split(sizes)[rank] for k in range(2))
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        loss = fused_clip(
            *leaves, temperature=0.5, process_group=Ranks(dist.group.WORLD, **options)
        )
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    exact, gathered, ring = results
    for a, b, c in zip(exact, gathered, ring, strict=True):
        torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-6)
        assert a.dtype == b.dtype == c.dtype == torch.float32
        assert 0 < (a - b).norm() < 0.01 * a.norm()


def half_precision(rank: int, world_size: int) -> None:
    """bfloat16 embeddings at a small temperature: both strategies as near to float64 as one process is."""
    sizes = SIZES[world_size]["uneven"]
    whole = [randn(sum(sizes), 32, seed=k).bfloat16() for k in range(2)]
    exact = gradients_of([x.double() for x in whole], None)
    alone = gradients_of(whole, None)
    for strategy in ("gather", "ring"):
        local = [x.split(sizes)[rank] for x in whole]
        loss, *found = gradients_of(local, Ranks(dist.group.WORLD, strategy=strategy))
        assert abs(loss - exact[0]) <= 2 * abs(alone[0] - exact[0]) + 1e-5 * exact[0]
        for ours, single, reference in zip(found, alone[1:], exact[1:], strict=True):
            error = (ours.double() / world_size - reference.split(sizes)[rank]).norm()
            assert error <= 2 * (single.double() - reference).norm() + 1e-12


def gradients_of(pair: list[Tensor], group: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in pair]
    loss = fused_clip(*leaves, temperature=0.05, process_group=group)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def keys_without_gradients(rank: int, world_size: int) -> None:
    """As from a momentum encoder."""
    sizes = SIZES[world_size]["uneven"]
    x, y = randn(sum(sizes), WIDTH), randn(sum(sizes), WIDTH, seed=1)
    whole = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(fused_info_nce(whole, y), whole)
    for strategy in ("gather", "ring"):
        query = x.split(sizes)[rank].clone().requires_grad_()
        group = Ranks(dist.group.WORLD, strategy=strategy)
        loss = fused_info_nce(query, y.split(sizes)[rank], process_group=group)
        (found,) = torch.autograd.grad(loss, query)
        torch.testing.assert_close(found / world_size, expected.split(sizes)[rank])


def refusals(rank: int, world_size: int) -> None:
    """One line each, before anybody waits for anybody."""
    x = randn(3, 4)
    for call, message in (
        (
            lambda: fused_clip(x[:0], x[:0], process_group=dist.group.WORLD),
            "the batches of all ranks are empty",
        ),
        (lambda: Ranks(dist.group.WORLD, strategy="tree"), "strategy is 'tree'; it must be one of"),
        (
            lambda: Ranks(dist.group.WORLD, wire_dtype=torch.int8),
            "wire_dtype is torch.int8; it must be None or",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="even_batches is a int; it must be a bool"):
        Ranks(dist.group.WORLD, even_batches=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="group is a list; it must be a ProcessGroup"):
        Ranks([0, 1])  # type: ignore[arg-type]
    for strategy in STRATEGIES:
        for fused in (fused_clip, fused_siglip):
            leaf = x.clone().requires_grad_()
            loss = fused(leaf, leaf, process_group=Ranks(dist.group.WORLD, strategy=strategy))
            (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="a second derivative of a loss with a process"):
                slope.sum().backward()


CHECKS: dict[str, processes.Check] = {
    **{
        f"{name}, {kind}": partial(every_loss, name, kind)
        for name in CASES
        for kind in ("even", "uneven", "empty")
    },
    **{
        check.__name__: check
        for check in (
            data_parallel,
            queue_of_all,
            metrics,
            narrow_wire,
            half_precision,
            keys_without_gradients,
            refusals,
        )
    },
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    """What every check said, by world size; the processes start once each."""
    known: dict[int, dict[str, str]] = {}

    def of(world_size: int) -> dict[str, str]:
        if world_size not in known:
            checks = dict(CHECKS)
            if world_size == 3:
                checks["subgroup"] = subgroup
            if world_size == 2:
                checks["compiled"] = compiled
                checks["sound_operators"] = sound_operators
                checks |= {name: partial(every_loss, name, "uneven") for name in OPTIONS}
            known[world_size] = processes.run(checks, world_size, tmp_path_factory.mktemp("ranks"))
        return known[world_size]

    return of


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks(check: str, world_size: int, results: Callable[[int], dict[str, str]]) -> None:
    """See the function of that name, or `every_loss`."""
    problem = results(world_size)[check]
    assert not problem, problem


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, results: Callable[[int], dict[str, str]]) -> None:
    """See `every_loss`."""
    problem = results(2)[name]
    assert not problem, problem


def test_subgroup(results: Callable[[int], dict[str, str]]) -> None:
    """Two of three ranks."""
    problem = results(3)["subgroup"]
    assert not problem, problem


def test_compiled(results: Callable[[int], dict[str, str]]) -> None:
    """By `torch.compile(fullgraph=True)`."""
    problem = results(2)["compiled"]
    assert not problem, problem


def test_sound_operators(results: Callable[[int], dict[str, str]]) -> None:
    problem = results(2)["sound_operators"]
    assert not problem, problem
