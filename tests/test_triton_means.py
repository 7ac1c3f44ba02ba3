"""What the small kernel's last program adds up: the total, the means of every pair and the temperature's gradient.

In Triton's interpreter programs run one after the other, so what is shown there is the arithmetic and that the order
does not matter; that parts are visible to whoever comes last is the GPU's to show.
"""

import math

import pytest
import torch
from gpu_problems import DEVICE, GPU, error, exact, make, plain
from torch import Tensor

from hdc_kernels import fused_info_nce, reference
from hdc_kernels.backends import Detail, Problems
from hdc_kernels.backends.plain import terms as specification

triton_backend = pytest.importorskip("hdc_kernels.backends.triton", exc_type=ModuleNotFoundError)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of log(0)

# Two blocks of rows and columns, where the second is not full, or empty; 81 rows.
SHAPES = [(2, 20, 26, 24), (1, 36, 40, 24), (1, 5, 9, 7)]
SQUARE = [(G, M, M, D) for G, M, _, D in SHAPES]


@pytest.fixture(autouse=True)
def exact_products():
    """Plain float32 without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def counter(monkeypatch) -> Tensor:
    """The only ticket of the test, as a stream has."""
    kept = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(triton_backend.small, "ticket", lambda _: kept)
    return kept


@pytest.fixture
def few(monkeypatch) -> None:
    """More parts than are read at a time."""
    monkeypatch.setattr(triton_backend.small, "PARTS", 4)


def of_pairs(rows: Tensor, problems: Problems) -> Tensor:
    """[K], the mean over each pair's rows."""
    parts, values = [], rows.double().tolist()
    for count in problems.rows:
        parts.append(math.fsum(values[:count]) / count)
        values = values[count:]
    return torch.tensor(parts, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_means_are_those_of_float64(counter, few, dtype, symmetric):
    """Of a pair without weight, too."""
    problems = make(SQUARE if symmetric else SHAPES, getattr(torch, dtype), symmetric=symmetric)
    problems = problems._replace(weights=(0.0, *problems.weights[1:]), detail="means")
    in_float64 = (tuple(t.double() for t in side) for side in (problems.x, problems.y))
    true, hits = specification(Problems(*in_float64, *problems[2:]))
    wanted = of_pairs(true, problems)
    theirs = torch.stack([part.mean() for part in plain(problems).loss.split(problems.rows)])
    unit = torch.finfo(problems.x[0].dtype).eps
    slack = unit + 2.0**-25 / problems.temperature  # as in `gpu_problems.check`
    terms = triton_backend.forward(problems)
    assert terms.means.shape == (2, 3)
    assert error(terms.means[0], wanted) <= 2 * error(theirs, wanted) + slack
    # 16 bits may decide otherwise where the best negative is as close as their rounding.
    misjudged = (terms.means[1].double() - of_pairs(hits, problems)).abs()
    counts = misjudged * torch.tensor(problems.rows, device=DEVICE)
    assert float(counts.sum()) < (1e-4 if dtype == "float32" else 1.01)
    assert float(terms.total) == pytest.approx(float(exact(problems).total), rel=10 * unit)
    assert counter.item() == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_detail_has_the_same_bits(counter, few, symmetric):
    """And leaves out no more than was not asked for."""

    def made(detail: Detail):
        return triton_backend.step(problems._replace(detail=detail))

    problems = make(SQUARE, torch.bfloat16, symmetric=symmetric, noise=1.0)
    terms, gradients = made("rows")
    assert terms.means is None
    assert terms.loss.shape == terms.hits.shape == terms.lse.shape[1:] == (81,)
    for detail in ("total", "means"):
        again, same = made(detail)
        assert again.loss.numel() == again.hits.numel() == again.lse.numel() == 0
        assert torch.equal(again.total, terms.total)
        assert torch.equal(same.temperature, gradients.temperature)
        assert all(map(torch.equal, (*same.x, *same.y), (*gradients.x, *gradients.y)))
        assert (again.means is None) == (detail == "total")
        if again.means is not None:
            means = torch.stack([of_pairs(terms.loss, problems), of_pairs(terms.hits, problems)])
            assert error(again.means, means) < 1e-6
    assert counter.item() == 0


@pytest.mark.skipif(GPU, reason="the interpreter's programs have an order to reverse")
@pytest.mark.parametrize("needs_y", [False, True])
def test_whoever_comes_last_adds_up_the_same(monkeypatch, counter, needs_y):
    """Also a program that owns columns, or half of the rows of another pair, may run after all that own rows."""
    from triton.runtime import interpreter

    problems = make(SHAPES, noise=1.0)._replace(detail="means", needs_y=needs_y)
    expected, gradients = triton_backend.step(problems)
    builder, order = interpreter.interpreter_builder, []
    place = builder.set_grid_idx

    def reversed_order(x: int, y: int, z: int) -> None:
        order.append(x)
        place(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", reversed_order)
    terms, again = triton_backend.step(problems)
    assert len(order) == (1 + needs_y) * 4 * 2  # sides, problems, blocks
    assert torch.equal(terms.total, expected.total)
    assert torch.equal(terms.means, expected.means)
    assert torch.equal(again.temperature, gradients.temperature)
    assert counter.item() == 0


@pytest.mark.parametrize("detail", ["total", "means"])
def test_nan_is_no_hit_and_stays_in_its_pair(detail):
    problems = make(SHAPES, noise=1e-3)._replace(detail=detail)
    assert triton_backend.forward(problems).total.isfinite()
    problems.x[1][0, 35, 3] = math.nan
    problems.y[0][1, 25, 1] = math.nan  # in a column that is no row's positive
    terms, _ = triton_backend.step(problems)
    assert terms.total.isnan()
    if detail == "means":
        assert terms.means[0].isnan().tolist() == [True, True, False]
        assert terms.means[1].tolist() == [0.5, pytest.approx(35 / 36), 1]


def test_a_tie_and_a_single_row():
    """All vectors equal: no hits; no negatives: nothing but hits."""
    x = torch.ones(2, 5, 4, device=DEVICE)
    problems = Problems((x, x[:, :1]), (x, x[:, :1]), (1.0, 1.0), 0.5, True, False, detail="means")
    means = triton_backend.forward(problems).means
    assert means[1].tolist() == [0, 1]
    assert means[0].tolist() == [pytest.approx(math.log(5)), 0]


def test_gradients_of_terms_leave_the_ticket_as_it_was(counter):
    problems = make(SQUARE, symmetric=True)
    upstream = torch.linspace(-1, 2, 81, device=DEVICE)
    lse = triton_backend.forward(problems).lse
    found = [triton_backend.backward(problems, lse, upstream).temperature for _ in range(2)]
    assert error(found[0], exact(problems, upstream).temperature) < 1e-5
    assert torch.equal(*found)
    assert counter.item() == 0


def test_the_value_is_not_changed_by_its_backward_pass():
    """A square saves the value; the gradient by the temperature, made beside it, is scaled in place."""
    x = torch.linspace(-1, 1, 40, device=DEVICE).view(5, 8).cos().requires_grad_()
    tau = torch.tensor(0.2, device=DEVICE, requires_grad=True)
    loss = fused_info_nce(x, x.detach().roll(1, 0), temperature=tau, backend="triton") ** 2
    first, second = (torch.autograd.grad(loss, tau, retain_graph=True)[0] for _ in range(2))
    exact_tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    logits = reference.cosine_logits(
        x.detach().cpu().double(), x.detach().cpu().double().roll(1, 0), exact_tau
    )
    (torch.nn.functional.cross_entropy(logits, torch.arange(5)) ** 2).backward()
    assert float(first) == pytest.approx(float(exact_tau.grad), rel=1e-5)
    assert float(second) == float(first)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_streams_and_graphs_beside_each_other():
    """Each has a ticket of its own."""
    problems = make([(17, 128, 128, 128)], torch.bfloat16, noise=1.0)._replace(detail="means")
    expected, gradients = triton_backend.step(problems)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = triton_backend.step(problems)
    streams, found = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for _ in range(100):
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(triton_backend.step(problems))
    torch.cuda.synchronize()
    for terms, again in [*found, (captured, gradients)]:
        assert torch.equal(terms.total, expected.total)
        assert torch.equal(terms.means, expected.means)
        assert torch.equal(again.temperature, gradients.temperature)
