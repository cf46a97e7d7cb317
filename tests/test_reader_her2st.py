"""The her2st reader gives the published facts of the real data, and refuses damaged folders in one line."""

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fabricate import (
    GENES,
    MPP,
    N_SPOTS,
    PITCH_PX,
    SECTIONS,
    centres_of,
    counts_file,
    counts_of,
    edit_table,
    image_file,
    image_of,
    refused,
    spotfile,
    spots_of,
    write_her2st,
    write_table,
)
from hifusion.errors import InputError
from hifusion.expression import choose_panel, common_genes, total_counts
from hifusion.readers import find_reader, her2st
from hifusion.section import validate_section


@pytest.fixture
def root(tmp_path):
    return write_her2st(tmp_path / "study")


def _read(root, name):
    return next(her2st.read(root, [name]))


def test_layout_is_recognised_and_names_are_sorted(root, tmp_path):
    assert find_reader(root) is her2st
    assert her2st.names(root) == list(SECTIONS)
    with refused(str(tmp_path), "no known data layout", "ST-cnts"):
        find_reader(tmp_path)
    with refused("nowhere", "no such file or folder"):
        find_reader(tmp_path / "nowhere")


def test_sections_hold_what_the_files_hold(root):
    for section, name in zip(her2st.read(root), SECTIONS, strict=True):
        validate_section(section)
        np.testing.assert_array_equal(section.layers["counts"].toarray(), counts_of(name))
        np.testing.assert_array_equal(section.obsm["spatial"], centres_of(name))
        assert list(section.obs_names) == [f"{x}x{y}" for x, y in spots_of(name)]
        assert list(section.var_names) == list(GENES)
        assert list(zip(section.obs["array_col"], section.obs["array_row"], strict=True)) == spots_of(name)
        assert section.uns["hifusion"]["section"] == name and section.uns["hifusion"]["patient"] == name[0]


def test_scale_comes_from_the_spot_pitch_and_the_dpi_tag_is_ignored(root):
    """The images say 72 dpi, which would be 353 um per pixel; the spots are 200 um and 72 px apart."""
    section = _read(root, "A1")
    assert Image.open(image_file(root, "A1")).info["dpi"] == (72, 72)
    assert section.uns["hifusion"]["mpp"] == pytest.approx(MPP)
    scales = section.uns["spatial"]["A1"]["scalefactors"]
    assert scales["spot_diameter_fullres"] == pytest.approx(PITCH_PX / 2)


def test_section_with_an_image_names_it_and_carries_a_picture(root):
    section = _read(root, "A1")
    assert section.uns["hifusion"]["image"] == str(image_file(root, "A1").resolve())
    picture = section.uns["spatial"]["A1"]["images"]["hires"]
    assert picture.shape == image_of("A1").shape and picture.dtype == np.uint8
    assert np.abs(picture.astype(int) - image_of("A1")).mean() < 5


def test_section_without_an_image_is_counts_only(root):
    section = _read(root, "B2")
    assert section.uns["hifusion"]["image"] == ""
    assert section.uns["spatial"]["B2"]["images"] == {}
    assert section.n_obs == N_SPOTS


def test_an_image_converted_to_another_format_is_found(root):
    Image.open(image_file(root, "A1")).save(image_file(root, "A1").with_suffix(".TIF"))
    image_file(root, "A1").unlink()
    assert _read(root, "A1").uns["hifusion"]["image"].endswith("A1_HE.TIF")


def test_spotfile_rows_without_counts_are_dropped(root):
    edit_table(spotfile(root, "A1"), lambda rows: rows.insert(3, ["50", "60", "50", "60", "2.0", "3.0", "1"]))
    section = _read(root, "A1")
    assert "50x60" not in section.obs_names
    np.testing.assert_array_equal(section.obsm["spatial"], centres_of("A1"))
    assert section.uns["hifusion"]["mpp"] == pytest.approx(MPP)


def test_order_of_spotfile_rows_does_not_matter(root):
    edit_table(spotfile(root, "A1"), lambda rows: rows.append(rows.pop(1)))
    np.testing.assert_array_equal(_read(root, "A1").obsm["spatial"], centres_of("A1"))


def test_lines_may_end_as_windows_ends_them(root):
    for path in (counts_file(root, "A1"), spotfile(root, "A1")):
        data = path.read_bytes()
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(gzip.decompress(data).replace(b"\n", b"\r\n")))
        else:
            path.write_bytes(data.replace(b"\n", b"\r\n"))
    section = _read(root, "A1")
    assert section.var_names[-1] == GENES[-1]
    np.testing.assert_array_equal(section.layers["counts"].toarray(), counts_of("A1"))


def test_unknown_section_is_named(root):
    with refused("Z9.tsv.gz", "no such count table"):
        _read(root, "Z9")


def _swap_spotfiles(root):
    spotfile(root, "A1").write_bytes(spotfile(root, "A2").read_bytes())


def _repeat_row(path):
    edit_table(path, lambda rows: rows.append(rows[1]))


def _set_cell(path, row, column, value):
    edit_table(path, lambda rows: rows[row].__setitem__(column, value))


def _cut(path, part=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


BAD_COUNTS = {
    "duplicate spot": (_repeat_row, ["1 spots", "9x9", "unique"]),
    "duplicate gene": (lambda path: _set_cell(path, 0, 4, "GENE00"), ["1 genes", "GENE00", "unique"]),
    "empty count": (lambda path: _set_cell(path, 2, 4, ""), ["NaN", "spot 10x9"]),
    "NaN": (lambda path: _set_cell(path, 2, 4, "NaN"), ["NaN", "spot 10x9"]),
    "infinite": (lambda path: _set_cell(path, 2, 4, "inf"), ["infinite", "spot 10x9"]),
    "negative": (lambda path: _set_cell(path, 2, 4, "-3"), ["negative", "spot 10x9"]),
    "fractional": (lambda path: _set_cell(path, 2, 4, "1.5"), ["fractional", "before any normalisation"]),
    "not a number": (lambda path: _set_cell(path, 2, 4, "many"), ["GENE03", "not numbers"]),
    "too large": (lambda path: _set_cell(path, 2, 4, "3000000000"), ["above 2^31", "spot 10x9"]),
    "truncated gzip": (_cut, ["cannot be read as a gzipped count table"]),
    "damaged gzip": (_flip, ["cannot be read as a gzipped count table"]),
    "no gzip": (lambda path: path.write_bytes(b"words"), ["cannot be read as a gzipped count table"]),
    "empty": (lambda path: path.write_bytes(gzip.compress(b"")), ["cannot be read as a gzipped count table"]),
    "header only": (lambda path: edit_table(path, lambda rows: rows.__delitem__(slice(1, None))), ["cannot be read"]),
    "wide header": (lambda path: edit_table(path, lambda rows: rows[0].append("MYC")), ["31 genes", "30 values"]),
    "narrow header": (lambda path: edit_table(path, lambda rows: rows[0].pop()), ["29 genes", "30 values"]),
    "wide row": (lambda path: edit_table(path, lambda rows: rows[5].append("1")), ["line 5, saw 32"]),
    "narrow row": (lambda path: edit_table(path, lambda rows: rows[5].pop()), ["NaN"]),
}


@pytest.mark.parametrize("case", BAD_COUNTS)
def test_bad_count_table_is_refused(case, root):
    spoil, words = BAD_COUNTS[case]
    spoil(counts_file(root, "A1"))
    with refused(str(counts_file(root, "A1")), *words):
        _read(root, "A1")


def _mirror(path):
    """Pixel x falls where array x grows."""
    edit_table(path, lambda rows: [row.__setitem__(4, str(400 - float(row[4]))) for row in rows[1:]])


BAD_SPOTFILES = {
    "of another section": (lambda path: _swap_spotfiles(path.parents[2]), ["22 spots", "of the same section"]),
    "missing": (lambda path: path.unlink(), ["no such spotfile"]),
    "no table": (lambda path: path.write_bytes(b"\xff\xfe\x00"), ["cannot be read as a spotfile"]),
    "empty": (lambda path: path.write_bytes(b""), ["cannot be read as a spotfile"]),
    "ragged": (lambda path: edit_table(path, lambda rows: rows[5].extend("123")), ["cannot be read as a spotfile"]),
    "no pixels": (lambda path: _set_cell(path, 0, 4, "u"), ["lacks the columns pixel_x", "it has x, y"]),
    "empty position": (lambda path: _set_cell(path, 3, 5, ""), ["empty or not a number"]),
    "position in words": (lambda path: _set_cell(path, 3, 5, "left"), ["empty or not a number"]),
    "duplicate spot": (_repeat_row, ["spot 9x9", "more than once"]),
    "mirrored": (_mirror, ["do not grow", "mirrored"]),
}


@pytest.mark.parametrize("case", BAD_SPOTFILES)
def test_bad_spotfile_is_refused(case, root):
    spoil, words = BAD_SPOTFILES[case]
    spoil(spotfile(root, "A1"))
    with refused(str(spotfile(root, "A1")), *words):
        _read(root, "A1")


def test_counts_of_spots_without_positions_are_refused(root):
    edit_table(spotfile(root, "A1"), lambda rows: rows.__delitem__(slice(1, 6)))
    with refused(str(spotfile(root, "A1")), "only 21 spots", "(of 26)"):
        _read(root, "A1")


def test_bad_images_are_refused(root):
    path = image_file(root, "A1")
    Image.new("RGB", (9, 9)).save(path.with_name("other.png"))
    with refused(str(path.parent), "2 images", "section A1"):
        _read(root, "A1")
    path.with_name("other.png").unlink()
    _cut(path)
    with refused(str(path), "not a readable image"):
        _read(root, "A1")
    path.write_text("words")
    with refused(str(path), "not a readable image"):
        _read(root, "A1")


@pytest.fixture(scope="module")
def damaged_root(tmp_path_factory):
    return write_her2st(tmp_path_factory.mktemp("fuzz") / "study")


@settings(max_examples=40)
@given(which=st.sampled_from([counts_file, spotfile]), text=st.text('019x.-\t\n\r#" eNa', max_size=60), data=st.data())
def test_any_text_in_a_table_is_read_or_refused_in_one_line(which, text, data, damaged_root):
    path = which(damaged_root, "B2")
    intact = path.read_bytes()
    table = intact if which is spotfile else gzip.decompress(intact)
    at = data.draw(st.integers(0, len(table)))
    table = table[:at] + text.encode() + table[at:]
    path.write_bytes(table if which is spotfile else gzip.compress(table, 1))
    message = "read"
    try:
        validate_section(_read(damaged_root, "B2"))
    except InputError as error:
        message = str(error)
    finally:
        path.write_bytes(intact)
    assert message and "\n" not in message


@pytest.fixture(scope="module")
def real_c2(her2st_root):
    return _read(her2st_root, "C2")


@pytest.mark.real
def test_real_c2_has_its_published_scale_spots_and_image(real_c2):
    section = real_c2
    assert section.shape == (187, 15706)
    assert section.uns["hifusion"]["mpp"] == pytest.approx(0.688, abs=0.001)
    assert section.uns["hifusion"]["image"].endswith("5714_HE_BT_C2.jpg")
    assert np.median(total_counts(section)) == 8508
    assert section.uns["spatial"]["C2"]["images"]["hires"].shape == (1000, 936, 3)
    first = section.obsm["spatial"][list(section.obs_names).index("25x13")]
    np.testing.assert_allclose(first, [6930.58, 3510.24])


@pytest.mark.real
def test_real_a1_has_the_larger_pixels_and_no_image(her2st_root):
    section = _read(her2st_root, "A1")
    assert section.n_obs == 346  # its spotfile has 348 rows
    assert section.uns["hifusion"]["mpp"] == pytest.approx(0.92, abs=0.005)
    assert section.uns["hifusion"]["image"] == ""


@pytest.mark.real
def test_real_spots_are_dark_where_counts_are_many(real_c2):
    """Rank correlation of darkness and counts on C2 as published (.54): axes are neither swapped nor mirrored (.30)."""
    section = real_c2
    picture = section.uns["spatial"]["C2"]["images"]["hires"].mean(axis=2)
    scale = section.uns["spatial"]["C2"]["scalefactors"]["tissue_hires_scalef"]
    column, row = np.rint(section.obsm["spatial"] * scale).astype(int).T
    darkness = [-picture[r - 12 : r + 13, c - 12 : c + 13].mean() for r, c in zip(row, column, strict=True)]
    counts = total_counts(section)
    ranks = [np.argsort(np.argsort(values)) for values in (darkness, counts)]
    assert np.corrcoef(ranks)[0, 1] > 0.45


@pytest.mark.real
def test_real_folder_has_36_sections_of_8_patients_and_11871_common_genes(her2st_root):
    names = her2st.names(her2st_root)
    assert len(names) == 36
    assert {name[0] for name in names} == set("ABCDEFGH")
    genes = []
    for name in names:
        with gzip.open(counts_file(her2st_root, name), "rt") as file:
            genes.append(set(file.readline().rstrip("\n").split("\t")[1:]))
    assert len(set.intersection(*genes)) == 11_871


@pytest.mark.real
@pytest.mark.slow
def test_all_real_sections_have_the_published_spots_genes_images_and_paper_panel(her2st_root):
    sections = {section.uns["hifusion"]["section"]: section for section in her2st.read(her2st_root)}
    assert sum(section.n_obs for section in sections.values()) == 13_620
    assert len(common_genes(sections)) == 11_871
    images = {name: section.uns["hifusion"]["image"] for name, section in sections.items()}
    assert [name for name, image in images.items() if image] == ["B4", "C2", "C3", "C4", "C5"]
    for name, section in sections.items():
        assert section.uns["hifusion"]["mpp"] == pytest.approx(0.918 if name[0] == "A" else 0.688, abs=0.004)
    panel = choose_panel(sections, "paper", 250)
    assert panel.genes[:3] == ("IGKC", "TMSB10", "ERBB2")
    assert panel.sections == tuple(sections) and len(panel.genes) == 250


def _label(root, name, rows):
    """Write a table of labels as the pathologists' are: `rows` are (x, y, label)."""
    path = root / "data" / "ST-pat" / "lbl" / f"{name}_labeled_coordinates.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = ["Row.names", "x", "y", "pixel_x", "pixel_y", "label"]
    write_table(path, [head, *([f"row{i}", x, y, "1.5", "2.5", label] for i, (x, y, label) in enumerate(rows))])
    return path


def test_labels_join_on_rounded_positions_and_rows_without_one_are_passed_over(root):
    (x0, y0), (x1, y1), (x2, y2) = spots_of("A1")[:3]
    rows = [(f"{x1 + 0.29}", f"{y1 - 0.2}", "adipose tissue"), (f"{x0 - 0.01}", f"{y0 + 0.2}", "invasive cancer")]
    _label(root, "A1", [*rows, ("NA", "", "immune infiltrate"), (f"{x2}", f"{y2}", "")])
    labels = _read(root, "A1").obs["label"]
    assert labels.iloc[:2].tolist() == ["invasive cancer", "adipose tissue"]
    assert labels.iloc[2:].isna().all()
    assert "label" not in _read(root, "A2").obs


def test_labels_of_another_section_are_refused_and_so_is_a_spot_with_two(root):
    x, y = map(str, spots_of("A1")[0])
    _label(root, "A1", [(x, y, "a"), ("90", "90", "b")])
    with refused("A1_labeled_coordinates.tsv", "1 of 2 labelled spots"):
        _read(root, "A1")
    _label(root, "A1", [(x, y, "a"), (f"{x}.2", y, "b")])
    with refused("A1_labeled_coordinates.tsv", f"spot {x}x{y} is labelled more than once"):
        _read(root, "A1")


# Rows of each file whose rounded place is a counted spot: 348 rows of A1 less two spots without counts, 177 of C1 less
# one, 309 of D1 less three; 692 rows of F1 less one without x and y, 475 of G2 less eight such; else all.
LABELLED = {"A1": 346, "B1": 295, "C1": 176, "D1": 306, "E1": 587, "F1": 691, "G2": 467, "H1": 613}


@pytest.mark.real
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("A1", "G2") else pytest.mark.slow) for name in LABELLED]
)
def test_real_labels_are_all_joined(her2st_root, name):
    """G2 has rows without x and y, A1 spots without counts; the other six are read among the slow tests."""
    assert int(_read(her2st_root, name).obs["label"].notna().sum()) == LABELLED[name]


@pytest.mark.real
def test_a_real_section_nobody_labelled_has_no_column(her2st_root):
    assert "label" not in _read(her2st_root, "B4").obs
