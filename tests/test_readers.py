"""What holds for every reader: the layout is known, the truth comes back, options win, damage is told in one line."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fabricate import refused
from fabricate_layouts import LAYOUTS
from fabricate_truth import SIZE_PX, write_slide
from hifusion.errors import InputError
from hifusion.readers import READERS, find_reader
from hifusion.readers.options import ReadOptions
from hifusion.section import validate_section

pytestmark = pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Layout name -> its root and truth, written once; nothing may change it."""
    made = {}

    def of(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name) / "study"
            made[name] = root, LAYOUTS[name].write(root)
        return made[name]

    return of


@pytest.fixture
def copied(intact, tmp_path):
    """A copy of a layout's folder that a test may damage."""

    def of(name):
        return Path(shutil.copytree(intact(name)[0], tmp_path / name))

    return of


def _options(layout, **told):
    return replace(ReadOptions(bin_um=LAYOUTS[layout].bin_um), **told)


def _read(layout, root, name=None, **told):
    name = name or LAYOUTS[layout].needed_by
    return next(iter(READERS[layout].read(root, [name], _options(layout, **told))))


def test_every_reader_has_a_layout_made_by_code():
    assert list(LAYOUTS) and set(LAYOUTS) == set(READERS)


@pytest.mark.parametrize("layout", READERS)
def test_layout_is_known_by_its_reader_first_and_names_are_sorted(layout, intact):
    root, truths = intact(layout)
    assert find_reader(root) is READERS[layout]
    assert READERS[layout].names(root) == sorted(truths)


@pytest.mark.parametrize("layout", READERS)
def test_section_is_the_truth(layout, intact):
    root, truths = intact(layout)
    sections = list(READERS[layout].read(root, None, _options(layout)))
    assert [section.uns["hifusion"]["section"] for section in sections] == sorted(truths)
    for section in sections:
        name = section.uns["hifusion"]["section"]
        truth = truths[name]
        validate_section(section)
        assert list(section.obs_names) == truth.spots
        np.testing.assert_allclose(section.obsm["spatial"], truth.centres, atol=0.01)
        np.testing.assert_array_equal(section.layers["counts"].toarray(), truth.counts)
        assert tuple(section.var_names) == truth.genes
        assert truth.gene_ids is None or tuple(section.var["gene_ids"]) == truth.gene_ids
        facts = section.uns["hifusion"]
        assert facts["mpp"] == pytest.approx(truth.mpp, rel=1e-4)
        assert facts["pitch_um"] == pytest.approx(truth.pitch_um, rel=1e-4)
        assert facts["patient"] == truth.patient
        assert bool(facts["image"]) is truth.has_image
        assert section.obs["in_tissue"].all()


@pytest.mark.parametrize("layout", READERS)
def test_first_spot_of_the_files_is_kept(layout, intact):
    """Reading a headless table as if it had a header loses one spot: the first."""
    root, truths = intact(layout)
    name = LAYOUTS[layout].needed_by
    section = _read(layout, root)
    assert section.obs_names[0] == truths[name].spots[0]
    assert section.n_obs == len(truths[name].spots)


@pytest.mark.parametrize("layout", READERS)
def test_array_columns_run_along_x_or_y_as_pixels_do(layout, intact):
    """Array and pixels are one affine map: a column swapped with a row would not fit."""
    section = _read(layout, intact(layout)[0])
    design = np.column_stack([section.obs["array_col"], section.obs["array_row"], np.ones(section.n_obs)])
    left = np.linalg.lstsq(design, section.obsm["spatial"], rcond=None)[1]
    assert left.sum() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("layout", READERS)
def test_patients_option_stands_before_the_layout(layout, intact):
    root, truths = intact(layout)
    name, other = LAYOUTS[layout].needed_by, next(n for n in truths if n != LAYOUTS[layout].needed_by)
    assert _read(layout, root, patients={name: "P7"}).uns["hifusion"]["patient"] == "P7"
    assert _read(layout, root, other, patients={name: "P7"}).uns["hifusion"]["patient"] == truths[other].patient


@pytest.mark.parametrize("layout", READERS)
def test_mpp_option_stands_before_the_layout(layout, intact):
    section = _read(layout, intact(layout)[0], mpp=1.25)
    assert section.uns["hifusion"]["mpp"] == 1.25
    scale = section.uns["spatial"][section.uns["hifusion"]["section"]]["scalefactors"]["spot_diameter_fullres"]
    assert scale == pytest.approx(section.uns["hifusion"]["spot_diameter_um"] / 1.25)


@pytest.mark.parametrize("layout", READERS)
def test_images_option_stands_before_the_layout(layout, intact, tmp_path):
    root, truths = intact(layout)
    slide = write_slide(tmp_path / "told.png")
    section = _read(layout, root, images={LAYOUTS[layout].needed_by: slide})
    assert section.uns["hifusion"]["image"] == str(slide.resolve())
    np.testing.assert_allclose(section.obsm["spatial"], truths[LAYOUTS[layout].needed_by].centres, atol=0.01)
    entry = section.uns["spatial"][LAYOUTS[layout].needed_by]
    np.testing.assert_array_equal(entry["images"]["hires"], np.asarray(Image.open(slide)))
    with refused("nowhere.png", "no such image"):
        _read(layout, root, images={LAYOUTS[layout].needed_by: tmp_path / "nowhere.png"})


@pytest.mark.parametrize("layout", READERS)
def test_picture_has_the_scale_of_the_slide(layout, intact):
    section = _read(layout, intact(layout)[0])
    entry = section.uns["spatial"][LAYOUTS[layout].needed_by]
    if entry["images"]:
        height, width = entry["images"]["hires"].shape[:2]
        scale = entry["scalefactors"]["tissue_hires_scalef"]
        assert (width / scale, height / scale) == pytest.approx(SIZE_PX, rel=0.01)
    assert bool(entry["images"]) == (layout != "anndata")


@pytest.mark.parametrize("layout", READERS)
def test_unknown_section_is_named(layout, intact):
    with refused("Z9"):
        _read(layout, intact(layout)[0], "Z9")


def test_a_folder_without_a_layout_says_what_each_reader_missed(tmp_path):
    with refused("no known data layout", *(f"{layout}: needs " for layout in READERS)):
        find_reader(tmp_path)
    (tmp_path / "file.txt").write_text("words")
    with refused("no known data layout", *(f"{layout}: needs " for layout in READERS)):
        find_reader(tmp_path / "file.txt")
    with refused("format 'xenium' is unknown", "visium_hd"):
        find_reader(tmp_path, "xenium")


NEEDED = [(layout, file) for layout, made in LAYOUTS.items() for file in made.needed]


@pytest.mark.parametrize("layout, file", NEEDED)
@pytest.mark.parametrize("damage", ["gone", "words", "half", "empty"])
def test_a_damaged_file_is_one_line(layout, file, damage, copied):
    root = copied(layout)
    path, whole = root / file, (root / file).read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"words": b"some words\n", "half": whole[: len(whole) // 2], "empty": b""}[damage])
    with refused(str(root)):
        find_reader(root, layout)
        _read(layout, root)


BAD_COUNTS = {"negative": -1.0, "fractional": 0.5, "NaN": np.nan}


@pytest.mark.parametrize("layout", READERS)
@pytest.mark.parametrize("what", BAD_COUNTS)
def test_values_that_are_no_counts_are_one_line(layout, what, tmp_path):
    def spoil(counts):
        counts = counts.astype(float)
        counts[2, 3] = BAD_COUNTS[what]
        return counts

    LAYOUTS[layout].write(tmp_path / "study", counts=spoil)
    with refused(str(tmp_path), what, "whole numbers >= 0"):
        _read(layout, tmp_path / "study")


@pytest.mark.parametrize("layout", READERS)
def test_a_section_of_zeros_is_one_line(layout, tmp_path):
    LAYOUTS[layout].write(tmp_path / "study", counts=lambda counts: 0 * counts)
    if layout == "stnet":  # its table has counts off the tissue
        with refused("all counts", "are zero"):
            _read(layout, tmp_path / "study")
        return
    with refused(str(tmp_path), "all counts", "are zero"):
        _read(layout, tmp_path / "study")


@pytest.mark.parametrize("layout", READERS)
def test_a_spot_that_stands_twice_is_one_line(layout, tmp_path):
    LAYOUTS[layout].write(tmp_path / "study", spots=lambda spots: [spots[0], spots[0], *spots[2:]])
    with refused(str(tmp_path), "more than once"):
        _read(layout, tmp_path / "study")


@pytest.mark.parametrize("layout", ["visium", "visium_hd", "her2st", "stnet", "st_tables"])
def test_spots_of_another_section_are_one_line(layout, tmp_path):
    LAYOUTS[layout].write(tmp_path / "study", spots=lambda spots: [f"9{spot}" for spot in spots])
    with refused(str(tmp_path), "give the two files of"):
        _read(layout, tmp_path / "study")


@pytest.mark.parametrize("layout", READERS)
def test_nothing_but_one_line_comes_of_any_flipped_byte(layout, copied):
    """Each needed file with one byte changed, in eight places: read or refused, never a traceback."""
    root = copied(layout)
    for file in LAYOUTS[layout].needed:
        whole = (root / file).read_bytes()
        for at in np.linspace(0, len(whole) - 1, 8).astype(int):
            data = bytearray(whole)
            data[at] ^= 0x55
            (root / file).write_bytes(data)
            message = ""
            try:
                validate_section(_read(layout, root))
            except InputError as error:
                message = str(error)
            assert "\n" not in message
        (root / file).write_bytes(whole)
