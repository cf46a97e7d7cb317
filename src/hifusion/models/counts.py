"""Distributions of raw counts, their negative log-likelihoods, and size factors (Hist2ST's, after scVI and DCA)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hifusion.errors import InputError
from hifusion.models.inputs import check_shape

_EPS = 1e-10
_ZERO = 1e-8  # counts up to it are zeros


class ZINB(NamedTuple):
    """Zero-inflated negative binomial of raw counts, each (N, G)."""

    mean: Tensor
    """For a spot of size factor 1; times the size factor it predicts the count."""
    dispersion: Tensor
    dropout: Tensor
    """Probability of an extra zero."""


class NegativeBinomial(NamedTuple):
    """Negative binomial of raw counts, each (N, G)."""

    log_size: Tensor
    logit: Tensor


def zinb_nll(zinb: ZINB, count: Tensor, size_factor: Tensor) -> Tensor:
    """Mean over spots and genes of the negative log-likelihood.

    Parameters
    ----------
    count
        Raw counts (N, G).
    size_factor
        (N,), see `size_factors`.

    Raises
    ------
    InputError
        Shapes that do not fit.
    """
    check_shape("count", count, *zinb.mean.shape)
    check_shape("size_factor", size_factor, len(count))
    theta, mean = zinb.dispersion, zinb.mean * size_factor[:, None]
    gammas = torch.lgamma(theta + _EPS) + torch.lgamma(count + 1) - torch.lgamma(count + theta + _EPS)
    powers = (theta + count) * (mean / (theta + _EPS)).log1p() + count * ((theta + _EPS).log() - (mean + _EPS).log())
    positive = gammas + powers - (1 - zinb.dropout + _EPS).log()
    chance_of_zero = (theta / (theta + mean + _EPS)).pow(theta)
    zero = -(zinb.dropout + (1 - zinb.dropout) * chance_of_zero + _EPS).log()
    return torch.where(count > _ZERO, positive, zero).mean()


def nb_nll(nb: NegativeBinomial, count: Tensor) -> Tensor:
    """Mean over spots of the SUM over genes of the negative log-likelihood, less the term in the counts alone.

    As the released option has it: about G times as large as `zinb_nll`, and it may be negative.

    Raises
    ------
    InputError
        Shapes that do not fit.
    """
    check_shape("count", count, *nb.log_size.shape)
    size = nb.log_size.exp()
    per_gene = (
        torch.lgamma(size + count) - torch.lgamma(size) + nb.logit * count - (count + size) * F.softplus(nb.logit)
    )
    return -per_gene.sum(1).mean()


def size_factors(count: Tensor) -> Tensor:
    """Total of each spot over the median total of its section, (N, G) -> (N,).

    Raises
    ------
    InputError
        Half of the spots or more have no count.
    """
    total = count.sum(1)
    median = total.quantile(0.5)
    if not median > 0:
        raise InputError("count: half of the spots or more have no count in the panel; leave empty spots out")
    return total / median
