"""The Triton backend against float64 and against plain PyTorch of the same dtype.

On a machine without a GPU the kernels run in Triton's interpreter (see `conftest`); with one, the same
tests run on it. Other functions than InfoNCE, and masks, are in `test_triton_functions.py`.
"""

import math
from functools import partial

import gpu_problems
import pytest
import torch
from gpu_problems import DEVICE, GPU, error, errors, evaluate, exact, make

from hdc_kernels import reference
from hdc_kernels.backends import Problems

triton_backend = pytest.importorskip("hdc_kernels.backends.triton", exc_type=ModuleNotFoundError)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of log(0)

MODES = (
    ("float32", "general"),
    ("bfloat16", "general"),
    ("float32", "small"),
    ("float16", "small"),
)
HALF_MODES = ("bfloat16", "general"), ("bfloat16", "small"), ("float16", "small")


@pytest.fixture(autouse=True)
def exact_products():
    """Plain float32 without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def path(request, monkeypatch):
    """Take every problem the way that the test names, not the way its size would go."""
    chosen = request.param if hasattr(request, "param") else "general"
    monkeypatch.setattr(triton_backend.small, "fits", lambda *_: chosen == "small")
    return chosen


ours = partial(evaluate, triton_backend)
check = partial(gpu_problems.check, triton_backend)


SHAPES = {
    "tails": [(2, 19, 23, 17)],
    "square": [(1, 37, 37, 24)],
    "pairs": [(2, 20, 20, 24), (1, 20, 20, 24), (1, 33, 33, 7)],
    "blocks": [(1, 70, 100, 33)],
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "path"), MODES, indirect=["path"])
def test_agrees_with_float64(dtype, path, shape, symmetric):
    shapes = [(G, M, M if symmetric else N, D) for G, M, N, D in SHAPES[shape]]
    check(make(shapes, getattr(torch, dtype), symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", (1, 150, 170, 24)),
        ("bfloat16", (1, 140, 150, 24)),
        ("float16", (1, 24, 40, 200)),
        ("float32", (1, 24, 40, 300)),
        ("bfloat16", (1, 20, 40, 300)),
    ],
)
def test_agrees_beyond_one_block(path, dtype, shape, symmetric):
    G, M, N, D = shape
    check(make([(G, M, M if symmetric else N, D)], getattr(torch, dtype), symmetric=symmetric))


@pytest.mark.parametrize("path", ["small"], indirect=True)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_agrees_in_chunks_of_dimensions(path, dtype, symmetric):
    """Pairs of different depth, with more blocks of columns than of rows."""
    shapes = [(1, 17, 17 if symmetric else 36, 136), (1, 9, 9, 24)]
    problems = make(shapes, getattr(torch, dtype), symmetric=symmetric)
    check(problems)
    check(problems, torch.linspace(0.5, 2, 26, device=DEVICE))


@pytest.mark.parametrize("path", ["small"], indirect=True)
def test_keys_that_need_no_gradient(path):
    """A queue of keys: half of the programs are not started, and the rest is the same."""
    problems = make([(2, 33, 40, 16)])
    expected_terms, expected = triton_backend.step(problems)
    terms, gradients = triton_backend.step(problems._replace(needs_y=False))
    assert torch.equal(terms.total, expected_terms.total)
    assert torch.equal(gradients.x[0], expected.x[0])
    assert torch.equal(gradients.temperature, expected.temperature)


@pytest.mark.parametrize("shape", [(1, 150, 170, 24), (1, 24, 40, 200)])
def test_agrees_in_blocks_for_amd(path, monkeypatch, shape):
    """Smaller ones, with dimensions in chunks from 65 on."""
    monkeypatch.setattr(triton_backend.general.tiles, "AMD", True)
    check(make([shape], torch.bfloat16))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dimensions", [1, 20])
@pytest.mark.parametrize(("dtype", "path"), MODES, indirect=["path"])
def test_agrees_without_normalising(dtype, path, dimensions, symmetric):
    problems = make(
        [(2, 21, 21, dimensions)],
        getattr(torch, dtype),
        normalize=False,
        symmetric=symmetric,
        temperature=0.3,
    )
    check(problems)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("dtype", "path"), MODES, indirect=["path"])
def test_upstream_differs_by_row(dtype, path, symmetric):
    problems = make([(2, 20, 20, 24), (1, 17, 17, 24)], getattr(torch, dtype), symmetric=symmetric)
    upstream = torch.randn(57, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check(problems, upstream)


@pytest.mark.parametrize("path", ["general", "small"], indirect=True)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("noise", [None, 1e-3])
def test_float32_is_accurate(path, noise, symmetric):
    check(make([(1, 40, 40, 64)], noise=noise, symmetric=symmetric), bound=3e-6)


@pytest.mark.parametrize(("dtype", "path"), HALF_MODES, indirect=["path"])
def test_half_precision_is_accurate_once_converged(dtype, path):
    problems = make([(1, 48, 48, 32)], getattr(torch, dtype), noise=0.05)
    check(problems)


# Only the general path chooses its passes by whether the temperature is learned.
@pytest.mark.parametrize(
    ("path", "symmetric", "learned"),
    [
        *(
            ("general", symmetric, learned)
            for symmetric in (False, True)
            for learned in (False, True)
        ),
        ("small", False, True),
        ("small", True, False),
    ],
    indirect=["path"],
)
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.013, 0.07, 10.0])
def test_every_temperature(path, temperature, symmetric, learned):
    value = torch.tensor([temperature], device=DEVICE) if learned else temperature
    check(make([(1, 35, 35, 16)], temperature=value, symmetric=symmetric))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_temperature_in_a_tensor_of_any_dtype(path, kind):
    problems = make([(1, 20, 25, 16)], temperature=torch.tensor(0.125, dtype=kind, device=DEVICE))
    number = problems._replace(temperature=0.125)
    found = errors(ours(problems), exact(number))
    assert max(found.values()) < 2e-6
    assert ours(problems).temperature.dtype == torch.float32


@pytest.mark.parametrize("path", ["general", "small"], indirect=True)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("temperature", [0.005, 0.0124, 0.0135, 0.02])
def test_negatives_may_be_as_far_as_can_be(path, temperature, learned):
    """Row 0 has every negative at −1/τ, the others one at 1/τ: no fixed shift may lose either."""
    x = torch.zeros(1, 20, 4, device=DEVICE)
    x[..., 0] = 1
    y = -x
    y[:, 0] = x[:, 0]
    value = torch.tensor(temperature, device=DEVICE) if learned else temperature
    problems = Problems((x,), (y.clone(),), (1.0,), value, True, True)
    found = ours(problems)
    assert error(found.loss, exact(problems).loss) < 1e-6
    assert found.x[0].isfinite().all()  # padding, at a logit of 0, is far above such a logsumexp


def test_the_fixed_shift_neither_overflows_nor_vanishes():
    fixed_shift = triton_backend.general.fixed_shift
    shifts = 0
    for temperature in (10.0, 0.07, 0.02, 0.014, 0.0125, 0.01, 1e-3):
        for columns in (2, 128, 65_536, 2**24):
            problems = make([(1, 1, 1, 1)], temperature=temperature)
            shift = fixed_shift(problems, columns)
            if shift is None:
                continue
            shifts += 1
            assert 1 / temperature + math.log(columns) - shift < math.log(3.4e38)
            assert -1 / temperature - shift > math.log(1.2e-38)
    assert shifts >= 17  # all at 0.02 and above


@pytest.mark.parametrize(("dtype", "path"), MODES, indirect=["path"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_single_row_has_no_loss(dtype, path, symmetric):
    problems = make([(2, 1, 1, 5)], getattr(torch, dtype), symmetric=symmetric)
    terms, gradients = triton_backend.step(problems)
    assert terms.loss.tolist() == [0, 0]
    assert terms.hits.tolist() == [True, True]
    assert (terms.lse == -math.inf).all()
    assert not gradients.x[0].any()
    assert not gradients.y[0].any()
    assert float(gradients.temperature) == 0


@pytest.mark.parametrize(("dtype", "path"), MODES, indirect=["path"])
def test_zero_vectors_have_no_gradient(dtype, path):
    problems = make([(1, 20, 24, 8)], getattr(torch, dtype))
    problems.x[0][0, 3] = 0
    problems.y[0][0, 5] = 0
    problems.y[0][0, 22] = 0
    found, expected = ours(problems), exact(problems)
    assert not found.x[0][0, 3].any()
    assert not found.y[0][0, [5, 22]].any()
    assert error(found.loss, expected.loss) < torch.finfo(problems.x[0].dtype).eps
    assert error(found.y[0], expected.y[0]) < 4 * torch.finfo(problems.x[0].dtype).eps


@pytest.mark.parametrize(("dtype", "path"), MODES, indirect=["path"])
@pytest.mark.parametrize("learned", [False, True])
def test_nan_shows_in_its_row(dtype, path, learned):
    temperature = torch.tensor(0.07, device=DEVICE) if learned else 0.07
    problems = make([(2, 20, 20, 8)], getattr(torch, dtype), temperature=temperature, noise=0.1)
    problems.x[0][0, 3, 2] = math.nan
    terms = triton_backend.forward(problems)
    assert terms.loss.isnan().nonzero().flatten().tolist() == [3]
    assert terms.hits.logical_not().nonzero().flatten().tolist() == [3]
    problems.x[0][0, 3, 2] = 0
    problems.y[0][1, 7] = math.nan
    terms = triton_backend.forward(problems)
    assert terms.loss.isnan().tolist() == [False] * 20 + [True] * 20
    assert not terms.hits[20:].any()


@pytest.mark.parametrize(("dtype", "path"), MODES, indirect=["path"])
def test_a_tie_is_a_miss(dtype, path):
    x = torch.linspace(0.1, 1.3, 11).expand(2, 40, 11).to(DEVICE, getattr(torch, dtype))
    problems = Problems((x,), (x,), (1.0,), 0.07, True, False)
    assert not triton_backend.forward(problems).hits.any()


@pytest.mark.parametrize(("dtype", "path"), MODES, indirect=["path"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_hits_and_lse(dtype, path, symmetric):
    problems = make([(2, 37, 37, 12)], getattr(torch, dtype), noise=1.0, symmetric=symmetric)
    terms = triton_backend.forward(problems)
    logits = reference.cosine_logits(problems.x[0].double(), problems.y[0].double(), 0.07)
    hits = reference.top1(logits).flatten()
    assert 10 < hits.sum() < 70
    # Half precision may decide otherwise where the best negative is as close as its rounding.
    assert (terms.hits != hits).sum() <= (0 if dtype == "float32" else 1)
    negatives = logits.masked_fill(torch.eye(37, dtype=torch.bool, device=DEVICE), -math.inf)
    both = [negatives.logsumexp(-1).flatten(), negatives.logsumexp(-2).flatten()]
    expected = torch.stack(both[: 1 + symmetric])
    assert error(terms.lse, expected) < torch.finfo(problems.x[0].dtype).eps


@pytest.mark.parametrize("path", ["general", "small"], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [("float32", 1e30), ("float32", 1e-9), ("bfloat16", 1e35), ("float16", 1e4)],
)
def test_length_does_not_matter(path, dtype, factor):
    problems = make([(1, 20, 23, 9)], getattr(torch, dtype))
    long = problems._replace(
        x=tuple((x.double() * factor).to(x.dtype) for x in problems.x),
        y=tuple((y.double() * factor).to(y.dtype) for y in problems.y),
    )
    found, expected = ours(long), exact(long)
    eps = torch.finfo(problems.x[0].dtype).eps
    assert error(found.loss, expected.loss) < eps
    if factor < 1e20:  # beyond, gradients are below the smallest number
        assert error(found.x[0].double() * factor, expected.x[0] * factor) < 100 * eps


@pytest.mark.parametrize(("dtype", "path"), MODES, indirect=["path"])
def test_strides_do_not_matter(dtype, path):
    problems = make([(3, 18, 18, 20), (2, 18, 18, 20)], getattr(torch, dtype))
    expected_terms, expected = triton_backend.step(problems)

    def timesteps_inside(t):  # [G, M, D] seen in memory of [M, G, D]
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    def between_nans(t):  # every other column and row of a larger tensor
        room = t.new_full((t.shape[0], 2 * t.shape[1], 2 * t.shape[2]), math.nan)
        room[:, ::2, ::2] = t
        return room[:, ::2, ::2]

    strided = problems._replace(
        x=(timesteps_inside(problems.x[0]), between_nans(problems.x[1])),
        y=(between_nans(problems.y[0]), timesteps_inside(problems.y[1])),
    )
    terms, gradients = triton_backend.step(strided)
    assert torch.equal(terms.loss, expected_terms.loss)
    assert all(map(torch.equal, gradients.x, expected.x))
    assert all(map(torch.equal, gradients.y, expected.y))
    assert gradients.x[0].stride() == strided.x[0].stride()


@pytest.mark.parametrize(
    ("dtype", "path"), [("float16", "small"), ("float16", "general")], indirect=["path"]
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_small_weights_do_not_underflow(dtype, path, symmetric):
    """A mean over a million rows: w·P is below float16, the gradient by a short vector is not."""
    problems = make([(1, 40, 40, 16)], torch.float16, temperature=1.0, symmetric=symmetric)
    problems = problems._replace(
        x=(problems.x[0] * 1e-3,), y=(problems.y[0] * 1e-3,), weights=(1e-6,)
    )
    found = errors(ours(problems), exact(problems))
    assert found["x0"] < 2e-3
    assert found["y0"] < 2e-3


@pytest.mark.parametrize(("dtype", "path"), MODES, indirect=["path"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_small_probabilities_do_not_underflow(dtype, path, symmetric):
    """One negative equals each query and pulls nowhere; what is left has P = 4e-6 in every direction."""
    e = torch.eye(16, device=DEVICE, dtype=getattr(torch, dtype))
    x, y = torch.cat([e[:8], e[:8]])[None], torch.cat([e[:8], e[:8], e[8:]])[None]
    problems = Problems((x,), (y[:, :16] if symmetric else y,), (1.0,), 0.08, True, symmetric)
    found, expected = ours(problems), exact(problems)
    bound = 2 * torch.finfo(e.dtype).eps + 2e-6  # the latter from exponents of 18
    assert error(found.x[0], expected.x[0]) < bound
    assert error(found.y[0], expected.y[0]) < bound


@pytest.mark.parametrize(("dtype", "path"), MODES, indirect=["path"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_same_bits_every_time(dtype, path, symmetric):
    problems = make([(2, 40, 40, 16)], getattr(torch, dtype), symmetric=symmetric)
    first_terms, first = triton_backend.step(problems)
    for _ in range(100 if GPU else 1):
        terms, gradients = triton_backend.step(problems)
        assert all(map(torch.equal, terms[:4], first_terms[:4]))  # ranks are not asked for
        assert all(map(torch.equal, (*gradients.x, *gradients.y), (*first.x, *first.y)))
        assert torch.equal(gradients.temperature, first.temperature)


@pytest.mark.parametrize(
    ("shape", "dtype", "products", "path"),
    [
        ((1, 256, 256, 256), "bfloat16", "highest", "small"),
        ((1, 4, 257, 8), "float16", "highest", "general"),
        ((1, 4, 8, 257), "float16", "highest", "general"),
        ((1, 4, 256, 8), "float32", "high", "small"),
        ((1, 4, 128, 8), "float32", "highest", "small"),
        ((1, 4, 129, 8), "float32", "highest", "general"),
    ],
)
def test_the_path_follows_from_the_size(monkeypatch, shape, dtype, products, path):
    class TakenError(Exception):
        """Names the way."""

    def take(name):
        raise TakenError(name)

    for name in ("small", "general"):
        module = getattr(triton_backend, name)
        monkeypatch.setattr(module, "contrast", lambda *_, name=name: take(name))
    torch.set_float32_matmul_precision(products)
    with pytest.raises(TakenError, match=path):
        triton_backend.forward(make([shape], getattr(torch, dtype)))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("path", ["general", "small"], indirect=True)
@pytest.mark.parametrize("noise", [None, 1e-3])
def test_tf32_is_as_accurate_as_plain_tf32(path, noise):
    torch.set_float32_matmul_precision("high")
    check(make([(17, 128, 128, 128)], noise=noise))


def test_float64_is_refused():
    problems = make([(1, 3, 3, 4)], torch.float64)
    with pytest.raises(TypeError, match=r"backend 'triton' .*not float64; use backend='torch'"):
        triton_backend.forward(problems)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(17, 128, 128, 128), (1, 1000, 1000, 200)])
def test_a_graph_may_capture_a_step(shape):
    temperature = torch.tensor(0.07, device=DEVICE)
    problems = make([shape], torch.bfloat16, temperature=temperature)
    triton_backend.step(problems)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        terms, gradients = triton_backend.step(problems)
    problems.x[0].copy_(torch.randn_like(problems.x[0]))
    temperature.fill_(0.1)
    graph.replay()
    expected_terms, expected = triton_backend.step(problems)
    assert torch.equal(terms.loss, expected_terms.loss)
    assert torch.equal(gradients.x[0], expected.x[0])
