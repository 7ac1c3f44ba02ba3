"""Compiles the Triton kernels ahead of time and prints what they need: one JSON object a kernel.

    python tests/triton_resources.py "case" ...      a case is target:dtype:precision:rows:dimensions:what
                                                     or target:dtype:augment:batch×frames
                                                     or target:dtype:scale:tensors

"what" is "plain" or words joined by "+": symmetric, ids, diagonal (left out), logsumexp, softplus, backward (only), and
of small problems means, or total (nothing by row).

No GPU takes part. The launches that `step`, `backward`, `augment_clips` or `scale` makes are recorded, not run, and
compiled with the same arguments' types for several targets; registers, stack and instructions are read from the
binaries.
TRITON_INTERPRET must not be set.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hdc_kernels import augment_triton
from hdc_kernels.backends import Function, Mask, Problems, outputs
from hdc_kernels.backends.triton import general, scale, small, tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Recorder:
    """Stands for a kernel and keeps its launches."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def record(module: Any, call: Callable[[], Any]) -> list[Any]:
    """The launches of the module's kernels that a call makes."""
    launches: list[Any] = []
    for name, value in list(vars(module).items()):
        if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel"):
            setattr(module, name, Recorder(value, launches))
    call()
    for name, value in list(vars(module).items()):
        if isinstance(value, Recorder):
            setattr(module, name, value.kernel)
    return launches


def step(dtype: str, precision: str, rows: str, dimensions: str, what: str) -> list:
    """The launches of one step, or backward pass."""
    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
    problems = make(getattr(torch, dtype), int(rows), int(dimensions), set(what.split("+")))
    module = small if small.fits(problems) else general
    empty = outputs.empty_rows(problems)
    rows = empty if problems.detail == "rows" else None
    dx, dy = (outputs.empty_gradients(pair, torch.float32) for pair in (problems.x, problems.y))
    d_bias = () if module is small else (problems.bias,)
    upstream = torch.empty_like(empty.loss) if "backward" in what else None
    return record(module, lambda: module.contrast(problems, rows, upstream, dx, dy, *d_bias))


def augment(dtype: str, shape: str) -> list[Any]:
    """The launches of `augment_clips`."""
    batch, frames = map(int, shape.split("×"))
    clips = torch.empty(batch, frames, 128, 128, 3, dtype=torch.uint8)
    parameters = torch.zeros(batch, 4), torch.zeros(batch, 3, 3), torch.ones(batch)
    return record(
        augment_triton,
        lambda: augment_triton.augment(clips, *parameters, 112, getattr(torch, dtype)),
    )


def scaling(dtype: str, tensors: str) -> list[Any]:
    """The launch of `scale`, of the temperature's gradient and so many others."""
    made = [torch.empty(()), *(torch.empty(128, 8, 128) for _ in range(int(tensors)))]
    dtypes = [torch.float32, *[getattr(torch, dtype)] * int(tensors)]
    return record(scale, lambda: scale.scale(made, made[0], dtypes))


OTHERS = {"augment": augment, "scale": scaling}


def source(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict]:
    """The launch as Triton specialises it."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(describe(item, (*path, i)) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            if value.data_ptr() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value is None:
            constants[path] = None
            return "constexpr"
        if value == 1:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"

    options = dict(options)
    signature: dict[str, Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if i < len(args):
            signature[name] = describe(args[i], (i,))
        else:
            constants[(i,)] = options.pop(name)
            signature[name] = "constexpr"
    return ASTSource(kernel, signature, constants, attributes), options


def resources(compiled: Any, target: str) -> dict[str, Any]:
    """Shared memory, registers, memory of a thread's own, spills and matrix instructions of a compiled kernel."""
    found = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        found["private"] = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        found["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        found["tensor"] = len(re.findall(r"\bv_mfma", text))
        return found
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    found["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
    stack, local = (int(re.search(rf"{kind}:(\d+)", usage)[1]) for kind in ("STACK", "LOCAL"))
    found["private"] = stack + local
    found["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", code))
    found["tensor"] = len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", code))
    found["wgmma"] = len(re.findall(r"\bHGMMA\b", code))
    return found


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def make(dtype: torch.dtype, rows: int, dimensions: int, what: set[str]) -> Problems:
    """Some problems of the kind that a case asks for."""
    # One problem is a launch of its own kind: Triton makes every 1 among the arguments a constant.
    count = 2 if "symmetric" in what else 1
    pairs = 6 if "means" in what else 1 if "ids" in what else count
    x = (torch.empty(count, rows, dimensions, dtype=dtype),) * pairs
    ids = torch.empty(count, rows, dtype=torch.int64)
    function: Function = "info_nce"
    if "logsumexp" in what:
        function = "logsumexp"
    if "softplus" in what:
        function = "softplus"
    return Problems(
        x,
        x,
        (1.0,) * len(x),
        temperature=0.07,
        normalize=True,
        symmetric="symmetric" in what,
        function=function,
        mask=Mask("diagonal" not in what, (ids, ids) if "ids" in what else None),
        bias=torch.empty(len(x) * count * rows) if "softplus" in what else None,
        detail="means" if "means" in what else "total" if "total" in what else "rows",
    )


def main() -> None:
    read: dict[
        str, Future[dict[str, Any]]
    ] = {}  # by the hash of what was compiled: cases share kernels
    found = []
    # Reading takes as long as compiling, in processes of its own: both at once.
    with ThreadPoolExecutor() as pool:
        for case in sys.argv[1:]:
            target, dtype, *rest = case.split(":")
            tiles.AMD = target.startswith("gfx")
            if rest[0] in OTHERS:
                launches = OTHERS[rest[0]](dtype, rest[1])
            else:
                launches = step(dtype, *rest)
            for kernel, args, options in launches:
                compiled_source, flags = source(kernel, args, options)
                compiled = triton.compile(compiled_source, target=TARGETS[target], options=flags)
                if compiled.hash not in read:
                    read[compiled.hash] = pool.submit(resources, compiled, target)
                found.append((case, kernel.__name__, compiled.hash))
    for case, name, key in found:
        print(json.dumps({"case": case, "kernel": name, **read[key].result()}))


if __name__ == "__main__":
    main()
