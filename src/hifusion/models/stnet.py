"""ST-Net: expression of a spot from one tile by DenseNet-121 (He et al., Nature Biomedical Engineering 4, 2020).

Written from a description of the paper and of the released code (bryanhe/ST-Net, 43022c1). `RECIPE` says how the
authors trained. Differences from the release, and why:

- The classifier starts at weight 0, as there; its bias is set by `start_at`, so the start is the constant predictor.
- Pixel statistics are computed over all training tiles (`inputs.pixel_statistics`) and kept with the weights; the
  release estimates them anew from a dozen random batches. Until they are set they are ImageNet's.
- The loss can be the mean over the batch, which does not tie the learning rate to the batch size: see `stnet_loss`.
- Order and names of spots are kept; the release shuffles its test spots.
- Nothing reads a label at test time. The panel is to be chosen on training patients; the release used all of them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from hifusion.errors import InputError
from hifusion.models.inputs import PatchConfig, centre_patch, check_floats, check_shape, check_whole_numbers, z_scored
from hifusion.models.published import AuthorsRecipe, published_names, unwrapped
from hifusion.models.resnet import IMAGENET_MEAN, IMAGENET_STD, as_tensor, load_named

RECIPE = AuthorsRecipe(
    target="ln((1 + y) / (n + sum of y over all n genes))",
    panel="250 genes of largest mean raw count over all spots of all patients, test patients included",
    optimiser="SGD",
    lr=1e-6,  # for the loss summed over 32 tiles; 3.2e-5 for their mean
    momentum=0.9,
    batch="32 tiles",
    epochs=50,  # at most: the number is chosen by an inner four-fold cross-validation over training patients
    start="ImageNet weights; classifier weight 0, bias the mean training target",
    augmentation="flips left-right and top-bottom and a quarter turn, each with probability 0.5",
    protocol="leave one patient out, 23 patients; predictions averaged over eight symmetries",
)


_RULES = {
    r"(features\.denseblock\d+\.denselayer\d+)\.layers\.": r"\1.",
    r"class_layers\.out\.": "classifier.",
}
"""MONAI's names -> torchvision's, which are the published ones."""

_SMALLEST_PX = 29  # below it the third pooling leaves nothing


@dataclass(frozen=True)
class STNetConfig(PatchConfig):
    """Shape of an ST-Net.

    Parameters
    ----------
    n_genes
        Genes in the panel, G.
    patch_px
        Side of the tile, the centre of the region patch; 224 in the paper, which also tried 128, 299 and 512.

    Raises
    ------
    InputError
        A value is outside its range.
    """

    n_genes: int
    patch_px: int = 224

    def __post_init__(self) -> None:
        check_whole_numbers(self, "n_genes", "patch_px")
        if self.patch_px < _SMALLEST_PX:
            raise InputError(f"patch_px: {self.patch_px} is too small for DenseNet; use at least {_SMALLEST_PX}")

    @property
    def memory_format(self) -> torch.memory_format:
        """Channels last, the fast layout: every map has a multiple of 32 channels."""
        return torch.channels_last


class STNetOutput(NamedTuple):
    """What a forward pass gives."""

    expression: Tensor
    """(B, G)"""
    embedding: Tensor
    """(B, 1024), the pooled features that the classifier reads."""


class STNet(nn.Module):
    """One tile -> expression of the panel."""

    needs: ClassVar[tuple[str, ...]] = ()
    whole_section: ClassVar[bool] = False

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: STNetConfig):
        super().__init__()
        self.config = config
        self.register_buffer("pixel_mean", torch.tensor(IMAGENET_MEAN))
        self.register_buffer("pixel_std", torch.tensor(IMAGENET_STD))
        self.network = _densenet121(config.n_genes)
        nn.init.zeros_(self.classifier.weight)

    @property
    def classifier(self) -> nn.Linear:
        """The last layer, 1024 -> G."""
        return self.network.class_layers.out

    def forward(self, region: Tensor) -> STNetOutput:
        """Expression from raw pixels: uint8 (B, 3, R, R); the tile is its centre.

        Raises
        ------
        InputError
            Another dtype or shape.
        """
        tile = z_scored(centre_patch(region, self.config.patch_px), self.pixel_mean, self.pixel_std)
        return self.forward_tile(tile.to(memory_format=self.config.memory_format))

    def forward_tile(self, tile: Tensor) -> STNetOutput:
        """Expression from z-scored floats (B, 3, patch_px, patch_px).

        Raises
        ------
        InputError
            Integer pixels or another shape.
        """
        check_shape("tile", tile, "B", 3, self.config.patch_px, self.config.patch_px)
        check_floats("tile", tile)
        features = self.network.features(tile)
        # bfloat16 would round log shares near -8 to steps of 0.03: leave autocast here.
        with torch.autocast(tile.device.type, enabled=False):
            embedding = features.to(self.classifier.weight.dtype).relu().mean((-2, -1))
            return STNetOutput(self.classifier(embedding), embedding)

    @torch.no_grad()
    def start_at(self, profile: Tensor) -> None:
        """Set weight 0 and bias a mean profile (G,): every prediction is then that profile, as the authors start."""
        self.classifier.weight.zero_()
        self.classifier.bias.copy_(profile)

    @torch.no_grad()
    def set_pixel_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation (3,) of pixel / 255, those of the training tiles."""
        self.pixel_mean.copy_(mean)
        self.pixel_std.copy_(std)

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Any], *, patch_px: int = 224) -> Self:
        """Network with weights that carry the published names, which are torchvision's.

        Parameters
        ----------
        state_dict
            Published name -> tensor or numpy array, 727 of them, or a checkpoint that holds them. Genes and dtype are
            taken from it; pixel statistics are not in it, see `set_pixel_statistics`.
        patch_px
            See `STNetConfig`.

        Raises
        ------
        InputError
            Names that are missing, unexpected or of another shape.
        """
        weights = unwrapped(state_dict)
        if "classifier.weight" not in weights:
            raise InputError("published weights: missing: classifier.weight; give the checkpoint's own state dict")
        classifier = as_tensor(weights["classifier.weight"])
        with torch.random.fork_rng(devices=[]):  # loading leaves the caller's random state alone
            model = cls(STNetConfig(n_genes=classifier.shape[0], patch_px=patch_px)).to(classifier.dtype)
        load_named(model.network, weights, reference_names(model), "published weights")
        return model

    def load_imagenet(self, state_dict: Mapping[str, Any]) -> None:
        """Take torchvision's DenseNet-121 weights for all but the classifier, in place.

        Parameters
        ----------
        state_dict
            Name -> tensor or numpy array; `classifier.*` is ignored, batch counters may be absent, and the names of
            torchvision's ImageNet file (`norm.1` for `norm1`) are known.

        Raises
        ------
        InputError
            Any other name is missing, unexpected or of another shape; the network is then unchanged.
        """
        names = reference_names(self)
        kept = {names[own]: value for own, value in self.network.state_dict().items() if _is_kept(names[own])}
        given = {
            re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): value
            for name, value in unwrapped(state_dict).items()
            if not name.startswith("classifier.")
        }
        load_named(self.network, kept | given, names, "ImageNet weights")


def stnet_loss(output: STNetOutput, target: Tensor, reduction: Literal["sum", "mean"] = "sum") -> dict[str, Tensor]:
    """Squared error, mean over genes, as `total`.

    Parameters
    ----------
    output
        Of `STNet`.
    target
        Measured expression, (B, G).
    reduction
        "sum" over the batch, as the released code; "mean": then the authors' learning rate is to be multiplied by 32.

    Raises
    ------
    InputError
        `target` has another shape than the prediction.
    """
    check_shape("target", target, *output.expression.shape)
    per_spot = (output.expression - target).square().mean(1)
    return {"total": per_spot.sum() if reduction == "sum" else per_spot.mean()}


def reference_names(model: STNet) -> dict[str, str]:
    """MONAI name -> published (torchvision) name of every parameter and buffer of `model.network`."""
    return published_names(model.network, _RULES)


def _is_kept(published: str) -> bool:
    return published.startswith("classifier.") or published.endswith("num_batches_tracked")


def _densenet121(n_genes: int) -> Any:
    try:
        from monai.networks.nets import DenseNet121  # takes seconds: only where an ST-Net is built
    except ImportError as error:
        raise InputError("stnet: MONAI is not installed; run `pip install 'hifusion[rivals]'`") from error
    return DenseNet121(spatial_dims=2, in_channels=3, out_channels=n_genes)
