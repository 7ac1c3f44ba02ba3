"""`compat.open_clip.SigLipLoss` against open_clip_torch 3.3.0."""

import peer_imports
import pytest
import torch
import torch.nn.functional as F
from equations import relative_error
from torch import Tensor

from hdc_kernels.compat.open_clip import SigLipLoss

theirs = peer_imports.open_clip().SigLipLoss


def features(size: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised images and texts that require their gradients."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, size, width, generator=generator, dtype=torch.float64)
    image, text = F.normalize(x, dim=-1)
    return image.requires_grad_(), text.requires_grad_()


@pytest.mark.parametrize("seed", range(6))
def test_loss_and_gradients_are_the_peers(seed: int) -> None:
    """For learned scale and bias, sizes from 1 to 31."""
    size, scale_value, bias_value = [
        (1, 10.0, -10.0),
        (2, 10.0, -10.0),
        (7, 100.0, -10.0),
        (16, 1.0, 0.0),
        (31, 30.0, 5.0),
        (31, 117.3, -12.9),
    ][seed]
    image, text = features(size, 8, seed)
    scale = torch.tensor(scale_value, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([bias_value], dtype=torch.float64, requires_grad=True)
    inputs = (image, text, scale, bias)
    ours, exact = SigLipLoss()(*inputs), theirs()(*inputs)
    assert relative_error(ours, exact) < 1e-12
    found = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(exact, inputs), strict=True)
    for our, their in found:
        assert relative_error(our, their) < 1e-12


def test_options() -> None:
    """A dictionary, no bias, numbers instead of tensors, and the options that have no effect."""
    image, text = features(5, 4, 0)
    ours, peer = SigLipLoss(True, 0, 1, "gather"), theirs(True, 0, 1, "gather")
    found, exact = (f(image, text, 10.0, None, output_dict=True) for f in (ours, peer))
    assert found.keys() == exact.keys()
    assert relative_error(found["contrastive_loss"], exact["contrastive_loss"]) < 1e-12
    assert relative_error(ours(image, text, 20, -3), peer(image, text, 20, -3)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_in_16_bits_is_not_rounded_again(dtype: torch.dtype) -> None:
    """1/scale would be off by 1 in 256 in bfloat16."""
    image, text = (x.detach().to(dtype) for x in features(6, 16, 1))
    scale, bias = (torch.tensor(value, dtype=dtype) for value in (97.0, -9.0))
    ours = SigLipLoss()(image, text, scale, bias)
    exact = theirs()(image.double(), text.double(), scale.double(), bias.double())
    assert ours.item() == pytest.approx(exact.item(), rel=1e-5)


def test_several_processes_are_refused() -> None:
    """Rather than computed without the other texts."""
    with pytest.raises(ValueError, match="world_size is 2"):
        SigLipLoss(world_size=2)
