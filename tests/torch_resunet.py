"""The original's architecture in PyTorch, with its parameter names, for comparisons."""

import torch
from torch import nn


class ResidualConv(nn.Module):
    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, features, 3, stride=stride, padding=1),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.Conv2d(features, features, 3, padding=1),
        )
        self.conv_skip = nn.Sequential(
            nn.Conv2d(channels, features, 3, stride=stride, padding=1), nn.BatchNorm2d(features)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_block(x) + self.conv_skip(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.upsample(x)


class TorchResUnet(nn.Module):
    """From (N, C, H, W) to logits (N, 1, H, W)."""

    def __init__(self, in_channels: int, filters: tuple[int, int, int, int]) -> None:
        super().__init__()
        f1, f2, f3, f4 = filters
        self.input_layer = nn.Sequential(
            nn.Conv2d(in_channels, f1, 3, padding=1), nn.BatchNorm2d(f1), nn.ReLU(), nn.Conv2d(f1, f1, 3, padding=1)
        )
        self.input_skip = nn.Sequential(nn.Conv2d(in_channels, f1, 3, padding=1))
        self.residual_conv_1 = ResidualConv(f1, f2, 2)
        self.residual_conv_2 = ResidualConv(f2, f3, 2)
        self.bridge = ResidualConv(f3, f4, 2)
        self.upsample_1 = Upsample(f4)
        self.up_residual_conv1 = ResidualConv(f4 + f3, f3, 1)
        self.upsample_2 = Upsample(f3)
        self.up_residual_conv2 = ResidualConv(f3 + f2, f2, 1)
        self.upsample_3 = Upsample(f2)
        self.up_residual_conv3 = ResidualConv(f2 + f1, f1, 1)
        self.output_layer = nn.Sequential(nn.Conv2d(f1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        level1 = self.input_layer(x) + self.input_skip(x)
        level2 = self.residual_conv_1(level1)
        level3 = self.residual_conv_2(level2)
        y = self.upsample_1(self.bridge(level3))
        y = self.up_residual_conv1(torch.cat([y, level3], dim=1))
        y = self.up_residual_conv2(torch.cat([self.upsample_2(y), level2], dim=1))
        y = self.up_residual_conv3(torch.cat([self.upsample_3(y), level1], dim=1))
        return self.output_layer(y)
