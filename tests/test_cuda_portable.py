"""csrc/cuda/portable_*.cu on emulated warps, against float64.

The emulation (`cuda_emulation/`) compiles the kernels' own source with g++: every thread is a fiber, fragments are
those of the PTX manual, tensor cores cut off as they add, and copies are made only when they are waited for. It
shows neither speed nor the last bits of exponentials.
"""

import ctypes
import math
import re
from pathlib import Path
from typing import NamedTuple

import cuda_emulated
import pytest
import torch
import torch.nn.functional as F
from cuda_objects import CSRC
from embeddings import randn
from torch import Tensor

KERNELS = {"portable_logsumexp.cu": 8, "portable_gradient.cu": 16}  # by type, and columns or width
TYPES = {"fp32": 0, "tf32": 1, "bf16": 2, "fp16": 3}
STORED = {"bf16": torch.bfloat16, "fp16": torch.float16}
GAIN = {"fp16": 2.0**14}
DEPTH = {"fp32": 512, "tf32": 8, "bf16": 16, "fp16": 16}  # of a step, in dimensions
LOG2_E = 1 / math.log(2)
FEW, MANY = 1, 64  # processors: one split and one part of row blocks, or several


class Shapes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("type", "width", "groups", "own", "other")),
        *((name, ctypes.c_int64) for name in ("diagonal", "same")),
        ("temperature", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("own_units", "other_units", "own_ids", "other_ids")),
    )


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    kernels = [Path(name).stem for name in KERNELS]
    return ctypes.CDLL(
        str(cuda_emulated.build(tmp_path_factory.mktemp("portable"), "portable", kernels))
    )


def tf32(x: Tensor) -> Tensor:
    """To 11 bits, ties away from 0, as cvt.rna."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def rounded(x: Tensor, kind: str) -> Tensor:
    """In float32, to the precision of the type."""
    return tf32(x.float()) if kind == "tf32" else x.to(STORED.get(kind, torch.float32)).float()


def padded(count: int) -> int:
    return -(-count // 256) * 256


class Case(NamedTuple):
    """Two sides of unit vectors as the passes get them, and which pairs count."""

    kind: str
    own: Tensor  # [G, M, D] float32, of the type's precision
    other: Tensor
    tau: float
    diagonal: bool = True
    ids: tuple[Tensor, Tensor] | None = None
    same: bool = False

    @property
    def counts(self) -> Tensor:
        """[G, M, N]"""
        rows, columns = self.own.shape[1], self.other.shape[1]
        out = torch.eye(rows, columns, dtype=torch.bool).expand(len(self.own), -1, -1)
        out = out & (not self.diagonal)
        if self.ids is not None:
            equal = self.ids[0][:, :, None] == self.ids[1][:, None]
            out = out | (equal != self.same)
        return ~out

    def stored(self, x: Tensor) -> Tensor:
        """[G, padded, width], 0 beyond."""
        width = next(w for w in (64, 128, 256, 512) if w >= x.shape[2])
        whole = F.pad(x, (0, width - x.shape[2], 0, padded(x.shape[1]) - x.shape[1]))
        return whole.to(STORED.get(self.kind, torch.float32)).contiguous()

    def logits(self, dtype: torch.dtype) -> Tensor:
        """In base 2, −∞ where a pair does not count."""
        products = self.own.to(dtype) @ self.other.to(dtype).mT * (LOG2_E / self.tau)
        return products.masked_fill(~self.counts, -math.inf)

    def described(self) -> tuple[Shapes, list[Tensor]]:
        """And what must live as long."""
        tensors = [self.stored(self.own), self.stored(self.other), *(self.ids or ())]
        pointers = [t.data_ptr() for t in tensors] + [None] * (4 - len(tensors))
        counts = (len(self.own), self.own.shape[1], self.other.shape[1])
        width = tensors[0].shape[2]
        flags = (self.diagonal, self.same, self.tau)
        return Shapes(TYPES[self.kind], width, *counts, *flags, *pointers), tensors


def case(kind: str, shape: tuple[int, int, int, int], tau: float = 0.1, **options) -> Case:
    """Random unit vectors [G, M, D] and [G, N, D]; the first columns are near the rows."""
    G, M, N, D = shape
    own = F.normalize(randn(G, M, D, seed=1).double(), dim=-1)
    other = F.normalize(randn(G, N, D, seed=2).double(), dim=-1)
    near = min(M, N) // 2
    other[:, :near] = F.normalize(own[:, :near] + 0.1 * other[:, :near], dim=-1)
    return Case(kind, rounded(own, kind), rounded(other, kind), tau, **options)


def with_ids(some: Case, same: bool) -> Case:
    """Every third vector has the same id."""
    ids = tuple(torch.arange(x.shape[1]).remainder(3).repeat(len(x), 1) for x in some[1:3])
    return some._replace(ids=ids, same=same)


def plan(kernel: ctypes.CDLL, name: str, *arguments) -> ctypes.Array:
    found = (ctypes.c_int64 * 2)()
    getattr(kernel, f"{name}_plan")(*arguments, found)
    return found


def empty(*shape: int) -> Tensor:
    return torch.full(shape, math.nan)


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


class Sums(NamedTuple):
    highest: Tensor  # [splits, G, padded]
    total: Tensor
    own: Tensor  # [G, padded]
    columns: Tensor | None  # [parts, G, padded]


def logsumexp(
    kernel: ctypes.CDLL,
    some: Case,
    *,
    processors: int = FEW,
    columns: bool = False,
    bounded: bool = True,
    only_running: bool = False,
) -> Sums:
    shapes, alive = some.described()
    splits, parts = found = plan(
        kernel, "logsumexp", ctypes.byref(shapes), columns, ctypes.c_int(processors)
    )
    G, M, N = len(some.own), padded(some.own.shape[1]), padded(some.other.shape[1])
    sums = Sums(
        empty(splits, G, M),
        empty(splits, G, M),
        empty(G, M),
        empty(parts, G, N) if columns else None,
    )
    error = kernel.logsumexp(
        ctypes.byref(shapes), bounded, only_running, found, *(pointer(x) for x in sums)
    )
    assert error == 0
    assert alive
    return sums


def shift_of(some: Case, bounded: bool = True) -> float:
    """`fixed_shift` in packed.h, in base 2; NaN where there is a running maximum."""
    longest = max(some.own.shape[1], some.other.shape[1])
    scale = 1.01 / some.tau
    shift = max(0.0, scale + math.log(longest) - 87)
    return shift * LOG2_E if bounded and scale + shift < 87 else math.nan


def joined(some: Case, sums: Sums, bounded: bool = True) -> Tensor:
    """log2 of the rows' sums [G, M] in float64, from all splits."""
    rows = some.own.shape[1]
    shift, totals = shift_of(some, bounded), sums.total[..., :rows].double()
    if not math.isnan(shift):
        return totals.sum(0).log2() + shift
    parts = totals.log2() + sums.highest[..., :rows].double() * (LOG2_E / some.tau)
    return torch.logsumexp(parts / LOG2_E, 0) * LOG2_E


def log2sumexp2(x: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(x / LOG2_E, dim) * LOG2_E


def assert_near(found: Tensor, plain: Tensor, truth: Tensor, slack: float) -> None:
    """The largest error is at most twice plain PyTorch's, and a rounding or two."""
    finite = truth.isfinite()
    assert torch.equal(found.isfinite(), finite)
    if finite.any():
        error, bound = ((x.double() - truth)[finite].abs().max().item() for x in (found, plain))
        assert error <= 2 * bound + slack * max(1.0, truth[finite].abs().max().item())


def check_sums(kernel, some: Case, **options) -> Sums:
    bounded = options.get("bounded", True)
    sums = logsumexp(kernel, some, **options)
    truth, plain = some.logits(torch.float64), some.logits(torch.float32)
    rows, other = some.own.shape[1], some.other.shape[1]
    # Every step of a product cuts off less than a unit; fp32 adds its steps in float32.
    unit = 2.0**-23 * max(1, some.own.shape[2] // DEPTH[some.kind])
    assert_near(joined(some, sums, bounded), log2sumexp2(plain, 2), log2sumexp2(truth, 2), unit)
    highest = sums.highest[..., :rows].amax(0).double() * (LOG2_E / some.tau)
    assert_near(highest, plain.amax(2), truth.amax(2), unit)
    both = min(rows, other)
    exact = (some.own.double() @ some.other.double().mT).diagonal(dim1=1, dim2=2)
    assert_near(
        sums.own[:, :both], (some.own @ some.other.mT).diagonal(dim1=1, dim2=2), exact, unit
    )
    if sums.columns is not None and not math.isnan(shift_of(some, bounded)):
        columns = sums.columns[..., :other].double().sum(0).log2() + shift_of(some, bounded)
        assert_near(columns, log2sumexp2(plain, 1), log2sumexp2(truth, 1), unit)
    return sums


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(2, 140, 150, 40), (1, 20, 130, 128), (1, 30, 20, 300)])
def test_sums_of_rows_and_columns(kernel, kind, shape):
    check_sums(kernel, case(kind, shape), columns=True)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_widest_and_256(kernel, kind):
    """More chunks of a row than stay in shared memory."""
    for width in (256, 512):
        check_sums(kernel, case(kind, (1, 17, 19, width)), columns=True)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_sums_of_several_splits_and_row_blocks_in_turn(kernel, kind):
    """One block has all rows, or there are blocks for every tile; the sums of columns are the same bit by bit."""
    some = case(kind, (1, 260, 270, 64))
    alone = check_sums(kernel, some, columns=True, processors=1)
    spread = check_sums(kernel, some, columns=True, processors=MANY)
    assert len(alone.columns) < 3 == len(spread.columns)
    assert len(alone.total) == 1 < len(spread.total)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("same", [None, False, True])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_masks(kernel, kind, same, diagonal):
    some = case(kind, (2, 131, 140, 24), diagonal=diagonal)
    some = some if same is None else with_ids(some, same)
    for bounded in (True, False):
        check_sums(kernel, some, columns=True, bounded=bounded)


@pytest.mark.parametrize("tau", [1e-3, 0.0118, 0.0125, 1.0, 10.0])
def test_any_temperature(kernel, tau):
    """Below 0.012 a running maximum takes the fixed shift's place, and there are no sums of columns."""
    for kind in ("fp32", "fp16"):
        sums = check_sums(kernel, case(kind, (1, 40, 200, 32), tau), columns=True, processors=MANY)
        assert sums.columns[..., :200].isnan().all() == (tau < 0.012)


def test_a_pass_for_the_columns_alone(kernel):
    """Where the first pass had a fixed shift it does nothing."""
    some = case("bf16", (1, 40, 30, 32))
    assert logsumexp(kernel, some, only_running=True).total.isnan().all()
    check_sums(kernel, some, only_running=True, bounded=False)


def test_rows_of_which_nothing_counts(kernel):
    some = with_ids(case("bf16", (1, 40, 30, 32)), True)
    some.ids[0][0, 7] = 99
    for bounded in (True, False):
        sums = check_sums(kernel, some, bounded=bounded)
        assert sums.highest[0, 0, 7] == -math.inf
        assert sums.total[0, 0, 7] == 0


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"), [("fp32", (1, 140, 150, 128)), ("bf16", (1, 260, 140, 64))]
)
def test_sums_have_the_same_bits_in_any_order(kernel, kind, shape, bounded, monkeypatch):
    """A race would depend on which thread runs first, or on when a copy is made.

    Two row blocks in turn, of four chunks that come with every tile, or of one that stays over all tiles.
    """
    some = case(kind, shape)
    first = logsumexp(kernel, some, columns=True, bounded=bounded)
    for name, value in (("ORDER", "reverse"), ("COPIES", "early")):
        monkeypatch.setenv(f"HDC_EMULATION_{name}", value)
        again = logsumexp(kernel, some, columns=True, bounded=bounded)
        assert all(
            torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, again, strict=True)
        )


class Terms(NamedTuple):
    """Of a gradient: shares and shifts [G, M] of rows and [G, N] of columns, or None."""

    own: tuple[Tensor, Tensor] | None
    other: tuple[Tensor, Tensor] | None

    @property
    def largest(self) -> Tensor:
        """[G]"""
        return torch.stack([t[0].abs().amax(1) for t in self if t is not None]).amax(0)


def terms(some: Case, sides: str) -> Terms:
    """Probabilities along rows and columns, with weights of either sign."""
    logits, sums = some.logits(torch.float64), []
    for dim, side in ((2, "own"), (1, "other")):
        lse = log2sumexp2(logits, dim).float()
        share = torch.linspace(-0.5, 1.5, lse.shape[1]).expand_as(lse) / lse.shape[1]
        lse = lse.masked_fill(lse == -math.inf, math.inf)  # exponentials of nothing are 0
        sums.append((share, lse) if sides in (side, "both") else None)
    return Terms(*sums)


def coefficients(some: Case, parts: Terms, dtype: torch.dtype) -> Tensor:
    """[G, M, N]"""
    logits, found = some.logits(dtype), 0.0
    for part, dim in zip(parts, (2, 1), strict=True):
        if part is not None:
            share, shift = (t.to(dtype).unsqueeze(dim) for t in part)
            found = found + share * torch.exp2(logits - shift)
    return found


def gradient(kernel: ctypes.CDLL, some: Case, parts: Terms, processors: int = FEW) -> Tensor:
    """[splits, G, M, width]"""
    shapes, alive = some.described()
    splits, _ = found = plan(kernel, "gradient", ctypes.byref(shapes), ctypes.c_int(processors))
    rows = some.own.shape[1]
    result = empty(splits, len(some.own), padded(rows), shapes.width)
    tensors = []
    for part in parts:
        for x, beyond in zip(part or (None, None), (0.0, math.inf), strict=True):
            whole = x if x is None else F.pad(x, (0, padded(x.shape[1]) - x.shape[1]), value=beyond)
            tensors.append(whole)
    largest = parts.largest.contiguous()
    error = kernel.gradient(
        ctypes.byref(shapes), found, *(pointer(x) for x in (*tensors, largest, result))
    )
    assert error == 0
    assert alive
    return result[:, :, :rows]


def check_gradient(kernel, some: Case, sides: str = "both", processors: int = FEW) -> Tensor:
    parts = terms(some, sides)
    found = gradient(kernel, some, parts, processors)
    width = some.own.shape[2]
    assert not found[..., width:].any()
    truth = coefficients(some, parts, torch.float64) @ some.other.double()
    # What everyone does: float32 up to the coefficients, rounded for the second product; but without their vanishing.
    gain = GAIN.get(some.kind, 1.0) / parts.largest[:, None, None]
    wide = coefficients(some, parts, torch.float32)
    plain = (rounded(wide * gain, some.kind) @ some.other) / gain
    error, bound = (
        float((x.double() - truth).norm() / truth.norm())
        for x in (found.double().sum(0)[..., :width], plain)
    )
    # Every step of the products cuts off less than a unit; fp32 adds its steps in float32.
    steps = max(1, (width + some.other.shape[1]) // DEPTH[some.kind])
    assert error <= 2 * bound + 2.0**-24 * steps * max(1.0, 1 / some.tau)
    return found


@pytest.mark.parametrize("sides", ["own", "other", "both"])
@pytest.mark.parametrize("kind", TYPES)
def test_gradient_by_terms(kernel, kind, sides):
    check_gradient(kernel, case(kind, (2, 140, 75, 40)), sides)


@pytest.mark.parametrize("width", [128, 200, 512])
@pytest.mark.parametrize("kind", TYPES)
def test_gradient_of_any_width(kernel, kind, width):
    check_gradient(kernel, case(kind, (1, 37, 70, width)))


@pytest.mark.parametrize("kind", TYPES)
def test_gradient_of_several_splits(kernel, kind):
    found = check_gradient(kernel, case(kind, (2, 40, 200, 64)), processors=MANY)
    assert len(found) > 1


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("same", [None, False, True])
@pytest.mark.parametrize(("kind", "width"), [("fp32", 24), ("bf16", 24), ("tf32", 256)])
def test_gradient_masks(kernel, kind, width, same, diagonal):
    some = case(kind, (2, 35, 70, width), diagonal=diagonal)
    check_gradient(kernel, some if same is None else with_ids(some, same))


@pytest.mark.parametrize("tau", [1e-3, 0.01, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_gradient_at_any_temperature(kernel, kind, tau):
    check_gradient(kernel, case(kind, (1, 40, 100, 32), tau))


def test_gradient_of_rows_of_which_nothing_counts(kernel):
    some = with_ids(case("bf16", (1, 40, 30, 32)), True)
    some.ids[0][0, 7] = 99
    for sides in ("own", "both"):
        assert not check_gradient(kernel, some, sides)[0, 0, 7].any()


@pytest.mark.parametrize(("kind", "width"), [("fp32", 64), ("fp32", 256), ("bf16", 512)])
def test_gradients_have_the_same_bits_in_any_order(kernel, kind, width, monkeypatch):
    some = case(kind, (1, 50, 100, width))
    parts = terms(some, "both")
    first = gradient(kernel, some, parts)
    for name, value in (("ORDER", "reverse"), ("COPIES", "early")):
        monkeypatch.setenv(f"HDC_EMULATION_{name}", value)
        assert torch.equal(gradient(kernel, some, parts), first)


@pytest.mark.parametrize("source", KERNELS)
def test_every_kernel_multiplies_on_tensor_cores_and_copies_beside(read_kernels, source):
    kernels = read_kernels(CSRC / source, "80")
    assert len(kernels) == KERNELS[source]
    for kernel in kernels:
        kind = int(re.search(r"TypeE(\d)E", kernel.name)[1])
        depth = "16816" if kind in (TYPES["bf16"], TYPES["fp16"]) else "1688"
        assert set(re.findall(r"HMMA\.(\d+)", kernel.instructions)) == {depth}
        assert "LDGSTS" in kernel.instructions
        assert "MUFU.EX2" in kernel.instructions
