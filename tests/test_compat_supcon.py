"""`compat.supcon.SupConLoss` against SupContrast's formula, with its loops written out, in float64.

And against the packages that have that loss, too.
"""

from typing import Any, Literal

import peer_imports
import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from equations import relative_error
from pytorch_metric_learning.losses import SupConLoss as MetricLearning
from torch import Tensor

from hdc_kernels.compat.supcon import SupConLoss


def features(images: int, views: int, *shape: int, seed: int = 0) -> Tensor:
    """Not normalised: the peer leaves that to its caller."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, views, *shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def formula(
    x: Tensor,
    positive: Tensor,
    temperature: float | Tensor,
    mode: str,
    base_temperature: float | Tensor,
) -> Tensor:
    """−T/T_base · mean over anchors (i, u) of the mean over (j, v) ≠ (i, u) with positive[i, j]; else 0."""
    images, views = x.shape[:2]
    everything = [(i, u) for i in range(images) for u in range(views)]
    losses = []
    for i, u in everything:
        if mode == "one" and u > 0:
            continue
        others = [(j, v) for j, v in everything if (j, v) != (i, u)]
        logits = {(j, v): (x[i, u] * x[j, v]).sum() / temperature for j, v in others}
        chosen = [logits[j, v] for j, v in others if positive[i, j]]
        if chosen:
            total = torch.stack(list(logits.values())).logsumexp(0)
            losses.append(total - torch.stack(chosen).mean())
        else:
            losses.append(x.new_zeros(()))
    return temperature / base_temperature * torch.stack(losses).mean()


def compare(module: SupConLoss, x: Tensor, positive: Tensor, **arguments: Any) -> None:
    """Loss and gradient."""
    ours = module(x, **arguments)
    options = (module.temperature, module.contrast_mode, module.base_temperature)
    exact = formula(x, positive, *options)
    assert ours.shape == ()
    assert relative_error(ours, exact) < 1e-12
    (found,), (truth,) = (torch.autograd.grad(loss, x) for loss in (ours, exact))
    assert relative_error(found, truth) < 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("mode", ["all", "one"])
def test_labels(mode: Literal["all", "one"], views: int, seed: int) -> None:
    """Some images alone with their label: with one view, they have no positive and count as 0."""
    x = features(7, views, 5, seed=seed)
    labels = torch.randint(4, (7,), generator=torch.Generator().manual_seed(seed))
    labels[:2], labels[2] = 1, 9
    positive = labels[:, None] == labels
    module = SupConLoss(temperature=0.5, contrast_mode=mode)
    compare(module, x, positive, labels=labels)
    compare(module, x, positive, labels=labels[:, None].int())


@pytest.mark.parametrize("mode", ["all", "one"])
def test_without_labels_views_of_an_image_belong_together(mode: Literal["all", "one"]) -> None:
    """SimCLR, with the defaults' scale T/T_base, and another one; an image may have any shape."""
    positive = torch.eye(5, dtype=torch.bool)
    compare(SupConLoss(0.5, mode, 0.5), features(5, 2, 4), positive)
    compare(SupConLoss(0.4, mode, 0.1), features(5, 3, 2, 2).flatten(2), positive)
    whole = features(5, 3, 2, 2)
    module = SupConLoss(0.4, mode)
    assert torch.equal(module(whole), module(whole.flatten(2)))


def test_the_defaults_of_normalised_features() -> None:
    """T = T_base = 0.07, all views."""
    x = F.normalize(features(6, 2, 8).detach(), dim=-1).requires_grad_()
    compare(SupConLoss(), x, torch.eye(6, dtype=torch.bool))


@pytest.mark.parametrize("seed", range(3))
def test_two_views_are_other_packages_losses(seed: int) -> None:
    """pytorch-metric-learning's SupConLoss while every anchor has a positive; without labels lightly's NT-Xent."""
    labels = torch.randint(3, (7,), generator=torch.Generator().manual_seed(seed))
    module = SupConLoss(0.3, base_temperature=0.3)
    x = features(7, 2, 5, seed=seed)
    agree(
        lambda x: module(F.normalize(x, dim=-1), labels),
        lambda x: MetricLearning(0.3)(torch.cat(x.unbind(1)), labels.repeat(2)),
        x,
    )
    nt_xent = peer_imports.lightly().NTXentLoss(0.3)
    agree(lambda x: module(F.normalize(x, dim=-1)), lambda x: nt_xent(*x.unbind(1)), x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("mode", ["all", "one"])
def test_mask(mode: Literal["all", "one"], views: int, seed: int) -> None:
    """Not symmetric, with images that have no positive or are none of their own."""
    x = features(6, views, 5, seed=seed)
    mask = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[3] = False
    mask[0, 1] = True
    for dtype in (torch.bool, torch.float32):
        compare(SupConLoss(0.5, mode), x, mask, mask=mask.to(dtype))


def test_nothing_to_learn() -> None:
    """One view without labels: 0, where the peer's first version gave NaN. One image: 0 but for rounding."""
    for x in (features(4, 1, 3), features(1, 1, 3)):
        loss = SupConLoss()(x)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.count_nonzero() == 0
    x = features(1, 2, 3)
    loss = SupConLoss()(x)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.abs() < 1e-12
    assert gradient.norm() < 1e-12


def test_a_small_temperature_in_half_precision() -> None:
    """No NaN, where the peer has one in float16."""
    x = F.normalize(features(8, 2, 16).detach(), dim=-1)
    half = x.half().requires_grad_()
    loss = SupConLoss(0.01)(half)
    exact = formula(half.double(), torch.eye(8, dtype=torch.bool), 0.01, "all", 0.07)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, half)
    assert gradient.isfinite().all()


def test_a_temperature_tensor() -> None:
    """Of any shape and dtype, with its whole gradient: the loss is a number in its own dtype."""
    x = features(4, 2, 3)
    t, base = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.5))
    found = torch.autograd.grad(SupConLoss(t, "all", base)(x), (x, t, base))
    exact = torch.autograd.grad(
        formula(x, torch.eye(4, dtype=torch.bool), t, "all", base), (x, t, base)
    )
    for ours, truth in zip(found, exact, strict=True):
        assert relative_error(ours, truth) < 1e-12
    loss = SupConLoss(t[None], "all", base[None])(x.float())
    assert loss.dtype == torch.float32
    assert loss.shape == ()


def test_errors() -> None:
    """One line that says what was given and what is allowed."""
    x = features(3, 2, 4)
    labels, mask = torch.arange(3), torch.eye(3)
    with pytest.raises(ValueError, match="contrast_mode is 'two'; it must be one of 'all', 'one'"):
        SupConLoss(contrast_mode="two")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="base_temperature is 0; it must be positive and finite"):
        SupConLoss(base_temperature=0)
    with pytest.raises(ValueError, match=r"features has shape \[3, 4\]; it must be \[B, V, ...\]"):
        SupConLoss()(x[:, 0])
    with pytest.raises(TypeError, match="features is a list"):
        SupConLoss()([x])
    with pytest.raises(ValueError, match="labels and mask are both given; give one at most"):
        SupConLoss()(x, labels, mask)
    with pytest.raises(ValueError, match="labels has 2 entries; features need 3"):
        SupConLoss()(x, labels[:2])
    with pytest.raises(ValueError, match=r"mask has shape \[2, 3\]; it must be \[3, 3\]"):
        SupConLoss()(x, mask=mask[:2])
    with pytest.raises(ValueError, match="mask holds something else than 0 and 1"):
        SupConLoss()(x, mask=mask / 2)
