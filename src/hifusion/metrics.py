"""Scores of a predicted section, gene by gene and spot by spot, and their averages over sections, patients and folds.

A correlation with something that does not vary is undefined: NaN here, 0 in averages, and counted.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import KDTree
from scipy.stats import rankdata

from hifusion.errors import InputError

# A column is constant when its standard deviation is below this share of its largest magnitude: a flat prediction that
# went through float32 varies by 1e-7 to 1e-6, and what is left of it after centring would correlate with anything.
CONSTANT_RTOL = 1e-5
# Lattice neighbours are one pitch away; the next ring of a square lattice is at 1.41, of a hexagonal one at 1.73.
NEIGHBOUR_PITCHES = 1.25
# Wang et al. 2004: Gaussian window of 1.5 (here spots), 11 wide, and the two constants.
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5.0
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
_GENES_AT_ONCE = 1024

GENE_COLUMNS = (
    "gene", "pcc_per_gene", "spearman_per_gene", "mse", "mae", "r2", "nrmse", "mse_offset", "mse_pattern",
    "moran_truth", "moran_prediction", "variance_ratio", "ssim", "ceiling",
)  # fmt: skip
SECTION_COLUMNS = (
    "n_spots", "mse", "mae", "pcc_per_spot", "mse_offset", "mse_pattern", "n_undefined_genes", "n_undefined_spots",
)  # fmt: skip


class SectionScores(NamedTuple):
    """Scores of one section: ``genes`` has a row per gene (:data:`GENE_COLUMNS`), ``section`` the keys of
    :data:`SECTION_COLUMNS`."""

    genes: pd.DataFrame
    section: dict[str, float]


def score_section(
    prediction: np.ndarray,
    target: np.ndarray,
    train_mean: np.ndarray,
    centres_px: np.ndarray,
    pitch_px: float,
    genes: Sequence[str],
    gene_ceiling: np.ndarray | None = None,
) -> SectionScores:
    """Every score of one predicted section.

    Parameters
    ----------
    prediction, target
        Predicted and measured expression, ``(N, G)``.
    train_mean
        Mean profile of the training spots, ``(G,)``: what ``r2`` and ``nrmse`` compare with.
    centres_px, pitch_px
        Spot centres ``(N, 2)`` and the distance between neighbours.
    gene_ceiling
        ``(G,)`` from :func:`ceiling`; NaN where None.

    Raises
    ------
    InputError
        Shapes that do not match, or a prediction that is not finite.
    """
    predicted, truth = np.asarray(prediction, dtype=np.float64), np.asarray(target, dtype=np.float64)
    null = np.asarray(train_mean, dtype=np.float64)
    if truth.ndim != 2 or not len(truth) or predicted.shape != truth.shape or truth.shape[1:] != null.shape:
        raise InputError(
            f"prediction {predicted.shape}, target {truth.shape} and train_mean {null.shape} do not fit together; "
            "give (N, G), (N, G) and (G,) with at least one spot"
        )
    if not np.isfinite(predicted).all():
        bad = np.size(predicted) - np.isfinite(predicted).sum()
        raise InputError(
            f"the prediction holds {bad} values that are not finite; the model has diverged, train it again"
        )
    error = predicted - truth
    mse, mae = np.square(error).mean(axis=0), np.abs(error).mean(axis=0)
    offset = np.square(error.mean(axis=0))
    null_mse = np.square(truth - null).mean(axis=0)
    share = _ratio(mse, null_mse)
    weights = lattice_weights(centres_px, pitch_px)
    moran_truth, moran_prediction = morans_i(truth, weights), morans_i(predicted, weights)
    table = pd.DataFrame(
        {
            "gene": list(genes),
            "pcc_per_gene": pcc_per_gene(predicted, truth),
            "spearman_per_gene": spearman_per_gene(predicted, truth),
            "mse": mse,
            "mae": mae,
            "r2": 1.0 - share,
            "nrmse": np.sqrt(share),
            "mse_offset": offset,
            "mse_pattern": np.maximum(mse - offset, 0.0),
            "moran_truth": moran_truth,
            "moran_prediction": moran_prediction,
            "variance_ratio": _ratio(predicted.var(axis=0), truth.var(axis=0), ~constant(truth)),
            "ssim": ssim(predicted, truth, centres_px, pitch_px),
            "ceiling": np.full(len(mse), np.nan) if gene_ceiling is None else gene_ceiling,
        }
    )
    per_spot = pcc_per_spot(predicted, truth)
    section = {
        "n_spots": len(truth),
        "mse": float(mse.mean()),
        "mae": float(mae.mean()),
        "pcc_per_spot": float(np.nan_to_num(per_spot).mean()),
        "mse_offset": float(offset.mean()),
        "mse_pattern": float(table["mse_pattern"].mean()),
        "n_undefined_genes": int(table["pcc_per_gene"].isna().sum()),
        "n_undefined_spots": int(np.isnan(per_spot).sum()),
    }
    return SectionScores(table, section)


def constant(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Whether values do not vary along ``axis``, but for rounding (:data:`CONSTANT_RTOL`)."""
    return np.std(values, axis=axis, dtype=np.float64) <= CONSTANT_RTOL * np.abs(values).max(axis=axis)


def pcc_per_gene(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pearson correlation across spots for each gene, ``(N, G)`` twice -> ``(G,)``; NaN where either is constant."""
    return _correlation(prediction, target, 0, _both_vary(prediction, target, 0))


def spearman_per_gene(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rank correlation across spots for each gene, ties sharing their mean rank; NaN as in :func:`pcc_per_gene`."""
    # Ranks blow rounding noise up to full size, so what is constant is judged on the values.
    return _correlation(rankdata(prediction, axis=0), rankdata(target, axis=0), 0, _both_vary(prediction, target, 0))


def pcc_per_spot(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pearson correlation across genes for each spot, ``(N, G)`` twice -> ``(N,)``; NaN where either is constant."""
    return _correlation(prediction, target, 1, _both_vary(prediction, target, 1))


def lattice_weights(centres_px: np.ndarray, pitch_px: float) -> sp.csr_matrix:
    """Neighbours on the spot lattice, ``(N, N)``: each row sums to 1, or is empty for a spot that stands alone."""
    pairs = KDTree(centres_px).query_pairs(NEIGHBOUR_PITCHES * pitch_px, output_type="ndarray")
    rows, columns = np.concatenate([pairs, pairs[:, ::-1]]).T
    return _rows_to_one(sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(centres_px),) * 2))


def morans_i(values: np.ndarray, weights: sp.csr_matrix) -> np.ndarray:
    """Moran's I of each column, ``(N, G)`` and ``(N, N)`` -> ``(G,)``.

    1 for a map that is equal to its neighbours' mean everywhere, about 0 for one without spatial pattern; NaN for a
    constant column, or where no spot has neighbours.
    """
    centred = np.asarray(values, dtype=np.float64) - np.mean(values, axis=0, dtype=np.float64)
    together, alone = (centred * (weights @ centred)).sum(axis=0), np.square(centred).sum(axis=0)
    total = float(weights.sum())
    return _ratio(together * len(centred), alone * total, ~constant(values) & (total > 0))


def ssim(prediction: np.ndarray, target: np.ndarray, centres_px: np.ndarray, pitch_px: float) -> np.ndarray:
    """Structural similarity of each gene's map, ``(N, G)`` twice -> ``(G,)``, at most 1.

    Both maps are scaled by the target's minimum and range, so that it spans [0, 1]. Local means, variances and the
    covariance use a Gaussian window (sigma 1.5 pitches, radius 5) over the spots that exist, its weights summing to 1
    at every spot: what lies off the tissue is masked. The index of Wang et al. 2004 (C1 = .01^2, C2 = .03^2) is
    averaged over spots. NaN where the target is constant.
    """
    tree = KDTree(centres_px)
    near = tree.sparse_distance_matrix(tree, SSIM_RADIUS * pitch_px * (1 + 1e-9), output_type="coo_matrix").tocsr()
    near.data = np.exp(-0.5 * (near.data / (SSIM_SIGMA * pitch_px)) ** 2)
    window = _rows_to_one(near)
    return np.concatenate(
        [
            _ssim(prediction[:, start : start + _GENES_AT_ONCE], target[:, start : start + _GENES_AT_ONCE], window)
            for start in range(0, target.shape[1], _GENES_AT_ONCE)
        ]
    )


def _ssim(prediction: np.ndarray, target: np.ndarray, window: sp.csr_matrix) -> np.ndarray:
    flat = constant(target)
    low = target.min(axis=0)
    span = np.where(flat, 1.0, target.max(axis=0) - low)
    p, t = (prediction - low) / span, (target - low) / span
    mean_p, mean_t = window @ p, window @ t
    var_p = np.maximum(window @ p**2 - mean_p**2, 0.0)
    var_t = np.maximum(window @ t**2 - mean_t**2, 0.0)
    cov = window @ (p * t) - mean_p * mean_t
    above = (2 * mean_p * mean_t + SSIM_C1) * (2 * cov + SSIM_C2)
    below = (mean_p**2 + mean_t**2 + SSIM_C1) * (var_p + var_t + SSIM_C2)
    return np.where(flat, np.nan, (above / below).mean(axis=0))


def ceiling(
    counts: np.ndarray,
    total_counts: np.ndarray,
    normalise: Callable[[np.ndarray, np.ndarray], np.ndarray],
    seed: int = 0,
    repeats: int = 5,
) -> np.ndarray:
    """The highest ``pcc_per_gene`` that counting noise leaves possible, for each gene, ``(G,)`` in [0, 1].

    Every molecule goes to one of two halves by a fair coin; both halves are normalised; their correlation ``r``,
    averaged over ``repeats`` splits, becomes that of the whole counts by Spearman-Brown, ``2 r / (1 + r)``; the square
    root is the correlation of the counts with a noiseless truth. Negative and undefined ``r`` give 0.

    Parameters
    ----------
    counts
        Raw counts of the panel, whole numbers ``(N, G)``.
    total_counts
        Counts over all genes, ``(N,)``.
    normalise
        (counts, total counts) -> expression.
    """
    random = np.random.default_rng(seed)
    whole = np.asarray(counts, dtype=np.int64)
    rest = np.maximum(np.asarray(total_counts, dtype=np.int64) - whole.sum(axis=1), 0)
    total_r = np.zeros(whole.shape[1])
    for _ in range(repeats):
        half, rest_half = random.binomial(whole, 0.5), random.binomial(rest, 0.5)
        other, rest_other = whole - half, rest - rest_half
        one, two = normalise(half, half.sum(axis=1) + rest_half), normalise(other, other.sum(axis=1) + rest_other)
        total_r += np.nan_to_num(pcc_per_gene(one, two))
    r = np.maximum(total_r / repeats, 0.0)
    return np.sqrt(2 * r / (1 + r))


# Name in the result -> column of the gene rows, how genes are brought together, whether undefined counts as 0.
_OVER_GENES: dict[str, tuple[str, str, bool]] = {
    "pcc_per_gene_mean": ("pcc_per_gene", "mean", True),
    "pcc_per_gene_median": ("pcc_per_gene", "median", True),
    "spearman_per_gene_mean": ("spearman_per_gene", "mean", True),
    "r2_mean": ("r2", "mean", False),
    "nrmse_mean": ("nrmse", "mean", False),
    "ceiling_mean": ("ceiling", "mean", False),
    "moran_truth": ("moran_truth", "mean", False),
    "moran_prediction": ("moran_prediction", "mean", False),
    "variance_ratio": ("variance_ratio", "mean", False),
    "ssim": ("ssim", "mean", False),
}
_OVER_SECTIONS = ("mse", "mae", "pcc_per_spot", "mse_offset", "mse_pattern")
AVERAGING = ("folds", "patients")


def aggregate(
    gene_rows: pd.DataFrame,
    section_rows: pd.DataFrame,
    averaging: str = "folds",
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Scores of all tested sections brought together, with bootstrap intervals; None where nothing is defined.

    Scores of genes are averaged over the sections of a patient, then over patients; then ``_mean`` or ``_median`` over
    genes. ``mse, mae, pcc_per_spot, mse_offset, mse_pattern`` follow ``averaging``.

    Parameters
    ----------
    gene_rows
        :data:`GENE_COLUMNS` and ``section, patient, fold``: a row per gene of each tested section.
    section_rows
        :data:`SECTION_COLUMNS` and ``section, patient, fold``: a row per tested section.
    averaging
        ``"folds"``: all spots of a fold pooled, then the mean over folds, as in the HiFusion paper's tables (in its 3D
        protocol a fold is a patient). ``"patients"``: sections averaged within patient, then over patients.

    Returns
    -------
    dict
        The scores; counts ``n_undefined_genes`` (genes without a correlation in at least one section),
        ``n_undefined_gene_sections`` (how often), ``n_undefined_spots``, ``n_genes, n_spots, n_sections, n_patients,
        n_folds``; ``averaging``; ``intervals`` (name -> 95 % interval, or None) and ``interval_over``: ``"patients"``,
        ``"sections"`` where there is one patient, or None where there is one section.
    """
    if averaging not in AVERAGING:
        raise InputError(f"averaging={averaging!r} is unknown; use one of {', '.join(AVERAGING)}")
    n_patients, n_sections = section_rows["patient"].nunique(), section_rows["section"].nunique()
    unit = "patient" if n_patients > 1 else "section"
    units = sorted(section_rows[unit].unique())
    # How often each unit is drawn; the first row draws each once and gives the scores themselves.
    draws = np.random.default_rng(seed).multinomial(len(units), np.full(len(units), 1 / len(units)), size=resamples)
    draws = np.concatenate([np.ones((1, len(units)), dtype=draws.dtype), draws if len(units) > 1 else draws[:0]])
    found = _sections_together(section_rows, unit, units, draws, averaging) | _genes_together(
        gene_rows, unit, units, draws
    )
    found["fraction_of_ceiling"] = _ratio(found["pcc_per_gene_mean"], found["ceiling_mean"], found["ceiling_mean"] > 0)
    undefined = gene_rows.loc[gene_rows["pcc_per_gene"].isna(), "gene"]
    return {
        **{name: _number(values[0]) for name, values in found.items()},
        "n_undefined_genes": int(undefined.nunique()),
        "n_undefined_gene_sections": len(undefined),
        "n_undefined_spots": int(section_rows["n_undefined_spots"].sum()),
        "n_genes": int(gene_rows["gene"].nunique()),
        "n_spots": int(section_rows["n_spots"].sum()),
        "n_sections": n_sections,
        "n_patients": n_patients,
        "n_folds": int(section_rows["fold"].nunique()),
        "averaging": averaging,
        "interval_over": f"{unit}s" if len(units) > 1 else None,
        "intervals": {name: _interval(values[1:]) for name, values in found.items()},
    }


def _sections_together(
    rows: pd.DataFrame, unit: str, units: list[str], draws: np.ndarray, averaging: str
) -> dict[str, np.ndarray]:
    """Each score of :data:`_OVER_SECTIONS` for each draw, ``(draws,)``."""
    drawn = draws[:, pd.Index(units).get_indexer(pd.Index(rows[unit]))].astype(np.float64)
    group = rows["fold"] if averaging == "folds" else rows[unit]
    within = rows["n_spots"].to_numpy(dtype=np.float64) if averaging == "folds" else np.ones(len(rows))
    member = pd.get_dummies(group).to_numpy(dtype=np.float64)  # (rows, groups)
    # A group counts as much as its sections were drawn, so that a fold that is one patient counts as often as it is.
    importance = drawn @ member / member.sum(axis=0)
    weight = (drawn * within) @ member
    return {
        name: _weighted_mean(_ratio((drawn * within * rows[name].to_numpy()) @ member, weight), importance)
        for name in _OVER_SECTIONS
    }


def _genes_together(rows: pd.DataFrame, unit: str, units: list[str], draws: np.ndarray) -> dict[str, np.ndarray]:
    """Each score of :data:`_OVER_GENES` for each draw, ``(draws,)``."""
    columns = [*dict.fromkeys(column for column, _, _ in _OVER_GENES.values())]
    as_zero = {column: 0.0 for column, _, counts_as_zero in _OVER_GENES.values() if counts_as_zero}
    means = rows[[unit, "gene", *columns]].fillna(as_zero).groupby([unit, "gene"])[columns].mean()
    over_genes = {"mean": _mean, "median": _median}
    found: dict[str, list[float]] = {name: [] for name in _OVER_GENES}
    for column in columns:
        per_unit = (
            means.reset_index().pivot(index="gene", columns=unit, values=column).reindex(columns=units).to_numpy()
        )  # (G, units)
        known = np.isfinite(per_unit).astype(np.float64)
        filled = np.nan_to_num(per_unit)
        for draw in draws.astype(np.float64):
            per_gene = _ratio(filled @ draw, known @ draw)
            for name, (its, how, _) in _OVER_GENES.items():
                if its == column:
                    found[name].append(over_genes[how](per_gene))
    return {name: np.array(values) for name, values in found.items()}


def _rows_to_one(weights: sp.csr_matrix) -> sp.csr_matrix:
    sums = np.asarray(weights.sum(axis=1)).ravel()
    return sp.csr_matrix(sp.diags(_ratio(np.ones_like(sums), sums, sums > 0, otherwise=0.0)) @ weights)


def _ratio(
    above: np.ndarray, below: np.ndarray, defined: np.ndarray | None = None, otherwise: float = np.nan
) -> np.ndarray:
    """``above / below`` where ``defined`` (below > 0 where None), else ``otherwise``."""
    usable = below > 0 if defined is None else defined
    return np.divide(above, below, out=np.full(np.shape(below), otherwise), where=usable)


def _both_vary(prediction: np.ndarray, target: np.ndarray, axis: int) -> np.ndarray:
    # A flat prediction around 0 has nothing of its own to be small against, so the target's spread counts too.
    spread, wanted = (np.std(values, axis=axis, dtype=np.float64) for values in (prediction, target))
    return ~(constant(prediction, axis) | constant(target, axis) | (spread <= CONSTANT_RTOL * wanted))


def _correlation(a: np.ndarray, b: np.ndarray, axis: int, defined: np.ndarray) -> np.ndarray:
    a, b = (np.asarray(x, dtype=np.float64) - np.mean(x, axis=axis, keepdims=True, dtype=np.float64) for x in (a, b))
    norms = np.sqrt(np.square(a).sum(axis=axis)) * np.sqrt(np.square(b).sum(axis=axis))
    return np.clip(_ratio((a * b).sum(axis=axis), norms, defined & (norms > 0)), -1.0, 1.0)


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean along the last axis over what is defined."""
    weights = np.where(np.isfinite(values), weights, 0.0)
    return _ratio((np.nan_to_num(values) * weights).sum(axis=-1), weights.sum(axis=-1))


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else np.nan


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else np.nan


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _interval(values: np.ndarray) -> list[float] | None:
    known = values[np.isfinite(values)]
    return [float(bound) for bound in np.percentile(known, [2.5, 97.5])] if known.size else None
