"""Sections are written whole, under safe names, over nothing that an import did not write."""

import shutil

import numpy as np
import pytest

from fabricate import WITHOUT_IMAGE, contents, full_disk, lattice_section, refused, write_her2st
from fabricate_layouts import write_anndata
from hifusion import readers
from hifusion.importing import import_sections
from hifusion.readers.options import ReadOptions
from hifusion.section import predicted_section, read_section, write_section


def _same(folder, other):
    """Both hold the same sections; the compression of HDF5 does not give the same bytes twice."""
    assert sorted(contents(folder)) == sorted(contents(other))
    for path in folder.iterdir():
        one, two = read_section(path), read_section(other / path.name)
        assert one.uns["hifusion"] == two.uns["hifusion"]
        np.testing.assert_array_equal(one.obsm["spatial"], two.obsm["spatial"])
        np.testing.assert_array_equal(one.layers["counts"].toarray(), two.layers["counts"].toarray())
        pictures = [section.uns["spatial"][path.stem]["images"].get("hires", 0) for section in (one, two)]
        np.testing.assert_array_equal(*pictures)


@pytest.fixture
def source(tmp_path):
    return write_her2st(tmp_path / "raw")


def test_sections_are_written_by_name_and_read_back(source, tmp_path):
    seen = []
    paths = import_sections(source, tmp_path / "out", progress=lambda *told: seen.append(told))
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        f"out/{n}.h5ad" for n in ("A1", "A2", "B1", "B2")
    ]
    assert seen == [(name, i + 1, 4) for i, name in enumerate(("A1", "A2", "B1", "B2"))]
    for path, section in zip(paths, readers.find_reader(source).read(source), strict=True):
        back = read_section(path)
        np.testing.assert_array_equal(back.layers["counts"].toarray(), section.layers["counts"].toarray())
        assert back.uns["hifusion"] == section.uns["hifusion"]


def test_only_wanted_sections_are_written_with_what_is_told(source, tmp_path):
    options = ReadOptions(patients={WITHOUT_IMAGE: "P"}, mpp=0.5)
    (path,) = import_sections(source, tmp_path / "out", sections=[WITHOUT_IMAGE], options=options)
    assert sorted(contents(tmp_path / "out")) == ["B2.h5ad"]
    facts = read_section(path).uns["hifusion"]
    assert (facts["patient"], facts["mpp"]) == ("P", 0.5)


def test_a_second_import_changes_nothing(source, tmp_path):
    import_sections(source, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    import_sections(source, tmp_path / "out")
    _same(tmp_path / "out", tmp_path / "before")


def test_what_was_imported_is_itself_a_source(source, tmp_path):
    import_sections(source, tmp_path / "out")
    again = import_sections(tmp_path / "out", tmp_path / "again", layout="anndata")
    assert [path.stem for path in again] == ["A1", "A2", "B1", "B2"]
    _same(tmp_path / "again", tmp_path / "out")


def test_layout_that_is_named_is_the_one_that_is_read(source, tmp_path):
    with refused("no known data layout", "visium: needs"):
        import_sections(source, tmp_path / "out", layout="visium")


@pytest.mark.parametrize(
    "told, words",
    [
        ({"sections": ["Z9"]}, ["sections name Z9", "A1, A2, B1, B2"]),
        ({"options": ReadOptions(patients={"a1": "P"})}, ["patients name a1"]),
        ({"options": ReadOptions(images={"A7": "x.png"})}, ["images name A7"]),
    ],
)
def test_names_of_no_section_are_refused(told, words, source, tmp_path):
    with refused(str(source), *words):
        import_sections(source, tmp_path / "out", **told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../x", "/x", "..", ".", "", ".hidden", "a\\b", "a\nb", "a\0b", "a/b"])
def test_a_name_that_is_a_path_writes_nowhere(name, tmp_path, monkeypatch):
    section = lattice_section({"A": np.arange(12)})
    section.uns["hifusion"]["section"] = name

    class Reader:
        lacks = staticmethod(lambda root: "")
        names = staticmethod(lambda root: [name])
        read = staticmethod(lambda root, sections, options: iter([section]))

    monkeypatch.setitem(readers.READERS, "odd", Reader)
    (tmp_path / "raw").mkdir()
    with refused("cannot be a file name"):
        import_sections(tmp_path / "raw", tmp_path / "deep" / "out", layout="odd")
    assert contents(tmp_path) == {} and [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_files_of_another_making_are_left_alone(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "A2.h5ad").write_bytes(b"somebody's own")
    with refused("A2.h5ad", "no section that hifusion wrote", "another folder"):
        import_sections(source, out)
    (out / "A2.h5ad").unlink()
    section = lattice_section({"A": np.arange(12)}, "A2")
    predicted = predicted_section(
        section, np.ones((12, 1)), genes=["A"], normalisation="log_share", panel_digest="d", run="run-1"
    )
    write_section(predicted, out / "A2.h5ad")
    before = contents(out)
    with refused("A2.h5ad", "a prediction by run-1"):
        import_sections(source, out)
    assert contents(out) == before


def test_the_source_is_never_overwritten(tmp_path):
    write_anndata(tmp_path / "raw")
    before = contents(tmp_path / "raw")
    for given in (tmp_path / "raw", tmp_path / "raw" / "left.h5ad"):
        with refused("is the source itself"):
            import_sections(given, tmp_path / "raw")
    assert contents(tmp_path / "raw") == before


def test_a_damaged_section_keeps_those_before_it_and_leaves_no_part(source, tmp_path):
    (source / "data/ST-cnts/B1.tsv.gz").write_bytes(b"words")
    with refused("B1.tsv.gz"):
        import_sections(source, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["A1.h5ad", "A2.h5ad"]


def test_a_full_disk_is_one_line_and_a_second_import_completes(source, tmp_path):
    with full_disk(20_000), refused("A1.h5ad", "free some space"):
        import_sections(source, tmp_path / "out")
    assert contents(tmp_path / "out") == {}
    assert len(import_sections(source, tmp_path / "out")) == 4


def test_a_source_that_is_not_there_is_one_line(tmp_path):
    with refused("nowhere", "no such file or folder"):
        import_sections(tmp_path / "nowhere", tmp_path / "out")
