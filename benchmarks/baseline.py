"""The published recipe as plain PyTorch: eager float32, NCHW, nothing fused; what the fast path is measured against.

Written from the paper's facts (docs of `hifusion.models.hifusion`), and kept as it is: it is a yardstick, not a network
to use. Its weights are random.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

PNG_PX = 1120  # side of the picture that the released code keeps for each spot


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = stride == 1 and before == after
        projection = (nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.shortcut = nn.Identity() if same else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def trunk(blocks: int) -> nn.Sequential:
    """ResNet-18 (two blocks a stage) or -10 (one)."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    stages, before = [], 64
    for number, channels in enumerate((64, 128, 256, 512)):
        for block in range(blocks):
            stages.append(Block(before, channels, 2 if number and not block else 1))
            before = channels
    return nn.Sequential(*stem, *stages)


class Published(nn.Module):
    """HiFusion of the paper at grids 1, 2 and 7: standardised floats in, as its loader gives them."""

    def __init__(self, genes: int = 250):
        super().__init__()
        self.spot, self.region = trunk(2), trunk(1)
        self.levels, self.shares = nn.Linear(512, genes), nn.Parameter(torch.zeros(3))
        self.attention = nn.MultiheadAttention(512, 8, dropout=0.1, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(512), nn.Linear(512, genes))

    def forward(self, region: Tensor, spot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = [self._level(spot, grid) for grid in (1, 2, 7)]
        maps = [F.adaptive_max_pool2d(its, maps[0].shape[-2:]) for its in maps]
        level_expression = torch.stack([self.levels(its.mean((-2, -1))) for its in maps])
        fused = sum(share * its for share, its in zip(self.shares.softmax(0), maps, strict=True))
        tokens = F.adaptive_avg_pool2d(fused, 2).flatten(2).transpose(1, 2)
        query = self.region(region).mean((-2, -1))[:, None]
        query = query + self.attention(query, tokens, tokens, need_weights=False)[0]
        return self.head(query[:, 0]), level_expression, torch.stack(maps)

    def _level(self, spot: Tensor, grid: int) -> Tensor:
        side = spot.shape[-1] // grid
        tiles = spot.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, side, side)
        maps = self.spot(tiles)
        return torch.cat(
            [torch.cat(list(row), -1) for row in maps.unflatten(0, (-1, grid, grid)).permute(1, 2, 0, 3, 4, 5)], -2
        )


def published_loss(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    """MSE of the prediction and of the levels, and the alignment of the maps."""
    expression, levels, maps = output
    align = sum((its - maps[0]).abs().mean() for its in maps[1:])
    return F.mse_loss(expression, target) + F.mse_loss(levels, target.expand_as(levels)) + 0.5 * align


class PngSpots(Dataset[tuple[Tensor, Tensor]]):
    """A picture a spot: opened, cropped twice, each crop standardised and turned, as the released loader does."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.paths[index]) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float()
        crops = []
        for side in (448, 224):
            start = (PNG_PX - side) // 2
            crop = pixels[:, start : start + side, start : start + side]
            std, mean = torch.std_mean(crop, dim=(1, 2), keepdim=True)
            crop = (crop - mean) / std
            for turn in (lambda x: x.flip(2), lambda x: x.flip(1), lambda x: x.rot90(1, (1, 2))):
                crop = turn(crop) if torch.rand(()) < 0.5 else crop
            crops.append(crop.contiguous())
        return crops[0], crops[1]
