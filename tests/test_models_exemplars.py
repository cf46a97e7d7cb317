"""Retrieval against the published selection, whose spots it refuses, and its ties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import classics
from hifusion.errors import InputError
from hifusion.models.exemplars import nearest, nearest_exemplars


def test_selection_agrees_with_the_published_code(golden_root):
    """Candidates are given by their distances; the targets are scaled in mixed precision there, hence 1e-6."""
    fabricate, expected = classics.fabricator(golden_root), classics.figures(golden_root, "egn")
    inputs = fabricate.egn_retrieval_inputs(int(expected["seed"]))
    minus_distance, spot, slide = inputs["candidate"].T
    slides, spots = inputs["feature"].shape[:2]
    distance = np.full((1, slides * spots), np.inf)
    distance[0, (slide * spots + spot).astype(int)] = -minus_distance
    rows = nearest(torch.tensor(distance), len(expected["retrieved_feature"])).rows[0]
    feature = inputs["feature"].reshape(slides * spots, -1)[rows]
    np.testing.assert_allclose(feature, expected["retrieved_feature"], rtol=1e-8, atol=0)
    u = np.log10(1 + inputs["count"].reshape(slides * spots, -1)[:, inputs["keep"]])
    target = ((u - u.min(0)) / (u.max(0) - u.min(0) + 1e-8))[rows]
    np.testing.assert_allclose(target, expected["retrieved_target"], rtol=1e-6, atol=1e-6)


@given(
    owners=st.lists(st.sampled_from("abc"), min_size=12, max_size=12),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 5),
)
def test_each_query_has_the_nearest_spots_of_other_patients_whatever_the_chunk(owners, chunk, seed):
    feature = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed))
    fewest = min(12 - owners.count(owner) for owner in owners)
    if not fewest:
        with pytest.raises(InputError, match="a query has 0 spots of other patients"):
            nearest_exemplars(feature, owners, feature, owners, 1)
        return
    found = nearest_exemplars(feature, owners, feature, owners, fewest, chunk=chunk)
    for i, (rows, distance) in enumerate(zip(*found, strict=True)):
        away = {j: (feature[i] - feature[j]).norm().item() for j in range(12) if owners[j] != owners[i]}
        assert rows.tolist() == sorted(away, key=away.get)[:fewest][::-1]
        assert distance.tolist() == pytest.approx([away[j] for j in rows.tolist()], rel=1e-5)


def test_a_query_that_is_a_reference_spot_is_not_its_own_exemplar():
    feature = torch.tensor([[0.0], [0.0], [5.0], [0.1]])
    found = nearest_exemplars(feature[:1], ["p"], feature, ["p", "p", "q", "r"], 2)
    assert found.rows.tolist() == [[2, 3]] and found.distance[0].tolist() == pytest.approx([5.0, 0.1])


def test_equal_distances_go_by_index_and_nan_is_never_chosen():
    distance = torch.tensor([[1.0, 0.5, 1.0, 0.5, torch.nan, torch.inf]])
    assert nearest(distance, 3).rows.tolist() == [[0, 3, 1]]
    with pytest.raises(InputError, match="k: 5 exemplars are wanted, and a query has 4"):
        nearest(distance, 5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"feature": torch.zeros(2, 4)}, r"feature: shape is \(2, 4\); give \(Q, 3\)"),
        ({"feature": torch.zeros(0, 3), "patient": []}, "feature: it holds no query"),
        ({"patient": ["a"]}, "patient: 1 names for 2 features; give one for each"),
        ({"reference_patient": ["a"]}, "reference_patient: 1 names for 4 features"),
        ({"k": 0}, "k: 0 exemplars are wanted"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fits = {"feature": torch.zeros(2, 3), "patient": ["a", "b"], "reference_feature": torch.zeros(4, 3)}
    fits |= {"reference_patient": ["c"] * 4, "k": 2}
    with pytest.raises(InputError, match=message):
        nearest_exemplars(**(fits | change))
