"""How many launches a loss takes on a GPU with the Triton backend, those of PyTorch's own kernels among them.

No kernel runs: launches are counted, and so are PyTorch's operators, each of which is one launch on a GPU unless it
only allocates or makes a view.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_problems import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hdc_kernels import autograd, call, fused_hd_nce, fused_info_nce

triton_backend = pytest.importorskip("hdc_kernels.backends.triton", exc_type=ModuleNotFoundError)

NOT_LAUNCHED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}
NOT_LAUNCHED |= {"promote_types"}  # of dtypes
GENERAL_TERMS = {"pack_kernel": 1, "logsumexp_kernel": 1, "terms_kernel": 1, "sum": 1}
GENERAL_STEP = {**GENERAL_TERMS, "gradient_kernel": 2, "unpack_kernel": 1, "sum": 2}
GENERAL_GRADIENT = {"pack_kernel": 1, "weights_kernel": 1, "gradient_kernel": 2, "unpack_kernel": 1}
SMALL = {"contrast_kernel": 1}
SCALE = {"_foreach_mul_": 1}  # multi-tensor kernels: one launch for all gradients
SCALE_TO_HALF = {"scale_kernel": 1}


class Operators(TorchDispatchMode):
    """Counts PyTorch's operators that launch something."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        if not operator.is_view and name not in NOT_LAUNCHED:
            self.found[name] += 1
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch) -> Callable[[Callable[[], Any]], tuple[Any, dict[str, int]]]:
    """Runs something, and says what it launched."""
    found: Counter[str] = Counter()
    kernel = triton_backend.small.contrast_kernel
    monkeypatch.setattr(
        type(kernel), "run", lambda self, *_, **__: found.update([self.fn.__name__])
    )
    monkeypatch.setattr(autograd, "_is_one", lambda _: False)  # on a GPU nobody asks
    monkeypatch.setattr(call, "suits_triton", lambda _: True)
    kept = torch.zeros(1, dtype=torch.int32, device=DEVICE)  # as a stream's on a GPU
    monkeypatch.setattr(triton_backend.small, "ticket", lambda _: kept)
    before = torch.get_float32_matmul_precision()

    def count(run: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
        found.clear()
        with Operators(found):
            result = run()
        return result, dict(found)

    yield count
    torch.set_float32_matmul_precision(before)


def pair(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = (torch.ones(shape, dtype=dtype, device=DEVICE, requires_grad=True) for _ in range(2))
    return x, y


def hd_nce(batch: int, depths: tuple[int, ...], dtype: torch.dtype, metrics: bool = False):
    """The paper's 17 problems: 8, 4 and 2 timesteps, and 3 temporal pairs."""
    scales = list(zip((8, 4, 2), depths, strict=True))
    spatial = [pair(batch, steps, depth, dtype=dtype) for steps, depth in scales]
    temporal = [pair(batch, depth, dtype=dtype) for depth in depths]
    inputs = [tensor for both in spatial + temporal for tensor in both]
    weights = (0.25, 0.5, 1.0)
    return inputs, lambda: fused_hd_nce(
        spatial, temporal, alpha=weights, beta=weights, backend="triton", return_metrics=metrics
    )


def info_nce(batch: int, dtype: torch.dtype, reduction: str = "mean"):
    inputs = pair(batch, 128, dtype=dtype)
    return inputs, lambda: fused_info_nce(*inputs, reduction=reduction, backend="triton")


def counted(launches, problem) -> tuple[dict[str, int], dict[str, int]]:
    """Of the forward and of the backward pass."""
    inputs, loss = problem
    value, forward = launches(loss)
    value = value[0] if isinstance(value, tuple) else value  # beside metrics
    upstream = torch.ones_like(value)
    _, backward = launches(lambda: torch.autograd.grad(value, inputs, upstream))
    return forward, backward


@pytest.mark.parametrize(
    ("dtype", "products", "batch", "small"),
    [
        ("bfloat16", "highest", 128, True),
        ("bfloat16", "highest", 256, True),
        ("bfloat16", "highest", 512, False),
        ("bfloat16", "highest", 2048, False),
        ("float32", "highest", 128, True),
        ("float32", "highest", 256, False),
        ("float32", "high", 256, True),
        ("float32", "high", 512, False),
        ("float32", "high", 2048, False),
    ],
)
def test_a_loss_and_its_gradients(launches, dtype, products, batch, small):
    torch.set_float32_matmul_precision(products)
    kind = getattr(torch, dtype)
    expected = SMALL if small else GENERAL_STEP, SCALE if dtype == "float32" else SCALE_TO_HALF
    assert counted(launches, hd_nce(batch, (128,) * 3, kind)) == expected
    assert counted(launches, info_nce(batch, kind)) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_metrics_take_no_launch_more(launches, dtype):
    kind = getattr(torch, dtype)
    torch.set_float32_matmul_precision("high")
    expected = SMALL, SCALE if dtype == "float32" else SCALE_TO_HALF
    assert counted(launches, hd_nce(128, (128,) * 3, kind, metrics=True)) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scales_of_different_depths(launches, dtype):
    """Together while all are narrow enough; one after the other beyond."""
    kind = getattr(torch, dtype)
    torch.set_float32_matmul_precision("high")
    forward, _ = counted(launches, hd_nce(128, (64, 128, 256), kind))
    assert forward == SMALL
    forward, _ = counted(launches, hd_nce(128, (128, 256, 512), kind))
    each = {name: 6 * count for name, count in GENERAL_STEP.items()}
    assert forward == {**each, "cat": 2, "sum": 2}


@pytest.mark.parametrize(("batch", "small"), [(128, True), (512, False)])
def test_a_term_per_row(launches, batch, small):
    forward, backward = counted(launches, info_nce(batch, torch.bfloat16, "none"))
    assert forward == (SMALL if small else GENERAL_TERMS)
    assert backward == (SMALL if small else {**GENERAL_GRADIENT, "sum": 1})
