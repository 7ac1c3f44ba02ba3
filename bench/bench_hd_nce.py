"""HD-NCE, forward and backward, for the paper's batch: two naive forms beside `fused_hd_nce`.

128 clips in three scales of 8, 4 and 2 timesteps make 14 Spatial and 3 Temporal Contrast problems. The naive
forms go through them in a loop, or compute all of them in one batched product.
"""

from collections.abc import Callable, Sequence

import naive
import pytest
import torch
from naive import Pair
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from hdc_kernels import fused_hd_nce

BATCH, WIDTH, STEPS = 128, 128, (8, 4, 2)
WEIGHTS = (0.25, 0.5, 1.0)
TAU = 0.07

HDNCE = Callable[[Sequence[Pair], Sequence[Pair], Sequence[float], float], Tensor]


def fused(
    spatial: Sequence[Pair], temporal: Sequence[Pair], weights: Sequence[float], temperature: float
) -> Tensor:
    """The same by this package."""
    return fused_hd_nce(spatial, temporal, alpha=weights, beta=weights, temperature=temperature)


@pytest.mark.parametrize(
    "loss",
    [naive.hd_nce_loop, naive.hd_nce_bmm, fused],
    ids=["naive, loop", "naive, bmm", "fused"],
)
def test_hd_nce(benchmark: BenchmarkFixture, loss: HDNCE) -> None:
    benchmark.group = f"HD-NCE forward + backward, B = {BATCH}, D = {WIDTH}, N = {STEPS}"
    torch.manual_seed(0)
    shapes = [(BATCH, steps, WIDTH) for steps in STEPS] + [(BATCH, WIDTH) for _ in STEPS]
    pairs = [
        (torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True))
        for shape in shapes
    ]
    views = [view for pair in pairs for view in pair]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(pairs[:3], pairs[3:], WEIGHTS, TAU), views)

    expected = torch.autograd.grad(naive.hd_nce_loop(pairs[:3], pairs[3:], WEIGHTS, TAU), views)
    torch.testing.assert_close(benchmark(step), expected)
