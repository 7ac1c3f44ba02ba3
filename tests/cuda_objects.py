"""The machine code of csrc/cuda, as cuobjdump and nvdisasm read it. No GPU takes part.

It is that of the installed library, where this has the target and is newer than all sources, and otherwise compiled
by nvcc. nvcc and Triton's wheel, which brings the two tools, are needed; without them tests skip. A file is compiled
and read once for a target in a test run, whichever of its processes asks first.
"""

import fcntl
import json
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

from hdc_kernels.backends import cuda

CSRC = Path(__file__).parent.parent / "csrc" / "cuda"
SOURCES = sorted(CSRC.glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


class Kernel(NamedTuple):
    """One of the kernels of a file."""

    name: str  # mangled
    stack: int  # bytes
    local: int
    shared: int  # static; on 9.0 with the KiB that is kept back
    instructions: str


def run(*command: str | Path) -> str:
    """What it prints; fails with what it says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def read_kernels(folder: Path, source: Path, target: str) -> list[Kernel]:
    """For "80", "90a" and so on. What is known already is in `folder`, which the processes of a test run share."""
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if NVCC is None or not (tools / "nvdisasm").exists():
        pytest.skip("needs nvcc, and nvdisasm from Triton's wheel")
    known = folder / f"{source.stem}-{target}.json"
    with known.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not known.exists():
            with TemporaryDirectory() as temporary:
                code = installed(source, target, tools, Path(temporary))
                code = code or compiled(source, target, Path(temporary))
                known.write_text(json.dumps(kernels_in(code, tools)))
        return [Kernel(*kernel) for kernel in json.loads(known.read_text())]


def installed(source: Path, target: str, tools: Path, folder: Path) -> Path | None:
    """The file's code in the installed library, copied into `folder`; None where that has none, or an older one's."""
    changed = max(path.stat().st_mtime for path in CSRC.iterdir())
    if not cuda.LIBRARY.exists() or cuda.LIBRARY.stat().st_mtime < changed:
        return None
    command = [tools / "cuobjdump", "-xelf", f".sm_{target}.", cuda.LIBRARY]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    mark = f"_{len(source.name)}_{source.stem}_cu_"  # in the name of its anonymous namespace
    for code in folder.iterdir():
        if mark in run(tools / "cuobjdump", "-res-usage", code):
            return code
    return None


def compiled(source: Path, target: str, folder: Path) -> Path:
    code = folder / f"{source.stem}.cubin"
    flags = [f"-gencode=arch=compute_{target},code=sm_{target}", "-O3", "-std=c++17"]
    run(NVCC, *flags, "-Werror", "all-warnings", "-cubin", source, "-o", code)
    return code


def kernels_in(code: Path, tools: Path) -> list[Kernel]:
    usage = run(tools / "cuobjdump", "-res-usage", code)
    sections = re.split(r"\.section\s+\.text\.", run(tools / "nvdisasm", "-c", code))[1:]
    instructions = {section.split(",")[0].strip('"'): section for section in sections}
    found = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    return [
        Kernel(name, int(stack), int(local), int(shared), instructions[name])
        for name, stack, shared, local in found
    ]


def assert_nothing_spills(kernels: list[Kernel]) -> None:
    """No kernel has a stack, local memory, or loads and stores of it."""
    assert kernels
    for kernel in kernels:
        assert (kernel.stack, kernel.local) == (0, 0), kernel.name
        assert not re.search(r"\b(?:LDL|STL)\b", kernel.instructions), kernel.name
