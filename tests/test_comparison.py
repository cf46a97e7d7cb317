"""Differences, verdicts and wins against cases worked out by hand, and how often no difference is called one."""

import numpy as np
import pandas as pd
import pytest

from hifusion import metrics
from hifusion.comparison import gene_wins, holm, paired_differences, selection_gap
from hifusion.errors import InputError
from scoreboard import rows


def flat(*values: float) -> np.ndarray:
    """Sections whose two genes have the same score."""
    return np.repeat(np.array(values)[:, None], 2, axis=1)


def only(pairs: pd.DataFrame) -> pd.Series:
    assert len(pairs) == 1
    return pairs.iloc[0]


def test_a_difference_is_averaged_over_seeds_then_sections_then_patients():
    """Patient P: sections .1 and .3, mean .2 (seed 0), .4 (seed 1); Q: .5 and .5. Model b is 0."""
    scores = {("a", 0): flat(0.1, 0.3, 0.5), ("a", 1): flat(0.3, 0.5, 0.5), ("b", None): flat(0, 0, 0)}
    pair = only(paired_differences(*rows(scores, ["P", "P", "Q"])))
    assert pair["difference"] == pytest.approx(((0.2 + 0.4) / 2 + 0.5) / 2)
    assert (pair["over"], pair["units"]) == ("patients", 2)
    assert (pair["seeds_a"], pair["seeds_b"]) == (2, 0)


def test_scores_are_those_of_aggregate_with_undefined_ones_and_panels_that_differ():
    random = np.random.default_rng(0)
    scores = {(model, None): random.uniform(-0.2, 0.9, (7, 2)) for model in "ab"}
    scores["a", None][2, 0] = np.nan
    genes, sections = rows(scores, [*"PPQRRST"])
    genes = genes[~((genes["gene"] == "CD74") & (genes["patient"].isin(["Q", "S"])))]
    for metric, score in (("pcc_per_gene", "pcc_per_gene_mean"), ("mse", "mse")):
        pair = only(paired_differences(genes, sections, metric))
        for side in "ab":
            model = pair[f"model_{side}"]
            its = genes[genes["model"] == model], sections[sections["model"] == model]
            assert pair[side] == pytest.approx(metrics.aggregate(*its, "patients", resamples=1)[score])
        assert pair["low"] < pair["difference"] < pair["high"]


def test_the_interval_is_over_whole_patients_drawn_alike_for_both_models():
    """A constant difference has no spread, however much the scores vary."""
    ground = np.random.default_rng(0).uniform(0, 0.5, (8, 2))
    pair = only(paired_differences(*rows({("a", None): ground + 0.1, ("b", None): ground})))
    assert [pair["low"], pair["high"]] == pytest.approx([0.1, 0.1])
    assert pair["verdict"] == "differ"


def test_with_many_patients_the_interval_is_that_of_students_t():
    differences = np.random.default_rng(1).normal(0.1, 0.05, 40)
    pair = only(paired_differences(*rows({("a", None): flat(*differences), ("b", None): flat(*np.zeros(40))})))
    half = 2.0227 * differences.std(ddof=1) / np.sqrt(40)  # t(.975, 39)
    assert (pair["high"] - pair["low"]) / 2 == pytest.approx(half, rel=0.06)


def test_one_patient_is_resampled_by_section_and_one_section_not_at_all():
    scores = {("a", None): flat(*[0.5] * 6), ("b", None): flat(*[0.1] * 6)}
    pair = only(paired_differences(*rows(scores, ["P"] * 6)))
    assert (pair["over"], pair["units"], pair["verdict"]) == ("sections", 6, "differ")
    one = only(paired_differences(*rows({("a", None): flat(0.5), ("b", None): flat(0.1)})))
    assert one["verdict"] == "too few sections"
    assert one[["low", "high", "p", "p_holm"]].isna().all()


def test_five_patients_are_too_few_and_six_are_not():
    for patients, verdict in ((5, "too few patients"), (6, "differ")):
        scores = {("a", None): flat(*[0.5] * patients), ("b", None): flat(*[0.1] * patients)}
        pair = only(paired_differences(*rows(scores)))
        assert pair["verdict"] == verdict
        assert np.isnan(pair["p"]) == (patients == 5)


def test_the_sign_flip_p_value_is_exact():
    """1, 2, ..., 6 and 7: all of a sign in 2 of 128 flips. With -1 in place of 1 the sum 26 is reached by flipping
    none, or 1 alone, of 128: 2 x 2 / 128."""
    ones = np.arange(1, 8) / 10
    nothing = flat(*np.zeros(7))
    pair = only(paired_differences(*rows({("a", None): flat(*ones), ("b", None): nothing})))
    assert pair["p"] == pytest.approx(2 / 128)
    ones[0] = -ones[0]
    pair = only(paired_differences(*rows({("a", None): flat(*ones), ("b", None): nothing})))
    assert pair["p"] == pytest.approx(4 / 128)


def test_a_difference_within_the_luck_of_the_seeds_is_no_difference():
    """Seeds .2 and .4 have a standard error of .1: to .15 it is less than two of them, to .05 more."""
    for other, verdict in ((0.15, "not told apart"), (0.05, "differ")):
        scores = {("a", 0): flat(*[0.2] * 8), ("a", 1): flat(*[0.4] * 8), ("b", None): flat(*[other] * 8)}
        pair = only(paired_differences(*rows(scores)))
        assert pair["seed_error"] == pytest.approx(0.1)
        assert pair["verdict"] == verdict


def test_errors_of_two_networks_over_seeds_add_up():
    scores = {("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): 0.1, ("b", 1): 0.2, ("b", 2): 0.3}
    pair = only(paired_differences(*rows({key: flat(*[value] * 8) for key, value in scores.items()})))
    assert pair["seed_error"] == pytest.approx(np.sqrt(0.02 / 2 + 0.01 / 3))


def test_one_seed_cannot_tell_a_difference_but_can_tell_that_there_is_none():
    ground = np.random.default_rng(0).normal(0, 0.1, 8)
    far = {("a", 0): flat(*(ground + 0.5)), ("b", None): flat(*ground)}
    near = {("a", 0): flat(*ground), ("b", None): flat(*-ground)}
    pair = only(paired_differences(*rows(far)))
    assert (pair["verdict"], np.isnan(pair["seed_error"])) == ("too few seeds", True)
    assert only(paired_differences(*rows(near)))["verdict"] == "not told apart"


def test_equal_models_are_not_told_apart():
    pair = only(paired_differences(*rows({("a", None): flat(*[0.3] * 8), ("b", None): flat(*[0.3] * 8)})))
    assert (pair["difference"], pair["p"], pair["verdict"]) == (0, 1, "not told apart")


@pytest.mark.parametrize("units", [6, 8, 16])
def test_where_there_is_no_difference_few_pairs_differ(units):
    """25 models of equal skill, 300 pairs. Pairs share models, so that the rate scatters around 5 to 8 %."""
    random = np.random.default_rng(units)
    scores = {(f"m{i}", None): random.normal(0.3, 0.1, (units, 1)) for i in range(25)}
    pairs = paired_differences(*rows(scores, genes=["ERBB2"]))
    assert len(pairs) == 300
    assert 0.01 < (pairs["verdict"] == "differ").mean() < 0.10
    assert (pairs["p"] < 0.05).mean() < 0.10
    assert (pairs["p_holm"] < 0.05).sum() == 0


def test_a_real_difference_is_found():
    random = np.random.default_rng(0)
    scores = {(model, None): random.normal(mean, 0.05, (12, 2)) for model, mean in (("a", 0.4), ("b", 0.2))}
    pair = only(paired_differences(*rows(scores)))
    assert (pair["verdict"], pair["p_holm"] < 0.01) == ("differ", True)


def test_the_better_model_comes_first_in_either_metric():
    genes, sections = rows({("a", None): flat(0.1, 0.2), ("b", None): flat(0.3, 0.4)})
    for metric, sign in (("pcc_per_gene", 1), ("mse", -1)):
        pair = only(paired_differences(genes, sections, metric))
        assert (pair["model_a"], np.sign(pair["difference"])) == ("b", sign)


def test_oracles_are_compared_only_when_asked_for():
    scores = {(model, None): flat(0.1, 0.2) for model in ("a", "b", "own_mean", "depth")}
    assert len(paired_differences(*rows(scores))) == 1
    assert len(paired_differences(*rows(scores), left_out=())) == 6


def test_a_single_model_has_no_pairs():
    pairs = paired_differences(*rows({("a", None): flat(0.1, 0.2)}))
    assert pairs.empty and "verdict" in pairs


def test_models_scored_on_different_sections_are_refused():
    genes, sections = rows({("a", None): flat(0.1, 0.2), ("b", 0): flat(0.1, 0.2)})
    with pytest.raises(InputError, match="b-seed0: not scored on all sections.*P1-1"):
        paired_differences(genes[:-2], sections)


def test_an_unknown_metric_is_refused():
    with pytest.raises(InputError, match="'pcc'.*pcc_per_gene, mse"):
        paired_differences(*rows({("a", None): flat(0.1)}), metric="pcc")


def test_holm_multiplies_the_smallest_by_the_number_and_never_falls():
    """.01 x 4, .02 x 3, .03 x 2 = .06 held at .06, .5 x 1."""
    p = np.array([0.03, np.nan, 0.01, 0.5, 0.02])
    assert holm(p) == pytest.approx([0.06, np.nan, 0.04, 0.5, 0.06], nan_ok=True)


def test_genes_are_won_by_the_best_honest_model_and_ties_are_shared():
    """ERBB2: a and b tie at .5, the oracle's .9 does not count. CD74: b, whose two sections mean .3."""
    scores = {
        ("train_mean", None): np.full((2, 2), np.nan),
        ("depth", None): flat(0.9, 0.9),
        ("a", None): np.array([[0.5, 0.2], [0.5, 0.2]]),
        ("b", None): np.array([[0.4, 0.1], [0.6, 0.5]]),
    }
    wins = gene_wins(rows(scores)[0]).set_index("model")
    assert wins["wins"].to_dict() == pytest.approx({"train_mean": 0, "depth": np.nan, "a": 0.5, "b": 1.5}, nan_ok=True)
    assert (wins["genes"] == 2).all()


def test_a_gene_predicted_worse_than_by_chance_is_won_by_the_constant_map():
    wins = gene_wins(rows({("train_mean", None): np.full((2, 2), np.nan), ("a", None): -flat(0.1, 0.1)})[0])
    assert wins["wins"].tolist() == [2, 0]


def test_genes_with_a_lower_error_than_the_simple_rivals_are_counted():
    error = {"train_mean": 0.5, "ridge": 0.4, "a": 0.45}
    wins = gene_wins(rows({(model, None): flat(0.1, 0.2) for model in error}, mse=error)[0]).set_index("model")
    assert wins.loc["a", ["beats_train_mean", "beats_ridge"]].tolist() == [2, 0]
    assert wins.loc["ridge", "beats_train_mean"] == 2
    assert np.isnan(wins.loc["ridge", "beats_ridge"])
    without = gene_wins(rows({("a", None): flat(0.1, 0.2)})[0])
    assert without[["beats_train_mean", "beats_ridge"]].isna().all(axis=None)


def test_the_gap_is_published_minus_honest_averaged_as_an_evaluation_is():
    """One fold of 100 and 300 spots, MSE .2 and .6: pooled .5, in a second fold .3; mean .4. Published is .05 less."""
    _, honest = rows({("a", 0): flat(0.1, 0.1, 0.1), ("ridge", None): flat(0.1, 0.1, 0.1)}, ["P", "P", "Q"])
    honest["n_spots"], honest["mse"] = [100, 300, 50] * 2, [0.2, 0.6, 0.3] * 2
    published = honest[honest["model"] == "a"].assign(mse=lambda its: its["mse"] - 0.05)
    gap = selection_gap(published, honest)
    assert gap["model"].unique().tolist() == ["a"]
    assert gap["score"].tolist() == ["mse", "mae", "pcc_per_spot"]
    assert gap.iloc[0][["published", "honest", "gap"]].tolist() == pytest.approx([0.35, 0.4, -0.05])
    same = metrics.aggregate(rows({("a", 0): flat(0.1)})[0], honest[honest["model"] == "a"], resamples=1)
    assert gap.iloc[0]["honest"] == pytest.approx(same["mse"])


def test_a_gap_between_different_sections_or_models_is_refused():
    _, honest = rows({("a", 0): flat(0.1, 0.2), ("b", 0): flat(0.1, 0.2)})
    with pytest.raises(InputError, match="model a: .*seeds, folds or sections"):
        selection_gap(honest[honest["section"] == "P0-0"], honest)
    with pytest.raises(InputError, match="no model is in both"):
        selection_gap(honest[honest["model"] == "a"], honest[honest["model"] == "b"])
