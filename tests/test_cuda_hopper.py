"""The Hopper kernels as nvcc compiles them for sm_90a: no GPU takes part."""

import re

import pytest
from cuda_objects import CSRC, Kernel, assert_nothing_spills

# Two types and three widths, with and without columns, or with either term and both.
KERNELS = {"hopper_logsumexp.cu": 12, "hopper_gradient.cu": 18}


@pytest.fixture(params=KERNELS)
def kernels(request, read_kernels) -> list[Kernel]:
    kernels = read_kernels(CSRC / request.param, "90a")
    assert len(kernels) == KERNELS[request.param]
    return kernels


def test_spills_nothing_and_moves_registers_between_warpgroups(kernels):
    """ptxas drops setmaxnreg where it cannot tell how many registers there are."""
    assert_nothing_spills(kernels)
    for kernel in kernels:
        assert len(re.findall(r"\bUSETMAXREG\b", kernel.instructions)) == 2, kernel.name


def test_products_are_waited_for_in_groups(kernels):
    """`gsb0` marks those that are. Where ptxas serialises products (its remarks C7510 to C7520), it is each of them."""
    for kernel in kernels:
        products = re.findall(r"\bHGMMA\b.*", kernel.instructions)
        assert 0 < 4 * sum("gsb0" in product for product in products) < len(products), kernel.name


def test_every_kernel_multiplies_by_wgmma_and_loads_by_tma(kernels):
    for kernel in kernels:
        assert "HGMMA.64x" in kernel.instructions
        assert "UTMALDG.3D" in kernel.instructions
        assert "MUFU.EX2" in kernel.instructions
