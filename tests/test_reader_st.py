"""ST-Net and ST tables: which spots, which patients, which gene names, which scale."""

import gzip

import numpy as np
import pandas as pd
import pytest

from fabricate import edit_table, refused, write_table
from fabricate_layouts import STAGGERED_MPP, count_rows, grid_spots, spot_rows, write_st_tables, write_stnet
from fabricate_truth import IDS, UNIQUE, counts_like, grid, grid_centres, write_slide
from hifusion.readers import find_reader, st_tables, stnet
from hifusion.readers.options import ReadOptions
from hifusion.readers.tables import read_symbols

NAME = "BC23209_C1"


@pytest.fixture
def he(tmp_path):
    write_stnet(tmp_path / "he")
    return tmp_path / "he"


@pytest.fixture
def mob(tmp_path):
    write_st_tables(tmp_path / "mob")
    return tmp_path / "mob"


def _read(reader, root, name, **told):
    return next(iter(reader.read(root, [name], ReadOptions(**told))))


def test_spots_without_a_pixel_position_lie_outside_the_tissue(he):
    """The count table has all spots of the array, the spot file those under tissue."""
    assert "1x1" in gzip.decompress((he / f"{NAME}_stdata.tsv.gz").read_bytes()).decode()
    assert "1x1" not in _read(stnet, he, NAME).obs_names


def test_metadata_names_files_and_patients(he):
    (he / "spots_BT23209_C1.csv.gz").rename(he / "elsewhere.csv.gz")
    write_slide(he / "scan.png")
    (he / "metadata.csv").write_text(
        "type,patient,replicate,histology_image,spot_coordinates,count_matrix,tumor_annotation\n"
        f"Luminal_A,BC0,C1,scan.png,elsewhere.csv.gz,{NAME}_stdata.tsv.gz,none.tsv\n"
    )
    section = _read(stnet, he, NAME)
    assert section.uns["hifusion"]["patient"] == "BC0"
    assert section.uns["hifusion"]["image"] == str((he / "scan.png").resolve())
    assert _read(stnet, he, "BC23377_D2").uns["hifusion"]["patient"] == "BC23377"


def test_metadata_of_another_kind_is_one_line(he):
    (he / "metadata.csv").write_text("patient\nBC0\n")
    with refused("metadata.csv", "lacks the columns count_matrix"):
        _read(stnet, he, NAME)


def test_letters_before_the_number_may_differ_but_not_the_number(he):
    write_slide(he / "HE_BT123209_C1.png")
    (he / "HE_BT23209_C1.png").unlink()
    assert _read(stnet, he, NAME).uns["hifusion"]["image"] == ""
    (he / "spots_BT23209_C1.csv.gz").rename(he / "spots_BT23209_C10.csv.gz")
    with refused("spots_BC23209_C1.csv.gz", "no such spotfile"):
        _read(stnet, he, NAME)


def test_two_images_of_a_section_are_refused(he):
    write_slide(he / "HE_BC23209_C1.tif")
    with refused("2 images", NAME):
        _read(stnet, he, NAME)


def test_spots_named_otherwise_are_one_line(he):
    path = he / "spots_BT23209_C1.csv.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"5x10", b"a place")))
    with refused("spots_BT23209_C1.csv.gz", "'a place'", "XxY"):
        _read(stnet, he, NAME)


def test_genes_are_named_by_a_table_that_lies_beside_them(he):
    write_table(he / "genes.tsv", [["gene_id", "gene_name"], [IDS[1], "TBCE"], [IDS[2], "TBCE"]])
    section = _read(stnet, he, NAME)
    assert list(section.var_names) == [IDS[0], "TBCE", "TBCE-1", *IDS[3:]]
    assert list(section.var["gene_ids"]) == list(IDS)


def test_a_gene_has_one_name_in_every_section_whatever_other_genes_it_has(tmp_path):
    """A symbol of two ids would otherwise go to whichever of them a section happens to have."""
    write_table(tmp_path / "genes.tsv", [["gene_id", "gene_name"], *map(list, zip(IDS, ["A"] * 6, strict=True))])
    assert read_symbols(tmp_path) == dict(zip(IDS, ["A", *(f"A-{i}" for i in range(1, 6))], strict=True))
    assert read_symbols(tmp_path / "nowhere") == {}


def test_spots_that_are_not_selected_are_left_out(mob):
    section = _read(st_tables, mob, "MOB1")
    table = pd.read_csv(mob / "alignment_table_MOB1.tsv", sep="\t")
    selected = table[table["selected"] == 1]
    assert list(section.obs_names) == [f"{x}x{y}" for x, y in zip(selected["x"], selected["y"], strict=True)]
    assert len(selected) == len(table) - 4


def test_depth_and_individual_come_from_the_metadata(mob):
    sections = list(st_tables.read(mob))
    assert [section.uns["hifusion"]["z"] for section in sections] == [100.0, 120.0]
    assert [section.uns["hifusion"]["patient"] for section in sections] == ["mouse0", "mouse1"]
    (mob / "metaData.csv").unlink()
    section = _read(st_tables, mob, "MOB1")
    assert section.uns["hifusion"]["patient"] == "MOB1" and "z" not in section.uns["hifusion"]
    (mob / "metaData.csv").write_text("samples,z\nC:\\counts\\MOB1.tsv,deep\n")
    with refused("metaData.csv", "z of MOB1", "'deep'"):
        _read(st_tables, mob, "MOB1")


def test_without_a_table_of_genes_ids_are_names(mob):
    assert tuple(_read(st_tables, mob, "MOB1").var_names) == UNIQUE
    (mob / "some_genes.tsv.gz").unlink()
    section = _read(st_tables, mob, "MOB1")
    assert tuple(section.var_names) == tuple(section.var["gene_ids"]) == IDS


def test_a_staggered_array_is_the_2k_array(mob):
    """66 columns x 63 rows over 6.2 mm x 6.6 mm (Stahl et al. 2016): neighbours are 142.9 um apart."""
    facts = _read(st_tables, mob, "MOB1").uns["hifusion"]
    assert facts["mpp"] == pytest.approx(STAGGERED_MPP)
    assert facts["pitch_um"] == pytest.approx(142.93, abs=0.01)
    assert facts["spot_diameter_um"] == 100


def test_a_square_array_has_spots_200_um_apart(tmp_path):
    write_table(tmp_path / "S1.tsv.gz", count_rows(grid_spots(), IDS, counts_like(len(grid()[0]), 0)))
    write_table(tmp_path / "alignment_table_S1.tsv", spot_rows(grid_centres()))
    assert find_reader(tmp_path) is st_tables
    facts = _read(st_tables, tmp_path, "S1").uns["hifusion"]
    assert (facts["mpp"], facts["pitch_um"]) == (pytest.approx(5.0), 200.0)


def test_an_array_of_other_proportions_is_refused_without_a_scale(mob):
    def stretch(rows):
        for row in rows[1:]:
            row[4] = str(float(row[4]) * 1.2)

    edit_table(mob / "alignment_table_MOB1.tsv", stretch)
    with refused("alignment_table_MOB1.tsv", "no known array", "--mpp"):
        _read(st_tables, mob, "MOB1")
    assert _read(st_tables, mob, "MOB1", mpp=4.4).uns["hifusion"]["mpp"] == 4.4


def test_tables_of_counts_may_be_plain(mob):
    zipped = _read(st_tables, mob, "MOB1")
    (mob / "MOB1.tsv").write_bytes(gzip.decompress((mob / "MOB1.tsv.gz").read_bytes()))
    (mob / "MOB1.tsv.gz").unlink()
    plain = _read(st_tables, mob, "MOB1")
    np.testing.assert_array_equal(plain.layers["counts"].toarray(), zipped.layers["counts"].toarray())


def test_no_spot_selected_is_refused(mob):
    edit_table(mob / "alignment_table_MOB1.tsv", lambda rows: [row.__setitem__(6, "0") for row in rows[1:]])
    with refused("alignment_table_MOB1.tsv", "only 0 spots"):
        _read(st_tables, mob, "MOB1")
