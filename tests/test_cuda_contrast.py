"""Backend "cuda" as sm_80 runs it, but for small problems, against float64, on one CPU core.

The emulation (`cuda_emulation/`) compiles the sources of csrc/cuda with g++; the backend's own Python calls it, on CPU
tensors. What takes small problems whole has a test of its own, `test_cuda_small.py`.
"""

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import cuda_emulated
import pytest
import torch
from contrast_problems import LAYOUTS, embeddings_of, exact, plainly, problems_of, spread, vectors
from equations import relative_error
from torch import Tensor

from hdc_kernels.backends import Detail, Gradients, Mask, Problems, Terms, cuda, plain

SOURCES = (
    "contrast",
    "pack",
    "portable_logsumexp",
    "terms",
    "weights",
    "portable_gradient",
    "unpack",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32 = 2.0**-21  # a few roundings


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The sources, for one emulated device."""
    flags = ["-D__CUDA_ARCH_LIST__=800,860,900", "-DHDC_CUDA_PTX=100"]
    return cuda.load(
        cuda_emulated.build(tmp_path_factory.mktemp("contrast"), "one_launch", SOURCES, flags)
    )


@pytest.fixture(autouse=True)
def library(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The backend finds the emulation in the place of its library."""

    @contextmanager
    def on(device: torch.device) -> Iterator[tuple[int, int]]:
        yield 0, 0

    monkeypatch.setattr(cuda, "library", lambda: compiled)
    monkeypatch.setattr(cuda, "_on", on)
    compiled.take_in_one_launch(0)
    return compiled


def specification(
    problems: Problems, upstream: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Terms and gradients (x…, y…, τ) of plain PyTorch in float64, masks and all."""
    inputs = [t.detach().double().requires_grad_() for t in embeddings_of(problems)]
    tau = torch.tensor(float(problems.temperature), dtype=torch.float64, requires_grad=True)
    pairs = len(problems.x)
    wide = problems._replace(x=tuple(inputs[:pairs]), y=tuple(inputs[pairs:]), temperature=tau)
    terms = plain.terms(wide)[0]
    factors = spread(problems) if upstream is None else upstream.double()
    return terms.detach(), torch.autograd.grad(terms, [*inputs, tau], factors)


def in_two(problems: Problems, upstream: Tensor | None = None) -> tuple[Terms, Gradients]:
    """FORWARD, then BACKWARD."""
    terms = cuda.forward(problems)
    upstream = spread(problems) if upstream is None else upstream
    return terms, cuda.backward(problems, terms.lse, upstream.float())


def check(problems: Problems) -> None:
    """At most twice plain PyTorch's error in the dtype of the embeddings, and some roundings in float32."""
    truth, slopes = exact(problems)
    loss, plain_slopes = plainly(problems)
    terms, gradients = cuda.step(problems)
    slack = FLOAT32 * max(1, 1 / float(problems.temperature))
    scale = float((truth.loss * spread(problems)).abs().sum())
    assert abs(terms.total - truth.total) <= 2 * abs(loss - truth.total) + slack * scale
    if problems.x[0].dtype == torch.float32:
        assert relative_error(terms.loss, truth.loss) <= slack
        assert relative_error(terms.lse, truth.lse) <= slack
        assert torch.equal(terms.hits, truth.hits)
        assert relative_error(gradients.temperature, slopes.temperature) <= 8 * slack
    for ours, theirs, slope in zip(vectors(gradients), plain_slopes, vectors(slopes), strict=True):
        assert relative_error(ours, slope) <= 2 * relative_error(theirs, slope) + slack


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shapes", [[(2, 9, 14, 17), (1, 21, 21, 64)], [(1, 5, 9, 130)], [(1, 3, 3, 300)]]
)
def test_agrees_with_float64(
    shapes: list[tuple[int, int, int, int]], dtype: torch.dtype, symmetric: bool
) -> None:
    """Several pairs, of odd widths in every padded one, with more columns than rows."""
    shapes = [(G, M, M if symmetric else N, D) for G, M, N, D in shapes]
    check(problems_of(shapes, dtype, tau=0.1, symmetric=symmetric))


@pytest.mark.parametrize(
    ("dtype", "shape", "symmetric"),
    [
        (torch.bfloat16, (1, 150, 300, 64), False),
        (torch.float16, (1, 280, 280, 40), True),
        (torch.float32, (1, 130, 130, 20), True),
        (torch.bfloat16, (2, 40, 140, 300), False),
    ],
)
def test_several_tiles(
    dtype: torch.dtype, shape: tuple[int, int, int, int], symmetric: bool
) -> None:
    """In several splits, which become one; columns' sums come in several parts."""
    check(problems_of([shape], dtype, tau=0.1, symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_strides(layout: Callable[[Tensor], Tensor], symmetric: bool) -> None:
    check(problems_of([(3, 7, 7, 19)], tau=0.3, symmetric=symmetric, layout=layout))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tau", [0.0125, 0.005, 10.0])
def test_small_and_large_temperatures(tau: float, symmetric: bool) -> None:
    """With a fixed shift above 0, with a running maximum, with a shift of 0; read on the device, too."""
    problems = problems_of([(2, 8, 8, 12)], tau=tau, symmetric=symmetric)
    check(problems)
    learned = problems._replace(temperature=torch.tensor([tau]))
    results = [(*t[:4], *vectors(g), g.temperature) for t, g in map(cuda.step, (problems, learned))]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("symmetric", [False, True])
def test_vectors_of_any_length(symmetric: bool) -> None:
    """Without `normalize` logits have no bound, and no fixed shift serves them."""
    check(problems_of([(2, 8, 8, 20)], tau=0.4, normalize=False, symmetric=symmetric))


@pytest.mark.parametrize("dtype", DTYPES)
def test_once_converged(dtype: torch.dtype) -> None:
    problems = problems_of([(1, 12, 12, 64)], dtype, tau=0.07)
    check(problems._replace(y=((problems.x[0] + 0.05 * problems.y[0]).to(dtype),)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_are_the_step(dtype: torch.dtype, symmetric: bool) -> None:
    """Bit for bit, but for the dtype of the gradients."""
    shapes = [(2, 6, 6, 17), (1, 9, 9, 40)]
    problems = problems_of(shapes, dtype, tau=0.1, symmetric=symmetric)
    terms, gradients = cuda.step(problems)
    again, in_dtype = in_two(problems)
    assert all(map(torch.equal, terms[:4], again[:4]))
    pairs = list(zip(vectors(gradients), vectors(in_dtype), strict=True))
    assert all(a.dtype == torch.float32 and b.dtype == dtype for a, b in pairs)
    assert all(torch.equal(a.to(dtype), b) for a, b in pairs)
    assert torch.equal(gradients.temperature, in_dtype.temperature)


MASKS = ["everything", "off", "ids", "same", "off ids"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("function", ["info_nce", "logsumexp"])
def test_masks(function: str, mask: str, symmetric: bool) -> None:
    """Each with any upstream gradient; more rows than columns where there are no positives."""
    columns = 10 if symmetric else 13 if function == "info_nce" else 7
    problems = problems_of([(2, 10, columns, 24)], tau=0.2, symmetric=symmetric)
    generator = torch.Generator().manual_seed(2)
    # The lower halves are equal: ids are compared in all of their 64 bits.
    ids = tuple(torch.randint(0, 2, (2, rows), generator=generator) << 32 for rows in (10, columns))
    chosen = Mask("off" not in mask, ids if mask in MASKS[2:] else None, mask == "same")
    problems = problems._replace(function=function, mask=chosen)
    upstream = torch.linspace(-1, 2, 20)
    truth, slopes = specification(problems, upstream)
    assert truth.isfinite().all()
    terms, gradients = in_two(problems, upstream)
    assert relative_error(terms.loss, truth) <= FLOAT32 / 0.2
    for ours, slope in zip((*vectors(gradients), gradients.temperature), slopes, strict=True):
        assert relative_error(ours, slope) <= 4 * FLOAT32 / 0.2


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("function", ["info_nce", "logsumexp"])
def test_rows_of_which_nothing_counts(function: str, normalize: bool) -> None:
    """A logsumexp of nothing is −∞, InfoNCE without negatives 0; neither has a gradient."""
    problems = problems_of([(1, 4, 4, 8)], normalize=normalize)
    ids = torch.tensor([[5, 5, 5, 9]]), torch.tensor([[5, 5, 5, 5]])
    problems = problems._replace(function=function, mask=Mask(False, ids))
    terms, gradients = in_two(problems)
    assert terms.lse[0].isneginf().tolist() == [True, True, True, False]
    assert terms.loss[:3].tolist() == [0.0 if function == "info_nce" else -math.inf] * 3
    assert gradients.x[0][0].abs().sum(-1).bool().tolist() == [False, False, False, True]


@pytest.mark.parametrize(("rows", "columns"), [(3, 0), (0, 3)])
def test_one_side_is_empty(rows: int, columns: int) -> None:
    """As on a rank that has no rows: no pairs, and gradients of 0 for whoever is there."""
    problems = problems_of([(2, rows, columns, 5), (1, 3, 3, 5)])._replace(function="logsumexp")
    terms, gradients = cuda.step(problems)
    assert terms.loss[: 2 * rows].isneginf().all()
    assert terms.loss[2 * rows :].isfinite().all()
    assert not any(t.any() for t in (gradients.x[0], gradients.y[0]))
    assert all(t.any() for t in (gradients.x[1], gradients.y[1]))


def test_gradients_that_nobody_needs() -> None:
    """A queue of keys has none; that of x is the same."""
    problems = problems_of([(1, 6, 9, 20)])
    _, expected = cuda.step(problems)
    _, gradients = cuda.step(problems._replace(needs_y=False))
    assert gradients.y == ()
    assert torch.equal(gradients.x[0], expected.x[0])


def test_hits_ranks_ties_zeros_and_nan() -> None:
    problems = problems_of([(1, 30, 30, 24)], torch.bfloat16, tau=0.1)._replace(ranked=True)
    x, y = problems.x[0], problems.y[0]
    y[:, :20] = x[:, :20]  # these hit
    y[0, 21] = x[0, 5]  # but row 5 ties
    y[0, 25] = 0
    x[0, 27] = 0
    terms, gradients = cuda.step(problems)
    assert torch.equal(terms.hits, exact(problems)[0].hits)
    assert terms.hits[:20].sum() == 19
    assert torch.equal(terms.ranks, plain.ranks(problems))
    assert not gradients.y[0][0, 25].any()
    assert not gradients.x[0][0, 27].any()
    x[0, 3, 2] = math.nan
    terms, _ = cuda.step(problems)
    assert terms.loss.isnan().nonzero().flatten().tolist() == [3]
    assert not terms.hits[3]


def test_tf32_where_pytorch_allows_it() -> None:
    """Factors of 10 bits: as exact products of vectors that are rounded beforehand."""
    problems = problems_of([(1, 9, 11, 40)], tau=0.1)._replace(function="logsumexp")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rounded = cuda.forward(problems)
    finally:
        torch.set_float32_matmul_precision(before)

    def short(vectors: Tensor) -> Tensor:
        units = torch.nn.functional.normalize(vectors, dim=-1)
        return ((units.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    units = problems._replace(
        x=tuple(map(short, problems.x)), y=tuple(map(short, problems.y)), normalize=False
    )
    truth, _ = specification(units)
    assert relative_error(rounded.loss, truth) <= FLOAT32 / 0.1
    assert relative_error(cuda.forward(problems).loss, truth) > 2.0**-18


def test_same_bits_in_any_order_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What races between barriers would depend on which thread runs first."""
    problems = problems_of([(2, 10, 10, 30)], symmetric=True)
    terms, gradients = cuda.step(problems)
    monkeypatch.setenv("HDC_EMULATION_ORDER", "reverse")
    again, gradients_again = cuda.step(problems)
    assert all(map(torch.equal, terms[:4], again[:4]))
    assert all(map(torch.equal, vectors(gradients), vectors(gradients_again)))
    assert torch.equal(gradients.temperature, gradients_again.temperature)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("detail", ["total", "means", "rows"])
def test_one_launch_where_it_fits(library: ctypes.CDLL, detail: Detail, symmetric: bool) -> None:
    """The whole call then goes there, with room for what is asked for and nothing else."""
    problems = problems_of([(2, 6, 6, 8), (1, 5, 5, 8)], symmetric=symmetric)
    problems = problems._replace(detail=detail)
    library.take_in_one_launch(1)
    stepped, gradients = cuda.step(problems)
    assert gradients.temperature.item() == 81
    for terms in (cuda.forward(problems), stepped):
        assert terms.total.item() == 77
        if detail == "means":
            assert terms.means is not None
            assert terms.means.tolist() == [[78.0] * 2] * 2
        else:
            assert terms.means is None
        rows = 17 if detail == "rows" else 0
        assert terms.loss.tolist() == [79.0] * rows
        assert terms.hits.tolist() == [True] * rows
        assert terms.lse.flatten().tolist() == [80.0] * rows * (1 + symmetric)
    later = cuda.backward(
        problems, torch.zeros(1 + symmetric, 17, dtype=torch.float64), torch.ones(17)
    )
    assert later.temperature.item() == 81


def test_results_of_one_launch_are_no_views(library: ctypes.CDLL) -> None:
    """Of memory that they share: a loss may be changed in place, and a compiler takes no outputs that overlap."""
    library.take_in_one_launch(1)
    terms, gradients = cuda.step(problems_of([(1, 6, 6, 8)])._replace(detail="means"))
    assert terms.means is not None
    results = (terms.total, terms.means, gradients.temperature)
    assert not any(t._is_view() for t in results)
    assert len({t.untyped_storage().data_ptr() for t in results}) == 3
    # In the total's memory lies what passes between blocks, and nowhere else.
    assert [t.untyped_storage().nbytes() for t in results] == [256 + 700, 8, 4]


@pytest.mark.parametrize("detail", ["total", "means"])
def test_means_of_several_launches(detail: Detail) -> None:
    """Made of rows, which are there for any detail."""
    problems = problems_of([(2, 6, 9, 8), (1, 5, 5, 8)], tau=0.1)._replace(detail=detail)
    truth, _ = exact(problems)
    for terms in (cuda.forward(problems), cuda.step(problems)[0]):
        assert relative_error(terms.loss, truth.loss) <= 10 * FLOAT32
        if detail == "total":
            assert terms.means is None
            continue
        losses, hits = (t.double().split([12, 5]) for t in (truth.loss, truth.hits))
        expected = torch.stack([pair.mean() for pair in (*losses, *hits)]).view(2, 2)
        assert terms.means is not None
        assert relative_error(terms.means, expected) <= 10 * FLOAT32


def test_memory_is_shared(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """By batches, and by the two passes: ten pairs that fill the device take as much as one, but for parts of sums."""
    sizes = []

    def needs(call: bytes, pairs: bytes) -> ctypes.Structure:
        found = library.hdc_cuda_needs(call, pairs)
        sizes.append(found.workspace)
        return found

    functions = SimpleNamespace(hdc_cuda_needs=needs, hdc_cuda_contrast=lambda call, pairs: 0)
    monkeypatch.setattr(cuda, "library", lambda: functions)
    for shapes in (1, 6, 6, 8), (132, 6, 6, 8):
        for pairs in 1, 10:
            problems = problems_of([shapes] * pairs)
            cuda.forward(problems)
            cuda.step(problems)
    # Of each side 256 × 64 numbers of unit vectors and as many of gradients, and a few KiB of numbers a row.
    assert 0 <= sizes[0] - 2 * 256 * 64 * 4 < 16384
    assert 0 <= sizes[1] - 4 * 256 * 64 * 4 < 8192
    # Pairs that leave processors idle are a batch.
    assert 0.9 * sizes[0] < sizes[2] / 10 < sizes[0] + 1024
    assert 0.9 * sizes[1] < sizes[3] / 10 < sizes[1] + 1024
    # Of 132 groups' numbers, 256 rows' parts in blocks of 8.
    assert sizes[6] - sizes[4] < 10 * 132 * 4 + 512
    assert sizes[7] - sizes[5] < 10 * 132 * 33 * 4 + 512


THREE_ALIKE = [(2, 9, 14, 17), (1, 9, 14, 40), (3, 9, 14, 64), (1, 9, 14, 70), (1, 8, 14, 17)]


@pytest.mark.parametrize(
    ("shapes", "symmetric"),
    [(THREE_ALIKE, False), (THREE_ALIKE, True), ([(1, 2, 3, 4)] * 26, False)],
)
def test_pairs_of_equal_sizes(shapes: list[tuple[int, int, int, int]], symmetric: bool) -> None:
    """They are one batch, whatever they weigh: three, with others after them, or up to 24."""
    shapes = [(G, M, M if symmetric else N, D) for G, M, N, D in shapes]
    weights = [1.5 - k % 5 for k in range(len(shapes))]
    problems = problems_of(shapes, tau=0.1, symmetric=symmetric, weights=weights)
    check(problems)
    upstream = torch.linspace(-1, 2, sum(G * M for G, M, _, _ in shapes))
    terms, gradients = in_two(problems, upstream)
    truth, slopes = specification(problems, upstream)
    assert relative_error(terms.loss, truth) <= 10 * FLOAT32
    for ours, slope in zip(vectors(gradients), slopes[:-1], strict=True):
        assert relative_error(ours, slope) <= 10 * FLOAT32


def test_a_failed_launch_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def elsewhere(device: torch.device) -> Iterator[tuple[int, int]]:
        yield 5, 0

    monkeypatch.setattr(cuda, "_on", elsewhere)
    with pytest.raises(RuntimeError, match="did not launch the contrastive loss: invalid device"):
        cuda.forward(problems_of([(1, 6, 6, 8)]))


def test_which_devices_it_has_code_for() -> None:
    """Machine code runs within its major version and up, PTX on everything later."""
    answers = {(7, 5): 0, (8, 0): 1, (8, 6): 1, (8, 9): 1, (9, 0): 1, (10, 3): 1, (12, 0): 1}
    assert {capability: cuda.runs_on(capability) for capability in answers} == answers
