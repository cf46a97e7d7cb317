"""A cohort shows the same data through the same panel, from a raw folder as from a store."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fabricate import (
    GENES,
    MPP,
    N_SPOTS,
    PITCH_PX,
    SECTIONS,
    WITHOUT_IMAGE,
    centres_of,
    counts_file,
    counts_of,
    edit_table,
    image_file,
    refused,
    write_her2st,
)
from hifusion import files
from hifusion.cohort import Cohort
from hifusion.expression import GenePanel, log_share
from hifusion.protocols import SectionInfo
from hifusion.readers import her2st
from hifusion.store import prepare

PANEL = GenePanel(("GENE29", "GENE03", "GENE17"), "file")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A raw folder, and a store of it."""
    folder = tmp_path_factory.mktemp("cohort")
    raw = write_her2st(folder / "study")
    prepare(her2st.read(raw), folder / "store", region_px=32)
    return raw, folder / "store"


@pytest.fixture(scope="module")
def raw(roots):
    return Cohort.open(roots[0])


@pytest.fixture(scope="module")
def stored(roots):
    return Cohort.open(roots[1])


@pytest.mark.parametrize("normalisation", ["log_share", "log1p_cpm"])
def test_raw_folder_and_store_give_the_same_views_but_for_regions(normalisation, raw, stored):
    assert list(raw.sections) == list(stored.sections) == list(SECTIONS)
    views = [cohort.views(SECTIONS, PANEL, normalisation) for cohort in (raw, stored)]
    for one, other in zip(*views, strict=True):
        assert one.regions is None and one.inside is None
        for field in dataclasses.fields(one):
            if field.name not in ("regions", "inside", "image", "image_digest", "cache"):
                np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_view_by_hand(stored):
    view = stored.view("B1", PANEL, "log_share")
    counts = counts_of("B1")
    np.testing.assert_array_equal(view.expression, log_share(counts[:, [29, 3, 17]], counts.sum(axis=1)))
    np.testing.assert_array_equal(view.total_counts, counts.sum(axis=1))
    np.testing.assert_array_equal(view.centres_px, centres_of("B1"))
    assert (view.name, view.patient, view.genes) == ("B1", "B", PANEL.genes)
    assert view.expression.dtype == np.float32 and view.total_counts.dtype == np.float64
    assert view.pitch_px == pytest.approx(PITCH_PX) and view.mpp == pytest.approx(MPP)
    assert view.regions.shape == (N_SPOTS, 32, 32, 3) and isinstance(view.regions, np.memmap)
    assert view.inside.shape == (N_SPOTS, 4)
    np.testing.assert_array_equal(view.counts, counts[:, [29, 3, 17]])
    section = stored.sections["B1"]
    np.testing.assert_array_equal(view.array, section.obs[["array_col", "array_row"]])
    assert view.image == Path(section.uns["hifusion"]["image"]) and len(view.image_digest) == 64
    assert view.cache == stored.root / "cache"


def test_infos_image_digests_and_regions_of_a_store(roots, raw, stored):
    assert stored.infos == raw.infos == [SectionInfo(name, name[0]) for name in SECTIONS]
    with_image = [name for name in SECTIONS if name != WITHOUT_IMAGE]
    assert stored.image_digests == {name: files.digest_file(image_file(roots[0], name)) for name in with_image}
    assert [name for name in SECTIONS if stored.has_regions(name)] == with_image
    assert stored.view(WITHOUT_IMAGE, PANEL, "log_share").regions is None
    assert raw.image_digests == {} and not raw.has_regions("A1")


@pytest.mark.parametrize("which", [0, 1])
def test_chosen_sections_are_opened_in_the_order_asked_for(which, roots):
    assert list(Cohort.open(roots[which], ["B1", "A2"]).sections) == ["B1", "A2"]


@pytest.mark.parametrize("which", [0, 1])
def test_unknown_section_is_named_with_those_there_are(which, roots):
    with refused(str(roots[which]), "has no section Z9", "A1, A2, B1, B2"):
        Cohort.open(roots[which], ["A1", "Z9"])


def test_what_is_neither_store_nor_known_layout_is_refused(tmp_path):
    with refused("nowhere", "no such file or folder", "hifusion prepare"):
        Cohort.open(tmp_path / "nowhere")
    with refused(str(tmp_path), "no known data layout"):
        Cohort.open(tmp_path)
    for folder in ("ST-cnts", "ST-spotfiles"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    with refused(str(tmp_path), "holds no section"):
        Cohort.open(tmp_path)


def test_damaged_store_is_refused_unless_told_not_to_look(tmp_path):
    raw = write_her2st(tmp_path / "study")
    out = prepare(her2st.read(raw, ["A1"]), tmp_path / "store", region_px=32).root
    path = out / "regions" / "A1.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with refused(str(path), "was changed"):
        Cohort.open(out)
    assert list(Cohort.open(out, verify=False).sections) == ["A1"]


def test_panel_paper_uses_all_sections_and_other_rules_only_the_given(tmp_path):
    """GENE00 is made the strongest gene in B1 and B2 alone."""
    root = write_her2st(tmp_path / "study")
    for name in ("B1", "B2"):
        edit_table(counts_file(root, name), lambda rows: [row.__setitem__(1, "500") for row in rows[1:]])
    cohort = Cohort.open(root)
    training = cohort.panel("top_mean", 3, ["A1", "A2"])
    assert "GENE00" not in training.genes and training.sections == ("A1", "A2")
    paper = cohort.panel("paper", 3, ["A1", "A2"])
    assert paper.genes[0] == "GENE00" and paper.sections == SECTIONS and paper.rule == "paper"


def test_panel_may_be_a_file_or_a_saved_panel(stored, tmp_path):
    (tmp_path / "genes.txt").write_text("GENE05\nGENE01\n")
    assert stored.panel(str(tmp_path / "genes.txt"), 250, ["A1"]) == GenePanel(("GENE05", "GENE01"), "file")
    chosen = stored.panel("moran", 4, ["A1"])
    chosen.save(tmp_path / "panel.json")
    assert stored.panel(str(tmp_path / "panel.json"), 250, ["B1"]) == chosen
    (tmp_path / "named_without_suffix").write_text("GENE07\n")
    assert stored.panel(str(tmp_path / "named_without_suffix"), 250, ["A1"]).genes == ("GENE07",)


def test_unusable_panels_are_one_line(stored, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with refused("empty.txt", "empty"):
        stored.panel(str(tmp_path / "empty.txt"), 250, ["A1"])
    with refused("gone.txt", "cannot be read"):
        stored.panel(str(tmp_path / "gone.txt"), 250, ["A1"])
    with refused("'top_men'", "top_mean"):
        stored.panel("top_men", 250, ["A1"])
    with refused(f"panel_size={len(GENES) + 1}"):
        stored.panel("top_mean", len(GENES) + 1, ["A1"])


def test_panel_gene_missing_in_a_section_is_named(stored):
    with refused("section A1", "MYC"):
        stored.view("A1", GenePanel(("GENE00", "MYC"), "file"), "log_share")


def test_unknown_normalisation_is_refused(stored):
    with refused("'log2'", "log_share, log1p_cpm"):
        stored.view("A1", PANEL, "log2")
