"""The measured spots most similar to a tile, of other patients: what EGN is shown beside it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hifusion.errors import InputError
from hifusion.models.inputs import check_shape


class Exemplars(NamedTuple):
    """The K nearest reference spots of each of Q queries, from the K-th nearest to the nearest."""

    rows: Tensor
    """(Q, K) rows of the reference."""
    distance: Tensor
    """(Q, K). Compare its distribution between training and test spots: they search among different patients."""


def nearest_exemplars(
    feature: Tensor,
    patient: Sequence[str],
    reference_feature: Tensor,
    reference_patient: Sequence[str],
    k: int = 6,
    *,
    chunk: int = 256,
) -> Exemplars:
    """The K nearest reference spots of other patients, by Euclidean distance between features.

    The released search keeps the 100 nearest of each slide and the 128 nearest of these, which for K up to 100 comes to
    the same. It excludes the query's own slide only.

    Parameters
    ----------
    feature, patient
        Features (Q, M) of the queries, and whose they are.
    reference_feature, reference_patient
        Features (R, M) of the spots to choose from, training spots of the fold, and whose they are.
    k
        Exemplars a query; 6 in the released command.
    chunk
        Queries at a time. Distances are computed directly, not from products, so the result does not depend on it.

    Raises
    ------
    InputError
        Shapes that do not fit, or fewer than `k` spots of other patients for some query.
    """
    check_shape("reference_feature", reference_feature, "R", "M")
    check_shape("feature", feature, "Q", reference_feature.shape[1])
    if not len(feature):
        raise InputError("feature: it holds no query; give at least one")
    given = (("patient", patient, feature), ("reference_patient", reference_patient, reference_feature))
    for what, names, spots in given:
        if len(names) != len(spots):
            raise InputError(f"{what}: {len(names)} names for {len(spots)} features; give one for each")
    codes = {name: code for code, name in enumerate(dict.fromkeys([*reference_patient, *patient]))}
    own, others = (
        torch.tensor([codes[name] for name in names], device=feature.device) for names in (patient, reference_patient)
    )
    parts = []
    for start in range(0, len(feature), chunk):
        rows = slice(start, start + chunk)
        distance = torch.cdist(
            feature[rows], reference_feature, compute_mode="donot_use_mm_for_euclid_dist"
        ).masked_fill(own[rows, None] == others, torch.inf)
        parts.append(nearest(distance, k))
    return Exemplars(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def nearest(distance: Tensor, k: int) -> Exemplars:
    """The K smallest distances of each row, (Q, R) -> (Q, K), the smallest last.

    Of equal ones the lower column is nearer; an infinite one is never chosen.

    Raises
    ------
    InputError
        A row has fewer than `k` finite distances.
    """
    fewest = int(distance.isfinite().sum(1).min())
    if not 1 <= k <= fewest:
        raise InputError(
            f"k: {k} exemplars are wanted, and a query has {fewest} spots of other patients; give more, or a smaller k"
        )
    ordered, rows = distance.sort(stable=True, dim=1)
    return Exemplars(rows[:, :k].flip(1), ordered[:, :k].flip(1))
