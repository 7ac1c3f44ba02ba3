"""C3D (Tran et al., 2015), its three fully connected layers removed, instance norm after each convolution."""

from torch import nn

from hdc.backbones.backbone import Backbone
from hdc.backbones.normalization import NormLayer, instance_norm


def _conv(in_channels: int, out_channels: int, norm: NormLayer) -> list[nn.Module]:
    return [
        nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1),
        norm(out_channels),
        nn.ReLU(inplace=True),
    ]


class C3D(Backbone):
    """Eight 3×3×3 convolutions in five blocks; a block's feature map is taken before its pooling.

    Blocks 3, 4, 5 of a clip [3, T, H, W]: [256, T/2, H/4, W/4], [512, T/4, H/8, W/8],
    [512, T/8, H/16, W/16].
    """

    def __init__(self, norm: NormLayer | None = None) -> None:
        super().__init__()
        norm = norm or instance_norm()
        self.channels = {3: 256, 4: 512, 5: 512}
        self.block1 = nn.Sequential(*_conv(3, 64, norm))
        self.block2 = nn.Sequential(nn.MaxPool3d((1, 2, 2)), *_conv(64, 128, norm))
        self.block3 = nn.Sequential(nn.MaxPool3d(2), *_conv(128, 256, norm), *_conv(256, 256, norm))
        self.block4 = nn.Sequential(nn.MaxPool3d(2), *_conv(256, 512, norm), *_conv(512, 512, norm))
        self.block5 = nn.Sequential(nn.MaxPool3d(2), *_conv(512, 512, norm), *_conv(512, 512, norm))
        self.initialize()
