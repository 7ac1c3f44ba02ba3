"""What this machine can do at best, measured here: clocks and neighbours vary, so between the contenders' calls."""

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

Ceilings = dict[str, Callable[[], float]]  # what: a function that measures it once

FMA = "float32 multiply-adds, flop/s"
COPY = "copy on the device, bytes/s"
MATMUL = "bf16 matmul, flop/s"

FEWEST_FLOPS = 50e6  # 0.3 ms of a core with AVX-512: much longer than it takes to begin


def of(device: str, threads: int, flops: float) -> Ceilings:
    """Those that can be measured: on a CPU it takes g++, and about as long as that many flop.

    A shorter loop would find a better clock, and fewer neighbours, than what it is a ceiling of.
    """
    if device == "cuda":
        return {COPY: _copy_rate(), MATMUL: _matmul_rate()}
    compiler = shutil.which("g++")
    return {FMA: _fma_rate(compiler, threads, flops)} if compiler else {}


def _fma_rate(compiler: str, threads: int, flops: float) -> Callable[[], float]:
    source = Path(__file__).with_name("fma_peak.cpp")
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "fma_peak.so")
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        loop = ctypes.CDLL(str(library)).flops_per_second
    loop.restype = ctypes.c_double
    loop.argtypes = [ctypes.c_double]
    pool = ThreadPoolExecutor(threads)  # ctypes lets go of Python's lock

    def measure() -> float:
        time.sleep(0.01)  # PyTorch's own threads spin for a while after their last work
        return sum(pool.map(loop, [max(flops / threads, FEWEST_FLOPS)] * threads))

    return measure


def _seconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _copy_rate() -> Callable[[], float]:
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: 2 * source.numel() / _seconds(lambda: target.copy_(source))


def _matmul_rate() -> Callable[[], float]:
    side = 8192
    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    b, c = torch.randn_like(a), torch.empty_like(a)
    return lambda: 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=c))
