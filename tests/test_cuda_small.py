"""csrc/cuda/small.cu on emulated warps, against float64, and what its compiled code needs.

The emulation (`cuda_emulation/`) compiles the kernel's own source with g++: every thread is a fiber, and mma.sync
and ldmatrix follow the PTX manual's fragments. It shows neither speed nor the rounding inside a tensor core.
"""

import ctypes
import itertools
import math
import struct

import cuda_emulated
import pytest
import torch
import torch.nn.functional as F
from contrast_problems import exact, problems_of, spread, vectors
from cuda_objects import CSRC, assert_nothing_spills
from torch import Tensor

from hdc_kernels.backends import Gradients, Problems, Terms
from hdc_kernels.backends.outputs import empty_gradients, empty_rows

FORWARD, BACKWARD, STEP = range(3)
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
CALL, PROBLEM = struct.Struct("9qd9P"), struct.Struct("Pqq" * 4 + "4qd2P")
# Bytes of shared memory that a block may have, by compute capability: the programming guide's table.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 90: 232_448}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = ctypes.CDLL(str(cuda_emulated.build(tmp_path_factory.mktemp("small"), "small")))
    library.workspace.restype = library.static_bytes.restype = ctypes.c_int64
    library.fits.restype = ctypes.c_bool
    library.room.argtypes = [ctypes.c_int] * 4 + [ctypes.c_int64, ctypes.c_void_p]
    library.room.restype = None
    return library


@pytest.fixture
def kernel(library: ctypes.CDLL) -> ctypes.CDLL:
    """On an A100, unless a test calls `set_device`."""
    library.set_device(108, SHARED_MEMORY[80])
    return library


def describe(task, problems, terms, gradients, upstream, workspace) -> tuple[bytes, bytes]:
    """The structs of contrast.h."""
    packed = bytearray()
    for k, (x, y, weight) in enumerate(zip(problems.x, problems.y, problems.weights, strict=True)):
        slopes = [side[k] if side else None for side in (gradients or ((), ()))[:2]]
        matrices = [x, y, *slopes]
        for t in matrices:
            packed += struct.pack(
                "Pqq", *((t.data_ptr(), *t.stride()[:2]) if t is not None else (0, 0, 0))
            )
        packed += struct.pack("4qd2P", *x.shape[:2], *y.shape[1:], weight, 0, 0)
    tau = problems.temperature
    learned = isinstance(tau, Tensor)
    call = CALL.pack(
        task,
        DTYPES[problems.x[0].dtype],
        0,
        problems.normalize,
        problems.symmetric,
        len(problems.x),
        1,
        0,
        0,
        0.0 if learned else tau,
        tau.data_ptr() if learned else 0,
        *(t.data_ptr() for t in (terms.total, terms.loss, terms.hits, terms.lse)),
        upstream.data_ptr() if upstream is not None else 0,
        gradients.temperature.data_ptr() if gradients else 0,
        workspace.data_ptr() if workspace is not None else 0,
        0,
    )
    return call, bytes(packed)


def run(kernel, problems: Problems, upstream: Tensor | None = None) -> tuple[Terms, Gradients]:
    """STEP, or with `upstream` FORWARD and BACKWARD."""
    terms = Terms(torch.full((), math.nan), *empty_rows(problems))
    dtype = torch.float32 if upstream is None else None
    gradients = Gradients(
        empty_gradients(problems.x, dtype),
        empty_gradients(problems.y, dtype) if problems.needs_y else (),
        torch.full((), math.nan),
    )
    for t in (*gradients.x, *gradients.y, terms.loss, terms.lse):
        t.fill_(math.nan)
    call, packed = describe(STEP, problems, terms, gradients, None, None)
    workspace = torch.full((kernel.workspace(call, packed),), 255, dtype=torch.uint8)
    if upstream is None:
        call, packed = describe(STEP, problems, terms, gradients, None, workspace)
        assert kernel.contrast(call, packed) == 0
        return terms, gradients
    call, packed = describe(FORWARD, problems, terms, None, None, workspace)
    assert kernel.contrast(call, packed) == 0
    call, packed = describe(BACKWARD, problems, terms, gradients, upstream, workspace)
    assert kernel.contrast(call, packed) == 0
    return terms, gradients


def plain(problems: Problems, upstream: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Terms and gradients (x…, y…) as one writes them without this library, in the embeddings' dtype."""
    sides = [[t.detach().clone().requires_grad_() for t in side] for side in problems[:2]]
    losses = []
    for x, y in zip(*sides, strict=True):
        if problems.normalize:
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        logits = x @ y.mT / float(problems.temperature)
        own = torch.arange(x.shape[1]).expand(x.shape[:2])
        loss = F.cross_entropy(logits.mT, own, reduction="none")
        if problems.symmetric:
            loss = (loss + F.cross_entropy(logits, own, reduction="none")) / 2
        losses.append(loss.flatten())
    loss = torch.cat(losses)
    factors = spread(problems) if upstream is None else upstream
    return loss.detach(), list(
        torch.autograd.grad(loss, [*sides[0], *sides[1]], factors.to(loss.dtype))
    )


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm())


def check(kernel, problems: Problems, upstream: Tensor | None = None) -> tuple[Terms, Gradients]:
    """At most twice plain PyTorch's error, and a rounding of the result and of the logits; what was found."""
    expected_terms, expected = exact(problems, upstream)
    loss, slopes = plain(problems, upstream)
    terms, gradients = run(kernel, problems, upstream)
    unit = torch.finfo(problems.x[0].dtype).eps
    slack = unit + 2.0**-25 / float(problems.temperature)
    assert error(terms.loss, expected_terms.loss) <= 2 * error(loss, expected_terms.loss) + slack
    assert error(terms.lse, expected_terms.lse) <= slack + unit
    truths = [*expected.x, *expected.y]
    for mine, theirs, truth in zip([*gradients.x, *gradients.y], slopes, truths, strict=True):
        assert error(mine, truth) <= 2 * error(theirs, truth) + slack
    assert error(gradients.temperature, expected.temperature) <= 20 * slack
    if upstream is None:
        assert float(terms.total) == pytest.approx(float(expected_terms.total), rel=10 * unit)
    return terms, gradients


def assert_same(one: tuple[Terms, Gradients], other: tuple[Terms, Gradients]) -> None:
    """Bit by bit."""
    assert all(map(torch.equal, one[0][:4], other[0][:4]))
    assert all(map(torch.equal, vectors(one[1]), vectors(other[1])))
    assert torch.equal(one[1].temperature, other[1].temperature)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shapes", [[(2, 19, 23, 17), (1, 33, 40, 64)], [(1, 70, 90, 96)], [(1, 37, 37, 200)]]
)
def test_agrees_with_float64(kernel, shapes, dtype, symmetric):
    shapes = [(G, M, M if symmetric else N, D) for G, M, N, D in shapes]
    check(kernel, problems_of(shapes, dtype, tau=0.1, symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_any_upstream(kernel, dtype, symmetric):
    problems = problems_of([(2, 20, 20, 24), (1, 17, 17, 33)], dtype, tau=0.1, symmetric=symmetric)
    check(kernel, problems, torch.linspace(-1, 2, 57))


def test_one_problem_of_the_paper(kernel):
    """128 × 128 × 128 and a learnt temperature, rows first in memory."""
    problems = problems_of(
        [(1, 128, 128, 128)],
        torch.bfloat16,
        tau=torch.tensor(0.07),
        layout=lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    )
    check(kernel, problems)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_order_of_threads(kernel, dtype, monkeypatch):
    """What races between barriers would depend on which thread runs first."""
    problems = problems_of([(2, 40, 40, 40)], dtype, symmetric=True)
    results = run(kernel, problems)
    monkeypatch.setenv("HDC_EMULATION_ORDER", "reverse")
    assert_same(results, run(kernel, problems))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_row_has_no_loss(kernel, dtype):
    terms, gradients = run(kernel, problems_of([(2, 1, 1, 5)], dtype, symmetric=True))
    assert terms.loss.tolist() == [0, 0]
    assert (terms.lse == -math.inf).all()
    assert not gradients.x[0].any()
    assert not gradients.y[0].any()


def test_gradients_that_nobody_needs(kernel):
    """A queue of keys has none; that of x is the same."""
    problems = problems_of([(1, 70, 80, 20)])
    _, expected = run(kernel, problems)
    _, gradients = run(kernel, problems._replace(needs_y=False))
    assert torch.equal(gradients.x[0], expected.x[0])
    assert error(gradients.temperature, expected.temperature.double()) < 1e-5


def test_hits_ties_zeros_and_nan(kernel):
    problems = problems_of([(1, 30, 30, 24)], torch.bfloat16, tau=0.1)
    x, y = problems.x[0], problems.y[0]
    y[:, :20] = x[:, :20]  # these hit
    y[0, 21] = x[0, 5]  # but row 5 ties
    y[0, 25] = 0
    x[0, 27] = 0
    terms, gradients = run(kernel, problems)
    expected_terms, _ = exact(problems)
    assert torch.equal(terms.hits, expected_terms.hits)
    assert terms.hits[:20].sum() == 19
    assert not gradients.y[0][0, 25].any()
    assert not gradients.x[0][0, 27].any()
    x[0, 3, 2] = math.nan
    terms, _ = run(kernel, problems)
    assert terms.loss.isnan().nonzero().flatten().tolist() == [3]
    assert not terms.hits[3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_once_converged(kernel, dtype):
    problems = problems_of([(1, 48, 48, 32)], dtype, tau=0.07)
    noisy = (problems.x[0].float() + 0.05 * problems.y[0].float()).to(dtype)
    check(kernel, problems._replace(y=(noisy,)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_in_the_least_memory(kernel, dtype):
    """256 × 256 × 256 where a window holds a quarter of a side; each of three blocks has several tiles."""
    kernel.set_device(3, SHARED_MEMORY[86])
    check(kernel, problems_of([(1, 256, 256, 256)], dtype, tau=0.1))


@pytest.mark.parametrize(
    ("dtype", "symmetric"),
    [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)],
)
def test_same_bits_in_any_windows(kernel, dtype, symmetric, monkeypatch):
    """Several pairs, in windows of every length, or whole; in any order of threads."""
    shapes = [(1, 130, 256, 200), (1, 70, 90, 64)]
    shapes = [(G, M, M if symmetric else N, D) for G, M, N, D in shapes]
    problems = problems_of(shapes, dtype, tau=0.1, symmetric=symmetric, weights=[1.5, 0.5])
    kernel.set_device(2, SHARED_MEMORY[86])
    results = check(kernel, problems)
    for capability in (80, 90):
        kernel.set_device(2, SHARED_MEMORY[capability])
        assert_same(results, run(kernel, problems))
    kernel.set_device(2, SHARED_MEMORY[86])
    monkeypatch.setenv("HDC_EMULATION_ORDER", "reverse")
    assert_same(results, run(kernel, problems))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_gradients_from_any_number_of_blocks(kernel, dtype):
    """Forward, the blocks of a problem share its rows; backward, its tiles. Some numbers are odd."""
    problems = problems_of([(1, 150, 150, 40)], dtype, tau=0.1, symmetric=True)
    upstream = torch.linspace(-1, 2, 150)
    kernel.set_device(1, SHARED_MEMORY[80])
    terms, gradients = check(kernel, problems, upstream)
    for blocks in (2, 3, 5, 8):
        kernel.set_device(blocks, SHARED_MEMORY[80])
        again, gradients_again = run(kernel, problems, upstream)
        assert all(map(torch.equal, terms[1:4], again[1:4]))
        assert all(map(torch.equal, vectors(gradients), vectors(gradients_again)))
        # These are added up in another order.
        assert float(again.total) == pytest.approx(float(terms.total), rel=1e-6)
        assert error(gradients_again.temperature, gradients.temperature.double()) < 1e-4


def test_what_fits(kernel):
    """Up to 256 rows, columns and dimensions, in every dtype and in up to 24 pairs; no row without a column."""
    answers = {
        ((1, 256, 256, 256),): True,
        ((17, 3, 200, 1),) * 24: True,
        ((1, 3, 3, 8),) * 25: False,
        ((1, 256, 257, 256),): False,
        ((1, 40, 39, 8),): False,
        ((1, 40, 40, 8), (1, 20, 20, 257)): False,
    }
    for dtype in DTYPES:
        for shapes, answer in answers.items():
            problems = problems_of(shapes, dtype)
            terms = Terms(torch.zeros(()), *empty_rows(problems))
            assert kernel.fits(*describe(FORWARD, problems, terms, None, None, None)) == answer


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_everything_has_room(kernel, capability):
    """Windows of whole tiles, or of a whole side, and the teams' sums: in what a block may have."""
    found = (ctypes.c_int64 * 4)()
    most = SHARED_MEMORY[capability] - kernel.static_bytes()
    counts = (1, 32, 33, 64, 65, 96, 100, 128, 129, 160, 200, 224, 225, 256)
    cases = itertools.product(counts, counts, (64, 128, 256), (2, 4))
    for rows, columns, depth, size in cases:
        kernel.room(rows, columns, depth, size, most, found)
        windows, apart, used = found[:2], found[2], found[3]
        units, sums = sum(windows) * (min(depth * size, 512) + 16), 64 * (depth + 4) * 4
        assert used == (units + sums if apart else max(units, sums)) <= most
        for count, window in zip((rows, columns), windows, strict=True):
            whole = -(-count // 32) * 32
            assert window == whole or (window < whole and window % 64 == 0 and window > 0)
    # The paper's problem, in 16 bits, is never loaded twice.
    kernel.room(128, 128, 128, 2, most, found)
    assert found[:3] == [128, 128, capability != 86]


@pytest.mark.parametrize("target", ["80", "86", "90a"])  # 8.9 has the registers and memory of 8.6
def test_nothing_spills_and_products_run_on_tensor_cores(read_kernels, library, target):
    """And shared memory beside what `room_of` deals out is what it takes it to be."""
    kernels = read_kernels(CSRC / "small.cu", target)
    assert_nothing_spills(kernels)
    assert len(kernels) == 9  # three types, three widths
    for kernel in kernels:
        exact = "small_kernelIf" in kernel.name  # of float
        assert ("HMMA" in kernel.instructions) != exact
        assert kernel.shared == library.static_bytes() + (1024 if target == "90a" else 0)


def on_gpu(problems: Problems) -> Problems:
    tau = problems.temperature
    return problems._replace(
        x=tuple(x.cuda() for x in problems.x),
        y=tuple(y.cuda() for y in problems.y),
        temperature=tau.cuda() if isinstance(tau, Tensor) else tau,
    )


@pytest.fixture
def backend():
    from hdc_kernels.backends import cuda

    if not cuda.is_available():
        pytest.skip("the CUDA library was not built")
    return cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_device_agrees_with_emulation(kernel, backend, dtype):
    """They differ by the order of sums inside a tensor core, the last bits of exponentials, and TF32 nowhere."""
    problems = problems_of([(2, 40, 50, 40), (1, 40, 50, 64)], dtype, tau=0.1)
    terms, gradients = backend.step(on_gpu(problems))
    expected_terms, expected = run(kernel, problems)
    bound = torch.finfo(dtype).eps + 2e-6
    assert error(terms.loss.cpu(), expected_terms.loss.double()) < 4e-6
    pairs = zip((*gradients.x, *gradients.y), (*expected.x, *expected.y), strict=True)
    assert all(error(mine.cpu(), theirs.double()) < bound for mine, theirs in pairs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_replays_the_same_bits_a_thousand_times(backend):
    shapes = [(8, 128, 128, 128), (4, 128, 128, 128), (2, 128, 128, 128)] + [(1, 128, 128, 128)] * 3
    problems = on_gpu(problems_of(shapes, torch.bfloat16, tau=torch.tensor(0.07)))
    backend.step(problems)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        terms, gradients = backend.step(problems)
    problems.x[0].copy_(torch.randn_like(problems.x[0]))
    problems.temperature.fill_(0.1)
    expected_terms, expected = backend.step(problems)
    for _ in range(1000):
        graph.replay()
        assert_same((terms, gradients), (expected_terms, expected))
