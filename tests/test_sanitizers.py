"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without Python in the process."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-var-tracking-assignments", "-fno-omit-frame-pointer"]
FLAGS += ["-fopenmp", "-I", str(ROOT / "csrc")]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# As in setup.py: the macros and flags of csrc/contrast_isa.cpp, and what the CPU must have.
INSTRUCTION_SETS = {
    "portable": (16, [], ""),
    "avx2": (32, ["-march=x86-64-v3"], "avx2"),
    "avx512": (64, ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"], "avx512vl"),
}
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Fresh memory is full of NaN; leaks are looked for where the system lets the sanitizer do so.
OPTIONS = "max_malloc_fill_size=1073741824:malloc_fill_byte=255:detect_leaks="


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All instruction sets and the driver in one program, as setup.py builds them but for the sanitizers."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the kernels with sanitizers")
    folder = tmp_path_factory.mktemp("sanitizers")

    def compile_one(job: tuple[str, Path, list[str]]) -> str:
        name, source, flags = job
        target = folder / f"{name}.o"
        command = ["g++", *FLAGS, *SANITIZE, *flags, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    dispatch = ["-DHDC_X86"] if X86 else []
    jobs = [
        ("dispatch", ROOT / "csrc" / "contrast.cpp", dispatch),
        ("driver", ROOT / "tests" / "sanitize_contrast.cpp", []),
    ]
    for name, (width, flags, _) in INSTRUCTION_SETS.items():
        if X86 or name == "portable":
            macros = [f"-DHDC_ISA={name}", f"-DHDC_VECTOR_BYTES={width}"]
            jobs.append((name, ROOT / "csrc" / "contrast_isa.cpp", [*macros, *flags]))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    target = folder / "sanitize_contrast"
    subprocess.run(["g++", "-fopenmp", *SANITIZE, *objects, "-o", str(target)], check=True)
    return target


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_no_report(program: Path, name: str) -> None:
    """A read or write past a buffer, before it was filled, or undefined arithmetic, in any task, dtype or layout."""
    flag = INSTRUCTION_SETS[name][2]
    if flag and not (X86 and flag in Path("/proc/cpuinfo").read_text().split()):
        pytest.skip(f"this CPU has no {name}")
    for leaks in "10":
        environment = {**os.environ, "HDC_INSTRUCTION_SET": name, "ASAN_OPTIONS": OPTIONS + leaks}
        done = subprocess.run(
            [program], env=environment, capture_output=True, text=True, timeout=600
        )
        if "LeakSanitizer has encountered a fatal error" not in done.stderr:
            break
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.startswith(f"{name}: ")
