"""The Hopper kernels as nvcc compiles them for sm_90a: no GPU takes part."""

import pytest
from cuda_objects import CSRC, Compiled, assert_nothing_spills


@pytest.fixture(scope="module")
def compiled(compile_kernels) -> Compiled:
    return compile_kernels(CSRC / "hopper_logsumexp.cu", "90a")


def test_compiles_for_two_types_three_widths_with_and_without_columns(compiled):
    assert len(compiled.kernels) == 12
    assert all("logsumexp_kernel" in kernel.name for kernel in compiled.kernels)


def test_spills_nothing_and_serialises_no_product(compiled):
    assert_nothing_spills(compiled)
    assert "serialized" not in compiled.log
    assert "setmaxnreg ignored" not in compiled.log


def test_every_kernel_multiplies_by_wgmma_and_loads_by_tma(compiled):
    for kernel in compiled.kernels:
        assert "HGMMA.64x128x16.F32" in kernel.instructions
        assert "UTMALDG.3D" in kernel.instructions
        assert "MUFU.EX2" in kernel.instructions
