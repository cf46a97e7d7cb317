"""Hist2ST: expression of all spots of a section by ConvMixer, transformer and graph (Zeng et al., BIB 23(5), 2022).

Written from a description of the paper and of the released code (biomed-AI/Hist2ST, 7480e5d). `RECIPE` says how the
authors trained. Differences from the release, and why:

- A spot without neighbours keeps its own feature (`isolated="self"`) or zero; there 0 / 0 makes the whole section NaN.
- The neighbour graph leaves a spot out of its own neighbours by index and breaks ties by distance, then index; the
  release takes the first of an unstable sort for the spot itself.
- A section is (N, ...), without a batch axis of 1, and one spot is a section too. Array coordinates are checked.
- Pixels may be divided by 255 (`pixels`), and patches need not have x and y exchanged (`transposed`).
- Nothing reads a label or a count at test time; counts enter the loss only. Panel and folds are to go by patient.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion.errors import InputError
from hifusion.models.counts import ZINB, NegativeBinomial
from hifusion.models.inputs import (
    PatchConfig,
    PixelScale,
    centre_patch,
    check_choice,
    check_dropout,
    check_floats,
    check_position,
    check_shape,
    check_whole_numbers,
)
from hifusion.models.neighbours import GraphLayer, Isolated, NeighbourPolicy
from hifusion.models.published import AuthorsRecipe, fill, published_names, unwrapped
from hifusion.models.resnet import as_tensor
from hifusion.models.vit_layers import TransformerLayer, published_layer

CountHead = Literal["zinb", "nb", "none"]

RECIPE = AuthorsRecipe(
    target="log10(1 + 10000 y / sum of y over the panel)",
    panel="785 genes (her2st), 171 (cSCC): most variable genes of each section, rarer ones dropped, over all sections",
    optimiser="Adam",
    lr=1e-5,
    schedule="x 0.9 every 50 epochs",
    batch="one section: itself and five augmented copies, all in training mode",
    epochs=350,
    start="random, torch's defaults",
    augmentation="copies only, see hist2st_training.random_view; the section itself is as it is",
    protocol="leave one section out: 32 sections of her2st, 12 of cSCC; the test section was watched in training",
)
"""Neighbours: `neighbour_graph` with k = 4, pruning "grid" for her2st and "none" for cSCC."""

HEAD_WIDTH = 64
"""Channels of an attention head, whatever the width of the network."""

_RULES = {
    "x_embedding": "x_embed",
    "y_embedding": "y_embed",
    "head_norm": "gene_head.0",
    "head": "gene_head.1",
    "mixer": "vit.transformer.layer1",
    r"(.*)\.depthwise\.": r"\1.dw.",
    r"(.*)\.pointwise\.": r"\1.pw.",
    "down": "vit.transformer.down.0",
    "layers": "vit.transformer.layer2",
    r"graph\.(\d+)\.linear": r"vit.transformer.layer3.\1",
    "memory": "vit.transformer.jknet.0",
    r"coefficient\.": "coef.",
    r"count_heads\.(mean|disp|pi)\.": r"\1.0.",
    r"count_heads\.(hr|hp)\.": r"\1.",
} | published_layer(attention="attn", mlp="ff")

_COUNT_HEADS: dict[str, tuple[str, ...]] = {"zinb": ("mean", "disp", "pi"), "nb": ("hr", "hp"), "none": ()}


@dataclass(frozen=True)
class Hist2STConfig(PatchConfig):
    """Shape of a Hist2ST.

    Parameters
    ----------
    n_genes
        Genes in the panel, G.
    patch_px
        Side of a spot's patch, the centre of its region patch.
    piece_px
        Side of the pieces that the first convolution makes one pixel of; divides `patch_px`.
    channels
        Of the ConvMixer, a multiple of 8; the width is D = (patch_px / piece_px) ** 2 * channels / 8.
    kernel
        Side of the depthwise convolutions.
    mixer_layers, layers, graph_layers
        Depth of ConvMixer, transformer and graph.
    heads
        Attention heads, of 64 channels each.
    dropout
        In [0, 1).
    positions
        Array coordinates are 0 to `positions` - 1, on both axes.
    count_head
        Distribution of raw counts that is learned beside: "zinb" (published), "nb" (an option of the code), "none".
    distil
        Whether there is a weight for self-distillation, see `hist2st_training.hist2st_loss`.
    policy
        How neighbours are pooled: "mean" (published), "max" (an option of the code).
    isolated
        What a spot without neighbours gets for their pool: its own feature, or zero.
    pixels
        "raw": 0 to 255, as published; "unit": divided by 255.
    transposed
        Whether patches are seen with x and y exchanged, as published.

    Raises
    ------
    InputError
        A value is outside its range.
    """

    n_genes: int
    patch_px: int = 112
    piece_px: int = 7
    channels: int = 32
    kernel: int = 5
    mixer_layers: int = 2
    layers: int = 8
    graph_layers: int = 4
    heads: int = 16
    dropout: float = 0.2
    positions: int = 64
    count_head: CountHead = "zinb"
    distil: bool = True
    policy: NeighbourPolicy = "mean"
    isolated: Isolated = "self"
    pixels: PixelScale = "raw"
    transposed: bool = True

    def __post_init__(self) -> None:
        sizes = ("n_genes", "patch_px", "piece_px", "channels", "kernel", "heads", "positions")
        check_whole_numbers(self, *sizes, "mixer_layers", "layers", "graph_layers")
        check_dropout(self.dropout)
        if self.patch_px % self.piece_px:
            raise InputError(f"piece_px: {self.piece_px} does not divide patch_px={self.patch_px}; use a divisor")
        if self.channels % 8:
            raise InputError(f"channels: {self.channels} is no multiple of 8; use one")
        check_choice("count_head", self.count_head, CountHead)
        check_choice("policy", self.policy, NeighbourPolicy)
        check_choice("isolated", self.isolated, Isolated)
        check_choice("pixels", self.pixels, PixelScale)

    @property
    def width(self) -> int:
        """Channels D of a spot from the ConvMixer on."""
        return (self.patch_px // self.piece_px) ** 2 * self.channels // 8


class Hist2STOutput(NamedTuple):
    """What a forward pass gives, one row a spot, in the order given."""

    expression: Tensor
    """(N, G)"""
    counts: ZINB | NegativeBinomial | None
    coefficient: Tensor | None
    """(N, 1), the spot's weight among augmented copies."""
    embedding: Tensor
    """(N, D), what the heads read."""


class ConvMixer(nn.Module):
    """Two depthwise convolutions added to the input, then a pointwise one: (N, C, h, w) -> (N, C, h, w)."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()

        def depthwise() -> list[nn.Module]:
            conv = nn.Conv2d(channels, channels, kernel, padding="same", groups=channels)
            return [conv, nn.BatchNorm2d(channels), nn.GELU()]

        self.depthwise = nn.Sequential(*depthwise(), *depthwise())
        self.pointwise = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU(), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x) + x)


class Hist2ST(nn.Module):
    """All patches of one section and its neighbour graph -> expression of the panel."""

    needs: ClassVar[tuple[str, ...]] = ("position", "adjacency")
    whole_section: ClassVar[bool] = True

    def __init__(self, config: Hist2STConfig):
        super().__init__()
        self.config = config
        width, channels, genes = config.width, config.channels, config.n_genes
        self.patch_embedding = nn.Conv2d(3, channels, config.piece_px, config.piece_px)
        self.dropout = nn.Dropout(config.dropout)
        self.mixer = nn.Sequential(*(ConvMixer(channels, config.kernel) for _ in range(config.mixer_layers)))
        self.down = nn.Conv2d(channels, channels // 8, 1)
        self.x_embedding = nn.Embedding(config.positions, width)
        self.y_embedding = nn.Embedding(config.positions, width)
        self.layers = nn.Sequential(
            *(TransformerLayer(width, config.heads, HEAD_WIDTH, width, config.dropout) for _ in range(config.layers))
        )
        self.graph = nn.ModuleList(
            GraphLayer(width, config.policy, config.isolated) for _ in range(config.graph_layers)
        )
        self.memory = nn.LSTM(width, width, num_layers=2)
        self.count_heads = nn.ModuleDict({name: nn.Linear(width, genes) for name in _COUNT_HEADS[config.count_head]})
        self.coefficient = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)) if config.distil else None
        )
        self.head_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, genes)

    def forward(self, region: Tensor, *, position: Tensor, adjacency: Tensor) -> Hist2STOutput:
        """Expression from raw pixels of all spots of one section.

        Parameters
        ----------
        region
            uint8 (N, 3, R, R); the patch is its centre.
        position
            Array coordinates (x, y), whole numbers (N, 2).
        adjacency
            bool (N, N), row i marks the neighbours of spot i, see `neighbour_graph`.

        Raises
        ------
        InputError
            Another dtype or shape, or coordinates that the tables do not hold.
        """
        return self.forward_patches(self.patches(region), position=position, adjacency=adjacency)

    def patches(self, region: Tensor) -> Tensor:
        """Patches as the network sees them, floats (N, 3, patch_px, patch_px), of uint8 regions (N, 3, R, R)."""
        patch = centre_patch(region, self.config.patch_px).to(self.head.weight.dtype)
        patch = patch.transpose(2, 3) if self.config.transposed else patch
        return patch / 255 if self.config.pixels == "unit" else patch

    def forward_patches(self, patch: Tensor, *, position: Tensor, adjacency: Tensor) -> Hist2STOutput:
        """Expression from patches as floats, (N, 3, patch_px, patch_px) in the orientation of `patches`.

        Raises
        ------
        InputError
            As `forward`.
        """
        check_shape("patch", patch, "N", 3, self.config.patch_px, self.config.patch_px)
        check_floats("patch", patch)
        check_position(position, len(patch), self.config.positions)
        check_shape("adjacency", adjacency, len(patch), len(patch))
        if adjacency.dtype != torch.bool:
            raise InputError(f"adjacency: dtype is {adjacency.dtype}; give bool, True where a spot is a neighbour")
        x, y = position.long().unbind(1)
        spots = self.mix(patch) + self.x_embedding(x) + self.y_embedding(y)
        spots = self.layers(spots)
        # The heads' exponentials and log shares want all digits: leave autocast here.
        with torch.autocast(patch.device.type, enabled=False):
            depths = []
            spots = spots.to(self.head.weight.dtype)
            for layer in self.graph:
                spots = layer(spots, adjacency)
                depths.append(spots)
            embedding = self.memory(torch.stack(depths))[0].mean(0)
            coefficient = None if self.coefficient is None else self.coefficient(embedding)
            expression = self.head(self.head_norm(embedding))
            return Hist2STOutput(expression, self._counts(embedding), coefficient, embedding)

    def mix(self, patch: Tensor) -> Tensor:
        """Feature of each patch on its own: (N, 3, patch_px, patch_px) -> (N, D)."""
        return self.down(self.mixer(self.dropout(self.patch_embedding(patch)))).flatten(1)

    def _counts(self, embedding: Tensor) -> ZINB | NegativeBinomial | None:
        raw = {name: head(embedding) for name, head in self.count_heads.items()}
        if self.config.count_head == "zinb":
            # Published: exp, then clamped. This way round the values are the same, and no gradient is 0 x inf.
            mean = raw["mean"].clamp(math.log(1e-5), math.log(1e6)).exp()
            return ZINB(mean, F.softplus(raw["disp"]).clamp(1e-4, 1e4), raw["pi"].sigmoid())
        return NegativeBinomial(raw["hr"], raw["hp"]) if self.config.count_head == "nb" else None

    @torch.no_grad()
    def start_at(self, profile: Tensor) -> None:
        """Set the bias of the head to a mean profile (G,); the authors start at torch's default."""
        self.head.bias.copy_(profile)

    @classmethod
    def from_reference(
        cls,
        state_dict: Mapping[str, Any],
        *,
        dropout: float = 0.2,
        policy: NeighbourPolicy = "mean",
        isolated: Isolated = "self",
        pixels: PixelScale = "raw",
        transposed: bool = True,
    ) -> Self:
        """Network with weights that carry the published names.

        Parameters
        ----------
        state_dict
            Published name -> tensor or numpy array (162 at the defaults), or a checkpoint that holds them. All sizes,
            the heads and the dtype are taken from it.
        dropout, policy, isolated, pixels, transposed
            What the weights do not say, see `Hist2STConfig`.

        Raises
        ------
        InputError
            Names that are missing, unexpected or of another shape.
        """
        weights = unwrapped(state_dict)
        trunk = "vit.transformer"
        told = ["gene_head.1.weight", "patch_embedding.weight", "x_embed.weight"]
        told += [f"{trunk}.layer1.0.dw.0.weight", f"{trunk}.layer2.0.attn.fn.to_qkv.weight"]
        absent = [name for name in told if name not in weights]
        if absent:
            raise InputError(f"published weights: missing: {', '.join(absent)}; give the checkpoint's own state dict")
        head, embedding, table, depthwise, qkv = (as_tensor(weights[name]) for name in told)
        channels, _, _, piece = embedding.shape
        config = Hist2STConfig(
            n_genes=head.shape[0],
            patch_px=piece * math.isqrt(head.shape[1] // max(channels // 8, 1)),
            piece_px=piece,
            channels=channels,
            kernel=depthwise.shape[-1],
            mixer_layers=sum(name.endswith(".dw.0.weight") for name in weights),
            layers=sum(name.endswith(".to_qkv.weight") for name in weights),
            graph_layers=sum(name.startswith(f"{trunk}.layer3.") for name in weights),
            heads=qkv.shape[0] // (3 * HEAD_WIDTH),
            dropout=dropout,
            positions=table.shape[0],
            count_head="zinb" if "mean.0.weight" in weights else "nb" if "hr.weight" in weights else "none",
            distil="coef.0.weight" in weights,
            policy=policy,
            isolated=isolated,
            pixels=pixels,
            transposed=transposed,
        )
        with torch.device("meta"):  # draws nothing: loading leaves the caller's random state alone
            model = cls(config)
        fill(model, weights, reference_names(model), head.dtype)
        return model


def reference_names(model: Hist2ST) -> dict[str, str]:
    """Own name -> published name of every parameter and buffer."""
    return published_names(model, _RULES)
