# Triton types its kernels itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

"""Gradients times the upstream gradient, rounded to 16 bits: the whole backward pass of a total, in one launch.

PyTorch takes two, a product and a copy of lists of tensors, and moves 14 bytes an element where this moves 6. A
program takes ELEMENTS of one tensor, in the order in which they lie in memory.

No GPU has run this yet.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from hdc_kernels.backends.triton.arithmetic import narrow

ELEMENTS = 2048  # of one program: two loads of 16 bytes for each of 256 threads
WARPS = 8


@triton.jit
def scale_kernel(
    gradients,  # pointers to float32
    scaled,  # as many
    sizes,  # of each in elements
    upstream,
    ELEMENTS: tl.constexpr,
):
    factor = tl.load(upstream).to(tl.float32)
    block = tl.program_id(0).to(tl.int64)  # from here on of the tensor that it may be in
    for k in tl.static_range(len(sizes)):
        if (block >= 0) & (block * ELEMENTS < sizes[k]):
            element = block * ELEMENTS + tl.arange(0, ELEMENTS)
            mask = element < sizes[k]
            product = tl.load(gradients[k] + element, mask) * factor
            tl.store(scaled[k] + element, narrow(product, scaled[k].dtype.element_ty), mask)
        block -= tl.cdiv(sizes[k], ELEMENTS)


def scale(
    gradients: Sequence[Tensor], upstream: Tensor, dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """Each float32 gradient times `upstream`, of one element, rounded once, to its dtype; laid out as it is.

    A gradient fills its memory without gaps, in any order of its dimensions.
    """
    scaled = [torch.empty_like(g, dtype=d) for g, d in zip(gradients, dtypes, strict=True)]
    sizes = tuple([g.numel() for g in gradients])
    programs = sum(triton.cdiv(size, ELEMENTS) for size in sizes)
    device = upstream.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        scale_kernel[(programs,)](
            tuple(gradients), tuple(scaled), sizes, upstream, ELEMENTS=ELEMENTS, num_warps=WARPS
        )
    return scaled
