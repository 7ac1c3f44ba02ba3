"""Errors of loss and gradient against float64, for plain PyTorch and for ours.

On random data, and on data as a converged model gives it (key = query + 1e-3 · noise): there the loss is
tiny, and its gradient a small difference of large terms. The reference sees the same rounded inputs, so what
counts is the arithmetic alone.
"""

import math
from typing import Any

import naive
import torch
import torch.nn.functional as F
from measure import relative_error
from torch import Tensor

from hdc_kernels import fused_info_nce

BATCH, WIDTH = 512, 128
TEMPERATURES = (0.01, 0.07, 0.5)
DATA = ("random", "converged")
DTYPES = ("float32", "bfloat16", "float16")
IMPLEMENTATIONS = {
    "eager": naive.info_nce,
    "ours": lambda query, key, tau: fused_info_nce(query, key, temperature=tau),
}


def run(device: str) -> list[dict[str, Any]]:
    """One row for each kind of data, temperature, dtype and implementation."""
    torch.manual_seed(0)
    rows = []
    for data in DATA:
        query = torch.randn(BATCH, WIDTH)
        noise = torch.randn(BATCH, WIDTH)
        key = noise if data == "random" else query + 1e-3 * noise
        for dtype in DTYPES:
            views = [view.to(device, getattr(torch, dtype)) for view in (query, key)]
            for tau in TEMPERATURES:
                expected = _loss_and_gradients(_reference, [view.double() for view in views], tau)
                for name, loss in IMPLEMENTATIONS.items():
                    found = _loss_and_gradients(loss, views, tau)
                    rows.append(
                        {
                            "data": data,
                            "temperature": tau,
                            "dtype": dtype,
                            "implementation": name,
                            "loss_error": _finite(relative_error(found[:1], expected[:1])),
                            "gradient_error": _finite(relative_error(found[1:], expected[1:])),
                        }
                    )
    return rows


def _reference(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """InfoNCE with the positive out of the sum: no digits cancel, however small the loss."""
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT / temperature
    positive = torch.eye(len(query), dtype=torch.bool, device=query.device)
    negatives = logits.masked_fill(positive, -math.inf)
    return F.softplus(negatives.logsumexp(1) - logits.diagonal(), threshold=1e3).mean()


def _loss_and_gradients(loss: Any, views: list[Tensor], temperature: float) -> list[Tensor]:
    views = [view.detach().requires_grad_() for view in views]
    value = loss(*views, temperature)
    return [t.double() for t in (value.detach(), *torch.autograd.grad(value, views))]


def _finite(error: float) -> float | None:
    """JSON has no NaN."""
    return error if math.isfinite(error) else None
