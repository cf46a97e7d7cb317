"""BLEEP: patches and expression profiles in one space; a prediction is looked up among training spots (NeurIPS 2023).

Written from a description of the paper (Xie et al.) and of the released code (bowang-lab/BLEEP, 2395967). `RECIPE` says
how the authors trained. The network does not compute expression: it finds the training spots whose profiles lie nearest
to a patch and gives theirs. These spots are its bank, two tensors of its state (`bank_expression`, `bank_embedding`),
saved and loaded with the weights; `set_bank` fills it, and fills it anew after training has moved the weights. A
prediction is a mean of training profiles: it varies less than the truth, and never leaves their range.

Differences from the release, and why:

- The bank holds what it is given, which is to be training spots; the release adds the validation spots.
- Genes are chosen and expression is scaled on training sections, without Harmony, which saw the test section's labels.
- Images are read as RGB and stay (channels, rows, columns); the release has them blue first and turned.
- Weights of `weighted_average` are a stable softmax with a temperature; the release's over- or underflow.
- A bank of fewer spots than `neighbours` is used whole. Ties go to the spot that was stored first.
- Nothing reads a label at test time: `measured` is for training, where profiles are one side of the loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion.errors import InputError
from hifusion.models.inputs import (
    centre_patch,
    check_choice,
    check_dropout,
    check_floats,
    check_shape,
    check_whole_numbers,
)
from hifusion.models.published import AuthorsRecipe, published_names, unwrapped
from hifusion.models.resnet import (
    RESNET50,
    Bottleneck,
    ResNet,
    TrunkConfig,
    as_tensor,
    imagenet_scaled,
    load_named,
)

Retrieval = Literal["simple", "average", "weighted_average"]

RECIPE = AuthorsRecipe(
    target="ln(1 + y scaled to the median total count), then corrected by Harmony with the section as batch",
    panel="union over sections, the test section included, of the 1000 most variable genes of each: 3467",
    optimiser="AdamW",
    lr=1e-3,
    weight_decay=1e-3,
    batch="256 spots, an incomplete batch dropped",
    epochs=4,  # the default of the command line; the epoch of least validation loss is kept
    start="ImageNet weights for the image encoder",
    augmentation="flips, each with probability 0.5, and a turn by a random multiple of 90 degrees",
    protocol="one section of four of one donor held out; of the others' spots a random 20 % for validation",
)

_BANK = ("bank_expression", "bank_embedding")

_RULES = {r"image_encoder\.": "image_encoder.model."}
"""Own names -> published ones."""


@dataclass(frozen=True)
class BleepConfig(TrunkConfig):
    """Shape of a BLEEP network, and how it looks up.

    Parameters
    ----------
    n_genes
        Genes in the panel, G.
    patch_px
        Side of the patch, the centre of the region patch.
    width
        Channels of the encoder's first stage; 64 in the paper.
    embedding
        Width E of the common space.
    dropout
        In the projection heads, in [0, 1).
    retrieval
        "average": mean of the `neighbours` nearest profiles, the paper's main result; "simple": the nearest one;
        "weighted_average": weighed by exp(-d / `retrieval_temperature`), d the squared distance in the common space.
    neighbours
        Profiles that are averaged.
    retrieval_temperature
        1 in the paper, where distances of tens to hundreds leave one neighbour nearly all of the weight.

    Raises
    ------
    InputError
        A value is outside its range.
    """

    n_genes: int
    patch_px: int = 224
    width: int = 64
    embedding: int = 256
    dropout: float = 0.1
    retrieval: Retrieval = "average"
    neighbours: int = 50
    retrieval_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_whole_numbers(self, "n_genes", "patch_px", "width", "embedding", "neighbours")
        check_dropout(self.dropout)
        check_choice("retrieval", self.retrieval, Retrieval)
        if not self.retrieval_temperature > 0:
            raise InputError(f"retrieval_temperature: {self.retrieval_temperature} is not above 0; use one such as 1.0")


class BleepOutput(NamedTuple):
    """What a forward pass gives; `measured` decides which of the two optional ones."""

    expression: Tensor | None
    """(B, G), looked up in the bank; None in training, where `measured` is given."""
    embedding: Tensor
    """(B, E), of the patches."""
    measured_embedding: Tensor | None
    """(B, E), of the measured profiles; None in prediction."""


class Bleep(nn.Module):
    """Patch -> place in a space shared with expression profiles -> profiles of the training spots around it."""

    needs: ClassVar[tuple[str, ...]] = ()
    training_needs: ClassVar[tuple[str, ...]] = ("measured",)
    """Keywords of `forward` in training, and only there: `measured` is the target itself."""
    whole_section: ClassVar[bool] = False

    bank_expression: Tensor
    bank_embedding: Tensor

    def __init__(self, config: BleepConfig):
        super().__init__()
        self.config = config
        self.image_encoder = ResNet(RESNET50, config.width, Bottleneck)
        self.image_projection = Projection(32 * config.width, config.embedding, config.dropout)
        self.spot_projection = Projection(config.n_genes, config.embedding, config.dropout)
        self.register_buffer("bank_expression", torch.empty(0, config.n_genes))
        self.register_buffer("bank_embedding", torch.empty(0, config.embedding))
        self.register_load_state_dict_pre_hook(_make_room)

    def forward(self, region: Tensor, *, measured: Tensor | None = None) -> BleepOutput:
        """Embedding, and expression looked up in the bank, from raw pixels: uint8 (B, 3, R, R).

        Parameters
        ----------
        measured
            Expression of the same spots (B, G): both are then embedded for the loss, and nothing is looked up.

        Raises
        ------
        InputError
            Another dtype or shape, or nothing measured and no bank to look it up in.
        """
        patch = imagenet_scaled(centre_patch(region, self.config.patch_px), self.image_projection.projection.weight)
        return self.forward_images(patch.to(memory_format=self.config.memory_format), measured=measured)

    def forward_images(self, patch: Tensor, *, measured: Tensor | None = None) -> BleepOutput:
        """As `forward`, from standardised floats (B, 3, patch_px, patch_px)."""
        check_shape("patch", patch, "B", 3, self.config.patch_px, self.config.patch_px)
        check_floats("patch", patch)
        if measured is not None:
            check_shape("measured", measured, len(patch), self.config.n_genes)
        elif not len(self.bank_expression):
            raise InputError("bank: it is empty; fill it with the training spots' expression by set_bank")
        features = self.image_encoder(patch)
        # Similarities decide among near neighbours, which bfloat16 does not tell apart: leave autocast here.
        with torch.autocast(patch.device.type, enabled=False):
            dtype = self.image_projection.projection.weight.dtype
            embedding = self.image_projection(features.to(dtype).mean((-2, -1)))
            if measured is not None:
                return BleepOutput(None, embedding, self.spot_projection(measured.to(dtype)))
            c = self.config
            expression, _ = retrieve(
                embedding,
                self.bank_embedding,
                self.bank_expression,
                c.retrieval,
                neighbours=c.neighbours,
                temperature=c.retrieval_temperature,
            )
            return BleepOutput(expression, embedding, None)

    @torch.no_grad()
    def set_bank(self, expression: Tensor, batch: int = 4096) -> None:
        """Make these spots, (M, G), the bank. Call it after training, and before each validation.

        Raises
        ------
        InputError
            Another shape, or no spot.
        """
        check_shape("bank", expression, "M", self.config.n_genes)
        if not len(expression):
            raise InputError("bank: no spot was given; give the expression of the training spots")
        weight = self.spot_projection.projection.weight
        profiles = expression.to(weight)
        was_training = self.training
        self.spot_projection.eval()  # without dropout
        with torch.autocast(weight.device.type, enabled=False):
            self.bank_embedding = torch.cat([self.spot_projection(piece) for piece in profiles.split(batch)])
        self.spot_projection.train(was_training)
        self.bank_expression = profiles.clone()

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Any], config: BleepConfig) -> Self:
        """Network with weights that carry the published names, and an empty bank.

        Parameters
        ----------
        state_dict
            Published name -> tensor or numpy array, 330 of them, or a checkpoint that holds them; older ones say `well`
            for `spot`. The dtype is taken from it.

        Raises
        ------
        InputError
            Names that are missing, unexpected or of another shape.
        """
        weights = {
            "spot" + name.removeprefix("well") if name.startswith("well_") else name: value
            for name, value in unwrapped(state_dict).items()
        }
        first = "image_projection.projection.weight"
        if first not in weights:
            raise InputError(f"published weights: missing: {first}; give the checkpoint's own state dict")
        with torch.device("meta"):  # draws nothing: loading leaves the caller's random state alone
            model = cls(config)
        model.to_empty(device="cpu").to(as_tensor(weights[first]).dtype)
        bank = {name: model.state_dict()[name] for name in _BANK}
        names = reference_names(model)
        load_named(model, bank | weights, names | {name: name for name in _BANK}, "published weights")
        return model


class Projection(nn.Module):
    """(B, in) -> (B, E): a linear map, and what one more makes of it, normed together."""

    def __init__(self, in_features: int, embedding: int, dropout: float):
        super().__init__()
        self.projection = nn.Linear(in_features, embedding)
        self.fc = nn.Linear(embedding, embedding)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(embedding)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.projection(features)
        return self.layer_norm(projected + self.dropout(self.fc(F.gelu(projected))))


def bleep_loss(output: BleepOutput, target: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """Named terms of the contrastive loss, each a scalar, with `total` = `spots` + `images`.

    Every spot of the batch is to find its own image and every image its spot, except that what is alike within both
    modalities may be taken for each other. The loss depends on the batch size, and needs more than one spot.

    Parameters
    ----------
    output
        Of `Bleep`, with `measured`.
    target
        The measured expression, (B, G), which was given as `measured`; only its length is looked at.
    temperature
        1 in the release, where the softmaxes are nearly one-hot; the gradient flows through the soft targets too.

    Returns
    -------
    dict
        `spots`, `images`: half the mean cross entropy over spots and over images.

    Raises
    ------
    InputError
        An output without measured profiles, or of another batch than `target`.
    """
    images, spots = output.embedding, output.measured_embedding
    if spots is None or len(spots) != len(target):
        found = "none" if spots is None else len(spots)
        raise InputError(f"measured: {found} for a target of {len(target)}; give forward the target as `measured`")
    logits = spots @ images.T / temperature
    targets = ((images @ images.T + spots @ spots.T) / (2 * temperature)).softmax(1)
    terms = {
        "spots": -(targets * logits.log_softmax(1)).sum(1).mean() / 2,
        # Transposed, targets are not normalised again: as published.
        "images": -(targets.T * logits.T.log_softmax(1)).sum(1).mean() / 2,
    }
    return {"total": terms["spots"] + terms["images"], **terms}


def retrieve(
    query: Tensor,
    keys: Tensor,
    expression: Tensor,
    method: Retrieval = "average",
    *,
    neighbours: int = 50,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Expression looked up for every query, (B, G), and int64 (B, k), the rows it is made of, the most similar first.

    Parameters
    ----------
    query
        Embeddings of patches, (B, E).
    keys, expression
        Embeddings and expression of the spots to look up, (M, E) and (M, G).
    method, neighbours, temperature
        See `BleepConfig`. k is 1 for "simple", else the smaller of `neighbours` and M. Similarity is the cosine; ties
        go to the lower row.
    """
    similarity = F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T
    k = 1 if method == "simple" else min(neighbours, len(keys))
    rows = similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]
    found = expression[rows]
    if method != "weighted_average":
        return found.mean(1), rows
    distance = (keys[rows] - query[:, None]).square().sum(-1)
    weights = (-distance / temperature).softmax(1)
    return (weights[:, None] @ found)[:, 0], rows


def reference_names(model: Bleep) -> dict[str, str]:
    """Own name -> published name of every parameter and buffer but the bank."""
    return {own: name for own, name in published_names(model, _RULES).items() if own not in _BANK}


def _make_room(model: Bleep, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Give the bank as many rows as the state that is about to be loaded."""
    for name in _BANK:
        given, own = state_dict.get(prefix + name), getattr(model, name)
        if given is not None and given.shape[1:] == own.shape[1:]:
            setattr(model, name, own.new_empty(given.shape))
