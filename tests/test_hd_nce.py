"""`fused_hd_nce` and `HDNCE` against the paper's Eq. 4 to 6 in plain Python, in every backend."""

import math
from typing import Any, get_args

import equations
import pytest
import torch
import torch.nn.functional as F
from agreement import agree, no_worse_than_plain, weighted
from embeddings import randn
from hd_nce_scales import ALPHA, BETA, leaves, lists, pair, scales
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hdc_kernels import HDNCE, fused_hd_nce, fused_info_nce
from hdc_kernels.checks import FLOATING, Backend, Reduction
from hdc_kernels.hd_nce import Pair

BACKENDS = [b for b in get_args(Backend) if b not in ("triton", "cuda")]  # GPUs': elsewhere
REDUCTIONS = get_args(Reduction)
HALF = (torch.bfloat16, torch.float16)


def cross_entropy(query: Tensor, key: Tensor, tau: float, **options: Any) -> Tensor:
    """What everyone writes: in half precision, the error that ours is measured by."""
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT / tau
    return F.cross_entropy(logits, torch.arange(len(query)), **options)


def plain(spatial: list[Pair], temporal: list[Pair], tau: float) -> Tensor:
    """Eq. 6 of these."""
    loss = torch.zeros(())
    for k, (v_o, v_s) in enumerate(spatial):
        steps = v_o.shape[1]
        loss = (
            loss
            + ALPHA[k] * sum(cross_entropy(v_o[:, n], v_s[:, n], tau) for n in range(steps)) / steps
        )
    for k, views in enumerate(temporal):
        loss = loss + BETA[k] * cross_entropy(*views, tau)
    return loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_and_gradients_are_eq_6(reduction: Reduction, backend: Backend) -> None:
    """ "sum" is Eq. 6, "mean" divides it by B, "none" keeps the clips; 1e-10 is 1e5 roundings."""
    spatial, temporal = scales(6)
    tau = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    loss = fused_hd_nce(
        spatial,
        temporal,
        alpha=ALPHA,
        beta=BETA,
        temperature=tau,
        reduction=reduction,
        backend=backend,
    )
    inputs = (lists(spatial), lists(temporal), ALPHA, BETA, 0.07)
    terms = equations.hd_nce(*inputs)
    share = 1 / 6 if reduction == "mean" else 1.0
    expected = terms if reduction == "none" else share * math.fsum(terms)
    assert loss.dtype == torch.float64
    assert equations.relative_error(loss, expected) < 1e-12

    weights = [0.5, -2.0, 1.0, 0.0, 3.0, -0.1] if reduction == "none" else [share] * 6
    upstream = torch.tensor(weights, dtype=torch.float64) if reduction == "none" else None
    *found, d_tau = torch.autograd.grad(loss, [*leaves(spatial, temporal), tau], upstream)
    exact, exact_tau = equations.hd_nce_gradient(*inputs, weights)
    assert d_tau.item() == pytest.approx(exact_tau, rel=1e-10)
    for k, (ours, gradient) in enumerate(zip(found, exact, strict=True)):
        if k in (8, 9):  # β = 0
            assert ours.count_nonzero() == 0
        else:
            assert equations.relative_error(ours, gradient) < 1e-10


def terms_of(v_o: Tensor, v_s: Tensor, w_o: Tensor, w_t: Tensor, tau: float) -> Tensor:
    """Each clip's share of one scale of either kind, weighed 0.5 and 2."""
    timesteps = zip(v_o.unbind(1), v_s.unbind(1), strict=True)
    spatial = [cross_entropy(x, y, tau, reduction="none") for x, y in timesteps]
    return torch.stack(spatial).mean(0) / 2 + 2 * cross_entropy(w_o, w_t, tau, reduction="none")


def of_weights(weights: Tensor, reduction: Reduction, tau: float) -> Any:
    """The loss of what `terms_of` takes."""
    return lambda v_o, v_s, w_o, w_t: fused_hd_nce(
        [(v_o, v_s)],
        [(w_o, w_t)],
        alpha=[0.5],
        beta=[2.0],
        temperature=tau,
        sample_weights=weights,
        reduction=reduction,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sample_weights(reduction: Reduction) -> None:
    """Of clips; the weights get their gradient."""
    agree(
        lambda weights, *views: of_weights(weights, reduction, 0.3)(*views),
        lambda weights, *views: weighted(terms_of(*views, 0.3), weights, reduction),
        randn(5, seed=2).exp(),
        *(randn(5, 3, 4), randn(5, 3, 4, seed=1), randn(5, 4, seed=2), randn(5, 4, seed=3)),
    )


def test_gradcheck_and_compiled_with_weights() -> None:
    """First and second derivatives; one graph."""
    loss = of_weights(randn(3, seed=2).exp(), "mean", 0.5)
    inputs = (*pair(3, 2, 2), *pair(3, 2, seed=1))
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)
    torch.compiler.reset()
    agree(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, *inputs)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_with_weights_is_no_worse_than_plain(dtype: torch.dtype) -> None:
    """Of clips."""
    weights = randn(16, seed=2).exp().float()
    shapes = ((16, 4, 32), (16, 4, 32), (16, 32), (16, 32))
    no_worse_than_plain(
        of_weights(weights, "mean", 0.07),
        lambda *views: weighted(terms_of(*views, 0.07), weights, "mean"),
        *(randn(*shape, seed=k, dtype=dtype) for k, shape in enumerate(shapes)),
    )


def test_spatial_contrast_is_the_mean_over_timesteps() -> None:
    """Eq. 4 alone: N timesteps count as much as one."""
    v_o, v_s = pair(5, 4, 3)
    loss = fused_hd_nce([(v_o, v_s)], [], alpha=[1.0], beta=[], reduction="none")
    expected = equations.spatial_contrast(v_o.tolist(), v_s.tolist(), 0.07)
    assert equations.relative_error(loss, expected) < 1e-12
    repeated = (v_o.repeat(1, 2, 1), v_s.repeat(1, 2, 1))
    again = fused_hd_nce([repeated], [], alpha=[1.0], beta=[], reduction="none")
    torch.testing.assert_close(loss, again, rtol=1e-13, atol=0)


def test_temporal_contrast_is_info_nce() -> None:
    """Eq. 5 alone, with and without normalisation."""
    views = pair(5, 3)
    for normalize in (True, False):
        loss = fused_hd_nce([], [views], alpha=[], beta=[2.0], normalize=normalize)
        expected = equations.info_nce(*lists([views])[0], 0.07, normalize)
        assert loss.item() == pytest.approx(2 * math.fsum(expected) / 5, rel=1e-12)


def test_queries_never_meet_other_timesteps() -> None:
    """Swapping two timesteps in both views changes nothing, in one view it does."""
    v_o, v_s = pair(5, 2, 3)
    loss = fused_hd_nce([(v_o, v_s)], [], alpha=[1.0], beta=[])
    both = fused_hd_nce([(v_o.flip(1), v_s.flip(1))], [], alpha=[1.0], beta=[])
    one = fused_hd_nce([(v_o, v_s.flip(1))], [], alpha=[1.0], beta=[])
    assert loss.item() == pytest.approx(both.item(), rel=1e-13)
    assert loss.item() != pytest.approx(one.item(), rel=1e-3)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(reduction: Reduction) -> None:
    """First and second derivatives for every view and the temperature."""
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(v_o: Tensor, v_s: Tensor, w_o: Tensor, w_t: Tensor, tau: Tensor) -> Tensor:
        return fused_hd_nce(
            [(v_o, v_s)],
            [(w_o, w_t)],
            alpha=[0.5],
            beta=[2.0],
            temperature=tau,
            reduction=reduction,
        )

    inputs = (*pair(3, 2, 2), *pair(3, 2, seed=1), tau)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 6),
    steps=st.lists(st.integers(1, 3), max_size=3),
    width=st.integers(1, 6),
    temporal_scales=st.integers(0, 3),
    tau=st.sampled_from([1e-3, 0.01, 0.07, 1.0, 10.0]) | st.floats(1e-3, 10.0),
    dtype=st.sampled_from(FLOATING),
    pooled=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_any_scales_layout_and_temperature(
    batch: int,
    steps: list[int],
    width: int,
    temporal_scales: int,
    tau: float,
    dtype: torch.dtype,
    pooled: bool,
    reduction: Reduction,
    backend: Backend,
    seed: int,
) -> None:
    """Against Eq. 6, within the bounds that tests/test_info_nce.py derives, times the largest weight.

    `pooled` is the layout of the encoder: a [B, D, N] map, seen as [B, N, D], with NaN beside it.
    """
    if not steps and not temporal_scales:
        steps = [1]

    def views(*shape: int) -> Pair:
        nonlocal seed
        seed += 1
        pair_of_views = []
        for x in pair(*shape, seed=seed):
            x = x.detach() * (1.01 / x.detach().norm(dim=-1, keepdim=True)).clamp_min(1)
            x = x.to(dtype)
            if pooled:
                x = F.pad(x.mT.contiguous(), (1, 1), value=math.nan)[..., 1:-1].mT
            pair_of_views.append(x.requires_grad_())
        return pair_of_views[0], pair_of_views[1]

    spatial = [views(batch, n, width) for n in steps]
    temporal = [views(batch, width) for _ in range(temporal_scales)]
    alpha, beta = ALPHA[: len(spatial)], BETA[: len(temporal)]
    loss = fused_hd_nce(
        spatial,
        temporal,
        alpha=alpha,
        beta=beta,
        temperature=tau,
        reduction=reduction,
        backend=backend,
    )
    found = torch.autograd.grad(loss.sum(), leaves(spatial, temporal))

    share = 1 / batch if reduction == "mean" else 1.0
    inputs = (lists(spatial), lists(temporal), alpha, beta, tau)
    terms = torch.tensor(equations.hd_nce(*inputs), dtype=torch.float64)
    exact, _ = equations.hd_nce_gradient(*inputs, [share] * batch)
    u = torch.finfo(loss.dtype).eps
    total = sum(alpha) + sum(beta)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        loss.double(),
        terms if reduction == "none" else terms.sum() * share,
        rtol=8 * u,
        atol=8 * (width + batch + 2) * u * max(1, 1 / tau) * total * batch * share,
    )
    for ours, gradient in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(),
            torch.tensor(gradient, dtype=torch.float64),
            rtol=torch.finfo(dtype).eps,
            atol=16 * (width + batch) * u / tau * max(1, 1 / tau) * max(*alpha, *beta, 1.0),
        )


@pytest.mark.parametrize("dtype", FLOATING)
def test_a_batch_of_one_has_nothing_to_learn(dtype: torch.dtype) -> None:
    """No negatives: loss 0, gradient 0, and the positive comes first."""
    spatial, temporal = scales(1, dtype)
    loss, metrics = fused_hd_nce(spatial, temporal, alpha=ALPHA, beta=BETA, return_metrics=True)
    assert loss.item() == 0.0
    assert metrics.spatial_accuracy.tolist() == [1.0, 1.0, 1.0]
    assert metrics.temporal_accuracy.tolist() == [1.0, 1.0, 1.0]
    for gradient in torch.autograd.grad(loss, leaves(spatial, temporal)):
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_zero_vectors(dtype: torch.dtype, backend: Backend) -> None:
    """A dead timestep has cosine 0 with everything and gradient exactly 0; no NaN anywhere."""
    spatial, temporal = scales(4, dtype)
    with torch.no_grad():
        spatial[0][0][1, 2] = 0
        temporal[0][1][3] = 0
    loss = fused_hd_nce(spatial, temporal, alpha=ALPHA, beta=BETA, backend=backend)
    terms = equations.hd_nce(lists(spatial), lists(temporal), ALPHA, BETA, 0.07)
    assert loss.item() == pytest.approx(math.fsum(terms) / 4, rel=100 * torch.finfo(loss.dtype).eps)
    gradients = torch.autograd.grad(loss, leaves(spatial, temporal))
    assert gradients[0].count_nonzero(-1).ne(0).sum() == 4 * 4 - 1
    assert gradients[0][1, 2].count_nonzero() == 0
    assert gradients[7].count_nonzero(-1).ne(0).tolist() == [True, True, True, False]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", FLOATING)
def test_nan_is_not_hidden(dtype: torch.dtype) -> None:
    """One NaN in one timestep of one view spoils the loss, and no accuracy is made up from it."""
    spatial, temporal = scales(3, dtype)
    with torch.no_grad():
        spatial[1][1][2, 0, 0] = math.nan
    loss, metrics = fused_hd_nce(spatial, temporal, alpha=ALPHA, beta=BETA, return_metrics=True)
    assert loss.isnan()
    assert metrics.spatial_loss.isnan().tolist() == [False, True, False]
    other_step = equations.top1(*(v[:, 1].tolist() for v in spatial[1]))
    assert metrics.spatial_accuracy[1].item() == pytest.approx(sum(other_step) / 6)


@pytest.mark.parametrize("tau", [0.01, 0.07])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_no_worse_than_plain(dtype: torch.dtype, tau: float) -> None:
    """Error against float64 on the same numbers, loss and gradients, at most twice the plain loss's.

    The plain loss runs in that dtype. A NaN, as of an overflow at τ = 0.01, fails every comparison.
    """
    spatial = [pair(16, 4, 32, seed=0, dtype=dtype), pair(16, 2, 32, seed=1, dtype=dtype)]
    temporal = [pair(16, 32, seed=2, dtype=dtype)]
    exact = [
        [(v.detach().double().requires_grad_(), w.detach().double().requires_grad_()) for v, w in p]
        for p in (spatial, temporal)
    ]
    truth = plain(*exact, tau)
    theirs = plain(spatial, temporal, tau)
    ours = fused_hd_nce(spatial, temporal, alpha=ALPHA[:2], beta=BETA[:1], temperature=tau)
    assert ours.dtype == torch.float32
    assert abs(ours - truth) <= 2 * abs(theirs - truth)
    slopes = torch.autograd.grad(truth, leaves(*exact))
    our_slopes = torch.autograd.grad(ours, leaves(spatial, temporal))
    their_slopes = torch.autograd.grad(theirs, leaves(spatial, temporal))
    for slope, our, their in zip(slopes, our_slopes, their_slopes, strict=True):
        assert our.dtype == dtype
        assert (our - slope).norm() <= 2 * (their - slope).norm()


def test_autocast_changes_nothing() -> None:
    """The logits need all 24 bits, whatever the encoder runs in."""
    spatial, temporal = scales(8, torch.float32)
    outside = fused_hd_nce(spatial, temporal, alpha=ALPHA, beta=BETA)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_hd_nce(spatial, temporal, alpha=ALPHA, beta=BETA)
    assert torch.equal(inside, outside)
    for ours, exact in zip(
        torch.autograd.grad(inside, leaves(spatial, temporal)),
        torch.autograd.grad(outside, leaves(spatial, temporal)),
        strict=True,
    ):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"reduction": "none"}, {"normalize": False}, {"backend": "torch"}],
)
def test_module_equals_function(options: dict[str, Any]) -> None:
    """Every option reaches the function, and shows in the module's text."""
    spatial, temporal = scales(4)
    module = HDNCE(list(ALPHA), list(BETA), **options)
    expected = fused_hd_nce(spatial, temporal, alpha=ALPHA, beta=BETA, **options)
    assert torch.equal(module(spatial, temporal), expected)
    weights = randn(4, seed=9).exp()
    expected = fused_hd_nce(
        spatial, temporal, alpha=ALPHA, beta=BETA, sample_weights=weights, **options
    )
    assert torch.equal(module(spatial, temporal, sample_weights=weights), expected)
    for name, value in {"alpha": ALPHA, "beta": BETA, **options}.items():
        assert f"{name}={value!r}" in repr(module)


def test_default_weights_are_the_papers_second_set() -> None:
    """Section 3.3: α = β = 0.25, 0.5, 1 worked better than all ones, with τ = 0.07."""
    spatial, temporal = scales(4)
    weights = (0.25, 0.5, 1.0)
    terms = equations.hd_nce(lists(spatial), lists(temporal), weights, weights, 0.07)
    loss = HDNCE()(spatial, temporal)
    assert loss.item() == pytest.approx(math.fsum(terms) / 4, rel=1e-12)


def test_module_learns_its_temperature() -> None:
    """A parameter is found by optimizers, moves and is saved with the module, and gets its gradient."""
    module = HDNCE(ALPHA, BETA, nn.Parameter(torch.tensor(0.2)))
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    module.double()
    spatial, temporal = scales(4)
    module(spatial, temporal).backward()
    tau = module.temperature
    assert isinstance(tau, nn.Parameter)
    assert tau.dtype == torch.float64
    assert tau.grad is not None
    inputs = (lists(spatial), lists(temporal), ALPHA, BETA, tau.item())
    _, exact = equations.hd_nce_gradient(*inputs, [0.25] * 4)
    assert tau.grad.item() == pytest.approx(exact, rel=1e-10)

    other = HDNCE(ALPHA, BETA, nn.Parameter(torch.tensor(0.9)))
    other.load_state_dict(module.state_dict())
    terms = equations.hd_nce(*inputs)
    assert other(spatial, temporal).item() == pytest.approx(math.fsum(terms) / 4, rel=1e-12)
    assert module.to("meta").temperature.device.type == "meta"


def test_compiled_equals_eager() -> None:
    """One graph, without a break, metrics included, forward and backward."""
    torch.compiler.reset()
    spatial, temporal = [pair(4, 2, 3)], [pair(4, 3, seed=1)]

    def loss(v_o: Tensor, v_s: Tensor, w_o: Tensor, w_t: Tensor) -> Any:
        return fused_hd_nce(
            [(v_o, v_s)], [(w_o, w_t)], alpha=[0.5], beta=[2.0], return_metrics=True
        )

    views = leaves(spatial, temporal)
    (ours, our_metrics), (exact, metrics) = (
        f(*views) for f in (torch.compile(loss, fullgraph=True), loss)
    )
    assert ours.item() == pytest.approx(exact.item(), rel=1e-13)
    assert all(map(torch.allclose, our_metrics, metrics))
    for found, expected in zip(
        torch.autograd.grad(ours, views), torch.autograd.grad(exact, views), strict=True
    ):
        assert equations.relative_error(found, expected) < 1e-13


def test_one_scale_of_one_timestep_is_info_nce() -> None:
    """The two public functions agree: Eq. 4 with N = 1 is Eq. 1."""
    query, key = pair(5, 3)
    spatial = [(query.unsqueeze(1), key.unsqueeze(1))]
    loss = fused_hd_nce(spatial, [], alpha=[1.0], beta=[], reduction="sum")
    expected = fused_info_nce(query, key, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
