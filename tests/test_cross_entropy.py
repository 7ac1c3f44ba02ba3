"""The options that NT-Xent, CLIP and MoCo share with InfoNCE, against the whole matrix in float64."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from agreement import agree, no_worse_than_plain
from embeddings import randn
from torch import Tensor

from hdc_kernels.clip import fused_clip
from hdc_kernels.cross_entropy import InfoNCEMetrics
from hdc_kernels.info_nce import fused_info_nce
from hdc_kernels.moco import fused_moco
from hdc_kernels.nt_xent import fused_nt_xent

QUEUE = randn(7, 4, seed=5)
IDS = torch.tensor([3, 1, 3, 2, 1])
TAU = torch.tensor(0.3, dtype=torch.float64)


class Matrix(NamedTuple):
    """Logits with those that are left out at −inf, the positives' columns, and how terms are shown."""

    logits: list[Tensor]  # of each direction
    positives: Tensor
    shape: tuple[int, ...]


def nt_xent(x: Tensor, y: Tensor, tau: Tensor, ids: Tensor | None) -> Matrix:
    z = F.normalize(torch.cat((x, y)), dim=-1)
    own = torch.arange(len(z)).roll(len(x))
    out = torch.eye(len(z), dtype=torch.bool)
    if ids is not None:
        out = ids.repeat(2)[:, None] == ids.repeat(2)
        out[torch.arange(len(z)), own] = False
    return Matrix([(z @ z.mT / tau).masked_fill(out, -math.inf)], own, (2, len(x)))


def clip(x: Tensor, y: Tensor, tau: Tensor, ids: Tensor | None) -> Matrix:
    s = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT / tau
    if ids is not None:
        out = (ids[:, None] == ids) & ~torch.eye(len(x), dtype=torch.bool)
        s = s.masked_fill(out, -math.inf)
    return Matrix([s, s.mT], torch.arange(len(x)), (len(x),))


def moco(x: Tensor, y: Tensor, tau: Tensor, ids: Tensor | None) -> Matrix:
    x, y, queue = (F.normalize(t, dim=-1) for t in (x, y, QUEUE))
    s = torch.cat(((x * y).sum(1, keepdim=True), x @ queue.mT), 1) / tau
    return Matrix([s], torch.zeros(len(x), dtype=torch.int64), (len(x),))


def fused_queue(x: Tensor, y: Tensor, **options: Any) -> Any:
    return fused_moco(x, y, QUEUE.to(x.dtype), **options)


LOSSES: list[tuple[Callable[..., Any], Callable[..., Matrix]]] = [
    (fused_nt_xent, nt_xent),
    (fused_clip, clip),
    (fused_queue, moco),
]
WITH_IDS = LOSSES[:2]


def exact(matrix: Matrix, weights: Tensor | None, epsilon: float, reduction: str) -> Tensor:
    """Every column that is not left out has the same share of ε."""
    directions = []
    for s in matrix.logits:
        there = s.isfinite()
        log_p = (s - s.logsumexp(1, keepdim=True)).masked_fill(~there, 0.0)
        own = log_p.gather(1, matrix.positives.unsqueeze(1)).squeeze(1)
        directions.append(-(1 - epsilon) * own - epsilon * log_p.sum(1) / there.sum(1))
    terms = torch.stack(directions).mean(0).view(matrix.shape)
    shares = torch.ones_like(terms) if weights is None else weights.expand_as(terms)
    terms = terms * shares
    if reduction == "none":
        return terms
    return terms.sum() / shares.sum() if reduction == "mean" else terms.sum()


@pytest.mark.parametrize(("ours", "matrix"), LOSSES)
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_smoothing(
    reduction: Any, weighted: bool, epsilon: float, matrix: Any, ours: Any
) -> None:
    """Loss and gradients, also those of the temperature and of the weights."""

    def fused(x: Tensor, y: Tensor, tau: Tensor, *weights: Tensor) -> Tensor:
        value: Tensor = ours(
            x,
            y,
            temperature=tau,
            sample_weights=weights[0] if weights else None,
            label_smoothing=epsilon,
            reduction=reduction,
        )
        return value

    def whole(x: Tensor, y: Tensor, tau: Tensor, *weights: Tensor) -> Tensor:
        given = weights[0] if weights else None
        return exact(matrix(x, y, tau, None), given, epsilon, reduction)

    inputs = [randn(5, 4), randn(5, 4, seed=1), TAU]
    if weighted:
        inputs.append(randn(5, seed=2).abs())
    agree(fused, whole, *inputs)


@pytest.mark.parametrize(("ours", "matrix"), LOSSES)
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_one_sample(epsilon: float, matrix: Any, ours: Any) -> None:
    """NT-Xent and CLIP have then nothing to tell apart, MoCo has its queue."""
    agree(
        lambda x, y, t: ours(x, y, temperature=t, label_smoothing=epsilon),
        lambda x, y, t: exact(matrix(x, y, t, None), None, epsilon, "mean"),
        randn(1, 4),
        randn(1, 4, seed=1),
        TAU,
        floor=1.0,
    )


@pytest.mark.parametrize("ours", [ours for ours, _ in LOSSES])
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype, epsilon: float, ours: Any) -> None:
    """Not a bit of loss and gradients, whatever the encoder runs in."""
    pair = [randn(9, 4, seed=k, dtype=torch.float32).requires_grad_() for k in range(2)]
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = ours(*pair, label_smoothing=epsilon)
        found.append((loss, *torch.autograd.grad(loss, pair)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("ours", "matrix"), WITH_IDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["auto", "torch", "chunked"])
def test_ids(backend: Any, reduction: Any, matrix: Any, ours: Any) -> None:
    """Rows of one id are no negatives of each other."""
    agree(
        lambda x, y, t: ours(x, y, temperature=t, ids=IDS, reduction=reduction, backend=backend),
        lambda x, y, t: exact(matrix(x, y, t, IDS), None, 0.0, reduction),
        randn(5, 4),
        randn(5, 4, seed=1),
        TAU,
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("backend", ["auto", "torch", "chunked"])
def test_false_negatives(backend: Any, listed: bool, symmetric: bool) -> None:
    """Pair by pair, in any order, or as a matrix; the diagonal is left in; beside ids."""
    out = torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) < 0.3
    out[2, 2] = True
    given = out.nonzero().mT.flip(1) if listed else out
    ids = torch.tensor([0, 1, 2, 0, 4])
    ours = fused_clip if symmetric else fused_info_nce

    def whole(x: Tensor, y: Tensor, tau: Tensor) -> Tensor:
        s = clip(x, y, tau, ids).logits[0]
        s = s.masked_fill(out & ~torch.eye(5, dtype=torch.bool), -math.inf)
        sides = [s, s.mT] if symmetric else [s]
        return exact(Matrix(sides, torch.arange(5), (5,)), None, 0.0, "mean")

    agree(
        lambda x, y, t: ours(x, y, temperature=t, ids=ids, false_negatives=given, backend=backend),
        whole,
        randn(5, 4),
        randn(5, 4, seed=1),
        TAU,
    )


@pytest.mark.parametrize(("ours", "matrix"), LOSSES)
def test_metrics(matrix: Any, ours: Any) -> None:
    """Every row's loss, rank and logsumexp; the value is that without them."""
    x, y = randn(5, 4), randn(5, 4) + randn(5, 4, seed=1)
    value, metrics = ours(x, y, temperature=TAU, return_metrics=True)
    assert isinstance(metrics, InfoNCEMetrics)
    found = matrix(x, y, TAU, None)
    s, own = found.logits[0], found.positives.unsqueeze(1)
    ranks = (s >= s.gather(1, own)).sum(1) - 1
    assert 0 < (ranks == 0).sum() < len(ranks)
    assert metrics.rank.tolist() == ranks.view(found.shape).tolist()
    assert metrics.accuracy.item() == pytest.approx((ranks == 0).double().mean().item())
    terms = exact(found, None, 0.0, "none")
    torch.testing.assert_close(metrics.loss, terms, rtol=1e-12, atol=1e-14)
    lse = torch.stack([side.logsumexp(1) for side in found.logits]).mean(0).view(found.shape)
    torch.testing.assert_close(metrics.logsumexp, lse, rtol=1e-12, atol=0)
    assert value.item() == pytest.approx(ours(x, y, temperature=TAU).item(), rel=1e-13)
    value, metrics = ours(x, y, temperature=TAU, reduction="none", return_metrics=True)
    value.zero_()
    torch.testing.assert_close(metrics.loss, terms, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("ours", "matrix"), WITH_IDS)
@pytest.mark.parametrize("option", ["smoothing", "ids"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain(
    dtype: torch.dtype, option: str, matrix: Any, ours: Any
) -> None:
    """With weights, and smoothing or ids."""
    weights = randn(24, seed=2).exp().float()
    ids, epsilon = (torch.arange(24) // 2, 0.0) if option == "ids" else (None, 0.2)
    options: dict[str, Any] = {"sample_weights": weights, "ids": ids, "label_smoothing": epsilon}
    no_worse_than_plain(
        lambda x, y: ours(x, y, temperature=0.07, **options),
        lambda x, y: exact(matrix(x, y, 0.07, ids), weights, epsilon, "mean"),
        *(randn(24, 32, seed=k, dtype=dtype) for k in range(2)),
    )


@pytest.mark.parametrize(("ours", "matrix"), LOSSES)
def test_gradcheck_and_compiled(matrix: Any, ours: Any) -> None:
    """First and second derivatives with weights and smoothing; one graph, with metrics, too."""
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    options: dict[str, Any] = {"sample_weights": weights, "label_smoothing": 0.2}
    inputs = [t.requires_grad_() for t in (randn(4, 4), randn(4, 4, seed=1))]
    assert torch.autograd.gradcheck(lambda *t: ours(*t, **options), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: ours(*t, **options), inputs)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    there, here = (f(*inputs, return_metrics=True, **options) for f in (compiled, ours))
    torch.testing.assert_close(there[0], here[0], rtol=1e-12, atol=0)
    assert torch.equal(there[1].rank, here[1].rank)
    slopes = [torch.autograd.grad(found[0], inputs) for found in (there, here)]
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": torch.ones(4).long()}, r"ids of image has shape \[4\] but image has"),
        ({"ids": IDS, "label_smoothing": 0.1}, "label_smoothing is 0.1 but ids leave columns out"),
        ({"false_negatives": IDS}, r"false_negatives has shape \[5\] and dtype torch.int64; it"),
        ({"false_negatives": torch.ones(4, 5).bool()}, r"\[2, E\] integers or \[5, 5\] bool"),
        ({"false_negatives": torch.ones(5, 5)}, "false_negatives has dtype torch.float32; it must"),
        ({"false_negatives": [1]}, "false_negatives is a list; it must be a tensor"),
        (
            {"sample_weights": torch.ones(2, 5)},
            r"sample_weights has shape \[2, 5\] on cpu; it must",
        ),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    """One line: the argument, what was given, what is allowed."""
    with pytest.raises((TypeError, ValueError), match=message):
        fused_clip(randn(5, 4), randn(5, 4, seed=1), **options)
