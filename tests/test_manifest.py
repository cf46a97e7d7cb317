"""A manifest is read as it is meant, or refused whole with the line that is wrong."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabricate import refused
from hifusion.errors import InputError
from hifusion.manifest import COLUMNS, SlideRow, read_manifest


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "manifest.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_every_column_is_read_and_relative_paths_start_at_the_manifest(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "name,slide,mpp,mask,lattice,stride_um\n"
        "first,a/one.svs,0.5,masks/one.png,hexagonal,50\n"
        f'"with, comma",{tmp_path}/two.tiff,,,,\n',
    )
    assert read_manifest(path) == [
        SlideRow("first", tmp_path / "a/one.svs", 0.5, tmp_path / "masks/one.png", "hexagonal", 50.0),
        SlideRow("with, comma", tmp_path / "two.tiff"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "slide\na.svs\nb.svs\n",
        "\ufeffslide\r\na.svs\r\nb.svs\r\n",
        " slide , mpp \na.svs\n\n , \nb.svs,\n",
        'slide\n"a.svs"\nb.svs',
    ],
    ids=["plain", "as Excel writes it", "spaces and empty lines", "quotes, no last line end"],
)
def test_a_slide_is_named_after_its_file(tmp_path: Path, text: str) -> None:
    assert [(row.name, row.slide) for row in read_manifest(write(tmp_path, text))] == [
        ("a", tmp_path / "a.svs"),
        ("b", tmp_path / "b.svs"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["has no column slide", "lattice"]),
        ("slide\n", ["names no slide"]),
        ("name\nx\n", ["has no column slide"]),
        ("slide,patient\na.svs,x\n", ["unknown column 'patient'", "mpp, mask, lattice, stride_um"]),
        ("slide;mpp\na.svs;1\n", ["unknown column 'slide;mpp'", "separated by commas"]),
        ("slide,slide\na,b\n", ["column slide twice"]),
        ("slide,mpp\na.svs,1\nb.svs,fast\n", ["line 3", "mpp 'fast'"]),
        ("slide,mpp\na.svs,-1\n", ["line 2", "mpp '-1'"]),
        ("slide,mpp\na.svs,nan\n", ["line 2", "mpp 'nan'"]),
        ("slide,mpp\na.svs,200\n", ["line 2", "up to 100"]),
        ("slide,mpp\na.svs,0,5\n", ["line 2", "has 3 cells", "quotes"]),
        ("slide,stride_um\na.svs,201\n", ["line 2", "stride_um '201'", "up to 200"]),
        ("slide,stride_um\na.svs,inf\n", ["line 2", "stride_um 'inf'"]),
        ("slide,lattice\na.svs,round\n", ["line 2", "lattice 'round'", "square or hexagonal"]),
        ("slide,mpp\n,1\n", ["line 2", "names no slide"]),
        ("slide,name\na.svs,x\nb.svs,X\n", ["line 3", "'X' stands on line 2 too", "column name"]),
        ("slide\na/scan.svs\nb/scan.svs\n", ["line 3", "'scan' stands on line 2 too"]),
        ("slide,name\na.svs,../x\n", ["line 2", "cannot be a file name"]),
        ("slide,name\na.svs,.hidden\n", ["line 2", "cannot be a file name"]),
        (f"slide,name\na.svs,{'ä' * 150}\n", ["line 2", "too long"]),
        ("slide\na\0.svs\n", ["line 2", "NUL"]),
        ('slide\n"a.svs\n', ["cannot be read as CSV"]),
        (b"slide\n\xff\xfe\n", ["cannot be read as CSV in UTF-8"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_with_its_place(tmp_path: Path, text: str | bytes, said: list[str]) -> None:
    with refused("manifest.csv", *said):
        read_manifest(write(tmp_path, text), most_stride_um=200)


def test_no_manifest_is_said(tmp_path: Path) -> None:
    with refused("no such manifest"):
        read_manifest(tmp_path / "none.csv")
    with refused("cannot be read as CSV"):
        read_manifest(tmp_path)


@given(data=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: f"slide,name\n{text}\n".encode()))
def test_whatever_stands_there_gives_safe_names_or_one_line(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    path = write(tmp_path_factory.mktemp("any"), data)
    try:
        names = [row.name for row in read_manifest(path)]
    except InputError as error:
        said = str(error)
        names = []
    else:
        said = ""
    folder = path.parent / "slides"
    assert all((folder / name).parent == folder for name in names)
    assert len({name.casefold() for name in names}) == len(names)
    assert "\n" not in said


def test_the_columns_are_told_in_the_help() -> None:
    from typer.main import get_command

    from hifusion.cli import app

    (option,) = [its for its in get_command(app).commands["predict"].params if its.name == "slides"]
    assert all(column in option.help for column in COLUMNS)
