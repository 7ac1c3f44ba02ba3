"""The encoders against the layouts, the parameter counts and the arithmetic that were published."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hdc.backbones import build_backbone
from hdc.errors import InputError

# name: blocks 3, 4, 5 of a clip of 16 × 112 × 112; parameters; billions of multiply-adds
PUBLISHED = {
    "c3d": ([(256, 8, 28, 28), (512, 4, 14, 14), (512, 2, 7, 7)], 27_661_440, 38.5),
    "resnet3d-18": ([(128, 4, 14, 14), (256, 2, 7, 7), (512, 1, 4, 4)], 33_203_904, 8.3),
    "r2plus1d-10": ([(128, 8, 28, 28), (256, 4, 14, 14), (512, 2, 7, 7)], 14_365_303, 21.4),
}
NAMES = [*PUBLISHED, "tiny"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name: str) -> None:
    shapes, parameters, multiply_adds = PUBLISHED[name]
    with torch.device("meta"):
        backbone = build_backbone(name)
        clip = torch.empty(1, 3, 16, 112, 112)
    with FlopCounterMode(display=False) as flops:
        blocks = backbone(clip)
    assert [tuple(blocks[k].shape) for k in (3, 4, 5)] == [(1, *shape) for shape in shapes]
    assert [backbone.channels[k] for k in (3, 4, 5)] == [shape[0] for shape in shapes]
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert flops.get_total_flops() / 2e9 == pytest.approx(multiply_adds, abs=0.05)


def test_r2plus1d_widths() -> None:
    """VCOP's intermediate widths, in the order of its layers."""
    with torch.device("meta"):
        backbone = build_backbone("r2plus1d-10")
    spatial = [
        layer.out_channels
        for layer in backbone.modules()
        if isinstance(layer, nn.Conv3d) and layer.kernel_size[0] == 1 and not _is_temporal(layer)
    ]
    assert spatial == [83, 144, 144, 230, 288, 42, 460, 576, 85, 921, 1152, 170]


def _is_temporal(layer: nn.Conv3d) -> bool:
    """The second half of a factored 1×1×1 shortcut: it strides over time, not over space."""
    return layer.kernel_size == (1, 1, 1) and layer.stride[1:] == (1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_instance_norm_replaces_batch_norm(name: str) -> None:
    with torch.device("meta"):
        layers = list(build_backbone(name, norm_eps=1e-3).modules())
    norms = [layer for layer in layers if isinstance(layer, nn.InstanceNorm3d)]
    assert not [layer for layer in layers if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(n.affine and n.eps == 1e-3 and not n.track_running_stats for n in norms)


def test_c3d_normalises_every_convolution() -> None:
    with torch.device("meta"):
        leaves = [m for m in build_backbone("c3d").modules() if not list(m.children())]
    convolutions = [i for i, layer in enumerate(leaves) if isinstance(layer, nn.Conv3d)]
    assert len(convolutions) == 8
    for i in convolutions:
        assert isinstance(leaves[i + 1], nn.InstanceNorm3d)
        assert isinstance(leaves[i + 2], nn.ReLU)
        assert leaves[i].bias is not None


def test_norm_without_affine() -> None:
    with torch.device("meta"):
        plain = build_backbone("c3d", norm_affine=False)
    # C3D's eight norms have 64 + 128 + 2·256 + 4·512 channels, with a scale and a shift each.
    assert sum(p.numel() for p in plain.parameters()) == 27_661_440 - 2 * 2752


@pytest.mark.parametrize("name", NAMES)
def test_sample_does_not_depend_on_its_batch(name: str) -> None:
    """In training mode, where batch norm would leak."""
    torch.manual_seed(0)
    backbone = build_backbone(name).train()
    clips = torch.rand(2, 3, 16, 64, 64) * 2 - 1
    other = torch.stack([clips[0], clips[1] * 0.1 + 0.5])
    with torch.no_grad():
        first, second = backbone(clips), backbone(other)
    for k in (3, 4, 5):
        torch.testing.assert_close(first[k][0], second[k][0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(first[k][0], first[k][1], atol=0.1)


def test_kaiming_fan_out() -> None:
    backbone = build_backbone("resnet3d-18")
    weight = backbone.block5[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 27)) ** 0.5, rel=0.01)


def test_unknown_name() -> None:
    with pytest.raises(InputError, match=r"'resnet50'.*c3d, resnet3d-18, r2plus1d-10, tiny"):
        build_backbone("resnet50")
