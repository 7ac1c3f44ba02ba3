"""InfoNCE, forward and backward: what everyone writes beside `fused_info_nce`, at three batch sizes."""

from collections.abc import Callable

import naive
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from hdc_kernels import fused_info_nce

WIDTH = 128
TAU = 0.07


def fused(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """The same by this package."""
    return fused_info_nce(query, key, temperature=temperature)


@pytest.mark.parametrize("batch", [128, 512, 2048])
@pytest.mark.parametrize("loss", [naive.info_nce, fused], ids=["naive", "fused"])
def test_info_nce(
    benchmark: BenchmarkFixture, loss: Callable[[Tensor, Tensor, float], Tensor], batch: int
) -> None:
    benchmark.group = f"InfoNCE forward + backward, B = {batch}, D = {WIDTH}"
    torch.manual_seed(0)
    query, key = views = [torch.randn(batch, WIDTH, requires_grad=True) for _ in range(2)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(query, key, TAU), views)

    expected = torch.autograd.grad(naive.info_nce(query, key, TAU), views)
    torch.testing.assert_close(benchmark(step), expected)
