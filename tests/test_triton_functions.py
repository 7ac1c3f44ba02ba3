"""The Triton backend's functions of the logits, and its masks, against float64 and against plain PyTorch.

InfoNCE over all pairs, and what numbers of any size come to, are in `test_triton.py`.
"""

import math
from functools import partial

import gpu_problems
import pytest
import torch
from gpu_problems import DEVICE, GPU, Result, errors, evaluate, exact, make, make_masked, plain
from hypothesis import given, settings
from hypothesis import strategies as st

from hdc_kernels import reference

triton_backend = pytest.importorskip("hdc_kernels.backends.triton", exc_type=ModuleNotFoundError)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of log(0)

ours = partial(evaluate, triton_backend)
check = partial(gpu_problems.check, triton_backend)

FUNCTIONS = [("info_nce", mask) for mask in ("ids", "same")] + [
    (function, mask)
    for function in ("logsumexp", "softplus", "tilted")
    for mask in ("everything", "off", "ids", "same", "off ids")
]
ONE_WAY = "softplus", "tilted"  # never symmetric


@pytest.mark.parametrize(("function", "mask"), FUNCTIONS)
@pytest.mark.parametrize(
    ("dtype", "learned", "shape"),
    [
        ("float32", False, (2, 19, 35, 17)),
        ("float32", True, (1, 35, 19, 17)),
        ("bfloat16", False, (1, 35, 19, 17)),
        ("float16", True, (2, 19, 35, 17)),
    ],
)
def test_functions_and_masks(dtype, learned, shape, function, mask):
    if function == "info_nce":
        shape = (shape[0], 19, 35, shape[3])
    temperature = torch.tensor(0.07, device=DEVICE) if learned else 0.07
    check(make_masked(shape, function, mask, getattr(torch, dtype), temperature=temperature))


@pytest.mark.parametrize("learned", [False, True])  # in one pass over the logits or in two
@pytest.mark.parametrize(
    ("function", "mask"), [case for case in FUNCTIONS if case[0] not in ONE_WAY]
)
def test_functions_and_masks_of_columns(function, mask, learned):
    temperature = torch.tensor(0.07, device=DEVICE) if learned else 0.07
    problems = make_masked((2, 21, 21, 16), function, mask, temperature=temperature, symmetric=True)
    check(problems)
    check(problems, torch.linspace(0.5, 2, 42, device=DEVICE))


@pytest.mark.parametrize(
    ("function", "mask"), [("info_nce", "ids"), ("logsumexp", "off"), ("softplus", "off ids")]
)
@pytest.mark.parametrize(
    ("dtype", "shape"), [("bfloat16", (1, 150, 140, 24)), ("float16", (1, 40, 24, 300))]
)
def test_functions_and_masks_beyond_one_block(dtype, shape, function, mask):
    if function == "info_nce":
        shape = (1, shape[2], shape[1], shape[3])
    problems = make_masked(shape, function, mask, getattr(torch, dtype))
    check(problems, torch.linspace(0.5, 2, shape[1], device=DEVICE))


@pytest.mark.parametrize("function", ["logsumexp", "softplus", "tilted"])
def test_functions_of_pairs(function):
    problems = make([(2, 9, 5, 7), (1, 9, 5, 7), (1, 4, 20, 3)])._replace(function=function)
    if function == "softplus":
        problems = problems._replace(bias=torch.linspace(-5, 2, 31, device=DEVICE))
    check(problems)
    check(problems, torch.linspace(0.5, 2, 31, device=DEVICE))


@pytest.mark.parametrize("function", ["info_nce", "logsumexp", "softplus", "tilted"])
def test_ranks(function):
    """Of the diagonal among what the mask lets through, also where a column is there twice."""
    problems = make_masked((1, 19, 35, 17), function, "off ids")._replace(ranked=True)
    problems.y[0][0, 30] = problems.y[0][0, 4]
    logits = reference.cosine_logits(problems.x[0], problems.y[0], 1.0)[0]
    x_ids, y_ids = problems.mask.ids
    others = (x_ids[0][:, None] != y_ids[0]) & ~torch.eye(19, 35, dtype=torch.bool, device=DEVICE)
    expected = ((logits >= logits.diagonal()[:, None]) & others).sum(1)
    assert expected[4] > 0
    terms, _ = triton_backend.step(problems)
    assert terms.ranks.tolist() == triton_backend.forward(problems).ranks.tolist()
    assert terms.ranks.tolist() == expected.tolist()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("function", ["info_nce", "logsumexp", "softplus"])
def test_a_row_without_columns(function, learned, symmetric):
    """Row 3 and column 5 have an id of their own; only info_nce's positives are left of them."""
    temperature = torch.tensor(0.1, device=DEVICE) if learned else 0.1
    problems = make_masked(
        (1, 18, 18, 8),
        function,
        "same",
        temperature=temperature,
        symmetric=symmetric and function != "softplus",
    )
    x_ids, y_ids = problems.mask.ids
    x_ids[0, 3], y_ids[0, 5] = 100, 101
    found, expected = ours(problems), exact(problems)
    if not problems.symmetric:
        assert found.loss[3] == (-math.inf if function == "logsumexp" else 0)
        assert not found.x[0][0, 3].any()
        assert function == "info_nce" or not found.y[0][0, 5].any()
    assert max(errors(found, expected).values()) < 1e-6
    assert float(found.total) == pytest.approx(float(expected.total), rel=1e-6)


@pytest.mark.parametrize("bias", [-10.0, -40.0, 30.0])
def test_softplus_is_accurate_at_every_bias(bias):
    """float32 rounds the logits, of up to 14, but must not round 1 + exp(−40) to 1."""
    problems = make_masked((1, 20, 24, 8), "softplus", "everything")
    problems = problems._replace(bias=torch.full_like(problems.bias, bias))
    found = errors(ours(problems), exact(problems))
    assert max(found.values()) < 4e-6


def test_the_same_bits_of_any_function_every_time():
    for function in ("logsumexp", "softplus"):
        problems = make_masked((2, 20, 30, 16), function, "off ids", torch.bfloat16)
        first_terms, first = triton_backend.step(problems)
        for _ in range(100 if GPU else 1):
            terms, gradients = triton_backend.step(problems)
            assert torch.equal(terms.loss, first_terms.loss)
            assert not terms.hits.any()
            assert all(map(torch.equal, (*gradients.x, *gradients.y), (*first.x, *first.y)))
            assert gradients.bias is None or torch.equal(gradients.bias, first.bias)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_problem(data):
    """Within twice plain PyTorch's error and some roundings of the largest terms."""
    function = data.draw(st.sampled_from(["info_nce", "logsumexp", "softplus"]))
    mask = data.draw(st.sampled_from(["everything", "off", "ids", "same", "off ids"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    G, M, N, D = (data.draw(st.integers(*bounds)) for bounds in ((1, 2), (1, 40), (1, 40), (2, 24)))
    symmetric = function != "softplus" and data.draw(st.booleans())
    if function == "info_nce":
        M, N = min(M, N), max(M, N)
    tau = math.exp(data.draw(st.floats(math.log(1e-2), math.log(10.0))))
    problems = make_masked(
        (G, M, M if symmetric else N, D),
        function,
        mask,
        dtype,
        temperature=torch.tensor(tau, device=DEVICE) if data.draw(st.booleans()) else tau,
        normalize=data.draw(st.booleans()),
        symmetric=symmetric,
    )
    if data.draw(st.booleans()):  # rows inside problems, and every other dimension
        twice = [
            t.repeat_interleave(2, -1).transpose(0, 1).contiguous()
            for t in (*problems.x, *problems.y)
        ]
        x, y = (t.transpose(0, 1)[..., ::2] for t in twice)
        problems = problems._replace(x=(x,), y=(y,))

    expected, found, allowed = exact(problems), ours(problems), plain(problems)
    eps = torch.finfo(dtype).eps + 2.0**-22 / tau
    terms = problems.weights[0] * G * max(M, N) * (N if function == "softplus" else 1)
    scales = Result(torch.tensor(1 / tau), None, 1 / tau, 1 / tau, 1 / tau**2, 1.0)
    for name in ("loss", "x", "y", "temperature", "bias"):
        mine, wanted, theirs = (getattr(result, name) for result in (found, expected, allowed))
        if wanted is None:
            continue
        mine, wanted, theirs = (t[0] if isinstance(t, tuple) else t for t in (mine, wanted, theirs))
        here = wanted != -math.inf
        assert torch.equal(mine != -math.inf, here), name
        scale = float(wanted[here].norm()) + terms * float(getattr(scales, name))
        bound = 2 * float((theirs[here].double() - wanted[here]).norm()) + eps * scale
        assert float((mine[here].double() - wanted[here]).norm()) <= bound, (name, problems)
