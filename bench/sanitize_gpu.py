"""Runs every path of a backend's kernels once, on small shapes: something for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python bench/sanitize_gpu.py {triton,cuda}

Shapes straddle the blocks, so that every mask has something to hide; loss and gradients are checked, too.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

# Every tensor in an allocation of its own: in a shared one, reading past the end would go unnoticed.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from measure import relative_error
from torch import Tensor

from hdc_kernels import augment_clips, fused_hd_nce, fused_info_nce
from hdc_kernels.checks import Backend, Reduction

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (1, 1, 8),
    (3, 33, 24),  # one launch
    (17, 128, 128),
    (2, 250, 200),  # in CUDA C++ alone
    (1, 257, 100),  # several
    (2, 300, 256),
    (1, 300, 64),
    (1, 140, 300),  # dimensions in chunks
)
# temperature, symmetric, reduction, normalize, whether the temperature is a tensor
OPTIONS: tuple[tuple[float, bool, Reduction, bool, bool], ...] = (
    (0.07, False, "mean", True, False),
    (0.07, True, "none", True, True),
    (0.005, True, "mean", True, False),  # too small for a fixed shift
    (0.07, False, "none", False, True),
)
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of a sum, so that "none" has them as well."""
    return [g.double() for g in torch.autograd.grad(loss.sum(), inputs)]


def check_info_nce(backend: Backend, shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Every line of `OPTIONS` for one shape; returns how many there were."""
    for tau, symmetric, reduction, normalize, learned in OPTIONS:
        query, key = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
        if not normalize:  # logits of moderate size
            query, key = query / shape[-1] ** 0.5, key / shape[-1] ** 0.5
        found = []
        implementations: tuple[Backend, ...] = (backend, "torch")
        for implementation in implementations:
            inputs = [view.detach().requires_grad_() for view in (query, key)]
            if implementation == "torch":
                inputs = [view.detach().double().requires_grad_() for view in (query, key)]
            temperature: float | Tensor = tau
            if learned:
                temperature = torch.tensor(tau, device="cuda", requires_grad=True)
            loss = fused_info_nce(
                inputs[0],
                inputs[1],
                temperature=temperature,
                symmetric=symmetric,
                reduction=reduction,
                normalize=normalize,
                backend=implementation,
            )
            if isinstance(temperature, Tensor):
                inputs.append(temperature)
            found.append([loss.detach().double(), *gradients(loss, inputs)])
        if shape[1] == 1:  # no negatives: everything is 0
            error = max(float(t.abs().max()) for t in found[0])
        else:
            error = relative_error(*found)
        limit = TOLERANCE[dtype] * (0.07 / tau if dtype != torch.float32 else 1)
        assert error < limit, (shape, dtype, tau, symmetric, reduction, normalize, learned, error)
    return len(OPTIONS)


def check_false_negatives(backend: Backend, dtype: torch.dtype) -> int:
    """Columns left out by their ids, which no kernel for plain InfoNCE looks at."""
    query, key = (torch.randn(300, 100, device="cuda", dtype=dtype) for _ in range(2))
    ids = torch.arange(300, device="cuda") // 3
    implementations: tuple[tuple[Backend, torch.dtype], ...] = (
        (backend, dtype),
        ("torch", torch.float64),
    )
    found = []
    for implementation, its_dtype in implementations:
        inputs = [view.to(its_dtype, copy=True).requires_grad_() for view in (query, key)]
        loss = fused_info_nce(inputs[0], inputs[1], ids=ids, backend=implementation)
        found.append([loss.detach().double(), *gradients(loss, inputs)])
    assert relative_error(*found) < TOLERANCE[dtype], dtype
    return 1


def check_hd_nce(backend: Backend, dtype: torch.dtype) -> int:
    """Pairs of several shapes in one call."""
    shapes = [(33, 8, 64), (33, 4, 64), (33, 2, 48)]
    first, second = ([torch.randn(s, device="cuda", dtype=dtype) for s in shapes] for _ in range(2))
    spatial = list(zip(first, second, strict=True))
    temporal = [(v[:, 0].contiguous(), w[:, 1].contiguous()) for v, w in spatial]
    views = [view.requires_grad_() for pair in (*spatial, *temporal) for view in pair]
    evaluate = partial(
        fused_hd_nce, spatial, temporal, alpha=(0.25, 0.5, 1.0), beta=(0.25, 0.5, 1.0)
    )
    loss, metrics = evaluate(backend=backend, return_metrics=True)
    assert all(bool(g.isfinite().all()) for g in gradients(loss, views))
    with torch.no_grad():
        without, again = evaluate(backend=backend, return_metrics=True)
        _, expected = evaluate(backend="torch", return_metrics=True)
    assert relative_error([without], [loss.detach()]) < TOLERANCE[dtype]
    for found in (metrics, again):  # accuracies among them: a near tie of one row may go either way
        assert relative_error(found[::2], expected[::2]) < TOLERANCE[dtype]
        assert all(bool((a - b).abs().max() < 0.05) for a, b in zip(found, expected, strict=True))
    return 2


def check_augment(dtype: torch.dtype) -> int:
    """Crops at every edge of the frame and beyond, of clips that begin and end where their allocation does."""
    count = 0
    for batch, frames, height, width, size in ((1, 1, 1, 1, 1), (5, 9, 33, 47, 20)):
        shape = (batch, frames, height, width, 3)
        clips = torch.randint(256, shape, dtype=torch.uint8, device="cuda")
        x, y = float(width), float(height)
        boxes = torch.tensor([(0, 0, x, y), (x, 0, -x, y), (-5, -5, 9, 9), (x - 2, y - 2, 9, 9)])
        boxes = torch.cat((boxes, torch.tensor([(2 * x, 2.5, -3 * x, 7.25)])))[:batch]
        colors = {"matrix": torch.randn(batch, 3, 3), "contrast": torch.rand(batch) + 0.5}
        for chosen in ({}, colors):
            triton, plain = (
                augment_clips(clips, boxes, size, **chosen, dtype=dtype, backend=backend)
                for backend in ("triton", "torch")
            )
            error = float((triton.float() - plain.float()).abs().max())
            assert error < torch.finfo(dtype).eps + 1e-3, (shape, dtype, error)
            count += 1
    return count


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU")
    parser = argparse.ArgumentParser(description="Runs every path of a backend's kernels once.")
    parser.add_argument("backend", choices=("triton", "cuda"))
    backend = parser.parse_args().backend
    torch.manual_seed(0)
    count = sum(check_info_nce(backend, shape, dtype) for shape in SHAPES for dtype in DTYPES)
    count += sum(check_false_negatives(backend, dtype) for dtype in DTYPES)
    count += sum(check_hd_nce(backend, dtype) for dtype in DTYPES)
    if backend == "triton":
        count += sum(check_augment(dtype) for dtype in DTYPES)
    torch.set_float32_matmul_precision("high")  # tf32
    count += check_info_nce(backend, SHAPES[3], torch.float32)
    torch.cuda.synchronize()
    print(f"{count} calls of backend {backend}, all as expected")


if __name__ == "__main__":
    main()
