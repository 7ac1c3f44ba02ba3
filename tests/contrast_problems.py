"""What the tests of the primitive share: random problems, float64 truth, bounds, layouts and child processes."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from embeddings import randn
from equations import relative_error
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import Gradients, Problems, Terms, cpu

HALF = (torch.bfloat16, torch.float16)
FULL = (torch.float64, torch.float32)
Shape = tuple[int, int, int, int]  # G, M, N, D


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random tensors that require gradients, no two alike."""
    return [randn(*s, seed=k, dtype=dtype).requires_grad_() for k, s in enumerate(shapes)]


def problems_of(
    shapes: Sequence[Shape],
    dtype: torch.dtype = torch.float32,
    *,
    tau: float | Tensor = 0.5,
    normalize: bool = True,
    symmetric: bool = False,
    weights: Sequence[float] | None = None,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> Problems:
    """Random problems of these shapes; weights 1.5, −0.5, … unless given."""
    x = [randn(g, m, d, seed=2 * k) for k, (g, m, n, d) in enumerate(shapes)]
    y = [randn(g, n, d, seed=2 * k + 1) for k, (g, m, n, d) in enumerate(shapes)]
    return Problems(
        tuple(layout(t.to(dtype)) for t in x),
        tuple(layout(t.to(dtype)) for t in y),
        tuple(weights or (1.5 - 2 * k for k in range(len(shapes)))),
        tau,
        normalize,
        symmetric,
    )


def spread(problems: Problems) -> Tensor:
    """The weights, one per row: the upstream gradient that makes `backward` equal `step`."""
    weights = zip(problems.rows, problems.weights, strict=True)
    return torch.cat([torch.full((r,), w, dtype=torch.float64) for r, w in weights])


def exact(problems: Problems, upstream: Tensor | None = None) -> tuple[Terms, Gradients]:
    """In float64 through autograd: positives and negatives apart, so that nothing cancels."""
    x, y = ([t.detach().double().requires_grad_() for t in side] for side in problems[:2])
    tau = torch.as_tensor(problems.temperature, dtype=torch.float64).detach().reshape(())
    tau = tau.clone().requires_grad_()
    losses, hits, lses = [], [], []
    for a, b in zip(x, y, strict=True):
        logits = reference.cosine_logits(a, b, tau, normalize=problems.normalize)
        diagonal = torch.eye(*logits.shape[-2:], dtype=torch.bool)
        negatives = logits.masked_fill(diagonal, -math.inf)
        positive = logits.diagonal(dim1=-2, dim2=-1)
        lse = torch.stack([negatives.logsumexp(-1 - way) for way in range(1 + problems.symmetric)])
        # The threshold is where log(1 + e^z) is z to 2⁻⁵²; the default of 20 is not enough here.
        losses.append(F.softplus(lse - positive, threshold=40).mean(0).flatten())
        hits.append(reference.top1(logits).flatten())
        lses.append(lse.detach().flatten(1))
    loss = torch.cat(losses)
    factors = spread(problems)
    upstream = factors if upstream is None else upstream.double()
    found = torch.autograd.grad(loss, (*x, *y, tau), upstream)
    loss = loss.detach()
    terms = Terms(loss @ factors, loss, torch.cat(hits), torch.cat(lses, 1))
    return terms, Gradients(found[: len(x)], found[len(x) : -1], found[-1])


def in_two(problems: Problems, upstream: Tensor | None = None) -> tuple[Terms, Gradients]:
    """FORWARD, then BACKWARD."""
    terms = cpu.forward(problems)
    upstream = spread(problems) if upstream is None else upstream
    return terms, cpu.backward(problems, terms.lse, upstream.to(terms.loss.dtype))


def vectors(gradients: Gradients) -> tuple[Tensor, ...]:
    """Those of x, then those of y."""
    return (*gradients.x, *gradients.y)


def rounding(dtype: torch.dtype, width: int, tau: float, largest: float = 1.0) -> float:
    """How far a result may be off, relative to its norm, with every logit off on its own.

    A sum of D products is off by about √D·u times its largest term, twice that for two norms, and a few
    more u for the rest; a logit, `largest` over τ, by the relative error of its dot product; a
    probability relatively by what the logit is off absolutely; and the float64 truth is no better in
    its own u. The factor 2 is for the luck of one draw.
    """
    return 2 * torch.finfo(dtype).eps * (math.sqrt(width) + 4) * max(1, largest / tau)


def assert_equals_exact(
    problems: Problems, found: tuple[Terms, Gradients], bound: float, upstream: Tensor | None = None
) -> None:
    """Every output, each in its norm, within `bound`, and in dtypes and shapes as `backends` says."""
    terms, gradients = found
    truth, slopes = exact(problems, upstream)
    wide = reference.compute_dtype(problems.x[0].dtype)
    assert (terms.total.dtype, terms.loss.dtype, terms.lse.dtype) == (wide, wide, torch.float64)
    assert terms.total.shape == gradients.temperature.shape == ()
    magnitude = float((truth.loss * spread(problems)).abs().sum())
    assert abs(float(terms.total) - float(truth.total)) <= bound * magnitude
    assert relative_error(terms.loss, truth.loss) <= bound if truth.loss.any() else True
    assert torch.equal(terms.lse.isneginf(), truth.lse.isneginf())
    some = truth.lse.isfinite()
    # A logsumexp may be near 0: its error is that of a logit, however large.
    assert (terms.lse - truth.lse)[some].abs().amax().item() <= 4 * bound if some.any() else True
    for ours, slope, x in zip(
        vectors(gradients), vectors(slopes), embeddings_of(problems), strict=True
    ):
        assert ours.shape == x.shape
        if slope.any():
            assert relative_error(ours, slope) <= bound + torch.finfo(ours.dtype).eps
        else:
            assert not ours.any()
    # dτ is a sum of terms of either sign, each a dot product of a gradient with its vector.
    rows = sum(float(s.norm() * x.double().norm()) for s, x in _parts(problems, upstream))
    slope_of_tau = float(gradients.temperature) - float(slopes.temperature)
    assert abs(slope_of_tau) <= bound * (rows / float(problems.temperature) + 1e-300)


def embeddings_of(problems: Problems) -> tuple[Tensor, ...]:
    """Those of x, then those of y."""
    return (*problems.x, *problems.y)


def _parts(problems: Problems, upstream: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of the unit vectors, and these: the scale of dτ."""
    if problems.normalize:
        unit = [tuple(reference.l2_normalize(t.double()) for t in s) for s in problems[:2]]
        problems = problems._replace(x=unit[0], y=unit[1], normalize=False)
    return zip(exact(problems, upstream)[1].x, problems.x, strict=True)


def transposed(x: Tensor) -> Tensor:
    """The embeddings lie in columns."""
    return x.mT.contiguous().mT


def every_other(x: Tensor) -> Tensor:
    """Stride 2, with NaN between."""
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


def groups_last(x: Tensor) -> Tensor:
    """The problems lie closest together."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def sliced(x: Tensor) -> Tensor:
    """Out of wider and longer storage, at an odd offset, among NaN."""
    return F.pad(x, (1, 2, 3, 1), value=math.nan)[..., 3:-1, 1:-2]


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    torch.Tensor.contiguous,
    transposed,
    every_other,
    groups_last,
    sliced,
]


def plainly(problems: Problems) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What everyone writes, in the dtype of the inputs: the loss and its gradients."""
    inputs = [t.detach().clone().requires_grad_() for t in embeddings_of(problems)]
    losses = []
    for k, (x, y) in enumerate(
        zip(inputs[: len(problems.x)], inputs[len(problems.x) :], strict=True)
    ):
        if problems.normalize:
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        logits = (x @ y.mT / float(problems.temperature)).flatten(0, 1)
        labels = torch.arange(x.shape[1]).repeat(x.shape[0])
        loss = F.cross_entropy(logits, labels, reduction="sum")
        if problems.symmetric:
            back = (y @ x.mT / float(problems.temperature)).flatten(0, 1)
            loss = (loss + F.cross_entropy(back, labels, reduction="sum")) / 2
        losses.append(loss * problems.weights[k])
    loss = torch.stack(losses).sum()
    return loss.detach(), torch.autograd.grad(loss, inputs)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """`torch.set_num_threads`, undone afterwards, and all at work however little there is to do."""
    before, least = torch.get_num_threads(), cpu.LEAST_SHARE
    torch.set_num_threads(count)
    cpu.LEAST_SHARE = 1
    try:
        yield
    finally:
        torch.set_num_threads(before)
        cpu.LEAST_SHARE = least


def has_instructions(name: str) -> bool:
    """Whether this CPU runs the library's code for that instruction set."""
    capable = {"avx2": ("AVX2", "AVX512"), "avx512": ("AVX512",)}
    return name == "portable" or torch.backends.cpu.get_cpu_capability() in capable[name]


def in_a_new_process(script: str, **environment: str) -> str:
    """What the script prints; it can import the modules beside this file."""
    # -P: the installed package, not the sources, which lack the library.
    found_here = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
    command = [sys.executable, "-P", "-c", found_here + script]
    everything = {**os.environ, **environment}
    done = subprocess.run(command, env=everything, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
