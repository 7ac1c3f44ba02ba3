"""InfoNCE, forward and backward: what everyone writes beside `fused_info_nce`, at three batch sizes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from hdc_kernels import fused_info_nce

WIDTH = 128
TAU = 0.07


def naive_info_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Normalise, multiply, cross entropy: one B × B matrix after the other."""
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT / temperature
    return F.cross_entropy(logits, torch.arange(len(query)))


def fused(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """The same by this package."""
    return fused_info_nce(query, key, temperature=temperature)


@pytest.mark.parametrize("batch", [128, 512, 2048])
@pytest.mark.parametrize("loss", [naive_info_nce, fused], ids=["naive", "fused"])
def test_info_nce(
    benchmark: BenchmarkFixture, loss: Callable[[Tensor, Tensor, float], Tensor], batch: int
) -> None:
    benchmark.group = f"InfoNCE forward + backward, B = {batch}, D = {WIDTH}"
    torch.manual_seed(0)
    views = [torch.randn(batch, WIDTH, requires_grad=True) for _ in range(2)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*views, TAU), views)

    expected = torch.autograd.grad(naive_info_nce(*views, TAU), views)
    torch.testing.assert_close(benchmark(step), expected)
