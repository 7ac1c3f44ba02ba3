"""The Hopper kernels as nvcc compiles them for sm_90a: no GPU takes part."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What ptxas says and the instructions, of every kernel in hopper_logsumexp.cu."""
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    nvcc = shutil.which("nvcc")
    if nvcc is None or not (tools / "nvdisasm").exists():
        pytest.skip("needs nvcc, and nvdisasm from Triton's wheel")
    cubin = tmp_path_factory.mktemp("hopper") / "hopper.cubin"
    command = [nvcc, "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    source = CUDA / "hopper_logsumexp.cu"
    done = subprocess.run(
        [*command, "-cubin", source, "-o", cubin], capture_output=True, text=True, check=True
    )
    code = subprocess.run(
        [tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr, code.stdout


def test_compiles_for_two_types_three_widths_with_and_without_columns(compiled):
    log, _ = compiled
    kernels = re.findall(r"Compiling entry function '\w*logsumexp_kernel\w*'", log)
    assert len(kernels) == 12


def test_spills_nothing_and_serialises_no_product(compiled):
    log, code = compiled
    assert set(re.findall(r"(\d+) bytes stack frame", log)) == {"0"}
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert "serialized" not in log
    assert "setmaxnreg ignored" not in log


def test_every_kernel_multiplies_by_wgmma_and_loads_by_tma(compiled):
    _, code = compiled
    sections = re.split(r"\.section\s+\.text\.", code)[1:]
    assert len(sections) == 12
    for section in sections:
        assert "HGMMA.64x128x16.F32" in section
        assert "UTMALDG.3D" in section
        assert "MUFU.EX2" in section
