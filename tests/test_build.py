"""The build: a wheel for every torch and Python, and one without C++ where there is no compiler."""

import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hdc_kernels.backends import cpu

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


def test_a_library_of_another_version_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take what it is given for something else, and crash: it counts as missing."""
    monkeypatch.setattr(cpu, "_CALL", struct.Struct("6qd6P"))
    with pytest.raises(OSError, match="was built for another version; install this package again"):
        cpu.library.__wrapped__()


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


def test_without_a_compiler_the_rest_is_installed(sources: Path, tmp_path: Path) -> None:
    """The build says what is missing and how to get it, and goes on; the wheel holds no library."""
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, sources],
        env=os.environ | {"CC": "/bin/false", "CXX": "/bin/false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    assert "the C++ kernels were not built" in result.stdout
    assert "Install g++ 12 or clang++ 15 (or later) and install again" in result.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("hdc-0.1.0-py3-none-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "hdc_kernels/backends/cpu.py" in names
    assert not [name for name in names if name.endswith(".so")]
