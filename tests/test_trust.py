"""The trust card: colours by the lower end of a gene's skill, coverage from intervals that other folds made."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hifusion.trust import LeftOut, card, marks
from hifusion.trust_card import FILE, read_card
from views import make_view


@pytest.mark.parametrize(
    "low, coverage, mark",
    [(0.5, 0.9, "green"), (0.3, 0.9, "green"), (0.5, 0.5, "amber"), (0.2, 0.9, "amber"), (0.05, 0.9, "red")],
)
def test_colours_follow_the_lower_end_and_green_wants_coverage(low: float, coverage: float, mark: str) -> None:
    assert marks(np.array([low]), np.array([coverage])) == [mark]
    assert marks(np.array([np.nan]), np.array([0.9])) == ["red"]


def left_out(measured: np.ndarray, seed: int = 0, share: float = 0.0) -> LeftOut:
    """Predictions that hold so much of what was measured, and noise."""
    noise = np.random.default_rng(seed).normal(size=measured.shape)
    expression = share * measured + (1 - share) * noise
    return LeftOut(expression, np.ones(measured.shape), np.arange(len(measured)) % 4, np.ones(measured.shape[1]))


def test_a_gene_that_is_told_is_green_and_one_that_is_not_is_red() -> None:
    view = make_view("A1", 144)
    its = left_out(view.expression, share=0.9)
    its.expression[:, 1] = np.random.default_rng(1).normal(size=144)
    table = card([(view, np.arange(144))], view.genes, "log1p_cpm", {"known": its}).set_index("gene")
    assert table["trust"].tolist() == ["green", "red", "green"]
    assert (table["pcc_low"] <= table["pcc_per_gene"]).all() and (table["pcc_per_gene"] <= table["pcc_high"]).all()
    assert table["coverage_90"].between(0.8, 0.97).all()
    assert table["of_ceiling"].isna().all()  # no counts, no ceiling


@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_intervals_hold_nine_tenths_of_spots_like_those_they_were_made_from(seed: int, unit: float) -> None:
    """Whatever the unit of the expected error; new draws of the same errors."""
    random = np.random.default_rng(seed)
    errors = random.gamma(2.0, size=(400, 1))
    its = LeftOut(np.zeros((400, 1)), np.full((400, 1), unit), np.arange(400) % 4, np.ones(1))
    low, high = its.quantiles(errors) * unit
    again = random.gamma(2.0, size=(4000, 1))
    assert 0.8 < ((again >= low) & (again <= high)).mean() < 0.98
    assert abs(its.coverage(errors)[0] - 0.9) < 0.05


def test_widened_intervals_are_wider_by_that_much() -> None:
    errors = np.random.default_rng(0).normal(size=(100, 2))
    plain = LeftOut(np.zeros((100, 2)), np.ones((100, 2)), np.zeros(100), np.ones(2))
    wide = plain._replace(widened=np.array([2.0, 3.0]))
    np.testing.assert_allclose(wide.quantiles(errors), plain.quantiles(errors) * [2.0, 3.0])


def test_a_card_without_a_new_patient_knows_nothing_of_one(tmp_path: Path) -> None:
    assert read_card(tmp_path) is None
    own = pd.DataFrame({"gene": ["NA", "ERBB2"], "pcc_per_gene": [0.5, np.nan], "trust": ["green", "red"]})
    own.to_csv(tmp_path / FILE, index=False)
    assert read_card(tmp_path)["trust"].to_dict() == {"NA": "green", "ERBB2": "red"}  # a gene of that name is a gene
    new = read_card(tmp_path, known_patient=False)
    assert set(new["trust"]) == {"red"} and new["pcc_per_gene"].isna().all()
    own.assign(pcc_per_gene_new_patient=[0.2, 0.1], trust_new_patient=["amber", "red"]).to_csv(
        tmp_path / FILE, index=False
    )
    assert read_card(tmp_path, known_patient=False)["trust"].tolist() == ["amber", "red"]
    assert read_card(tmp_path)["trust"].tolist() == ["green", "red"]
