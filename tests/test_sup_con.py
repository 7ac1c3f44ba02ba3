"""`fused_sup_con` and `SupCon` against each definition over the whole matrix, in float64."""

import math
from typing import Any, NamedTuple, get_args

import pytest
import torch
import torch.nn.functional as F
from agreement import agree, no_worse_than_plain, weighted
from embeddings import leaf, randn
from equations import relative_error
from torch import Tensor, nn

from hdc_kernels.checks import FLOATING, Backend, Reduction
from hdc_kernels.info_nce import fused_info_nce
from hdc_kernels.sup_con import Definition, SupCon, WithoutPositive, fused_sup_con

BACKENDS = [b for b in get_args(Backend) if b not in ("triton", "cuda")]
DEFINITIONS = get_args(Definition)
REDUCTIONS = get_args(Reduction)
HALF = (torch.bfloat16, torch.float16)


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Random labels from 0 to below `high`."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def scalar(value: float) -> Tensor:
    """A learnable number."""
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def plain(
    x: Tensor,
    y: Tensor,
    tau: Any,
    positive: Tensor,
    holds_self: bool,
    definition: Definition,
    *,
    normalize: bool = True,
) -> Tensor:
    """Every anchor's term, as the definitions are written; positive [M, N] bool."""
    if normalize:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    logits = x @ y.mT / tau
    own = torch.eye(*logits.shape, dtype=torch.bool) & holds_self
    everything = logits.masked_fill(own, -torch.inf).logsumexp(-1, keepdim=True)
    counts = positive.sum(-1)
    if definition == "out":
        terms = torch.where(positive, everything - logits, 0.0).sum(-1) / counts.clamp_min(1)
    elif definition == "in":
        together = logits.masked_fill(~positive, -torch.inf)
        together = torch.where(counts[:, None] > 0, together, 0.0).logsumexp(-1)
        terms = everything[:, 0] - together
    else:
        negative = logits.masked_fill(positive | own, -torch.inf)
        pairs = torch.stack((logits, negative.logsumexp(-1, keepdim=True).expand_as(logits)))
        terms = torch.where(positive, pairs.logsumexp(0) - logits, 0.0).sum(-1)
    return torch.where(counts > 0, terms, 0.0)


def reduce(terms: Tensor, positive: Tensor, definition: Definition, reduction: Reduction) -> Tensor:
    """By default only anchors with a positive count, or for "each" pairs."""
    if reduction == "none":
        return terms
    counts = positive.sum(-1)
    divisor = counts.sum() if definition == "each" else (counts > 0).sum()
    return terms.sum() / (divisor if reduction == "mean" else 1)


class Case(NamedTuple):
    """Anchors, what they are compared with, and which of that are positives."""

    x: Tensor
    y: Tensor
    positive: Tensor
    arguments: dict[str, Any]
    holds_self: bool


def case(others: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    """10 anchors, the first without a positive, against themselves, 4 or 17 others, or a memory of 17."""
    x, labels = leaf(10, 6, seed=seed, dtype=dtype), randint(4, 10, seed=seed)
    labels[0] = 77
    if others == "themselves":
        positive = (labels[:, None] == labels) & ~torch.eye(10, dtype=torch.bool)
        return Case(x, x, positive, {"labels": labels}, True)
    size, holds_self = {"fewer": (4, False), "more": (17, False), "memory": (17, True)}[others]
    y, y_labels = leaf(size, 6, seed=seed + 100, dtype=dtype), randint(4, size, seed=seed + 100)
    if holds_self:
        with torch.no_grad():
            y[:10] = x
        y_labels[:10] = labels
    positive = labels[:, None] == y_labels
    if holds_self:
        positive &= ~torch.eye(*positive.shape, dtype=torch.bool)
    arguments = {
        "labels": labels,
        "other": y,
        "other_labels": y_labels,
        "other_holds_self": holds_self,
    }
    return Case(x, y, positive, arguments, holds_self)


def listed(given: Case, seed: int = 0) -> dict[str, Any]:
    """The same positives as a list in random order, instead of labels."""
    arguments = {k: v for k, v in given.arguments.items() if not k.endswith("labels")}
    pairs = given.positive.nonzero().mT
    order = torch.randperm(pairs.shape[1], generator=torch.Generator().manual_seed(seed))
    return {**arguments, "positives": pairs[:, order]}


def inputs_of(given: Case) -> tuple[Tensor, ...]:
    """What has a gradient, once."""
    return (given.x,) if given.y is given.x else (given.x, given.y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("others", ["themselves", "fewer", "more", "memory"])
@pytest.mark.parametrize("how", ["labels", "list"])
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_loss_and_gradients_are_the_definitions(
    definition: Definition, how: str, others: str, backend: Backend
) -> None:
    """For every reduction, normalised or not: 1e-12 is 5,000 roundings."""
    for seed, reduction in enumerate(REDUCTIONS):
        given = case(others, seed)
        normalize, tau = seed != 1, scalar((0.1, 2.0, 0.5)[seed])
        loss = fused_sup_con(
            given.x,
            **(given.arguments if how == "labels" else listed(given)),
            temperature=tau,
            definition=definition,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
        )
        terms = plain(
            given.x, given.y, tau, given.positive, given.holds_self, definition, normalize=normalize
        )
        expected = reduce(terms, given.positive, definition, reduction)
        assert loss.dtype == torch.float64
        assert relative_error(loss, expected) < 1e-12
        inputs = (*inputs_of(given), tau)
        upstream = leaf(10, seed=seed + 20).detach() if reduction == "none" else None
        found = torch.autograd.grad(loss, inputs, upstream)
        exact = torch.autograd.grad(expected, inputs, upstream)
        for ours, truth in zip(found, exact, strict=True):
            assert relative_error(ours, truth) < 1e-12


@pytest.mark.parametrize("how", ["labels", "list"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("definition", "without_positive"),
    [("out", "exclude"), ("out", "zero"), ("in", "exclude"), ("each", "exclude")],
)
def test_sample_weights(
    definition: Definition, without_positive: WithoutPositive, reduction: Reduction, how: str
) -> None:
    """Of anchors, as often as each counts; they get their gradient."""
    given = case("more", 3)
    arguments = given.arguments if how == "labels" else listed(given)
    del arguments["other"]
    counts = given.positive.sum(-1)
    if definition != "each":
        counts = (counts > 0).long() if without_positive == "exclude" else torch.ones_like(counts)

    def ours(x: Tensor, y: Tensor, tau: Tensor, weights: Tensor) -> Tensor:
        return fused_sup_con(
            x,
            other=y,
            temperature=tau,
            definition=definition,
            without_positive=without_positive,
            sample_weights=weights,
            reduction=reduction,
            **arguments,
        )

    def exact(x: Tensor, y: Tensor, tau: Tensor, weights: Tensor) -> Tensor:
        terms = plain(x, y, tau, given.positive, given.holds_self, definition)
        return weighted(terms, weights, reduction, counts)

    agree(ours, exact, given.x, given.y, scalar(0.3), randn(10, seed=2).exp())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_positives_that_no_labels_describe(definition: Definition, backend: Backend) -> None:
    """Neither symmetric nor transitive, one anchor with every other as its positive, in either index dtype."""
    x, tau = leaf(9, 5), scalar(0.3)
    positive = (randint(3, 9, 9) == 0) & ~torch.eye(9, dtype=torch.bool)
    positive[2], positive[5] = torch.arange(9) != 2, False
    for dtype in (torch.int64, torch.int32):
        loss = fused_sup_con(
            x,
            positives=positive.nonzero().mT.to(dtype),
            temperature=tau,
            definition=definition,
            backend=backend,
        )
        expected = plain(x, x, tau, positive, True, definition)
        expected = reduce(expected, positive, definition, "mean")
        assert relative_error(loss, expected) < 1e-12
        found = torch.autograd.grad(loss, (x, tau))
        for ours, truth in zip(found, torch.autograd.grad(expected, (x, tau)), strict=True):
            assert relative_error(ours, truth) < 1e-12


@pytest.mark.parametrize("others", ["themselves", "fewer", "memory"])
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_positives_as_a_matrix(definition: Definition, others: str) -> None:
    """The same as its list; an anchor's entry with itself does not count."""
    given = case(others)
    arguments = {k: v for k, v in given.arguments.items() if not k.endswith("labels")}
    matrix = given.positive | (torch.eye(*given.positive.shape) > 0 if given.holds_self else False)
    found = fused_sup_con(given.x, definition=definition, positives=matrix, **arguments)
    assert torch.equal(found, fused_sup_con(given.x, definition=definition, **listed(given)))


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_two_views_are_info_nce(definition: Definition) -> None:
    """With one positive each, all definitions agree."""
    x, y = leaf(7, 5), leaf(7, 5, seed=1)
    ids = torch.arange(7)
    loss = fused_sup_con(x, ids, temperature=0.2, definition=definition, other=y, other_labels=ids)
    assert relative_error(loss, fused_info_nce(x, y, temperature=0.2)) < 1e-12


@pytest.mark.parametrize("how", ["labels", "list"])
@pytest.mark.parametrize("definition", ["out", "in"])
def test_anchors_without_a_positive(definition: Definition, how: str) -> None:
    """Left out of the mean, or counted as 0; for "each" they have no pairs."""
    given = case("themselves")
    arguments = given.arguments if how == "labels" else listed(given)
    terms = fused_sup_con(given.x, **arguments, definition=definition, reduction="none")
    assert terms[0] == 0
    total = terms.sum()
    some = int((given.positive.sum(-1) > 0).sum())
    assert some < 10
    for rule, divisor in (("exclude", some), ("zero", 10)):
        mean = fused_sup_con(given.x, **arguments, definition=definition, without_positive=rule)
        assert mean.item() == pytest.approx(total.item() / divisor, rel=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["labels", "list"])
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_nothing_to_pull_or_nothing_to_push(
    definition: Definition, how: str, backend: Backend
) -> None:
    """No positives at all, one anchor, or no negatives: never NaN, and 0 unless positives compete."""
    none = torch.empty(2, 0, dtype=torch.long)
    every = (~torch.eye(4, dtype=torch.bool)).nonzero().mT
    for size, labels, pairs in ((4, range(4), none), (1, range(1), none), (4, [5] * 4, every)):
        x, tau = leaf(size, 3), scalar(0.1)
        arguments = {"labels": torch.tensor(labels)} if how == "labels" else {"positives": pairs}
        loss = fused_sup_con(
            x, **arguments, temperature=tau, definition=definition, backend=backend
        )
        weights = torch.full((size,), 0.1, dtype=torch.float64)
        same = fused_sup_con(
            x, **arguments, temperature=tau, definition=definition, sample_weights=weights
        )
        assert same.item() == pytest.approx(loss.item(), rel=1e-12)
        gradients = torch.autograd.grad(loss, (x, tau))
        if pairs is every and definition == "out":
            positive = ~torch.eye(4, dtype=torch.bool)
            expected = plain(x, x, tau, positive, True, "out").mean()
            assert relative_error(loss, expected) < 1e-12
            exact = torch.autograd.grad(expected, (x, tau))
            for ours, truth in zip(gradients, exact, strict=True):
                assert relative_error(ours, truth) < 1e-12
        else:
            assert loss.item() == 0
            assert all(g.count_nonzero() == 0 for g in gradients)


@pytest.mark.parametrize("how", ["labels", "list"])
@pytest.mark.parametrize("definition", ["in", "each"])
def test_exact_near_convergence(definition: Definition, how: str) -> None:
    """In float32, a loss of 1e-30 keeps its digits: no difference of two large logarithms is taken."""
    classes = torch.tensor([0, 0, 0, 1, 1, 1])
    x = F.one_hot(classes, 2).float() * 2 - 1  # cosines 1 and −1
    positive = (classes[:, None] == classes) & ~torch.eye(6, dtype=torch.bool)
    arguments = {"labels": classes} if how == "labels" else {"positives": positive.nonzero().mT}
    loss = fused_sup_con(x, **arguments, temperature=0.03, definition=definition)
    exact = math.exp(-2 / 0.03) * (3 / 2 if definition == "in" else 3)
    assert loss.item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
)
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    """Only whether they are equal matters."""
    x, labels = leaf(8, 4), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    loss = fused_sup_con(x, labels.to(dtype))
    assert torch.equal(loss, fused_sup_con(x, labels * -(2**40) + 3))


@pytest.mark.parametrize("how", ["labels", "list"])
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_gradcheck(definition: Definition, how: str) -> None:
    """First and second derivatives for embeddings, others, temperature and weights."""
    labels, other_labels = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1, 2])
    pairs = (labels[:, None] == other_labels).nonzero().mT
    chosen = (
        {"labels": labels, "other_labels": other_labels}
        if how == "labels"
        else {"positives": pairs}
    )

    def loss(x: Tensor, y: Tensor, tau: Tensor, weights: Tensor) -> Tensor:
        options = {"definition": definition, "sample_weights": weights}
        return fused_sup_con(x, other=y, temperature=tau, **options, **chosen)

    inputs = (leaf(3, 3), leaf(4, 3, seed=1), scalar(0.5), randn(3, seed=2).exp().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("how", ["labels", "list"])
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_compiled_equals_eager(definition: Definition, how: str) -> None:
    """One graph, without a break, forward and backward; into C++ once, which takes long."""
    torch.compiler.reset()
    given, tau = case("themselves"), scalar(0.2)
    arguments = given.arguments if how == "labels" else listed(given)
    arguments["sample_weights"] = randn(10, seed=2).exp()

    def loss(x: Tensor, tau: Tensor) -> Tensor:
        return fused_sup_con(x, temperature=tau, definition=definition, **arguments)

    compiler = "inductor" if (definition, how) == ("each", "list") else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    losses = [f(given.x, tau) for f in (compiled, loss)]
    assert relative_error(losses[0], losses[1]) < 1e-13
    ours, exact = (torch.autograd.grad(value, (given.x, tau)) for value in losses)
    for a, b in zip(ours, exact, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("tau", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("how", ["labels", "list"])
@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_no_worse_than_plain(
    dtype: torch.dtype, definition: Definition, how: str, tau: float
) -> None:
    """Error against float64 on the same numbers, loss and gradients, at most twice the plain loss's.

    A NaN, as of an overflow at τ = 0.01, fails every comparison.
    """
    given = case("themselves", seed=3, dtype=dtype)
    exact = given.x.detach().double().requires_grad_()
    arguments = given.arguments if how == "labels" else listed(given)
    options = (tau, given.positive, True, definition)
    truth, theirs = (
        reduce(plain(x, x, *options), given.positive, definition, "mean") for x in (exact, given.x)
    )
    ours = fused_sup_con(given.x, **arguments, temperature=tau, definition=definition)
    assert ours.dtype == torch.float32
    assert abs(ours - truth) <= 2 * abs(theirs - truth)
    (slope,) = torch.autograd.grad(truth, exact)
    (our,), (their,) = (torch.autograd.grad(loss, given.x) for loss in (ours, theirs))
    assert our.dtype == dtype
    assert (our - slope).norm() <= 2 * (their - slope).norm()


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_with_weights_is_no_worse_than_plain(
    dtype: torch.dtype, definition: Definition
) -> None:
    """Of anchors."""
    given, weights = case("themselves", seed=3, dtype=dtype), randn(10, seed=2).exp().float()
    counts = given.positive.sum(-1)
    counts = counts if definition == "each" else counts > 0
    options: dict[str, Any] = {"definition": definition, "sample_weights": weights}
    no_worse_than_plain(
        lambda x: fused_sup_con(x, **given.arguments, **options),
        lambda x: weighted(
            plain(x, x, 0.07, given.positive, True, definition), weights, "mean", counts
        ),
        given.x,
    )


@pytest.mark.parametrize("how", ["labels", "list"])
@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_zero_vectors(dtype: torch.dtype, definition: Definition, how: str) -> None:
    """Cosine 0 with everything, gradient exactly 0."""
    given = case("themselves", dtype=dtype)
    with torch.no_grad():
        given.x[3] = 0
    arguments = given.arguments if how == "labels" else listed(given)
    loss = fused_sup_con(given.x, **arguments, definition=definition)
    (gradient,) = torch.autograd.grad(loss, given.x)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient[3].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["labels", "list"])
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_nan_is_not_hidden(definition: Definition, how: str, backend: Backend) -> None:
    """Any embedding is somebody's column."""
    given = case("themselves")
    spoilt = given.x.detach().clone()
    spoilt[0, 1] = math.nan
    arguments = given.arguments if how == "labels" else listed(given)
    assert fused_sup_con(spoilt, **arguments, definition=definition, backend=backend).isnan()


def test_autocast_changes_nothing() -> None:
    """The logits need all 24 bits, whatever the encoder runs in."""
    given = case("themselves", dtype=torch.float32)
    for definition in DEFINITIONS:
        for arguments in (given.arguments, listed(given)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = fused_sup_con(given.x, **arguments, definition=definition)
            assert torch.equal(inside, fused_sup_con(given.x, **arguments, definition=definition))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5, "definition": "in"},
        {"without_positive": "zero"},
        {"definition": "each", "reduction": "none"},
        {"normalize": False, "backend": "torch"},
    ],
)
def test_module_equals_function(options: dict[str, Any]) -> None:
    """Every option reaches the function, and shows in the module's text."""
    for others in ("themselves", "memory"):
        given = case(others)
        module = SupCon(**options)
        for arguments in (given.arguments, listed(given)):
            expected = fused_sup_con(given.x, **arguments, **options)
            assert torch.equal(module(given.x, **arguments), expected)
            arguments["sample_weights"] = randn(10, seed=2).exp()
            expected = fused_sup_con(given.x, **arguments, **options)
            assert torch.equal(module(given.x, **arguments), expected)
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(module)
    assert list(SupCon(nn.Parameter(torch.tensor(0.2))).state_dict()) == ["temperature"]
