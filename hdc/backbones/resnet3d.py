"""3D ResNets (Hara et al., 2018) with instance norm, and the small one of the demo."""

from collections.abc import Sequence

from torch import Tensor, nn

from hdc.backbones.backbone import Backbone
from hdc.backbones.normalization import NormLayer, instance_norm


class BasicBlock(nn.Module):
    """Two 3×3×3 convolutions; where the shape changes, the shortcut is a 1×1×1 convolution (type B)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm(out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv3d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(residual + self.shortcut(x))


class ResNet3D(Backbone):
    """A stem (block 1) and four stages of basic blocks (blocks 2 to 5).

    Args:
        widths: channels of the stem and of the four stages.
        depth: basic blocks in each stage.
        stem_kernel, stem_stride: of the first convolution.
        stem_pool: whether a max pool of stride 2 follows it (as the first layer of block 2).
    """

    def __init__(
        self,
        widths: Sequence[int],
        depth: int,
        *,
        stem_kernel: int,
        stem_stride: tuple[int, int, int],
        stem_pool: bool,
        norm: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm = norm or instance_norm()
        stem, *stages = widths
        self.channels = {3: stages[1], 4: stages[2], 5: stages[3]}
        self.block1 = nn.Sequential(
            nn.Conv3d(3, stem, stem_kernel, stem_stride, stem_kernel // 2, bias=False),
            norm(stem),
            nn.ReLU(inplace=True),
        )
        stage2 = self._stage(stem, stages[0], depth, 1, norm)
        pool = [nn.MaxPool3d(3, stride=2, padding=1)] if stem_pool else []
        self.block2 = nn.Sequential(*pool, stage2)
        self.block3 = self._stage(stages[0], stages[1], depth, 2, norm)
        self.block4 = self._stage(stages[1], stages[2], depth, 2, norm)
        self.block5 = self._stage(stages[2], stages[3], depth, 2, norm)
        self.initialize()

    @staticmethod
    def _stage(
        in_channels: int, out_channels: int, depth: int, stride: int, norm: NormLayer
    ) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride, norm)
        rest = [BasicBlock(out_channels, out_channels, 1, norm) for _ in range(depth - 1)]
        return nn.Sequential(first, *rest)


def resnet3d_18(norm: NormLayer | None = None) -> ResNet3D:
    """The paper's 3D-ResNet18, laid out as in kenshohara's 3D-ResNets-PyTorch."""
    return ResNet3D(
        (64, 64, 128, 256, 512),
        depth=2,
        stem_kernel=7,
        stem_stride=(1, 2, 2),
        stem_pool=True,
        norm=norm,
    )


def tiny(norm: NormLayer | None = None) -> ResNet3D:
    """A 3D-ResNet of 16 to 128 channels for frames of about 28 pixels: minutes on two CPU cores."""
    return ResNet3D(
        (16, 16, 32, 64, 128),
        depth=1,
        stem_kernel=3,
        stem_stride=(2, 2, 2),
        stem_pool=False,
        norm=norm,
    )
