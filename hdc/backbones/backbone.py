"""What the encoders share: five blocks in a row, of which the last three are looked at."""

from torch import Tensor, nn


class Backbone(nn.Module):
    """Subclasses set `block1` to `block5` and `channels`, the width of blocks 3, 4 and 5."""

    channels: dict[int, int]
    block1: nn.Module
    block2: nn.Module
    block3: nn.Module
    block4: nn.Module
    block5: nn.Module

    def forward(self, clips: Tensor) -> dict[int, Tensor]:
        """Clips [B, 3, T, H, W] in [−1, 1] -> the feature maps {3, 4, 5: [B, channels, t, h, w]}."""
        block3 = self.block3(self.block2(self.block1(clips)))
        block4 = self.block4(block3)
        return {3: block3, 4: block4, 5: self.block5(block4)}

    def initialize(self) -> None:
        """Kaiming-normal weights (fan-out, for ReLU) and zero biases in every convolution."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
