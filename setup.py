"""Compiles `csrc/` into `hdc_kernels/backends/libhdc_cpu.so`, if there is a C++ compiler to do it.

The library has a plain C interface: building it needs neither torch nor Python's headers, and one wheel
serves every torch and every Python. Everything that is not compiled is declared in pyproject.toml.
"""

import platform
from concurrent.futures import ThreadPoolExecutor
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


class BuildKernels(build_ext):
    """One object for each instruction set, side by side; without OpenMP where the compiler has none."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no Python in its name: it is not a module

    def run(self) -> None:
        try:
            super().run()
        except BaseError as error:
            self._go_on_without(error)

    def build_extension(self, ext: Extension) -> None:
        try:
            try:
                self._build(ext, ["-fopenmp"])
            except (CompileError, LinkError):
                self._build(ext, [])
        except (CompileError, LinkError) as error:
            self._go_on_without(error)

    def _build(self, ext: Extension, openmp: list[str]) -> None:
        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            name, source, flags = job
            folder = str(Path(self.build_temp, name))
            flags = [*FLAGS, *openmp, *flags]
            return self.compiler.compile(
                [source], folder, extra_postargs=flags, depends=ext.depends
            )

        jobs = [("dispatch", "csrc/contrast.cpp", DISPATCH)]
        for name, width, flags in INSTRUCTION_SETS:
            macros = [f"-DHDC_ISA={name}", f"-DHDC_VECTOR_BYTES={width}"]
            jobs.append((name, "csrc/contrast_isa.cpp", [*macros, *flags]))
        with ThreadPoolExecutor() as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        library = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, library, extra_postargs=openmp, target_lang="c++")

    def _go_on_without(self, error: BaseError) -> None:
        self.extensions = []
        self.warn(
            f"the C++ kernels were not built ({error}): backend 'cpu' will be missing and the losses "
            "run in plain PyTorch. Install g++ 12 or clang++ 15 (or later) and install again."
        )

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class TagWheel(bdist_wheel):
    """Any Python 3, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "hdc_kernels.backends.libhdc_cpu",
            sources=["csrc/contrast.cpp", "csrc/contrast_isa.cpp"],
            depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": TagWheel},
)
