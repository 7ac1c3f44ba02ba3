"""Compiles `csrc/` into libraries in `hdc_kernels/backends/`, where there are compilers to do it.

    libhdc_cpu.so    by the C++ compiler
    libhdc_cuda.so   by nvcc: that of $CUDACXX, the PATH, $CUDA_HOME or /usr/local/cuda. $HDC_CUDA_ARCHITECTURES
                     may name other devices than `ARCHITECTURES`, in nvcc's words and between spaces: sm_90a is
                     machine code for 9.0, compute_100 PTX for 10.0 and everything later. "none" does without.

ninja runs the compilers side by side, for what has changed. The libraries have a plain C interface: building them
needs neither torch nor Python's headers, and one wheel serves every torch and every Python. Everything that is not
compiled is declared in pyproject.toml.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]
# csrc/contrast_isa.cpp once for each instruction set: name, width of its vectors in bytes, flags.
INSTRUCTION_SETS = [("portable", 16, [])]
DISPATCH = []
if platform.machine().lower() in ("x86_64", "amd64"):
    DISPATCH = ["-DHDC_X86"]
    INSTRUCTION_SETS += [
        ("avx2", 32, ["-march=x86-64-v3"]),
        ("avx512", 64, ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"]),
    ]

ARCHITECTURES = "sm_80 sm_86 sm_89 sm_90a compute_100"  # of which nvcc may not know all
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC"]

# `depends` puts the headers into source distributions; what to compile again, ninja finds out from the compilers.
CPU = Extension(
    "hdc_kernels.backends.libhdc_cpu",
    sources=["csrc/contrast.cpp", "csrc/contrast_isa.cpp"],
    depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
)
CUDA = Extension(
    "hdc_kernels.backends.libhdc_cuda",
    sources=[str(path) for path in sorted(Path("csrc/cuda").glob("*.cu"))],
    depends=[str(path) for path in sorted(Path("csrc/cuda").glob("*.*h"))],
)
WITHOUT = {
    CPU.name: "the C++ kernels were not built ({}): backend 'cpu' will be missing and the losses run in plain "
    "PyTorch. Install g++ 12 or clang++ 15 (or later) and install again.",
    CUDA.name: "the CUDA kernels were not built ({}): backend 'cuda' will be missing. Install the CUDA toolkit 12.5 "
    "(or later) and install again.",
}


class BuildKernels(build_ext):
    """What there is a compiler for; everything else is installed all the same."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no Python in its name: it is not a module

    def run(self) -> None:
        try:
            super().run()
        except BaseError as error:
            for ext in self.extensions:
                self._go_on_without(ext, error)

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext is CUDA:
                self._build_cuda(ext)
            else:
                self._build_cpu(ext)
        except (CompileError, LinkError) as error:
            self._go_on_without(ext, error)

    def _build_cpu(self, ext: Extension) -> None:
        """One object for each instruction set; without OpenMP where the compiler has none."""
        try:
            self._build_on_threads(ext, ["-fopenmp"])
        except (CompileError, LinkError):
            self._build_on_threads(ext, [])

    def _build_on_threads(self, ext: Extension, openmp: list[str]) -> None:
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        jobs = [("dispatch", "csrc/contrast.cpp", DISPATCH)]
        for name, width, flags in INSTRUCTION_SETS:
            macros = [f"-DHDC_ISA={name}", f"-DHDC_VECTOR_BYTES={width}"]
            jobs.append((name, "csrc/contrast_isa.cpp", [*macros, *flags]))
        commands = {
            f"{name}.o": [*compiler, *FLAGS, *openmp, *flags, "-c", Path(source).absolute()]
            for name, source, flags in jobs
        }
        objects = run_ninja(Path(self.build_temp, "cpu"), commands)
        library = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, library, extra_postargs=openmp, target_lang="c++")

    def _build_cuda(self, ext: Extension) -> None:
        """One object for each source, the largest first: it may take longer than all others together."""
        nvcc = find_nvcc()
        architectures = cuda_architectures(nvcc)
        hopper = "sm_90a" in architectures
        macros = ["-DHDC_CUDA_HOPPER"] if hopper else []
        ptx = [int(name.removeprefix("compute_")) for name in architectures if "compute" in name]
        if ptx:
            macros.append(f"-DHDC_CUDA_PTX={min(ptx)}")
        commands = {}
        for source in sorted(map(Path, ext.sources), key=lambda source: -source.stat().st_size):
            only_hopper = source.name.startswith("hopper_")
            if only_hopper and not hopper:
                continue
            wanted = ["sm_90a"] if only_hopper else architectures
            code = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in wanted]
            options = [*NVCC_FLAGS, *macros, *code]
            commands[f"{source.stem}.o"] = [nvcc, *options, "-c", source.absolute()]
        objects = run_ninja(Path(self.build_temp, "cuda"), commands)
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # The runtime is linked in, and cannot be seen from outside: PyTorch brings another one.
        call(LinkError, nvcc, "-shared", "-cudart=static", *objects, "-o", library)

    def _go_on_without(self, ext: Extension, error: BaseError) -> None:
        self.extensions = [other for other in self.extensions if other is not ext]
        self.warn(WITHOUT[ext.name].format(error))

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def find_nvcc() -> str:
    """Its path; raises CompileError if there is none."""
    named = os.environ.get("CUDACXX")
    homes = [Path(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    found = [named or shutil.which("nvcc"), *(shutil.which("nvcc", path=home) for home in homes)]
    for nvcc in found:
        if nvcc:
            return nvcc
    raise CompileError("nvcc was not found")


def cuda_architectures(nvcc: str) -> list[str]:
    """Those asked for, or those of the default that this nvcc knows; raises CompileError for other names."""
    asked = os.environ.get("HDC_CUDA_ARCHITECTURES", "").split()
    wrong = [name for name in asked if not re.fullmatch(r"sm_\d+|sm_90a|compute_\d+", name)]
    if asked == ["none"]:
        raise CompileError("HDC_CUDA_ARCHITECTURES is none")
    if wrong:
        raise CompileError(
            f"HDC_CUDA_ARCHITECTURES has {wrong[0]!r}; it may have names such as sm_80, sm_90a, compute_100"
        )
    known = call(CompileError, nvcc, "--list-gpu-arch").split()
    default = [
        name
        for name in ARCHITECTURES.split()
        if name.replace("sm", "compute").removesuffix("a") in known
    ]
    return asked or default


def run_ninja(folder: Path, commands: dict[str, list[str | Path]]) -> list[str]:
    """Compile side by side what has changed: the source, a header it includes, or the command itself.

    The keys are objects in `folder`, the last word of a command is its source. Returns the objects' paths.
    """
    ninja = shutil.which("ninja")
    lines = ["rule compile", "  command = $run -o $out -MD -MF $out.d", "  depfile = $out.d"]
    lines.append("  deps = gcc")
    for target, command in commands.items():
        source = re.sub(r"([$: ])", r"$\1", str(command[-1]))
        words = shlex.join(map(str, command)).replace("$", "$$")
        lines += [f"build {target}: compile {source}", f"  run = {words}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))
    call(CompileError, *([ninja] if ninja else [sys.executable, "-m", "ninja"]), "-C", folder)
    return [str(folder / target) for target in commands]


def call(failure: type[BaseError], *command: str | Path) -> str:
    """What it prints; raises `failure` with the end of what it says if it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise failure(str(error)) from error
    if done.returncode:
        said = done.stdout[-2000:].strip()
        raise failure(said or f"{command[0]} returned {done.returncode}")
    return done.stdout


class TagWheel(bdist_wheel):
    """Any Python 3, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[CPU, CUDA],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": TagWheel},
)
