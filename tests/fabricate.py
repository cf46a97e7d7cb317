"""Tiny inputs made by code: a her2st folder of four sections, one section in memory, a disk that is full."""

import gzip
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData
from PIL import Image

from hifusion.errors import InputError
from hifusion.section import build_section

SECTIONS = ("A1", "A2", "B1", "B2")
WITHOUT_IMAGE = "B2"
GENES = tuple(f"GENE{i:02d}" for i in range(30))
SIZE_PX = (400, 376)  # (width, height)
PITCH_PX = 72
MPP = 200 / PITCH_PX
N_SPOTS = 26


def spots_of(name: str) -> list[tuple[int, int]]:
    """Array positions (x, y) of a section: 6 x 5, of which each section lacks four others."""
    array = [(x, y) for y in range(9, 14) for x in range(5, 11)]
    first = 4 * SECTIONS.index(name)
    return array[:first] + array[first + 4 :]


def centres_of(name: str) -> np.ndarray:
    """Spot centres (x, y) in pixels, ``(N, 2)``; the outermost are 20 px from the image's edge."""
    return np.array([(20 + PITCH_PX * (x - 5), 44 + PITCH_PX * (y - 9)) for x, y in spots_of(name)], dtype=float)


def counts_of(name: str) -> np.ndarray:
    """Counts ``(N, genes)`` of a section, other ones for each."""
    rng = np.random.default_rng(SECTIONS.index(name))
    return rng.poisson(np.linspace(0.2, 12, len(GENES)), (N_SPOTS, len(GENES)))


def image_of(name: str) -> np.ndarray:
    """A smooth uint8 ``(height, width, 3)`` picture, other colours in each section."""
    y, x = np.mgrid[: SIZE_PX[1], : SIZE_PX[0]]
    waves = [np.sin(x / (17 + c) + SECTIONS.index(name)) + np.cos(y / (23 - c)) for c in range(3)]
    return (np.stack(waves, axis=-1) * 50 + 120).astype(np.uint8)


def write_her2st(root: Path) -> Path:
    """Write sections A1, A2, B1 with an image and B2 without one in the raw her2st layout; gives ``root``."""
    data = root / "data"
    for folder in ("ST-cnts", "ST-spotfiles"):
        (data / folder).mkdir(parents=True)
    for name in SECTIONS:
        spots = spots_of(name)
        rows = zip(spots, counts_of(name), strict=True)
        table = [["", *GENES], *([f"{x}x{y}", *map(str, row)] for (x, y), row in rows)]
        write_table(counts_file(root, name), table)
        head = ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"]
        places = zip(spots, centres_of(name), strict=True)
        write_table(
            spotfile(root, name),
            [head, *([f"{x}", f"{y}", f"{x}", f"{y}", f"{u}", f"{v}", "1"] for (x, y), (u, v) in places)],
        )
        if name != WITHOUT_IMAGE:
            image_file(root, name).parent.mkdir(parents=True)
            Image.fromarray(image_of(name)).save(image_file(root, name), quality=95, dpi=(72, 72))
    return root


def counts_file(root: Path, name: str) -> Path:
    return root / "data" / "ST-cnts" / f"{name}.tsv.gz"


def spotfile(root: Path, name: str) -> Path:
    return root / "data" / "ST-spotfiles" / f"{name}_selection.tsv"


def image_file(root: Path, name: str) -> Path:
    return root / "data" / "ST-imgs" / name[0] / name / f"{name}_HE.jpg"


def read_table(path: Path) -> list[list[str]]:
    """Cells of a tab-separated table, plain or gzipped."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [line.split("\t") for line in text.splitlines()]


def write_table(path: Path, rows: list[list[str]]) -> None:
    """Write tab-separated cells, gzipped where the name says so."""
    data = "".join("\t".join(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, compresslevel=1, mtime=0) if path.suffix == ".gz" else data)


def edit_table(path: Path, change: Callable[[list[list[str]]], object]) -> None:
    """Change the cells of a table in place; what ``change`` gives back is not looked at."""
    rows = read_table(path)
    change(rows)
    write_table(path, rows)


def lattice_section(counts: Mapping[str, np.ndarray], name: str = "A1", columns: int = 6) -> AnnData:
    """A counts-only section in memory: ``counts`` by gene, each ``(N,)``, on a lattice of so many columns."""
    table = np.stack(list(counts.values()), axis=1)
    row, column = np.divmod(np.arange(len(table)), columns)
    return build_section(
        table,
        genes=list(counts),
        spots=[f"{x}x{y}" for x, y in zip(column, row, strict=True)],
        centres_px=np.stack([column, row], axis=1) * float(PITCH_PX),
        name=name,
        patient=name[0],
        mpp=MPP,
        spot_diameter_um=100.0,
        pitch_um=200.0,
        array_row=row,
        array_col=column,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file under a folder by its relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """Expect an InputError whose message is one line and holds each of ``words``."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message.strip("\n"), message
    assert message == message.strip()
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


@contextmanager
def full_disk(free_bytes: int) -> Iterator[None]:
    """A disk on which no file can grow past so many bytes: writing more fails as it does on a full one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
