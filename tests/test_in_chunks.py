"""`InChunks` against the same encoder on the whole batch, or on the same chunks with the graph kept."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equations
import pytest
import torch
import torch.distributed as dist
from embeddings import randn
from processes import start
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hdc_kernels import fused_info_nce
from hdc_kernels.in_chunks import InChunks

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]


def mlp(*between: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """6 → 8 → 5, with `between` after the first layer; the weights depend on the seed alone."""
    encoder = nn.Sequential(nn.Linear(6, 8), *between, nn.Tanh(), nn.Linear(8, 5))
    with torch.no_grad():
        for i, parameter in enumerate(encoder.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=100 * seed + i))
    return encoder.to(dtype)


def by_hand(encoder: nn.Module, chunk_size: int) -> Callable[..., Tensor]:
    """The same chunks in the same order, but with the whole graph in memory."""
    return lambda x: torch.cat([encoder(chunk) for chunk in x.split(chunk_size)])


def gradients(module: nn.Module) -> list[Tensor]:
    """Of all parameters, none of which went without; they are taken away."""
    found = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(found) == len(list(module.parameters()))
    module.zero_grad(set_to_none=True)
    return found


def assert_close(ours: list[Tensor], exact: list[Tensor], bound: float = 1e-12) -> None:
    """Each relative to its own size; with a bound of 0, bit for bit."""
    for found, truth in zip(ours, exact, strict=True):
        assert found.shape == truth.shape
        assert torch.equal(found, truth) or equations.relative_error(found, truth) < bound


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, 5, 10, 64])
def test_gradients_are_those_of_the_whole_batch(chunk_size: int, symmetric: bool) -> None:
    """Two towers and what comes before them, in chunks that divide the batch of 10 and that do not."""
    towers = [mlp(seed=0), mlp(seed=1)]
    inputs = [randn(10, 6, seed=2).requires_grad_(), randn(10, 6, seed=3).requires_grad_()]

    def run(*encoders: nn.Module) -> tuple[Tensor, list[Tensor]]:
        query, key = (encoder(x) for encoder, x in zip(encoders, inputs, strict=True))
        loss = fused_info_nce(query, key, temperature=0.2, symmetric=symmetric)
        leaves = [*inputs, *towers[0].parameters(), *towers[1].parameters()]
        return loss, list(torch.autograd.grad(loss, leaves))

    (ours, found), (exact, truth) = run(*(InChunks(t, chunk_size) for t in towers)), run(*towers)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-13)
    assert_close(found, truth)


def test_one_encoder_for_both_views() -> None:
    """Called twice before the backward pass, with batches of different sizes, as for extra negatives."""
    encoder, query, key = mlp(), randn(7, 6), randn(12, 6, seed=1)
    for run in (InChunks(encoder, 4), encoder):
        fused_info_nce(run(query), run(key)).backward()
        if run is not encoder:
            ours = gradients(encoder)
    assert_close(ours, gradients(encoder))


def test_second_derivatives() -> None:
    """A gradient penalty: the graph of the gradients is kept and differentiated again."""
    encoder, x = mlp(), randn(7, 6).requires_grad_()

    def run(encode: nn.Module) -> list[Tensor]:
        (slope,) = torch.autograd.grad(fused_info_nce(encode(x), randn(7, 5)), x, create_graph=True)
        slope.square().sum().backward()
        return gradients(encoder)

    assert_close(run(InChunks(encoder, 3)), run(encoder))


class TextEncoder(nn.Module):
    """Tokens and an optional shift in, pooled output and a list of others out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5, dtype=torch.float64)

    def forward(
        self, tokens: dict[str, Tensor], *, shifts: list[Tensor | None], scale: float
    ) -> dict[str, Any]:
        embedded = self.embedding(tokens["ids"]) * tokens["mask"][..., None] * scale
        first, second = shifts
        assert second is None
        return {"pooled": embedded.mean(1) + first, "others": [embedded, None]}


def test_nested_inputs_and_outputs() -> None:
    """Tensors are split wherever they are, the rest is handed on; what comes out is joined likewise."""
    encoder = TextEncoder()
    ids = torch.arange(7 * 4).view(7, 4) % 9
    tokens = {"ids": ids, "mask": (ids > 2).double()}
    shifts = [randn(7, 5, seed=1), None]
    ours = InChunks(encoder, 3)(tokens, shifts=shifts, scale=0.5)
    exact = encoder(tokens, shifts=shifts, scale=0.5)
    assert ours.keys() == exact.keys()
    assert torch.equal(ours["pooled"], exact["pooled"])
    assert torch.equal(ours["others"][0], exact["others"][0])
    assert ours["others"][1] is None
    found, truth = (
        torch.autograd.grad(
            fused_info_nce(out["pooled"], shifts[0]) + out["others"][0].square().sum(),
            list(encoder.parameters()),
        )
        for out in (ours, exact)
    )
    assert_close(list(found), list(truth))


class Moving(nn.Module):
    """An encoder that takes its inputs to its own device, by keyword."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *, x: Tensor) -> Tensor:
        return self.net(x.to(next(self.net.parameters()).device))


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_is_replayed(device: str) -> None:
    """In the second pass; afterwards, the random state is that of one pass, as the next numbers tell."""
    encoder = Moving(mlp(nn.Dropout(0.5))).to(device)
    query, key = randn(10, 6, seed=1), randn(10, 6, seed=2)

    def run(encode: Callable[..., Tensor]) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(3)
        fused_info_nce(encode(x=query), encode(x=key), symmetric=True).backward()
        return gradients(encoder), torch.rand(4, device=device)

    found, after = run(InChunks(encoder, 4))
    truth, expected = run(lambda x: torch.cat([encoder(x=chunk) for chunk in x.split(4)]))
    assert_close(found, truth)
    assert torch.equal(after, expected)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_replayed(inside: bool) -> None:
    """bfloat16 in both passes, wherever the backward pass is called: the gradients are equal bit for bit."""
    encoder = mlp(nn.LayerNorm(8), dtype=torch.float32)
    query, key = randn(10, 6, dtype=torch.float32), randn(10, 6, seed=1, dtype=torch.float32)

    def run(encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = encode(query)
            loss = fused_info_nce(output, encode(key))
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert output.dtype == torch.bfloat16
        return gradients(encoder)

    assert_close(run(InChunks(encoder, 4)), run(by_hand(encoder, 4)), bound=0)


class Steps(nn.Module):
    """Buffers of every kind: written in place, replaced, shared, empty, with a gradient; all are used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("calls", torch.ones((), dtype=torch.float64))
        self.register_buffer("nothing", None)
        self.register_buffer("gain", torch.full((8,), 2.0).double().requires_grad_())
        self.also = nn.Module()
        self.also.register_buffer("mean", self.mean)  # one buffer at two places

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(), 0.5)
            self.calls = self.calls + 1
        return (x * self.gain - self.also.mean.clone()) * self.calls


BUFFERS = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "cumulative batch norm": lambda: nn.BatchNorm1d(8, momentum=None),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "own": Steps,
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_are_updated_once(kind: str) -> None:
    """By the forward pass, as without checkpoints; each backward pass finds what its chunk had found."""
    torch.manual_seed(0)
    encoder = mlp(BUFFERS[kind]())
    other = copy.deepcopy(encoder)
    query, key = randn(10, 6), randn(10, 6, seed=1)
    for _ in range(2):  # the second step starts from what the first has left
        chunked, whole = InChunks(encoder, 4), by_hand(other, 4)
        ours, exact = (fused_info_nce(run(query), run(key)) for run in (chunked, whole))
        buffers = list(encoder.buffers())
        values = copy.deepcopy(buffers)
        versions = [buffer._version for buffer in buffers]
        for loss in (ours, exact):
            loss.backward(retain_graph=True)
            loss.backward()
        assert_close(gradients(encoder), gradients(other))
        assert all(a is b for a, b in zip(encoder.buffers(), buffers, strict=True))
        assert versions == [buffer._version for buffer in buffers]
        assert_close(buffers, values, bound=0)
        assert_close(buffers, list(other.buffers()), bound=0)


def test_batch_norm_in_evaluation() -> None:
    """Then it normalises rows one by one: gradients are those of the whole batch again."""
    encoder = mlp(nn.BatchNorm1d(8))
    encoder(randn(30, 6, seed=5))
    encoder.eval()
    for run in (InChunks(encoder, 4), encoder):
        fused_info_nce(run(randn(10, 6)), randn(10, 5, seed=1)).backward()
        if run is not encoder:
            ours = gradients(encoder)
    assert_close(ours, gradients(encoder))


def test_scaled_loss() -> None:
    """Powers of two leave every digit as it is."""
    encoder = mlp(dtype=torch.float32)
    x, y = randn(10, 6, dtype=torch.float32), randn(10, 5, seed=1, dtype=torch.float32)
    optimizer = torch.optim.SGD(encoder.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(fused_info_nce(InChunks(encoder, 4)(x), y)).backward()
    scaler.unscale_(optimizer)
    ours = gradients(encoder)
    fused_info_nce(by_hand(encoder, 4)(x), y).backward()
    assert_close(ours, gradients(encoder), bound=0)


def test_gradients_accumulate() -> None:
    """Over batches, and on top of what is there."""
    encoder = mlp()
    batches = [(randn(n, 6, seed=n), randn(n, 5, seed=n + 1)) for n in (10, 7)]
    truth = []
    for x, y in batches:
        fused_info_nce(encoder(x), y).backward()
        truth.append(gradients(encoder))
    for x, y in batches:
        fused_info_nce(InChunks(encoder, 4)(x), y).backward()
    assert_close(gradients(encoder), [a + b for a, b in zip(*truth, strict=True)])


class Counting(nn.Module):
    """Remembers how many rows each of its calls had."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.net(x)


def test_each_chunk_runs_once_more_from_the_last_to_the_first() -> None:
    """The cost is what the docstring says, and frozen parameters in front of a trained input are no obstacle."""
    encoder = Counting(mlp()).requires_grad_(False)
    x = randn(10, 6).requires_grad_()
    loss = fused_info_nce(InChunks(encoder, 4)(x), randn(10, 5))
    assert encoder.calls == [4, 4, 2]
    loss.backward()
    assert encoder.calls == [4, 4, 2, 2, 4, 4]
    (truth,) = torch.autograd.grad(fused_info_nce(encoder(x), randn(10, 5)), x)
    assert x.grad is not None
    assert equations.relative_error(x.grad, truth) < 1e-12


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_in_chunks(grad: Callable[[], Any]) -> None:
    """Without gradients, or with nothing that needs one: one pass and no graph."""
    with grad():
        encoder = Counting(mlp(nn.BatchNorm1d(8)))
        encoder.requires_grad_(grad is torch.no_grad)
        other = copy.deepcopy(encoder)
        output = InChunks(encoder, 4)(randn(10, 6))
        exact = by_hand(other, 4)(randn(10, 6))
    assert not output.requires_grad
    assert torch.equal(output, exact)
    assert encoder.calls == [4, 4, 2]
    assert_close(list(encoder.buffers()), list(other.buffers()), bound=0)


def test_an_empty_batch_is_the_encoders_business() -> None:
    """One chunk without rows."""
    output = InChunks(mlp(), 4)(randn(0, 6))
    assert output.shape == (0, 5)
    assert output.requires_grad


def test_modified_inputs_are_noticed() -> None:
    """The second pass would compute something else."""
    x = randn(10, 6)
    output = InChunks(mlp(), 4)(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_encoder(backend: str) -> None:
    """One graph for either size of chunk, used by both passes, though batch norm has other buffers in one."""
    from torch._dynamo.testing import (
        CompileCounterWithBackend,
    )  # slow, and DDP's processes read this file

    torch.compiler.reset()
    encoder = mlp(nn.BatchNorm1d(8), nn.Dropout(0.5))
    other = copy.deepcopy(encoder)
    frames = CompileCounterWithBackend(backend)
    chunked = InChunks(torch.compile(encoder, backend=frames, dynamic=False), 4)
    for step in range(3):
        query, key = randn(10, 6, seed=step), randn(10, 6, seed=step + 9)
        for run in (chunked, by_hand(other, 4)):
            torch.manual_seed(step)
            fused_info_nce(run(query), run(key)).backward()
        assert_close(gradients(encoder), gradients(other))
        assert_close(list(encoder.buffers()), list(other.buffers()))
    assert frames.frame_count == 2


PEAK = """
import re, torch
from pathlib import Path
from torch import nn
from hdc_kernels.in_chunks import InChunks

def read(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10

torch.set_num_threads(1)
encoder = nn.Sequential(nn.Linear(8, 1024), *[nn.Tanh() for _ in range(31)], nn.Linear(1024, 8))
x = torch.randn(2048, 8)

def step(encode, x):
    (encode(x) * encode(x.flip(0))).square().mean().backward()

step(InChunks(encoder, 64), x[:128])
before = read("VmRSS")
for encode in (InChunks(encoder, 128), encoder):
    step(encode, x)
    print(read("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_one_chunk_is_in_memory() -> None:
    """32 activations of 4 kB for each of 2 · 2048 rows are 512 MB, for the 128 rows of a chunk 16 MB.

    The peak of a process of its own, in chunks and then as a whole; four chunks leave room for gradients
    on the way and what an allocator holds back. The loss is one that takes no memory to speak of.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", PEAK],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    chunks, whole = map(int, done.stdout.split())
    assert whole > 500
    assert chunks < 64


def reduce_gradients(rank: int, folder: str) -> None:
    """One of two processes: a step of DDP with its own half of the data, in chunks and whole."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    x, y = half(rank)
    found = []
    for wrap in (lambda encoder: InChunks(encoder, 3), lambda encoder: encoder):
        encoder = mlp()
        run = DistributedDataParallel(wrap(encoder))
        for _ in range(2):  # DDP rearranges its buckets after the first
            encoder.zero_grad()
            fused_info_nce(run(x), y).backward()
        found.append(gradients(encoder))
        del run
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # who leaves first may leave the other one waiting for it in its own teardown
    dist.destroy_process_group()


def half(rank: int) -> tuple[Tensor, Tensor]:
    """What one process trains on."""
    return randn(8, 6, seed=rank), randn(8, 5, seed=rank + 10)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes: gradients are averaged over both, once each, as they are without chunks."""
    start(reduce_gradients, 2, str(tmp_path))
    alone = []
    for rank in range(2):
        encoder = mlp()
        x, y = half(rank)
        fused_info_nce(encoder(x), y).backward()
        alone.append(gradients(encoder))
    mean = [(a + b) / 2 for a, b in zip(*alone, strict=True)]
    for rank in range(2):
        chunked, whole = torch.load(tmp_path / f"{rank}.pt")
        assert_close(whole, mean)
        assert_close(chunked, whole)


def test_module() -> None:
    """It is found by optimizers, saved, moved and switched as its encoder is, and says what it is."""
    module, other = InChunks(mlp(nn.Dropout()), 4), InChunks(mlp(nn.Dropout(), seed=1), 3)
    assert next(iter(module.state_dict())) == "encoder.0.weight"
    assert "chunk_size=4" in repr(module)
    assert not module.eval().encoder[1].training
    other.eval().load_state_dict(module.state_dict())
    with torch.no_grad():
        assert_close([other(randn(10, 6))], [module(randn(10, 6))])
