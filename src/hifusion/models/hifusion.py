"""HiFusion: expression of a spot from its patch at several grids and the region around it (arXiv 2511.12969)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion.errors import InputError
from hifusion.models.inputs import check_dropout, check_sides, check_whole_numbers
from hifusion.models.resnet import ENCODERS, ResNet, as_tensor, load_named, trunk_layout

LevelResize = Literal["max", "bilinear"]


@dataclass(frozen=True)
class HiFusionConfig:
    """Shape of a HiFusion network.

    Parameters
    ----------
    n_genes
        Genes in the panel, G.
    grids
        Pieces per side of each level, L of them; each divides `spot_px`. The others are resized to the first.
    level_resize
        "max": adaptive max pooling, as the released code; "bilinear": as the paper says.
    spot_px, region_px
        Sides of the spot patch and of the region patch around it; both even or both odd, so the crop is exact.
    heads
        Attention heads; divides C = 8 * `width`.
    dropout
        On the attention weights, in [0, 1).
    spot_encoder, region_encoder
        Names in `hifusion.models.resnet.ENCODERS`.
    width
        Channels of the encoders' first stage; 64 in the paper.

    Raises
    ------
    InputError
        A value is outside its range.
    """

    n_genes: int
    grids: tuple[int, ...] = (1, 2, 7)
    level_resize: LevelResize = "max"
    spot_px: int = 224
    region_px: int = 448
    heads: int = 8
    dropout: float = 0.1
    spot_encoder: str = "resnet18"
    region_encoder: str = "resnet10"
    width: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.grids, (tuple, list)) or not self.grids or len(set(self.grids)) < len(self.grids):
            raise InputError(f"grids: {self.grids!r} is not a list of grids, each once; give one such as (1, 2, 7)")
        object.__setattr__(self, "grids", tuple(self.grids))  # JSON gives lists
        check_whole_numbers(self, "n_genes", "spot_px", "region_px", "heads", "width")
        divisors = [n for n in range(1, self.spot_px + 1) if self.spot_px % n == 0]
        for grid in self.grids:
            if type(grid) is not int or grid not in divisors:
                allowed = ", ".join(map(str, divisors))
                raise InputError(f"grids: {grid!r} does not divide spot_px={self.spot_px}; use one of {allowed}")
        check_sides(self.spot_px, self.region_px)
        if self.channels % self.heads:
            raise InputError(f"heads: {self.heads} does not divide {self.channels} channels (8 x width); use a divisor")
        check_dropout(self.dropout)
        for name, allowed_names in (
            ("level_resize", get_args(LevelResize)),
            ("spot_encoder", ENCODERS),
            ("region_encoder", ENCODERS),
        ):
            if getattr(self, name) not in allowed_names:
                raise InputError(f"{name}: {getattr(self, name)!r} is unknown; use one of {', '.join(allowed_names)}")

    @property
    def channels(self) -> int:
        """Channels C of the encoders' feature maps."""
        return 8 * self.width

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of weights and images."""
        return trunk_layout(self.width)


class HiFusionOutput(NamedTuple):
    """What a forward pass gives; h and w are those of the first level's map."""

    expression: Tensor
    """(B, G)"""
    level_expression: Tensor
    """(L, B, G), for auxiliary supervision; L = 0 where the network was made for inference."""
    level_features: Tensor
    """(L, B, C, h, w), after resizing to the first level; L = 0 likewise."""
    embedding: Tensor
    """(B, C), what the head reads: region query and attended spot tokens, before the layer norm."""


class HiFusion(nn.Module):
    """Spot patch at several grids, fused and attended from the region around it -> expression of the panel."""

    needs: ClassVar[tuple[str, ...]] = ()
    whole_section: ClassVar[bool] = False

    def __init__(self, config: HiFusionConfig):
        super().__init__()
        self.config = config
        self.keep_levels = True
        self.image_dtype: torch.dtype | None = None  # of standardised images; that of the weights, or of autocast
        self.spot_encoder = ResNet(ENCODERS[config.spot_encoder], config.width)
        self.region_encoder = ResNet(ENCODERS[config.region_encoder], config.width)
        self.level_head = nn.Linear(config.channels, config.n_genes)
        self.level_logits = nn.Parameter(torch.zeros(len(config.grids)))  # equal shares to begin with
        self.attention = CrossAttention(config.channels, config.heads, config.dropout)
        self.norm = nn.LayerNorm(config.channels)
        self.head = nn.Linear(config.channels, config.n_genes)

    def forward(self, region: Tensor) -> HiFusionOutput:
        """Expression from raw pixels: uint8 (B, 3, region_px, region_px); the spot patch is its centre.

        Raises
        ------
        InputError
            Another dtype or shape.
        """
        side = self.config.region_px
        _check("region", region, side)
        if region.dtype != torch.uint8:
            raise InputError(f"region: dtype is {region.dtype}; give uint8, or standardised floats to forward_images")
        start, stop = (side - self.config.spot_px) // 2, (side + self.config.spot_px) // 2
        spot = region[:, :, start:stop, start:stop]
        dtype = self.image_dtype or self._working_dtype(region.device.type)
        images = (standardise(pixels, dtype).to(memory_format=self.config.memory_format) for pixels in (region, spot))
        return self.forward_images(*images)

    def _working_dtype(self, device_type: str) -> torch.dtype:
        """What the first convolution would turn its input into."""
        autocast = torch.is_autocast_enabled(device_type)
        return torch.get_autocast_dtype(device_type) if autocast else self.head.weight.dtype

    def forward_images(self, region: Tensor, spot: Tensor) -> HiFusionOutput:
        """Expression from standardised floats: (B, 3, region_px, region_px) and (B, 3, spot_px, spot_px).

        Raises
        ------
        InputError
            Integer pixels, another shape, or two batch sizes.
        """
        _check("region", region, self.config.region_px)
        _check("spot", spot, self.config.spot_px)
        if len(region) != len(spot):
            raise InputError(f"spot: {len(spot)} patches for {len(region)} regions; give one of each per spot")
        if not (region.is_floating_point() and spot.is_floating_point()):
            raise InputError(f"region, spot: {region.dtype}, {spot.dtype}; give floats, or uint8 regions to forward")
        levels = [self._level(spot, grid) for grid in self.config.grids]
        query = self.region_encoder(region)
        # Past the encoders all is small. bfloat16 would round log shares near -6 to steps of 0.03: leave autocast here.
        with torch.autocast(spot.device.type, enabled=False):
            dtype = self.head.weight.dtype
            features = torch.stack([self._resized(level.to(dtype), levels[0].shape[-2:]) for level in levels])
            shares = self.level_logits.softmax(0).view(-1, 1, 1, 1, 1)
            tokens = F.adaptive_avg_pool2d((shares * features).sum(0), 2).flatten(2).transpose(1, 2)
            query = query.to(dtype).mean((-2, -1))
            fused = query + self.attention(query, tokens)
            kept = features if self.keep_levels else features[:0]
            level_expression = self.level_head(kept.mean((-2, -1)))
            return HiFusionOutput(self.head(self.norm(fused)), level_expression, kept, fused)

    @torch.no_grad()
    def start_at(self, profile: Tensor) -> None:
        """Set the bias of both heads to a mean profile (G,): training then starts at the constant, not at zero."""
        self.head.bias.copy_(profile)
        self.level_head.bias.copy_(profile)

    def _level(self, spot: Tensor, grid: int) -> Tensor:
        """Map of one level: (B, 3, spot_px, spot_px) -> (B, C, grid * h, grid * w), each tile seen on its own."""
        return stitch_tiles(self.spot_encoder(split_tiles(spot, grid)), grid)

    def _resized(self, level: Tensor, size: torch.Size) -> Tensor:
        if level.shape[-2:] == size:
            return level
        if self.config.level_resize == "max":
            return F.adaptive_max_pool2d(level, list(size))
        return F.interpolate(level, list(size), mode="bilinear", align_corners=False)

    @classmethod
    def from_reference(
        cls,
        state_dict: Mapping[str, Any],
        grids: tuple[int, ...] = (1, 2, 7),
        level_resize: LevelResize = "max",
        *,
        spot_px: int = 224,
        region_px: int = 448,
        heads: int = 8,
        dropout: float = 0.1,
        spot_encoder: str = "resnet18",
        region_encoder: str = "resnet10",
    ) -> Self:
        """Network with weights that carry the names of the published checkpoint.

        Parameters
        ----------
        state_dict
            Published name -> tensor or numpy array, 207 of them. Genes, width and dtype are taken from it.
        grids, level_resize, spot_px, region_px, heads, dropout, spot_encoder, region_encoder
            What the weights do not say, or only by their names, see `HiFusionConfig`.

        Raises
        ------
        InputError
            Names that are missing, unexpected or of another shape; `fusion.weights` has one entry per grid.
        """
        absent = [name for name in ("fc.weight", "spot_encoder.0.weight") if name not in state_dict]
        if absent:
            raise InputError(f"published weights: missing: {', '.join(absent)}; give the checkpoint's own state dict")
        level_head = as_tensor(state_dict["fc.weight"])
        config = HiFusionConfig(
            n_genes=level_head.shape[0],
            grids=grids,
            level_resize=level_resize,
            spot_px=spot_px,
            region_px=region_px,
            heads=heads,
            dropout=dropout,
            spot_encoder=spot_encoder,
            region_encoder=region_encoder,
            width=as_tensor(state_dict["spot_encoder.0.weight"]).shape[0],
        )
        with torch.device("meta"):  # draws nothing: loading leaves the caller's random state alone
            model = cls(config)
        model.to_empty(device="cpu").to(level_head.dtype)
        heads_given = {name.split(".")[0] for name in state_dict if name.startswith("gene_head_")}
        gene_head = heads_given.pop() if len(heads_given) == 1 else f"gene_head_{config.n_genes}"
        load_named(model, state_dict, reference_names(model, gene_head), "published weights")
        return model


class CrossAttention(nn.Module):
    """Multi-head attention of one query token (B, C) over tokens (B, T, C) -> (B, C), without the residual."""

    def __init__(self, channels: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.query(query[:, None]), self.key(tokens), self.value(tokens))
        )
        dropout = self.dropout if self.training else 0.0
        return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).flatten(1))


def hifusion_loss(output: HiFusionOutput, target: Tensor, align_weight: float = 0.5) -> dict[str, Tensor]:
    """Named terms of the training loss, each a scalar, with `total` = `final` + `levels` + `align`.

    Parameters
    ----------
    output
        Of `HiFusion`.
    target
        Measured expression, (B, G).
    align_weight
        1 in the paper, 0.5 in the released code. The `align` term already contains it.

    Returns
    -------
    dict
        `final`: MSE of the prediction. `levels`: MSE of the level predictions, mean over levels.
        `align`: `align_weight` x sum over levels s > 0 of mean |F_s - F_0|, with gradient into both sides.

    Raises
    ------
    InputError
        `target` has another shape than the prediction.
    """
    expression, level_expression, features, _ = output
    if target.shape != expression.shape:
        raise InputError(f"target: shape is {tuple(target.shape)}; give (B, G) = {tuple(expression.shape)}")
    terms = {
        "final": F.mse_loss(expression, target),
        "levels": F.mse_loss(level_expression, target.expand_as(level_expression)),
        "align": align_weight * (features[1:] - features[:1]).abs().mean((1, 2, 3, 4)).sum(),
    }
    return {"total": terms["final"] + terms["levels"] + terms["align"], **terms}


def standardise(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(x - mean) / std of each image and channel, uint8 (B, 3, H, W) -> `dtype`, channels last in memory.

    Sample std, 0 -> 1 for a flat channel, which becomes exactly 0.
    """
    batch, channels, height, width = pixels.shape
    rows, count = pixels.permute(0, 2, 3, 1).reshape(batch, height, width * channels), height * width
    out = torch.empty(rows.shape, dtype=dtype, device=pixels.device)
    # About two regions at a time stay in a CPU's caches.
    at_once = max(1, 2 * 448 * 448 // count) if pixels.device.type == "cpu" else batch
    for some, to in zip(rows.split(at_once), out.split(at_once), strict=True):
        image = some.to(torch.float32)
        total = _column_sums(image, 65_000).view(-1, width, channels).sum(1)
        square = _column_sums(image.square(), 257).view(-1, width, channels).sum(1)
        mean = total / count
        variance = (square - total * mean) / (count - 1)
        scale = torch.where(variance > 0, variance.clamp(min=0).rsqrt(), 1.0)
        shift, scale = (its.to(image).repeat(1, width)[:, None] for its in (-mean * scale, scale))
        torch.addcmul(shift, image, scale, out=to)
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _column_sums(values: Tensor, rows: int) -> Tensor:
    """Exact sums over rows, float32 (B, H, K) -> float64 (B, K): whole numbers of which so many stay below 2^24."""
    sums = (part.sum(1) for part in values.split(rows, dim=1))
    parts = [(its.cpu() if its.device.type == "mps" else its).double() for its in sums]  # Apple's GPU has no float64
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def split_tiles(images: Tensor, grid: int) -> Tensor:
    """Tiles of images as one batch: (B, C, H, W) -> (B * grid * grid, C, H / grid, W / grid), row by row."""
    b, c, h, w = images.shape
    tiles = images.reshape(b, c, grid, h // grid, grid, w // grid)
    if images.is_contiguous(memory_format=torch.channels_last):  # one copy, and the layout stays
        return tiles.permute(0, 2, 4, 3, 5, 1).reshape(-1, h // grid, w // grid, c).permute(0, 3, 1, 2)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, h // grid, w // grid)


def stitch_tiles(tiles: Tensor, grid: int) -> Tensor:
    """Tiles put back in place, undoing `split_tiles`: (B * grid * grid, C, h, w) -> (B, C, grid * h, grid * w)."""
    _, c, h, w = tiles.shape
    if tiles.is_contiguous(memory_format=torch.channels_last):
        rows = tiles.permute(0, 2, 3, 1).reshape(-1, grid, grid, h, w, c).permute(0, 1, 3, 2, 4, 5)
        return rows.reshape(-1, grid * h, grid * w, c).permute(0, 3, 1, 2)
    rows = tiles.reshape(-1, grid, grid, c, h, w).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(-1, c, grid * h, grid * w)


def reference_names(model: HiFusion, gene_head: str | None = None) -> dict[str, str]:
    """Own name -> published name of every parameter and buffer.

    Parameters
    ----------
    model
        Any HiFusion.
    gene_head
        Published name of the final head; by default `gene_head_<n_genes>`, as the released code builds it.
    """
    gene_head = gene_head or f"gene_head_{model.config.n_genes}"
    published = {f"attention.{part}": f"ccf.{part}_proj" for part in ("query", "key", "value", "out")}
    published |= {"level_head": "fc", "level_logits": "fusion.weights"}
    published |= {"norm": f"{gene_head}.0", "head": f"{gene_head}.1"}
    stems = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    for encoder in ("spot_encoder", "region_encoder"):
        published |= {f"{encoder}.{stem}": f"{encoder}.{index}" for stem, index in stems.items()}
    names = {}
    for name in model.state_dict():
        own = next(own for own in published if name == own or name.startswith(f"{own}."))
        names[name] = published[own] + name[len(own) :]
    return names


def _check(what: str, images: Tensor, side: int) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
        raise InputError(f"{what}: shape is {tuple(images.shape)}; give (B, 3, {side}, {side})")
