"""R(2+1)D-10 (Tran et al., 2018) with one block per stage, laid out as in VCOP (Xu et al., 2019)."""

from torch import Tensor, nn

from hdc.backbones.backbone import Backbone
from hdc.backbones.normalization import NormLayer, instance_norm

Size = tuple[int, int, int]


def _factored_conv(
    in_channels: int, out_channels: int, kernel: Size, stride: Size, norm: NormLayer
) -> list[nn.Module]:
    """A spatial 1×k×k convolution, norm, ReLU, then a temporal k×1×1 one.

    The width between them keeps the parameter count of the full 3D convolution (Tran et al., §3.5).
    """
    t, d = kernel[0], kernel[1]
    width = (t * d * d * in_channels * out_channels) // (d * d * in_channels + t * out_channels)
    return [
        nn.Conv3d(in_channels, width, (1, d, d), (1, *stride[1:]), (0, d // 2, d // 2), bias=False),
        norm(width),
        nn.ReLU(inplace=True),
        nn.Conv3d(width, out_channels, (t, 1, 1), (stride[0], 1, 1), (t // 2, 0, 0), bias=False),
    ]


class FactoredBlock(nn.Module):
    """A residual block of two factored 3×3×3 convolutions; its shortcut is factored too."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormLayer) -> None:
        super().__init__()
        step, cube, point = (stride, stride, stride), (3, 3, 3), (1, 1, 1)
        self.residual = nn.Sequential(
            *_factored_conv(in_channels, out_channels, cube, step, norm),
            norm(out_channels),
            nn.ReLU(inplace=True),
            *_factored_conv(out_channels, out_channels, cube, point, norm),
            norm(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                *_factored_conv(in_channels, out_channels, point, step, norm), norm(out_channels)
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.residual(x) + self.shortcut(x))


class R2Plus1D10(Backbone):
    """Blocks 3, 4, 5 of a clip [3, T, H, W]: [128, T/2, H/4, W/4], [256, T/4, H/8, W/8],
    [512, T/8, H/16, W/16]."""

    def __init__(self, norm: NormLayer | None = None) -> None:
        super().__init__()
        norm = norm or instance_norm()
        self.channels = {3: 128, 4: 256, 5: 512}
        self.block1 = nn.Sequential(
            *_factored_conv(3, 64, (3, 7, 7), (1, 2, 2), norm), norm(64), nn.ReLU(inplace=True)
        )
        self.block2 = FactoredBlock(64, 64, 1, norm)
        self.block3 = FactoredBlock(64, 128, 2, norm)
        self.block4 = FactoredBlock(128, 256, 2, norm)
        self.block5 = FactoredBlock(256, 512, 2, norm)
        self.initialize()
