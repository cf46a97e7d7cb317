"""What Hist2ST trains with: its loss, and the changed copies of a section that it distils from."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hifusion.errors import InputError
from hifusion.models.counts import ZINB, nb_nll, zinb_nll
from hifusion.models.hist2st import Hist2ST, Hist2STOutput
from hifusion.models.inputs import check_shape


def hist2st_loss(
    output: Hist2STOutput,
    target: Tensor,
    *,
    count: Tensor | None = None,
    size_factor: Tensor | None = None,
    views: Sequence[Hist2STOutput] = (),
    count_weight: float = 0.25,
    distillation_weight: float = 0.5,
) -> dict[str, Tensor]:
    """Named terms of the training loss, each a scalar and without its weight; `total` is their weighted sum.

    Parameters
    ----------
    output
        Of `Hist2ST`.
    target
        Measured expression, (N, G).
    count, size_factor
        Raw counts of the panel (N, G), and (N,) of `counts.size_factors`; needed where the network has a count head and
        `count_weight` is above 0.
    views
        Outputs of changed copies of the section, of `view_outputs`; without them there is no distillation.

    Returns
    -------
    dict
        `mse`. `zinb` or `nb`: negative log-likelihood of the counts. `distillation`: mean squared distance to the
        predictions of the copies, mixed spot by spot with softmax shares, with gradient into both sides.

    Raises
    ------
    InputError
        Shapes that do not fit, or counts that are missing.
    """
    check_shape("target", target, *output.expression.shape)
    terms = {"mse": F.mse_loss(output.expression, target)}
    total = terms["mse"]
    if output.counts is not None and count_weight > 0:
        if count is None or size_factor is None:
            raise InputError("count, size_factor: not given; give both, or count_weight=0 to learn no counts")
        if isinstance(output.counts, ZINB):
            name, likelihood = "zinb", zinb_nll(output.counts, count, size_factor)
        else:
            name, likelihood = "nb", nb_nll(output.counts, count)
        terms[name] = likelihood
        total = total + count_weight * likelihood
    if views:
        coefficients = [view.coefficient for view in views if view.coefficient is not None]
        if len(coefficients) < len(views):
            raise InputError("views: the network has no weights for them; build it with distil=True")
        shares = torch.stack(coefficients).softmax(0)
        mixture = (shares * torch.stack([view.expression for view in views])).sum(0)
        terms["distillation"] = F.mse_loss(mixture, output.expression)
        total = total + distillation_weight * terms["distillation"]
    return {"total": total, **terms}


def view_outputs(
    model: Hist2ST,
    region: Tensor,
    *,
    position: Tensor,
    adjacency: Tensor,
    generator: torch.Generator,
    n_views: int = 5,
) -> list[Hist2STOutput]:
    """Outputs of randomly changed copies of a section (see `random_view`), for the distillation term of the loss.

    Parameters
    ----------
    model, region, position, adjacency
        As for the forward pass of the section itself. In training mode every pass moves the batch norms' statistics.
    generator
        On the CPU; gives each copy its change.
    n_views
        Copies; 5 in the released commands.
    """
    patch = model.patches(region)
    return [
        model.forward_patches(random_view(patch, generator), position=position, adjacency=adjacency)
        for _ in range(n_views)
    ]


def random_view(patch: Tensor, generator: torch.Generator) -> Tensor:
    """Patches of a section, all changed alike by one random draw: (N, 3, p, p) floats -> the same.

    Grey with probability 0.1; turned by an angle uniform in -90 to 90 degrees, nearest pixel, zero outside; mirrored
    along the last axis with probability 0.2.
    """
    grey, turn, mirror = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    if grey < 0.1:
        luminance = torch.tensor([0.2989, 0.587, 0.114], dtype=patch.dtype, device=patch.device)
        patch = torch.einsum("nchw,c->nhw", patch, luminance)[:, None].expand_as(patch)
    angle = math.pi * (turn - 0.5)
    rotation = patch.new_tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    grid = F.affine_grid(rotation.expand(len(patch), 2, 3), list(patch.shape), align_corners=False)
    patch = F.grid_sample(patch, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return patch.flip(3) if mirror < 0.2 else patch
