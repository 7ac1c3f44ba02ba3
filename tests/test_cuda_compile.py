"""The CUDA kernels compiled ahead of time: no spilled register, no local memory, tensor cores where they multiply.

It needs nvcc, and cuobjdump and nvdisasm from Triton's wheel, but no GPU.
"""

import re
from pathlib import Path

import pytest
from cuda_objects import SOURCES, assert_nothing_spills

# What multiplies, by the beginning of the file's name; everything else does arithmetic on rows.
PRODUCTS = {"hopper": "HGMMA", "portable": "HMMA", "small": "HMMA"}
CASES = [
    (source, target)
    for source in SOURCES
    for target in ("80", "90a")
    if target == "90a" or not source.name.startswith("hopper")
]


@pytest.mark.parametrize(
    ("source", "target"), CASES, ids=[f"{source.stem}-{target}" for source, target in CASES]
)
def test_nothing_spills_and_products_run_on_tensor_cores(
    read_kernels, source: Path, target: str
) -> None:
    kernels = read_kernels(source, target)
    assert_nothing_spills(kernels)
    wanted = PRODUCTS.get(source.stem.split("_")[0])
    assert wanted is None or any(
        re.search(rf"\b{wanted}\b", kernel.instructions) for kernel in kernels
    )
