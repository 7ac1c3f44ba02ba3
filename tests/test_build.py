"""The build: a wheel for every torch and Python, and one without libraries where there are no compilers."""

import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from hdc_kernels.backends import cpu, cuda

ROOT = Path(__file__).parent.parent


def test_the_library_knows_neither_torch_nor_python() -> None:
    """Nothing that it leaves to others to define is theirs: that is why one wheel serves all versions."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    command = [nm, "-D", "-C", "--undefined-only", str(cpu.LIBRARY)]
    wanted = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split(maxsplit=1)[1] for line in wanted.splitlines()]
    assert any(name.startswith("GOMP_parallel") for name in names)  # torch's pool of threads
    foreign = ("Py", "_Py", "at::", "c10::", "torch::", "THP", "aoti_")
    assert [name for name in names if name.startswith(foreign)] == []


def test_the_cuda_library_brings_its_own_runtime() -> None:
    """It loads where there is no driver, and shares no symbol of CUDA with PyTorch, whose version may be another."""
    nm = shutil.which("nm")
    if nm is None or not cuda.LIBRARY.exists():
        pytest.skip("nm (binutils) is not installed, or nvcc was not when this package was")
    symbols = subprocess.run(
        [nm, "-D", str(cuda.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    named = [line.split() for line in symbols.splitlines()]
    defined = {words[-1] for words in named if words[-2] == "T"}
    assert {name for name in defined if name.startswith("hdc_cuda")} == {
        "hdc_cuda_contrast",
        "hdc_cuda_error",
        "hdc_cuda_interface_size",
        "hdc_cuda_needs",
        "hdc_cuda_runs_on",
    }
    foreign = ("cu", "__cuda", "Py", "_Py", "at::", "c10::")
    assert [words[-1] for words in named if words[-1].startswith(foreign)] == []
    assert cuda.is_available()


@pytest.mark.parametrize("backend", [cpu, cuda], ids=["cpu", "cuda"])
def test_a_library_of_another_version_is_not_called(
    monkeypatch: pytest.MonkeyPatch, backend: ModuleType
) -> None:
    """It would take what it is given for something else, and crash: it counts as missing."""
    if not backend.LIBRARY.exists():
        pytest.skip("nvcc was not installed when this package was")
    monkeypatch.setattr(backend, "_CALL", struct.Struct("6qd6P"))
    with pytest.raises(OSError, match="was built for another version; install this package again"):
        backend.library.__wrapped__()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What a build needs, without what an earlier one left behind."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "hdc", "hdc_kernels"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    return copy


def test_without_compilers_the_rest_is_installed(sources: Path, tmp_path: Path) -> None:
    """The build says what is missing and how to get it, and goes on; the wheel holds no library."""
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, sources],
        env=os.environ | dict.fromkeys(("CC", "CXX", "CUDACXX"), "/bin/false"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    assert "the C++ kernels were not built" in result.stdout
    assert "Install g++ 12 or clang++ 15 (or later) and install again" in result.stdout
    assert "the CUDA kernels were not built (/bin/false returned 1)" in result.stdout
    assert "Install the CUDA toolkit 12.5 (or later) and install again" in result.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("hdc-0.1.0-py3-none-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"hdc_kernels/backends/cpu.py", "hdc_kernels/backends/cuda.py"} <= set(names)
    assert not [name for name in names if name.endswith(".so")]


HEADER = Path("csrc", "cuda", "packed.h")
NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then
    echo compute_80 compute_86 compute_90
    exit
fi
echo "$@" >>"$CALLS"
while [ $# -gt 1 ]; do
    if [ "$1" = -o ]; then out=$2 && echo code >"$2"; fi
    if [ "$1" = -MF ]; then echo "$out: $HEADER" >"$2"; fi
    shift
done
"""


def build_with_nvcc(sources: Path, architectures: str) -> tuple[list[str], str]:
    """How nvcc is called, by a compiler that does nothing but list its calls; and what the build says."""
    pytest.importorskip("setuptools")
    nvcc, calls = sources.parent / "nvcc", sources.parent / "calls"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    calls.write_text("")
    variables = {"CC": "/bin/false", "CXX": "/bin/false", "CUDACXX": str(nvcc)}
    variables |= {"CALLS": str(calls), "HDC_CUDA_ARCHITECTURES": architectures}
    variables["HEADER"] = str(sources / HEADER)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=sources,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return calls.read_text().splitlines(), done.stdout


def codes(call: str) -> list[str]:
    """What it compiles for."""
    return [word.split(",code=")[1] for word in call.split() if word.startswith("-gencode")]


def test_cuda_code_is_for_the_architectures_asked_for(sources: Path) -> None:
    """By default for those that nvcc knows; Hopper's kernels for 9.0 alone, and without it not at all."""
    calls, _ = build_with_nvcc(sources, "")
    *compiled, linked = calls
    files = {Path(re.findall(" -c (\\S+)", call)[0]).name: call for call in compiled}
    assert files.keys() == {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    for name, call in files.items():
        expected = ["sm_90a"] if name.startswith("hopper") else ["sm_80", "sm_86", "sm_90a"]
        assert codes(call) == expected
        assert "-DHDC_CUDA_HOPPER" in call
        assert "HDC_CUDA_PTX" not in call
    assert "-cudart=static" in linked
    assert (sources / "hdc_kernels" / "backends" / "libhdc_cuda.so").exists()

    again, _ = build_with_nvcc(sources, "")
    assert again == [linked]  # nothing has changed
    (sources / HEADER).write_text("changed")
    again, _ = build_with_nvcc(sources, "")
    assert sorted(again) == sorted(calls)

    calls, _ = build_with_nvcc(sources, "sm_80 compute_90 compute_100")
    *compiled, linked = calls
    assert not any("hopper" in call or "HOPPER" in call for call in calls)
    assert {tuple(codes(call)) for call in compiled} == {("sm_80", "compute_90", "compute_100")}
    assert all("-DHDC_CUDA_PTX=90" in call for call in compiled)


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        ("none", "(HDC_CUDA_ARCHITECTURES is none)"),
        ("sm_80 9.0", "(HDC_CUDA_ARCHITECTURES has '9.0'; it may have names such as sm_80,"),
    ],
)
def test_without_cuda_code(sources: Path, architectures: str, message: str) -> None:
    calls, said = build_with_nvcc(sources, architectures)
    assert calls == []
    assert f"the CUDA kernels were not built {message}" in " ".join(said.split())
