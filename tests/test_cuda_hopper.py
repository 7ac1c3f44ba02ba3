"""The Hopper kernels as nvcc compiles them for sm_90a: no GPU takes part."""

import pytest
from cuda_objects import CSRC, Compiled, assert_nothing_spills

# Two types and three widths, with and without columns, or with either term and both.
KERNELS = {"hopper_logsumexp.cu": 12, "hopper_gradient.cu": 18}


@pytest.fixture(params=KERNELS)
def compiled(request, compile_kernels) -> Compiled:
    compiled = compile_kernels(CSRC / request.param, "90a")
    assert len(compiled.kernels) == KERNELS[request.param]
    return compiled


def test_spills_nothing_and_serialises_no_product(compiled):
    assert_nothing_spills(compiled)
    assert "serialized" not in compiled.log
    assert "setmaxnreg ignored" not in compiled.log


def test_every_kernel_multiplies_by_wgmma_and_loads_by_tma(compiled):
    for kernel in compiled.kernels:
        assert "HGMMA.64x" in kernel.instructions
        assert "UTMALDG.3D" in kernel.instructions
        assert "MUFU.EX2" in kernel.instructions
