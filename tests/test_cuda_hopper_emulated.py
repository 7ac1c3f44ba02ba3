"""csrc/cuda/hopper_*.cu on emulated threads, against float64: tiles, masks, tails, and who waits for whom.

The emulation (`cuda_emulation/hopper_ptx.h`) runs the kernels' own source, with transaction barriers, TMA boxes and
wgmma as the PTX manual describes them. It shows neither speed nor what the manual does not say.
"""

import ctypes
import math
from typing import NamedTuple

import cuda_emulated
import pytest
import torch
from torch import Tensor

TYPES = {torch.bfloat16: 2, torch.float16: 3}
LOG2_E = math.log2(math.e)


class Side(ctypes.Structure):
    _fields_ = [
        ("units", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("padded", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
    ]


class Pass(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("width", ctypes.c_int),
        ("groups", ctypes.c_int64),
        ("own", Side),
        ("other", Side),
        ("temperature", ctypes.c_float),
        ("device_temperature", ctypes.c_void_p),
        ("diagonal", ctypes.c_bool),
        ("same", ctypes.c_bool),
    ]


class LogsumexpPass(ctypes.Structure):
    _fields_ = [
        ("both", Pass),
        ("bounded", ctypes.c_bool),
        ("only_running", ctypes.c_bool),
        ("splits", ctypes.c_int64),
        ("column_parts", ctypes.c_int64),
        ("highest", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("diagonal_cosine", ctypes.c_void_p),
        ("column_total", ctypes.c_void_p),
    ]


class GradientPass(ctypes.Structure):
    _fields_ = [
        ("both", Pass),
        ("own_share", ctypes.c_void_p),
        ("own_shift", ctypes.c_void_p),
        ("other_share", ctypes.c_void_p),
        ("other_shift", ctypes.c_void_p),
        ("largest", ctypes.c_void_p),
        ("splits", ctypes.c_int64),
        ("gradient", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def logsumexp(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(
        str(cuda_emulated.build(tmp_path_factory.mktemp("hopper"), "hopper_logsumexp"))
    )


@pytest.fixture(scope="module")
def gradient(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(
        str(cuda_emulated.build(tmp_path_factory.mktemp("hopper"), "hopper_gradient"))
    )


class Problem(NamedTuple):
    """Unit vectors of both sides, padded, and what a pass says of them."""

    own: Tensor  # [groups, padded, width]
    other: Tensor
    counts: tuple[int, int]
    tau: float
    diagonal: bool

    @property
    def k(self) -> float:
        return LOG2_E / self.tau

    def cosines(self) -> Tensor:
        """[groups, own count, other count] in float64, −∞ where a pair does not count."""
        own, other = (
            side[:, :count].double()
            for side, count in zip((self.own, self.other), self.counts, strict=True)
        )
        cosines = own @ other.mT
        if not self.diagonal:
            cosines.diagonal(dim1=1, dim2=2).fill_(-math.inf)
        return cosines

    def described(self) -> Pass:
        sides = [
            Side(side.data_ptr(), count, side.shape[1], None)
            for side, count in zip((self.own, self.other), self.counts, strict=True)
        ]
        groups, _, width = self.own.shape
        return Pass(TYPES[self.own.dtype], width, groups, *sides, self.tau, None, self.diagonal)


def problem_of(
    groups: int,
    counts: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    tau: float = 0.1,
    diagonal: bool = False,
) -> Problem:
    generator = torch.Generator().manual_seed(0)
    sides = []
    for count in counts:
        vectors = torch.randn(groups, count, width, generator=generator)
        padded = torch.zeros(groups, (count + 255) // 256 * 256, width, dtype=dtype)
        padded[:, :count] = torch.nn.functional.normalize(vectors, dim=-1).to(dtype)
        sides.append(padded)
    return Problem(*sides, counts, tau, diagonal)


def filled(*shape: int) -> Tensor:
    return torch.full(shape, math.nan)


def fixed_shift(problem: Problem) -> float:
    """As packed.h has it; NaN where only a running maximum will do."""
    scale = 1.01 / problem.tau
    shift = max(0.0, scale + math.log(max(problem.counts)) - 87)
    return shift * LOG2_E if scale + shift < 87 else math.nan


class Found(NamedTuple):
    highest: Tensor  # [splits, groups, count]
    total: Tensor
    positive: Tensor  # [groups, min of counts]
    down: Tensor | None  # [groups, columns]


def run_logsumexp(
    library: ctypes.CDLL, problem: Problem, columns: bool, processors: int, splits: int | None
) -> Found:
    groups, padded, _ = problem.own.shape
    given = LogsumexpPass(problem.described(), True, False)
    library.logsumexp_plan(ctypes.byref(given), columns, processors)
    if splits is not None:
        given.splits = splits
    highest, total = (filled(given.splits, groups, padded) for _ in range(2))
    positive = filled(groups, padded)
    down = filled(given.column_parts, groups, problem.other.shape[1])
    given.highest, given.total = highest.data_ptr(), total.data_ptr()
    given.diagonal_cosine = positive.data_ptr()
    given.column_total = down.data_ptr() if columns else None
    assert library.logsumexp(ctypes.byref(given), processors) == 0
    rows, others = problem.counts
    return Found(
        highest[..., :rows],
        total[..., :rows],
        positive[:, : min(rows, others)],
        down.double().sum(0)[:, :others] if columns else None,
    )


def check_logsumexp(
    library: ctypes.CDLL,
    problem: Problem,
    *,
    columns: bool = False,
    processors: int = 3,
    splits: int | None = None,
) -> Found:
    """To the rounding of a cosine in float32, which a sum of exponentials shows k times as large."""
    found = run_logsumexp(library, problem, columns, processors, splits)
    cosines, k = problem.cosines(), problem.k
    bound = 2**-22 * (1 + k)
    torch.testing.assert_close(
        found.highest.amax(0).double(), cosines.amax(-1), rtol=0, atol=2**-21
    )
    shift = fixed_shift(problem)
    if math.isnan(shift):
        parts = found.total.double().log2() + found.highest.double() * k
        lse = (parts * math.log(2)).logsumexp(0)
        expected = (cosines / problem.tau).logsumexp(-1)
        torch.testing.assert_close(lse, expected, rtol=bound, atol=bound)
    else:
        exponentials = (cosines * k - shift).exp2()
        total = found.total.double().sum(0)
        torch.testing.assert_close(total, exponentials.sum(-1), rtol=bound, atol=0)
        if found.down is not None:
            torch.testing.assert_close(found.down, exponentials.sum(-2), rtol=bound, atol=0)
    own, other = (side[:, : found.positive.shape[1]].double() for side in problem[:2])
    torch.testing.assert_close(found.positive.double(), (own * other).sum(-1), rtol=0, atol=2**-21)
    return found


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", TYPES)
def test_sums(logsumexp, dtype, width, columns):
    """Two groups, tails of both sides, more work than processors."""
    check_logsumexp(logsumexp, problem_of(2, (300, 140), width, dtype), columns=columns)


@pytest.mark.parametrize("tau", [0.001, 0.0125, 10.0])
def test_sums_at_any_temperature(logsumexp, tau):
    """At 0.001 by a running maximum, at 0.0125 with a shift that is not 0; through all stages more than once."""
    problem = problem_of(1, (70, 900), 128, torch.bfloat16, tau)
    check_logsumexp(logsumexp, problem, columns=True, splits=1)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_sums_of_a_square_in_parts(logsumexp, splits, diagonal):
    """Columns in several parts, of several row blocks each: two processors have three blocks of rows."""
    problem = problem_of(1, (600, 600), 64, torch.float16, diagonal=diagonal)
    check_logsumexp(logsumexp, problem, columns=True, processors=2, splits=splits)


def run_gradient(
    library: ctypes.CDLL,
    problem: Problem,
    terms: tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None],
    splits: int | None = None,
) -> Tensor:
    """[groups, own count, width]; a term is (share, shift), each [groups, count]."""
    groups = len(problem.own)
    given = GradientPass(problem.described())
    library.gradient_plan(ctypes.byref(given), 3)
    if splits is not None:
        given.splits = splits
    kept = []
    for name, side, term in zip(("own", "other"), problem[:2], terms, strict=True):
        if term is None:
            continue
        share, shift = (
            torch.zeros(groups, side.shape[1]),
            torch.full((groups, side.shape[1]), math.inf),
        )
        share[:, : term[0].shape[1]], shift[:, : term[1].shape[1]] = term
        kept += [share, shift]
        setattr(given, f"{name}_share", share.data_ptr())
        setattr(given, f"{name}_shift", shift.data_ptr())
    largest = torch.stack([t[0].abs().amax(1) for t in terms if t is not None]).amax(0)
    gradient = filled(given.splits, *problem.own.shape)
    given.largest, given.gradient = largest.data_ptr(), gradient.data_ptr()
    assert library.gradient(ctypes.byref(given), 3) == 0
    return gradient.double().sum(0)[:, : problem.counts[0]]


def softmax_term(problem: Problem, dimension: int) -> tuple[Tensor, Tensor]:
    """Any weights, and shifts that make exponentials a softmax."""
    shift = (problem.cosines() / problem.tau).logsumexp(dimension) * LOG2_E
    share = torch.linspace(-1, 2, shift.numel()).view(shift.shape) / 64
    return share, shift.float().masked_fill(shift == -math.inf, math.inf)


def check_gradient(
    library: ctypes.CDLL, problem: Problem, which: tuple[bool, bool], splits: int | None = None
) -> Tensor:
    """At most twice the error of rounding every coefficient to the embeddings' dtype, and float32's own."""
    terms = tuple(
        softmax_term(problem, dimension) if wanted else None
        for dimension, wanted in zip((-1, -2), which, strict=True)
    )
    found = run_gradient(library, problem, terms, splits)
    cosines, others = problem.cosines(), problem.other[:, : problem.counts[1]].double()
    coefficients, rounded = torch.zeros_like(cosines), torch.zeros_like(cosines)
    dtype = problem.own.dtype
    for axis, term in zip((2, 1), terms, strict=True):
        if term is not None:
            share, shift = (t.double().unsqueeze(axis) for t in term)
            probabilities = (cosines * problem.k - shift).exp2()
            coefficients += share * probabilities
            rounded += share * probabilities.to(dtype).double()
    expected, plain = coefficients @ others, rounded @ others
    error, allowed = (found - expected).norm(), (plain - expected).norm()
    assert error <= 2 * allowed + 2**-20 * (1 + problem.k) * expected.norm()
    return found


@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", TYPES)
def test_gradients(gradient, dtype, width, which):
    """Two groups, tails of both sides, more work than processors."""
    check_gradient(gradient, problem_of(2, (140, 200), width, dtype), which)


@pytest.mark.parametrize("tau", [0.001, 0.0125, 10.0])
def test_gradients_at_any_temperature(gradient, tau):
    """Through all stages more than once."""
    problem = problem_of(1, (70, 900), 64, torch.bfloat16, tau)
    check_gradient(gradient, problem, (True, True), splits=1)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_gradients_of_a_square_in_parts(gradient, splits, diagonal):
    """Some tiles lie on the diagonal."""
    problem = problem_of(1, (300, 300), 64, torch.float16, diagonal=diagonal)
    check_gradient(gradient, problem, (True, True), splits)


@pytest.mark.parametrize(
    ("setting", "value"), [("HDC_EMULATION_ORDER", "reverse"), ("HDC_EMULATION_COPIES", "early")]
)
def test_same_bits_whoever_is_first(logsumexp, gradient, setting, value, monkeypatch):
    """Threads in another order, copies and products as early as possible rather than as late."""
    problem = problem_of(1, (140, 900), 128, torch.bfloat16)

    def found() -> list[Tensor]:
        sums = check_logsumexp(logsumexp, problem, columns=True, splits=1)
        return [*sums, check_gradient(gradient, problem, (True, True), splits=1)]

    expected = found()
    monkeypatch.setenv(setting, value)
    assert all(map(torch.equal, found(), expected))
