"""Tracers and fake tensors see operators: no kernel reads memory that is not there."""

from typing import Any

import pytest
import torch
from embeddings import randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hdc_kernels import fused_hd_nce, fused_info_nce, fused_siglip


def hd_nce(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    spatial, temporal = [(x.unsqueeze(1), y.unsqueeze(1))], [(x, y)]
    return fused_hd_nce(spatial, temporal, alpha=[0.5], beta=[1.0], **options)


@pytest.fixture(params=[fused_info_nce, hd_nce, fused_siglip])
def loss(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fake_tensors(loss: Any, reduction: str) -> None:
    with FakeTensorMode():
        x, y = (randn(6, 4, seed=s).requires_grad_() for s in (0, 1))
        value = loss(x, y, reduction=reduction)
        slopes = torch.autograd.grad(value.sum(), (x, y))
        metric = loss(x.detach(), y.detach(), reduction=reduction)
    for found in (value, metric):
        assert found.dtype == torch.float64
        assert list(found.shape) == ([6] if reduction == "none" else [])
    assert [list(g.shape) for g in slopes] == [[6, 4], [6, 4]]


def test_a_fake_tensor_outside_of_its_mode() -> None:
    mode = FakeTensorMode()
    x, y = (mode.from_tensor(randn(6, 4, seed=s)) for s in (0, 1))
    assert list(fused_info_nce(x, y).shape) == []


def test_a_traced_graph_computes_the_loss_of_other_inputs(loss: Any) -> None:
    def step(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        value = loss(x, y)
        return value.detach(), *torch.autograd.grad(value, (x, y))

    graph = make_fx(step)(randn(6, 4), randn(6, 4, seed=1))
    others = randn(6, 4, seed=2), randn(6, 4, seed=3)
    for found, expected in zip(graph(*others), step(*others), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_subclasses_and_parameters(loss: Any) -> None:
    class Marked(Tensor):
        pass

    x, y = randn(6, 4), randn(6, 4, seed=1)
    expected = loss(x, y)
    for given in (x.as_subclass(Marked), torch.nn.Parameter(x)):
        torch.testing.assert_close(
            loss(given, y).detach().as_subclass(Tensor), expected, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_views_of_the_negative(loss: Any, reduction: str) -> None:
    """The imaginary part of a conjugate: PyTorch stores what it is the negative of."""
    z = torch.complex(randn(6, 4), randn(6, 4, seed=1)).requires_grad_()
    y = randn(6, 4, seed=2)
    assert z.conj().imag.is_neg()
    found, expected = (
        loss(z.conj().imag, y, reduction=reduction, backend=backend) for backend in ("cpu", "torch")
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(value.sum(), z)[0] for value in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-12)
