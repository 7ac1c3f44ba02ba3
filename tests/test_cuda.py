"""Backend "cuda": on a GPU all of it against float64 and plain PyTorch of the same dtype; elsewhere its library alone.

Without a GPU, `test_cuda_contrast.py` and its neighbours run the same sources in emulation.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from gpu_problems import (
    DEVICE,
    GPU,
    check,
    differentiate,
    error,
    errors,
    evaluate,
    exact,
    make,
    make_masked,
    plain,
)
from torch import Tensor

from hdc_kernels import fused_info_nce
from hdc_kernels.backends import Problems, cuda
from hdc_kernels.backends.plain import terms as specification

NO_LIBRARY = "nvcc was not installed when this package was"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(test):
    """For `-m gpu`; skipped where there is none, or no library for it."""
    runs = GPU and cuda.is_available() and cuda.runs_on(torch.cuda.get_device_capability())
    reason = NO_LIBRARY if GPU else "needs a CUDA device"
    return pytest.mark.gpu(pytest.mark.skipif(not runs, reason=reason)(test))


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Plain float32 without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


# --- The library, with or without a GPU -----------------------------------------------------------------------------


def test_a_missing_library_is_no_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "libhdc_cuda.so")
    with pytest.raises(OSError, match="libhdc_cuda"):
        cuda.library.__wrapped__()
    monkeypatch.setattr(cuda, "library", cuda.library.__wrapped__)
    assert not cuda.is_available.__wrapped__()


@pytest.mark.skipif(not cuda.LIBRARY.exists(), reason=NO_LIBRARY)
def test_both_sides_agree_on_the_interface() -> None:
    """The sizes of the structs; and that library and header are of one build is `test_build.py`'s."""
    assert cuda.library().hdc_cuda_interface_size() == cuda._CALL.size + cuda._PROBLEM.size


@pytest.mark.skipif(GPU, reason="there is a GPU")
@pytest.mark.skipif(not cuda.LIBRARY.exists(), reason=NO_LIBRARY)
def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In CUDA's words; nothing is launched, and nothing crashes."""

    @contextmanager
    def on(device: torch.device) -> Iterator[tuple[int, int]]:
        yield 0, 0

    monkeypatch.setattr(cuda, "_on", on)
    with pytest.raises(
        RuntimeError, match=r"did not launch the contrastive loss: .*(device|driver)"
    ):
        cuda.step(make([(1, 300, 300, 8)]))


# --- The backend, on a GPU --------------------------------------------------------------------------------------------

SHAPES = {
    "one launch": [(3, 20, 20, 24), (1, 128, 128, 128), (2, 33, 33, 7)],
    "one launch, windows": [(2, 130, 256, 200), (1, 90, 90, 256)],
    "tails": [(1, 300, 333, 100)],
    "narrow": [(2, 257, 600, 64)],
    "Hopper": [(1, 1000, 1000, 128), (3, 300, 513, 128)],
    "wide": [(1, 500, 700, 256)],
    "widest": [(1, 300, 280, 512), (1, 40, 50, 300)],
    "many": [(40, 290, 290, 16)],
    "pairs that share launches": [(2, 300, 333, 100), (3, 300, 333, 128), (1, 300, 333, 65)],
}


@on_gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape: str, dtype: torch.dtype, symmetric: bool) -> None:
    """More columns than rows where it may be."""
    shapes = [(G, min(M, N), min(M, N) if symmetric else N, D) for G, M, N, D in SHAPES[shape]]
    check(cuda, make(shapes, dtype, symmetric=symmetric))


@on_gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [40, 300])
def test_any_upstream_gradient(rows: int, dtype: torch.dtype, symmetric: bool) -> None:
    problems = make([(2, rows, rows, 96), (1, 77, 77, 128)], dtype, symmetric=symmetric)
    generator = torch.Generator().manual_seed(1)
    check(cuda, problems, torch.randn(2 * rows + 77, generator=generator).to(DEVICE))


@on_gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mask", ["everything", "off", "ids", "same", "off ids"])
@pytest.mark.parametrize("function", ["info_nce", "logsumexp"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_and_masks(dtype: torch.dtype, function: str, mask: str, symmetric: bool) -> None:
    """Where there are no positives, with more rows than columns."""
    rows, columns = (310, 300) if function == "logsumexp" else (300, 310)
    shape = (2, rows, rows if symmetric else columns, 128)
    problems = make_masked(shape, function, mask, dtype, symmetric=symmetric)
    check(cuda, problems)
    check(cuda, problems, torch.linspace(0.5, 2, 2 * rows, device=DEVICE))


@on_gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [10.0, 0.0125, 0.005, 0.001])
def test_any_temperature(tau: float, dtype: torch.dtype, symmetric: bool) -> None:
    """With a fixed shift and with a running maximum; the device's own is the same bit by bit."""
    for rows in (60, 400):
        problems = make([(1, rows, rows, 128)], dtype, temperature=tau, symmetric=symmetric)
        check(cuda, problems)
        learned = problems._replace(temperature=torch.tensor([tau], device=DEVICE))
        numbers, tensors = evaluate(cuda, problems), evaluate(cuda, learned)
        assert torch.equal(numbers.loss, tensors.loss)
        assert all(map(torch.equal, (*numbers.x, *numbers.y), (*tensors.x, *tensors.y)))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_of_any_length(dtype: torch.dtype) -> None:
    check(cuda, make([(2, 300, 310, 64)], dtype, temperature=0.3, normalize=False))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [100, 500])
def test_once_converged(rows: int, dtype: torch.dtype) -> None:
    """The gradient is a small difference of large terms."""
    check(cuda, make([(1, rows, rows, 128)], dtype, noise=0.05))


@on_gpu
def test_tf32_is_near_and_only_on_request() -> None:
    """Its factors have 10 bits."""
    problems = make([(1, 400, 500, 128)], temperature=0.1)
    truth = exact(problems)
    exactly = errors(evaluate(cuda, problems), truth)
    torch.set_float32_matmul_precision("high")
    rounded = errors(evaluate(cuda, problems), truth)
    assert max(exactly.values()) < 1e-5
    assert 1e-5 < max(rounded.values()) < 2.0**-10 / 0.1


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [64, 700])
def test_the_same_bits_a_thousand_times(rows: int, dtype: torch.dtype) -> None:
    problems = make([(2, rows, rows, 128)], dtype, symmetric=True)
    first = evaluate(cuda, problems)
    for _ in range(1000):
        again = evaluate(cuda, problems)
        assert torch.equal(again.loss, first.loss)
        assert torch.equal(again.total, first.total)
        assert torch.equal(again.temperature, first.temperature)
        assert all(map(torch.equal, (*again.x, *again.y), (*first.x, *first.y)))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [64, 700])
def test_a_graph_replays_it(rows: int, dtype: torch.dtype) -> None:
    """With other embeddings and another temperature than it was captured with, on another stream."""
    temperature = torch.tensor(0.07, device=DEVICE)
    problems = make([(2, rows, rows, 128)], dtype, temperature=temperature, symmetric=True)
    upstream = torch.linspace(-1, 2, 2 * rows, device=DEVICE)

    def run() -> list[Tensor]:
        terms, gradients = cuda.step(problems)
        later = cuda.backward(problems, terms.lse, upstream)
        return [terms.total, terms.loss, *gradients.x, *gradients.y, *later.x, *later.y]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    problems.x[0].copy_(torch.randn_like(problems.x[0]))
    temperature.fill_(0.004)  # without a fixed shift
    graph.replay()
    assert all(map(torch.equal, captured, run()))


@on_gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [60, 128, 300])
def test_means(rows: int, dtype: torch.dtype, symmetric: bool) -> None:
    """Of pairs of different sizes; in one launch nothing is kept by row, and total and gradients have the same bits."""
    shapes = [(3, rows, rows, 64), (1, rows + 7, rows + 7, 128), (2, 9, 9, 40)]
    problems = make(shapes, dtype, temperature=0.1, symmetric=symmetric, noise=3.0)
    wide = problems._replace(
        x=tuple(t.double() for t in problems.x), y=tuple(t.double() for t in problems.y)
    )
    loss, hits = specification(wide)
    expected = mean_of_pairs(problems, loss), mean_of_pairs(problems, hits)
    allowed = error(plain(problems).loss, loss)
    kept, slopes = cuda.step(problems)
    for detail in ("means", "total"):
        asked = problems._replace(detail=detail)
        terms, gradients = cuda.step(asked)
        assert torch.equal(terms.total, kept.total)
        assert torch.equal(gradients.temperature, slopes.temperature)
        pairs = zip((*gradients.x, *gradients.y), (*slopes.x, *slopes.y), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        for found in (terms, cuda.forward(asked)):
            assert found.loss.numel() == found.hits.numel() == (0 if rows < 250 else len(loss))
            if detail == "total":
                assert found.means is None
                continue
            assert found.means is not None
            assert error(found.means[0], mean_of_pairs(problems, kept.loss)) < 2.0**-22
            assert error(found.means[1], mean_of_pairs(problems, kept.hits)) < 2.0**-22
            slack = torch.finfo(dtype).eps + 2.0**-25 / 0.1
            assert error(found.means[0], expected[0]) <= 2 * allowed + slack
            if dtype == torch.float32:
                assert error(found.means[1], expected[1]) < 2.0**-22


def mean_of_pairs(problems: Problems, of_rows: Tensor) -> Tensor:
    """[K] in float64."""
    return torch.stack([pair.double().mean() for pair in of_rows.split(problems.rows)])


def all_of(problems: Problems) -> list[Tensor]:
    """What one launch makes for HD-NCE."""
    terms, gradients = cuda.step(problems)
    assert terms.means is not None
    return [terms.total, terms.means, *gradients.x, *gradients.y, gradients.temperature]


@contextmanager
def at_once(streams: list[torch.cuda.Stream]) -> Iterator[None]:
    """What these are given inside begins when they all have it, about 3 ms later; then waits for them."""
    gate = torch.cuda.Stream()
    with torch.cuda.stream(gate):
        torch.cuda._sleep(5_000_000)
    for stream in streams:
        stream.wait_stream(gate)
    yield
    torch.cuda.synchronize()


TWO_CALLS = ([(8, 128, 128, 128), (1, 100, 100, 128)], [(4, 90, 90, 64), (3, 128, 128, 64)])


@on_gpu
def test_two_streams_at_once() -> None:
    """Each has a ticket: no launch counts the other's blocks."""
    calls = [make(shapes, torch.bfloat16)._replace(detail="means") for shapes in TWO_CALLS]
    expected = [all_of(problems) for problems in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(20):
        found: list[list[list[Tensor]]] = [[], []]
        with at_once(streams):
            for _ in range(10):
                for results, stream, problems in zip(found, streams, calls, strict=True):
                    with torch.cuda.stream(stream):
                        results.append(all_of(problems))
        for results, truth in zip(found, expected, strict=True):
            assert all(all(map(torch.equal, again, truth)) for again in results)


@on_gpu
def test_graphs_on_two_streams_at_once() -> None:
    """Each has a ticket, on whatever stream it is replayed; nothing is left over from the replay before."""
    calls = [make(shapes, torch.bfloat16)._replace(detail="means") for shapes in TWO_CALLS]
    expected = [all_of(problems) for problems in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    graphs, captured = [torch.cuda.CUDAGraph() for _ in calls], []
    for graph, problems in zip(graphs, calls, strict=True):
        with torch.cuda.graph(graph):
            captured.append(all_of(problems))
    for turn in range(100):
        for results in captured:
            for t in results:  # and what lies behind them, in memory that is theirs
                t.as_strided((t.untyped_storage().nbytes() // 4,), (1,)).fill_(math.nan)
        torch.cuda.synchronize()
        with at_once(streams):
            for k, graph in enumerate(graphs):
                with torch.cuda.stream(streams[(turn + k) % 2]):
                    graph.replay()
        for results, truth in zip(captured, expected, strict=True):
            assert all(map(torch.equal, results, truth))
    with at_once(streams):
        for stream in streams:
            with torch.cuda.stream(stream):
                graphs[0].replay()
    assert all(map(torch.equal, captured[0], expected[0]))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_logits_than_32_bits_count(dtype: torch.dtype) -> None:
    """46,400² > 2³¹, in chunks of float64."""
    rows = 46_400
    problems = make([(1, rows, rows, 8)], dtype, temperature=0.5)._replace(weights=(1 / rows,))

    def chunked(inputs: Problems) -> Tensor:
        return specification(inputs, chunked=True)[0]

    expected = differentiate(problems, torch.float64, None, chunked)
    found = errors(evaluate(cuda, problems), expected)
    unit = torch.finfo(dtype).eps
    assert all(
        value < (8 * unit if name[0] in "xy" else unit) + 1e-5 for name, value in found.items()
    )


@on_gpu
def test_memory_is_linear() -> None:
    """At 16,384 the logits would be 1 GiB in float32; beside inputs and results there are some rows' worth."""
    problems = make([(1, 16_384, 16_384, 128)], torch.bfloat16)
    cuda.step(problems)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cuda.step(problems)
    assert torch.cuda.max_memory_allocated() - before < 96 * 2**20


@on_gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compiled", [False, True])
def test_through_the_loss(compiled: bool, reduction: str) -> None:
    """Eagerly and compiled, with a learnt temperature, as plain PyTorch in float64."""

    def loss_of(backend: str, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        views = [torch.randn(300, 40, generator=generator).to(DEVICE, dtype) for _ in range(2)]
        inputs = [
            t.requires_grad_() for t in (*views, torch.tensor(0.1, device=DEVICE, dtype=dtype))
        ]

        def loss(query: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
            return fused_info_nce(
                query, key, temperature=temperature, reduction=reduction, backend=backend
            )

        if compiled and backend == "cuda":
            loss = torch.compile(loss, fullgraph=True)
        value = loss(*inputs)
        return [value.detach(), *torch.autograd.grad(value.square().sum(), inputs)]

    found, expected = loss_of("cuda", torch.float32), loss_of("torch", torch.float64)
    for ours, truth in zip(found, expected, strict=True):
        assert float((ours - truth).norm() / truth.norm()) < 1e-5


@on_gpu
def test_no_negatives_and_nan() -> None:
    """One row has no loss; a NaN is one row's, and of every key that it is a negative of."""
    single = evaluate(cuda, make([(2, 1, 1, 5)]))
    assert single.loss.tolist() == [0, 0]
    assert not single.x[0].any()
    problems = make([(1, 400, 400, 64)], torch.bfloat16)
    problems.x[0][0, 3, 2] = math.nan
    terms, _ = cuda.step(problems)
    assert terms.loss.isnan().nonzero().flatten().tolist() == [3]
    assert not terms.hits[3]
