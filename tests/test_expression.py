"""Panels are chosen by the rule that is named, normalisations are what their formulas say."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fabricate import lattice_section, refused
from hifusion.expression import (
    NORMALISATIONS,
    GenePanel,
    choose_panel,
    common_genes,
    log1p_cpm,
    log_share,
    normalisation,
    panel_counts,
    read_panel,
    sparse_log1p_cpm,
    total_counts,
)

COUNTS = arrays(np.int64, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 10**5))


def test_log_share_by_hand():
    """(0, 1, 2) with one added is (1, 2, 3) of 6."""
    share = log_share(np.array([[0, 1, 2]]), np.array([999.0]))
    np.testing.assert_allclose(share, np.log([[1 / 6, 1 / 3, 1 / 2]]), rtol=1e-6)
    assert share.dtype == np.float32


def test_log1p_cpm_by_hand():
    """1 of 4 counts is 250,000 per million; the total may hold genes outside the panel; an empty spot gives 0."""
    cpm = log1p_cpm(np.array([[1, 3], [1, 0], [0, 0]]), np.array([4.0, 1e6, 0.0]))
    np.testing.assert_allclose(cpm, np.log([[250_001, 750_001], [2, 1], [1, 1]]), rtol=1e-6)
    assert cpm.dtype == np.float32


@settings(max_examples=30)
@given(counts=COUNTS)
def test_shares_of_a_panel_add_up_to_one(counts):
    np.testing.assert_allclose(np.exp(log_share(counts, counts.sum(axis=1))).sum(axis=1), 1.0, rtol=1e-5)


@settings(max_examples=30)
@given(counts=COUNTS)
def test_sparse_log1p_cpm_equals_dense(counts):
    sparse = sparse_log1p_cpm(sp.csr_matrix(counts))
    np.testing.assert_array_equal(sparse.toarray(), log1p_cpm(counts, counts.sum(axis=1)))
    assert sparse.dtype == np.float32
    assert sparse.nnz == np.count_nonzero(counts)


def test_every_normalisation_says_what_it_means_and_others_are_refused():
    assert set(NORMALISATIONS) == {"log_share", "log1p_cpm"}
    assert all(normalisation(name).meaning for name in NORMALISATIONS)
    with refused("'log2'", "log_share, log1p_cpm"):
        normalisation("log2")


def _constant(section: str, spots: int, **counts: int):
    return lattice_section({gene: np.full(spots, value) for gene, value in counts.items()}, section)


def test_top_mean_is_the_mean_of_section_means_by_hand():
    """A: (10 + 0) / 2 = 5, B: (6 + 6) / 2 = 6, although A has most counts in all; C: 2."""
    sections = {"A1": _constant("A1", 30, A=10, B=6, C=2), "B1": _constant("B1", 6, A=0, B=6, C=2)}
    panel = choose_panel(sections, "top_mean", 3)
    assert panel == GenePanel(("B", "A", "C"), "top_mean", ("A1", "B1"))
    assert choose_panel(sections, "top_mean", 2).genes == ("B", "A")


def test_panel_is_chosen_among_genes_of_all_sections():
    sections = {"A1": _constant("A1", 6, MOST=99, B=3, C=5), "B1": _constant("B1", 6, C=5, B=3, OWN=50)}
    assert common_genes(sections) == ["B", "C"]
    assert choose_panel(sections, "top_mean", 2).genes == ("C", "B")
    with refused("panel_size=3", "2 genes are common"):
        choose_panel(sections, "top_mean", 3)


def test_genes_must_have_a_name_in_the_sections_to_be_predicted_and_nothing_else_of_these_counts():
    trained = {"one": _constant("one", 3, A=5, B=4, C=3)}
    tested = [_constant("two", 3, B=1, C=100)]
    assert choose_panel(trained, "top_mean", 2, tested).genes == ("B", "C")
    assert choose_panel(trained, "top_mean", 2).genes == ("A", "B")


@pytest.mark.parametrize("rule", ["top_mean", "highly_variable", "moran"])
def test_ties_go_by_gene_name(rule):
    values = np.arange(12)
    section = lattice_section(dict.fromkeys(("ZEB1", "ACTB", "MYC", "KRT8"), values))
    assert choose_panel({"A1": section}, rule, 4).genes == ("ACTB", "KRT8", "MYC", "ZEB1")


def _noise(rng: np.random.Generator, spots: int = 100) -> dict[str, np.ndarray]:
    return {f"NOISE{i:02d}": rng.poisson(mean, spots) for i, mean in enumerate(np.geomspace(0.5, 60, 40))}


def test_highly_variable_finds_the_gene_that_bursts():
    """BURST has the mean of many a gene, and ten times its variance; the gene of highest mean is not asked for."""
    rng = np.random.default_rng(0)
    sections = {
        name: lattice_section(_noise(rng) | {"BURST": rng.choice([0, 50], 100, p=[0.8, 0.2])}, name, columns=10)
        for name in ("A1", "A2")
    }
    assert choose_panel(sections, "highly_variable", 1).genes == ("BURST",)
    assert choose_panel(sections, "top_mean", 1).genes == ("NOISE39",)


def test_moran_finds_the_gene_that_follows_the_tissue():
    """HALF is high on the left half; SHUFFLED has the same counts in places drawn at random."""
    rng = np.random.default_rng(1)
    half = np.where(np.arange(100) % 10 < 5, 9, 1)
    genes = _noise(rng) | {"SHUFFLED": rng.permutation(half), "HALF": half}
    section = lattice_section(genes, columns=10)
    ranked = choose_panel({"A1": section}, "moran", len(genes)).genes
    assert ranked[0] == "HALF"
    assert ranked.index("SHUFFLED") > 5


@pytest.mark.parametrize("rule", ["top_mean", "highly_variable", "moran"])
def test_a_gene_never_counted_comes_last(rule):
    rng = np.random.default_rng(2)
    section = lattice_section({"ANEVER": np.zeros(36, int)} | {f"B{i}": rng.poisson(i + 1, 36) for i in range(8)})
    assert choose_panel({"A1": section}, rule, 9).genes[-1] == "ANEVER"


@pytest.mark.parametrize("counts", [{"B": 0, "A": 0}, {"B": 3, "A": 4}])
def test_too_few_genes_for_a_trend_are_ranked_by_name(counts):
    section = _constant("A1", 6, **counts)
    assert choose_panel({"A1": section}, "highly_variable", 2).genes == ("A", "B")


def test_the_rule_paper_is_top_mean_under_its_own_name():
    sections = {"A1": _constant("A1", 6, A=1, B=2), "B1": _constant("B1", 6, A=1, B=2)}
    assert choose_panel(sections, "paper", 2) == GenePanel(("B", "A"), "paper", ("A1", "B1"))


def test_impossible_panels_are_refused_in_one_line():
    sections = {"A1": _constant("A1", 6, A=1)}
    with refused("'best'", "top_mean, highly_variable, moran, paper"):
        choose_panel(sections, "best", 1)
    with refused("panel_size=0"):
        choose_panel(sections, "top_mean", 0)
    with refused("at least one section"):
        choose_panel({}, "top_mean", 1)
    with refused("empty"):
        GenePanel((), "file")
    with refused("MYC", "more than once"):
        GenePanel(("MYC", "ACTB", "MYC"), "file")


def test_gene_list_keeps_its_order_and_may_hold_comments(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_text("# breast\nERBB2\n\n  KRT19  # luminal\nCD74\n")
    assert read_panel(path) == GenePanel(("ERBB2", "KRT19", "CD74"), "file")


def test_unusable_gene_lists_are_refused_in_one_line(tmp_path):
    for name, content, why in [
        ("empty.txt", b"", "empty"),
        ("comments.txt", b"# none yet\n\n", "empty"),
        ("twice.txt", b"MYC\nACTB\nMYC\n", "MYC more than once"),
        ("bytes.txt", b"\xff\xfe", "cannot be read"),
    ]:
        (tmp_path / name).write_bytes(content)
        with refused(why):
            read_panel(tmp_path / name)
    with refused("none.txt", "cannot be read"):
        read_panel(tmp_path / "none.txt")


def test_saved_panel_comes_back_with_its_rule_and_sections(tmp_path):
    panel = GenePanel(("ERBB2", "HLA-DRA"), "moran", ("A1", "B1"))
    panel.save(tmp_path / "panel.json")
    assert GenePanel.load(tmp_path / "panel.json") == panel
    assert read_panel(tmp_path / "panel.json") == panel


def test_digest_tells_order_and_names_of_genes_alone():
    panel = GenePanel(("A", "B"), "file")
    assert panel.digest == GenePanel(("A", "B"), "paper", ("A1",)).digest
    assert len({panel.digest, GenePanel(("B", "A"), "file").digest, GenePanel(("AB",), "file").digest}) == 3


def test_edited_panel_is_refused(tmp_path):
    path = tmp_path / "panel.json"
    GenePanel(("A", "B"), "file").save(path)
    path.write_text(path.read_text().replace('"B"', '"C"'))
    with refused(str(path), "edited"):
        GenePanel.load(path)


@pytest.mark.parametrize(
    "stored", [[], {}, {"genes": ["A"], "rule": "file"}, {"genes": [1], "rule": "", "sections": []}]
)
def test_json_that_is_no_panel_is_refused(stored, tmp_path):
    (tmp_path / "panel.json").write_text(json.dumps(stored))
    with refused("panel.json", "not a gene panel"):
        GenePanel.load(tmp_path / "panel.json")


def test_panel_counts_and_totals_equal_the_dense_table():
    rng = np.random.default_rng(3)
    counts = {f"G{i}": rng.poisson(2, 12) for i in range(5)}
    section = lattice_section(counts)
    chosen = panel_counts(section, ["G3", "G0"])
    np.testing.assert_array_equal(chosen, np.stack([counts["G3"], counts["G0"]], axis=1))
    assert chosen.dtype == np.int32
    np.testing.assert_array_equal(total_counts(section), np.sum(list(counts.values()), axis=0))


def test_a_panel_gene_missing_in_a_section_is_named():
    section = _constant("B1", 6, A=1, B=2)
    with refused("section B1", "1 of the panel's 2 genes", "MYC"):
        panel_counts(section, ["A", "MYC"])


def test_a_section_without_counts_has_no_panel_counts():
    section = _constant("B1", 6, A=1)
    del section.layers["counts"]
    with refused("section B1", "'counts'"):
        panel_counts(section, ["A"])
