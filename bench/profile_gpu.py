"""Runs a backend's kernels at the sizes that count, for Nsight Compute to say how busy tensor cores and MUFU are.

    ncu --profile-from-start off --section SpeedOfLight --section ComputeWorkloadAnalysis --section LaunchStats \\
        --print-details all python bench/profile_gpu.py {triton,cuda}

Only the second call of each case is seen: the first one compiles, or loads.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hdc_kernels import fused_hd_nce, fused_info_nce
from hdc_kernels.checks import Backend

D = 128
BATCHES = (2048, 8192, 65536)


def embeddings(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, D, device="cuda", dtype=dtype, requires_grad=True)


def hd_nce(backend: Backend, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The paper's 17 problems of 128 × 128."""
    spatial, temporal = (
        [tuple(embeddings(128, steps, dtype=dtype) for _ in range(2)) for steps in (8, 4, 2)],
        [tuple(embeddings(128, dtype=dtype) for _ in range(2)) for _ in range(3)],
    )
    weights = (0.25, 0.5, 1.0)
    return partial(fused_hd_nce, spatial, temporal, alpha=weights, beta=weights, backend=backend)


def info_nce(
    backend: Backend, batch: int, dtype: torch.dtype, symmetric: bool
) -> Callable[[], Tensor]:
    query, key = (embeddings(batch, dtype=dtype) for _ in range(2))
    return partial(fused_info_nce, query, key, symmetric=symmetric, backend=backend)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU")
    parser = argparse.ArgumentParser(
        description="Runs a backend's kernels at the sizes that count."
    )
    parser.add_argument("backend", choices=("triton", "cuda"))
    backend = parser.parse_args().backend
    cases = {
        f"HD-NCE, {dtype}": hd_nce(backend, dtype) for dtype in (torch.bfloat16, torch.float32)
    }
    for batch in BATCHES:
        for symmetric in (False, True):
            name = f"InfoNCE, B = {batch:,}{', symmetric' if symmetric else ''}, bfloat16"
            cases[name] = info_nce(backend, batch, torch.bfloat16, symmetric)
    cases["InfoNCE, B = 2,048, float32"] = info_nce(backend, 2048, torch.float32, symmetric=False)
    for name, loss in cases.items():
        loss().backward()
        torch.cuda.synchronize()
        print(name, flush=True)  # ncu names the kernels below it
        torch.cuda.profiler.start()
        loss().backward()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
