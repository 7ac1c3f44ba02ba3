"""PyTorch's defaults of device and dtype are about tensors made without either: no loss makes one."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hdc_kernels.backends import Mask
from hdc_kernels.contrast import contrast

OPTIONS: list[dict[str, Any]] = [
    {"weights": [0.5], "detail": "total"},
    {"weights": [0.5], "detail": "means"},
    {"weights": [0.5], "symmetric": True},
    {"weights": None, "ranked": True},
    {"weights": None, "function": "tilted", "beta": 0.5},
    {"weights": [0.5], "function": "softplus", "bias": torch.linspace(-1, 1, 6)},
    {"weights": None, "mask": Mask(left_out=torch.tensor([[0, 1], [1, 2]]))},
]


def results(options: dict[str, Any], backend: str) -> list[Tensor]:
    """What there is of the value, its gradients, ranks and means."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 5, generator=generator, dtype=torch.float32, device="cpu")
    x.requires_grad_()
    found = contrast([(x, y)], temperature=0.3, backend=backend, **options)
    slopes = torch.autograd.grad(found.value.sum(), x)
    return [t for t in (found.value.detach(), *slopes, found.ranks, found.means) if t is not None]


@pytest.fixture
def other_defaults() -> Iterator[Callable[[], None]]:
    """Nothing can be computed on device "meta", and C++ that is given its memory crashes."""
    usual = torch.get_default_dtype()

    def take() -> None:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)

    yield take
    torch.set_default_device(None)
    torch.set_default_dtype(usual)


@pytest.mark.parametrize("backend", ["cpu", "torch", "chunked"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_they_change_nothing(
    other_defaults: Callable[[], None], options: dict[str, Any], backend: str
) -> None:
    expected = results(options, backend)
    other_defaults()
    found = results(options, backend)
    for ours, same in zip(found, expected, strict=True):
        assert ours.dtype == same.dtype
        assert torch.equal(ours, same)
