"""A patch store is built once, goes on where it stopped, and is never half of what it says it is."""

import numpy as np
import pandas as pd
import pytest

from fabricate import (
    N_SPOTS,
    SECTIONS,
    WITHOUT_IMAGE,
    contents,
    counts_file,
    edit_table,
    full_disk,
    image_file,
    lattice_section,
    refused,
    spotfile,
    write_her2st,
)
from hifusion import files
from hifusion.readers import her2st
from hifusion.slide import Slide
from hifusion.store import MANIFEST, Store, prepare, region_shrink

REGION_PX = 32


@pytest.fixture
def root(tmp_path):
    return write_her2st(tmp_path / "study")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the data and that of a store of all of it, not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    root = write_her2st(folder / "study")
    prepare(her2st.read(root), folder / "store", region_px=REGION_PX)
    return root, folder / "store"


def _build(root, out, names=SECTIONS, **options):
    return prepare(her2st.read(root, names), out, **({"region_px": REGION_PX} | options))


def _stop_at(section, done):
    """A progress callback that stops the build when so many spots of a section are done."""

    def progress(name, spots_done, spots):
        if (name, spots_done) == (section, done):
            raise KeyboardInterrupt

    return progress


def test_regions_are_the_patches_at_the_spots_memory_mapped(built):
    root, out = built
    store = Store.open(out)
    assert store.region_px == REGION_PX and store.mpp is None
    for name in set(SECTIONS) - {WITHOUT_IMAGE}:
        slide, section = Slide(image_file(root, name)), store.section(name)
        regions, inside = store.regions(name), store.inside(name)
        assert isinstance(regions, np.memmap) and not regions.flags.writeable
        assert regions.dtype == np.uint8 and regions.shape == (N_SPOTS, REGION_PX, REGION_PX, 3)
        assert inside.dtype == np.int32
        for row, (x, y) in enumerate(section.obsm["spatial"]):
            patch, box = slide.read_patch(x, y, REGION_PX)
            np.testing.assert_array_equal(regions[row], patch)
            np.testing.assert_array_equal(inside[row], box)


def test_sections_come_back_as_they_were_read(built):
    root, out = built
    store = Store.open(out)
    assert list(store.manifest["sections"]) == list(SECTIONS)
    for section, name in zip(her2st.read(root), SECTIONS, strict=True):
        stored = store.section(name)
        assert (stored.layers["counts"] != section.layers["counts"]).nnz == 0
        np.testing.assert_array_equal(stored.obsm["spatial"], section.obsm["spatial"])
        assert stored.uns["hifusion"] == section.uns["hifusion"]
        assert store.manifest["sections"][name]["patient"] == name[0]
        assert store.manifest["sections"][name]["spots"] == N_SPOTS


def test_sections_without_an_image_are_stored_counts_only(built):
    store = Store.open(built[1])
    assert store.section(WITHOUT_IMAGE).n_obs == N_SPOTS
    assert store.regions(WITHOUT_IMAGE) is None and store.inside(WITHOUT_IMAGE) is None
    assert store.manifest["sections"][WITHOUT_IMAGE]["image"] == ""


def test_manifest_holds_the_digest_of_each_image_and_file(built):
    root, out = built
    entry = Store.open(out).manifest["sections"]["A1"]
    assert entry["image"] == files.digest_file(image_file(root, "A1"))
    assert set(entry["files"]) == {"sections/A1.h5ad", "regions/A1.npy", "regions/A1.inside.npy"}
    for name, kept in entry["files"].items():
        assert kept == {"bytes": (out / name).stat().st_size, "sha256": files.digest_file(out / name)}


def test_regions_at_a_chosen_scale_are_shrunk_slide_patches(root, tmp_path):
    """At twice the native um per pixel a region of 32 px averages 64 px of the slide."""
    section = next(her2st.read(root, ["A1"]))
    mpp = 2 * section.uns["hifusion"]["mpp"]
    store = _build(root, tmp_path / "store", ["A1"], mpp=mpp)
    assert store.mpp == mpp and region_shrink(section, mpp) == pytest.approx(2) and region_shrink(section, None) == 1
    patch, inside = Slide(image_file(root, "A1")).read_patch(*section.obsm["spatial"][7], REGION_PX, shrink=2.0)
    np.testing.assert_array_equal(store.regions("A1")[7], patch)
    np.testing.assert_array_equal(store.inside("A1")[7], inside)


def test_second_call_writes_nothing(built):
    root, out = built
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}
    calls = []
    _build(root, out, progress=lambda *call: calls.append(call))
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")} == before
    assert calls == [(name, N_SPOTS, N_SPOTS) for name in SECTIONS]


def test_progress_counts_the_spots_of_each_section(root, tmp_path):
    calls = []
    _build(root, tmp_path / "store", ["A1", "B2"], progress=lambda *call: calls.append(call))
    assert calls == [
        *(("A1", i + 1, N_SPOTS) for i in range(N_SPOTS)),
        ("A1", N_SPOTS, N_SPOTS),
        ("B2", N_SPOTS, N_SPOTS),
    ]


@pytest.mark.parametrize("section, done", [("A1", 1), ("A2", 13), ("B1", N_SPOTS)])
@pytest.mark.parametrize("torn_bytes", [0, 1000])
def test_interrupted_build_goes_on_to_the_same_bytes(section, done, torn_bytes, built, tmp_path):
    """Also where the last row was only written in part."""
    root, whole = built
    out = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        _build(root, out, progress=_stop_at(section, done))
    assert not (out / "regions" / f"{section}.npy").exists() and not (out / "sections" / f"{section}.h5ad").exists()
    (part,) = (out / "regions").glob(".*.part")
    data = part.read_bytes()
    part.write_bytes(data[: len(data) - torn_bytes])
    _build(root, out)
    assert contents(out) == contents(whole)


def test_rows_already_cut_are_kept(root, tmp_path):
    out = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        _build(root, out, ["A1"], progress=_stop_at("A1", 5))
    (part,) = (out / "regions").glob(".*.part")
    rows = bytearray(part.read_bytes())
    mark = len(rows) - 1  # the last value of the fifth region
    rows[mark] ^= 0xFF
    part.write_bytes(rows)
    assert _build(root, out, ["A1"]).regions("A1")[4, -1, -1, 2] == rows[mark]


def test_what_was_cut_from_an_older_input_is_neither_used_nor_left(root, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _build(root, tmp_path / "store", ["A1"], progress=_stop_at("A1", 5))
    edit_table(spotfile(root, "A1"), lambda rows: rows[1].__setitem__(4, "25.0"))
    assert contents(_build(root, tmp_path / "store", ["A1"]).root) == contents(
        _build(root, tmp_path / "new", ["A1"]).root
    )


def test_changed_input_is_cut_again_and_other_sections_are_left(root, tmp_path):
    out = _build(root, tmp_path / "store").root
    untouched = {path: path.stat().st_mtime_ns for path in out.glob("*/*") if not path.name.startswith("A1")}
    edit_table(counts_file(root, "A1"), lambda rows: rows[1].__setitem__(1, "77"))
    store = _build(root, out)
    assert store.section("A1").layers["counts"][0, 0] == 77
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    Store.open(out)


def test_section_that_lost_its_image_becomes_counts_only(root, tmp_path):
    out = _build(root, tmp_path / "store", ["A1"]).root
    image_file(root, "A1").unlink()
    store = _build(root, out, ["A1"])
    assert store.regions("A1") is None and store.inside("A1") is None


def test_sections_can_be_added_to_a_store(built, root, tmp_path):
    out = _build(built[0], tmp_path / "store", ["A1"]).root
    assert list(_build(built[0], out, ["B1", "B2"]).manifest["sections"]) == ["A1", "B1", "B2"]


@pytest.mark.parametrize(
    "options, named", [({"region_px": 64}, "region_px=32, not 64"), ({"mpp": 1.0}, "mpp=None, not 1.0")]
)
def test_store_of_other_settings_is_refused_and_kept(options, named, built):
    root, out = built
    before = contents(out)
    with refused(str(out), named, "another folder"):
        _build(root, out, **options)
    assert contents(out) == before


@pytest.mark.parametrize(
    "options", [{"region_px": 0}, {"region_px": 33}, {"mpp": 0.0}, {"mpp": -1.0}, {"mpp": np.nan}, {"mpp": np.inf}]
)
def test_impossible_settings_are_refused(options, tmp_path):
    with refused(*(f"{key}={value}" for key, value in options.items()), "is not possible"):
        prepare([], tmp_path / "store", **options)
    assert contents(tmp_path) == {}


def test_a_folder_that_holds_something_else_is_refused_and_kept(root, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("words")
    (tmp_path / "file").write_text("words")
    for out in (tmp_path / "full", tmp_path / "file"):
        before = contents(tmp_path)
        with refused(str(out), "holds no store", "new folder"):
            _build(root, out)
        assert contents(tmp_path) == before


DAMAGES = {
    "changed": (
        lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        "was changed",
    ),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "missing or cut short"),
    "deleted": (lambda path: path.unlink(), "missing or cut short"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["sections/A1.h5ad", "regions/A1.npy", "regions/A1.inside.npy"])
def test_damaged_store_is_noticed_on_opening_and_mended_by_a_second_build(damage, file, root, tmp_path):
    out = _build(root, tmp_path / "store", ["A1"]).root
    whole = contents(out)
    spoil, words = DAMAGES[damage]
    spoil(out / file)
    with refused(str(out), words, "hifusion prepare"):
        Store.open(out)
    (out / file).unlink(missing_ok=True)  # as the message says
    _build(root, out, ["A1"])
    assert contents(Store.open(out).root) == whole


def test_what_is_no_store_is_refused(tmp_path):
    with refused(str(tmp_path), "holds no patch store", "hifusion prepare"):
        Store.open(tmp_path)
    for text, words in [("[]", "does not describe"), ('{"format": 1}', "does not describe"), ("{", "not a JSON file")]:
        (tmp_path / MANIFEST).write_text(text)
        with refused(str(tmp_path / MANIFEST), words):
            Store.open(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": 99, "sections": {}}')
    with refused("format 99 is not 1"):
        Store.open(tmp_path)


def test_image_that_went_away_after_reading_is_named(root, tmp_path):
    sections = list(her2st.read(root, ["A1", "A2"]))
    image_file(root, "A2").unlink()
    with refused(str(image_file(root, "A2")), "section A2"):
        prepare(sections, tmp_path / "store", region_px=REGION_PX)
    assert list(Store.open(tmp_path / "store").manifest["sections"]) == ["A1"]


def _set(path, row, column, value):
    edit_table(path, lambda rows: rows[row].__setitem__(column, value))


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_INPUT = {
    "unreadable image": (lambda root: image_file(root, "A2").write_text("words"), "A2_HE.jpg"),
    "truncated image": (lambda root: _cut(image_file(root, "A2")), "A2_HE.jpg"),
    "spotfile of another section": (
        lambda root: spotfile(root, "A2").write_bytes(spotfile(root, "B1").read_bytes()),
        "A2_selection.tsv",
    ),
    "spot outside the image": (lambda root: _set(spotfile(root, "A2"), 26, 4, "400.0"), "A2_HE.jpg"),
    "duplicate spots": (lambda root: edit_table(counts_file(root, "A2"), lambda r: r.append(r[1])), "A2.tsv.gz"),
    "duplicate genes": (lambda root: _set(counts_file(root, "A2"), 0, 2, "GENE00"), "A2.tsv.gz"),
    "NaN count": (lambda root: _set(counts_file(root, "A2"), 3, 3, "NaN"), "A2.tsv.gz"),
    "negative count": (lambda root: _set(counts_file(root, "A2"), 3, 3, "-1"), "A2.tsv.gz"),
    "fractional count": (lambda root: _set(counts_file(root, "A2"), 3, 3, "0.5"), "A2.tsv.gz"),
    "truncated table": (lambda root: _cut(counts_file(root, "A2")), "A2.tsv.gz"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_stops_the_build_in_one_line_and_leaves_only_whole_sections(case, built, root, tmp_path):
    spoil, named = BAD_INPUT[case]
    spoil(root)
    out = tmp_path / "store"
    with refused(named):
        _build(root, out, ["A1", "A2"])
    assert set(contents(out)) == {MANIFEST, "sections/A1.h5ad", "regions/A1.npy", "regions/A1.inside.npy"}
    assert list(Store.open(out).manifest["sections"]) == ["A1"]


def test_spot_outside_the_image_is_named_with_its_place(root, tmp_path):
    _set(spotfile(root, "A1"), 26, 5, "-3.0")
    with refused("1 of 26 spots", "400 x 376 px", "first 10x13 at x=380, y=-3", "full-resolution pixels"):
        _build(root, tmp_path / "store", ["A1"])
    assert not (tmp_path / "store" / MANIFEST).exists()


def test_refused_new_input_leaves_the_old_store_as_it_was(root, tmp_path):
    out = _build(root, tmp_path / "store", ["A1"]).root
    before = contents(out)
    _set(spotfile(root, "A1"), 26, 5, "-3.0")
    with refused("outside"):
        _build(root, out, ["A1"])
    assert contents(Store.open(out).root) == before


@pytest.mark.parametrize("free_bytes", [100, 60_000])
def test_full_disk_keeps_whole_sections_and_a_second_call_completes(free_bytes, built, tmp_path):
    """A1 is there; then no file may grow past a header, or past some rows of regions."""
    root, whole = built
    out = _build(root, tmp_path / "store", ["A1"]).root
    before = contents(out)
    with full_disk(free_bytes), refused(str(out), "cannot be written", "same command again"):
        _build(root, out)
    after = contents(out)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("regions/.A2.npy.") for name in set(after) - set(before))
    assert list(Store.open(out).manifest["sections"]) == ["A1"]
    _build(root, out)
    assert contents(out) == contents(whole)


def test_full_disk_while_counts_are_written_leaves_nothing(tmp_path):
    section = lattice_section({f"G{i}": np.arange(36) for i in range(30)})
    with full_disk(2000), refused("A1.h5ad", "cannot be written"):
        prepare([section], tmp_path / "store")
    assert contents(tmp_path) == {}
    assert prepare([section], tmp_path / "store").section("A1").n_obs == 36


def test_labels_that_came_later_are_taken_up(root, tmp_path):
    _build(root, tmp_path / "store", ["A1"])
    assert "label" not in Store.open(tmp_path / "store").section("A1").obs
    (section,) = her2st.read(root, ["A1"])
    section.obs["label"] = pd.Categorical(["tumour"] * section.n_obs)
    prepare([section], tmp_path / "store", region_px=REGION_PX)
    assert (Store.open(tmp_path / "store").section("A1").obs["label"] == "tumour").all()
