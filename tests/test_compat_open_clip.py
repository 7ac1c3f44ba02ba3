"""Against open_clip 3.3.0's loss.py itself."""

from typing import Any

import numpy as np
import peer_imports
import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from digits import cross_entropy
from embeddings import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hdc_kernels.compat.open_clip import ClipLoss, SigLipLoss

open_clip = peer_imports.open_clip()


def clip_exactly(image: Any, text: Any, scale: Any) -> Any:
    """Near convergence, the peer subtracts logarithms of up to hundreds to get a loss of 1e-10."""
    s, others = scale * (image @ text.T), ~np.eye(len(image), dtype=bool)
    forth, back = (cross_entropy(np.diagonal(s), (side, others)) for side in (s, s.T))
    return (forth + back).sum() / (2 * len(s))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(2, 7),
    scale=st.sampled_from([1.0, 14.3, 100.0]),
    normalize=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_clip_loss_equals_the_peer(batch: int, scale: float, normalize: bool, seed: int) -> None:
    """Loss and gradients, of the scale, too, to 1e-12 or nearer to the truth; features are taken as they are."""
    features = [randn(batch, 5, seed=seed + k) for k in range(2)]
    if normalize:
        features = [F.normalize(x, dim=-1) for x in features]
    logit_scale = torch.tensor(scale, dtype=torch.float64)
    agree(ClipLoss(), open_clip.ClipLoss(), *features, logit_scale, exact=clip_exactly)


def test_clip_loss_takes_a_number_and_returns_a_dictionary() -> None:
    """As the peer's training loop calls it."""
    features = randn(4, 5), randn(4, 5, seed=1)
    expected = open_clip.ClipLoss()(*features, 3.0, output_dict=True)
    found = ClipLoss()(*features, logit_scale=3.0, output_dict=True)
    assert list(found) == list(expected) == ["contrastive_loss"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bias", [-10.0, torch.tensor(-10.0, dtype=torch.float64)])
def test_clip_loss_does_not_depend_on_a_bias(bias: Any) -> None:
    """A softmax does not see it; a parameter gets the gradient 0, not None."""
    features = randn(4, 5), randn(4, 5, seed=1)
    if isinstance(bias, Tensor):
        bias.requires_grad_()
    loss = ClipLoss()(*features, 3.0, bias)
    assert isinstance(loss, Tensor)
    expected = open_clip.ClipLoss()(*features, 3.0, bias)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    if isinstance(bias, Tensor):
        (found,) = torch.autograd.grad(loss, bias)
        assert found.item() == 0


def test_clip_loss_in_half_precision() -> None:
    """A half-precision scale does not become a half-precision temperature."""
    features = [F.normalize(randn(8, 16, seed=k), dim=-1).half() for k in range(2)]
    loss = ClipLoss()(*features, torch.tensor(100.0).half())
    assert isinstance(loss, Tensor)
    exact = open_clip.ClipLoss()(*(x.double() for x in features), 100.0)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("option", "value"), [("rank", 1), ("world_size", 2), ("use_horovod", True)]
)
def test_clip_loss_refuses_other_processes_than_there_are(option: str, value: Any) -> None:
    """By name, before anything wrong is computed."""
    with pytest.raises(ValueError, match=f"{option} (is )?{value}"):
        ClipLoss(**{option: value})


def test_clip_loss_has_one_gradient() -> None:
    """What the peer offers for several processes changes nothing in one."""
    features = randn(4, 5), randn(4, 5, seed=1)
    losses = [ClipLoss(*flags)(*features, 3.0) for flags in ((), (True, True), (False, True))]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()])
@pytest.mark.parametrize("scale", [0.0, -1.0, torch.ones(2)])
def test_a_scale_that_is_none(scale: Any, loss: Any) -> None:
    """Under its own name."""
    with pytest.raises(ValueError, match=r"^logit_scale is "):
        loss(randn(4, 5), randn(4, 5), scale, None)
