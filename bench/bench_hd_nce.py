"""HD-NCE, forward and backward, for the paper's batch: a loop over its 17 problems beside `fused_hd_nce`.

128 clips in three scales of 8, 4 and 2 timesteps make 14 Spatial and 3 Temporal Contrast problems.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from hdc_kernels import fused_hd_nce

BATCH, WIDTH, STEPS = 128, 128, (8, 4, 2)
WEIGHTS = (0.25, 0.5, 1.0)
TAU = 0.07

Pairs = list[tuple[Tensor, Tensor]]


def naive_hd_nce(spatial: Pairs, temporal: Pairs) -> Tensor:
    """One InfoNCE after the other, as the equations read."""

    def info_nce(query: Tensor, key: Tensor) -> Tensor:
        logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT / TAU
        return F.cross_entropy(logits, torch.arange(len(query)))

    loss = torch.zeros(())
    for weight, steps, (v_o, v_s), (w_o, w_t) in zip(
        WEIGHTS, STEPS, spatial, temporal, strict=True
    ):
        for n in range(steps):
            loss = loss + weight / steps * info_nce(v_o[:, n], v_s[:, n])
        loss = loss + weight * info_nce(w_o, w_t)
    return loss


def fused(spatial: Pairs, temporal: Pairs) -> Tensor:
    """The same by this package."""
    return fused_hd_nce(spatial, temporal, alpha=WEIGHTS, beta=WEIGHTS, temperature=TAU)


@pytest.mark.parametrize("loss", [naive_hd_nce, fused], ids=["naive", "fused"])
def test_hd_nce(benchmark: BenchmarkFixture, loss: Callable[[Pairs, Pairs], Tensor]) -> None:
    benchmark.group = f"HD-NCE forward + backward, B = {BATCH}, D = {WIDTH}, N = {STEPS}"
    torch.manual_seed(0)
    shapes = [(BATCH, steps, WIDTH) for steps in STEPS] + [(BATCH, WIDTH) for _ in STEPS]
    pairs = [
        (torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True))
        for shape in shapes
    ]
    views = [view for pair in pairs for view in pair]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(pairs[:3], pairs[3:]), views)

    expected = torch.autograd.grad(naive_hd_nce(pairs[:3], pairs[3:]), views)
    torch.testing.assert_close(benchmark(step), expected)
