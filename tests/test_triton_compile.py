"""The Triton kernels compiled ahead of time: no spilled register, no excess of shared memory, matrix units.

It needs no GPU. The compiler must not know of the interpreter that the other tests run in, so it gets a
process of its own: `triton_resources`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

PRODUCTS = "logsumexp_kernel", "gradient_kernel", "contrast_kernel"
# Bytes that one program may have.
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# The symmetric loss needs the most registers of everything.
CASES = (
    "sm_90:bfloat16:tf32:512:64:plain",
    "sm_90:bfloat16:tf32:512:128:symmetric",
    "sm_90:bfloat16:tf32:512:128:symmetric+backward",
    "sm_90:float16:tf32:512:256:symmetric",
    "sm_90:float32:tf32:512:128:symmetric",
    "sm_90:float32:ieee:512:128:symmetric",
    "sm_80:bfloat16:tf32:512:128:symmetric",
    "sm_80:bfloat16:tf32:512:512:symmetric",
    "sm_80:float32:tf32:512:256:symmetric",
    "sm_80:bfloat16:tf32:512:128:symmetric+ids",
    "sm_80:bfloat16:tf32:512:256:softplus+ids",
    "sm_90:bfloat16:tf32:512:128:logsumexp+symmetric+ids+diagonal",
    "sm_90:float16:tf32:512:512:softplus+ids+diagonal",
    "sm_90:float32:tf32:512:128:softplus",
    "sm_90:float16:tf32:512:128:ids",
    "sm_100:bfloat16:tf32:512:128:logsumexp+symmetric+ids",
    "sm_100:bfloat16:tf32:512:128:ids",
    "sm_100:bfloat16:tf32:512:128:softplus+diagonal",
    "gfx942:bfloat16:tf32:512:128:symmetric",
)
# Small problems, everything in one launch; at most 128 rows where float32 is multiplied exactly.
SMALL = (
    "sm_80:bfloat16:tf32:128:128:plain",
    "sm_80:bfloat16:tf32:128:128:means",
    "sm_80:float16:tf32:256:256:symmetric",
    "sm_80:float32:ieee:128:256:symmetric",
    "sm_80:float32:tf32:256:128:symmetric",
    "sm_90:bfloat16:tf32:128:128:symmetric",
    "sm_90:bfloat16:tf32:128:128:symmetric+backward",
    "sm_90:bfloat16:tf32:128:128:means",
    "sm_90:float32:tf32:128:128:symmetric+means",
    "sm_90:bfloat16:tf32:256:256:plain",
    "sm_90:bfloat16:tf32:256:256:total",
    "sm_90:float32:ieee:128:128:plain",
    "sm_90:float32:tf32:256:256:plain",
    "sm_100:bfloat16:tf32:128:128:plain",
    "sm_100:float32:tf32:128:128:plain",
    "sm_100:bfloat16:tf32:128:128:means",
    "gfx942:bfloat16:tf32:128:128:means",
    "gfx942:float16:tf32:128:128:symmetric",
    "gfx942:float32:tf32:256:256:plain",
)
CLIPS = (
    "sm_80:float32:augment:128×16",
    "sm_90:bfloat16:augment:128×16",
    "sm_90:float16:augment:1×1",
    "sm_100:bfloat16:augment:128×16",
    "gfx942:bfloat16:augment:128×16",
)
SCALE = (
    "sm_80:float16:scale:2",
    "sm_90:bfloat16:scale:12",
    "sm_100:bfloat16:scale:12",
    "gfx942:bfloat16:scale:12",
)
ALL = CASES + SMALL + CLIPS + SCALE


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[dict[str, Any]]]:
    """What every case's kernels need."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_resources.py")
    done = subprocess.run(
        [sys.executable, script, *ALL],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in ALL}
    for line in done.stdout.splitlines():
        kernel = json.loads(line)
        found[kernel["case"]].append(kernel)
    return found


@pytest.mark.parametrize("case", ALL)
def test_nothing_spills_and_everything_fits(kernels, case):
    general = 5 if "backward" in case else 6
    launches = general if case in CASES else 2 if case in CLIPS else 1
    assert len(kernels[case]) == launches
    for kernel in kernels[case]:
        assert kernel["private"] == kernel["spills"] == 0, kernel
        assert kernel["shared"] <= SHARED[case.split(":")[0]], kernel


@pytest.mark.parametrize("case", CASES + SMALL)
def test_products_run_on_matrix_units(kernels, case):
    products = [kernel for kernel in kernels[case] if kernel["kernel"] in PRODUCTS]
    assert len(products) == (1 if case in SMALL else 2 if "backward" in case else 3)
    for kernel in products:
        assert bool(kernel["tensor"]) == ("ieee" not in case), kernel
        # A block of a small problem is too low for Hopper's own instructions, of 64 rows.
        if case in CASES and case.startswith("sm_90") and "float32" not in case:
            assert kernel["wgmma"], kernel
