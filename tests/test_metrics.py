"""Scores: against independent formulas, at their edges, and how they are brought together."""

import json
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hifusion import metrics
from hifusion.errors import InputError
from hifusion.expression import log_share

PITCH_PX = 290.0


def lattice(rows: int, columns: int) -> np.ndarray:
    """Spot centres of a full grid."""
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1)
    return grid.reshape(-1, 2) * PITCH_PX


def maps(seed: int, n_spots: int = 48, n_genes: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(-5, 1, (n_spots, n_genes))


def scored(prediction: np.ndarray, target: np.ndarray, train_mean: np.ndarray) -> metrics.SectionScores:
    genes = [f"g{i}" for i in range(target.shape[1])]
    return metrics.score_section(prediction, target, train_mean, lattice(6, 8), PITCH_PX, genes)


def test_correlations_are_those_of_scipy():
    prediction, target = np.round(maps(0), 1), np.round(maps(1), 1)  # rounded: ties in the ranks
    for i in range(target.shape[1]):
        pair = prediction[:, i], target[:, i]
        assert metrics.pcc_per_gene(prediction, target)[i] == pytest.approx(stats.pearsonr(*pair).statistic)
        assert metrics.spearman_per_gene(prediction, target)[i] == pytest.approx(stats.spearmanr(*pair).statistic)
    assert metrics.pcc_per_spot(prediction, target)[3] == pytest.approx(stats.pearsonr(prediction[3], target[3])[0])


@pytest.mark.parametrize("correlate", [metrics.pcc_per_gene, metrics.spearman_per_gene])
@pytest.mark.parametrize("level", [-6.1, 0.0, 1e-3, 1234.5])
def test_a_flat_prediction_with_rounding_noise_has_no_correlation(correlate, level):
    """Noise of a few float32 steps that follows the target perfectly is still no prediction."""
    target = maps(2)
    step = np.spacing(np.float32(level or 1.0))  # around 0: what is left of terms of size 1
    flat = (np.float32(level) + 4 * step * np.sign(target - target.mean(axis=0))).astype(np.float32)
    assert flat.std(axis=0).min() > 0
    assert np.isnan(correlate(flat, target)).all()
    if level:  # a measured gene around 0 may be in any unit
        assert np.isnan(correlate(target, flat)).all()


@given(st.floats(-10, 10), st.floats(1e-3, 10), st.integers(0, 1000))
def test_a_small_but_real_pattern_is_not_taken_for_constant(shift, scale, seed):
    target = maps(seed)
    assert metrics.pcc_per_gene(target * scale + shift, target) == pytest.approx(1.0)
    assert metrics.pcc_per_gene(-target * scale + shift, target) == pytest.approx(-1.0)


def test_errors_split_into_offset_and_pattern():
    target = maps(3)
    pattern = np.random.default_rng(4).normal(0, 0.3, target.shape)
    pattern -= pattern.mean(axis=0)
    table = scored(target + 0.5 + pattern, target, target.mean(axis=0)).genes
    np.testing.assert_allclose(table["mse_offset"], 0.25)
    np.testing.assert_allclose(table["mse_pattern"], np.square(pattern).mean(axis=0))
    np.testing.assert_allclose(table["mse"], table["mse_offset"] + table["mse_pattern"])
    np.testing.assert_allclose(table["mae"], np.abs(0.5 + pattern).mean(axis=0))


def test_train_mean_scores_zero_and_the_truth_scores_one_against_train_mean():
    target = maps(5)
    null = np.full(5, -4.0)
    floor, truth = (scored(p, target, null).genes for p in (np.tile(null, (48, 1)), target))
    assert (floor["r2"] == 0).all() and (floor["nrmse"] == 1).all() and floor["pcc_per_gene"].isna().all()
    assert (truth["r2"] == 1).all() and (truth["nrmse"] == 0).all()
    assert truth["variance_ratio"].to_numpy() == pytest.approx(1) and truth["ssim"].to_numpy() == pytest.approx(1)


def test_r2_and_nrmse_are_relative_to_train_mean_not_to_the_sections_own_mean():
    target = maps(6)
    null = target.mean(axis=0) + 2.0
    table = scored(np.tile(target.mean(axis=0), (48, 1)), target, null).genes
    expected = 1 - target.var(axis=0) / (target.var(axis=0) + 4.0)
    np.testing.assert_allclose(table["r2"], expected)
    np.testing.assert_allclose(table["nrmse"], np.sqrt(1 - expected))


def test_constant_genes_and_spots_are_undefined_and_counted():
    target = maps(7)
    target[:, 1] = -3.0
    target[5] = -3.0
    target[5:, 1] = -3.0
    scores = scored(maps(8), target, maps(8).mean(axis=0))
    assert scores.genes["pcc_per_gene"].isna().tolist() == [False, True, False, False, False]
    assert np.isnan(
        scores.genes.loc[1, ["spearman_per_gene", "variance_ratio", "ssim", "moran_truth"]].astype(float)
    ).all()
    assert scores.section["n_undefined_genes"] == 1 and scores.section["n_undefined_spots"] == 1
    per_spot = np.nan_to_num(metrics.pcc_per_spot(maps(8), target))
    assert scores.section["pcc_per_spot"] == pytest.approx(per_spot.sum() / 48), "an undefined spot counts as 0"


def test_score_section_has_the_stable_columns():
    scores = scored(maps(0), maps(1), maps(1).mean(axis=0))
    assert tuple(scores.genes.columns) == metrics.GENE_COLUMNS and tuple(scores.section) == metrics.SECTION_COLUMNS
    assert scores.section["mse"] == pytest.approx(np.square(maps(0) - maps(1)).mean())
    assert scores.section["mae"] == pytest.approx(np.abs(maps(0) - maps(1)).mean())


def test_a_section_of_one_spot_is_scored_without_correlations():
    one = np.array([[1.0, 2.0, 4.0]])
    scores = metrics.score_section(one + 1, one, one[0], np.zeros((1, 2)), PITCH_PX, "abc")
    assert scores.section["mse"] == 1.0 and scores.section["n_undefined_genes"] == 3
    assert scores.section["pcc_per_spot"] == pytest.approx(1.0)


def test_a_diverged_or_misshapen_prediction_is_refused():
    target = maps(0)
    with pytest.raises(InputError, match="holds 1 values that are not finite"):
        scored(np.where(np.arange(240).reshape(48, 5) == 7, np.nan, target), target, target[0])
    with pytest.raises(InputError, match=r"\(47, 5\).*do not fit together"):
        scored(target[1:], target, target[0])


def test_morans_i_is_high_for_a_gradient_negative_for_a_checkerboard_and_zero_for_noise():
    centres = lattice(20, 20)
    row, column = centres.T / PITCH_PX
    noise = np.random.default_rng(0).normal(size=(400, 50))
    weights = metrics.lattice_weights(centres, PITCH_PX)
    gradient, checkerboard = metrics.morans_i(np.stack([row, (row + column) % 2], axis=1), weights)
    assert gradient > 0.9 and checkerboard == pytest.approx(-1.0)
    assert metrics.morans_i(noise, weights).mean() == pytest.approx(-1 / 399, abs=0.02)


@given(st.integers(0, 1000))
def test_morans_i_is_the_textbook_double_sum(seed):
    random = np.random.default_rng(seed)
    centres = lattice(5, 5)[random.permutation(25)[:14]] + random.uniform(-20, 20, (14, 2))
    x = random.normal(size=14)
    near = np.linalg.norm(centres[:, None] - centres[None], axis=-1) <= 1.25 * PITCH_PX
    np.fill_diagonal(near, False)
    w = near / np.maximum(near.sum(axis=1, keepdims=True), 1)
    z = x - x.mean()
    expected = 14 / w.sum() * (z @ w @ z) / (z @ z)
    assert metrics.morans_i(x[:, None], metrics.lattice_weights(centres, PITCH_PX)) == pytest.approx(expected)


@given(st.integers(0, 1000))
def test_ssim_is_the_masked_gaussian_window_formula(seed):
    random = np.random.default_rng(seed)
    kept = random.permutation(64)[:40]
    centres, p, t = lattice(8, 8)[kept], random.normal(size=40), random.normal(size=40)
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1) / PITCH_PX
    window = np.where(distance <= 5 + 1e-6, np.exp(-(distance**2) / (2 * 1.5**2)), 0)
    window /= window.sum(axis=1, keepdims=True)
    a, b = (p - t.min()) / np.ptp(t), (t - t.min()) / np.ptp(t)
    values = []
    for w in window:
        ma, mb = w @ a, w @ b
        va, vb, cov = w @ (a - ma) ** 2, w @ (b - mb) ** 2, w @ ((a - ma) * (b - mb))
        values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    assert metrics.ssim(p[:, None], t[:, None], centres, PITCH_PX) == pytest.approx(np.mean(values))


def test_ssim_falls_with_blur_and_with_noise():
    target = np.sin(lattice(12, 12) @ np.array([[1.0], [0.6]]) / 400)
    weights = metrics.lattice_weights(lattice(12, 12), PITCH_PX)
    noisy = target + np.random.default_rng(0).normal(0, 0.5, target.shape)
    same, blurred, worse = (
        metrics.ssim(p, target, lattice(12, 12), PITCH_PX)[0] for p in (target, weights @ weights @ target, noisy)
    )
    assert same == pytest.approx(1) and 0 < worse < blurred < 0.999


def planted_counts(seed: int, depth: float) -> tuple[np.ndarray, np.ndarray]:
    """Poisson counts (600, 8) and the noiseless log expression they are drawn from; gene 7 has no pattern."""
    random = np.random.default_rng(seed)
    truth = random.normal(0, 0.5, (600, 8))
    truth[:, 7] = 0.0
    return random.poisson(depth * np.exp(truth)), truth


def log1p(counts: np.ndarray, total_counts: np.ndarray) -> np.ndarray:
    return np.log1p(counts)


@pytest.mark.parametrize("depth", [2.0, 8.0])
def test_the_ceiling_is_the_correlation_with_the_noiseless_truth(depth):
    counts, truth = planted_counts(0, depth)
    reached = metrics.pcc_per_gene(np.log1p(counts), truth)
    ceiling = metrics.ceiling(counts, counts.sum(axis=1), log1p)
    np.testing.assert_allclose(ceiling[:7], reached[:7], atol=0.07)
    assert ceiling[7] < 0.4 and ceiling.min() >= 0 and ceiling.max() <= 1


def test_the_ceiling_rises_with_depth_repeats_with_its_seed_and_is_zero_for_a_silent_gene():
    shallow, deep = (metrics.ceiling(planted_counts(0, d)[0], np.full(600, 10**4), log_share)[:7] for d in (1.0, 10.0))
    assert (deep > shallow).all()
    counts = planted_counts(0, 3.0)[0]
    counts[:, 0] = 0
    one, again, other = (metrics.ceiling(counts, counts.sum(axis=1), log1p, seed=s, repeats=1) for s in (1, 1, 2))
    assert one[0] == 0 and (one == again).all() and (one[1:7] != other[1:7]).all()


def study(patients: dict[str, int], folds: dict[str, str], seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of scores of random predictions for sections of different sizes."""
    random = np.random.default_rng(seed)
    genes, sections = [], []
    for patient, count in patients.items():
        for i in range(count):
            tag = {"section": f"{patient}{i}", "patient": patient, "fold": folds[patient]}
            n = int(random.integers(20, 60))
            target, prediction = maps(int(random.integers(10**6)), n), maps(int(random.integers(10**6)), n)
            one = metrics.score_section(
                prediction, target, target[0], lattice(6, 10)[:n], PITCH_PX, "abcde", np.full(5, 0.8)
            )
            genes.append(one.genes.assign(**tag))
            sections.append(one.section | tag)
    return pd.concat(genes), pd.DataFrame(sections)


PATIENTS, FOLDS = {"A": 3, "B": 1, "C": 2}, {"A": "one", "B": "one", "C": "two"}


def test_averaging_folds_pools_spots_within_a_fold_and_patients_does_not():
    genes, sections = study(PATIENTS, FOLDS)
    by_fold = [np.average(rows["mse"], weights=rows["n_spots"]) for _, rows in sections.groupby("fold")]
    by_patient = sections.groupby("patient")["mse"].mean()
    folds, of_patients = metrics.aggregate(genes, sections), metrics.aggregate(genes, sections, "patients")
    assert folds["mse"] == pytest.approx(np.mean(by_fold)) and of_patients["mse"] == pytest.approx(by_patient.mean())
    for found in (folds, of_patients):
        assert found["mse_offset"] + found["mse_pattern"] == pytest.approx(found["mse"])


def test_gene_scores_go_from_sections_to_patients_to_genes():
    genes, sections = study(PATIENTS, FOLDS)
    found = metrics.aggregate(genes, sections)
    per_gene = genes.groupby(["patient", "gene"])["pcc_per_gene"].mean().groupby("gene").mean()
    assert found["pcc_per_gene_mean"] == pytest.approx(per_gene.mean())
    assert found["pcc_per_gene_median"] == pytest.approx(per_gene.median())
    assert found["ceiling_mean"] == pytest.approx(0.8)
    assert found["fraction_of_ceiling"] == pytest.approx(per_gene.mean() / 0.8)


def test_an_undefined_correlation_counts_as_zero_and_is_told():
    genes, sections = study(PATIENTS, FOLDS)
    genes["pcc_per_gene"] = 0.6
    genes.loc[(genes["gene"] == "a") & (genes["patient"] == "C"), "pcc_per_gene"] = np.nan
    found = metrics.aggregate(genes, sections)
    assert found["n_undefined_genes"] == 1 and found["n_undefined_gene_sections"] == 2
    assert found["pcc_per_gene_mean"] == pytest.approx((4 * 0.6 + 0.4) / 5)


def test_a_gene_that_only_some_panels_hold_is_averaged_where_it_is():
    genes, sections = study(PATIENTS, FOLDS)
    genes["pcc_per_gene"] = genes["patient"].map({"A": 0.2, "B": 0.4, "C": 0.6})
    without = genes[~((genes["gene"] == "a") & (genes["patient"] == "C"))]
    found = metrics.aggregate(without, sections)
    assert found["pcc_per_gene_mean"] == pytest.approx((4 * 0.4 + 0.3) / 5) and found["n_undefined_genes"] == 0


def test_intervals_hold_the_score_and_are_over_patients():
    genes, sections = study({"A": 3, "B": 2, "C": 2, "D": 1}, dict.fromkeys("ABCD", "one"))
    found = metrics.aggregate(genes, sections, seed=1)
    assert found["interval_over"] == "patients" and found["n_patients"] == 4
    for name in ("mse", "mae", "pcc_per_spot", "pcc_per_gene_mean", "ssim"):
        low, high = found["intervals"][name]
        assert low <= found[name] <= high and low < high
    assert found == metrics.aggregate(genes, sections, seed=1)


def test_intervals_are_over_sections_for_one_patient_and_absent_for_one_section():
    genes, sections = study({"A": 3}, {"A": "one"})
    found = metrics.aggregate(genes, sections)
    assert found["interval_over"] == "sections" and found["intervals"]["mse"][0] < found["intervals"]["mse"][1]
    one = metrics.aggregate(genes[genes["section"] == "A0"], sections[sections["section"] == "A0"])
    assert one["interval_over"] is None and one["intervals"]["mse"] is None and one["mse"] is not None


def test_the_bootstrap_over_patients_has_the_spread_of_a_mean():
    """With a patient per fold the 95 % interval of the MSE is close to that of a mean of independent values."""
    random = np.random.default_rng(0)
    names = [f"p{i}" for i in range(40)]
    genes, sections = study(dict.fromkeys(names, 1), dict(zip(names, names, strict=True)))
    sections["mse"] = random.normal(1.0, 0.2, 40)
    low, high = metrics.aggregate(genes, sections, resamples=2000)["intervals"]["mse"]
    assert high - low == pytest.approx(2 * 1.96 * sections["mse"].std(ddof=0) / np.sqrt(40), rel=0.1)


def test_what_is_undefined_everywhere_is_none_so_that_json_can_hold_it():
    genes, sections = study(PATIENTS, FOLDS)
    genes[["moran_prediction", "ceiling"]] = np.nan
    found = metrics.aggregate(genes, sections)
    assert found["moran_prediction"] is None and found["ceiling_mean"] is None and found["fraction_of_ceiling"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_unknown_averaging_is_one_line():
    with pytest.raises(InputError, match="use one of folds, patients"):
        metrics.aggregate(*study(PATIENTS, FOLDS), averaging="spots")


def test_scores_of_250_genes_and_700_spots_take_milliseconds():
    """Generous by a factor of 20 for a busy machine; a loop over genes or spots in Python would not fit."""
    random = np.random.default_rng(0)
    prediction, target = random.normal(size=(2, 700, 250)).astype(np.float32)
    start = time.perf_counter()
    metrics.score_section(prediction, target, target[0], lattice(25, 28), PITCH_PX, [str(i) for i in range(250)])
    assert time.perf_counter() - start < 3.0
