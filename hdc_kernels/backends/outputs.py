"""Room for what a backend returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from hdc_kernels import reference
from hdc_kernels.backends import Problems, Terms

# At a small temperature a logsumexp is large: rounding it to float32 would change a whole row.
LSE_DTYPE = torch.float64


class Rows(NamedTuple):
    """What is kept of every row; `Terms` without their total."""

    loss: Tensor  # [T]
    hits: Tensor  # [T]
    lse: Tensor  # [1 or 2, T]


NO_ROWS = Rows(
    torch.empty(0, dtype=torch.float32, device="cpu"),
    torch.empty(0, dtype=torch.bool, device="cpu"),
    torch.empty((0, 0), dtype=LSE_DTYPE, device="cpu"),
)


def empty_rows(problems: Problems) -> Rows:
    """For every row of every problem."""
    rows = sum(problems.rows)
    device, dtype = problems.x[0].device, reference.compute_dtype(problems.x[0].dtype)
    return Rows(
        torch.empty(rows, dtype=dtype, device=device),
        torch.empty(rows, dtype=torch.bool, device=device),
        torch.empty((problems.sums, rows), dtype=LSE_DTYPE, device=device),
    )


def means_of(loss: Tensor, hits: Tensor, rows: list[int]) -> Tensor:
    """`Terms.means`, of what is kept per row; each pair has so many rows."""
    return torch.stack(
        [pair.mean() for t in (loss, hits.to(loss.dtype)) for pair in t.split(rows)]
    ).view(2, -1)


def with_means(terms: Terms, problems: Problems) -> Terms:
    """The same with means, if they are asked for and not there yet; these are made of all rows."""
    if problems.detail != "means" or terms.means is not None:
        return terms
    return terms._replace(means=means_of(terms.loss, terms.hits, problems.rows))


def empty_gradients(
    embeddings: tuple[Tensor, ...], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Laid out as the embeddings are, and of their dtype if none is given."""
    return tuple([torch.empty_like(embedding, dtype=dtype) for embedding in embeddings])
