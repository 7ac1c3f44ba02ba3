"""Every loss across ranks against one process with the whole batch: values and averaged gradients, in float64."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from distributed_losses import (
    CASES,
    OPTIONS,
    SIZES,
    STRATEGIES,
    WIDTH,
    Case,
    Part,
    compare,
    differentiate,
    every_loss,
)
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
    fused_siglip,
    fused_sup_con,
)
from hdc_kernels.backends import Mask
from hdc_kernels.call import Call
from hdc_kernels.distributed import Ranks, operators
from hdc_kernels.distributed.rows import Rows

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


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
    x, labels = randn(3, 4), torch.arange(3)
    for call, message in (
        (
            lambda: fused_clip(x[:0], x[:0], process_group=dist.group.WORLD),
            "the batch is empty on all ranks; one rank at least must have a row",
        ),
        (
            lambda: fused_info_nce(
                x, x, negatives=x[:0], in_batch=False, process_group=dist.group.WORLD
            ),
            "negatives is empty on all ranks",
        ),
        (
            lambda: fused_info_nce(x, x, negatives=randn(3, 0, 4), process_group=dist.group.WORLD),
            r"negatives has shape \[3, 0, 4\]; it must be .* with M ≥ 1",
        ),
        (
            lambda: fused_sup_con(
                x, labels, other=x[:0], other_labels=labels[:0], process_group=dist.group.WORLD
            ),
            "other is empty on all ranks",
        ),
        (
            lambda: fused_sup_con(x[:0], labels[:0], process_group=dist.group.WORLD),
            "embeddings is empty on all ranks",
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
