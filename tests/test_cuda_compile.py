"""The CUDA kernels compiled ahead of time: no spilled register, no local memory, tensor cores where they multiply.

It needs nvcc, and cuobjdump and nvdisasm from Triton's wheel, but no GPU.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))
# What multiplies, by the beginning of the file's name; everything else does arithmetic on rows.
PRODUCTS = {"hopper": "HGMMA", "portable": "HMMA", "small": "HMMA"}
CASES = [
    (source, target)
    for source in SOURCES
    for target in ("80", "90a")
    if target == "90a" or not source.name.startswith("hopper")
]


def run(tool: str | Path, *arguments: str | Path) -> str:
    """What it prints; fails with what it says if it fails."""
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("source", "target"), CASES, ids=[f"{source.stem}-{target}" for source, target in CASES]
)
def test_nothing_spills_and_products_run_on_tensor_cores(
    tmp_path: Path, source: Path, target: str
) -> None:
    code = f"-gencode=arch=compute_{target},code=sm_{target}"
    binary = tmp_path / "kernels.cubin"
    run(
        str(NVCC),
        "-O3",
        "-std=c++17",
        "-Werror",
        "all-warnings",
        code,
        "-cubin",
        source,
        "-o",
        binary,
    )
    usage = run(TOOLS / "cuobjdump", "-res-usage", binary)
    kernels = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert kernels
    assert {(stack, local) for _, stack, local in kernels} == {("0", "0")}
    assembly = run(TOOLS / "nvdisasm", "-c", binary)
    assert not re.search(r"\b(?:LDL|STL)\b", assembly)
    wanted = PRODUCTS.get(source.stem.split("_")[0])
    assert wanted is None or re.search(rf"\b{wanted}\b", assembly)
