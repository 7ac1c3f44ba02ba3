"""Backend "chunked" of `contrast`: equal to plain PyTorch, and never more logits at a time than it should hold."""

from typing import Any

import pytest
import torch
from contrast_problems import Shape, embeddings_of, problems_of, randn
from equations import relative_error
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import plain
from hdc_kernels.contrast import Contrast, contrast


@pytest.mark.parametrize("chunk", [1, 60, 137, 10**9])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", [None, (0.7, -0.2)])
def test_chunked_equals_whole(
    monkeypatch: pytest.MonkeyPatch,
    weights: tuple[float, ...] | None,
    symmetric: bool,
    chunk: int,
) -> None:
    """In chunks of one row, of a few with a rest, and in one: terms, hits and gradients."""
    monkeypatch.setattr(plain, "CHUNK", chunk)
    shapes: list[Shape] = [(2, 13, 13 if symmetric else 17, 5), (1, 4, 4, 3)]
    problems = problems_of(shapes, torch.float64)
    found = []
    for backend in ("chunked", "torch"):
        inputs = [t.clone().requires_grad_() for t in embeddings_of(problems)]
        tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        result = contrast(
            list(zip(inputs[:2], inputs[2:], strict=True)),
            weights=weights,
            temperature=tau,
            symmetric=symmetric,
            backend=backend,
        )
        upstream = randn(*result.value.shape, seed=8)
        slopes = torch.autograd.grad(result.value, (*inputs, tau), upstream)
        found.append((result, slopes))
    (ours, our_slopes), (theirs, their_slopes) = found
    assert isinstance(ours, Contrast)
    assert torch.equal(ours.hits, theirs.hits)
    assert relative_error(ours.value, theirs.value.detach()) < 1e-14
    assert relative_error(ours.terms, theirs.terms) < 1e-14
    for slope, same in zip(our_slopes, their_slopes, strict=True):
        assert relative_error(slope, same) < 1e-13


def test_chunks_hold_no_more_than_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows at a time as fit into CHUNK logits, at least one."""
    sizes: list[int] = []
    original = reference.cosine_logits

    def spy(*arguments: Any, **options: Any) -> Tensor:
        logits = original(*arguments, **options)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(reference, "cosine_logits", spy)
    x, y = randn(2, 10, 4), randn(2, 13, 4, seed=1)
    for chunk, expected in ((100, [78, 78, 78, 26]), (10**6, [260]), (1, [26] * 10)):
        monkeypatch.setattr(plain, "CHUNK", chunk)
        sizes.clear()
        contrast([(x, y)], weights=None, temperature=0.5, backend="chunked")
        assert sizes == expected
