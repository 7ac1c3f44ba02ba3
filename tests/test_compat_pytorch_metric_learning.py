"""`compat.pytorch_metric_learning` against pytorch-metric-learning 2.9.0."""

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_metric_learning.losses as peer
import torch
from embeddings import leaf, randn
from equations import relative_error
from torch import Tensor

from hdc_kernels.compat import pytorch_metric_learning as ours

LOSSES = ["NTXentLoss", "SupConLoss"]


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Random labels from 0 to below `high`."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def both(name: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Our module and the peer's, called and built alike."""
    return getattr(ours, name)(*args, **options), getattr(peer, name)(*args, **options)


def compare(
    pair: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    inputs: tuple[Tensor, ...],
    *args: Any,
    **options: Any,
) -> None:
    """Loss and gradients of the `inputs`."""
    found, exact = (loss(*args, **options) for loss in pair)
    assert found.shape == ()
    assert relative_error(found, exact) < 1e-12
    gradients = (torch.autograd.grad(loss, inputs) for loss in (found, exact))
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", LOSSES)
def test_labels(name: str, seed: int) -> None:
    """2 to 15 labels among 7 to 32 embeddings, some without a positive, at three temperatures."""
    size, classes = (7, 8, 16, 31, 32, 32)[seed], (3, 8, 2, 5, 15, 4)[seed]
    x, labels = leaf(size, 6, seed=seed), randint(classes, size, seed=seed)
    labels[:2] = 0
    labels[2] = 99
    for options in ({}, {"temperature": 0.5}, {"temperature": 0.02}):
        compare(both(name, **options), (x,), x, labels)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", LOSSES)
def test_reference_embeddings(name: str, seed: int) -> None:
    """More and fewer of them than anchors; with as many, row i is not sample i."""
    x, labels = leaf(9, 5, seed=seed), randint(4, 9, seed=seed)
    size = (5, 9, 20, 9)[seed]
    ref, ref_labels = leaf(size, 5, seed=seed + 10), randint(4, size, seed=seed + 10)
    pair = both(name)
    compare(pair, (x, ref), x, labels, ref_emb=ref, ref_labels=ref_labels)
    compare(pair, (x, ref), x, labels, None, ref, ref_labels.clone())


@pytest.mark.parametrize("name", LOSSES)
def test_the_labels_identity_has_no_meaning(name: str) -> None:
    """The peer leaves row i out, of all positives, if both labels are the same object."""
    x, y, labels = leaf(8, 4), leaf(8, 4, seed=1), torch.arange(8) // 2
    our, their = both(name)
    assert torch.equal(our(x, labels, None, y, labels), our(x, labels, None, y, labels.clone()))
    exact = their(x, labels, None, y, labels.clone())
    assert relative_error(our(x, labels, None, y, labels), exact) < 1e-12
    assert relative_error(their(x, labels, None, y, labels), exact) > 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_without_pairs(name: str) -> None:
    """No positive anywhere, or one embedding: 0 with a gradient of 0, as the peer's."""
    for size in (1, 5):
        x = leaf(size, 4)
        found, exact = (loss(x, torch.arange(size)) for loss in both(name))
        assert found.item() == exact.item() == 0
        (gradient,) = torch.autograd.grad(found, x)
        assert gradient.count_nonzero() == 0


def test_one_label() -> None:
    """Without negatives NT-Xent is 0; SupCon still wants its positives alike, the peer says 0."""
    x, labels = leaf(5, 4), torch.zeros(5, dtype=torch.long)
    found, exact = (loss(x, labels) for loss in both("NTXentLoss"))
    assert found.item() == exact.item() == 0
    found, exact = (loss(x, labels) for loss in both("SupConLoss"))
    assert exact.item() == 0
    cosines = torch.nn.functional.normalize(x, dim=-1)
    logits = (cosines @ cosines.T / 0.1).masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)
    truth = logits.logsumexp(-1) - logits[~torch.eye(5, dtype=torch.bool)].view(5, 4).mean(-1)
    assert relative_error(found, truth.mean()) < 1e-12


def test_small_temperature_in_float16() -> None:
    """Where the peer's NT-Xent silently loses its large terms to rounding."""
    labels = randint(8, 64)
    x = leaf(64, 32).detach().half()
    exact = peer.NTXentLoss(0.01)(x.double(), labels).item()
    assert ours.NTXentLoss(0.01)(x, labels).item() == pytest.approx(exact, rel=1e-5)
    assert peer.NTXentLoss(0.01)(x, labels).item() != pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("batch", [4, 5, 12])
@pytest.mark.parametrize("name", LOSSES)
def test_memory(name: str, batch: int) -> None:
    """Twelve places filled and filled again, by batches that divide them, do not, and are as large."""
    pair = tuple(
        package.CrossBatchMemory(getattr(package, name)(), 6, memory_size=12)
        for package in (ours, peer)
    )
    for step in range(7):
        x, labels = leaf(batch, 6, seed=step), randint(3, batch, seed=step)
        labels[-2:] = 0
        compare(pair, (x,), x, labels)
        assert sorted(pair[0].label_memory[: pair[0].filled].tolist()) == sorted(
            pair[1].label_memory[: pair[0].filled].tolist()
        )


@pytest.mark.parametrize("name", LOSSES)
def test_memory_with_an_enqueue_mask(name: str) -> None:
    """As in MoCo: keys enter, queries are anchors; uneven batches."""
    pair = tuple(
        package.CrossBatchMemory(getattr(package, name)(), 4, memory_size=10)
        for package in (ours, peer)
    )
    for step, batch in enumerate((8, 6, 10, 2)):
        x, labels = leaf(batch, 4, seed=step), randint(3, batch, seed=step)
        labels[: batch // 2] = labels[batch // 2 :]
        mask = torch.arange(batch) >= batch // 2
        compare(pair, (x,), x, labels, enqueue_mask=mask)


def test_a_batch_larger_than_the_memory() -> None:
    """It is compared with itself, and the last ones stay. The peer fails an assertion."""
    memory = ours.CrossBatchMemory(ours.SupConLoss(), 4, memory_size=3)
    x, labels = leaf(8, 4), randint(3, 8)
    loss = memory(x, labels)
    detached = x.detach()
    exact = peer.CrossBatchMemory(peer.SupConLoss(), 4, memory_size=8)(x, labels)
    assert relative_error(loss, exact) < 1e-12
    assert torch.equal(memory.embedding_memory, detached[-3:])
    with pytest.raises(AssertionError):
        peer.CrossBatchMemory(peer.SupConLoss(), 4, memory_size=3)(x, labels)


def test_a_memory_goes_on_from_its_state() -> None:
    """As it was saved, half filled; and forgets everything when told."""
    memory, again = (ours.CrossBatchMemory(ours.NTXentLoss(), 4, memory_size=8) for _ in range(2))
    first, second = (leaf(5, 4, seed=s) for s in range(2))
    labels = torch.tensor([0, 1, 0, 1, 2])
    fresh = memory(first, labels)
    again.double().load_state_dict(memory.state_dict())
    assert again.filled == 5
    assert torch.equal(memory(second, labels), again(second, labels))
    again.reset_queue()
    assert again.filled == 0
    assert torch.equal(again(first, labels), fresh)


def test_the_last_loss_survives_the_next_batch() -> None:
    """Backward after another forward: no buffer that it needs was written to."""
    memory = ours.CrossBatchMemory(ours.SupConLoss(), 4, memory_size=8)
    x, labels = leaf(5, 4), torch.tensor([0, 1, 0, 1, 2])
    memory(x, labels)
    loss = memory(x, labels)
    expected = torch.autograd.grad(loss, x, retain_graph=True)[0]
    memory(leaf(5, 4, seed=1), labels)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_what_is_refused() -> None:
    """One line that says what was given and what is allowed."""
    x, labels = leaf(3, 4), torch.arange(3)
    loss = ours.SupConLoss()
    refused = "indices_tuple is a tuple; only None is implemented"
    with pytest.raises(ValueError, match=refused):
        loss(x, labels, (labels,) * 4)
    with pytest.raises(ValueError, match=refused):
        ours.CrossBatchMemory(loss, 4)(x, labels, (labels,) * 4)
    with pytest.raises(TypeError, match="labels is a NoneType; it must be a tensor of integers"):
        loss(x, None)
    with pytest.raises(ValueError, match="ref_emb is given alone; ref_emb and ref_labels go toge"):
        loss(x, labels, ref_emb=x)
    with pytest.raises(ValueError, match="miner is a object; only None is implemented"):
        ours.CrossBatchMemory(loss, 4, miner=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss is a SupConLoss; it must be an NTXentLoss or SupCo"):
        ours.CrossBatchMemory(peer.SupConLoss(), 4)
    with pytest.raises(ValueError, match="memory_size is 0; it must be at least 1"):
        ours.CrossBatchMemory(loss, 4, memory_size=0)
    with pytest.raises(TypeError, match="embedding_size is a float; it must be an int"):
        ours.CrossBatchMemory(loss, 4.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"enqueue_mask has shape \[2\] but labels has \[3\]"):
        ours.CrossBatchMemory(loss, 4)(x, labels, enqueue_mask=labels[:2] > 0)
    assert "temperature=0.1" in repr(loss)
    assert "embedding_size=4, memory_size=7" in repr(ours.CrossBatchMemory(loss, 4, 7))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"embeddings": [1.0]}, TypeError, "embeddings is a list; it must be a tensor"),
        ({"embeddings": randn(3, 4).long()}, TypeError, "embeddings has dtype torch.int64"),
        ({"embeddings": randn(3, 5)}, ValueError, r"embeddings has shape \[3, 5\]; .* \[B, 4\]"),
        ({"labels": torch.arange(2)}, ValueError, r"labels has shape \[2\] but embeddings has"),
        ({"labels": randn(3)}, TypeError, "labels has dtype torch.float64; it must be an integer"),
        ({"enqueue_mask": [True]}, TypeError, "enqueue_mask is a list; it must be a tensor"),
        (
            {"enqueue_mask": torch.arange(3)},
            TypeError,
            "enqueue_mask is a Tensor of torch.int64; it must be a tensor .* of bool",
        ),
    ],
)
def test_what_is_refused_does_not_enter_the_memory(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The next batch finds it as it was."""
    memory, batch = ours.CrossBatchMemory(ours.SupConLoss(), 4, 7), randn(3, 4)
    memory(batch, torch.arange(3))
    kept = memory.embedding_memory.clone(), memory.label_memory.clone()
    with pytest.raises(error, match=message):
        memory(**{"embeddings": batch, "labels": torch.arange(3), **changes})
    assert memory.filled == 3
    assert torch.equal(memory.embedding_memory, kept[0])
    assert torch.equal(memory.label_memory, kept[1])
