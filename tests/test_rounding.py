"""Both of PyTorch's switches for float32 products: the old one of everything, and the new ones of a kind of device."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
{switch}
from hdc_kernels import fused_info_nce
from hdc_kernels.backends import rounding
x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    fused_info_nce(x.to(dtype), -x.to(dtype))
print(rounding.to_bfloat16(), rounding.to_tf32())
"""


@pytest.mark.parametrize(
    ("switch", "to_bfloat16", "to_tf32"),
    [
        ("", False, False),
        ("torch.set_float32_matmul_precision('highest')", False, False),
        ("torch.set_float32_matmul_precision('high')", False, True),
        ("torch.set_float32_matmul_precision('medium')", True, True),
        ("torch.backends.fp32_precision = 'ieee'", False, False),
        ("torch.backends.fp32_precision = 'tf32'", False, True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", False, True),
        ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", True, False),
    ],
)
def test_either_switch(switch: str, to_bfloat16: bool, to_tf32: bool) -> None:
    """In a process of its own: once a new switch is used, PyTorch refuses to say what the old one is."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(switch=switch)], capture_output=True, text=True
    )
    assert done.stdout.split() == [str(to_bfloat16), str(to_tf32)], done.stderr
