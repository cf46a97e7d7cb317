"""HiFusion on a frozen trunk, and kernel regression on the same features: the network of the recipe `recommended`.

A few hundred spots do not teach a trunk to see. Here the trunk is one that has seen a million pictures and stays as it
is; what is learned is small. HiFusion's parts are kept: the levels of a spot (its patch in 1, 2 x 2 and 7 x 7 tiles) go
through a shared adapter, are drawn together by the alignment term and fused by learned shares; the windows around
the spot make the query that attends to them. Beside it stands a Gaussian process on the same features and on the place
of the spot in its patient's tissue. Both predict the same few components of expression, and are blended.

Torch only: what is seen of a spot is made in `hifusion.appearance`, the fit in `hifusion.frozen_training`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion.errors import InputError
from hifusion.models.hifusion import CrossAttention
from hifusion.models.inputs import check_dropout, check_sides, check_whole_numbers

STATISTICS = 42
"""Hand-made statistics of a spot (hifusion.patch_statistics)."""
TOKENS = 4
"""Quarters of a spot patch, each a token."""
HEAD_SHARE = 0.3
"""Of the heads, where nothing tells better: between .15 and .5 it hardly mattered (docs/results.md)."""
STRENGTH = 0.5
"""Of deviations in a patient that was not trained on, where nothing tells better."""
INTERVALS = ("known", "new")
"""Whose intervals there are: of patients trained on, and of all others."""


@dataclass(frozen=True)
class FrozenConfig:
    """What is seen of a spot, and how it is learned from.

    Parameters
    ----------
    n_genes
        Genes in the panel, G.
    grids
        Tiles per side of each level, L of them; each divides `spot_px`.
    windows
        Squares around the spot that make the query: (side in patch pixels, pixels they are seen at). None: the query
        is the mean of the tokens, and nothing around the spot is looked at.
    radii_um
        Neighbourhoods whose mean features stand beside the spot's own.
    spot_px, region_px
        Sides of the spot patch and of the region patch around it, where the hand-made statistics are taken.
    channels
        Of the frozen trunk's maps, C; taken from the encoder when the network is fitted.
    width, heads
        Of the adapter and of the attention.
    attention
        Whether the query attends to the tokens; without it they are averaged.
    components
        Of expression, R at most.
    members
        Heads that are trained from different beginnings and averaged.
    steps
        Gradient steps of each head.
    dropout
        On the features and on the embedding.
    mixup
        Parameter of the Beta distribution by which two spots are mixed; 0 mixes none.
    head_share
        Of the heads in the blend with the kernel regression; None: told by training sections that are left out, and
        `HEAD_SHARE` where there is only one.
    sharpness
        Of the kernel on features: exp(-sharpness * mean squared difference).
    place_share, place_um
        Weight and bandwidth of the kernel on places.
    strength
        Of the deviations from the mean in a patient that was not trained on; None: told by patients that are left out,
        and `STRENGTH` where only one was trained on.
    max_spots
        The kernel regression keeps so many training spots, evenly spaced.

    Raises
    ------
    InputError
        A value is outside its range.
    """

    n_genes: int
    grids: tuple[int, ...] = (1, 2, 7)
    windows: tuple[tuple[int, int], ...] = ((448, 448), (192, 384), (800, 320))
    radii_um: tuple[float, ...] = (150.0, 300.0, 600.0)
    spot_px: int = 224
    region_px: int = 448
    channels: int = 432
    width: int = 64
    heads: int = 4
    attention: bool = True
    components: int = 30
    members: int = 3
    steps: int = 200
    dropout: float = 0.5
    mixup: float = 0.4
    head_share: float | None = None
    sharpness: float = 0.3
    place_share: float = 0.25
    place_um: float = 400.0
    strength: float | None = None
    max_spots: int = 4000

    def __post_init__(self) -> None:
        names = ("n_genes", "spot_px", "region_px", "channels", "width", "heads", "components", "members", "steps")
        check_whole_numbers(self, *names, "max_spots")
        check_dropout(self.dropout)
        object.__setattr__(self, "grids", tuple(self.grids))  # JSON gives lists
        object.__setattr__(self, "windows", tuple(tuple(window) for window in self.windows))
        object.__setattr__(self, "radii_um", tuple(self.radii_um))
        if not self.grids or any(type(grid) is not int or grid < 1 or self.spot_px % grid for grid in self.grids):
            raise InputError(
                f"grids: {self.grids} do not all divide spot_px={self.spot_px}; give some such as (1, 2, 7)"
            )
        if any(len(window) != 2 or min(window) < 32 for window in self.windows):
            raise InputError(f"windows: {self.windows} is not (side, seen at) pairs of at least 32 px; give (448, 448)")
        check_sides(self.spot_px, self.region_px)
        if self.width % self.heads:
            raise InputError(f"heads: {self.heads} does not divide width={self.width}; use a divisor")
        for name in ("head_share", "strength"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise InputError(f"{name}: {share} is not a share; give one from 0 to 1")
        for name in ("mixup", "sharpness", "place_share"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}: {getattr(self, name)} is not possible; use 0 or a number above it")
        if not self.place_um > 0 or not all(radius > 0 for radius in self.radii_um):
            raise InputError(f"place_um: {self.place_um}, radii_um: {self.radii_um}; use distances above 0")

    @property
    def features(self) -> int:
        """Columns F of what is seen of a spot, `hifusion.appearance.Appearance.whole`."""
        return self.channels * (len(self.grids) + 2 * len(self.windows)) + STATISTICS

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of weights."""
        return torch.contiguous_format


class FrozenOutput(NamedTuple):
    """What a forward pass gives."""

    expression: Tensor
    """(B, G)"""
    lower: Tensor
    """(B, G), 5 % of measurements are to lie below."""
    upper: Tensor
    """(B, G), 5 % are to lie above."""
    embedding: Tensor
    """(B, E), absolute appearance on the principal axes of the training spots: what novelty is told by."""


class HeadOutput(NamedTuple):
    """What one head says."""

    components: Tensor
    """(B, R)"""
    level_components: Tensor
    """(L, B, R), for auxiliary supervision."""
    levels: Tensor
    """(L, B, 4, width), the adapted tokens of each level."""


class FrozenHead(nn.Module):
    """HiFusion past its trunk: levels adapted and fused, attended from the windows around the spot."""

    def __init__(self, config: FrozenConfig):
        super().__init__()
        self.config, width = config, config.width
        around = 2 * len(config.windows) * config.channels
        self.adapter = nn.Linear(config.channels, width)
        self.query = nn.Linear(around, width) if around else None
        self.statistics = nn.Linear(STATISTICS * (1 + len(config.radii_um)), width)
        self.level_logits = nn.Parameter(torch.zeros(len(config.grids)))
        self.attention = CrossAttention(width, config.heads, 0.0)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.components)
        self.level_head = nn.Linear(width, config.components)
        for layer in (self.head, self.level_head):  # training starts at the mean
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, levels: Tensor, around: Tensor, statistics: Tensor) -> HeadOutput:
        """Components of expression from tokens (B, L, 4, C), windows (B, 2 W C) and statistics (B, 42 * radii)."""
        drop = self.config.dropout if self.training else 0.0
        adapted = F.gelu(self.adapter(F.dropout(levels, drop)))
        fused = (self.level_logits.softmax(0).view(1, -1, 1, 1) * adapted).sum(1)
        by_hand = F.gelu(self.statistics(F.dropout(statistics, drop)))
        query = self.query(F.dropout(around, drop)) if self.query is not None else fused.mean(1)
        tokens = torch.cat([fused, by_hand[:, None]], dim=1)
        found = self.attention(query, tokens) if self.config.attention else tokens.mean(1)
        embedding = F.dropout(self.norm(F.gelu(query) + found + by_hand), drop)
        level_components = self.level_head(F.dropout(adapted.mean(2), drop))
        return HeadOutput(self.head(embedding), level_components.transpose(0, 1), adapted.transpose(0, 1))


def head_loss(
    output: HeadOutput, target: Tensor, weight: Tensor, align_weight: float, level_weight: float
) -> dict[str, Tensor]:
    """HiFusion's terms, with the spots weighed (B,): MSE of the components (B, R), that of the levels, alignment."""
    terms = {
        "final": (weight[:, None] * (output.components - target).square()).mean(),
        "levels": level_weight * (weight[:, None] * (output.level_components - target).square()).mean(),
        "align": align_weight * (output.levels[1:] - output.levels[:1]).abs().mean((1, 2, 3)).sum(),
    }
    return {"total": terms["final"] + terms["levels"] + terms["align"], **terms}


class FrozenHiFusion(nn.Module):
    """Heads and kernel regression over what a frozen trunk sees: expression, intervals and an embedding.

    Its state is filled by `hifusion.frozen_training`; M training spots are kept for the kernel.
    """

    needs: ClassVar[tuple[str, ...]] = ("whole", "levels", "context", "place", "patient_known")
    whole_section: ClassVar[bool] = False
    reads_regions: ClassVar[bool] = False
    has_intervals: ClassVar[bool] = True

    bank_context: Tensor
    bank_place: Tensor
    weights: Tensor
    directions: Tensor
    spectrum: Tensor
    signal: Tensor
    axes: Tensor
    offset: Tensor
    residual: Tensor
    head_share: Tensor
    strength: Tensor
    quantiles: Tensor
    look_mean: Tensor
    look_axes: Tensor

    def __init__(self, config: FrozenConfig):
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList(FrozenHead(config) for _ in range(config.members))
        genes, parts, wide = config.n_genes, config.components, (1 + len(config.radii_um)) * config.features
        shapes: dict[str, tuple[int, ...]] = {
            "bank_context": (0, wide),
            "bank_place": (0, 2),
            "weights": (0, parts),  # of each training spot, in each component
            "directions": (0, 0),  # (M, M), eigenvectors of the kernel between training spots
            "spectrum": (0, parts),  # 1 / (eigenvalue + noise) of each direction, for each component
            "signal": (parts,),  # variance of each component
            "axes": (parts, genes),  # components -> deviations of genes
            "offset": (genes,),  # mean of the training sections' mean profiles
            "residual": (genes,),  # variance of a measurement that is not told by the picture
            "head_share": (),
            "strength": (),  # of deviations, in patients that were not trained on
            "quantiles": (len(INTERVALS), 2, genes),  # 5 % and 95 % of errors, in units of the expected one
            "look_mean": (config.features,),
            "look_axes": (config.features, 0),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_load_state_dict_pre_hook(_make_room)

    def forward(
        self, region: Tensor, *, whole: Tensor, levels: Tensor, context: Tensor, place: Tensor, patient_known: Tensor
    ) -> FrozenOutput:
        """Expression of spots; `region` is not looked at.

        Parameters
        ----------
        whole, levels
            Of `hifusion.appearance.Appearance`, (B, F) as it is and (B, L, 4, C) standardised.
        context
            Of `hifusion.appearance.context`, (B, 1 + radii, F).
        place
            (B, 2), um in the frame of the training sections; far from all of them where it is not known.
        patient_known
            bool (B,), whether the spot's patient was trained on.
        """
        with torch.autocast(whole.device.type, enabled=False):
            whole, levels, context = whole.float(), levels.float(), context.float()
            if not len(self.bank_context):
                raise InputError("the network was not fitted; make a run with `hifusion train --recipe recommended`")
            kernel, spread = self.regression(context, place)
            heads = self.from_heads(levels, context)
            components = kernel + self.head_share * (heads - kernel)
            strength = torch.where(patient_known, 1.0, self.strength)[:, None]
            expression = self.offset + strength * (components @ self.axes)
            expected = (spread @ self.axes.square() + self.residual).sqrt()
            low, high = self.quantiles[(~patient_known).long()].unbind(1)
            lower, upper = expression + low * expected, expression + high * expected
            return FrozenOutput(expression, lower, upper, self.embedding(whole))

    def embedding(self, whole: Tensor) -> Tensor:
        """Absolute appearance (B, F) on the principal axes of the training spots, (B, E)."""
        return (whole - self.look_mean) @ self.look_axes

    def regression(self, context: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each component by the kernel regression, (B, R) twice."""
        c = self.config
        kernel = gram(context.flatten(1), place, self.bank_context.float(), self.bank_place, c)
        told = ((kernel @ self.directions).square() @ self.spectrum).clamp(max=1 + c.place_share)
        return kernel @ self.weights, self.signal * (1 + c.place_share - told)

    def from_heads(self, levels: Tensor, context: Tensor) -> Tensor:
        """Components by the heads, their mean, (B, R)."""
        parts = head_inputs(levels, context, self.config)
        return torch.stack([head(**parts).components for head in self.heads]).mean(0)


def head_inputs(levels: Tensor, context: Tensor, config: FrozenConfig) -> dict[str, Tensor]:
    """What a head is given: tokens, the spot's own windows, and statistics of the spot and its neighbourhoods."""
    first = config.channels * len(config.grids)
    around, statistics = context[:, 0, first:-STATISTICS], context[:, :, -STATISTICS:].flatten(1)
    parts = {"levels": levels, "around": around, "statistics": statistics}
    return {name: part.clamp(-5, 5) for name, part in parts.items()}


def gram(a: Tensor, place_a: Tensor, b: Tensor, place_b: Tensor, config: FrozenConfig) -> Tensor:
    """The kernel between spots, (A, D) and (B, D) -> (A, B): alike in looks, and near in the patient's tissue."""
    squares = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0) / a.shape[1]
    away = torch.cdist(place_a.to(place_b), place_b, compute_mode="donot_use_mm_for_euclid_dist").to(squares)
    near = torch.exp(-away.square() / (2 * config.place_um**2))
    return torch.exp(-config.sharpness * squares) + config.place_share * near


def _make_room(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Sizes of the buffers follow the training spots, which the configuration does not tell."""
    for name, _ in list(module.named_buffers(recurse=False)):
        if prefix + name in state_dict:
            setattr(module, name, torch.zeros_like(state_dict[prefix + name], device=module.offset.device))
