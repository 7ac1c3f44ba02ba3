"""Against info-nce-pytorch 0.1.4 itself."""

from collections.abc import Callable
from typing import Any

import info_nce as peer
import numpy as np
import pytest
import torch
from agreement import agree
from digits import cross_entropy, unit
from embeddings import randn
from hypothesis import given, settings
from hypothesis import strategies as st

from hdc_kernels.compat.info_nce import InfoNCE, info_nce


def exactly(mode: Any, tau: float, reduction: str) -> Callable[..., Any]:
    """Near convergence, the peer subtracts logarithms to get a loss of 1e-7."""

    def loss(query: Any, key: Any, *negatives: Any) -> Any:
        x, y = unit(query), unit(key)
        logits, there = x @ y.T / tau, ~np.eye(len(x), dtype=bool)
        if negatives:
            rivals = unit(negatives[0])
            logits = x @ rivals.T if mode == "unpaired" else (x[:, None] * rivals).sum(2)
            logits, there = logits / tau, np.ones(logits.shape, dtype=bool)
        terms = cross_entropy((x * y).sum(1) / tau, (logits, there))
        return {"none": terms, "sum": terms.sum(), "mean": terms.sum() / len(x)}[reduction]

    return loss


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(2, 7),
    count=st.integers(1, 7),
    mode=st.sampled_from([None, "unpaired", "paired"]),
    tau=st.sampled_from([0.05, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_peer(
    batch: int, count: int, mode: Any, tau: float, reduction: Any, seed: int
) -> None:
    """The same call of both: loss and gradients of all that it takes, to 1e-12 or nearer to the truth."""
    inputs = [randn(batch, 5, seed=seed), randn(batch, 5, seed=seed + 1)]
    if mode is not None:
        shape = (batch, count, 5) if mode == "paired" else (count, 5)
        inputs.append(randn(*shape, seed=seed + 2))
    options = {"temperature": tau, "reduction": reduction, "negative_mode": mode or "unpaired"}
    agree(
        lambda *x: info_nce(*x, **options),
        lambda *x: peer.info_nce(*x, **options),
        *inputs,
        exact=exactly(mode, tau, reduction),
    )


@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_module_with_the_peer_s_defaults(mode: Any) -> None:
    """The same constructor, the same call."""
    negatives = randn(4, 3, 5, seed=2) if mode == "paired" else randn(3, 5, seed=2)
    inputs = randn(4, 5), randn(4, 5, seed=1)
    agree(InfoNCE(), peer.InfoNCE(), *inputs)
    agree(InfoNCE(negative_mode=mode), peer.InfoNCE(negative_mode=mode), *inputs, negatives)


def test_temperature_gets_its_gradient() -> None:
    """The peer gives it one, too."""
    tau = torch.tensor(0.2, dtype=torch.float64)
    inputs = randn(4, 5), randn(4, 5, seed=1), randn(3, 5, seed=2), tau
    agree(info_nce, peer.info_nce, *inputs)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((randn(2, 4, 5), randn(4, 5)), {}, r"query has shape \[2, 4, 5\]; it must be \[N, D\]"),
        ((randn(4, 5), randn(4, 5).float()), {}, "positive_key has dtype torch.float32 but query"),
        ((randn(4, 5), randn(3, 5)), {}, r"positive_key has shape \[3, 5\] but query has"),
        ((randn(4, 5), randn(4, 5), randn(4, 3, 5)), {}, r"it must be \[M, D\]"),
        (
            (randn(4, 5), randn(4, 5), randn(3, 5)),
            {"negative_mode": "paired"},
            r"negative_keys has shape \[3, 5\]; with negative_mode='paired' it must be \[N, M, D\]",
        ),
        ((randn(4, 5), randn(4, 5)), {"negative_mode": "x"}, "negative_mode is 'x'"),
    ],
)
def test_what_the_peer_refuses_is_refused(inputs: Any, options: Any, message: str) -> None:
    """One line: the argument, what was given, what is allowed."""
    with pytest.raises(ValueError, match=message):
        info_nce(*inputs, **options)
