"""csrc/cuda compiled by nvcc: what ptxas says, and what cuobjdump and nvdisasm find in it. No GPU takes part.

nvcc and Triton's wheel, which brings the two tools, are needed; without them tests skip. A file is compiled once
for a target in a test run, whichever of its processes asks first.
"""

import fcntl
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).parent.parent / "csrc" / "cuda"
SOURCES = sorted(CSRC.glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


class Kernel(NamedTuple):
    """One of the kernels in a compiled file."""

    name: str  # mangled
    stack: int  # bytes
    local: int
    instructions: str


class Compiled(NamedTuple):
    log: str  # of nvcc with -Xptxas -v
    kernels: list[Kernel]


def run(*command: str | Path) -> str:
    """What it prints; fails with what it says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def compile_kernels(folder: Path, source: Path, target: str) -> Compiled:
    """For "80", "90a" and so on. What is known already is in `folder`, which the processes of a test run share."""
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if NVCC is None or not (tools / "nvdisasm").exists():
        pytest.skip("needs nvcc, and nvdisasm from Triton's wheel")
    known = folder / f"{source.stem}-{target}.json"
    with known.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not known.exists():
            binary = known.with_suffix(".cubin")
            code = f"-gencode=arch=compute_{target},code=sm_{target}"
            flags = ["-O3", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
            log = run(NVCC, *flags, code, source, "-o", binary)
            usage = run(tools / "cuobjdump", "-res-usage", binary)
            sections = re.split(r"\.section\s+\.text\.", run(tools / "nvdisasm", "-c", binary))[1:]
            instructions = {section.split(",")[0].strip('"'): section for section in sections}
            found = re.findall(
                r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
            )
            kernels = [
                Kernel(name, int(stack), int(local), instructions[name])
                for name, stack, local in found
            ]
            known.write_text(json.dumps([log, kernels]))
        log, kernels = json.loads(known.read_text())
    return Compiled(log, [Kernel(*kernel) for kernel in kernels])


def assert_nothing_spills(compiled: Compiled) -> None:
    """No kernel has a stack, local memory, or loads and stores of it."""
    assert compiled.kernels
    for kernel in compiled.kernels:
        assert (kernel.stack, kernel.local) == (0, 0), kernel.name
        assert not re.search(r"\b(?:LDL|STL)\b", kernel.instructions), kernel.name
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", compiled.log)) == {"0"}
