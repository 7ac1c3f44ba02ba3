"""A call of the primitive: everything about it but its tensors, and what can be made of both."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hdc_kernels.backends import (
    EVERYTHING,
    Detail,
    Function,
    Gradients,
    Mask,
    Problems,
    Terms,
    plain,
)
from hdc_kernels.selection import implementation, suits_triton


class Call(NamedTuple):
    """The options of `contrast`, as `autograd.py` and `operators.py` hand them on."""

    backend: str
    weights: tuple[float, ...] | None  # None: the value is the terms
    temperature: float  # unless it is a tensor
    symmetric: bool
    normalize: bool
    pairs: int
    rows_first: int  # so many of the pairs are [M, G, D] and [N, G, D]
    function: Function = "info_nce"
    mask: Mask = EVERYTHING
    needs_y: bool = True
    ranked: bool = False
    beta: float = 1.0
    detail: Detail = "rows"

    def without_tensors(self) -> tuple["Call", tuple[Tensor | None, ...]]:
        """Itself but for the tensors of its mask, and these."""
        if self.mask.ids is None and self.mask.left_out is None:
            return self, (None, None, None)
        ids = self.mask.ids or (None, None)
        mask = self.mask._replace(ids=None, left_out=None)
        return self._replace(mask=mask), (*ids, self.mask.left_out)

    def with_tensors(
        self, x_ids: Tensor | None, y_ids: Tensor | None, left_out: Tensor | None
    ) -> "Call":
        """What `without_tensors` took apart."""
        if x_ids is None and left_out is None:
            return self
        ids = None if x_ids is None or y_ids is None else (x_ids, y_ids)
        return self._replace(mask=self.mask._replace(ids=ids, left_out=left_out))

    def problems(
        self, tau: Tensor | None, bias: Tensor | None, x: Sequence[Tensor], y: Sequence[Tensor]
    ) -> Problems:
        """What a backend takes."""
        return Problems(
            tuple(x),
            tuple(y),
            (1.0,) * self.pairs if self.weights is None else self.weights,
            self.temperature if tau is None else tau,
            self.normalize,
            self.symmetric,
            self.function,
            self.mask,
            bias,
            self.needs_y,
            self.ranked,
            self.beta,
            self.detail,
            self.rows_first,
        )

    def plain(
        self, tau: Tensor | None, bias: Tensor | None, x: Sequence[Tensor], y: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value, terms and hits in differentiable PyTorch; whole where there can be no checkpoints."""
        problems = self.problems(tau, bias, x, y)
        chunked = self.backend == "chunked" and not in_transform()
        terms, hits = plain.terms(problems, chunked=chunked)
        return terms if self.weights is None else plain.total(problems, terms), terms, hits

    def step(
        self, tau: Tensor | None, bias: Tensor | None, x: Sequence[Tensor], y: Sequence[Tensor]
    ) -> tuple[Terms, list[Tensor]]:
        """Terms and the total's gradients, as `backward` has them, in the dtype that they are computed in."""
        terms, gradients = implementation(self.backend).step(self.problems(tau, bias, x, y))
        return terms, self._listed(gradients)

    def backward(
        self,
        tau: Tensor | None,
        bias: Tensor | None,
        x: Sequence[Tensor],
        y: Sequence[Tensor],
        lse: Tensor,
        upstream: Tensor,
    ) -> list[Tensor]:
        """(dτ, dbias if there is one, *dx, *dy if they are needed) of Σ upstream · terms."""
        problems = self.problems(tau, bias, x, y)
        return self._listed(implementation(self.backend).backward(problems, lse, upstream))

    def _listed(self, gradients: Gradients) -> list[Tensor]:
        scalars = [gradients.temperature]
        if gradients.bias is not None:
            scalars.append(gradients.bias)
        return [*scalars, *gradients.x, *(gradients.y if self.needs_y else ())]


def in_forward_mode() -> bool:
    """Whether any input may carry a tangent, which kernels would lose; torch.func's wrappers may hide it."""
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether torch.func or forward mode is at work: operators have no rules for them, and they no checkpoints."""
    return torch._C._are_functorch_transforms_active() or in_forward_mode()


def scaled(
    made: Sequence[Tensor],
    upstream: Tensor,
    dtype: torch.dtype,
    *,
    scalars: int,
    in_place: bool,
) -> list[Tensor]:
    """What `step` made, times the upstream gradient: in float32, since a loss scale may not fit into float16.

    On a GPU all but the `scalars` in front are rounded to `dtype` in the same launch. What is not may be overwritten
    `in_place`.
    """
    if made[-1].dtype != dtype and suits_triton(made[-1]):
        from hdc_kernels.backends.triton.scale import scale

        dtypes = [g.dtype if k < scalars else dtype for k, g in enumerate(made)]
        return scale(made, upstream, dtypes)
    if in_place:
        torch._foreach_mul_(list(made), upstream)
        return list(made)
    return list(torch._foreach_mul(list(made), upstream))


def in_dtype(gradients: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Rounded, if they have to be: together, for HD-NCE's twelve tensors too."""
    if gradients[0].dtype == dtype:
        return list(gradients)
    found = [torch.empty_like(gradient, dtype=dtype) for gradient in gradients]
    torch._foreach_copy_(found, list(gradients))
    return found


def temperature_gradient(d_tau: Tensor, tau: Tensor | None) -> Tensor | None:
    """As a gradient of the tensor that the temperature was given as, if it was."""
    return None if tau is None else d_tau.to(tau.dtype).view(tau.shape)
