"""The emulated device in `cuda_emulation/`: kernels' own sources, compiled with g++, every thread a fiber."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
EMULATION = Path(__file__).with_name("cuda_emulation")
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE", "-D__CUDACC__"]


def build(folder: Path, name: str, kernels: Sequence[str] = (), flags: Sequence[str] = ()) -> Path:
    """The emulation's NAME.cpp with these sources of csrc/cuda, as a library; skips where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulation")
    library = folder / f"{name}.so"
    include = ["-I", EMULATION, "-I", SOURCES, "-include", "warp.h"]
    sources = [EMULATION / f"{name}.cpp", *(SOURCES / f"{kernel}.cu" for kernel in kernels)]
    command = ["g++", *FLAGS, *flags, *include, "-x", "c++", *sources, "-o", library]
    subprocess.run(command, check=True)
    return library
