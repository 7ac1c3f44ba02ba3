"""Against lightly 1.6.0 itself."""

import math
from typing import Any

import numpy as np
import peer_imports
import pytest
import torch
from agreement import agree
from digits import cross_entropy, unit
from embeddings import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hdc_kernels.compat.lightly import DCLLoss, DCLWLoss, NTXentLoss

# The peer wraps a tensor in torch.tensor, which PyTorch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")

lightly = peer_imports.lightly()


def distance(out0: Tensor, out1: Tensor) -> Tensor:
    """A weight that has a gradient and depends on the direction."""
    return ((out0 - 0.5 * out1) ** 2).sum(1)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(2, 5),
    tau=st.sampled_from([0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_nt_xent_equals_the_peer(batch: int, tau: float, seed: int) -> None:
    """The same call of both: loss and gradients, to 1e-12 or nearer to the truth."""

    def exactly(first: Any, second: Any) -> Any:
        z = unit(np.concatenate((first, second)))
        itself, own = np.eye(len(z), dtype=bool), np.eye(len(z), dtype=bool)
        own = np.roll(own, batch, 1)
        s = z @ z.T / tau
        return cross_entropy(s[own], (s, ~(itself | own))).sum() / len(z)

    inputs = randn(batch, 5, seed=seed), randn(batch, 5, seed=seed + 1)
    agree(NTXentLoss(tau), lightly.NTXentLoss(tau), *inputs, exact=exactly)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["DCLLoss", "DCLWLoss", "weighted"]),
    batch=st.integers(2, 9),
    tau=st.sampled_from([0.05, 0.5, 1.0]),
    sigma=st.sampled_from([0.5, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_dcl_equals_the_peer(name: str, batch: int, tau: float, sigma: float, seed: int) -> None:
    """The same call of both: loss, which may be 0 as the difference of larger numbers, and gradients."""
    options: dict[str, Any] = {"temperature": tau}
    if name == "DCLWLoss":
        options["sigma"] = sigma
    if name == "weighted":
        options["weight_fn"] = distance
    name = "DCLLoss" if name == "weighted" else name
    ours = {"DCLLoss": DCLLoss, "DCLWLoss": DCLWLoss}[name]
    inputs = randn(batch, 5, seed=seed), randn(batch, 5, seed=seed + 1)
    agree(ours(**options), getattr(lightly, name)(**options), *inputs, floor=0.1)


@pytest.mark.parametrize("ours", [NTXentLoss, DCLLoss, DCLWLoss])
def test_defaults(ours: Any) -> None:
    """Those of the peer."""
    agree(ours(), getattr(lightly, ours.__name__)(), randn(6, 4), randn(6, 4, seed=1))


def test_memory_bank() -> None:
    """From the same seed the same bank, and the same losses and gradients step after step."""
    banks = []
    for module in (NTXentLoss, lightly.NTXentLoss):
        torch.manual_seed(0)
        banks.append(module(memory_bank_size=(8, 4)).double())
    for step in range(6):  # 8 is a multiple of 2: nothing overflows
        inputs = randn(2, 4, seed=2 * step), randn(2, 4, seed=2 * step + 1)
        agree(*banks, *inputs)
        torch.testing.assert_close(banks[0].memory_bank.keys, banks[1].memory_bank.bank)


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (5, 4, 1, 7), (9, 2), (8, 8)])
def test_overflow(sizes: tuple[int, ...]) -> None:
    """The peer drops what goes over the end, ours too if asked for; by default, the last keys stay."""
    banks = []
    for module, options in (
        (NTXentLoss, {"drop_overflow": True}),
        (lightly.NTXentLoss, {}),
        (NTXentLoss, {}),
    ):
        torch.manual_seed(0)
        banks.append(module(memory_bank_size=(8, 4), **options).double())
    everything = [banks[2].memory_bank.keys]
    for step, batch in enumerate(sizes):
        out0 = randn(batch, 4, seed=2 * step).requires_grad_()
        out1 = randn(batch, 4, seed=2 * step + 1)
        losses = [bank(out0, out1).item() for bank in banks]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        torch.testing.assert_close(banks[0].memory_bank.keys, banks[1].memory_bank.bank)
        everything.append(torch.nn.functional.normalize(out1, dim=1))
    expected = torch.cat(everything)[-8:]
    queue = banks[2].memory_bank
    kept = queue.keys.roll(-int(queue.position), 0)  # the oldest first
    torch.testing.assert_close(kept, expected)


def test_evaluation_leaves_the_bank_alone() -> None:
    """As in the peer: without a gradient, nothing is put in."""
    module = NTXentLoss(memory_bank_size=(8, 4)).double()
    assert module.memory_bank is not None
    before = module.memory_bank.keys
    module(randn(3, 4), randn(3, 4, seed=1))
    assert torch.equal(module.memory_bank.keys, before)


def test_the_bank_is_saved() -> None:
    """Unlike the peer's."""
    module, other = (NTXentLoss(memory_bank_size=(8, 4)) for _ in range(2))
    other.load_state_dict(module.state_dict())
    inputs = randn(3, 4).float(), randn(3, 4, seed=1).float()
    assert torch.equal(other(*inputs), module(*inputs))


@pytest.mark.parametrize("size", [0, (0,), (0, 4)])
def test_no_bank(size: Any) -> None:
    """As many ways to say so as the peer has."""
    assert NTXentLoss(memory_bank_size=size).memory_bank is None


def test_a_batch_of_one() -> None:
    """The peer's decoupled loss is −∞ there."""
    one = randn(1, 4), randn(1, 4, seed=1)
    assert lightly.DCLLoss()(*one).item() == -math.inf
    for loss in (DCLLoss(), DCLWLoss()):
        with pytest.raises(ValueError, match="B must be at least 2"):
            loss(*one)


@pytest.mark.parametrize("loss", [NTXentLoss, DCLLoss, DCLWLoss])
def test_errors(loss: Any) -> None:
    """A temperature is positive."""
    with pytest.raises(ValueError, match="temperature is 0; it must be positive"):
        loss(temperature=0)


@pytest.mark.parametrize(
    "loss", [NTXentLoss(), NTXentLoss(memory_bank_size=(8, 4)), DCLLoss(weight_fn=distance)]
)
def test_errors_of_the_embeddings(loss: Any) -> None:
    """Also where the loss gets what a bank or a weight makes of them."""
    x = randn(3, 4)
    with pytest.raises(TypeError, match=r"dtype torch\.int64; it must be one of float64"):
        loss(x.long(), x.long())
    for pair, message in (
        ((x, x.float()), "dtype torch.float32 but .* has torch.float64; they must be equal"),
        ((x, x[:2]), r"shape \[2, 4\] but .* has \[3, 4\]; they must be equal"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(*pair)


@pytest.mark.parametrize("size", [8, (8, 4, 2), (-8, 4), (8,)])
def test_errors_of_the_bank(size: Any) -> None:
    """The peer refuses them, too."""
    for loss in (NTXentLoss, lightly.NTXentLoss):
        with pytest.raises(ValueError, match=r"size"):
            loss(memory_bank_size=size)
