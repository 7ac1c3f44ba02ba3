"""`Queue`, `fused_moco` and `MoCo` against a list of keys and the whole matrix in float64."""

import copy
import io
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from contrast_problems import in_a_new_process
from embeddings import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hdc_kernels.moco import MoCo, Queue, fused_moco


def plain(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    tau: float | Tensor,
    reduction: str = "mean",
    normalize: bool = True,
) -> Tensor:
    """What everyone writes: the positive in column 0, then the queue."""
    if normalize:
        query, key, queue = (F.normalize(x, dim=-1) for x in (query, key, queue))
    s = torch.cat(((query * key).sum(1, keepdim=True), query @ queue.mT), 1) / tau
    own = torch.zeros(len(s), dtype=torch.int64)
    return F.cross_entropy(s, own, reduction=reduction)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 7), batches=st.lists(st.integers(0, 12), max_size=8))
def test_a_queue_holds_the_last_keys(size: int, batches: list[int]) -> None:
    """Any batches, also empty ones, over the end and larger than the queue, against a list."""
    queue, given_keys = Queue(size, 2), 0
    expected: list[float] = [0.0] * size  # by place
    for count in batches:
        keys = torch.arange(given_keys, given_keys + count).float()
        queue.enqueue(torch.stack((keys, -keys), 1))
        for key in range(given_keys, given_keys + count):
            expected[key % size] = key
        given_keys += count
        assert queue.keys.tolist() == [[key, -key] for key in expected]
        assert queue.position.item() == given_keys % size
        assert queue.filled.item() == min(given_keys, size)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 9),
    size=st.integers(1, 9),
    tau=st.sampled_from([0.05, 0.5, 3.0]),
    normalize=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    backend=st.sampled_from(["auto", "torch", "chunked"]),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients(
    batch: int, size: int, tau: float, normalize: bool, reduction: Any, backend: Any, seed: int
) -> None:
    """Of queries, keys, the queue and the temperature."""
    agree(
        lambda q, k, n, t: fused_moco(
            q, k, n, temperature=t, reduction=reduction, normalize=normalize, backend=backend
        ),
        lambda q, k, n, t: plain(q, k, n, t, reduction, normalize),
        randn(batch, 4, seed=seed),
        randn(batch, 4, seed=seed + 1),
        randn(size, 4, seed=seed + 2),
        torch.tensor(tau, dtype=torch.float64),
        bound=1e-11,
        floor=1.0,
    )


@pytest.mark.parametrize("backend", ["auto", "torch", "chunked"])
def test_only_filled_places_count(backend: Any) -> None:
    """Three of eight places hold a key, then all."""
    queue = Queue(8, 4, dtype=torch.float64)
    query, key = randn(5, 4), randn(5, 4, seed=1)
    for count in (3, 9):
        keys = randn(count, 4, seed=2)
        queue.enqueue(keys)
        agree(
            lambda q, k: fused_moco(q, k, queue, backend=backend),
            lambda q, k, n=keys[-8:]: plain(q, k, n, 0.07),  # type: ignore[misc]
            query,
            key,
        )


@pytest.mark.parametrize("backend", ["auto", "torch", "chunked"])
def test_an_empty_queue_has_nothing_to_tell(backend: Any) -> None:
    """Loss 0 and gradient 0, not NaN; the second derivative, too."""
    query, key = randn(3, 4).requires_grad_(), randn(3, 4, seed=1).requires_grad_()
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = fused_moco(query, key, Queue(6, 4), temperature=tau, backend=backend)
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, (query, key, tau), create_graph=True)
    for gradient in gradients:
        assert gradient.count_nonzero() == 0
    for second in torch.autograd.grad(sum(g.sum() for g in gradients), (query, key, tau)):
        assert second.count_nonzero() == 0


def test_near_convergence_the_loss_keeps_its_digits() -> None:
    """Four negatives at −1: 4·exp(−80) is not rounded to 0."""
    query = torch.eye(4, dtype=torch.float64)[:1]
    loss = fused_moco(query, query, -query.repeat(4, 1), temperature=0.025)
    assert loss.item() == pytest.approx(4 * math.exp(-80), rel=1e-12)


def test_the_module_reads_before_it_fills() -> None:
    """Steps in training compare with earlier batches only, uneven ones, too; evaluation fills nothing."""
    module = MoCo(5, 4, 0.2, dtype=torch.float64)
    history = torch.zeros(0, 4, dtype=torch.float64)
    for step, count in enumerate((3, 3, 3, 1, 7, 2)):
        query = randn(count, 4, seed=2 * step).requires_grad_()
        key = randn(count, 4, seed=2 * step + 1)
        expected = plain(query, key, history[-5:], 0.2)
        module.eval()
        assert module(query, key).item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-14)
        module.train()
        loss = module(query, key)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-14)
        (found,) = torch.autograd.grad(loss, query)  # after the queue was filled
        (slope,) = torch.autograd.grad(expected, query)
        torch.testing.assert_close(found, slope, rtol=1e-11, atol=1e-13)
        history = torch.cat((history, key))
    assert not module.queue.keys.requires_grad


def test_enqueue_detaches() -> None:
    """No graph is kept alive."""
    queue = Queue(4, 3)
    queue.enqueue(randn(2, 3).requires_grad_() * 2)
    assert not queue.keys.requires_grad


def test_the_queue_is_saved_and_moves() -> None:
    """A checkpoint goes on where it was; the numbers survive .half() and .to()."""
    module = MoCo(5, 4)
    module.queue.enqueue(randn(7, 4))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = MoCo(5, 4)
    other.load_state_dict(torch.load(file))
    for queue in (module.queue, other.queue, copy.deepcopy(other).queue):
        queue.enqueue(randn(1, 4, seed=1))
    assert torch.equal(other.queue.keys, module.queue.keys)
    assert sorted(module.state_dict()) == ["queue.filled", "queue.keys", "queue.position"]
    half = other.half().queue
    assert (half.keys.dtype, half.filled.dtype) == (torch.float16, torch.int64)
    assert other.to("meta").queue.keys.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_queries_of_another_dtype(dtype: torch.dtype) -> None:
    """The queue is read in theirs."""
    queue = Queue(6, 4)
    queue.enqueue(randn(6, 4))
    query, key = randn(3, 4, dtype=dtype), randn(3, 4, seed=1, dtype=dtype)
    loss = fused_moco(query, key, queue)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(loss, fused_moco(query, key, queue.keys.to(dtype)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: Any) -> None:
    """First and second derivatives for queries, keys, queue and temperature."""
    inputs = (randn(3, 3), randn(3, 3, seed=1), randn(4, 3, seed=2), torch.tensor(0.4).double())
    for x in inputs:
        x.requires_grad_()

    def loss(query: Tensor, key: Tensor, queue: Tensor, tau: Tensor) -> Tensor:
        return fused_moco(query, key, queue, temperature=tau, reduction=reduction)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_compiled_equals_eager() -> None:
    """One graph for a whole step, reading and filling."""
    torch.compiler.reset()
    modules = [MoCo(7, 4, dtype=torch.float64) for _ in range(2)]
    compiled = torch.compile(modules[0], fullgraph=True)
    for step in range(4):
        query, key = randn(3, 4, seed=step), randn(3, 4, seed=step + 9)
        losses = compiled(query, key), modules[1](query, key)
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12, abs=1e-15)
    for ours, exact in zip(modules[0].buffers(), modules[1].buffers(), strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("tau", [0.01, 0.07])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain(dtype: torch.dtype, tau: float) -> None:
    """Error against float64 at most twice that of the plain loss in that dtype; a NaN fails every comparison."""
    half = [randn(24, 32, seed=k, dtype=dtype).requires_grad_() for k in range(3)]
    exact = [x.detach().double().requires_grad_() for x in half]
    ours = fused_moco(*half, temperature=tau)
    theirs, truth = plain(*half, tau), plain(*exact, tau)
    assert ours.dtype == torch.float32
    assert abs(ours - truth) <= 2 * abs(theirs - truth)
    slopes = (
        torch.autograd.grad(loss, x) for loss, x in ((ours, half), (theirs, half), (truth, exact))
    )
    for our, their, slope in zip(*slopes, strict=True):
        assert our.dtype == dtype
        assert (our - slope).norm() <= 2 * (their - slope).norm()


def test_nan_is_not_hidden() -> None:
    """A NaN key in the queue spoils every term, one in a batch its own."""
    query, key, queue = randn(3, 4), randn(3, 4, seed=1), randn(5, 4, seed=2)
    spoilt = queue.clone()
    spoilt[1, 1] = math.nan
    assert fused_moco(query, key, spoilt, reduction="none").isnan().all()
    key[1, 2] = math.nan
    terms = fused_moco(query, key, queue, reduction="none")
    assert terms.isnan().tolist() == [False, True, False]


def test_module_equals_function() -> None:
    """Every option reaches the function; a parameter is learnt."""
    query, key = randn(3, 4), randn(3, 4, seed=1)
    for options in ({}, {"reduction": "none"}, {"normalize": False}, {"backend": "chunked"}):
        module = MoCo(5, 4, 0.3, **options).eval()
        module.queue.enqueue(randn(4, 4, seed=2))
        expected = fused_moco(query, key, module.queue, temperature=0.3, **options)
        assert torch.equal(module(query, key), expected)
        for name, value in options.items():
            assert f"{name}={value!r}" in repr(module)
    learnt = MoCo(5, 4, nn.Parameter(torch.tensor(0.2)))
    learnt(query, key)
    learnt(query, key).backward()
    assert learnt.temperature.grad is not None
    assert "size=5, dimension=4" in repr(learnt)


PEAK = """
import torch
from hdc_kernels import fused_moco

def high_water():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

def grows(batch, size):
    query, key, queue = (torch.randn(rows, 128) for rows in (batch, batch, size))
    query.requires_grad_()
    before = high_water()
    fused_moco(query, key, queue, backend="cpu").backward()
    return high_water() - before

torch.set_num_threads(2)
grows(8, 8)
print(grows(2048, 65536))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory() -> None:
    """In MiB: 112 beside a queue of 65,536 keys, three times its 33; nothing for gradients that it does not have."""
    grown = int(in_a_new_process(PEAK)) / 1024
    assert 33 <= grown <= 112


@pytest.mark.parametrize(
    ("queue", "message"),
    [
        ("a", r"queue is a str; it must be a Queue or a tensor \[K, D\]"),
        (randn(5, 3), r"queue has shape \[5, 3\]; it must be \[K, D\], here \[K, 4\]"),
        (randn(0, 4), r"queue has shape \[0, 4\]"),
        (randn(5, 4).float(), "queue has dtype torch.float32 but query has torch.float64"),
        (Queue(5, 3), r"queue has shape \[5, 3\]"),
    ],
)
def test_errors(queue: Any, message: str) -> None:
    """One line: the argument, what was given, what is allowed."""
    with pytest.raises((TypeError, ValueError), match=message):
        fused_moco(randn(3, 4), randn(3, 4, seed=1), queue)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "size is 0; it must be at least 1"),
        ((4, -1), "dimension is -1; it must be at least 1"),
        ((4.0, 4), "size is a float; it must be an int"),
    ],
)
def test_errors_of_the_queue(arguments: Any, message: str) -> None:
    """One line: the argument, what was given, what is allowed."""
    with pytest.raises((TypeError, ValueError), match=message):
        Queue(*arguments)


def test_errors_of_enqueue() -> None:
    """Keys of the queue's width only."""
    with pytest.raises(ValueError, match=r"keys has shape \[2, 3\] on cpu; it must be \[N, 4\]"):
        Queue(5, 4).enqueue(randn(2, 3))
    with pytest.raises(TypeError, match=r"keys is a list; it must be a tensor"):
        Queue(5, 4).enqueue([1.0])  # type: ignore[arg-type]
