"""A total's gradients times the upstream gradient, in 16 bits: PyTorch's product and copy, and on a GPU one launch.

Of HD-NCE's 12 tensors at the paper's 128 clips and dimensions, and of two of 65,536 × 128, on a CPU 4,096 × 128.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CALLS = 10 if GPU else 1  # before the device is waited for
LARGE = 65_536 if GPU else 4096
SHAPES = {
    "HD-NCE": [(128, steps, 128) for steps in (8, 4, 2) for _ in range(2)] + [(128, 128)] * 6,
    f"{LARGE:,} × 128": [(LARGE, 128)] * 2,
}

Scale = Callable[[list[Tensor], Tensor, list[torch.dtype]], list[Tensor]]


def foreach(gradients: list[Tensor], upstream: Tensor, dtypes: list[torch.dtype]) -> list[Tensor]:
    """In place, then rounded: two launches."""
    torch._foreach_mul_(gradients, upstream)
    scaled = [torch.empty_like(g, dtype=d) for g, d in zip(gradients, dtypes, strict=True)]
    torch._foreach_copy_(scaled, gradients)
    return scaled


def triton(gradients: list[Tensor], upstream: Tensor, dtypes: list[torch.dtype]) -> list[Tensor]:
    """One launch."""
    from hdc_kernels.backends.triton.scale import scale

    return scale(gradients, upstream, dtypes)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    "scale",
    [
        foreach,
        pytest.param(triton, marks=pytest.mark.skipif(not GPU, reason="needs a CUDA device")),
    ],
)
def test_scale(benchmark: BenchmarkFixture, scale: Scale, shapes: str) -> None:
    benchmark.group = f"{CALLS} × gradients of {shapes} in bfloat16"
    gradients = [torch.randn(shape, device=DEVICE) for shape in SHAPES[shapes]]
    dtypes, upstream = [torch.bfloat16] * len(gradients), torch.ones((), device=DEVICE)

    def run() -> list[Tensor]:
        for _ in range(CALLS):
            scaled = scale(gradients, upstream, dtypes)
        if GPU:
            torch.cuda.synchronize()
        return scaled

    expected = [g.bfloat16() for g in gradients]
    run()
    assert all(map(torch.equal, benchmark(run), expected))
